"""The kernel's Gaussian as a Stable-Baselines3 distribution over flattened latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.distributions import Distribution
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from redif_env import transition
from redif_env.noise import NoiseSchedule, expand
from redif_env.transition import Gaussian, Past

from .choices import Choice


class StepScale(nn.Module):
    """A learned factor of each step's std.

    The factor is `std_range ** tanh(weight)`: smooth, 1 at the start, and bounded on both sides, so
    that exploration neither dies nor explodes.

    Args:
        num_steps: Steps of the grid.
        std_range: Largest factor, and the inverse of the smallest; > 1.
    """

    def __init__(self, num_steps: int, std_range: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_steps))
        self.log_range = math.log(std_range)

    def forward(self, step_index: Tensor) -> Tensor:
        """Factors, float32 `(N,)`, of steps int64 `(N,)`."""
        return (self.log_range * self.weight.tanh()).exp()[step_index]


class KernelDistribution(Distribution):
    """Distribution of the next latent `x_s`.

    Args:
        schedule: Noise schedule.
        eta: Noise factor of the kernel while exploring.
        min_std: Smallest std while exploring, in units of `unit`.
        mean: `"ode"` or `"sde"`, see `transition.exploration`.
        noise: `"gaussian"` or `"rademacher"`, see `transition.unit_noise`. Densities are the
            Gaussian's with either.
        unit: Of `min_std`: `"latent"` or `"prediction"`, see `transition.exploration`.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        eta: float,
        min_std: float,
        mean: str,
        noise: str = transition.GAUSSIAN,
        unit: str = transition.LATENT,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.eta = eta
        self.min_std = min_std
        self.mean = mean
        self.noise = noise
        self.unit = unit
        self.gaussian: Gaussian

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not used: the student network gives the parameters."""
        return nn.Identity()

    def proba_distribution(
        self,
        x_t: Tensor,
        x0_pred: Tensor,
        t: Tensor,
        s: Tensor,
        scale: Tensor | None = None,
        past: Past | None = None,
    ) -> KernelDistribution:
        """Set the parameters.

        Args:
            x_t, x0_pred: Latents and prediction, `(N, *latent_shape)`.
            t, s: Times, `(N,)`.
            scale: Factors of the std, `(N,)`; None: 1.
            past: The step before, see `transition.step`.
        """
        self._inputs, self._past = (x_t, x0_pred, t, s), past
        self.gaussian = transition.exploration(
            self.schedule, x_t, x0_pred, t, s, self.eta, self.min_std, self.mean, self.unit, past
        )
        if scale is not None:
            mean, std = self.gaussian
            self.gaussian = Gaussian(mean, std * expand(scale, std))
        return self

    @property
    def distribution(self) -> torch.distributions.Distribution:  # type: ignore[override]
        """The same in torch, over actions `(N, D)`: sb3-contrib's TRPO takes its KL from this."""
        mean, std = self.gaussian
        return Independent(Normal(mean.flatten(1), std.flatten(1)), 1)

    def log_prob_map(self, actions: Tensor) -> Tensor:
        """Log-density of each element, `(N, D)`, of actions `(N, D)`."""
        x_s = actions.reshape(self.gaussian.mean.shape)
        return transition.log_prob_map(x_s, self.gaussian).flatten(1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Joint log-density, `(N,)`."""
        return self.log_prob_map(actions).sum(1)

    def entropy(self) -> Tensor:
        """Differential entropy, `(N,)`."""
        dim = self.gaussian.mean[0].numel()
        return dim * (self.gaussian.std.flatten().log() + 0.5 * (1 + math.log(2 * math.pi)))

    def sample(self) -> Tensor:
        """Explore: actions `(N, D)`."""
        return transition.sample(self.gaussian, noise=self.noise).flatten(1)

    def sample_antithetic(self) -> Tensor:
        """Explore in pairs: rows 2i and 2i + 1 get opposite noise. Actions `(N, D)`, N even."""
        mean, std = self.gaussian
        half = transition.unit_noise(mean[::2], self.noise)
        noise = torch.stack([half, -half], 1).flatten(0, 1)
        return (mean + std * noise).flatten(1)

    def mode(self) -> Tensor:
        """The deployed step, `(N, D)`: eta = 0 and no floor, whatever the exploration."""
        return transition.step(self.schedule, *self._inputs, past=self._past).mean.flatten(1)

    def actions_from_params(self, *args: Any, deterministic: bool = False) -> Tensor:
        return self.proba_distribution(*args).get_actions(deterministic=deterministic)

    def log_prob_from_params(self, *args: Any) -> tuple[Tensor, Tensor]:
        actions = self.actions_from_params(*args)
        return actions, self.log_prob(actions)


class JointDistribution(Distribution):
    """A choice of the next time, and the next latent given that time.

    Args:
        choice: Over the time, for N rows.
        step: From choices `(N,)` to the distribution of the next latent.
    """

    def __init__(self, choice: Choice, step: Callable[[Tensor], KernelDistribution]) -> None:
        super().__init__()
        self.choice = choice
        self.step = step

    def proba_distribution_net(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Not used: the student and the schedule head give the parameters."""
        return nn.Identity()

    def proba_distribution(self, *args: Any, **kwargs: Any) -> JointDistribution:
        """Nothing is left to set."""
        return self

    def log_prob(self, actions: Tensor) -> Tensor:
        """Joint log-density, `(N,)`, of actions `(N, D + 1)`."""
        choice = actions[:, -1]
        return self.choice.log_prob(choice) + self.step(choice).log_prob(actions[:, :-1])

    def entropy(self) -> Tensor:
        """Entropy of the choice, and of the next latent at the most likely time, `(N,)`."""
        return self.choice.entropy() + self.step(self.choice.mode()).entropy()

    def sample(self) -> Tensor:
        """Explore: actions `(N, D + 1)`."""
        choice = self.choice.sample()
        return joined(self.step(choice).sample(), choice)

    def mode(self) -> Tensor:
        """The deployed step to the most likely time, `(N, D + 1)`."""
        choice = self.choice.mode()
        return joined(self.step(choice).mode(), choice)

    def actions_from_params(self, *args: Any, deterministic: bool = False) -> Tensor:
        return self.get_actions(deterministic=deterministic)

    def log_prob_from_params(self, *args: Any) -> tuple[Tensor, Tensor]:
        actions = self.sample()
        return actions, self.log_prob(actions)


def joined(step: Tensor, choice: Tensor) -> Tensor:
    """Actions `(N, D + 1)` from step outputs `(N, D)` and choices `(N,)`."""
    return torch.cat([step, choice.unsqueeze(1)], 1)
