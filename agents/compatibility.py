"""Which options of `ReDiFPPO` go together, and with which environment: typed errors, in one place.

Every function takes the agent (`Any`, since `ppo` imports this module) and only reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from redif_env import mdp, parallel
from redif_env.errors import InvalidArgumentError
from redif_env.schedule_env import ReDiFScheduleVectorEnv
from redif_env.vector_env import ReDiFVectorEnv

from . import wiring
from .divergences import check_divergence

# What a policy other than StudentPolicy is trained with: Stable-Baselines3's PPO.
STOCK = (
    ("ratio", "sum"),
    ("advantage", "gae"),
    ("credit", "global"),
    ("advantage_std", "rollout"),
    ("divergence", None),
    ("gap_fraction", None),
    ("step_weights", None),
    ("micro_batch_size", None),
    ("reuse_forward", False),
    ("stochastic_steps", "all"),
    ("antithetic", False),
)


def check_options(agent: Any) -> None:
    """What can be said before the environment is known."""
    if agent.credit == "local" and agent.ratio != "element":
        raise InvalidArgumentError("ratio", agent.ratio, "credit='local' needs ratio='element'.")
    if agent.advantage == "gae":
        if agent.advantage_clip is not None:
            raise InvalidArgumentError(
                "advantage_clip", agent.advantage_clip, "pass None with advantage='gae'."
            )
        if agent.antithetic:
            raise InvalidArgumentError("antithetic", True, "pass False with advantage='gae'.")
    if agent.advantage_std == "group" and agent.advantage != "group":
        raise InvalidArgumentError(
            "advantage_std", "group", "with another advantage pass 'rollout'."
        )
    if agent.divergence is not None:
        check_divergence(agent.divergence, agent.divergence_alpha)
    elif agent.divergence_target is not None:
        raise InvalidArgumentError(
            "divergence_target", agent.divergence_target, "pass a divergence with it."
        )
    if agent.adaptive_lr and agent.target_kl is None:
        raise InvalidArgumentError("adaptive_lr", True, "pass a target_kl for it to hold.")


def check_parallel(base: Any) -> None:
    """Of several processes each needs its own share of rows, and as many of them in each update."""
    if parallel.world_size() == 1:
        return
    if getattr(base, "shard", None) != parallel.shard():
        raise InvalidArgumentError(
            "env",
            type(base).__name__,
            "several processes need a ReDiFVectorEnv with shard=redif_env.parallel.shard().",
        )
    if base.timesteps is None and base.process.min_steps < base.max_steps:
        raise InvalidArgumentError(
            "min_steps",
            base.process.min_steps,
            f"with several processes episodes must be equally long: pass {base.max_steps}, or a "
            "fixed schedule.",
        )


def check_generic_policy(agent: Any) -> None:
    """Other policies know nothing of elements, exploration and references."""
    for name, wanted in STOCK:
        if getattr(agent, name) != wanted:
            raise InvalidArgumentError(
                name, getattr(agent, name), f"pass {wanted!r}: only StudentPolicy takes others."
            )


def check_buffer_kwargs(agent: Any, given: Mapping[str, Any]) -> None:
    """What the buffer has from the agent is for the agent to say."""
    for name in given.keys() & wiring.buffer_options(agent).keys():
        raise InvalidArgumentError(
            "rollout_buffer_kwargs", given, f"pass {name} to ReDiFPPO itself."
        )


def check_policy(agent: Any) -> None:
    """A policy that is loaded has the parts that its agent's options need."""
    given, wanted = agent.policy_kwargs, wiring.policy_options(agent)
    remedy = "the policy was made without: make a new agent, and load_student into its policy."
    if wanted["critic"] and not given["critic"]:
        raise InvalidArgumentError(
            "advantage", agent.advantage, f"it needs a critic, which {remedy}"
        )
    if wanted["critic"] and given["critic_map"] != wanted["critic_map"]:
        raise InvalidArgumentError(
            "credit", agent.credit, f"it needs another critic, which {remedy}"
        )
    if wanted["reference"] and not given["reference"]:
        raise InvalidArgumentError(
            "divergence", agent.divergence, f"it needs a reference, which {remedy}"
        )


def check_process(base: Any) -> None:
    """A student acts in next latents."""
    if isinstance(base, ReDiFScheduleVectorEnv):
        raise InvalidArgumentError(
            "env",
            type(base).__name__,
            "its student is frozen: pass 'MultiInputPolicy', or a ReDiFVectorEnv.",
        )
    if base.process.action_type != "latent" or base.process.student is not None:
        raise InvalidArgumentError(
            "action_type",
            base.process.action_type,
            "StudentPolicy acts in next latents: pass 'latent' and residual=False.",
        )


def check_student(student: Any, teacher: Any, guidance_scale: float) -> None:
    """A student of another size or prediction type will do, but not of another kind of model.

    Nor one that asks its network more, or less, often than the environment counts.
    """
    if student.guidance_scale != guidance_scale:
        raise InvalidArgumentError(
            "student",
            f"guidance_scale={student.guidance_scale:g}",
            f"the environment has {guidance_scale:g}: make both with the same.",
        )
    if student.num_classes != teacher.num_classes:
        raise InvalidArgumentError(
            "student",
            f"{student.num_classes} classes",
            f"pass a student of the teacher's classes, {teacher.num_classes}.",
        )
    last = min(student.schedule.max_timestep, teacher.schedule.max_timestep)
    t = teacher.schedule.snap(torch.linspace(1, last, 10))
    ours, theirs = student.schedule, teacher.schedule
    same = torch.allclose(ours.alpha(t).cpu(), theirs.alpha(t).cpu())
    same = same and torch.allclose(ours.sigma(t).cpu(), theirs.sigma(t).cpu())
    if not same or student.schedule.max_timestep != teacher.schedule.max_timestep:
        raise InvalidArgumentError(
            "student",
            type(student.schedule).__name__,
            "its alpha and sigma are not the teacher's: pass one of the same noise schedule.",
        )


def check_trained(agent: Any, free: bool) -> None:
    """Only a free schedule can be learned; its episodes may differ in length."""
    if not free and agent.trained != "student":
        raise InvalidArgumentError(
            "trained", agent.trained, "make the environment with schedule='free' to learn times."
        )
    if not free and agent.policy_kwargs.get("schedule_head") is not None:
        raise InvalidArgumentError(
            "schedule_head",
            agent.policy_kwargs["schedule_head"],
            "make the environment with schedule='free' to choose times.",
        )
    if free and agent.reuse_forward:
        raise InvalidArgumentError("reuse_forward", True, "pass False with a free schedule.")
    if free and agent.advantage == "gae":
        raise InvalidArgumentError(
            "advantage", "gae", "pass 'group', 'batch' or 'task' with a free schedule."
        )


def check_timesteps(given: Any, grid: list[float] | None, free: bool) -> None:
    """The student's own times must be the environment's: it is not told them otherwise."""
    own = [float(t) for t in given]
    if grid is not None and free:
        if len([t for t in own if t > 0]) != len(grid) - 1:
            raise InvalidArgumentError(
                "timesteps", own, f"pass as many as the environment has steps, {len(grid) - 1}."
            )
    elif grid is not None and [*own, 0.0][: len(grid)] != grid:
        raise InvalidArgumentError(
            "timesteps", own, f"the environment's schedule is {grid}: make them the same."
        )


def check_episodes(agent: Any, group_size: int, length: int, reward: Any) -> None:
    """Groups, windows and weights must fit the environment's episodes, and credit its reward."""
    if agent.trained == "both" and agent.n_envs < 2 * group_size:
        # Half of the groups explore their steps, half their times: one group would explore no time.
        raise InvalidArgumentError(
            "trained",
            "both",
            f"it needs two groups: pass num_envs >= {2 * group_size}, or 'alternating'.",
        )
    if group_size < 2 and agent.advantage == "group":
        raise InvalidArgumentError(
            "group_size", group_size, "advantage='group' needs an environment with at least 2."
        )
    if agent.n_steps % length:
        raise InvalidArgumentError(
            "n_steps", agent.n_steps, f"pass a multiple of the episode length {length}."
        )
    if agent.credit == "local" and not reward.has_map and agent.trained != "schedule":
        raise InvalidArgumentError(
            "credit", "local", f"reward {reward.name!r} has no map: pass 'global'."
        )
    if agent.antithetic and group_size % 2:
        raise InvalidArgumentError(
            "group_size", group_size, "antithetic=True needs groups of even size."
        )
    window = agent.window
    if window is not None and window > length:
        raise InvalidArgumentError(
            "stochastic_steps", window, f"episodes have {length} steps: pass fewer, or 'all'."
        )
    if agent.reuse_forward:
        _check_reuse(agent, group_size, length)
    radii = agent.local_radius
    if isinstance(radii, list) and (window != 1 or len(radii) != length):
        raise InvalidArgumentError(
            "local_radius",
            radii,
            f"pass a number, or with stochastic_steps='one' {length}, one a step of an episode.",
        )
    weights = agent.step_weights
    if weights is not None and len(weights) != length:
        raise InvalidArgumentError(
            "step_weights", list(weights), f"pass {length} numbers, one a step of an episode."
        )
    if weights is not None and not any(weights):
        raise InvalidArgumentError("step_weights", list(weights), "one step has to count.")
    if agent.ent_coef and not agent.policy_kwargs.get("learn_std"):
        raise InvalidArgumentError(
            "ent_coef",
            agent.ent_coef,
            "only a learned std has an entropy: pass policy_kwargs={'learn_std': True}.",
        )
    if agent.policy_kwargs.get("learn_std") and agent.antithetic and group_size == 2:
        raise InvalidArgumentError(
            "learn_std",
            True,
            "a group of one pair of opposite noise says nothing about the std (its gradient "
            "cancels): pass group_size >= 4, or antithetic=False.",
        )


def _check_reuse(agent: Any, group_size: int, length: int) -> None:
    """The student of the update must be that of the rollout, and its states those of groups."""
    needed = (
        ("n_epochs", agent.n_epochs, 1, agent.n_epochs == 1),
        ("group_size", group_size, "at least 2", group_size > 1),
        ("n_steps", agent.n_steps, length, agent.n_steps == length),
        ("stochastic_steps", agent.stochastic_steps, "'one'", agent.window == 1),
        ("micro_batch_size", agent.micro_batch_size, None, agent.micro_batch_size is None),
        ("shard_student", True, False, not agent.policy_kwargs.get("shard_student")),
        (
            "batch_size",
            agent.batch_size,
            agent.n_envs * parallel.world_size(),
            parallel.share(agent.batch_size) >= agent.n_envs,
        ),
    )
    for name, value, wanted, holds in needed:
        if not holds:
            raise InvalidArgumentError(name, value, f"reuse_forward=True needs {wanted}.")


def check_wrapped_rewards(env: Any, rewards: Tensor, infos: Mapping[str, Any]) -> None:
    """Local credit counts the map alone: a wrapper that changes rewards must change it too.

    Args:
        env: A vector environment that has just taken a step.
        rewards, infos: What it returned.

    Raises:
        InvalidArgumentError: if rewards are not the environment's own, but their map is.
    """
    base = env.unwrapped
    if env is base or not isinstance(base, ReDiFVectorEnv):
        return
    expected = torch.zeros_like(rewards)
    if "episode" in infos:
        assert base.last_state is not None
        with torch.no_grad():
            expected, own = mdp.reward(base.process, base.last_state)
        found = infos.get("reward_map")
        if found is not None and own is not None and not torch.allclose(found, own):
            return  # whether the two fit is the wrapper's affair
        if found is None:
            raise InvalidArgumentError(
                "credit", "local", "a wrapper leaves out infos['reward_map']: pass 'global'."
            )
    if not torch.allclose(rewards, expected):
        raise InvalidArgumentError(
            "credit",
            "local",
            f"{type(env).__name__} changes rewards, but not infos['reward_map'], which local "
            "credit counts alone: pass 'global', or change the map too.",
        )
