"""Sampling with a student whose times are a grid, or chosen by a schedule head."""

from __future__ import annotations

import torch
from torch import Tensor

from redif_env import mdp, schedules, transition
from redif_env.denoiser import Denoiser

from .choices import ScheduleHead


@torch.no_grad()
def sample(
    denoiser: Denoiser, times: Tensor | ScheduleHead, x_T: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Deterministic DDIM along a grid, or to the most likely times of a schedule head.

    Args:
        denoiser: The student.
        times: The grid, `(num_steps + 1,)`, or a head.
        x_T: Initial noise, `(N, ...)`.
        condition: Classes, int64 `(N,)`, or None.

    Returns:
        `x_0`, float32 `(N, ...)`, and the steps that each row took, int64 `(N,)`.
    """
    if isinstance(times, ScheduleHead):
        return _sample_adaptively(denoiser, times, x_T, condition)
    num_steps = torch.full((len(x_T),), len(times) - 1, device=x_T.device)
    return schedules.sample(denoiser, x_T, condition, times), num_steps


def _sample_adaptively(
    denoiser: Denoiser, head: ScheduleHead, x_T: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_0 = x_T.clone()
    num_steps = torch.zeros(len(x_T), dtype=torch.int64, device=x_T.device)
    rows = torch.arange(len(x_T), device=x_T.device)
    before = head.before(x_T, condition)
    t = head.next_time(head(before).mode(), before)
    while len(rows):  # rows that have arrived cost nothing more
        x_t, index = x_0[rows], num_steps[rows]
        classes = None if condition is None else condition[rows]
        obs = mdp.observe(x_t, t, index, classes, denoiser.schedule, head.max_steps)
        s = head.next_time(head(obs).mode(), obs)
        x0_pred = denoiser(x_t, t, classes)
        x_0[rows] = transition.step(denoiser.schedule, x_t, x0_pred, t, s).mean
        num_steps[rows] += 1
        rows, t = rows[s > 0], s[s > 0]
    return x_0, num_steps
