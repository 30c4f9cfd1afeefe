"""Rewards that compare samples element by element."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from ..errors import InvalidArgumentError, check_number
from .base import MapReward, Reward, register_reward


class MSE(MapReward):
    """Minus the squared error; in [-4, 0] for samples in [-1, 1]. Map: of each element."""

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return -((x_0 - teacher_x_0) ** 2)


class PSNR(Reward):
    """Peak signal-to-noise ratio in decibels, `10 log10(range^2 / MSE)`.

    Args:
        data_range: Largest minus smallest possible value: 2 for samples in [-1, 1].
    """

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

    def __init__(self, data_range: float = 2.0, sigma: float = 1.5) -> None:
        self.data_range = check_number("data_range", data_range, minimum=1e-12)
        self.sigma = check_number("sigma", sigma, minimum=1e-3)

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        # Imported here: torchmetrics takes a second, and most runs do not need it.
        from torchmetrics.functional.image import structural_similarity_index_measure

        if x_0.ndim != 4 or min(x_0.shape[2:]) <= int(3.5 * self.sigma + 0.5):
            raise InvalidArgumentError(
                "sigma", self.sigma, f"choose a smaller window for samples of {tuple(x_0.shape)}."
            )
        _, full = structural_similarity_index_measure(
            x_0,
            teacher_x_0,
            sigma=self.sigma,
            data_range=self.data_range,
            reduction="none",
            return_full_image=True,
        )
        return full


class Cosine(Reward):
    """Cosine of the angle between the flattened samples, in [-1, 1]."""

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return F.cosine_similarity(x_0.flatten(1), teacher_x_0.flatten(1))


for _kind in (MSE, PSNR, SSIM, Cosine):
    register_reward(_kind.__name__.lower(), _kind)
