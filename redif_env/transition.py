r"""The transition kernel: one Gaussian step from time t to time s < t, for per-row times.

For any schedule (Song et al. 2021, eq. 12 and 16, written in alpha and sigma):

.. math::
    \mathrm{std}_{max} &= \frac{\sigma_s}{\sigma_t}
        \sqrt{\sigma_t^2 - (\alpha_t / \alpha_s)^2 \sigma_s^2},
        \qquad \mathrm{std} = \eta\,\mathrm{std}_{max} \\
    \mathrm{mean} &= \alpha_s \hat x_0 + \sqrt{\sigma_s^2 - \mathrm{std}^2}\,\hat\epsilon

VP schedules give DDIM(eta) and, at eta = 1, DDPM; VE schedules give EDM's ancestral step.

With the step before, a step is of second order: DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095,
algorithm 2) is this kernel with an extrapolated prediction in the place of :math:`\hat x_0`,

.. math::
    \hat x_0 + c\,(\hat x_0 - \hat x_0^{before}), \qquad
    c = \frac{\lambda_s - \lambda_t}{2\,(\lambda_t - \lambda_{before})}, \qquad
    \lambda = \log \frac{\alpha}{\sigma}

where c is 0 in the first step, which has none before it, and in the last, to the data.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import check_choice
from .noise import NoiseSchedule, expand, from_x0

EXPLORATION_MEANS = ("ode", "sde")
GAUSSIAN, RADEMACHER = "gaussian", "rademacher"
NOISES = (GAUSSIAN, RADEMACHER)
LATENT, PREDICTION = "latent", "prediction"
EXPLORATION_UNITS = (LATENT, PREDICTION)
LEAST_GAIN = 1e-2  # float32 still has digits for noise of a hundredth of min_std


class Past(NamedTuple):
    """The step before, of which steps of second order make use.

    Attributes:
        x0_pred: What was predicted in it, float32 `(N, ...)`; any numbers where there was none.
        t: The times it started at, float `(N,)`; where there was none, those of the step itself.
    """

    x0_pred: Tensor
    t: Tensor


class Gaussian(NamedTuple):
    """An isotropic Gaussian a row.

    Attributes:
        mean: float32 `(N, ...)`.
        std: float32 `(N, 1, ..., 1)`, broadcastable over `mean`; 0 where the step is deterministic.
    """

    mean: Tensor
    std: Tensor


def step(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x0_pred: Tensor,
    t: Tensor,
    s: Tensor,
    eta: float = 0.0,
    past: Past | None = None,
) -> Gaussian:
    """The kernel's mean and standard deviation.

    Args:
        schedule: Noise schedule of the model.
        x_t: Noisy latents, float `(N, ...)`.
        x0_pred: The network's estimate of the data, `(N, ...)`.
        t: Current times, float `(N,)`, in (0, T].
        s: Target times, float `(N,)`, `0 <= s < t`. At `s = 0` the std is 0 and the mean `x0_pred`.
        eta: Noise factor in [0, 1]; 0 is deterministic: DDIM, or DPM-Solver++ 2M.
        past: The step before, for a step of second order; None: of first order.
    """
    scales = _scales(schedule, x_t, t, s)
    std = eta * _max_std(*scales)
    x0_pred = _extrapolated(schedule, x0_pred, t, s, past)
    return Gaussian(_mean(x_t, x0_pred, scales, std), std)


def x0_of_step(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x_s: Tensor,
    t: Tensor,
    s: Tensor,
    past: Past | None = None,
) -> Tensor:
    r"""The `x0_pred` whose deterministic step from `x_t` ends in `x_s`: the inverse of `step`.

    .. math:: (x_s - r x_t) / (\alpha_s - r \alpha_t), \qquad r = \sigma_s / \sigma_t

    (Salimans and Ho 2022, algorithm 2 and appendix G.) A step of second order is solved for the
    prediction that it extrapolates.

    Args:
        schedule, x_t, t, s, past: as for `step`.
        x_s: Where the step ends, `(N, ...)`.
    """
    alpha_t, sigma_t, alpha_s, sigma_s = _scales(schedule, x_t, t, s)
    ratio = sigma_s / sigma_t
    stepped = (x_s - ratio * x_t) / (alpha_s - ratio * alpha_t)
    if past is None:
        return stepped
    share = expand(_extrapolation(schedule, t, s, past), x_t)
    return (stepped + share * past.x0_pred) / (1 + share)


def exploration(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x0_pred: Tensor,
    t: Tensor,
    s: Tensor,
    eta: float,
    min_std: float,
    mean: str = "ode",
    unit: str = LATENT,
    past: Past | None = None,
) -> Gaussian:
    """The distribution that a policy explores with: the kernel with its std floored at `min_std`.

    The floor makes the log-prob exist where the kernel is deterministic. It never enters the
    square root of the mean, which would no longer be real where `min_std > sigma_s`.

    Args:
        schedule, x_t, x0_pred, t, s, eta: as for `step`.
        min_std: Smallest standard deviation, in units of `unit`.
        mean: `"ode"` trains the mean that is deployed (eta = 0); `"sde"` keeps the noise level of
            `x_s` right when eta is large.
        unit: `"latent"`: of `x_s`, the same in all steps; `"prediction"`: of `x0_pred`, of which
            `x_s` gets the share that `_gain` says. Early steps change little of `x_s`, but the rest
            of the trajectory enlarges what they change: noise of the same size there would be
            far wider in the final sample. Of steps of second order: of the extrapolated prediction.
        past: as for `step`.
    """
    check_choice("mean", mean, EXPLORATION_MEANS)
    check_choice("unit", unit, EXPLORATION_UNITS)
    scales = _scales(schedule, x_t, t, s)
    std = eta * _max_std(*scales)
    x0_pred = _extrapolated(schedule, x0_pred, t, s, past)
    inner = std if mean == "sde" else torch.zeros_like(std)
    least = min_std * _gain(*scales) if unit == PREDICTION else torch.full_like(std, min_std)
    return Gaussian(_mean(x_t, x0_pred, scales, inner), torch.maximum(std, least))


def _scales(schedule: NoiseSchedule, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, ...]:
    """alpha_t, sigma_t, alpha_s, sigma_s, each broadcastable over `x`."""
    return (
        expand(schedule.alpha(t), x),
        expand(schedule.sigma(t), x),
        expand(schedule.alpha(s), x),
        expand(schedule.sigma(s), x),
    )


def _extrapolated(
    schedule: NoiseSchedule, x0_pred: Tensor, t: Tensor, s: Tensor, past: Past | None
) -> Tensor:
    if past is None:
        return x0_pred
    return x0_pred + expand(_extrapolation(schedule, t, s, past), x0_pred) * (
        x0_pred - past.x0_pred
    )


def _extrapolation(schedule: NoiseSchedule, t: Tensor, s: Tensor, past: Past) -> Tensor:
    """The share c of the change since the step before, `(N,)`; 0 in the first and last step."""
    before, now, then = (
        schedule.alpha(time).log() - schedule.sigma(time).log() for time in (past.t, t, s)
    )
    share = (then - now) / (2 * (now - before))
    return torch.where((past.t > t) & (s > 0), share, 0.0)


def _max_std(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    kept = (sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2).clamp_min(0)
    return sigma_s / sigma_t * kept.sqrt()


def _gain(alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
    """What the deterministic step makes of a change of `x0_pred`: the derivative of `x_s` by it."""
    return (alpha_s - sigma_s * alpha_t / sigma_t).clamp_min(LEAST_GAIN)


def _mean(x_t: Tensor, x0_pred: Tensor, scales: tuple[Tensor, ...], std: Tensor) -> Tensor:
    alpha_t, sigma_t, alpha_s, sigma_s = scales
    eps_pred = from_x0(x0_pred, x_t, alpha_t, sigma_t, "epsilon")
    return alpha_s * x0_pred + (sigma_s**2 - std**2).clamp_min(0).sqrt() * eps_pred


def unit_noise(like: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    r"""Noise of mean 0 and covariance 1, of the shape, dtype and device of `like`.

    Rademacher's is 1 or -1 in each element. A policy that explores with it estimates the gradient
    of a reward r by :math:`\epsilon\,r(\mu + \sigma\epsilon)` like one that explores with Gaussian
    noise: where r is quadratic within the noise's reach the expectations agree, since they depend
    on the covariance alone, and else it is the gradient of another smoothing of r. The estimate of
    an element loses the factor :math:`\epsilon_j^2` of random size; what remains of its variance
    comes from the other elements. It is the best choice for such estimates (Spall 1992, IEEE TAC
    37(3); Sadegh and Spall 1998, IEEE TAC 43(10)).

    Args:
        like: A tensor.
        kind: One of `NOISES`.
        generator: Source of randomness; default: torch's.
    """
    noise = torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return torch.ones_like(noise).copysign(noise) if kind == RADEMACHER else noise


def sample(
    gaussian: Gaussian, generator: torch.Generator | None = None, noise: str = GAUSSIAN
) -> Tensor:
    """Draw `x_s`, `(N, ...)`, from the kernel; `noise` as in `unit_noise`."""
    mean, std = gaussian
    return mean + std * unit_noise(mean, noise, generator)


def log_prob_map(x_s: Tensor, gaussian: Gaussian) -> Tensor:
    """Log-density of each element of `x_s`, `(N, ...)`; a row's sum is its log-prob."""
    mean, std = gaussian
    return -((x_s - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


def log_ratio_map(x_s: Tensor, mean: Tensor, old: Gaussian, std: Tensor | None = None) -> Tensor:
    r"""Log of the density ratio new / old of each element of `x_s`, `(N, ...)`, in float32.

    Computed from the difference of the means, which keeps digits that the difference of two
    log-probs loses. With the old std:

    .. math:: (\mu - \mu_{old}) (2 x_s - \mu - \mu_{old}) / (2\,\mathrm{std}^2)

    Args:
        x_s: What was sampled from `old`, `(N, ...)`.
        mean: Mean of the new Gaussian, `(N, ...)`.
        old: The Gaussian that `x_s` was drawn from.
        std: The new Gaussian's std, like `old.std`; None: the same.
    """
    old_mean, old_std = old.mean.float(), old.std.float()
    new_std = old_std if std is None else std.float()
    change = (mean.float() - old_mean) * (2 * x_s - mean.float() - old_mean) / (2 * new_std**2)
    if std is None:
        return change
    noise = (x_s - old_mean) / old_std
    widening = new_std / old_std
    return change + noise**2 / 2 * (1 - widening**-2) - widening.log()
