"""How many trajectories each recipe needs: `python benchmarks/sample_efficiency.py`.

All recipes start from the teacher's weights on the searched grid, see the same tasks, and are
judged by the averaged student's paired MSE on test tasks, deterministic. Counted are trajectories,
and the network-forward equivalents of training (1 forward, 3 forward and back), until that error is
50, 20 and 10 % of plain DDIM's on the uniform grid. Runs in the output file are not redone.

`--tune` runs the trials that the settings below were chosen by, as many for each recipe, on another
seed and on validation tasks; `--ablate` switches off one thing of ours at a time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from stable_baselines3.common.logger import configure

from agents import reinforcement
from agents.baselines import Backprop
from agents.callbacks import IterationCallback
from redif_env import MSE, Teacher, TeacherBank, load_teacher, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import require
from redif_env.files import replacing, write_json

LEVELS = (50, 20, 10)
BACKPROP = "backprop"
# What differs from the preset of the name's first part, or from `Backprop.train`'s defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "default-global": {"credit": "global"},
    "grpo": {},
    "ddpo": {},
    "ddpo-tuned": {
        "learning_rate": 5e-5,
        "eta": 0.0,
        "min_std": 0.1,
        "clip_range": 1e-2,
        "ema_decay": 0.95,
        "decay": True,
    },
    BACKPROP: {"max_grad_norm": 0.1},
}
_DECAYED = {"decay": True, "ema_decay": 0.95}
# Eight trials each. What is fixed for DDPO is what makes it DDPO: global credit, the mean
# log-ratio, no groups.
TRIALS: dict[str, list[dict[str, Any]]] = {
    "default": [
        {},
        {"learning_rate": 1e-4},
        {"learning_rate": 4e-4},
        {"gap_fraction": 0.25},
        {"gap_fraction": 1.0},
        {"n_epochs": 1},
        {"n_epochs": 5},
        {"batch_size": 128, "n_epochs": 2},
    ],
    "ddpo": [
        {**_DECAYED, **trial}
        for trial in (
            {"learning_rate": 1e-4, "eta": 0.3, "clip_range": 1e-3},
            {"learning_rate": 1e-4, "eta": 0.1, "clip_range": 1e-3},
            {"learning_rate": 1e-5, "eta": 0.1, "clip_range": 1e-4},
            {"learning_rate": 1e-5, "eta": 0.0, "min_std": 0.05, "clip_range": 1e-2},
            {"learning_rate": 5e-5, "eta": 0.0, "min_std": 0.1, "clip_range": 1e-2},
            {"learning_rate": 5e-5, "eta": 0.1, "clip_range": 1e-2, "n_epochs": 3},
            {"learning_rate": 2e-5, "eta": 0.1, "clip_range": 1e-2, "stochastic_steps": "one"},
            {"learning_rate": 1e-5, "eta": 0.3, "clip_range": 1e-4, "n_epochs": 3},
        )
    ],
    BACKPROP: [
        {},
        {"learning_rate": 1e-4},
        {"learning_rate": 4e-4},
        {"learning_rate": 8e-4},
        {"ema_decay": 0.0},
        {"ema_decay": 0.9},
        {"max_grad_norm": 0.1},
        {"max_grad_norm": 10.0},
    ],
}
# One thing of ours switched off at a time.
ABLATIONS: dict[str, dict[str, Any]] = {
    "ours": {},
    "global credit": {"credit": "global"},
    "summed ratio, global credit": {"credit": "global", "ratio": "sum"},
    "half local credit": {"local_weight": 0.5},
    "all steps explore": {"stochastic_steps": "all"},
    "independent noise": {"antithetic": False},
    "no groups: batch mean": {"advantage": "batch", "antithetic": False, "stochastic_steps": "one"},
    "no groups: task mean": {"advantage": "task", "antithetic": False, "stochastic_steps": "one"},
    "no groups: critic": {"advantage": "gae", "antithetic": False, "stochastic_steps": "one"},
    # The gap is 0.12 at the start.
    "gap believed 100 times too large at first": {"first_gap": 12.0},
    "gap believed 100 times too small at first": {"first_gap": 0.0012},
    "fixed std 0.02": {"gap_fraction": None, "min_std": 0.02},
    "fixed std 0.2": {"gap_fraction": None, "min_std": 0.2},
    "learned std": {"gap_fraction": None, "min_std": 0.05, "antithetic": False, "learn_std": True},
    "kernel's std, eta 0.3": {"gap_fraction": None, "min_std": 0.02, "eta": 0.3},
    "one epoch": {"n_epochs": 1},
    "constant learning rate": {"decay": False},
    "no averaging": {"ema_decay": 0.0},
    "KL penalty 0.04": {"divergence": "kl", "divergence_coef": 0.04},
}


@dataclasses.dataclass
class Args:
    """Measure sample efficiency."""

    recipes: tuple[str, ...] = tuple(VARIANTS)
    """Recipes to run."""
    num_steps: tuple[int, ...] = (4, 2, 1)
    """Numbers of steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    iterations: int = 30
    """Budget: iterations of `num_envs` trajectories."""
    num_envs: int = 512
    """Trajectories of an iteration, for every recipe."""
    bank_size: int = 6144
    """Training tasks."""
    num_held_out: int = 1000
    """Test tasks."""
    every: int = 1
    """Iterations between two evaluations."""
    tune: bool = False
    """Run the trials instead, of the recipes that have any."""
    ablate: bool = False
    """Run the ablations instead."""
    out: Path | None = None
    """Results; a list of runs. Default: in benchmarks/results, by what is run."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What every recipe is given."""

    teacher: Teacher
    train: TeacherBank
    test: TeacherBank
    grid: torch.Tensor
    uniform_mse: float


class Curve:
    """Held-out error against trajectories and network evaluations."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.points: list[dict[str, float]] = []

    def add(self, student: Denoiser, trajectories: int, evaluations: int) -> None:
        """Judge the student as it is now."""
        mse = schedules.paired_mse(student, self.task.test, self.task.grid)
        point = {"trajectories": trajectories, "network_evaluations": evaluations, "mse": mse}
        self.points.append(point)

    def first_below(self, level: int, key: str) -> float | None:
        """Where the error first is at most `level` percent of uniform DDIM's, or None."""
        limit = self.task.uniform_mse * level / 100
        return next((point[key] for point in self.points if point["mse"] <= limit), None)


class Judge(IterationCallback):
    """Adds a point to the curve every few iterations."""

    def __init__(self, curve: Curve, every: int) -> None:
        super().__init__(every)
        self.curve = curve

    def on_iteration(self) -> None:
        model: Any = self.model
        trajectories = self.num_timesteps // model.policy.num_steps
        forward = model.policy.denoiser.network_evaluations
        self.curve.add(model.student(), trajectories, forward + 2 * model.rows_trained)


def make_task(num_steps: int, args: Args) -> Task:
    """Teacher, tasks and the searched grid; trials are judged on validation tasks."""
    teacher = load_teacher()
    validation = TeacherBank.build(teacher, 512, split="validation", progress=True)
    test = TeacherBank.build(teacher, args.num_held_out, split="test", progress=True)
    judged = validation if args.tune else test
    uniform = schedules.uniform(teacher.denoiser.schedule, num_steps)
    return Task(
        teacher,
        TeacherBank.build(teacher, args.bank_size, progress=True),
        judged,
        schedules.search(teacher.denoiser, validation, num_steps),
        schedules.paired_mse(teacher.denoiser, judged, uniform),
    )


def run_agent(name: str, changes: dict[str, Any], task: Task, seed: int, args: Args) -> Curve:
    """Train a PPO recipe, with changes to its preset; returns its curve."""
    changes = dict(changes)
    first_gap = changes.pop("first_gap", 0.0)
    if changes.get("advantage", "group") != "group":
        changes["group_size"] = 1
    reward = MSE()
    # One recipe for all numbers of steps, which trials are changes of, and steps of first order as
    # back-propagation's.
    env, agent = reinforcement.recipe_options(name.split("-")[0], changes, reward)
    model = reinforcement.make_model(
        task.teacher,
        args.num_envs,
        task.grid,
        False,
        task.train,
        {**env, "reward": reward, "seed": seed},
        {**agent, "seed": seed},
    )
    model.set_logger(configure(None, []))
    model.gap = first_gap
    curve = Curve(task)
    model.learn(
        args.iterations * args.num_envs * (len(task.grid) - 1), callback=Judge(curve, args.every)
    )
    return curve


def run_backprop(changes: dict[str, Any], task: Task, seed: int, args: Args) -> Curve:
    """Train by back-propagation with as many optimiser steps of as many trajectories."""
    curve = Curve(task)
    num_steps, batch_size = len(task.grid) - 1, 256

    def judge(iteration: int, student: Denoiser) -> None:
        trajectories = iteration * batch_size
        if trajectories % (args.every * args.num_envs) == 0:
            curve.add(student, trajectories, 3 * num_steps * trajectories)

    Backprop.train(
        task.teacher,
        task.train,
        task.grid,
        iterations=args.iterations * args.num_envs // batch_size,
        batch_size=batch_size,
        seed=seed,
        on_iteration=judge,
        **changes,
    )
    return curve


def run(name: str, changes: dict[str, Any], task: Task, seed: int, args: Args) -> dict[str, Any]:
    """One run as a row of the results."""
    if name == BACKPROP:
        curve = run_backprop(changes, task, seed, args)
    else:
        curve = run_agent(name, changes, task, seed, args)

    def reached(key: str) -> dict[str, float | None]:
        return {str(level): curve.first_below(level, key) for level in LEVELS}

    return {
        "recipe": name,
        "num_steps": len(task.grid) - 1,
        "seed": seed,
        "trajectories_to": reached("trajectories"),
        "network_evaluations_to": reached("network_evaluations"),
        "uniform_mse": task.uniform_mse,
        "budget": args.iterations * args.num_envs,
        "curve": curve.points,
    }


def plan(args: Args) -> list[tuple[str, str, dict[str, Any]]]:
    """Recipe, label and changes of each run, for each number of steps and seed."""
    if args.tune:
        return [
            (name, f"{name} {json.dumps(changes)}", changes)
            for name in args.recipes
            for changes in TRIALS.get(name, [])
        ]
    if args.ablate:
        return [("default", label, changes) for label, changes in ABLATIONS.items()]
    return [(name, name, VARIANTS.get(name, {})) for name in args.recipes]


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return json.loads(path.read_text()) if path.exists() else []


def add(path: Path, row: dict[str, Any]) -> None:
    """Append a row; several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        write_json(path, [*read(path), row])


def table(rows: list[dict[str, Any]]) -> str:
    """Trajectories to each level, mean and range over seeds, in Markdown; '-': not reached."""
    lines = ["| steps | run | seeds | to 50 % | to 20 % | to 10 % | final, % of uniform |"]
    lines.append("|" + "---|" * 7)
    labels = list(dict.fromkeys(label(row) for row in rows))
    for num_steps in sorted({row["num_steps"] for row in rows}, reverse=True):
        for name in labels:
            own = [r for r in rows if (label(r), r["num_steps"]) == (name, num_steps)]
            if own:
                lines.append(f"| {num_steps} | {name} | {len(own)} | {_cells(own)} |")
    return "\n".join(lines)


def label(row: dict[str, Any]) -> str:
    """What a row is called in tables: its recipe, or what differs from it."""
    return row.get("label", row["recipe"])


def final(row: dict[str, Any]) -> float:
    """Error at the end of the budget, percent of uniform DDIM's."""
    return 100 * row["curve"][-1]["mse"] / row["uniform_mse"]


def _cells(rows: list[dict[str, Any]]) -> str:
    cells = []
    for level in LEVELS:
        needed = [row["trajectories_to"][str(level)] for row in rows]
        missed = needed.count(None)
        cells.append(f"- ({missed} of {len(rows)})" if missed else _spread(needed, ",.0f"))
    return " | ".join([*cells, _spread([final(row) for row in rows], ".1f")])


def _spread(values: list[float], style: str) -> str:
    """Mean, and smallest to largest where they differ."""
    mean, low, high = (format(v, style) for v in (sum(values) / len(values), *_range(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def _range(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def comparison(rows: list[dict[str, Any]], level: int = 20) -> str:
    """What ours needs to reach a level, over what back-propagation needs; means over seeds."""
    parts = []
    for num_steps in sorted({row["num_steps"] for row in rows}, reverse=True):
        means = {}
        for name in ("default", BACKPROP):
            own = [r for r in rows if (label(r), r["num_steps"]) == (name, num_steps)]
            for key in ("trajectories_to", "network_evaluations_to"):
                needed = [row[key][str(level)] for row in own]
                means[name, key] = sum(needed) / len(needed) if needed and all(needed) else None
        if None not in means.values():
            times = [
                means["default", key] / means[BACKPROP, key]
                for key in ("trajectories_to", "network_evaluations_to")
            ]
            parts.append(f"{num_steps} steps {times[0]:.2f} and {times[1]:.2f}")
    return f"to {level} %, of {BACKPROP}'s trajectories and network evaluations: {'; '.join(parts)}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Held-out error against trajectories, one panel a number of steps; bands span the seeds."""
    steps = sorted({row["num_steps"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.5 * len(steps), 4), layout="constrained")
    for axes, num_steps in zip(
        figure.subplots(1, len(steps), squeeze=False)[0], steps, strict=True
    ):
        for name in dict.fromkeys(label(row) for row in rows):
            own = [r for r in rows if (label(r), r["num_steps"]) == (name, num_steps)]
            if not own:
                continue
            curves = np.array([[p["mse"] / r["uniform_mse"] for p in r["curve"]] for r in own])
            x = [point["trajectories"] for point in own[0]["curve"]]
            (line,) = axes.plot(x, 100 * curves.mean(0), label=name)
            axes.fill_between(
                x, 100 * curves.min(0), 100 * curves.max(0), color=line.get_color(), alpha=0.2
            )
        axes.axhline(20, color="grey", linewidth=0.8, linestyle=":")
        title = "1 step" if num_steps == 1 else f"{num_steps} steps"
        axes.set(xlabel="trajectories", title=title, yscale="log")
        axes.set_yticks([10, 15, 20, 30, 50, 100], labels=["10", "15", "20", "30", "50", "100"])
    figure.axes[0].set_ylabel("held-out paired MSE, % of uniform DDIM")
    figure.axes[-1].legend(fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is missing, print the table, and draw the curves."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    kind = "tuning" if args.tune else "ablation" if args.ablate else "sample_efficiency"
    out = args.out or Path(f"benchmarks/results/{kind}.json")
    for num_steps in args.num_steps:
        task = make_task(num_steps, args)
        for seed in args.seeds:
            for recipe, name, changes in plan(args):
                key = (recipe, name, num_steps, seed)
                if key in {(r["recipe"], label(r), r["num_steps"], r["seed"]) for r in read(out)}:
                    continue
                row = run(recipe, changes, task, seed, args)
                add(out, row if name == recipe else {"label": name, **row})
                print(
                    name, num_steps, seed, row["trajectories_to"], round(final(row), 2), flush=True
                )
    rows = read(out)
    print(table(rows))
    if not (args.tune or args.ablate):
        print(comparison(rows))
        plot(rows, out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
