"""How widely a student explores, and in which steps of an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor

from redif_env import parallel
from redif_env.noise import expand

from .policies import StudentPolicy
from .sampling import sample

GAP_FRACTION = 0.5
GAP_TASKS = 64  # on which the gap is measured before the first rollout


def at(value: float | Schedule, progress_remaining: float) -> float:
    """A number, or a function of the remaining progress at that progress."""
    return float(value(progress_remaining)) if callable(value) else float(value)


def explored_steps(step_weights: Sequence[float] | None, window: int) -> list[int] | None:
    """The steps that are explored, of those that may be; None: all.

    Args:
        step_weights: Of each step of an episode, or None.
        window: Neighbouring steps that explore at once.
    """
    if step_weights is None or window > 1:
        return None  # a window of several steps may begin before those that count
    return [step for step, weight in enumerate(step_weights) if weight]


def in_window(step: int, first: Tensor, length: int, window: int) -> Tensor:
    """The rows whose window of stochastic steps holds a step, bool `(N,)`.

    Args:
        step: Of the episode.
        first: Where each row's window begins, int64 `(N,)`.
        length: Steps of the episode; windows go on at its start.
        window: Steps of a window.
    """
    return (step - first) % length < window


def final_error(state: Any, ended: Tensor | None, before: Tensor | None) -> Tensor:
    """Distance of the last samples from the teacher's, `(N, *latent_shape)`.

    Args:
        state: Of the environment, as episodes ended in it.
        ended: Which did just now, bool `(N,)`; None: all.
        before: Of those that ended earlier, or None.
    """
    error = state.x_t - state.teacher_x_0
    if ended is None or before is None:
        return error
    return torch.where(expand(ended, error), error, before)


def gap_of_groups(error: Tensor, group_size: int) -> Tensor:
    """The gap, a scalar: the mean of a group, of opposite noise above all, is nearly free of it."""
    return root_mean_square(error.unflatten(0, (-1, group_size)).mean(1))


@torch.no_grad()
def gap_without_noise(policy: StudentPolicy, state: Any) -> Tensor:
    """The gap of the tasks that the first episodes start from, or of some of them."""
    some = slice(GAP_TASKS)
    condition = None if state.condition is None else state.condition[some]
    times = policy.schedule_head or policy.timesteps
    x_0, _ = sample(policy.denoiser, times, state.x_T[some], condition)
    return root_mean_square(x_0 - state.teacher_x_0[some])


def root_mean_square(values: Tensor) -> Tensor:
    """Of all elements on all processes, a scalar without gradient."""
    return parallel.mean(values.detach().square().mean()).sqrt()
