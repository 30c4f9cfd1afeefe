"""TorchVecEnv: a Gymnasium vector environment of tensors as a Stable-Baselines3 `VecEnv`.

Stock algorithms use the numpy methods; ours use `reset_tensor` and `step_tensor`, which never leave
the device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from redif_env.errors import InvalidArgumentError

TensorObs = Tensor | dict[str, Tensor]


class TorchVecEnv(VecEnv):
    """Adapter for a `SAME_STEP` vector environment of tensors.

    Args:
        env: Such as `gymnasium.make_vec("ReDiF-v0", num_envs=64)`. Observations are a dict of
            tensors, or one tensor as `redif_env.FlatVectorObservation` makes of it.

    Attributes:
        env: The environment.

    Raises:
        InvalidArgumentError: for an environment of another kind.
    """

    def __init__(self, env: VectorEnv) -> None:
        if not isinstance(env, VectorEnv):
            raise InvalidArgumentError(
                "env", env, "pass a Gymnasium VectorEnv, such as make_vec('ReDiF-v0', num_envs=64)."
            )
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise InvalidArgumentError(
                "env", env.metadata.get("autoreset_mode"), "pass an environment of SAME_STEP mode."
            )
        self.env = env
        self._returns_tensors = False
        self._actions: np.ndarray | None = None
        self._started = time.monotonic()
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    @property
    def device(self) -> torch.device:
        """Where observations live and actions are expected."""
        return torch.device(self.env.unwrapped.device)  # type: ignore[attr-defined]

    def reset_tensor(self) -> TensorObs:
        """Start new episodes; uses the seed and options that `seed` and `set_options` left."""
        observation, _ = self.env.reset(seed=self._seeds[0], options=self._options[0] or None)
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_tensor(self, actions: Tensor) -> tuple[TensorObs, Tensor, Tensor, dict[str, Any]]:
        """Take a step without leaving the device.

        Args:
            actions: `(N, *action_space.shape)`, inside the action space: float32 for a Box, int64
                for a Discrete.

        Returns:
            Observations (after autoreset), rewards float32 `(N,)`, dones bool `(N,)`, and infos as
            the environment returned them.
        """
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        self.truncated = truncations & ~terminations
        return observation, rewards, terminations | truncations, infos

    @contextlib.contextmanager
    def returning_tensors(self) -> Iterator[None]:
        """Inside, `reset` returns tensors: Stable-Baselines3's `learn` calls no other method."""
        self._returns_tensors = True
        try:
            yield
        finally:
            self._returns_tensors = False

    def reset(self) -> Any:
        observation = self.reset_tensor()
        return observation if self._returns_tensors else _numpy(observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> Any:
        actions = torch.as_tensor(np.asarray(self._actions), device=self.device)
        observation, rewards, dones, infos = self.step_tensor(actions)
        host_dones = dones.cpu().numpy()
        truncated = self.truncated.cpu().numpy()
        records = self._records(infos, host_dones, truncated)
        return _numpy(observation), rewards.cpu().numpy(), host_dones, records

    def close(self) -> None:
        self.env.close()

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seed of the next reset; one seed determines all rows."""
        self._seeds = [seed] * self.num_envs
        return self._seeds

    def get_images(self) -> Sequence[np.ndarray | None]:
        return list(self.env.render() or [None] * self.num_envs)  # type: ignore[arg-type]

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """The environment's attribute, once for each index: the rows share one environment."""
        return [getattr(self.env.unwrapped, attr_name)] * self._count(indices)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method that returns one value a row, or None; gives the values of `indices`.

        Tensors become numpy, as `MaskablePPO` expects of `action_masks`.
        """
        values = getattr(self.env.unwrapped, method_name)(*method_args, **method_kwargs)
        if values is None:
            return [None] * self._count(indices)
        values = values.cpu().numpy() if isinstance(values, Tensor) else values
        rows = range(self.num_envs) if indices is None else np.atleast_1d(indices)
        return [values[row] for row in rows]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None
    ) -> list[bool]:
        return [False] * self._count(indices)

    def _count(self, indices: Any) -> int:
        return self.num_envs if indices is None else len(np.atleast_1d(indices))

    def _records(
        self, infos: dict[str, Any], dones: np.ndarray, truncated: np.ndarray
    ) -> list[dict[str, Any]]:
        """SB3's list of infos; only rows that ended need any."""
        records: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        if not dones.any():
            return records
        final = _numpy(infos["final_obs"])
        episode = _numpy(infos["episode"])
        elapsed = round(time.monotonic() - self._started, 6)
        for row in np.flatnonzero(dones).tolist():
            records[row] = {
                "terminal_observation": _row(final, row),
                "episode": {**{name: v[row].item() for name, v in episode.items()}, "t": elapsed},
                "TimeLimit.truncated": bool(truncated[row]),
            }
        return records


def _numpy(tensors: Any) -> Any:
    """A tensor, or a dict of tensors, as numpy."""
    if isinstance(tensors, Tensor):
        return tensors.cpu().numpy()
    return {name: value.cpu().numpy() for name, value in tensors.items()}


def _row(arrays: Any, row: int) -> Any:
    """Row `row` of an array, or of each array of a dict."""
    if isinstance(arrays, np.ndarray):
        return arrays[row]
    return {name: value[row] for name, value in arrays.items()}
