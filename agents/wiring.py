"""What the environment settles of a policy's and a rollout's options.

Every function takes the agent (`Any`, since `ppo` imports this module) and only reads it.
"""

from __future__ import annotations

from typing import Any

from gymnasium.vector import VectorEnv

from redif_env import schedules
from redif_env.vector_env import ReDiFVectorEnv

from .exploration import at


def buffer_options(agent: Any) -> dict[str, Any]:
    """Of `TorchRolloutBuffer`, in any environment of tensors."""
    return {
        "advantage": agent.advantage,
        "credit": agent.credit,
        "local_weight": agent.local_weight,
        "local_radius": agent.local_radius,
        "advantage_std": agent.advantage_std,
        "advantage_clip": agent.advantage_clip,
        "stochastic_steps": agent.window,
        "normalize_advantage": agent.normalize_advantage,
        "seed": agent.seed or 0,
    }


def episode_options(agent: Any, env: VectorEnv) -> dict[str, Any]:
    """Of `TorchRolloutBuffer`, for a student in a `ReDiFVectorEnv`, perhaps with wrappers."""
    base: Any = env.unwrapped
    free = base.timesteps is None
    # The next latent is the action itself, unless somebody's wrapper changes it.
    plain = not free and type(env) is ReDiFVectorEnv
    return {
        # With a free schedule rows of a group may differ in their times.
        "shares_states": agent.window == 1 and not free,
        "action_bound": base.action_bound if plain else None,
        "group_size": base.group_size,
        "episode_length": base.max_steps,
        "num_tasks": base.num_tasks,
    }


def policy_options(agent: Any) -> dict[str, Any]:
    """Of `StudentPolicy`, where the agent was given none of its own."""
    return {
        "critic": agent.advantage == "gae",
        "critic_map": agent.credit == "local",
        "reference": agent.divergence is not None,
        "eta": at(agent.eta, 1.0),
        "min_std": at(agent.min_std, 1.0),
    }


def grid(base: ReDiFVectorEnv) -> list[float]:
    """The environment's times; with a free schedule those that training starts from."""
    if base.timesteps is not None:
        return base.timesteps.tolist()
    return schedules.uniform(base.process.schedule, base.max_steps).tolist()


def head_options(agent: Any, base: ReDiFVectorEnv) -> dict[str, Any]:
    """Of the schedule head, with a free schedule."""
    given = agent.policy_kwargs.get("schedule_head") or {}
    return {"min_steps": base.process.min_steps, **given}
