r"""A teacher whose data is Gaussian: everything about it has a closed form.

For `x_0 ~ N(m, v I)` the best denoiser is exact (Gaussian conditioning),

.. math:: E[x_0 | x_t] = m + \frac{\alpha_t v}{\alpha_t^2 v + \sigma_t^2} (x_t - \alpha_t m),

and the deterministic DDIM step from t to s is affine:
:math:`x_s - \alpha_s m = f(t, s) (x_t - \alpha_t m)` with
:math:`f = (\alpha_s \alpha_t v + \sigma_s \sigma_t) / (\alpha_t^2 v + \sigma_t^2)`.

Where elements are correlated, the same holds along each principal axis with its own variance.
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
from redif_env.noise import NoiseSchedule

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
    """The exact denoiser of `x_0 ~ N(mean, S)`; predicts `"sample"`.

    Args:
        schedule: Noise schedule.
        mean: Mean of every element.
        variances: Eigenvalues of S, one or `(D,)`.
        axes: Its eigenvectors, the columns of `(D, D)`; default: the elements themselves.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        mean: float = MEAN,
        variances: float | Tensor = STD**2,
        axes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.axes: Tensor | None
        self.mean: Tensor
        self.variances: Tensor
        self.register_buffer("axes", axes)
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("variances", torch.as_tensor(variances))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        gain = alpha * self.variances / (alpha**2 * self.variances + sigma**2)
        centred = x_t.flatten(1) - alpha * self.mean
        if self.axes is None:
            return self.mean + (gain * centred).reshape(x_t.shape)
        return self.mean + (gain * (centred @ self.axes) @ self.axes.T).reshape(x_t.shape)


def gaussian_denoiser(schedule: NoiseSchedule | None = None, **options: Tensor) -> Denoiser:
    schedule = schedule or noise_schedule(MAKE_SOLVER())
    return Denoiser(GaussianNetwork(schedule, **options), schedule, "sample", SHAPE)


def gaussian_teacher(num_steps: int = 10, **options: Tensor) -> Teacher:
    return Teacher(gaussian_denoiser(**options), MAKE_SOLVER, num_steps)


def scales(schedule: NoiseSchedule, t: float) -> tuple[float, float]:
    """Alpha and sigma at `t`, as Python numbers."""
    time = torch.tensor([float(t)])
    return float(schedule.alpha(time)), float(schedule.sigma(time))


def factor(schedule: NoiseSchedule, t: float, s: float, variance: float = STD**2) -> float:
    """f(t, s), see above."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = scales(schedule, t), scales(schedule, s)
    return (alpha_s * alpha_t * variance + sigma_s * sigma_t) / (alpha_t**2 * variance + sigma_t**2)


def product(schedule: NoiseSchedule, times: list[float], variance: float = STD**2) -> float:
    """The factor of the whole way along `times`."""
    return math.prod(factor(schedule, t, s, variance) for t, s in itertools.pairwise(times))


def exact_factor(schedule: NoiseSchedule, t: float) -> float:
    """The factor of infinitely many steps from `t` to the data: the probability-flow ODE."""
    alpha, sigma = scales(schedule, t)
    return STD / math.sqrt(alpha**2 * STD**2 + sigma**2)


def exact_x_0(schedule: NoiseSchedule, x_t: Tensor, t: float) -> Tensor:
    """Where the probability-flow ODE leads from `x_t` at time `t`: the data it came from."""
    return MEAN + exact_factor(schedule, t) * (x_t - scales(schedule, t)[0] * MEAN)
