"""Every few-step technique side by side: `python examples/compare.py --task digits`.

Runs that are done are not redone, so that it may be stopped and started at any time, and several
processes may share the work (`--workers 2` starts them). Then it prints the tables and draws the
figures of all that is there; `--report` does only that. `--tune` runs the trials that settings were
chosen by, whose steps and budgets are their own. docs/benchmark.md has the protocol.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import torch

from agents.benchmark import Runs, make_task, plan, plan_trials, taking_part, usual_sizes
from agents.benchmark.report import report, tuning_table
from redif_env.errors import check_integer, plain_errors, require


@dataclasses.dataclass
class Args:
    """Compare few-step techniques."""

    task: str = "digits"
    """digits, digits-unconditional, digits-quarter, digits-blind, mixture or images."""
    teacher: Path | None = None
    """Folder of the teacher, for the task images."""
    methods: tuple[str, ...] = ()
    """Entrants, see agents/benchmark/entrants.py; default: all that the task has."""
    num_steps: tuple[int, ...] = (1, 2, 4, 3, 6, 8)
    """Numbers of steps."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Seeds of training."""
    budget: int = 300_000
    """Network-forward equivalents that each training may spend."""
    num_train: int | None = None
    """Training tasks; default: the task's own. Figures of another number have their own files."""
    num_validation: int | None = None
    """Tasks that grids are searched on; default: the task's own."""
    num_test: int | None = None
    """Test tasks; default: the task's own."""
    workers: int = 1
    """Processes, of one thread each."""
    tune: bool = False
    """Run the trials instead, on validation tasks."""
    report: bool = False
    """Only write the tables and figures of the runs that are there."""
    results: Path = Path("benchmarks/results")
    """Folder of figures, tables and pictures."""
    samples: Path = Path("runs/compare")
    """Folder of the samples that intervals are computed from."""


def work(args: Args) -> None:
    """Do what is missing of the plan, beside other processes."""
    torch.set_num_threads(1)
    runs = open_runs(args)
    runs.execute(planned(args, runs))


def open_runs(args: Args) -> Runs:
    """The task's runs, or its trials."""
    plan(args.methods, args.num_steps, args.seeds, args.budget)  # before tasks take their time
    usual = usual_sizes(args.task)
    asked = {
        "train": args.num_train,
        "validation": args.num_validation,
        "test": args.num_test,
    }
    sizes = dataclasses.replace(usual, **{k: v for k, v in asked.items() if v is not None})
    task = make_task(args.task, sizes, args.teacher)
    if sizes.train != usual.train:
        task = dataclasses.replace(task, name=f"{task.name}-{args.num_train}")
    name = f"{task.name}-tuning" if args.tune else task.name
    task = task.judged_on_validation() if args.tune else task
    return Runs(task, args.results / f"{name}.jsonl", args.samples / name)


def planned(args: Args, runs: Runs) -> list:
    """The runs that the arguments ask for."""
    methods = args.methods or taking_part(runs.task)
    if args.tune:
        return plan_trials(methods, args.task)
    return plan(methods, args.num_steps, args.seeds, args.budget, args.task)


def main(args: Args) -> None:
    """Run what is missing, then report."""
    workers = check_integer("workers", args.workers, 1)
    runs = open_runs(args)
    if not args.report:
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=work, args=(args,), daemon=True) for _ in range(workers - 1)
        ]
        for process in others:
            process.start()
        work(args)
        for process in others:
            process.join()
        if any(process.exitcode for process in others):
            work(args)  # what a process left that was ended from outside
    if args.tune:
        print(tuning_table(runs.read()))
    else:
        print(report(runs, planned(args, runs), args.results))


if __name__ == "__main__":
    with plain_errors():
        main(require("tyro", "examples").cli(Args))
