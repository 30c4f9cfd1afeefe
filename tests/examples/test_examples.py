"""Every example runs with tiny arguments."""

from __future__ import annotations

import json

import pytest

from benchmarks import overhead, sample_efficiency
from examples import distill, train_teacher


def test_distill_writes_a_run_and_prints_a_table(tmp_path, capsys):
    args = distill.Args(
        num_steps=1,
        iterations=1,
        num_envs=8,
        bank_size=8,
        num_held_out=100,
        schedule="850",
        out=tmp_path / "run",
    )
    report = distill.main(args)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["nfe"] == report["nfe"] == 1
    printed = capsys.readouterr().out
    assert "student, 1 steps" in printed
    assert "run/student" in printed


def test_schedules_on_the_command_line():
    assert distill.parse_schedule("karras") == "karras"
    assert distill.parse_schedule("850,300") == [850.0, 300.0]


def test_a_teacher_below_the_gate_is_not_installed(tmp_path):
    args = train_teacher.Args(out=tmp_path / "digits", steps=2, judge_steps=2, num_eval=100)
    with pytest.raises(SystemExit):
        train_teacher.main(args)
    assert not (tmp_path / "digits").exists()
    assert (tmp_path / "digits.new" / "unet").is_dir()


def test_overhead_gives_both_ratios():
    ratios = overhead.main(overhead.Args(num_envs=8, num_steps=2, repeats=1))
    assert set(ratios) == {"rollout", "update"}


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
