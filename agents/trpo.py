"""BatchedTRPO: sb3-contrib's TRPO for policies with more than a few layers."""

from __future__ import annotations

import torch
from sb3_contrib import TRPO
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class BatchedTRPO(TRPO):
    """TRPO that differentiates with respect to all of the actor's weights at once.

    The updates are those of `TRPO`, which goes backwards twice for each tensor of weights. That
    is slow for a denoiser, fails where weights are frozen, and crashes in torch's GroupNorm after
    attention; see docs/upstream.md. Use `TRPO` itself for policies of Stable-Baselines3's own.

    As there, parameters with `value` in their name are the critic's. `StudentPolicy` needs
    `policy_kwargs={"critic": True}`.
    """

    def _compute_actor_grad(
        self, kl_div: Tensor, policy_objective: Tensor
    ) -> tuple[list[nn.Parameter], Tensor, Tensor, list[tuple[int, ...]]]:
        candidates = [
            weight
            for name, weight in self.policy.named_parameters()
            if "value" not in name and weight.requires_grad
        ]
        kl_grads = torch.autograd.grad(kl_div, candidates, create_graph=True, allow_unused=True)
        used = [(w, g) for w, g in zip(candidates, kl_grads, strict=True) if g is not None]
        weights = [weight for weight, _ in used]
        objective_grads = torch.autograd.grad(policy_objective, weights, retain_graph=True)
        return (
            weights,
            torch.cat([grad.flatten() for grad in objective_grads]),
            torch.cat([grad.flatten() for _, grad in used]),
            [tuple(grad.shape) for _, grad in used],
        )

    def train(self) -> None:
        # The Fisher product differentiates twice; of the attention kernels only this one can.
        with sdpa_kernel(SDPBackend.MATH):
            super().train()
