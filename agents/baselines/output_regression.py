"""Output regression: every step of the student predicts the teacher's answer.

Knowledge distillation (Luhman and Luhman 2021) regresses a single step from noise onto the
teacher's answer to the same noise. With more steps the same is asked of each, at the states that
the student's own sampler visits; no gradient flows from a step to the one before.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from redif_env import transition

from .base import FORWARD_AND_BACKWARD, Method, row_means


class OutputRegression(Method):
    """Squared error of each step's `x0_pred` to the teacher's answer, mean over the steps."""

    name = "output_regression"

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        times = run.grid.to(tasks.x_T).unsqueeze(1).expand(-1, len(rows))
        losses, x_t, past = [], tasks.x_T, None
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            for t, s in itertools.pairwise(times):
                x0_pred = run.student(x_t, t, tasks.condition)
                losses.append(row_means((x0_pred - tasks.teacher_x_0).square()))
                x_t = transition.step(run.schedule, x_t, x0_pred.detach(), t, s, past=past).mean
                past = run.past(x0_pred, t)
        return torch.stack(losses)
