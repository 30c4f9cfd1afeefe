"""Progressive distillation (Salimans and Ho 2022): halve the number of steps, again and again.

Each phase teaches a student to do in one step what the last phase's student does in two; the first
phase's teacher is the teacher. Inputs are the teacher's answers, diffused, in the place of data.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from redif_env import transition
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError

from .base import FORWARD_AND_BACKWARD, Method, Run, refinements, row_means, snr_weight


class Progressive(Method):
    """Truncated-SNR weighted error to the `x_0` whose step equals two of the teacher's.

    Phases are equally long, and go from the finest refinement of the grid (at least as many steps
    as the teacher's, or as many as there are times) down to the grid. In each the learning rate
    falls to 0, as in the paper; a phase starts from the moving average of the one before, which is
    its teacher.
    """

    name = "progressive"
    solver_orders = (1,)

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        num_steps = max(run.teacher.num_steps, 2 * (len(run.grid) - 1))
        self.grids = refinements(run.grid, run.schedule, num_steps)[::-1]
        self.num_phases = len(self.grids) - 1
        if self.num_phases == 0:
            raise InvalidArgumentError(
                "grid", run.grid.tolist(), "pass times with others between them to start from."
            )
        self.phase = 0
        self.teacher: Denoiser = run.teacher.denoiser

    def decay(self, progress: float) -> float:
        return 1 - progress * self.num_phases % 1

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        self._enter(int(run.progress * self.num_phases))
        fine = self.grids[self.phase].to(tasks.x_T)
        index = 2 * run.randint((len(fine) - 1) // 2, len(rows))
        t, middle, s = (fine[index + k] for k in (0, 1, 2))
        x_t = run.states(tasks, t)
        with torch.no_grad(), run.ledger.count("targets", self.teacher):
            first = t if self.phase else run.of_teacher(t)  # later teachers are students
            x_m = self._teach(x_t, first, middle, tasks.condition)
            x_s = self._teach(x_m, middle, s, tasks.condition)
        target = transition.x0_of_step(run.schedule, x_t, x_s, t, s)
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            x0_pred = run.student(x_t, t, tasks.condition)
        return row_means(snr_weight(run.schedule, x_t, t) * (x0_pred - target).square())

    def _teach(self, x_t: Tensor, t: Tensor, s: Tensor, condition: Tensor | None) -> Tensor:
        return transition.step(self.run.schedule, x_t, self.teacher(x_t, t, condition), t, s).mean

    def _enter(self, phase: int) -> None:
        """Make the averaged student the teacher, and go on from there, where a phase begins."""
        if phase == self.phase:
            return
        self.phase = phase
        run = self.run
        run.student.load_state_dict(run.average.state_dict())
        self.teacher = copy.deepcopy(run.average)
