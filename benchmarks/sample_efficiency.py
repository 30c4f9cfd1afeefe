"""How many trajectories each recipe needs: `python benchmarks/sample_efficiency.py`.

All recipes start from the teacher's weights on the searched grid, see the same tasks, and are
judged by the averaged student's paired MSE on test tasks, deterministic. Counted are trajectories,
and the network-forward equivalents of training (1 forward, 3 forward and back), until that error is
50, 20 and 10 % of plain DDIM's on the uniform grid. Runs in the output file are not redone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule

from agents import ReDiFPPO, presets
from agents.baselines.backprop import backpropagate
from agents.callbacks import IterationCallback
from agents.distillation import write_json
from redif_env import MSE, ReDiFVectorEnv, Teacher, TeacherBank, load_teacher, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import require

LEVELS = (50, 20, 10)
# What differs from the preset of the name's first part.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "default-global": {"credit": "global"},
    "grpo": {},
    "ddpo": {},
    "ddpo-tuned": {"learning_rate": 1e-4, "eta": 0.3, "clip_range": 1e-3, "ema_decay": 0.95},
}
BACKPROP = "backprop"


@dataclasses.dataclass
class Args:
    """Measure sample efficiency."""

    recipes: tuple[str, ...] = (*VARIANTS, BACKPROP)
    """Recipes to run."""
    num_steps: tuple[int, ...] = (4, 2, 1)
    """Numbers of steps."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    iterations: int = 100
    """Budget: iterations of `num_envs` trajectories."""
    num_envs: int = 512
    """Trajectories of an iteration, for every recipe."""
    bank_size: int = 6144
    """Training tasks."""
    num_held_out: int = 1000
    """Test tasks."""
    every: int = 2
    """Iterations between two evaluations."""
    out: Path = Path("benchmarks/results/sample_efficiency.json")
    """Results; a list of runs."""


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
    """Teacher, tasks and the searched grid."""
    teacher = load_teacher()
    validation = TeacherBank.build(teacher, 512, split="validation", progress=True)
    test = TeacherBank.build(teacher, args.num_held_out, split="test", progress=True)
    uniform = schedules.uniform(teacher.denoiser.schedule, num_steps)
    return Task(
        teacher,
        TeacherBank.build(teacher, args.bank_size, progress=True),
        test,
        schedules.search(teacher.denoiser, validation, num_steps),
        schedules.paired_mse(teacher.denoiser, test, uniform),
    )


def run_agent(name: str, task: Task, seed: int, args: Args) -> Curve:
    """Train a PPO recipe; returns its curve."""
    recipe = presets.preset(name.split("-")[0])
    options = {**recipe["agent"], **VARIANTS[name], "seed": seed}
    rate, end = options["learning_rate"], 0.0 if recipe["decay"] or name == "ddpo-tuned" else 1.0
    options["learning_rate"] = LinearSchedule(rate, end * rate, 1.0)
    env = ReDiFVectorEnv(
        args.num_envs, task.teacher, schedule=task.grid, bank=task.train, seed=seed, **recipe["env"]
    )
    model = ReDiFPPO("StudentPolicy", env, policy_kwargs=recipe["policy"], **options)
    model.set_logger(configure(None, []))
    curve = Curve(task)
    model.learn(
        args.iterations * args.num_envs * (len(task.grid) - 1), callback=Judge(curve, args.every)
    )
    return curve


def run_backprop(task: Task, seed: int, args: Args) -> Curve:
    """Train by back-propagation with as many optimiser steps of as many trajectories."""
    curve = Curve(task)
    num_steps, batch_size = len(task.grid) - 1, 256

    def judge(iteration: int, student: Denoiser) -> None:
        trajectories = iteration * batch_size
        if trajectories % (args.every * args.num_envs) == 0:
            curve.add(student, trajectories, 3 * num_steps * trajectories)

    backpropagate(
        task.teacher.denoiser,
        task.train,
        task.grid,
        MSE(),
        iterations=args.iterations * args.num_envs // batch_size,
        batch_size=batch_size,
        seed=seed,
        on_iteration=judge,
    )
    return curve


def run(name: str, task: Task, seed: int, args: Args) -> dict[str, Any]:
    """One run as a row of the results."""
    curve = (
        run_backprop(task, seed, args) if name == BACKPROP else run_agent(name, task, seed, args)
    )

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


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return json.loads(path.read_text()) if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Mean trajectories to each level, in Markdown; '-' where a seed did not reach it."""
    lines = ["| steps | recipe | seeds | to 50 % | to 20 % | to 10 % | final, % of uniform |"]
    lines.append("|" + "---|" * 7)
    for num_steps in sorted({row["num_steps"] for row in rows}, reverse=True):
        for name in (*VARIANTS, BACKPROP):
            own = [r for r in rows if (r["recipe"], r["num_steps"]) == (name, num_steps)]
            if own:
                lines.append(f"| {num_steps} | {name} | {len(own)} | {_cells(own)} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]]) -> str:
    cells = []
    for level in LEVELS:
        needed = [row["trajectories_to"][str(level)] for row in rows]
        known = [value for value in needed if value is not None]
        complete = len(known) == len(needed)
        cells.append(f"{sum(known) / len(known):,.0f}" if complete else "-")
    final = [100 * row["curve"][-1]["mse"] / row["uniform_mse"] for row in rows]
    return " | ".join([*cells, f"{sum(final) / len(final):.1f}"])


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is missing, and print the table."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for num_steps in args.num_steps:
        task = make_task(num_steps, args)
        for seed in args.seeds:
            for name in args.recipes:
                done = {(r["recipe"], r["num_steps"], r["seed"]) for r in read(args.out)}
                if (name, num_steps, seed) in done:
                    continue
                row = run(name, task, seed, args)
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, [*read(args.out), row])
                print(name, num_steps, seed, row["trajectories_to"], flush=True)
    rows = read(args.out)
    print(table(rows))
    return rows


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
