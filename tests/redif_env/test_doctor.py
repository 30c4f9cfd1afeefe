"""The doctor: what it reports is what there is, and it exits with 1 where something is wrong."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from redif_env import doctor, load_teacher
from redif_env.memory import activations_of, estimate, measure_activations

SMALL = ["--num-envs", "8", "--bank-size", "8"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def install(folder, monkeypatch, *requirements):
    """A distribution called redif with these requirements, before the real one."""
    place = folder / "redif-9.9.dist-info"
    place.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", "Name: redif", "Version: 9.9"]
    lines += [f"Provides-Extra: {extra}" for extra in ("small", "all")]
    lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
    (place / "METADATA").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))


HEALTHY = (
    "numpy>=1.0",
    'tqdm>=1; extra == "small"',
    'no-such-package>=2; extra == "all"',
    'redif[small]; extra == "all"',
    'no-such-windows; sys_platform == "win32"',
)


def test_all_is_well(cache, tmp_path, monkeypatch, capsys):
    install(tmp_path / "site", monkeypatch, *HEALTHY)
    cache.mkdir()
    (cache / "bank-a-train-0-8.safetensors").write_bytes(b"x" * 700)
    (cache / "bank-b-test-0-8.safetensors").write_bytes(b"x" * 800)
    (cache / "something-else").write_bytes(b"x")
    assert doctor.main(SMALL) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines]
    assert ["redif", "9.9"] in words
    assert ["numpy", np.__version__] in words
    assert ["banks", "2,", "1,500", "bytes"] in words
    assert any(line.split()[:2] == ["folder", str(cache)] for line in lines if line)
    assert ["small", "complete"] in words
    missing = "  all                 missing no-such-package>=2: pip install -e '.[all]'"
    assert any(line.startswith(missing) for line in lines)
    assert not any("windows" in line for line in lines)
    assert lines[-1] == "all is well"
    cores = next(line for line in words if line[:1] == ["cpu"])
    assert int(cores[1]) >= 1


def test_it_lists_what_this_project_needs():
    names = {need.name for need in doctor.requirements()}
    assert {"torch", "gymnasium", "stable-baselines3", "diffusers"} <= names
    assert {"dev", "examples", "lora"} <= set(doctor.extras())
    assert "peft" in {need.name for need in doctor.requirements("dev")}  # through redif[lora]
    assert "peft" not in names


def test_the_figures_are_those_of_the_estimate(cache, capsys):
    doctor.main(["--num-envs", "64", "--num-steps", "3", "--micro-batch-size", "5"])
    teacher = load_teacher("digits")
    wanted = estimate(
        teacher,
        num_envs=64,
        num_steps=3,
        bank_size=6144,
        activations=activations_of(teacher, 5, 1e9),
    )
    assert str(wanted) in capsys.readouterr().out


def test_activations_are_measured_where_there_is_room():
    teacher = load_teacher("digits")
    network = teacher.denoiser.network
    found = activations_of(teacher, 24, room=1e9)
    assert not any(weight.requires_grad for weight in network.parameters())
    most = activations_of(teacher, 24, room=0)
    network.requires_grad_(True)
    assert found == pytest.approx(measure_activations(teacher.denoiser, 24), rel=1e-3)
    assert most == 24 * measure_activations(teacher.denoiser, 1) > found


@pytest.mark.parametrize(
    ("requirement", "said"),
    [("numpy>=999", "pip install 'numpy>=999'"), ("no-such-package", "nothing is there")],
)
def test_what_is_missing_or_too_old_is_a_problem(
    cache, tmp_path, monkeypatch, capsys, requirement, said
):
    install(tmp_path / "site", monkeypatch, requirement)
    assert doctor.main(SMALL) == 1
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--teacher", "letters"], "'letters'"),
        (["--device", "abacus"], "abacus"),
        (["--num-envs", "0"], "num_envs=0"),
        (["--num-envs", "5"], "group_size=2"),
        (["--micro-batch-size", "0"], "micro_batch_size=0"),
        (["--bank-size", str(10**10)], "smaller micro_batch_size"),
    ],
)
def test_what_can_not_work_is_a_problem(cache, capsys, options, said):
    assert doctor.main(options) == 1
    problem = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("problem"))
    assert said in problem


def test_a_cache_that_can_not_be_written_to_is_a_problem(cache, capsys):
    cache.write_text("a file")
    assert doctor.main(SMALL) == 1
    assert "REDIF_CACHE" in capsys.readouterr().out.splitlines()[-2]
    assert cache.read_text() == "a file"


def test_it_writes_nothing(cache, capsys):
    doctor.main(SMALL)
    assert not cache.exists()


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "redif_env.doctor"]
    sick = subprocess.run([*command, "--teacher", "letters"], capture_output=True, text=True)
    assert sick.returncode == 1
    assert "1 problems" in sick.stdout
    assert torch.__version__ in subprocess.run(command, capture_output=True, text=True).stdout
