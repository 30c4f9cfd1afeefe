"""Reward maps on the grid of the latents."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ..errors import InvalidArgumentError
from ..noise import expand


def fit_map(reward_map: Tensor, latent_shape: tuple[int, ...], radius: int = 0) -> Tensor:
    """A reward map on the grid of the latents.

    Finer maps (decoded pixels) are averaged over the area of a latent element, coarser ones
    (patches) repeated over it; another number of channels is averaged over.

    Args:
        reward_map: float32 `(N, C', H', W')`, or like the latents.
        latent_shape: Shape of a row of latents, such as `(C, H, W)`.
        radius: Each element gets the mean over the square of this radius around it.

    Returns:
        float32 `(N, *latent_shape)`.

    Raises:
        InvalidArgumentError: for a map that has another shape and is not of images.
    """
    resized = reward_map
    if tuple(reward_map.shape[1:]) != tuple(latent_shape):
        if reward_map.ndim != 4 or len(latent_shape) != 3:
            raise InvalidArgumentError(
                "reward_map", tuple(reward_map.shape), f"return a map of images or {latent_shape}."
            )
        finer = reward_map.shape[2] > latent_shape[1]
        resized = functional.interpolate(
            reward_map, tuple(latent_shape[1:]), mode="area" if finer else "nearest-exact"
        )
        if resized.shape[1] != latent_shape[0]:
            resized = resized.mean(1, keepdim=True).expand(-1, latent_shape[0], -1, -1)
    if radius and resized.ndim == 4:
        resized = functional.avg_pool2d(
            resized, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False
        )
    return resized


def with_mean(reward_map: Tensor, values: Tensor) -> Tensor:
    """The map `(N, ...)`, shifted so that its mean over each row is that row's `values`, `(N,)`."""
    return reward_map + expand(values - reward_map.flatten(1).mean(1), reward_map)
