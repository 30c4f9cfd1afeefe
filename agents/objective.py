"""What an update goes down: PPO's clipped objective, a penalty, a critic's error, an entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import losses
from .divergences import divergence_map
from .minibatch import Evaluation


@dataclasses.dataclass(frozen=True)
class Objective:
    """The loss of a minibatch or of a part of it; losses are means over rows.

    Attributes:
        ratio, divergence, divergence_coef, divergence_alpha, step_weights, ent_coef, vf_coef: As of
            `ReDiFPPO`.
        clip_range, clip_range_vf: As numbers.
    """

    ratio: str
    clip_range: float
    clip_range_vf: float | None
    divergence: str | None
    divergence_coef: float
    divergence_alpha: float
    step_weights: Sequence[float] | None
    ent_coef: float
    vf_coef: float

    def loss(
        self, batch: Any, advantages: Tensor, new: Evaluation
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, a scalar with gradients to `new`, and what to log of it.

        Args:
            batch: A `RolloutBatch` of B transitions.
            advantages: `(B, D)` or `(B, 1)`.
            new: What the policy says of them now.
        """
        policy_loss = losses.surrogate(
            new.log_ratio, advantages, self.clip_range, self._weights(batch)
        )
        loss = policy_loss
        statistics = {
            "policy_gradient_loss": policy_loss.detach(),
            "kl": new.kl.mean(),
            "clip_fraction": losses.clip_fraction(new.log_ratio, self.clip_range).mean(),
            "effective_sample_size": losses.effective_sample_size(new.log_ratio),
            "ratio_error": new.error.mean(),  # its root is taken of all rows, once an update
        }
        if self.divergence is not None:
            penalty = self._penalty(new)
            joint = losses.reduce_log_ratio(penalty, self.ratio).sum(1).mean()
            loss = loss + self.divergence_coef * joint
            statistics["divergence"] = penalty.detach().mean()
        if new.values is not None:
            value_loss = losses.value_loss(
                new.values, batch.old_values, batch.returns, self.clip_range_vf
            )
            loss = loss + self.vf_coef * value_loss
            statistics["value_loss"] = value_loss.detach()
        if new.entropy is not None:
            loss = loss - self.ent_coef * new.entropy.mean()
            statistics["entropy_loss"] = -new.entropy.detach().mean()
        return loss, {**statistics, "loss": loss.detach()}

    def _weights(self, batch: Any) -> Tensor | None:
        """Weight of each transition's loss, `(B,)`; None: 1 each."""
        if self.step_weights is None:
            return None
        step = batch.step_index
        return torch.tensor(self.step_weights, device=step.device)[step]

    def _penalty(self, new: Evaluation) -> Tensor:
        """Divergence from the reference of each element, `(B, D)`, with gradients to `new`."""
        assert self.divergence is not None
        assert new.gaussian is not None
        assert new.reference is not None
        alpha = self.divergence_alpha
        return divergence_map(self.divergence, new.gaussian, new.reference, alpha).flatten(1)
