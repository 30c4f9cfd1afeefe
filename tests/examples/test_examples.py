"""Every example runs with tiny arguments."""

from __future__ import annotations

import json

import pytest

from benchmarks import overhead
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
