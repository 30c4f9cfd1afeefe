"""Training rewards beside the policy."""

from __future__ import annotations

from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from redif_env import mdp, parallel
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import online_terms


class UpdateReward(BaseCallback):
    """Update the online terms of the environment's reward after every rollout.

    Each gets the final samples that the environment made last: with a rollout of one episode, all
    of its own, and those of the other processes. The rollout keeps the rewards it was paid, so that
    a rollout and its update see one reward. Logs what each term says of itself as
    `reward/TERM_FIGURE`.

    Raises:
        InvalidArgumentError: at the start of training, if no term of the reward is online.
    """

    def _on_training_start(self) -> None:
        reward = self._process.reward
        self.terms = online_terms(reward)
        if not self.terms:
            raise InvalidArgumentError(
                "reward", reward.name, "nothing in it is trained: leave UpdateReward out."
            )

    def _on_rollout_end(self) -> None:
        state = self.training_env.get_attr("last_state", [0])[0]
        if state is None:
            return
        ended = mdp.terminal(self._process, state)
        condition = None
        if state.condition is not None:
            condition = parallel.gather(state.condition[ended])
        x_0, target = (parallel.gather(rows[ended]) for rows in (state.x_t, state.teacher_x_0))
        for term in self.terms:
            figures = term.update(x_0, target, condition)
            for name, value in figures.items():
                self.logger.record(f"reward/{term.name}_{name}", value)

    def _on_step(self) -> bool:
        return True

    @property
    def _process(self) -> mdp.Process:
        process: Any = self.training_env.get_attr("process", [0])[0]
        return process
