r"""A teacher whose data is Gaussian: everything about it has a closed form.

For `x_0 ~ N(m, v I)` the best denoiser is exact (Gaussian conditioning),

.. math:: E[x_0 | x_t] = m + \frac{\alpha_t v}{\alpha_t^2 v + \sigma_t^2} (x_t - \alpha_t m),

and the deterministic DDIM step from t to s is affine:
:math:`x_s - \alpha_s m = f(t, s) (x_t - \alpha_t m)` with
:math:`f = (\alpha_s \alpha_t v + \sigma_s \sigma_t) / (\alpha_t^2 v + \sigma_t^2)`.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from redif_env import Denoiser, Teacher
from redif_env.loading import noise_schedule
from redif_env.noise import NoiseSchedule, expand

MEAN, STD = 0.5, 0.25
SHAPE = (1, 2, 3)
MAKE_SOLVER = functools.partial(
    DDIMScheduler,
    beta_schedule="squaredcos_cap_v2",
    prediction_type="sample",
    timestep_spacing="trailing",
    clip_sample=False,
)


class GaussianNetwork(nn.Module):
    """The exact denoiser of `x_0 ~ N(mean, std^2 I)`; predicts `"sample"`."""

    def __init__(self, schedule: NoiseSchedule, mean: float = MEAN, std: float = STD) -> None:
        super().__init__()
        self.schedule = schedule
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("variance", torch.tensor(std**2))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x_t - alpha * self.mean)


def gaussian_denoiser(schedule: NoiseSchedule | None = None) -> Denoiser:
    schedule = schedule or noise_schedule(MAKE_SOLVER())
    return Denoiser(GaussianNetwork(schedule), schedule, "sample", SHAPE)


def gaussian_teacher(num_steps: int = 10) -> Teacher:
    return Teacher(gaussian_denoiser(), MAKE_SOLVER, num_steps)


def scales(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """Alpha and sigma at `t`, as Python numbers."""
    time = torch.tensor([float(t)])
    return float(schedule.alpha(time)), float(schedule.sigma(time))


def factor(schedule: NoiseSchedule, t: float, s: float, variance: float = STD**2) -> float:
    """f(t, s), see above."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    return (alpha_s * alpha_t * variance + sigma_s * sigma_t) / (alpha_t**2 * variance + sigma_t**2)


def product(schedule: NoiseSchedule, times: list[float]) -> float:
    """The factor of the whole way along `times`."""
    return math.prod(factor(schedule, t, s) for t, s in itertools.pairwise(times))


def exact_factor(schedule: NoiseSchedule, t: float) -> float:
    """The factor of infinitely many steps from `t` to the data: the probability-flow ODE."""
    alpha, sigma = scales(schedule, t)
    return STD / math.sqrt(alpha**2 * STD**2 + sigma**2)
