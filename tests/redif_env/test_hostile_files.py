"""Files from strangers: refused with a typed error, and nothing in them is run.

Every pickle here would create a marker, and so would every module that a folder brings.
"""

import json
import os
import pickle
import shutil
import struct
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from agents.evaluation import JUDGE_FOLDER, Judge
from agents.export import export_student, load_adaptive
from agents.inception import load_inception
from examples.evaluate import read_samples
from redif_env import Conditions, TeacherBank, load_teacher
from redif_env.errors import InvalidArgumentError, ReDiFError, TeacherFolderError
from redif_env.loading import BUNDLED
from redif_env.prompts import read_index
from redif_env.rewards.scorers import load_head
from redif_env.untrusted import MAX_ENTRIES, check_folder, is_plain, read_json

DIGITS = BUNDLED["digits"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CODE = "open({!r}, 'w').close()\n"


class Marker:
    """Creates a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (CODE.format(self.path),))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "executed"


@pytest.fixture
def pickled(marker):
    return pickle.dumps(Marker(marker))


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(DIGITS, tmp_path / "teacher")


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


def test_the_pickle_would_run(marker, pickled, tmp_path):
    """The negative control: what the tests below must not do, done."""
    pickle.loads(pickled)
    assert marker.exists()
    marker.unlink()
    torch.save({"weight": Marker(marker)}, tmp_path / "weights.bin")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert marker.exists()


def a_pickle_as_weights(folder, pickled, marker):
    (folder / WEIGHTS).write_bytes(pickled)


def a_torch_file_as_weights(folder, pickled, marker):
    torch.save({"weight": Marker(marker)}, folder / WEIGHTS)


def a_torch_file_beside(folder, pickled, marker):
    """As folders of old have it; diffusers would fall back to it."""
    (folder / WEIGHTS).unlink()
    torch.save({"weight": Marker(marker)}, folder / "unet/diffusion_pytorch_model.bin")


def a_header_of_exabytes(folder, pickled, marker):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


def a_header_beyond_the_file(folder, pickled, marker):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**31) + b"{" * 64)


def a_tensor_beyond_the_file(folder, pickled, marker):
    header = (
        b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 4398046511104]}}'
    )
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def half_a_file(folder, pickled, marker):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def shards_elsewhere(name):
    def change(folder, pickled, marker):
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / WEIGHTS, outside)
        names = dict.fromkeys(load_file(outside), name.format(outside=outside))
        index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": names}))

    return change


def a_link(target):
    def change(folder, pickled, marker):
        outside = folder.parent / "outside.safetensors"
        shutil.move(folder / WEIGHTS, outside)
        (folder / WEIGHTS).symlink_to(target.format(outside=outside))

    return change


def a_linked_folder(folder, pickled, marker):
    shutil.move(folder / "unet", folder.parent / "outside")
    (folder / "unet").symlink_to(folder.parent / "outside")


def a_pipe(name):
    def change(folder, pickled, marker):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def config(name, **changes):
    return lambda folder, pickled, marker: edit(folder / name, **changes)


def nested_json(folder, pickled, marker):
    (folder / "unet/config.json").write_text("[" * 200_000)


UNET, SCHEDULER = "unet/config.json", "scheduler/scheduler_config.json"
FOLDERS = {
    "a pickle as weights": a_pickle_as_weights,
    "a torch file as weights": a_torch_file_as_weights,
    "a torch file beside": a_torch_file_beside,
    "a header of exabytes": a_header_of_exabytes,
    "a header beyond the file": a_header_beyond_the_file,
    "a tensor beyond the file": a_tensor_beyond_the_file,
    "half a file": half_a_file,
    "shards above": shards_elsewhere("../../outside.safetensors"),
    "shards by an absolute path": shards_elsewhere("{outside}"),
    "shards in a pickle": shards_elsewhere("pytorch_model.bin"),
    "shards of no name": shards_elsewhere(""),
    "a link out": a_link("{outside}"),
    "a relative link out": a_link("../../outside.safetensors"),
    "a link to a device": a_link("/dev/zero"),
    "a link to itself": a_link("diffusion_pytorch_model.safetensors"),
    "a linked folder": a_linked_folder,
    "a pipe for a config": a_pipe(UNET),
    "a pipe for weights": a_pipe(WEIGHTS),
    "nested JSON": nested_json,
    "a module for a network": config(UNET, _class_name="os.system"),
    "a list for a network": config(UNET, _class_name=["config", "Network"]),
    "a module for a scheduler": config(SCHEDULER, _class_name="os.Scheduler"),
    "no scheduler at all": config(SCHEDULER, _class_name="KarrasDiffusionScheduler"),
    "a wider network than its weights": config(UNET, block_out_channels=[2**20, 2**21]),
    "a deeper network than its weights": config(UNET, layers_per_block=10**9),
}


@pytest.mark.parametrize("change", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_hostile_folder_is_refused(folder, pickled, marker, change):
    change(folder, pickled, marker)
    with pytest.raises(TeacherFolderError):
        load_teacher(folder)
    assert not marker.exists()


def test_an_honest_folder_in_pieces_is_not(folder):
    """The negative control of indices and links: those that stay inside are followed."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    halves = {"one.safetensors": names[::2], "two.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / "unet" / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    index = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.move(folder / "unet/two.safetensors", folder / "two.safetensors")
    (folder / "unet/two.safetensors").symlink_to("../two.safetensors")
    wanted = load_teacher("digits").denoiser.network.state_dict()
    found = load_teacher(folder).denoiser.network.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "repo/blobs", tmp_path / "repo/snapshots/revision"
    blobs.mkdir(parents=True)
    for path in (p for p in DIGITS.rglob("*") if p.is_file()):
        place = snapshot / path.relative_to(DIGITS)
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = blobs / path.relative_to(DIGITS).as_posix().replace("/", "-")
        shutil.copy(path, blob)
        place.symlink_to(blob)
    load_teacher(snapshot, num_steps=3)


def test_a_folder_of_everything_is_refused(monkeypatch, folder):
    assert MAX_ENTRIES > 1000
    monkeypatch.setattr("redif_env.untrusted.MAX_ENTRIES", 5)
    with pytest.raises(TeacherFolderError, match="a model's folder"):
        check_folder(folder)


TEXT = ["transformers", "CLIPTextModel"]
INDICES = {
    "a module": {"text_encoder": ["os", "system"]},
    "a module of the folder's own": {"text_encoder": ["stranger", "Encoder"]},
    "a module for another part": {"text_encoder": TEXT, "safety_checker": ["stranger", "Check"]},
    "code of its own": {"_class_name": ["stranger", "Pipeline"], "text_encoder": TEXT},
    "a class of any kind": {"text_encoder": ["transformers", "AutoModel"]},
    "a path": {"text_encoder": TEXT, "../outside": ["diffusers", "UNet2DModel"]},
    "an absolute path": {"text_encoder": TEXT, "/etc": ["diffusers", "UNet2DModel"]},
    "a class with code in it": {"vae": ["diffusers", "VQModel\nimport os"]},
    "a pipeline with code in it": {"_class_name": "DDPMPipeline\nimport os"},
}


@pytest.fixture
def stranger(folder, marker, monkeypatch):
    """A module that can be imported from the working directory, as scripts allow."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("stranger.py", "pipeline.py"):
        (folder / name).write_text(CODE.format(str(marker)))
    yield folder
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES.keys())
def test_a_hostile_index_is_refused(stranger, marker, index):
    (stranger / "text_encoder").mkdir()
    (stranger / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherFolderError, match=r"model_index\.json"):
        read_index(stranger)
    assert not marker.exists()


def test_prompts_import_nothing_of_a_stranger(stranger, marker):
    """The same through the front door, with a network that takes prompts."""
    from tiny_models import conditional_unet

    shutil.rmtree(stranger / "unet")
    conditional_unet().save_pretrained(stranger / "unet")
    (stranger / "model_index.json").write_text(json.dumps(INDICES["a module of the folder's own"]))
    with pytest.raises(TeacherFolderError, match="not run"):
        load_teacher(stranger, prompts=["a cat"])
    assert not marker.exists()
    __import__("stranger")  # the negative control: there was something to import
    assert marker.exists()


def test_an_export_copies_nothing_from_outside(folder, teacher, tmp_path):
    (tmp_path / "secret").mkdir()
    index = {"_class_name": "DDPMPipeline", "../secret": ["diffusers", "UNet2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    config, place = teacher.make_solver().config, tmp_path / "a" / "b" / "student"
    place.parent.mkdir(parents=True)
    with pytest.raises(TeacherFolderError):
        export_student(teacher.denoiser, torch.tensor([500.0]), config, place, folder)
    assert list(place.parent.iterdir()) == []


def test_a_pickle_in_the_cache_is_not_a_bank(teacher, tmp_path, marker, pickled):
    honest = TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    (path,) = tmp_path.glob("bank-*.safetensors")
    for content in (pickled, struct.pack("<Q", 2**62), b"", path.read_bytes()[:-8]):
        path.write_bytes(content)
        again = TeacherBank.build(teacher, 4, cache_dir=tmp_path)
        assert torch.equal(again.teacher_x_0, honest.teacher_x_0)
    path.unlink()
    os.mkfifo(path)
    TeacherBank.build(teacher, 4, cache_dir=tmp_path)
    assert not marker.exists()


def judge(folder, path):
    shutil.copytree(DIGITS / JUDGE_FOLDER, folder / "judge", dirs_exist_ok=True)
    shutil.copy(path, folder / "judge" / "model.safetensors")
    Judge.load(folder / "judge")


READERS = {
    "judge": judge,
    "conditions": lambda folder, path: Conditions.load(path),
    "samples": lambda folder, path: read_samples(path.rename(path.with_suffix(".npy"))),
    "head": lambda folder, path: load_head(path, 4),
    "inception": lambda folder, path: load_inception(path),
    "adaptive": lambda folder, path: load_adaptive(with_head(folder, path)),
}


def with_head(folder, path):
    """A folder whose schedule head is a torch file, to which diffusers would fall back."""
    (folder / "schedule_head").mkdir(exist_ok=True)
    settings = {
        "_class_name": "ScheduleHead",
        "kind": "beta",
        "max_steps": 2,
        "min_steps": 1,
        "latent_shape": [1, 8, 8],
        "num_classes": 10,
        "width": 4,
        "num_train_timesteps": 1000,
        "max_timestep": 999.0,
        "gap": 1.0,
        "num_parameters": 3,
    }
    (folder / "schedule_head" / "config.json").write_text(json.dumps(settings))
    shutil.copy(path, folder / "schedule_head" / "diffusion_pytorch_model.bin")
    edit(folder / "model_index.json", guidance_scale=1.0, null_class=10)
    return folder


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pickle", "torch", "array", "header", "pipe"])
def test_no_reader_unpickles(folder, tmp_path, marker, pickled, name, kind):
    if name == "inception":
        pytest.importorskip("torch_fidelity")
    path = tmp_path / "file"
    if kind == "pickle":
        path.write_bytes(pickled)
    elif kind == "torch":
        torch.save(Marker(marker), path)
    elif kind == "array":
        with open(path, "wb") as file:
            np.save(file, np.array([Marker(marker)], dtype=object), allow_pickle=True)
    elif kind == "header":
        path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif name in ("judge", "adaptive", "inception"):
        pytest.skip("a pipe can not be copied")
    else:
        os.mkfifo(path)
    with pytest.raises(ReDiFError):
        READERS[name](folder, path)
    assert not marker.exists()


@pytest.mark.parametrize("change", [{"num_features": 10**12}, {"num_halvings": 10**9}])
def test_a_judge_takes_no_more_memory_than_its_weights(tmp_path, change):
    place = shutil.copytree(DIGITS / JUDGE_FOLDER, tmp_path / "judge")
    edit(place / "config.json", **change)
    with pytest.raises(TeacherFolderError, match="judge"):
        Judge.load(place)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unet", True),
        ("a.safetensors", True),
        ("..", False),
        ("", False),
        ("a/b", False),
        ("/etc", False),
        ("a\\b", False),
        ("a\0", False),
        (None, False),
    ],
)
def test_plain_names(name, plain):
    assert is_plain(name) == plain


def test_json_that_is_too_large(monkeypatch, tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    monkeypatch.setattr("redif_env.untrusted.MAX_JSON", 3)
    with pytest.raises(InvalidArgumentError, match="8 bytes"):
        read_json(tmp_path / "a.json")
