"""Rewards that change while the student trains, and finding them in a sum."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .base import Reward, WeightedSum


class OnlineReward(Reward):
    """A reward that is trained, or remembers, beside the policy.

    It changes in `update` alone, never while scoring: within an iteration the same sample gets the
    same reward. `agents.online.UpdateReward` calls `update` after every rollout.

    Attributes:
        over_batch: Whether a row is scored against the other rows of the call. Such a reward needs
            a fixed schedule, where all rows end together: rows under way would count as samples.
    """

    over_batch: bool = False

    @abstractmethod
    def update(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> dict[str, float]:
        """Take in the final samples of a rollout; arguments as when scoring.

        Returns:
            Figures for the log.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that `update` changes, on the host, for `torch.save`."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""


def leaves(reward: Reward) -> list[Reward]:
    """The rewards that a sum is made of, however deep; a reward that is no sum is its own leaf."""
    if not isinstance(reward, WeightedSum):
        return [reward]
    return [leaf for _, term in reward.terms for leaf in leaves(term)]


def online_terms(reward: Reward) -> list[OnlineReward]:
    """The terms of a reward that change while the student trains, each once."""
    found = [leaf for leaf in leaves(reward) if isinstance(leaf, OnlineReward)]
    return list({id(term): term for term in found}.values())


def check_whole_batches(reward: Reward, fixed_schedule: bool) -> None:
    """Refuse a reward over the batch where rows end at different times.

    Raises:
        InvalidArgumentError: for such a reward without a fixed schedule.
    """
    bad = [term.name for term in online_terms(reward) if term.over_batch]
    if bad and not fixed_schedule:
        raise InvalidArgumentError(
            "reward",
            bad[0],
            "it scores a row against the others of the batch, so all must end together: use a "
            "fixed schedule, or give the reward a memory.",
        )


def frozen(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode without gradients: training the original on does not move it."""
    return copy.deepcopy(module).eval().requires_grad_(False)
