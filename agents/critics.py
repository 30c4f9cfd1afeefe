"""Value networks: what a state, or each element of it, is expected to be rewarded with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gymnasium import spaces
from torch import Tensor, nn


class Features(nn.Module):
    """What is known of a state in one vector: (pooled) latents, time, steps left and class.

    Args:
        observation_space: Of the environment.
        width: Length of the vector.
    """

    POOLED_SIDE = 8

    def __init__(self, observation_space: spaces.Dict, width: int) -> None:
        super().__init__()
        shape = observation_space["latents"].shape or ()
        self.num_classes = _num_classes(observation_space)
        image = len(shape) == 3
        self.pool = nn.AdaptiveAvgPool2d(self.POOLED_SIDE) if image else nn.Identity()
        size = shape[0] * self.POOLED_SIDE**2 if image else int(torch.Size(shape).numel())
        self.body = nn.Sequential(
            nn.Linear(size + 2 + self.num_classes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Features, float32 `(N, width)`."""
        latents = self.pool(obs["latents"]).flatten(1)
        return self.body(torch.cat([latents, _known(obs, self.num_classes)], 1))


class Critic(nn.Module):
    """A small value network.

    Args:
        observation_space: Of the environment.
        width: Hidden units.
    """

    def __init__(self, observation_space: spaces.Dict, width: int) -> None:
        super().__init__()
        self.features = Features(observation_space, width)
        self.head = nn.Linear(width, 1)

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Values, float32 `(N,)`."""
        return self.head(self.features(obs)).squeeze(1)


class MapCritic(nn.Module):
    """A small convolutional network that predicts the value of each element.

    It is told where each element is: convolutions alone could not tell places apart.

    Args:
        observation_space: Of the environment.
        width: Sixteen times the channels for images; hidden units for latents of other shapes.
    """

    def __init__(self, observation_space: spaces.Dict, width: int) -> None:
        super().__init__()
        shape = observation_space["latents"].shape or ()
        self.num_classes = _num_classes(observation_space)
        self.is_image = len(shape) == 3
        extra = 2 + self.num_classes + 2 * self.is_image
        if self.is_image:
            channels = max(8, width // 16)
            self.body = nn.Sequential(
                nn.Conv2d(shape[0] + extra, channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(channels, channels, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(channels, shape[0], 3, padding=1),
            )
        else:
            size = int(torch.Size(shape).numel())
            self.body = nn.Sequential(
                nn.Linear(size + extra, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, size),
            )

    def forward(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Values, float32 `(N, D)`, of the flattened latents' elements."""
        latents, known = obs["latents"], _known(obs, self.num_classes)
        if self.is_image:
            planes = known[:, :, None, None].expand(-1, -1, *latents.shape[2:])
            places = _places(latents).expand(len(latents), -1, -1, -1)
            return self.body(torch.cat([latents, planes, places], 1)).flatten(1)
        return self.body(torch.cat([latents.flatten(1), known], 1))


def _places(latents: Tensor) -> Tensor:
    """Row and column of each place, from -1 to 1, float32 `(1, 2, H, W)`."""
    axes = (torch.linspace(-1, 1, size, device=latents.device) for size in latents.shape[2:])
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).unsqueeze(0)


def _known(obs: Mapping[str, Tensor], num_classes: int) -> Tensor:
    """Time, steps left and one-hot class, float32 `(N, 2 + num_classes)`."""
    parts = [obs["timestep"], obs["steps_left"]]
    if num_classes:
        classes = obs["condition"].long().flatten()
        parts.append(nn.functional.one_hot(classes, num_classes).float())
    return torch.cat(parts, 1)


def _num_classes(observation_space: spaces.Dict) -> int:
    condition = observation_space.spaces.get("condition")
    return int(condition.n) if isinstance(condition, spaces.Discrete) else 0
