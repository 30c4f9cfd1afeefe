"""Back-propagation with a learned model of what has no gradient (LaSRO: Jia et al. 2025).

The paper (arXiv 2411.15247) finds policy gradients unfit for students of one or two steps, and
differentiates a network in their place that is trained to predict the reward. Here it is trained
beside the student, on the student's samples and noisy ones around them. The paper's starts from a
large latent diffusion model and learns to rank; this one is small, and learns the reward itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_env import schedules
from redif_env.errors import InvalidArgumentError, check_integer, check_number
from redif_env.rewards import Reward, make_reward
from redif_env.rewards.base import WeightedSum, evaluate, weighted_terms
from redif_env.rewards.discriminator import ProjectionNetwork

from .base import FORWARD_AND_BACKWARD, Method, Run


class Surrogate(Method):
    """Gradient ascent on a reward whose terms without a gradient are modelled.

    Args:
        run: The run.
        reward: A sum with a term that is not differentiable.
        surrogate_updates: Updates of the model before each of the student.
        surrogate_learning_rate: Of the model.
        noise_std: Largest std of the noise around samples that the model is trained on, in latent
            units; each has its own, from 0 on.

    Raises:
        InvalidArgumentError: for a reward that is differentiable: that is `backprop`.
    """

    name = "surrogate"
    is_error = False

    def __init__(
        self,
        run: Run,
        reward: str | Reward = "mse",
        surrogate_updates: int = 1,
        surrogate_learning_rate: float = 1e-3,
        noise_std: float = 0.1,
    ) -> None:
        super().__init__(run)
        reward = make_reward(reward)
        self.check_reward(reward)
        terms = weighted_terms(reward)
        blind = [(weight, term) for weight, term in terms if not term.differentiable]
        seen = [(weight, term) for weight, term in terms if term.differentiable]
        self.blind = WeightedSum(blind)
        self.seen = WeightedSum(seen) if seen else None
        self.updates = check_integer("surrogate_updates", surrogate_updates, 1)
        rate = check_number("surrogate_learning_rate", surrogate_learning_rate)
        self.noise_std = check_number("noise_std", noise_std)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.generator.initial_seed())
            network = ProjectionNetwork(run.student.latent_shape, run.student.num_classes)
        self.network = network.to(run.device)
        self.share = run.share(self.network)
        self.optimizer = torch.optim.Adam(self.network.parameters(), rate)
        self.scale: tuple[Tensor, Tensor] | None = None  # mean and std of the first rewards

    @classmethod
    def check_reward(cls, reward: Reward) -> None:
        """Refuse one that has a gradient."""
        if reward.differentiable:
            raise InvalidArgumentError(
                "reward", reward.name, "nothing in it has to be modelled: use 'backprop'."
            )

    def loss(self, rows: Tensor) -> Tensor:
        run, tasks = self.run, self.run.bank.take(rows)
        with run.ledger.count("update", run.student, FORWARD_AND_BACKWARD):
            x_0 = schedules.sample(run.student, tasks.x_T, tasks.condition, run.grid)
        pair = tasks.teacher_x_0, tasks.condition
        for _ in range(self.updates):
            self._train(x_0.detach(), *pair)
        value = self._predict(x_0, tasks.condition)
        if self.seen is not None:
            value = value + evaluate(self.seen, x_0, *pair)[0]
            asked = FORWARD_AND_BACKWARD * self.seen.nfe * len(rows)
            run.ledger.evaluations["reward"] += asked
        return -value.mean()

    def _train(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> None:
        """One update of the model, on samples with noise around them."""
        run = self.run
        std = self.noise_std * torch.rand(len(x_0), generator=run.generator)
        noise = torch.randn(x_0.shape, generator=run.generator)
        noisy = x_0 + (std.view(-1, *[1] * (x_0.ndim - 1)) * noise).to(x_0)
        values, _ = evaluate(self.blind, noisy, teacher_x_0, condition)
        run.ledger.evaluations["reward"] += self.blind.nfe * len(x_0)
        if self.scale is None:
            self.scale = values.mean(), values.std().clamp_min(1e-12)
        loss = F.mse_loss(self._predict(noisy, condition), values) / self.scale[1].square()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        run.ledger.updates["surrogate"] += 1

    def _predict(self, x_0: Tensor, condition: Tensor | None) -> Tensor:
        """What the model takes the blind terms for, `(N,)`; on the ledger with its gradient."""
        assert self.scale is not None
        asked = math.ceil(FORWARD_AND_BACKWARD * len(x_0) * self.share)
        self.run.ledger.evaluations["surrogate"] += asked
        mean, std = self.scale
        classes = None if self.network.embedding is None else condition
        return mean + std * self.network(x_0, classes)
