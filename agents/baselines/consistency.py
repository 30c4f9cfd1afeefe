"""Multistep consistency distillation (Heek et al. 2024, arXiv 2403.06807; Song et al. 2023).

The grid cuts time into segments. Within one, the student is to end at the same state of the
segment's end from wherever it starts on a trajectory of the teacher: what it predicts at t must
agree with what it predicts, without gradient, one small step of the teacher later. With one
segment this is Song et al.'s consistency distillation. Inputs are the teacher's answers, diffused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redif_env import transition
from redif_env.noise import expand

from .base import FORWARD_AND_BACKWARD, Method, Run, refinements, row_means, snr_weight


class Consistency(Method):
    """Truncated-SNR weighted error to the `x_0` that leads to where the student goes from x_s.

    Small steps are those of the finest refinement of the grid, at least as many as the teacher's or
    as many as there are times.
    """

    name = "consistency"
    solver_orders = (1,)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        num_steps = len(run.grid) - 1
        self.fine = refinements(run.grid, run.schedule, run.teacher.num_steps)[-1]
        self.ends = run.grid[1:].repeat_interleave((len(self.fine) - 1) // num_steps)

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        fine, ends = self.fine.to(tasks.x_T), self.ends.to(tasks.x_T)
        index = run.randint(len(ends), len(rows))
        t, s, end = fine[index], fine[index + 1], ends[index]
        x_t = run.states(tasks, t)
        with torch.no_grad():
            x_end = self._follow(x_t, t, s, end, tasks.condition)
        target = transition.x0_of_step(run.schedule, x_t, x_end, t, end)
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            x0_pred = run.student(x_t, t, tasks.condition)
        return row_means(snr_weight(run.schedule, x_t, t) * (x0_pred - target).square())

    def _follow(
        self, x_t: Tensor, t: Tensor, s: Tensor, end: Tensor, condition: Tensor | None
    ) -> Tensor:
        """The teacher's small step to s, and from there the student's to the segment's end."""
        run, teacher = self.run, self.run.teacher.denoiser
        t = run.of_teacher(t)
        with run.ledger.count("targets", teacher):
            x_s = transition.step(run.schedule, x_t, teacher(x_t, t, condition), t, s).mean
        with run.ledger.count("rollout", run.student):
            x0_pred = run.student(x_s, s, condition)
        there = transition.step(run.schedule, x_s, x0_pred, s, end).mean
        return torch.where(expand(s > end, x_s), there, x_s)
