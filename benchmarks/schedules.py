"""What learned times are worth: `python benchmarks/schedules.py`.

* `global`: a frozen student's times for all samples, learned, against uniform ones and against
  the searched grid at the same number of network evaluations.
* `adaptive`: its times and number of steps for each sample, against the searched grids of whole
  numbers of steps, interpolated at the same mean, and against lengths drawn at random.
* `joint`: the student and its times trained together or in turn, against the student alone on the
  grid that they start from, at the same number of trajectories.

Everything is judged on test tasks, deterministic. Runs in the output file are not redone.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from agents import ReDiFPPO, presets
from agents.distillation import REFERENCE_SEED, find_judge
from agents.evaluation import compare
from agents.sampling import sample
from benchmarks.sample_efficiency import add, read
from redif_env import ReDiFVectorEnv, TeacherBank, load_teacher, schedules
from redif_env.errors import check_choice, require

PARTS = ("global", "adaptive", "joint")
FIXED_STEPS = (1, 2, 3, 4, 5, 6, 8)  # of the curve that adaptive schedules are held against
# Paired MSE that a step must save: between what the last of so many steps saves, and one more.
STEP_COSTS = {3: 0.0045, 4: 0.0021, 5: 0.001}
UNIFORM, SEARCHED = "uniform", "searched"


@dataclasses.dataclass
class Args:
    """Measure learned schedules."""

    parts: tuple[str, ...] = PARTS
    """What to measure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training."""
    num_steps: tuple[int, ...] = (3, 4, 6)
    """Numbers of steps of a global schedule."""
    start_steps: tuple[int, ...] = (3, 4, 5)
    """Numbers of steps that adaptive schedules start around; they may take two more."""
    adaptive_iterations: int = 100
    """Iterations for an adaptive schedule."""
    joint_steps: tuple[int, ...] = (2,)
    """Numbers of steps of joint training."""
    joint_iterations: int = 25
    """Iterations of joint training, of twice `num_envs` trajectories."""
    num_envs: int = 256
    """Trajectories of an iteration."""
    bank_size: int = 4096
    """Training tasks."""
    num_held_out: int = 1000
    """Test tasks."""
    out: Path = Path("benchmarks/results/schedules.json")
    """Results, a list of runs."""


@dataclasses.dataclass(frozen=True)
class World:
    """Teacher, tasks and figures that all runs share."""

    args: Args
    teacher: Any
    train: TeacherBank
    validation: TeacherBank
    test: TeacherBank
    reference: TeacherBank
    judge: Any

    def figures(self, x_0: Tensor) -> dict[str, Any]:
        """Paired MSE, mean PSNR and Frechet distance of samples of the test tasks."""
        error = (x_0 - self.test.teacher_x_0).square().flatten(1).mean(1)
        figures = compare(x_0, self.test, self.reference, self.judge)
        return {
            "paired_mse": figures["paired_mse"],
            "psnr": float((10 * (4 / error).log10()).mean()),
            "frechet": figures["frechet"],
        }

    def ddim(self, grid: Tensor) -> Tensor:
        """The teacher's own few-step samples of the test tasks."""
        return sample(self.teacher.denoiser, grid, self.test.x_T, self.test.condition)[0]


def make_world(args: Args) -> World:
    """Load the teacher and its tasks."""
    teacher = load_teacher()
    build = functools.partial(TeacherBank.build, teacher, progress=True)
    return World(
        args,
        teacher,
        build(args.bank_size),
        build(512, split="validation"),
        build(args.num_held_out, split="test"),
        build(args.num_held_out, split="test", seed=REFERENCE_SEED),
        find_judge(teacher),
    )


def fixed(world: World, num_steps: int) -> dict[str, dict[str, Any]]:
    """The uniform and the searched grid, and what they give; done once for each number of steps."""
    rows = [row for row in read(world.args.out) if row["part"] == "fixed"]
    found = {row["method"]: row for row in rows if row["num_steps"] == num_steps}
    if found:
        return found
    denoiser = world.teacher.denoiser
    grids = {UNIFORM: schedules.uniform(denoiser.schedule, num_steps)}
    before = denoiser.network_evaluations
    grids[SEARCHED] = schedules.search(denoiser, world.validation, num_steps)
    spent = denoiser.network_evaluations - before
    for method, grid in grids.items():
        found[method] = {
            "part": "fixed",
            "method": method,
            "num_steps": num_steps,
            "seed": 0,
            "timesteps": grid.tolist(),
            "network_evaluations": spent if method == SEARCHED else 0,
            **world.figures(world.ddim(grid)),
        }
        add(world.args.out, found[method])
    return found


def make_agent(
    world: World, grid: list[float], head: dict[str, Any], seed: int, **options: Any
) -> ReDiFPPO:
    """An agent on a free schedule that starts at a grid."""
    recipe = presets.preset("default")
    env_options = {
        name: options.pop(name) for name in ("num_envs", "group_size", "reward", "step_cost")
    }
    env = ReDiFVectorEnv(
        env_options.pop("num_envs"),
        world.teacher,
        num_steps=len(grid) - 1,
        min_steps=options.pop("min_steps"),
        bank=world.train,
        seed=seed,
        **env_options,
    )
    rate = options.pop("learning_rate")
    model = ReDiFPPO(
        "StudentPolicy",
        env,
        **{
            **recipe["agent"],
            "learning_rate": LinearSchedule(rate, 0.0, 1.0),
            "policy_kwargs": {
                **recipe["policy"],
                "timesteps": grid,
                "schedule_head": head,
                "schedule_lr_scale": options.pop("schedule_lr_scale", 50.0),
            },
            "seed": seed,
            **options,
        },
    )
    model.set_logger(configure(None, []))
    return model


def run_global(world: World, num_steps: int, seed: int) -> dict[str, Any]:
    """Learn the times of a frozen student, with no more evaluations than the search took."""
    known = fixed(world, num_steps)
    num_envs = world.args.num_envs
    iterations = max(1, known[SEARCHED]["network_evaluations"] // (num_envs * num_steps))
    model = make_agent(
        world,
        known[UNIFORM]["timesteps"],
        {"kind": "beta"},
        seed,
        num_envs=num_envs,
        group_size=4,
        reward="psnr",
        step_cost=0.0,
        min_steps=num_steps,
        trained="schedule",
        learning_rate=1e-3,
        n_epochs=5,
    )
    model.learn(iterations * num_envs * num_steps)
    grid = model.policy.schedule_head.grid()
    return {
        "part": "global",
        "method": "learned",
        "num_steps": num_steps,
        "seed": seed,
        "timesteps": grid.tolist(),
        "network_evaluations": iterations * num_envs * num_steps,
        **world.figures(world.ddim(grid)),
    }


def run_adaptive(world: World, start_steps: int, seed: int) -> dict[str, Any]:
    """Learn times and number of steps for each sample of a frozen student.

    It starts around a searched grid, followed by two halvings of the time, so that a step more and
    a step less are both worth trying.
    """
    args = world.args
    grid = fixed(world, start_steps)[SEARCHED]["timesteps"][:-1]
    grid += [round(grid[-1] / 2), round(grid[-1] / 4), 0.0]
    model = make_agent(
        world,
        grid,
        {"kind": "beta", "adaptive": True, "concentration": 60.0, "stop_prob": 0.3},
        seed,
        num_envs=args.num_envs,
        group_size=4,
        reward="mse",
        step_cost=STEP_COSTS[start_steps],
        min_steps=1,
        trained="schedule",
        learning_rate=1e-3,
        schedule_lr_scale=10.0,
        advantage_clip=3.0,
        n_epochs=5,
    )
    max_steps = len(grid) - 1
    model.learn(args.adaptive_iterations * args.num_envs * max_steps)
    x_0, num_steps = model.policy.sample(world.test.x_T, world.test.condition)
    shares = num_steps.bincount(minlength=max_steps + 1).double() / len(num_steps)
    classes = world.test.condition
    return {
        "part": "adaptive",
        "method": "adaptive",
        "start_steps": start_steps,
        "num_steps": max_steps,
        "seed": seed,
        "nfe": float(num_steps.double().mean()),
        "shares": shares.tolist(),
        "nfe_by_class": [float(num_steps[classes == c].double().mean()) for c in range(10)],
        "random_lengths": random_lengths(world, shares, seed),
        "interpolated": interpolated(world, float(num_steps.double().mean())),
        "oracle": oracle(world, STEP_COSTS[start_steps]),
        **world.figures(x_0),
    }


def oracle(world: World, step_cost: float) -> dict[str, Any]:
    """What one could gain who knew the error of each test sample on each searched grid.

    Returns:
        Mean steps and paired MSE if each sample takes the number of steps that is best for it, and
        what the grids themselves have at this mean; the same with one number for each class.
    """
    grids = {k: torch.tensor(fixed(world, k)[SEARCHED]["timesteps"]) for k in FIXED_STEPS}
    answers = world.test.teacher_x_0
    errors = torch.stack(
        [(world.ddim(grid) - answers).square().flatten(1).mean(1) for grid in grids.values()]
    )
    steps = torch.tensor(list(grids), dtype=torch.float32)
    classes = torch.nn.functional.one_hot(world.test.condition).float()
    by_class = errors @ classes / classes.sum(0) @ classes.T
    found = {}
    for name, known in (("sample", errors), ("class", by_class)):
        best = (known + step_cost * steps[:, None]).argmin(0)
        nfe = float(steps[best].mean())
        found[name] = {
            "nfe": nfe,
            "paired_mse": float(errors.gather(0, best[None]).mean()),
            "grids": interpolated(world, nfe)["paired_mse"],
        }
    return found


def random_lengths(world: World, shares: Tensor, seed: int) -> dict[str, Any]:
    """What the same lengths give when they are dealt out at random, each on its searched grid."""
    generator = torch.Generator().manual_seed(seed)
    num = len(world.test)
    dealt = torch.multinomial(shares, num, replacement=True, generator=generator)
    x_0 = torch.empty_like(world.test.x_T)
    for length in dealt.unique().tolist():
        grid = torch.tensor(fixed(world, length)[SEARCHED]["timesteps"])
        x_0[dealt == length] = world.ddim(grid)[dealt == length]
    return world.figures(x_0)


def interpolated(world: World, nfe: float) -> dict[str, float]:
    """The curve of searched grids at a mean number of steps between whole ones."""
    known = [(steps, fixed(world, steps)[SEARCHED]) for steps in FIXED_STEPS]
    return {
        name: float(np.interp(nfe, FIXED_STEPS, [row[name] for _, row in known]))
        for name in ("paired_mse", "psnr", "frechet")
    }


def run_joint(world: World, num_steps: int, start: str, trained: str, seed: int) -> dict[str, Any]:
    """Train the student, and its times with it or not, from a grid."""
    args = world.args
    grid = fixed(world, num_steps)[start]["timesteps"]
    model = make_agent(
        world,
        grid,
        {"kind": "beta"},
        seed,
        num_envs=2 * args.num_envs,
        group_size=2,
        reward="mse",
        step_cost=0.0,
        min_steps=num_steps,
        trained=trained,
        learning_rate=2e-4,
    )
    model.learn(args.joint_iterations * 2 * args.num_envs * num_steps)
    x_0, _ = model.policy.sample(world.test.x_T, world.test.condition)
    return {
        "part": "joint",
        "method": trained,
        "start": start,
        "num_steps": num_steps,
        "seed": seed,
        "timesteps": model.policy.schedule_head.grid().tolist(),
        "trajectories": args.joint_iterations * 2 * args.num_envs,
        **world.figures(x_0),
    }


def plan(args: Args) -> list[tuple[dict[str, Any], Any]]:
    """The key of each run, and how to make it; seed by seed."""
    for part in args.parts:
        check_choice("parts", part, PARTS)
    runs: list[tuple[dict[str, Any], Any]] = []
    for seed in args.seeds:
        if "global" in args.parts:
            for steps in args.num_steps:
                key = {"part": "global", "num_steps": steps, "seed": seed}
                runs.append((key, functools.partial(run_global, num_steps=steps, seed=seed)))
        if "adaptive" in args.parts:
            for steps in args.start_steps:
                key = {"part": "adaptive", "start_steps": steps, "seed": seed}
                runs.append((key, functools.partial(run_adaptive, start_steps=steps, seed=seed)))
        if "joint" in args.parts:
            for steps in args.joint_steps:
                for start in (UNIFORM, SEARCHED):
                    for trained in ("student", "both", "alternating"):
                        options = {"num_steps": steps, "start": start, "seed": seed}
                        key = {"part": "joint", "method": trained, **options}
                        make = functools.partial(run_joint, trained=trained, **options)
                        runs.append((key, make))
    return runs


def table(rows: list[dict[str, Any]]) -> str:
    """Means and ranges over seeds, in Markdown."""
    fixed_rows = {(r["num_steps"], r["method"]): r for r in rows if r["part"] == "fixed"}
    lines = ["| steps | times | seeds | paired MSE | PSNR, dB | Frechet distance |"]
    lines.append("|" + "---|" * 6)
    for steps in sorted({r["num_steps"] for r in rows if r["part"] == "global"}):
        own = [r for r in rows if r["part"] == "global" and r["num_steps"] == steps]
        for method in (UNIFORM, SEARCHED):
            lines.append(f"| {steps} | {method} | | {_cells([fixed_rows[steps, method]])} |")
        lines.append(f"| {steps} | learned | {len(own)} | {_cells(own)} |")
    lines += ["", "| start | lengths | seeds | NFE | paired MSE | PSNR, dB | Frechet distance |"]
    lines.append("|" + "---|" * 7)
    for start in sorted({r["start_steps"] for r in rows if r["part"] == "adaptive"}):
        own = [r for r in rows if r["part"] == "adaptive" and r["start_steps"] == start]
        nfe = _spread([r["nfe"] for r in own], ".2f")
        for name in ("interpolated", "random_lengths"):
            cells = _cells([r[name] for r in own])
            lines.append(f"| {start} | {name.replace('_', ' ')} | {len(own)} | {nfe} | {cells} |")
        lines.append(f"| {start} | adaptive | {len(own)} | {nfe} | {_cells(own)} |")
        for known, bound in own[0]["oracle"].items():
            saved = 100 * (1 - bound["paired_mse"] / bound["grids"])
            lines.append(
                f"| {start} | oracle of the {known} | | {bound['nfe']:.2f} | "
                f"{bound['paired_mse']:.5f}, {saved:.0f} % below the grids | | |"
            )
    lines += ["", "| steps | start | trained | seeds | paired MSE | PSNR, dB | Frechet distance |"]
    lines.append("|" + "---|" * 7)
    joint = [r for r in rows if r["part"] == "joint"]
    keys = {(r["num_steps"], r["start"], r["method"]): None for r in joint}
    for steps, start, method in sorted(keys, key=lambda k: (k[0], k[1] != UNIFORM)):
        own = [
            r for r in joint if (r["num_steps"], r["start"], r["method"]) == (steps, start, method)
        ]
        lines.append(f"| {steps} | {start} | {method} | {len(own)} | {_cells(own)} |")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]]) -> str:
    parts = (("paired_mse", ".5f"), ("psnr", ".2f"), ("frechet", ".3f"))
    return " | ".join(_spread([row[name] for row in rows], form) for name, form in parts)


def _spread(values: list[float], form: str) -> str:
    """Mean, and smallest..largest where they differ."""
    mean, low, high = (f"{v:{form}}" for v in (np.mean(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low}..{high})"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Quality against the mean number of steps, and who got how many."""
    adaptive = [r for r in rows if r["part"] == "adaptive"]
    curve = sorted((r["num_steps"], r["paired_mse"]) for r in rows if r.get("method") == SEARCHED)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.plot(*zip(*curve, strict=True), "o-", label="searched grids")
    error = [r["paired_mse"] for r in adaptive]
    left.plot([r["nfe"] for r in adaptive], error, "s", label="adaptive")
    dealt = [r["random_lengths"]["paired_mse"] for r in adaptive]
    left.plot([r["nfe"] for r in adaptive], dealt, "x", label="the same lengths at random")
    left.set(xlabel="mean network evaluations", ylabel="paired MSE", yscale="log")
    left.legend()
    for start in sorted({r["start_steps"] for r in adaptive}):
        own = [r for r in adaptive if r["start_steps"] == start]
        shares = np.mean([r["shares"] for r in own], 0)
        middle.plot(range(len(shares)), 100 * shares, "o-", label=f"started around {start}")
        right.plot(range(10), np.mean([r["nfe_by_class"] for r in own], 0), "o-")
    middle.set(xlabel="steps", ylabel="% of samples")
    middle.legend()
    right.set(xlabel="class", ylabel="mean steps")
    figure.savefig(path, dpi=110)


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is missing, print the tables, draw the plot, and return all rows."""
    torch.set_num_threads(1)
    runs = plan(args)
    world = make_world(args)
    if "adaptive" in args.parts:
        for steps in FIXED_STEPS:
            fixed(world, steps)
    for key, make in runs:
        if not any(key.items() <= row.items() for row in read(args.out)):
            row = make(world)
            add(args.out, row)
            print({name: row[name] for name in (*key, "paired_mse", "psnr", "frechet")}, flush=True)
    rows = read(args.out)
    print(table(rows))
    if any(row["part"] == "adaptive" for row in rows):
        plot(rows, args.out.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
