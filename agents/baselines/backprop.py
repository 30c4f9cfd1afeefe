"""Back-propagation through the sampler: the control that may differentiate the reward.

What DRaFT (Clark et al. 2024) does with a reward model, here with the reward of the student: the
gradient of the reward flows through every step of the deterministic sampler into the weights.
"""

from __future__ import annotations

from torch import Tensor

from redif_env import rewards, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import Reward, make_reward

from .base import FORWARD_AND_BACKWARD, Method, Run


class Backprop(Method):
    """Maximise a differentiable reward of the final sample by gradient ascent.

    Args:
        run: The run.
        reward: Must be `differentiable`.

    Raises:
        InvalidArgumentError: for a reward that is not differentiable.
    """

    name = "backprop"

    def __init__(self, run: Run, reward: str | Reward = "mse") -> None:
        super().__init__(run)
        self.reward = make_reward(reward)
        self.check_reward(self.reward)
        self.is_error = self.reward.name == "mse"

    @classmethod
    def check_reward(cls, reward: Reward) -> None:
        """Refuse one without a gradient."""
        if not reward.differentiable:
            raise InvalidArgumentError(
                "reward",
                reward.name,
                "pass one with differentiable = True: no gradient leads through this one.",
            )

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            x_0 = schedules.sample(run.student, tasks.x_T, tasks.condition, run.grid)
        values, _ = rewards.evaluate(self.reward, x_0, tasks.teacher_x_0, tasks.condition)
        run.ledger.evaluations["reward"] += FORWARD_AND_BACKWARD * self.reward.nfe * len(rows)
        return -values
