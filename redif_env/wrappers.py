"""FlatVectorObservation: dict observations as one flat tensor, for policies that take no dict."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from .errors import InvalidArgumentError


class FlatVectorObservation(VectorWrapper):
    """A vector environment of tensors whose observations are float32 `(N, F)`.

    Entries are in the order of `gymnasium.spaces.flatten`, classes one-hot, so that a row equals
    what `gymnasium.wrappers.FlattenObservation` makes of the single environment. `final_obs` in
    `infos` is flat too. Gymnasium's own vector wrapper takes numpy and no `SAME_STEP` autoreset.

    Args:
        env: Such as `ReDiFVectorEnv(64, residual=True)`: its observations are a dict of tensors,
            their spaces `Box` and `Discrete`.

    Raises:
        InvalidArgumentError: for an environment of another kind.
    """

    def __init__(self, env: VectorEnv) -> None:
        if not isinstance(env, VectorEnv):
            raise InvalidArgumentError("env", env, "pass a VectorEnv, such as a ReDiFVectorEnv.")
        space = env.single_observation_space
        parts = space.spaces.values() if isinstance(space, spaces.Dict) else [space]
        if not isinstance(space, spaces.Dict) or not all(
            isinstance(part, spaces.Box | spaces.Discrete) for part in parts
        ):
            raise InvalidArgumentError("env", space, "pass one with a Dict of Box and Discrete.")
        super().__init__(env)
        self._parts = space.spaces
        flat = spaces.flatten_space(space)
        assert isinstance(flat, spaces.Box)
        self.single_observation_space = spaces.Box(
            flat.low.astype(np.float32), flat.high.astype(np.float32), dtype=np.float32
        )
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        observation, infos = self.env.reset(seed=seed, options=options)
        return self._flatten(observation), infos

    def step(self, actions: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        if "final_obs" in infos:
            infos = {**infos, "final_obs": self._flatten(infos["final_obs"])}
        return self._flatten(observation), rewards, terminations, truncations, infos

    def _flatten(self, observation: dict[str, Tensor]) -> Tensor:
        return torch.cat([_flat(self._parts[n], observation[n]) for n in self._parts], dim=1)


def _flat(space: spaces.Space[Any], value: Tensor) -> Tensor:
    """One part as float32 `(N, f)`; a class as one-hot, written so that no device is waited for."""
    if isinstance(space, spaces.Discrete):
        classes = torch.arange(space.start, space.start + space.n, device=value.device)
        value = value.unsqueeze(1) == classes
    return value.flatten(1).float()
