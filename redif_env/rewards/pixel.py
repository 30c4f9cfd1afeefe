"""Rewards that compare samples element by element."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidArgumentError, check_integer, check_number
from .base import MapReward, Reward, nan_where_nan, register_reward

# Exponents of the scales, fine to coarse: Wang et al. 2003, section 3.2.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


class MSE(MapReward):
    """Minus the squared error; in [-4, 0] for samples in [-1, 1]. Map: of each element."""

    differentiable = True

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return -((x_0 - teacher_x_0) ** 2)


class PSNR(Reward):
    """Peak signal-to-noise ratio in decibels, `10 log10(range^2 / MSE)`; about 106 for a copy.

    Args:
        data_range: Largest minus smallest possible value: 2 for samples in [-1, 1].
    """

    differentiable = True

    def __init__(self, data_range: float = 2.0) -> None:
        self.data_range = check_number("data_range", data_range, minimum=1e-12)

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        error = (x_0 - teacher_x_0).square().flatten(1).mean(1)
        # The floor caps the score of a perfect copy, which would otherwise be infinite.
        return 20 * math.log10(self.data_range) - 10 * error.clamp_min(1e-10).log10()


class SSIM(MapReward):
    """Structural similarity (Wang et al. 2004, eq. 13), by torchmetrics. Map: local similarity.

    Args:
        data_range: Largest minus smallest possible value: 2 for samples in [-1, 1].
        sigma: Width of the Gaussian window, in elements; images must be larger than 3.5 sigma.
    """

    differentiable = True

    def __init__(self, data_range: float = 2.0, sigma: float = 1.5) -> None:
        self.data_range = check_number("data_range", data_range, minimum=1e-12)
        self.sigma = check_number("sigma", sigma, minimum=1e-3)

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        _check_window(x_0, self.sigma)
        _, full = _similarity(x_0, teacher_x_0, self.data_range, self.sigma, return_full_image=True)
        return full


class MultiScaleSSIM(Reward):
    """Structural similarity at several resolutions (Wang et al. 2003, eq. 7).

    Contrast and structure of each of at most five scales, each half as fine as the one before, and
    the luminance of the last. Fewer scales where images are small, with the published exponents of
    those, divided by their sum: three at 32x32, and at 8x8 only one, which is `SSIM`. A scale whose
    contrasts are opposed makes the whole 0, which no small change moves: use it beside `MSE`.

    Args:
        data_range: Largest minus smallest possible value: 2 for samples in [-1, 1].
        sigma: Width of the Gaussian window, in elements; images must be larger than 3.5 sigma.
    """

    name = "ms_ssim"
    differentiable = True

    def __init__(self, data_range: float = 2.0, sigma: float = 1.5) -> None:
        self.data_range = check_number("data_range", data_range, minimum=1e-12)
        self.sigma = check_number("sigma", sigma, minimum=1e-3)

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        _check_window(x_0, self.sigma)
        weights = SCALE_WEIGHTS[: self.num_scales(min(x_0.shape[2:]))]
        scale = self.data_range, self.sigma
        parts = []
        for _ in weights[:-1]:
            _, contrast = _similarity(x_0, teacher_x_0, *scale, return_contrast_sensitivity=True)
            parts.append(contrast)
            x_0, teacher_x_0 = F.avg_pool2d(x_0, 2), F.avg_pool2d(teacher_x_0, 2)
        parts.append(_similarity(x_0, teacher_x_0, *scale))
        powers = [
            _power(part, weight / sum(weights)) for part, weight in zip(parts, weights, strict=True)
        ]
        return torch.stack(powers).prod(0)

    def num_scales(self, size: int) -> int:
        """Scales of an image whose shorter side is `size`: every window must lie inside."""
        radius, scales = _radius(self.sigma), 1
        while scales < len(SCALE_WEIGHTS) and size > 2 * radius and size // 2 > radius:
            scales, size = scales + 1, size // 2
        return scales


def _power(base: Tensor, exponent: float) -> Tensor:
    """`max(base, 0) ** exponent`, whose gradient at 0 and below is 0 rather than NaN."""
    return torch.where(base > 0, base.clamp_min(1e-12) ** exponent, 0.0 * base)


def _radius(sigma: float) -> int:
    """Of torchmetrics' Gaussian window."""
    return int(3.5 * sigma + 0.5)


def _check_window(x_0: Tensor, sigma: float) -> None:
    if x_0.ndim != 4 or min(x_0.shape[2:]) <= _radius(sigma):
        raise InvalidArgumentError(
            "sigma", sigma, f"choose a smaller window for samples of {tuple(x_0.shape)}."
        )


def _similarity(
    x_0: Tensor, teacher_x_0: Tensor, data_range: float, sigma: float, **options: bool
) -> Any:
    """Torchmetrics' SSIM of each row `(N,)`; with an option, a pair of that and another tensor."""
    # Imported here: torchmetrics takes a second, and most runs do not need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(
        x_0, teacher_x_0, sigma=sigma, data_range=data_range, reduction="none", **options
    )


class Cosine(Reward):
    """Cosine of the angle between the flattened samples, in [-1, 1]."""

    differentiable = True

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return F.cosine_similarity(x_0.flatten(1), teacher_x_0.flatten(1))


class HistogramKL(Reward):
    r"""Minus the divergence of the student's histogram of values from the teacher's.

    :math:`-\sum_b p_b \log(p_b / q_b)`, in nats, with the teacher's shares p and the student's q of
    equal bins over [-1, 1], averaged over channels; 0 for equal histograms. Values beyond count in
    the first and last bin. Each bin starts with half a count (Jeffreys' prior), which keeps empty
    bins finite. It sees which values there are, not where, and has no gradient.

    Args:
        bins: Number of bins.
    """

    name = "histogram_kl"

    def __init__(self, bins: int = 32) -> None:
        self.bins = check_integer("bins", bins, 2)

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        q, p = self._shares(x_0), self._shares(teacher_x_0)
        divergence = (p * (p / q).log()).sum(2).mean(1)
        return nan_where_nan(-divergence, x_0)

    def _shares(self, x: Tensor) -> Tensor:
        """Share of each bin in each channel, `(N, C, bins)`."""
        values = x.detach().float().flatten(2) if x.ndim > 2 else x.detach().float().unsqueeze(1)
        index = ((values.nan_to_num(0.0).clamp(-1, 1) + 1) * (self.bins / 2)).long()
        counts = values.new_full((*values.shape[:2], self.bins), 0.5)
        counts = counts.scatter_add(2, index.clamp_max(self.bins - 1), torch.ones_like(values))
        return counts / counts.sum(2, keepdim=True)


for _kind in (MSE, PSNR, SSIM, Cosine):
    register_reward(_kind.__name__.lower(), _kind)
register_reward(MultiScaleSSIM.name, MultiScaleSSIM)
register_reward(HistogramKL.name, HistogramKL)
