"""The command of the side-by-side benchmark, on few tasks of the mixture."""

from __future__ import annotations

import json

import pytest

from agents.benchmark import Sizes
from agents.benchmark import runs as benchmark_runs
from examples import compare
from redif_env.errors import InvalidArgumentError


@pytest.fixture
def args(tmp_path):
    return compare.Args(
        task="mixture",
        methods=("ddim", "output_regression"),
        num_steps=(1,),
        seeds=(0, 1),
        budget=3000,
        num_train=64,
        num_test=64,
        num_validation=32,
        results=tmp_path / "results",
        samples=tmp_path / "samples",
    )


def test_a_comparison_runs_and_reports_and_is_not_redone(args, capsys):
    compare.main(args)
    printed = capsys.readouterr().out
    assert "| output_regression |" in printed
    lines = (args.results / "mixture-64.jsonl").read_text()
    assert [json.loads(line)["seed"] for line in lines.splitlines()] == [0, 0, 1]
    assert not (args.results / "mixture.jsonl").exists()  # that of as many tasks as by default
    compare.main(args)
    assert (args.results / "mixture-64.jsonl").read_text() == lines
    args.report = True
    compare.main(args)
    again = capsys.readouterr().out
    assert (args.results / "mixture-64.md").read_text() in again


def test_numbers_that_are_not_given_are_the_tasks_own(args, monkeypatch):
    monkeypatch.setattr(compare, "usual_sizes", {"mixture": Sizes(64, 32, 40)}.get)
    args.num_train = args.num_test = None
    args.num_validation = 16
    runs = compare.open_runs(args)
    sizes = [len(bank) for bank in (runs.task.train, runs.task.validation, runs.task.test)]
    assert sizes == [64, 16, 40]
    assert runs.lines.name == "mixture.jsonl"


def test_trials_are_kept_apart_from_results(args, capsys, monkeypatch):
    trials = [each._replace(budget=800) for each in benchmark_runs.TRIALS]
    monkeypatch.setattr(benchmark_runs, "TRIALS", trials)
    args.tune, args.methods = True, ("output_regression",)
    compare.main(args)
    assert len((args.results / "mixture-64-tuning.jsonl").read_text().splitlines()) == 4
    assert not (args.results / "mixture-64.jsonl").exists()
    assert capsys.readouterr().out.count("| output_regression | 2 | 1 | learning_rate") == 4


def test_an_unknown_method_is_refused_before_anything_is_written(args):
    args.methods = ("telepathy",)
    with pytest.raises(InvalidArgumentError):
        compare.main(args)
    assert not args.results.exists()
