"""ReDiFEnv: the single environment, a numpy view of one row of `ReDiFVectorEnv`."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor

from .errors import InvalidActionError, check_integer
from .vector_env import ReDiFVectorEnv

Observation = dict[str, Any]


class ReDiFEnv(gym.Env[Observation, np.ndarray]):
    """`ReDiF-v0` for one trajectory at a time, with numpy observations.

    Spaces, rewards, episodes and arguments are those of `ReDiFVectorEnv`, which see; `num_envs`
    and `group_size` are 1. `info` of the last step holds `nfe`, the network evaluations of the
    episode, `reward_terms` and, when the reward has one, `reward_map`; returns and lengths are left
    to `RecordEpisodeStatistics` and `Monitor`, which call theirs `episode`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}  # noqa: RUF012
    _kind: type[ReDiFVectorEnv] = ReDiFVectorEnv

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        self._env = self._kind(1, render_mode=render_mode, **kwargs)
        self.render_mode = render_mode
        self.observation_space = self._env.single_observation_space
        self.action_space = self._env.single_action_space
        self._ended = True
        self._shown: Any = None

    @property
    def vector_env(self) -> ReDiFVectorEnv:
        """The environment underneath."""
        return self._env

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode; see `ReDiFVectorEnv.reset`. The info has the `task`, an int."""
        if seed is not None:
            seed = check_integer("seed", seed, 0)
        super().reset(seed=seed)
        # All randomness follows np_random, as Gymnasium asks.
        inner = None if seed is None else int(self.np_random.integers(2**62))
        observation, infos = self._env.reset(seed=inner, options=options)
        self._ended, self._shown = False, self._env.state
        return _numpy(observation), {"task": int(infos["task"][0])}

    def step(self, action: np.ndarray) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Take one step; see `ReDiFVectorEnv.step`.

        Raises:
            gymnasium.error.ResetNeeded: after the end of an episode.
        """
        self._check_running()
        try:
            action = np.asarray(action)
        except ValueError as error:  # lists of unequal lengths
            raise InvalidActionError("action", action, "pass an array.") from error
        if action.shape != self.action_space.shape:
            raise InvalidActionError(
                "action.shape", action.shape, f"pass {self.action_space.shape}."
            )
        observation, reward, terminated, _, infos = self._env.step(action[None])
        self._ended = bool(terminated[0])
        if not self._ended:
            self._shown = self._env.state
            return _numpy(observation), float(reward[0]), False, False, {}
        self._shown = self._env.last_state
        episode = _numpy(infos["episode"])
        info: dict[str, Any] = {name: episode[name] for name in episode if name not in ("r", "l")}
        info["reward_terms"] = _numpy(infos["reward_terms"])
        info["task"] = int(infos["task"][0])
        if "reward_map" in infos:
            info["reward_map"] = infos["reward_map"][0].cpu().numpy().copy()
        return _numpy(infos["final_obs"]), float(reward[0]), True, False, info

    def render(self) -> np.ndarray | None:
        """The latent, the predicted data and the teacher's answer; uint8 `(height, width, 3)`."""
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='rgb_array'.")
            return None
        if self._shown is None:
            raise gym.error.ResetNeeded("call reset() before render().")
        return self._env.draw(self._shown)[0]

    def close(self) -> None:
        """Close the environment underneath."""
        self._env.close()

    def _check_running(self) -> None:
        if self._ended:
            raise gym.error.ResetNeeded("call reset(): the episode has ended or never started.")


def _numpy(batch: dict[str, Tensor]) -> Observation:
    """Row 0 of each tensor, as an array of its own (or a numpy scalar for a class)."""
    return {name: value[0].cpu().numpy().copy()[()] for name, value in batch.items()}
