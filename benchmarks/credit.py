"""How far local credit leads from the gradient, step by step: `python benchmarks/credit.py`.

A step's noise is credited, element by element, with what the reward's map says at the same place;
what the rest of the trajectory makes of it elsewhere is left out. Of the untrained student on its
searched grid, and for several radii of the neighbourhood that counts, this prints

* by places: the cosine between what local credit leads along (the mean of many draws) and the
  gradient of the reward by the step's end, and the share of the latter that a single draw finds, in
  squared length;
* in the weights, where places and tasks are added up: how long the gradient of a minibatch is along
  the exact one, in units of its length, and its signal-to-noise ratio, the squared length of the
  mean along the exact gradient over the variance of a minibatch with one draw a task. Back-
  propagation has no noise but that of the choice of tasks.
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
    """Validation tasks; in a minibatch, too."""
    num_batches: int = 32
    """Minibatches."""
    num_draws: int = 128
    """Draws of noise, each and its opposite."""
    std: float = 0.02
    """Of the noise, in units of the prediction."""


State = tuple[Tensor, Past | None]  # x_t, and what a step of second order needs


class Walk:
    """The untrained student's trajectories of some tasks, and what noise in one step makes of them.

    Args:
        task: The tasks' world.
        args: What to measure.
    """

    def __init__(self, task: Task, args: Args) -> None:
        self.denoiser = copy.copy(task.start or task.teacher.denoiser)
        self.denoiser.set_solver_order(args.solver_order)
        self.denoiser.network.requires_grad_(True)
        self.bank = task.validation
        self.tasks = self.bank.subset(args.num_tasks)
        if args.times is None:
            self.grid = schedules.search(self.denoiser, task.validation, args.num_steps)
        else:
            self.grid = schedules.explicit(args.times, self.denoiser.schedule)

    def rewards(self, x_t: Tensor, past: Past | None, first: int) -> Tensor:
        """Maps of minus the squared error of what follows from a state before step `first`."""
        for t, s in self._times(first):
            x_t, past = self._step(x_t, past, t, s)
        return -(x_t - self.tasks.teacher_x_0).square()

    def starts(self) -> list[State]:
        """The state before each step, and after the last."""
        x_t, past = self.tasks.x_T, None
        states = [(x_t, past)]
        for t, s in self._times(0):
            x_t, past = self._step(x_t, past, t, s)
            states.append((x_t, past))
        return states

    def outcome(self, state: State, step: int, x_s: Tensor) -> Tensor:
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

    def step(self, state: State, number: int) -> State:
        """The state after a step."""
        return self._step(*state, *self._times(number)[0])

    def _times(self, first: int) -> list[tuple[Tensor, Tensor]]:
        times = self.grid[first:].unsqueeze(1).expand(-1, len(self.tasks))
        return list(itertools.pairwise(times))

    def _step(self, x_t: Tensor, past: Past | None, t: Tensor, s: Tensor) -> State:
        x0_pred = self.denoiser(x_t, t, self.tasks.condition)
        x_s = transition.step(self.denoiser.schedule, x_t, x0_pred, t, s, past=past).mean
        return x_s, Past(x0_pred, t) if self.denoiser.solver_order == 2 else None


def measure(walk: Walk, step: int, args: Args) -> dict[int, tuple[float, float]]:
    """By places: cosine, and share that a draw finds, of each radius."""
    state, end, gradient = _exact(walk, step)
    generator = torch.Generator().manual_seed(0)
    halves = {radius: torch.zeros(2, *end.shape) for radius in args.radii}
    along, length = (dict.fromkeys(args.radii, 0.0) for _ in range(2))
    for draw in tqdm(range(args.num_draws), f"step {step}", leave=False):
        for radius, credited in _draw(walk, state, end, step, args, generator).items():
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


def measure_in_weights(walk: Walk, step: int, args: Args) -> dict[int | None, tuple[float, float]]:
    """In the weights: length along the exact gradient and signal to noise; None is the exact one.

    Of one step alone: the same weights make the others.
    """
    generator = torch.Generator().manual_seed(0)
    weights = [*walk.denoiser.network.parameters()]
    rows: dict[int | None, list[Tensor]] = {radius: [] for radius in (None, *args.radii)}
    for _ in tqdm(range(args.num_batches), f"weights, step {step}", leave=False):
        chosen = torch.randint(len(walk.bank), (args.num_tasks,), generator=generator)
        walk.tasks = walk.bank.take(chosen)
        state, end, gradient = _exact(walk, step)
        credit: dict[int | None, Tensor] = {None: gradient}
        credit |= _draw(walk, state, end, step, args, generator)
        own, _ = walk.step(state, step)
        for radius, credited in credit.items():
            value = (own * credited).sum() / args.num_tasks
            parts = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
            rows[radius].append(torch.cat([part.flatten() for part in parts if part is not None]))
    # Products of different minibatches have no part of the noise.
    exact = torch.stack(rows[None])
    length = _between(exact, exact).clamp_min(1e-12).sqrt()
    found = {}
    for radius, each in rows.items():
        batches = torch.stack(each)
        along = _between(batches, exact) / length
        variance = batches.var(0).sum()
        found[radius] = float(along / length), float(along * along.abs() / variance)
    return found


def _between(one: Tensor, other: Tensor) -> Tensor:
    """Mean product of two different minibatches' gradients, `(M, P)` each."""
    num = len(one)
    return ((one.sum(0) * other.sum(0)).sum() - (one * other).sum()) / (num * (num - 1))


def _exact(walk: Walk, step: int) -> tuple[State, Tensor, Tensor]:
    """The state before a step, its end, and the gradient of the reward by the latter."""
    with torch.no_grad():
        states = walk.starts()
    state, end = states[step], states[step + 1][0]
    x_s = end.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(walk.outcome(state, step, x_s).sum(), x_s)
    return state, end, gradient


def _draw(
    walk: Walk, state: State, end: Tensor, step: int, args: Args, generator: torch.Generator
) -> dict[int, Tensor]:
    """What a draw and its opposite find of the gradient, by radius."""
    std = args.std * walk.gain(step)
    noise = unit_noise(end, RADEMACHER, generator)
    with torch.no_grad():
        up, down = (walk.outcome(state, step, end + sign * std * noise) for sign in (1, -1))
    slope = (up - down) / (2 * std)
    # `fit_map` takes a mean: the sum over a neighbourhood is what estimates the gradient
    return {
        radius: (2 * radius + 1) ** 2 * noise * fit_map(slope, slope.shape[1:], radius)
        for radius in args.radii
    }


def main(args: Args) -> None:
    """Measure and print the tables."""
    task = make_task(args.task, SIZES, args.teacher)
    walk = Walk(task, args)
    radii = " | ".join(f"radius {r}" for r in args.radii)
    _print_header(f"by places | times | {radii}")
    for step in range(len(walk.grid) - 1):
        cells = measure(walk, step, args).values()
        _print_row(walk, step, [f"{cosine:.2f} ({share:.1%})" for cosine, share in cells])
    _print_header(f"in the weights | times | exact | {radii}")
    for step in range(len(walk.grid) - 1):
        cells = measure_in_weights(walk, step, args).values()
        _print_row(walk, step, [f"{length:.2f} ({ratio:.2f})" for length, ratio in cells])


def _print_header(names: str) -> None:
    print(f"| {names} |\n|" + "---|" * (names.count("|") + 1))


def _print_row(walk: Walk, step: int, cells: list[str]) -> None:
    times = f"{walk.grid[step]:g} to {walk.grid[step + 1]:g}"
    print(f"| {step} | {times} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
