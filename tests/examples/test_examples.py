"""Every example runs with tiny arguments."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

import agents
from benchmarks import options, overhead, plain_loop, sample_efficiency
from benchmarks.worlds import make_trivial
from examples import distill, train_teacher
from redif_env import transition
from redif_env.errors import InvalidArgumentError


def test_distill_writes_a_run_and_prints_a_table(tmp_path, capsys):
    args = distill.Args(
        num_steps=1,
        iterations=1,
        num_envs=8,
        bank_size=8,
        num_held_out=100,
        schedule="850",
        precision="bfloat16",
        changes=("target_kl=0.05", "divergence=kl"),
        out=tmp_path / "run",
    )
    report = distill.main(args)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["precision"] == "bfloat16"
    assert (config["target_kl"], config["divergence"]) == (0.05, "kl")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["nfe"] == report["nfe"] == 1
    printed = capsys.readouterr().out
    assert "student, 1 steps" in printed
    ledger = report["ledger"]
    training = ledger["rollout"] + ledger["update"] + ledger["reference"]
    assert f"teacher's answers {8 * 50}; search of the grid 0; training {training}" in printed
    assert "run/student" in printed


def test_schedules_on_the_command_line():
    assert distill.parse_schedule("karras") == "karras"
    assert distill.parse_schedule("850,300") == [850.0, 300.0]
    assert distill.parse_schedule("850;300") == "850;300"


def test_options_are_those_of_distill_with_its_defaults():
    parameters = inspect.signature(agents.distill).parameters
    for option in dataclasses.fields(distill.Args):
        default = "cpu" if option.name == "device" else parameters[option.name].default
        assert option.default == default, option.name


SCRIPTS = ("custom_reward", "distill", "evaluate", "stable_diffusion", "swap_algorithm")


@pytest.mark.parametrize("name", [*SCRIPTS, "train_teacher"])
def test_scripts_print_errors_without_a_traceback(name):
    script = importlib.import_module(f"examples.{name}")
    tree = ast.parse(Path(script.__file__).read_text())
    (line,) = tree.body[-1].body
    assert ast.unparse(line).startswith("with plain_errors():")


def test_a_schedule_that_is_none_ends_a_script_with_the_message(monkeypatch, capsys):
    options = ["--schedule", "850;300", "--out", "unused"]
    monkeypatch.setattr(sys, "argv", ["distill.py", *options])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(distill.__file__, run_name="__main__")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: schedule='850;300': pass one of 'search'")


def test_changes_on_the_command_line():
    texts = ("target_kl=0.05", "adaptive_lr=true", "divergence=kl", "local_radius=[2, 0]")
    changes = {"target_kl": 0.05, "adaptive_lr": True, "divergence": "kl", "local_radius": [2, 0]}
    assert distill.parse_changes(texts) == changes
    with pytest.raises(InvalidArgumentError, match=r"changes='target_kl'.*name=value"):
        distill.parse_changes(("target_kl",))


def test_a_teacher_below_the_gate_is_not_installed(tmp_path):
    args = train_teacher.Args(out=tmp_path / "digits", steps=2, judge_steps=2, num_eval=100)
    with pytest.raises(SystemExit):
        train_teacher.main(args)
    assert not (tmp_path / "digits").exists()
    assert (tmp_path / "digits.new" / "unet").is_dir()


def test_overhead_compares_with_bare_work_and_other_trainers(tmp_path, capsys):
    """Of a UNet of random weights, as on CUDA but tiny."""
    args = overhead.Args(
        network="pixels",
        width=8,
        num_envs=4,
        num_steps=2,
        compared_envs=4,
        bank_size=4,
        repeats=1,
        growth=False,
        out=tmp_path / "overhead.json",
    )
    result = overhead.main(args)
    assert json.loads(args.out.read_text())["ratios"] == result["ratios"]
    names = [row["name"] for row in result["ratios"]]
    assert names[:3] == ["rollout", "update", "bank"]
    assert all(row["ratio"] > 0 for row in result["ratios"])
    assert result["memory"]["states and actions, latents"] == args.num_steps + 1
    everything = [row for row in result["costs"] if row["where"] == "all"]
    assert any("convolution" in row["operation"] for row in everything)
    assert 0 < sum(row["share"] for row in everything) < 1
    assert "plain loop" in capsys.readouterr().out


def test_growth_is_measured_in_each_direction(monkeypatch):
    monkeypatch.setattr(overhead, "GROWTH", {"num_envs": (4, 8), "elements": (64, 256)})
    monkeypatch.setattr(overhead, "GROWTH_START", {**overhead.GROWTH_START, "num_envs": 4})
    rows = overhead.measure_growth(overhead.Args())
    sizes = [(row["num_envs"], row["elements"]) for row in rows]
    assert sizes == [(4, 64), (8, 64), (4, 64), (4, 256)]


def test_the_plain_loop_explores_as_the_library_does():
    """Its mean and std are those of our kernel."""
    denoiser = make_trivial(64).denoiser
    grid = torch.tensor([850.0, 400.0, 0.0])
    schedule = denoiser.schedule
    loop = plain_loop.PlainLoop(
        denoiser.predict,
        list(denoiser.network.parameters()),
        grid,
        schedule.alpha(grid),
        schedule.sigma(grid),
    )
    x_t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(2):
        index = torch.full((3,), step)
        mean, std = loop.step(x_t, index, None)
        t, s = grid[index], grid[index + 1]
        ours = transition.exploration(schedule, x_t, denoiser(x_t, t), t, s, 1.0, 0.02, "sde")
        torch.testing.assert_close(mean, ours.mean)
        torch.testing.assert_close(std, ours.std)


def test_options_of_speed_are_measured():
    args = options.Args(
        network="pixels", width=8, num_rows=2, repeats=1, compiled=False, float16=False
    )
    measured = {row.name for row in options.main(args)}
    assert measured >= {"bfloat16 autocast", "channels last", "fused Adam"}


def test_sample_efficiency_resumes_and_knows_what_was_reached(tmp_path):
    args = sample_efficiency.Args(
        recipes=("default", "backprop"),
        num_steps=(1,),
        seeds=(0,),
        iterations=2,
        num_envs=256,
        bank_size=32,
        num_held_out=100,
        every=1,
        out=tmp_path / "results.json",
    )
    rows = sample_efficiency.main(args)
    assert [row["recipe"] for row in rows] == ["default", "backprop"]
    for row in rows:
        # The searched grid alone is below half of the uniform grid's error at one step.
        assert row["trajectories_to"]["50"] == 0
        # PPO has measured the gap on 64 tasks before its first rollout.
        assert row["network_evaluations_to"]["50"] == (64 if row["recipe"] == "default" else 0)
        assert row["trajectories_to"]["10"] is None
        assert [point["trajectories"] for point in row["curve"]][:3] == [0, 256, 512]
    written = args.out.stat().st_mtime_ns
    assert sample_efficiency.main(args) == rows
    assert args.out.stat().st_mtime_ns == written
