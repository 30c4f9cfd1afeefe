"""KernelSolver: deterministic steps along a grid, for what diffusers has no scheduler for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from . import schedules, transition
from .denoiser import Denoiser
from .noise import expand, to_x0


class KernelSolver:
    """The kernel at eta = 0 (DDIM; Euler's method for VE and flow matching), as a scheduler.

    It has what `Teacher` uses of a diffusers scheduler: `Teacher(denoiser, lambda:
    KernelSolver(denoiser), 100)`.

    Args:
        denoiser: Whose schedule and prediction type to step with.
        grid: `"uniform"`, `"karras"`, or the times themselves, of which the number of steps must
            then be that of the teacher.

    Attributes:
        config: What the steps depend on, by name.
        timesteps: Times at which the network is asked, falling; after `set_timesteps`.
    """

    def __init__(self, denoiser: Denoiser, grid: str | Sequence[float] = "uniform") -> None:
        self.schedule = denoiser.schedule
        self.prediction_type = denoiser.prediction_type
        self.grid = grid
        self.config: dict[str, Any] = {
            "num_train_timesteps": self.schedule.num_train_timesteps,
            "prediction_type": self.prediction_type,
            "grid": grid if isinstance(grid, str) else [float(t) for t in grid],
        }

    def set_timesteps(self, num_steps: int, device: str | torch.device = "cpu") -> None:
        """Choose the times of `num_steps` steps."""
        grid = schedules.make_grid(self.grid, self.schedule, num_steps, others=())
        self.timesteps = grid[:-1].to(device)
        self._next = dict(itertools.pairwise(grid.tolist()))

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> SimpleNamespace:
        """The step from `t` to the next time, as `prev_sample`; arguments as diffusers' own."""
        schedule, rows = self.schedule, torch.ones(len(x_t), device=x_t.device)
        now, then = rows * float(t), rows * self._next[float(t)]
        alpha, sigma = expand(schedule.alpha(now), x_t), expand(schedule.sigma(now), x_t)
        x0_pred = to_x0(prediction, x_t, alpha, sigma, self.prediction_type)
        return SimpleNamespace(prev_sample=transition.step(schedule, x_t, x0_pred, now, then).mean)
