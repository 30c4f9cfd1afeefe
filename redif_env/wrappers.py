"""Wrappers for algorithms that take no dict, or have no baseline for each task."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from torch import Tensor

from . import mdp
from .errors import InvalidArgumentError
from .vector_env import ReDiFVectorEnv


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


class RelativeReward(VectorWrapper):
    """Rewards an episode by what it gains over the frozen student alone, on the same task.

    Tasks differ more in difficulty than policies do in skill, and an algorithm without groups sees
    that as noise. What is subtracted depends on the task alone, so that no preference between
    policies changes; acting as the student alone does returns 0. `reward_map` is left out of
    `infos`: its mean would be another reward.

    Args:
        env: A `ReDiFVectorEnv` with `residual=True`, or a `ReDiFScheduleVectorEnv`. Its bank is
            built, and gone through once with the student. Episodes that `reset` was told to start
            elsewhere (`options={"start": ...}`) are compared with the usual start too.

    Attributes:
        baseline: What is subtracted, for each task of the bank: see `baseline_returns`.

    Raises:
        InvalidArgumentError: for an environment of another kind, and for a reward that scores rows
            against each other, which says nothing of a task alone.
    """

    def __init__(self, env: VectorEnv) -> None:
        self.baseline = baseline_returns(env)
        super().__init__(env)

    def step(self, actions: Any) -> tuple[Any, Tensor, Tensor, Tensor, dict[str, Any]]:
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        if "episode" in infos:
            gains = rewards - self.baseline[infos["task"]]
            rewards = torch.where(infos["_episode"], gains, rewards)
            episode = {**infos["episode"], "r": rewards.clone()}
            infos = {name: infos[name] for name in infos if name != "reward_map"}
            infos["episode"] = episode
        return observation, rewards, terminations, truncations, infos


@torch.no_grad()
def baseline_returns(env: VectorEnv, batch_size: int = 512) -> Tensor:
    """Returns of the frozen student alone, float32 `(P,)`, for each task of the bank.

    Alone means zero residual actions; where times are chosen, `max_steps` of them, evenly spaced
    among the candidates.

    Args:
        env: A `ReDiFVectorEnv` with `residual=True`, or a `ReDiFScheduleVectorEnv`; not stepped.
        batch_size: Tasks that are sampled at once.

    Raises:
        InvalidArgumentError: for an environment of another kind, or a reward over the batch.
    """
    inner = env.unwrapped if isinstance(env, VectorEnv) else None
    if not isinstance(inner, ReDiFVectorEnv) or inner.process.student is None:
        raise InvalidArgumentError(
            "env", env, "pass a ReDiFVectorEnv with residual=True, or a ReDiFScheduleVectorEnv."
        )
    reward = inner.process.reward
    if reward.over_batch:
        raise InvalidArgumentError(
            "env",
            f"reward {reward.name!r}",
            "it scores a row against the others of the batch, so that no task has a return of its "
            "own: pass another reward, or give this one a reference and a memory.",
        )
    returns = []
    for rows in torch.arange(len(inner.bank), device=inner.device).split(batch_size):
        state = mdp.initial(inner.process, inner.bank, rows)
        for step in range(inner.max_steps):
            state = mdp.stay_ended(inner.process, state, _alone(inner.process, state, step))
        returns.append(mdp.reward(inner.process, state)[0])
    return torch.cat(returns)


def _alone(process: mdp.Process, state: mdp.EnvState, step: int) -> mdp.EnvState:
    """The state after the student's own step number `step`."""
    num = len(state.x_t)
    if process.candidates is None:
        dim = state.x_t[0].numel() + process.choice_dim
        return mdp.transition(process, state, torch.zeros(num, dim, device=state.x_t.device))
    choice = (len(process.candidates) - 1) * (step + 1) // process.max_steps - 1
    return mdp.follow(process, state, torch.full_like(state.step_index, choice))
