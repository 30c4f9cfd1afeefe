"""`examples/evaluate.py` on tiny folders and files."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import tiny_models
import torch
from gymnasium import spaces
from matplotlib.image import imsave
from safetensors.torch import save_file

from agents.choices import make_head
from agents.export import describe_student, export_adaptive, export_student
from agents.sampling import sample
from examples import evaluate
from examples.evaluate import Args, parse_methods, read_samples
from redif_env import TeacherBank, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.loading import BUNDLED, load_teacher

NUM = 24
TINY = {"num_samples": NUM, "teacher_steps": 3, "num_resamples": 250}


@pytest.fixture(scope="module")
def tasks():
    """The tasks that tiny evaluations use, and their teacher."""
    teacher = load_teacher("digits", num_steps=3)
    return teacher, TeacherBank.build(teacher, NUM, split="test", seed=0)


def test_folders_and_files_side_by_side(tmp_path, tasks, capsys):
    teacher, bank = tasks
    grid = torch.tensor([850.0, 300.0, 0.0])
    student = tmp_path / "student"
    export_student(teacher.denoiser, grid, teacher.make_solver().config, student)
    samples = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)
    own = {"samples": samples, "x_T": bank.x_T, "condition": bank.condition}
    save_file(own, tmp_path / "own.safetensors")
    np.save(tmp_path / "noise.npy", bank.x_T.clamp(-1, 1).numpy())
    methods = (
        f"student={student}",
        f"file={tmp_path / 'own.safetensors'}",
        f"folder={BUNDLED['digits']}",
        f"noise={tmp_path / 'noise.npy'}",
    )
    out = tmp_path / "new" / "report.json"
    report = evaluate.main(Args(methods, num_steps=3, out=out, **TINY))
    assert json.loads(out.read_text()) == json.loads(json.dumps(report))
    found = report["methods"]
    # the same samples, whether drawn here or read
    expected = float((samples - bank.teacher_x_0).square().mean())
    for name in ("student", "file"):
        assert found[name]["paired_mse"]["estimate"] == pytest.approx(expected, rel=1e-4)
        assert found[name]["frechet"]["estimate"] == pytest.approx(
            found["student"]["frechet"]["estimate"], rel=1e-4
        )
    # the teacher's folder with the teacher's steps is the teacher
    assert found["folder"]["paired_mse"]["estimate"] == 0
    # a file that does not say from which noise is not paired, and has no classes
    assert not {"paired_mse", "label_agreement"} & set(found["noise"])
    assert found["noise"]["energy_distance"]["excess"]["low"] > 0
    printed = capsys.readouterr().out
    assert "energy_distance\n  floor" in printed
    assert "student is better against noise" in printed


def test_seeds_of_a_method_and_real_data(tmp_path, tasks):
    _, bank = tasks
    pictures = tmp_path / "real"
    pictures.mkdir()
    for row, image in enumerate(bank.teacher_x_0.clamp(-1, 1)):
        imsave(pictures / f"{row:03}.png", image[0].numpy(), cmap="gray", vmin=-1, vmax=1)
    grey = read_samples(pictures).samples
    assert grey.shape == (NUM, 3, 8, 8)
    # the picture's colours are rounded down, and then to bytes
    torch.testing.assert_close(grey[:, :1], bank.teacher_x_0.clamp(-1, 1), rtol=0, atol=2 / 127.5)
    np.save(tmp_path / "real.npy", grey[:, :1].numpy())
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, noise in zip(paths, (bank.x_T, -bank.x_T), strict=True):
        save_file({"x_0": noise.clamp(-1, 1)}, path)
    seeds = ",".join(map(str, paths))
    args = Args((f"noise={seeds}",), teacher="digits", reference=tmp_path / "real.npy", **TINY)
    report = evaluate.main(args)
    assert report["num_samples"] == report["num_reference"] == NUM // 2
    assert "paired_mse" not in report["methods"]["noise"]
    assert report["methods"]["noise"]["energy_distance"]["excess"]["low"] > 0


def test_seeds_keep_their_own_classes(tmp_path, tasks):
    """Two files of the teacher's samples, in two orders, agree with their labels as well as one."""
    _, bank = tasks
    images = bank.teacher_x_0.clamp(-1, 1)
    np.save(tmp_path / "real.npy", images.numpy())
    for name, order in (("a", torch.arange(NUM)), ("b", torch.arange(NUM - 1, -1, -1))):
        held = {"samples": images[order], "condition": bank.condition[order]}
        save_file(held, tmp_path / f"{name}.safetensors")
    save_file({"samples": images}, tmp_path / "c.safetensors")
    a, b, c = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    found = evaluate.main(Args((f"one={a}", f"two={a},{b}"), **TINY))["methods"]
    one, two = (found[name]["label_agreement"]["estimate"] for name in ("one", "two"))
    assert one == pytest.approx(two)
    assert one > 0.5
    with pytest.raises(InvalidArgumentError, match="with classes of 1 seeds of 2"):
        evaluate.main(Args((f"mixed={a},{c}",), **TINY))


def test_only_answers_to_the_same_tasks_are_paired(tmp_path, tasks):
    _, bank = tasks
    own = {"samples": bank.teacher_x_0, "x_T": bank.x_T, "condition": bank.condition}
    others = (bank.condition + 1) % 10
    unconditional = TeacherBank(bank.x_T, bank.teacher_x_0)

    def paired(bank=bank, **changes):
        held = {name: value for name, value in (own | changes).items() if value is not None}
        save_file(held, tmp_path / "own.safetensors")
        return read_samples(tmp_path / "own.safetensors", bank).paired

    assert paired()
    assert paired(samples=bank.teacher_x_0[:9], x_T=bank.x_T[:9], condition=bank.condition[:9])
    assert not paired(condition=others)
    assert not paired(condition=None)
    assert not paired(x_T=bank.x_T.flip(0))
    assert not paired(x_T=bank.x_T[:9])
    assert not paired(x_T=None)
    assert paired(unconditional, condition=None)
    assert paired(unconditional, condition=others)
    for wrong in (bank.condition[:9], bank.condition[:, None], bank.condition.float()):
        with pytest.raises(InvalidArgumentError, match=rf"condition=.*pass integers \({NUM},\)"):
            paired(condition=wrong)


def test_images_of_another_range_are_refused(tmp_path):
    """Bytes' range as floats; [0, 1] may be meant, and is warned of; points have any range."""
    images = torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def read(samples):
        np.save(tmp_path / "a.npy", samples.numpy())
        return read_samples(tmp_path / "a.npy").samples

    with pytest.raises(InvalidArgumentError, match=r"images in \[.*, 2\d\d.* in \[-1, 1\]"):
        read((images + 1) * 127.5)
    with pytest.raises(InvalidArgumentError, match="images in"):
        read(images - 2)
    with pytest.warns(RuntimeWarning, match=r"not of \[0, 1\]"):
        read((images + 1) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (1.9 * images, 500 * images.flatten(1), images.flatten(1).abs()):
            torch.testing.assert_close(read(fine), fine)
    channels_first = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(InvalidArgumentError, match=r"bytes \(N, H, W, C\)"):
        read(channels_first)


def test_the_noise_of_a_file_is_not_taken_for_its_samples(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x_T": torch.ones(3, 2), "x_hat": torch.zeros(3, 2)}, path)
    assert not read_samples(path).samples.any()
    for held in ({"x_T": torch.ones(3, 2)}, {"a": torch.ones(3, 2), "b": torch.ones(3, 2)}):
        save_file(held, path)
        with pytest.raises(InvalidArgumentError, match="name its tensor 'samples'"):
            read_samples(path)


def test_files_that_are_sorted_are_cut_fairly(tmp_path):
    """Twice the rows that the floor has, cluster by cluster: the first half has half of them."""
    generator = torch.Generator().manual_seed(0)
    centres = 6 * torch.arange(4).repeat_interleave(120)[:, None]
    points = torch.randn(2, 480, 2, generator=generator) + centres
    np.save(tmp_path / "real.npy", points[0, ::2].numpy())
    np.save(tmp_path / "same.npy", points[1].numpy())
    np.save(tmp_path / "half.npy", points[1, :240].numpy())
    methods = tuple(f"{name}={tmp_path / name}.npy" for name in ("same", "half"))
    report = evaluate.main(Args(methods, reference=tmp_path / "real.npy", num_resamples=200))
    same, half = (report["methods"][name]["sliced_wasserstein"] for name in ("same", "half"))
    assert same["excess"]["low"] < 0 < same["excess"]["high"]
    assert half["excess"]["low"] > 1  # negative control: what a cut of the first rows would give


def test_points_against_points(tmp_path):
    """No teacher, no judge, two columns."""
    points = torch.randn(3, 60, 2, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "real.npy", points[:2].flatten(0, 1).numpy())
    np.save(tmp_path / "off.npy", points[2].numpy() + 1)
    options = {"reference": tmp_path / "real.npy", "num_resamples": 100}
    report = evaluate.main(Args((str(tmp_path / "off.npy"),), **options))
    (found,) = report["methods"].values()
    assert found["sliced_wasserstein"]["excess"]["low"] > 0
    assert not {"frechet", "paired_mse", "label_balance"} & set(found)
    with pytest.raises(InvalidArgumentError, match="whose noise digits answers"):
        evaluate.main(Args(("digits",), **options))


def test_bytes_are_images(tmp_path):
    images = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8)
    np.save(tmp_path / "grey.npy", images[None].numpy())
    grey = read_samples(tmp_path / "grey.npy").samples
    assert grey.flatten().tolist() == pytest.approx([-1, 1, -0.6, 0.6])
    coloured = images[None, :, :, None].expand(-1, -1, -1, 4)
    np.save(tmp_path / "colour.npy", coloured.numpy())
    assert read_samples(tmp_path / "colour.npy").samples.shape == (1, 3, 2, 2)


def test_names_of_methods():
    assert parse_methods(["a/b", "c=d,e"]) == {"a/b": ["a/b"], "c": ["d", "e"]}
    for wrong in (["a", "a"], ["a=b", "a=c"], ["a="], [], ["a=b,b"], ["a=b,"]):
        with pytest.raises(InvalidArgumentError, match="methods"):
            parse_methods(wrong)


def test_what_is_no_samples_is_a_typed_error(tmp_path, tasks):
    np.save(tmp_path / "integers.npy", np.arange(6).reshape(2, 3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    save_file({}, tmp_path / "empty.safetensors")
    for name in (
        "integers.npy",
        "objects.npy",
        "broken.safetensors",
        "empty.safetensors",
        "no.npy",
    ):
        with pytest.raises(InvalidArgumentError, match="pass"):
            read_samples(tmp_path / name)
    with pytest.raises(InvalidArgumentError, match=r"methods=.*no such file or folder"):
        evaluate.main(Args((str(tmp_path / "nowhere"),), **TINY))
    with pytest.raises(InvalidArgumentError, match="out="):
        evaluate.main(Args(("a",), out=tmp_path, **TINY))
    with pytest.raises(InvalidArgumentError, match="out="):
        evaluate.main(Args(("a",), out=tmp_path / "integers.npy" / "report.json", **TINY))


def test_students_of_edm_step_at_their_own_times(tmp_path):
    denoiser = load_teacher(tiny_models.FAMILIES["EDM"].make()).denoiser
    grid = schedules.explicit([1000.0, 400.0], denoiser.schedule)
    known = describe_student(denoiser, grid)
    times = evaluate.times_of(known, denoiser.schedule.num_train_timesteps)
    assert times == pytest.approx(grid[:-1].tolist())


def test_adaptive_students_choose_their_times(tmp_path, tasks):
    teacher, bank = tasks
    student = teacher.denoiser
    grid = torch.tensor([850.0, 533.0, 120.0, 0.0])
    shapes = {
        "latents": spaces.Box(-9, 9, (1, 8, 8)),
        "condition": spaces.Discrete(10),
    }
    head = make_head(spaces.Dict(shapes), student.schedule, grid, adaptive=True)
    folder = tmp_path / "student"
    export_adaptive(student, head, teacher.make_solver().config, folder)
    answer = evaluate.sampler(folder, 4, teacher)
    expected, _ = sample(student, head, bank.x_T, bank.condition)
    # the exported copy steps with double-precision scales
    torch.testing.assert_close(answer(bank.x_T, bank.condition), expected, rtol=0, atol=1e-3)


def test_students_keep_their_rescaled_guidance(tmp_path):
    teacher = load_teacher("digits", num_steps=3, guidance_scale=3.0, guidance_rescale=0.7)
    bank = TeacherBank.build(teacher, NUM, split="test", seed=0)
    grid = torch.tensor([850.0, 300.0, 0.0])
    export_student(teacher.denoiser, grid, teacher.make_solver().config, tmp_path / "student")
    found = evaluate.sampler(tmp_path / "student", 2, teacher)(bank.x_T, bank.condition)
    expected = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    teacher.denoiser.set_guidance(3.0, 0.0)
    other = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)
    assert (other - expected).abs().max() > 0.1
