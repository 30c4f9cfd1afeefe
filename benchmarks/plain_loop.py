"""A plain loop in the style of public PPO-for-diffusion trainers, to compare the library with.

One script's worth of torch: sample with the DDIM(eta) kernel and keep latents and log-probs in
lists (Black et al. 2024, algorithm 1 with importance sampling), whiten rewards over the batch, then
one clipped update on every step, ratios of mean log-probs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass
class PlainLoop:
    """PPO of a v-prediction network against given answers.

    Attributes:
        network: `network(x_t, t, condition)` returns a tensor like `x_t`.
        parameters: What is trained.
        timesteps: The grid, `(T + 1,)`, with the final 0.
        alpha, sigma: Of the grid's times, `(T + 1,)`.
    """

    network: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    parameters: list[Tensor]
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    batch_size: int = 256
    eta: float = 1.0
    min_std: float = 0.02
    clip_range: float = 1e-4
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.learning_rate)

    def iterate(self, x_T: Tensor, condition: Tensor | None, teacher_x_0: Tensor) -> None:
        """One rollout and one pass of updates over it."""
        latents, actions, log_probs = self.rollout(x_T, condition)
        rewards = -(actions[-1] - teacher_x_0).square().flatten(1).mean(1)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-8)
        steps = len(actions)
        x_t, x_s = torch.cat(latents), torch.cat(actions)
        old, advantages = torch.cat(log_probs), advantages.repeat(steps)
        classes = None if condition is None else condition.repeat(steps)
        index = torch.arange(steps, device=x_T.device).repeat_interleave(len(x_T))
        for rows in torch.randperm(len(x_t), device=x_T.device).split(self.batch_size):
            some = None if classes is None else classes[rows]
            mean, std = self.step(x_t[rows], index[rows], some)
            ratio = (log_prob(x_s[rows], mean, std) - old[rows]).exp()
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            loss = -torch.min(ratio * advantages[rows], clipped * advantages[rows]).mean()
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 0.5)
            self.optimizer.step()

    @torch.no_grad()
    def rollout(
        self, x_T: Tensor, condition: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Latents, next latents and log-probs of each step."""
        latents, actions, log_probs = [], [], []
        x_t = x_T
        for step in range(len(self.timesteps) - 1):
            index = torch.full((len(x_t),), step, device=x_t.device)
            mean, std = self.step(x_t, index, condition)
            x_s = mean + std * torch.randn_like(mean)
            latents.append(x_t)
            actions.append(x_s)
            log_probs.append(log_prob(x_s, mean, std))
            x_t = x_s
        return latents, actions, log_probs

    def step(self, x_t: Tensor, index: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and std of the next latent."""
        shape = (-1, *[1] * (x_t.ndim - 1))
        alpha_t, alpha_s = (self.alpha[i].reshape(shape) for i in (index, index + 1))
        sigma_t, sigma_s = (self.sigma[i].reshape(shape) for i in (index, index + 1))
        v_pred = self.network(x_t, self.timesteps[index], condition)
        x0_pred, eps_pred = alpha_t * x_t - sigma_t * v_pred, sigma_t * x_t + alpha_t * v_pred
        most = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp_min(0).sqrt()
        std = self.eta * sigma_s / sigma_t * most
        mean = alpha_s * x0_pred + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps_pred
        return mean, std.clamp_min(self.min_std)


def log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Mean log-density of the elements, `(N,)`."""
    terms = -((x - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
    return terms.flatten(1).mean(1)
