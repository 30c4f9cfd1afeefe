"""check_vector_env: the conformance check for vector environments of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from .errors import ReDiFError

MAX_EPISODE_STEPS = 1000


class ConformanceError(ReDiFError, AssertionError):
    """A vector environment breaks the contract; the message says which part, and how to mend it."""


def check_vector_env(env: VectorEnv, num_steps: int = 12, seed: int = 0) -> None:
    """Check a `SAME_STEP` vector environment whose observations and actions are torch tensors.

    Gymnasium 1.4 checks single environments only. This one steps the environment with random
    actions and checks: declared spaces and autoreset mode; shapes, dtypes and devices; that a seed
    determines everything; that returned tensors are not overwritten later; that rows do not
    influence each other; that an ended row reports `final_obs` and `episode` and starts afresh;
    that `action_masks()`, where there is one, leaves each row a choice; and that malformed actions
    are refused.

    Args:
        env: The environment; it is reset and stepped, and left open.
        num_steps: Steps of each trial.
        seed: Seed of the environment and of the actions.

    Raises:
        ConformanceError: at the first broken part.
    """
    _check_declaration(env)
    first = _rollout(env, num_steps, seed)
    second = _rollout(env, num_steps, seed)
    for index, (one, two) in enumerate(zip(first, second, strict=True)):
        _require(_equal(one, two), f"step {index} differs between two runs with the same seed")
    _check_rows_are_isolated(env, num_steps, seed)
    _check_episodes_end(env, seed)
    _check_bad_actions(env, seed)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ConformanceError(problem)


def _check_declaration(env: VectorEnv) -> None:
    _require(isinstance(env, VectorEnv), f"{type(env).__name__} is not a gymnasium VectorEnv")
    mode = env.metadata.get("autoreset_mode")
    _require(
        mode == AutoresetMode.SAME_STEP, f"metadata['autoreset_mode'] is {mode}, not SAME_STEP"
    )
    for name in ("single_observation_space", "single_action_space", "action_space", "num_envs"):
        _require(getattr(env, name, None) is not None, f"the environment has no {name}")
    action_space = env.single_action_space
    finite = not isinstance(action_space, spaces.Box) or action_space.is_bounded()
    _require(finite, "the action Box is not bounded; Stable-Baselines3 refuses it")


def _actions(env: VectorEnv, generator: np.random.Generator) -> Tensor:
    """Uniform actions over the middle fifth of the Box, float32 `(N, ...)`; any of a Discrete."""
    space = env.single_action_space
    if isinstance(space, spaces.Box):
        unit = generator.uniform(0.4, 0.6, (env.num_envs, *space.shape))
        actions = space.low + unit * (space.high - space.low)
        return torch.as_tensor(actions, dtype=torch.float32, device=_device(env))
    drawn = [_seeded_sample(space, generator) for _ in range(env.num_envs)]
    return torch.as_tensor(np.array(drawn), device=_device(env))


def _seeded_sample(space: spaces.Space[Any], generator: np.random.Generator) -> Any:
    space.seed(int(generator.integers(2**31)))
    return space.sample()


def _device(env: VectorEnv) -> torch.device:
    return torch.device(getattr(env.unwrapped, "device", "cpu"))


def _rollout(
    env: VectorEnv,
    num_steps: int,
    seed: int,
    change: Callable[[Tensor], Tensor] = lambda actions: actions,
) -> list[Any]:
    """What reset and the steps return; also checks each against the spaces."""
    generator = np.random.default_rng(seed)
    observation, infos = env.reset(seed=seed)
    _check_observation(env, observation, "reset")
    _require(isinstance(infos, dict), "reset must return (observations, infos dict)")
    _check_masks(env)
    history: list[Any] = [observation]
    copies = [_clone(observation)]
    for index in range(num_steps):
        output = env.step(change(_actions(env, generator)))
        _check_step(env, output, index)
        _check_masks(env)
        history.append(output)
        copies.append(_clone(output))
    for index, (kept, copied) in enumerate(zip(history, copies, strict=True)):
        _require(_equal(kept, copied), f"tensors returned at step {index} were overwritten later")
    return copies


def _check_step(env: VectorEnv, output: Any, index: int) -> None:
    _require(len(output) == 5, "step must return five values")
    observation, rewards, terminations, truncations, infos = output
    _check_observation(env, observation, f"step {index}")
    _check_tensor(env, rewards, torch.float32, "rewards")
    _check_tensor(env, terminations, torch.bool, "terminations")
    _check_tensor(env, truncations, torch.bool, "truncations")
    _require(bool(rewards.isfinite().all()), f"rewards of step {index} are not finite")
    _require(not bool((terminations & truncations).any()), "a row both terminated and truncated")
    ended = terminations | truncations
    if not bool(ended.any()):
        return
    for name in ("final_obs", "_final_obs", "episode", "_episode"):
        _require(name in infos, f"infos lacks {name!r} at a step where an episode ended")
    _check_observation(env, infos["final_obs"], "infos['final_obs']")
    for name in ("_final_obs", "_episode"):
        _check_tensor(env, infos[name], torch.bool, f"infos[{name!r}]")
        _require(torch.equal(infos[name], ended), f"infos[{name!r}] is not the mask of ended rows")
    same = _equal(infos["final_obs"], observation, ended)
    _require(not same, f"step {index}: rows that ended did not start afresh")
    for name in ("r", "l"):
        _require(name in infos["episode"], f"infos['episode'] lacks {name!r}")


def _check_masks(env: VectorEnv) -> None:
    action_masks, space = getattr(env.unwrapped, "action_masks", None), env.single_action_space
    if action_masks is None or not isinstance(space, spaces.Discrete):
        return
    masks = action_masks()
    _check_tensor(env, masks, torch.bool, "action_masks()", (int(space.n),))
    _require(bool(masks.any(1).all()), "action_masks() leaves a row without any action")


def _check_tensor(
    env: VectorEnv, value: Any, dtype: torch.dtype, name: str, row_shape: tuple[int, ...] = ()
) -> None:
    _require(isinstance(value, Tensor), f"{name} is a {type(value).__name__}, not a tensor")
    _require(value.shape == (env.num_envs, *row_shape), f"{name} has shape {tuple(value.shape)}")
    _require(value.dtype == dtype, f"{name} is {value.dtype}, not {dtype}")
    _require(value.device.type == _device(env).type, f"{name} is on {value.device}")


def _check_observation(env: VectorEnv, observation: Any, where: str) -> None:
    space = env.single_observation_space
    named = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    values = observation if isinstance(space, spaces.Dict) else {"": observation}
    _require(isinstance(values, Mapping), f"{where}: the observation is not a dict")
    _require(set(values) == set(named), f"{where}: keys {sorted(values)} are not {sorted(named)}")
    for name, part in named.items():
        value, label = values[name], f"{where}: observation {name!r}"
        _require(isinstance(value, Tensor), f"{label} is a {type(value).__name__}, not a tensor")
        _require(value.shape == (env.num_envs, *(part.shape or ())), f"{label} is {value.shape}")
        wanted = torch.from_numpy(np.empty(0, part.dtype)).dtype
        _require(value.dtype == wanted, f"{label} is {value.dtype}, not {wanted}")
        inside = all(part.contains(row.cpu().numpy()[()]) for row in value)
        _require(inside, f"{label} lies outside its space")
        _require(bool(value.isfinite().all()), f"{label} is not finite")


def _check_rows_are_isolated(env: VectorEnv, num_steps: int, seed: int) -> None:
    """Changing the actions of the last row must leave every other row bit-identical."""
    if env.num_envs < 2:
        return
    others = slice(0, env.num_envs - 1)

    space = env.single_action_space

    def change(actions: Tensor) -> Tensor:
        changed = actions.clone()
        if isinstance(space, spaces.Discrete):  # surely another one
            changed[-1] = (actions[-1] - int(space.start) + 1) % int(space.n) + int(space.start)
        else:
            changed[-1] = actions[0]
        return changed

    plain, changed = _rollout(env, num_steps, seed), _rollout(env, num_steps, seed, change)
    for index, (one, two) in enumerate(zip(plain, changed, strict=True)):
        # infos are left out: which keys they have may depend on any row.
        one, two = (one, two) if index == 0 else (one[:4], two[:4])
        _require(
            _equal(one, two, others), f"step {index}: a row's actions changed another row's outcome"
        )


def _check_episodes_end(env: VectorEnv, seed: int) -> None:
    generator = np.random.default_rng(seed)
    env.reset(seed=seed)
    for _ in range(MAX_EPISODE_STEPS):
        _, _, terminations, truncations, infos = env.step(_actions(env, generator))
        if bool((terminations | truncations).any()):
            lengths = infos["episode"]["l"][terminations | truncations]
            _require(bool((lengths > 0).all()), "infos['episode']['l'] is not positive")
            return
    raise ConformanceError(f"no episode ended in {MAX_EPISODE_STEPS} steps")


def _check_bad_actions(env: VectorEnv, seed: int) -> None:
    env.reset(seed=seed)
    good = _actions(env, np.random.default_rng(seed))
    bad = {"with a row missing": good[:-1], "with an extra axis": good[..., None]}
    for label, action in bad.items():
        try:
            env.step(action)
        except (ValueError, TypeError, AssertionError):
            continue
        raise ConformanceError(f"an action {label} was accepted; raise a ValueError")
    env.reset(seed=seed)


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {name: _clone(part) for name, part in value.items()}
    return tuple(map(_clone, value)) if isinstance(value, tuple | list) else value


def _equal(one: Any, two: Any, rows: slice | Tensor = slice(None)) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one[rows], two[rows])
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(_equal(one[k], two[k], rows) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(lambda a, b: _equal(a, b, rows), one, two))
    return bool(one == two)
