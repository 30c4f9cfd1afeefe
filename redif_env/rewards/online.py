"""Rewards that change while the student trains, and finding them in a sum."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .base import Reward, WeightedSum


class OnlineReward(Reward):
    """A reward that is trained, or remembers, beside the policy.

    It changes in `update` alone, never while scoring: within an iteration the same sample gets the
    same reward. `agents.online.UpdateReward` calls `update` after every rollout.
    """

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
        """All that `update` changes: tensors on the host, numbers and text, in dicts and lists.

        Plain ones, not of numpy: checkpoints hold no pickles. It is called before the first
        `update`, too.
        """

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


def frozen(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode without gradients: training the original on does not move it."""
    return copy.deepcopy(module).eval().requires_grad_(False)
