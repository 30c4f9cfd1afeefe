"""Time grids, and the encoding of schedule choices as one action coordinate.

A grid is a float32 tensor `(num_steps + 1,)`, strictly falling, from the time where sampling starts
to 0, the data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from . import transition
from .denoiser import Denoiser
from .errors import InvalidArgumentError, check_integer
from .noise import NoiseSchedule
from .teacher import TeacherBank

# From a denoiser, x_T, condition and grid to x_0; `sample` is one.
Sampler: TypeAlias = Callable[[Denoiser, Tensor, Tensor | None, Tensor], Tensor]

GRID_NAMES = ("uniform", "karras")
KARRAS_SIGMA_MAX = 80.0  # Karras et al. 2022, table 1; a VP schedule's own may be 20,000


def make_grid(
    spec: str | Sequence[float] | Tensor,
    schedule: NoiseSchedule,
    num_steps: int,
    others: Sequence[str] = ("free",),
) -> Tensor:
    """The grid that `spec` stands for.

    Args:
        spec: `"uniform"`, `"karras"`, or the times themselves with or without the final 0.
        schedule: Noise schedule that the times belong to.
        num_steps: Number of steps.
        others: Names that the caller takes beside these, for the error message.

    Raises:
        InvalidArgumentError: for an unknown name, or times that are not strictly falling, not on
            the schedule, or not `num_steps` many.
    """
    num_steps = check_integer("num_steps", num_steps, 1)
    if isinstance(spec, str):
        if spec not in GRID_NAMES:
            names = ", ".join(map(repr, (*others, *GRID_NAMES)))
            raise InvalidArgumentError(
                "schedule", spec, f"pass one of {names}, or times in a list."
            )
        return uniform(schedule, num_steps) if spec == "uniform" else karras(schedule, num_steps)
    grid = explicit(spec, schedule)
    if len(grid) != num_steps + 1:
        raise InvalidArgumentError(
            "num_steps", num_steps, f"the schedule has {len(grid) - 1} steps; pass that or nothing."
        )
    return grid


def uniform(schedule: NoiseSchedule, num_steps: int) -> Tensor:
    """Evenly spaced times, ending in a step to 0: diffusers' `timestep_spacing="trailing"`."""
    num_steps = check_integer("num_steps", num_steps, 1)
    length = schedule.num_train_timesteps
    offset = length - schedule.max_timestep
    ramp = torch.arange(num_steps, 0, -1, dtype=torch.float64) * (length / num_steps)
    return _finish(schedule, ramp.round() - offset if offset else ramp, num_steps)


def karras(schedule: NoiseSchedule, num_steps: int, rho: float = 7.0) -> Tensor:
    """Times whose sigma/alpha follow Karras et al. 2022, eq. 5, from at most 80 to the data."""
    num_steps = check_integer("num_steps", num_steps, 1)
    unit = 1.0 if _has_whole_times(schedule) else min_gap(schedule)
    times = schedule.snap(torch.arange(1, math.ceil(schedule.max_timestep / unit) + 1) * unit)
    ratio = (schedule.sigma(times) / schedule.alpha(times)).double()
    high = min(KARRAS_SIGMA_MAX, float(ratio[-1])) ** (1 / rho)
    low = float(ratio[0]) ** (1 / rho)
    wanted = (high + torch.linspace(0, 1, num_steps, dtype=torch.float64) * (low - high)) ** rho
    nearest = (ratio.log() - wanted.log()[:, None]).abs().argmin(1)
    return _finish(schedule, times[nearest], num_steps)


def explicit(times: Sequence[float] | Tensor, schedule: NoiseSchedule) -> Tensor:
    """Check a list of times and return it as a grid; a final 0 may be left out."""
    try:
        grid = torch.as_tensor(times, dtype=torch.float32).cpu().clone()
    except (TypeError, ValueError, RuntimeError):
        grid = torch.full((1,), math.nan)
    remedy = (
        f"pass finite, strictly decreasing times of at most {schedule.max_timestep:g}, "
        "such as [850, 533, 289, 120]."
    )
    if grid.ndim != 1 or not len(grid) or not bool(grid.isfinite().all()):
        raise InvalidArgumentError("schedule", times, remedy)
    if grid[-1] != 0:
        grid = torch.cat([grid, torch.zeros(1)])
    if len(grid) < 2 or bool((grid.diff() >= 0).any()) or float(grid[0]) > schedule.max_timestep:
        raise InvalidArgumentError("schedule", times, remedy)
    if not torch.equal(schedule.snap(grid), grid):
        raise InvalidArgumentError("schedule", times, "pass whole timesteps for this model.")
    return grid


def halve(grid: Tensor, schedule: NoiseSchedule) -> Tensor:
    """A grid of twice as many steps: the same times, and between them those halfway.

    Raises:
        InvalidArgumentError: where two times are neighbours, with nothing between them.
    """
    middles = schedule.snap((grid[:-1] + grid[1:]) / 2)
    finer = torch.cat([torch.stack([grid[:-1], middles], 1).flatten(), grid[-1:]])
    if bool((finer.diff() >= 0).any()):
        raise InvalidArgumentError(
            "grid", grid.tolist(), "some of its times have no other between them."
        )
    return finer


def _finish(schedule: NoiseSchedule, times: Tensor, num_steps: int) -> Tensor:
    grid = torch.cat([schedule.snap(times.cpu()).float(), torch.zeros(1)])
    if bool((grid.diff() >= 0).any()):
        raise InvalidArgumentError(
            "num_steps", num_steps, "the times of this many steps coincide; pass fewer."
        )
    return grid


def sample(
    denoiser: Denoiser, x_T: Tensor, condition: Tensor | None, grid: Sequence[float] | Tensor
) -> Tensor:
    """Deterministic steps along `grid`: the sampler of every student, and the few-step baseline.

    DDIM's, or of second order, as the denoiser's `solver_order` says. Gradients flow to the
    network, unless they are switched off.

    Args:
        denoiser: The student.
        x_T: Initial noise, `(N, ...)`.
        condition: Classes, int64 `(N,)`, or None.
        grid: Times, `(num_steps + 1,)`, or a list of them, see `explicit`.

    Returns:
        `x_0`, float32 `(N, ...)`.
    """
    x_t, past = x_T, None
    grid = grid if isinstance(grid, Tensor) else explicit(grid, denoiser.schedule)
    times = grid.to(x_T).unsqueeze(1).expand(-1, len(x_T))
    for t, s in itertools.pairwise(times):
        x0_pred = denoiser(x_t, t, condition)
        x_t = transition.step(denoiser.schedule, x_t, x0_pred, t, s, past=past).mean
        past = transition.Past(x0_pred, t) if denoiser.solver_order == 2 else None
    return x_t


@torch.no_grad()
def paired_mse(
    denoiser: Denoiser,
    bank: TeacherBank,
    grid: Sequence[float] | Tensor,
    batch_size: int = 512,
    sampler: Sampler = sample,
) -> float:
    """Mean squared error between samples along `grid` and the bank's answers, per element.

    Raises:
        InvalidArgumentError: for times that make no grid, see `explicit`.
    """
    grid, total = explicit(grid, denoiser.schedule), 0.0
    for start in range(0, len(bank), batch_size):
        rows = slice(start, start + batch_size)
        condition = None if bank.condition is None else bank.condition[rows]
        x_0 = sampler(denoiser, bank.x_T[rows], condition, grid)
        total += float((x_0 - bank.teacher_x_0[rows]).square().mean()) * len(x_0)
    return total / len(bank)


def search(
    denoiser: Denoiser,
    bank: TeacherBank,
    num_steps: int,
    rounds: int = 3,
    sampler: Sampler = sample,
) -> Tensor:
    """The best grid for the denoiser's own steps, or for another sampler, on the bank's tasks.

    Coordinate descent from the better of two starts: each time moves by plus or minus a stride
    while that lowers the paired MSE; the stride halves until it is under a hundredth of the axis. A
    few seconds for 256 small images.

    Args:
        denoiser: The model to sample with.
        bank: Validation tasks; 128 to 512 are enough.
        num_steps: Number of steps.
        rounds: Sweeps over the times at each stride.
        sampler: Samples along a grid.
    """
    schedule = denoiser.schedule
    seen: dict[tuple[float, ...], float] = {}

    def cost(grid: Tensor) -> float:
        key = tuple(grid.tolist())
        if key not in seen:
            falling = bool((grid.diff() < 0).all())
            error = paired_mse(denoiser, bank, grid, sampler=sampler) if falling else math.inf
            seen[key] = error if math.isfinite(error) else math.inf  # NaN would never be beaten
        return seen[key]

    starts = [uniform(schedule, num_steps), karras(schedule, num_steps)]
    best = min(starts, key=cost)
    stride = schedule.num_train_timesteps / 8
    while stride >= schedule.num_train_timesteps / 250:
        for _ in range(rounds):
            before = cost(best)
            for index in range(num_steps):
                best = min(
                    (_moved(schedule, best, index, d) for d in (0, -stride, stride)), key=cost
                )
            if cost(best) == before:
                break
        stride /= 2
    return best


def _moved(schedule: NoiseSchedule, grid: Tensor, index: int, shift: float) -> Tensor:
    moved = grid.clone()
    moved[index] += shift
    return schedule.snap(moved)


def decode_choice(choice: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The next time that a schedule coordinate stands for.

    `u = (choice + 1) / 2` is the fraction of the remaining time that is kept, `s = u t`, as in
    TPDM (arXiv 2412.01243): -1 goes straight to the data, 0 halves the time, and 1 takes the
    smallest possible step.

    Args:
        choice: float `(N,)` in [-1, 1].
        t: Current times, float `(N,)`, > 0.
        schedule: Noise schedule that the times belong to.

    Returns:
        `s`, float `(N,)`, on the schedule, `0 <= s < t`.
    """
    gap = min_gap(schedule)
    kept = schedule.snap((choice.clamp(-1, 1) + 1) / 2 * t)
    return torch.minimum(kept, (t - gap).clamp_min(0))


def next_time(
    choice: Tensor,
    t: Tensor,
    step_index: Tensor,
    schedule: NoiseSchedule,
    *,
    max_steps: int,
    min_steps: int = 1,
) -> Tensor:
    """`decode_choice`, such that every episode has `min_steps` to `max_steps` steps.

    Args:
        choice: float `(N,)` in [-1, 1].
        t: Current times, float `(N,)`, > 0.
        step_index: Steps made, int64 `(N,)`; -1 for the choice of the first time.
        schedule: Noise schedule that the times belong to.
        max_steps: The last of these goes to 0 whatever the choice.
        min_steps: A choice that would leave fewer takes the nearest time that does not.

    Returns:
        `s`, float `(N,)`, on the schedule, `0 <= s < t`.
    """
    steps_after = (min_steps - 1 - step_index).clamp_min(0)
    s = torch.maximum(decode_choice(choice, t, schedule), min_gap(schedule) * steps_after)
    return torch.where(step_index + 1 >= max_steps, 0.0, s)


def before_first(schedule: NoiseSchedule) -> float:
    """The time that the choice of the first time is made at: one gap above the largest."""
    return schedule.max_timestep + min_gap(schedule)


def encode_choice(s: Tensor, t: Tensor) -> Tensor:
    """The coordinate that `decode_choice` turns into `s`, float `(N,)` in [-1, 1]."""
    return 2 * s / t - 1


def min_gap(schedule: NoiseSchedule) -> float:
    """The smallest step that a choice can take: a thousandth of the axis; of whole times, whole."""
    gap = schedule.num_train_timesteps / 1000
    return float(math.ceil(gap)) if _has_whole_times(schedule) else gap


def _has_whole_times(schedule: NoiseSchedule) -> bool:
    half = torch.tensor(0.5)
    return bool(schedule.snap(half) != half)
