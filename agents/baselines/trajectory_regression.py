"""Trajectory regression: every step of the student ends where the teacher is at that time.

After SFD (Zhou et al. 2024, arXiv 2409.19681): the teacher walks from the same noise through many
times, the student's among them; each of the student's steps starts at the state that its own
sampler reached, and is regressed onto the teacher's state at the step's end. SFD updates after
every step; here one update sees all steps of its trajectories.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from redif_env import schedules, transition

from .base import FORWARD_AND_BACKWARD, Method, Run, row_means


class TrajectoryRegression(Method):
    """Squared error of each step's end to the teacher's state, mean over the steps.

    The teacher steps through evenly spread times, and through the student's, by DDIM or as the
    student does; its states are kept, so that each task is asked for once. The last state is the
    bank's answer.

    Args:
        run: The run.
        teacher_steps: Steps of the teacher; default: its own number. Fewer cost less, and err.
    """

    name = "trajectory_regression"

    def __init__(self, run: Run, teacher_steps: int | None = None) -> None:
        super().__init__(run)
        num_steps = len(run.grid) - 1
        if teacher_steps is None:
            teacher_steps = run.teacher.num_steps
        own = schedules.uniform(run.schedule, teacher_steps)
        times = torch.cat([own, run.grid[1:]]).unique().flip(0)
        # Not beyond the start of the student's last step, whose end is known; nowhere for one step.
        self.times = times[times >= run.grid[-2]] if num_steps > 1 else times[:1]
        self.kept = {t: index for index, t in enumerate(run.grid[1:-1].tolist())}
        self.states = run.bank.x_T.new_zeros(num_steps, *run.bank.x_T.shape)
        self.states[-1] = run.bank.teacher_x_0
        self.known = torch.zeros(len(run.bank), dtype=torch.bool, device=run.device)

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        self._ask_teacher(rows[~self.known[rows]].unique())
        times = run.grid.to(tasks.x_T).unsqueeze(1).expand(-1, len(rows))
        losses, x_t, past = [], tasks.x_T, None
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            for index, (t, s) in enumerate(itertools.pairwise(times)):
                x0_pred = run.student(x_t, t, tasks.condition)
                x_s = transition.step(run.schedule, x_t, x0_pred, t, s, past=past).mean
                past = run.past(x0_pred, t)
                losses.append(row_means((x_s - self.states[index, rows]).square()))
                x_t = x_s.detach()
        return torch.stack(losses)

    @torch.no_grad()
    def _ask_teacher(self, rows: Tensor) -> None:
        """Fill in the states of these rows."""
        run, tasks = self.run, self.run.bank.take(rows)
        if len(rows) == 0:
            return
        denoiser, x_t, past = run.teacher.denoiser, tasks.x_T, None
        times = self.times.to(x_t).unsqueeze(1).expand(-1, len(rows))
        with run.ledger.count("targets", denoiser):
            ends = self.times[1:].tolist()
            for (t, s), end in zip(itertools.pairwise(times), ends, strict=True):
                x0_pred = denoiser(x_t, t, tasks.condition)
                x_t = transition.step(run.schedule, x_t, x0_pred, t, s, past=past).mean
                past = run.past(x0_pred, t)
                if end in self.kept:
                    self.states[self.kept[end], rows] = x_t
        self.known[rows] = True
