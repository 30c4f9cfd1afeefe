"""LatentFeatures and TimeFeatures: what stock Stable-Baselines3 policies make of observations."""

from __future__ import annotations

import math

import torch
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from redif_env.errors import InvalidArgumentError, check_integer
from redif_env.mdp import PAST

LATENTS = "latents"
TIMES = ("timestep", "steps_left")  # in [0, 1]
NUM_WAVES = 16  # the fastest goes from 1 to -1 within a sixteenth
LARGEST_SIDE = 8  # of what is flattened
CHANNELS = 32


class LatentFeatures(BaseFeaturesExtractor):
    """Features extractor for `MultiInputPolicy` on ReDiF's Dict observations.

    Stable-Baselines3's own, `CombinedExtractor`, flattens float latents of any size and adds no
    layer. Here images with a side over 8 are first halved by convolutions until they have none,
    time and class being channels too, so that the number of weights does not grow with the area.
    One hidden layer then mixes latents, time and class; latents of other shapes go there directly.
    Times t enter as `cos(pi k t)`, k = 1 to 16, because neighbouring times of a grid hardly differ
    as numbers in [0, 1], and what is right at one may be wrong at the next.

    What the step before predicted, where that is observed, joins the latents as further channels.

    There is no normalisation and no dropout: latents have unit scale, PPO's ratio must be 1 before
    the first update, and TRPO differentiates twice.

    Args:
        observation_space: A Dict with `latents`; other entries than times are taken as they are,
            classes one-hot, which Stable-Baselines3 makes of them.
        features_dim: Length F of the feature vector.

    Raises:
        InvalidArgumentError: for an observation space without latents, or F below 1.
    """

    def __init__(self, observation_space: spaces.Space, features_dim: int = 256) -> None:
        if (
            not isinstance(observation_space, spaces.Dict)
            or LATENTS not in observation_space.spaces
        ):
            raise InvalidArgumentError(
                "observation_space",
                observation_space,
                "pass a Dict with latents; flat observations go with 'MlpPolicy'.",
            )
        super().__init__(observation_space, check_integer("features_dim", features_dim, 1))
        parts = observation_space.spaces
        shape = parts[LATENTS].shape or ()
        self._seen = [name for name in (LATENTS, PAST) if name in parts]
        shape = (len(self._seen) * shape[0], *shape[1:])
        self._known = [name for name in parts if name not in self._seen]
        known = sum(_size(name, parts[name]) for name in self._known)
        halvings = _halvings(shape)
        self.image = nn.Sequential()
        if halvings:
            self.image = _convolutions(shape[0] + known, halvings)
            shape = (CHANNELS, *(math.ceil(side / 2**halvings) for side in shape[1:]))
        self.mix = nn.Sequential(nn.Linear(math.prod(shape) + known, features_dim), nn.SiLU())

    def forward(self, observations: dict[str, Tensor]) -> Tensor:
        """Features, float32 `(N, F)`."""
        latents = torch.cat([observations[name] for name in self._seen], dim=1)
        known = torch.cat([_embedded(name, observations[name]) for name in self._known], dim=1)
        if len(self.image):
            planes = known[:, :, None, None].expand(-1, -1, *latents.shape[2:])
            latents = self.image(torch.cat([latents, planes], dim=1))
        return self.mix(torch.cat([latents.flatten(1), known], dim=1))


class TimeFeatures(BaseFeaturesExtractor):
    """Features extractor for `MlpPolicy` on flat observations: only the time and the steps left.

    The best times hardly depend on the sample. A Q network that sees latents fits the noise of the
    tasks instead of what times differ by; this one sees as many states as the grid has.

    What it sees is not a Markov state, as the latent remembers where it came from. Values that are
    bootstrapped are therefore averages over all that led there, and credit no earlier choice: learn
    from whole returns, such as `DQN(n_steps=...)`, which takes flat observations only.

    Args:
        observation_space: Of `make_sb3_env(..., observation="flat")`, float32 `(F,)`: its last two
            entries are `steps_left` and `timestep`, which enter as waves, see `LatentFeatures`.

    Raises:
        InvalidArgumentError: for observations that are not flat.
    """

    def __init__(self, observation_space: spaces.Space) -> None:
        if (
            not isinstance(observation_space, spaces.Box)
            or len(observation_space.shape) != 1
            or observation_space.shape[0] < len(TIMES)
        ):
            raise InvalidArgumentError(
                "observation_space",
                observation_space,
                "pass a flat Box; dicts go with LatentFeatures.",
            )
        super().__init__(observation_space, len(TIMES) * NUM_WAVES)

    def forward(self, observations: Tensor) -> Tensor:
        """Features, float32 `(N, 32)`."""
        return torch.cat([_waves(value) for value in observations[:, -len(TIMES) :].split(1, 1)], 1)


def _embedded(name: str, value: Tensor) -> Tensor:
    """A known entry, float32 `(N, f)`: times as waves, others as they are."""
    return _waves(value) if name in TIMES else value.flatten(1)


def _waves(t: Tensor) -> Tensor:
    """`cos(pi k t)`, k = 1 to 16, of `(N, 1)`: `(N, 16)`."""
    return torch.cos(math.pi * torch.arange(1, NUM_WAVES + 1, device=t.device) * t)


def _size(name: str, space: spaces.Space) -> int:
    return NUM_WAVES if name in TIMES else get_flattened_obs_dim(space)


def _halvings(shape: tuple[int, ...]) -> int:
    """How often an image must be halved until no side is over `LARGEST_SIDE`; 0 for others."""
    if len(shape) != 3:
        return 0
    return max(0, math.ceil(math.log2(max(shape[1:]) / LARGEST_SIDE)))


def _convolutions(channels: int, halvings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(halvings):
        layers += [nn.Conv2d(channels, CHANNELS, 3, stride=2, padding=1), nn.SiLU()]
        channels = CHANNELS
    return nn.Sequential(*layers)
