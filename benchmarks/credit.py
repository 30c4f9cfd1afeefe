"""How far local credit leads from the gradient, step by step: `python benchmarks/credit.py`.

A step's noise is credited, element by element, with what the reward's map says at the same place;
what the rest of the trajectory makes of it elsewhere is left out. Of the untrained student on its
searched grid, this prints for each step the cosine between what local credit leads along (the mean
of many draws) and the gradient of the reward by the step's end, for several radii of the
neighbourhood that counts, and the share of the latter that a single draw finds, in squared length.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from agents.benchmark import Sizes, Task, make_task
from redif_env import schedules, transition
from redif_env.errors import require
from redif_env.rewards import fit_map
from redif_env.transition import RADEMACHER, Past, unit_noise

SIZES = Sizes(train=16, validation=128, test=16)  # only validation tasks are asked


@dataclasses.dataclass
class Args:
    """Compare local credit with the gradient that it stands for."""

    task: str = "digits"
    """Of the benchmark: digits, digits-unconditional or images."""
    teacher: Path | None = None
    """Folder of the teacher, for images."""
    num_steps: int = 4
    """Steps of the student."""
    solver_order: int = 2
    """Of its steps."""
    times: tuple[float, ...] | None = None
    """Its times, in place of the searched ones."""
    radii: tuple[int, ...] = (0, 1, 2)
    """Neighbourhoods that count."""
    num_tasks: int = 16
    """Validation tasks."""
    num_draws: int = 128
    """Draws of noise, each and its opposite."""
    std: float = 0.02
    """Of the noise, in units of the prediction."""


class Walk:
    """The untrained student's trajectories of some tasks, and what noise in one step makes of them.

    Args:
        task: The tasks' world.
        args: What to measure.
    """

    def __init__(self, task: Task, args: Args) -> None:
        self.denoiser = copy.copy(task.start or task.teacher.denoiser)
        self.denoiser.set_solver_order(args.solver_order)
        self.tasks = task.validation.subset(args.num_tasks)
        if args.times is None:
            self.grid = schedules.search(self.denoiser, task.validation, args.num_steps)
        else:
            self.grid = schedules.explicit(args.times, self.denoiser.schedule)

    def rewards(self, x_t: Tensor, past: Past | None, first: int) -> Tensor:
        """Maps of minus the squared error of what follows from a state before step `first`."""
        for t, s in self._times(first):
            x_t, past = self._step(x_t, past, t, s)
        return -(x_t - self.tasks.teacher_x_0).square()

    def starts(self) -> list[tuple[Tensor, Past | None]]:
        """The state before each step, and after the last."""
        x_t, past = self.tasks.x_T, None
        states = [(x_t, past)]
        for t, s in self._times(0):
            x_t, past = self._step(x_t, past, t, s)
            states.append((x_t, past))
        return states

    def outcome(self, state: tuple[Tensor, Past | None], step: int, x_s: Tensor) -> Tensor:
        """Maps of the reward if a step from a state ends in `x_s` instead of its own end."""
        (x_t, past), (t, s) = state, self._times(step)[0]
        after = None
        if self.denoiser.solver_order == 2:  # as in the environment: of the action, noise included
            past = Past(torch.zeros_like(x_t), t) if past is None else past
            after = Past(transition.x0_of_step(self.denoiser.schedule, x_t, x_s, t, s, past), t)
        return self.rewards(x_s, after, step + 1)

    def gain(self, step: int) -> float:
        """What the step makes of a change of the prediction."""
        t, s = (time[:1] for time in self._times(step)[0])
        noise = self.denoiser.schedule
        return float(noise.alpha(s) - noise.sigma(s) * noise.alpha(t) / noise.sigma(t))

    def _times(self, first: int) -> list[tuple[Tensor, Tensor]]:
        times = self.grid[first:].unsqueeze(1).expand(-1, len(self.tasks))
        return list(itertools.pairwise(times))

    def _step(
        self, x_t: Tensor, past: Past | None, t: Tensor, s: Tensor
    ) -> tuple[Tensor, Past | None]:
        x0_pred = self.denoiser(x_t, t, self.tasks.condition)
        x_s = transition.step(self.denoiser.schedule, x_t, x0_pred, t, s, past=past).mean
        return x_s, Past(x0_pred, t) if self.denoiser.solver_order == 2 else None


def measure(walk: Walk, step: int, args: Args) -> dict[int, tuple[float, float]]:
    """Cosine, and share that a draw finds, of each radius."""
    with torch.no_grad():
        states = walk.starts()
    state, end = states[step], states[step + 1][0]
    x_s = end.clone().requires_grad_(True)
    gradient = torch.autograd.grad(walk.outcome(state, step, x_s).sum(), x_s)[0]
    generator = torch.Generator().manual_seed(0)
    halves = {radius: torch.zeros(2, *end.shape) for radius in args.radii}
    along, length = (dict.fromkeys(args.radii, 0.0) for _ in range(2))
    std = args.std * walk.gain(step)
    for draw in tqdm(range(args.num_draws), f"step {step}", leave=False):
        noise = unit_noise(end, RADEMACHER, generator)
        with torch.no_grad():
            up, down = (walk.outcome(state, step, end + sign * std * noise) for sign in (1, -1))
        slope = (up - down) / (2 * std)
        for radius in args.radii:
            # `fit_map` takes a mean: the sum over a neighbourhood is what estimates the gradient
            credited = (2 * radius + 1) ** 2 * noise * fit_map(slope, slope.shape[1:], radius)
            halves[radius][draw % 2] += credited * 2 / args.num_draws
            along[radius] += float((credited * gradient).sum()) / args.num_draws
            length[radius] += float(credited.square().sum()) / args.num_draws
    own = float(gradient.square().sum())
    found = {}
    for radius, (one, other) in halves.items():
        # draws of the two halves are independent: their product has no part of the noise
        mean_length = float((one * other).sum().clamp_min(1e-12))
        cosine = along[radius] / (mean_length * own) ** 0.5
        found[radius] = cosine, along[radius] * abs(along[radius]) / (own * length[radius])
    return found


def main(args: Args) -> None:
    """Measure and print the table."""
    task = make_task(args.task, SIZES, args.teacher)
    walk = Walk(task, args)
    print("| step | times | " + " | ".join(f"radius {r}" for r in args.radii) + " |")
    print("|---|---|" + "---|" * len(args.radii))
    for step in range(len(walk.grid) - 1):
        cells = measure(walk, step, args).values()
        figures = " | ".join(f"{cosine:.2f} ({share:.1%})" for cosine, share in cells)
        print(
            f"| {step} | {walk.grid[step]:g} to {walk.grid[step + 1]:g} | {figures} |", flush=True
        )


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
