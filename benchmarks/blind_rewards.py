"""Does PPO raise rewards that have no gradient? `python benchmarks/blind_rewards.py`.

Two such rewards: minus the bytes of the compressed sample, and whether a classifier (not the judge)
gives it the asked class. Each is added to the paired error, `MSE + weight * blind`, and compared
with the same run on `MSE` alone: what it ends higher by is due to the added term. All start from
the teacher's weights on the searched grid and are judged by the averaged student, deterministic, on
test noise. Runs in the output file are not redone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn
from torch.nn import functional as F

from agents import ReDiFPPO, presets
from agents.callbacks import IterationCallback
from agents.distillation import find_judge
from agents.evaluation import Judge, label_agreement
from examples.image_data import ImageData, load_images
from redif_env import MSE, ReDiFVectorEnv, Reward, Teacher, TeacherBank, load_teacher, schedules
from redif_env.errors import check_choice, require
from redif_env.files import write_json
from redif_env.rewards import CompressedSize, Label

# A classifier of all 1,257 training images agrees with 99 % of the samples from the start.
NUM_LABELLED = 100


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a blind reward is trained on.

    Attributes:
        num_steps: Steps of the student.
        weight: Of the blind reward beside `MSE`.
        agent: What differs from the default preset, in the control too.
    """

    num_steps: int
    weight: float
    agent: dict[str, Any]


# Weights and std were chosen on other noise in runs of 20 iterations.
SETTINGS = {
    "size": Setting(2, 5e-4, {}),
    # Noise of half the gap flips too few labels: the reward then ends where it started.
    "label": Setting(1, 0.15, {"min_std": 0.3}),
}


@dataclasses.dataclass
class Args:
    """Measure rewards without a gradient."""

    terms: tuple[str, ...] = tuple(SETTINGS)
    """Blind rewards: size, label."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of training."""
    iterations: int = 30
    """Iterations of `num_envs` trajectories."""
    num_envs: int = 512
    """Trajectories of an iteration."""
    bank_size: int = 6144
    """Training tasks."""
    num_held_out: int = 1000
    """Test tasks."""
    every: int = 5
    """Iterations between two evaluations."""
    out: Path = Path("benchmarks/results/blind_rewards.json")
    """Results, a list of runs; the picture has the same name and ends in .png."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a run and its control share."""

    teacher: Teacher
    judge: Judge
    train: TeacherBank
    test: TeacherBank
    grid: Tensor
    blind: Reward

    @torch.no_grad()
    def measure(self, x_0: Tensor) -> dict[str, float]:
        """Blind reward, paired MSE and the judge's label agreement of samples of the test tasks."""
        answers, condition = self.test.teacher_x_0, self.test.condition
        assert condition is not None
        return {
            "blind": float(self.blind(x_0, answers, condition).mean()),
            "mse": float((x_0 - answers).square().mean()),
            "judge": label_agreement(self.judge, x_0, condition),
        }


class Curve(IterationCallback):
    """Measures the averaged student every few iterations."""

    def __init__(self, task: Task, every: int) -> None:
        super().__init__(every)
        self.task = task
        self.points: list[dict[str, float]] = []

    @torch.no_grad()
    def on_iteration(self) -> None:
        model: Any = self.model
        test = self.task.test
        x_0 = schedules.sample(model.student(), test.x_T, test.condition, self.task.grid)
        self.points.append({"iteration": self.iteration, **self.task.measure(x_0)})


def make_blind(term: str) -> Reward:
    """The reward without a gradient."""
    return CompressedSize() if term == "size" else Label(make_classifier(load_images("digits")))


def make_classifier(digits: ImageData, seed: int = 0, steps: int = 500) -> nn.Module:
    """A small MLP on a few digits; the judge is a convolutional network that saw them all."""
    images, classes = digits.images[:NUM_LABELLED], digits.classes[:NUM_LABELLED]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(images[0].numel(), 16),
            nn.Tanh(),
            nn.Linear(16, digits.num_classes),
        )
        optimizer = torch.optim.Adam(classifier.parameters(), 2e-3)
        for _ in range(steps):
            rows = torch.randint(len(images), (64,))
            loss = F.cross_entropy(classifier(images[rows]), classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return classifier


def make_task(term: str, args: Args) -> Task:
    """Teacher, judge, tasks, the searched grid and the blind reward."""
    teacher = load_teacher()
    judge = find_judge(teacher)
    assert judge is not None
    validation = TeacherBank.build(teacher, 512, split="validation", progress=True)
    return Task(
        teacher,
        judge,
        TeacherBank.build(teacher, args.bank_size, progress=True),
        TeacherBank.build(teacher, args.num_held_out, split="test", progress=True),
        schedules.search(teacher.denoiser, validation, SETTINGS[term].num_steps),
        make_blind(term),
    )


def run(term: str, weight: float, task: Task, seed: int, args: Args) -> dict[str, Any]:
    """Train on `MSE + weight * blind`; one row of the results."""
    reward = MSE() + weight * task.blind if weight else MSE()
    recipe = presets.preset("default")
    options = {**recipe["agent"], **SETTINGS[term].agent, "seed": seed}
    options["learning_rate"] = LinearSchedule(options["learning_rate"], 0.0, 1.0)
    env = ReDiFVectorEnv(
        args.num_envs,
        task.teacher,
        schedule=task.grid,
        reward=reward,
        bank=task.train,
        seed=seed,
        **recipe["env"],
    )
    model = ReDiFPPO("StudentPolicy", env, policy_kwargs=recipe["policy"], **options)
    model.set_logger(configure(None, []))
    curve = Curve(task, args.every)
    started = time.monotonic()
    model.learn(args.iterations * args.num_envs * SETTINGS[term].num_steps, callback=curve)
    return {
        "term": term,
        "weight": weight,
        "seed": seed,
        "reward": reward.name,
        "num_steps": SETTINGS[term].num_steps,
        "num_envs": args.num_envs,
        "seconds": round(time.monotonic() - started, 1),
        "teacher": task.measure(task.test.teacher_x_0),
        "curve": curve.points,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """Rows of earlier runs."""
    return json.loads(path.read_text()) if path.exists() else []


def by_reward(rows: list[dict[str, Any]], term: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of a term by the reward that was trained on, its control last."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: -row["weight"]):
        if row["term"] == term:
            groups.setdefault(row["reward"], []).append(row)
    return groups


def table(rows: list[dict[str, Any]]) -> str:
    """Start and end on test noise, in Markdown: means over seeds, and their range."""
    lines = ["| term | steps | trained on | seeds | blind reward | paired MSE | judge agrees |"]
    lines.append("|" + "---|" * 7)
    for term in dict.fromkeys(row["term"] for row in rows):
        groups = by_reward(rows, term)
        first = next(iter(groups.values()))[0]
        head = f"| {term} | {first['num_steps']} |"
        lines.append(f"{head} teacher itself | | {_cells([first['teacher']])} |")
        lines.append(f"{head} start | | {_cells([first['curve'][0]])} |")
        for name, own in groups.items():
            ends = [row["curve"][-1] for row in own]
            lines.append(f"{head} {name} | {len(own)} | {_cells(ends)} |")
    return "\n".join(lines)


def _cells(points: list[dict[str, float]]) -> str:
    digits = {"blind": 3, "mse": 5, "judge": 3}
    return " | ".join(_spread([p[key] for p in points], digits[key]) for key in digits)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The blind reward above the paired MSE, a column a term; a line is a seed."""
    terms = list(dict.fromkeys(row["term"] for row in rows))
    figure = Figure(figsize=(5 * len(terms), 6), layout="constrained")
    axes = figure.subplots(2, len(terms), squeeze=False, sharex="col")
    labels = {"size": "minus bytes, compressed", "label": "classifier gives the asked class"}
    for (top, bottom), term in zip(axes.T, terms, strict=True):
        groups = by_reward(rows, term)
        first = next(iter(groups.values()))[0]
        for axis, key in ((top, "blind"), (bottom, "mse")):
            for colour, (name, own) in enumerate(groups.items()):
                for index, row in enumerate(own):
                    trajectories = [p["iteration"] * row["num_envs"] for p in row["curve"]]
                    axis.plot(
                        trajectories,
                        [p[key] for p in row["curve"]],
                        color=f"C{colour}",
                        label=None if index else name,
                    )
            axis.axhline(first["curve"][0][key], color="grey", linestyle=":", label="start")
        top.axhline(first["teacher"]["blind"], color="grey", linestyle="--", label="teacher")
        top.set_title(f"{first['num_steps']}-step student")
        top.set_ylabel(labels[term])
        bottom.set_ylabel("paired MSE")
        bottom.set_xlabel("trajectories")
        bottom.legend(*top.get_legend_handles_labels(), loc="upper right", bbox_to_anchor=(1, 0.95))
    figure.savefig(path, dpi=120)


def main(args: Args) -> list[dict[str, Any]]:
    """Run what is missing, draw, and print the table."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    for term in args.terms:
        check_choice("terms", term, tuple(SETTINGS))
    for term in args.terms:
        done = {(r["term"], r["weight"], r["seed"]) for r in read(args.out)}
        wanted = [(term, w, seed) for seed in args.seeds for w in (SETTINGS[term].weight, 0.0)]
        missing = [key for key in wanted if key not in done]
        task = make_task(term, args) if missing else None
        for _, weight, seed in missing:
            assert task is not None
            row = run(term, weight, task, seed, args)
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, [*read(args.out), row])
            print(row["reward"], seed, row["curve"][-1], f"{row['seconds']} s", flush=True)
    rows = read(args.out)
    draw(rows, args.out.with_suffix(".png"))
    print(table(rows))
    return rows


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
