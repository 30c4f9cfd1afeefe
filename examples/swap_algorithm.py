"""Algorithms of Stable-Baselines3 and sb3-contrib, unmodified, in place of ReDiF's PPO.

`python examples/swap_algorithm.py --algo SAC`; `--help` lists the rest. `ALGORITHMS` holds what
each algorithm is given, and why; docs/algorithms.md says which to choose.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import time
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from sb3_contrib import ARS
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents import LatentFeatures, TimeFeatures, make_sb3_env
from redif_env import Teacher, baseline_returns, load_teacher
from redif_env.errors import (
    InvalidArgumentError,
    check_choice,
    check_integer,
    plain_errors,
    require,
)

RESIDUAL, SCHEDULE = "residual", "schedule"
DICT, FLAT = "dict", "flat"
DEFAULT_STEPS = {RESIDUAL: 1, SCHEDULE: 4}
NUM_TIMES = 8  # to choose from


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What an algorithm is given; plain data.

    Attributes:
        path: Of the class, which is used as it is.
        why: What decided about the rest.
        options: Keyword arguments of the class. `make_model` adds those that depend on the
            environment: sizes of networks and buffer, exploration, seed, device.
        schedule_options: What differs from `options` with schedules.
        variants: Of `make_sb3_env`; the first is the default.
        observation: Flat only where the class has no policy for dicts.
        policy: Name of the policy.
        only_times: Whether the network sees the time and the steps left only; with flat
            observations.
        std: Exploration in units of a residual action, which is in [-1, 1]; see `exploration`. None
            where the algorithm explores by other means.
        scale: What an action of 1 adds to a latent: the bound of all corrections.
    """

    path: str
    why: str
    options: Mapping[str, Any]
    schedule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    variants: tuple[str, ...] = (RESIDUAL,)
    observation: str = DICT
    policy: str = "MultiInputPolicy"
    only_times: bool = False
    std: float | None = None
    scale: float = 0.5


# Everywhere: episodes are short and only their end is rewarded, so nothing is discounted.
_ON_POLICY = {"gamma": 1.0, "learning_rate": 1e-3, "n_steps": 16}
_PPO = {**_ON_POLICY, "batch_size": 256, "n_epochs": 5}
# `gradient_steps` follow a step of all environments, which is `num_envs` transitions: with 64, a
# transition is used 32 times. More is slower and no better.
_OFF_POLICY = {
    "gamma": 1.0,
    "learning_rate": 1e-3,
    "learning_starts": 1000,
    "batch_size": 256,
    "train_freq": 1,
    "gradient_steps": 8,
}
# Actors without entropy follow a critic that knows nothing to the bounds, and from a saturated tanh
# they hardly return: a longer warm-up.
_DETERMINISTIC = {**_OFF_POLICY, "learning_starts": 5000}
# Per element, a reward of minus (scale * action)^2 and a temperature of 2 (scale * std)^2 balance
# at std: 8e-4 for the scale and std below. From the default of 1, noise would drown everything for
# the first thousands of updates.
_ENTROPY = {**_OFF_POLICY, "ent_coef": "auto_0.001"}
# Steps of the target are counted in transitions. Returns of whole episodes: what is seen of a state
# does not tell how it was reached, so that bootstrapped values would credit no earlier choice.
_Q = {
    **_OFF_POLICY,
    "learning_rate": 5e-4,
    "gradient_steps": 2,
    "n_steps": NUM_TIMES,
    "target_update_interval": 500,
    "exploration_fraction": 0.3,
    "exploration_final_eps": 0.05,
}

ALGORITHMS: dict[str, Recipe] = {
    "PPO": Recipe(
        "stable_baselines3.PPO",
        "The ratio is of all 64 elements together and moves with steps in units of std, so small "
        "noise is clipped early: 0.1 latent units, the most that leaves the baseline in sight.",
        _PPO,
        variants=(RESIDUAL, SCHEDULE),
        std=0.2,
    ),
    "A2C": Recipe(
        "stable_baselines3.A2C",
        "One update a batch, so batches of 4 steps of all environments; otherwise as PPO.",
        {**_ON_POLICY, "n_steps": 4},
        variants=(RESIDUAL, SCHEDULE),
        std=0.2,
    ),
    "TRPO": Recipe(
        "sb3_contrib.TRPO",
        "The trust region is stated for the whole action, and 64 elements share it: 0.05 in place "
        "of 0.01. A schedule goes from eight even choices to one, a divergence of 2: more and "
        "larger updates. learning_rate is the critic's.",
        {**_ON_POLICY, "batch_size": 256, "target_kl": 0.05},
        schedule_options={"n_steps": 4, "target_kl": 0.1},
        variants=(RESIDUAL, SCHEDULE),
        std=0.2,
    ),
    "RecurrentPPO": Recipe(
        "sb3_contrib.RecurrentPPO",
        "As PPO. The observation is the whole state, so that memory only costs.",
        _PPO,
        policy="MultiInputLstmPolicy",
        std=0.2,
    ),
    "MaskablePPO": Recipe(
        "sb3_contrib.MaskablePPO",
        "As PPO; it is told which times are valid, and so learns only about them.",
        _PPO,
        variants=(SCHEDULE,),
    ),
    "SAC": Recipe(
        "stable_baselines3.SAC",
        "Uniform warm-up and a tanh that saturates reach the bound, so the bound is small. The "
        "target entropy is that of the std: the default, -64, happens to mean 0.09.",
        _ENTROPY,
        std=0.1,
        scale=0.2,
    ),
    "TQC": Recipe(
        "sb3_contrib.TQC",
        "As SAC. Returns are deterministic given the action: quantiles have nothing to add but "
        "their pessimism.",
        _ENTROPY,
        std=0.1,
        scale=0.2,
    ),
    "CrossQ": Recipe(
        "sb3_contrib.CrossQ",
        "As SAC; it has no policy for dicts.",
        _ENTROPY,
        observation=FLAT,
        policy="MlpPolicy",
        std=0.1,
        scale=0.2,
    ),
    "TD3": Recipe(
        "stable_baselines3.TD3",
        "Bound as SAC. Smoothing noise of a fourth of the exploration, for the same reason: the "
        "default, 0.2, with 64 elements is a different action.",
        {**_DETERMINISTIC, "target_policy_noise": 0.05, "target_noise_clip": 0.1},
        std=0.2,
        scale=0.2,
    ),
    "DDPG": Recipe(
        "stable_baselines3.DDPG",
        "As TD3, which corrects overestimated targets: with one step there are none.",
        _DETERMINISTIC,
        std=0.2,
        scale=0.2,
    ),
    "DQN": Recipe(
        "stable_baselines3.DQN",
        "Times differ by less than tasks do, and a Q network that sees latents learns that noise: "
        "it gets times only. Rows explore together, see docs/upstream.md: long decay.",
        _Q,
        variants=(SCHEDULE,),
        observation=FLAT,
        policy="MlpPolicy",
        only_times=True,
    ),
    "QR-DQN": Recipe(
        "sb3_contrib.QRDQN",
        "As DQN; 25 quantiles, as its loss compares each with each and the default is 200.",
        {**_Q, "policy_kwargs": {"n_quantiles": 25}},
        variants=(SCHEDULE,),
        observation=FLAT,
        policy="MlpPolicy",
        only_times=True,
    ),
    "ARS": Recipe(
        "sb3_contrib.ARS",
        "A linear map of 4,864 weights, started at zero; delta_std moves actions by about 0.15. It "
        "has no policy for dicts. On schedules it could run too, but zero weights are its start, "
        "which there means the smallest steps.",
        {"n_delta": 16, "delta_std": 0.02, "learning_rate": 0.006},
        observation=FLAT,
        policy="LinearPolicy",
    ),
}


@dataclasses.dataclass
class Args:
    """Train an algorithm of Stable-Baselines3 or sb3-contrib."""

    algo: str = "PPO"
    """One of ALGORITHMS: PPO, A2C, TRPO, RecurrentPPO, MaskablePPO, SAC, TQC, CrossQ, TD3, DDPG,
    DQN, QR-DQN, ARS."""
    variant: str | None = None
    """residual or schedule; default: the algorithm's."""
    num_steps: int | None = None
    """Steps of the student; default 1 with residual, 4 with schedule."""
    total_timesteps: int = 50_000
    """Denoising steps of single trajectories."""
    num_envs: int = 64
    """Trajectories of a batch."""
    width: int = 256
    """Hidden units of each layer."""
    replay_gigabytes: float = 1.0
    """Most memory of a replay buffer."""
    bank_size: int = 2048
    """Training tasks."""
    num_held_out: int = 512
    """Validation tasks that the figures are measured on."""
    teacher: str = "digits"
    """Bundled teacher, or a diffusers folder."""
    seed: int = 0
    """Seed of training."""
    device: str = "cpu"
    """Device, such as cpu or cuda."""


def resolve(args: Args) -> tuple[Recipe, str]:
    """The algorithm's recipe and the variant.

    Raises:
        InvalidArgumentError: for unknown names, a variant that the algorithm does not take, or so
            few steps that no update would be made.
    """
    recipe = ALGORITHMS[check_choice("algo", args.algo, tuple(ALGORITHMS))]
    variant = check_choice("variant", args.variant or recipe.variants[0], recipe.variants)
    warm_up = recipe.options.get("learning_starts", 0)
    if check_integer("total_timesteps", args.total_timesteps, 1) <= warm_up:
        raise InvalidArgumentError(
            "total_timesteps", args.total_timesteps, f"pass more than the {warm_up} of the warm-up."
        )
    return recipe, variant


def env_options(variant: str, scale: float, teacher: Teacher, args: Args) -> dict[str, Any]:
    """Arguments of the environment that leave something to gain.

    The reward is minus the *sum* of squares, so that values are about 1. Residual: one step of the
    uniform grid, half of whose error a linear map of the noise can remove. Schedule: 8 times from
    0.85 T down, where good grids start; always `num_steps` of them, because they cost nothing.
    """
    noise = teacher.denoiser.schedule
    options: dict[str, Any] = {
        "teacher": teacher,
        "reward": f"{math.prod(teacher.denoiser.latent_shape)}*mse",
        "seed": args.seed,
    }
    num_steps = DEFAULT_STEPS[variant] if args.num_steps is None else args.num_steps
    if variant == RESIDUAL:
        return {**options, "schedule": "uniform", "num_steps": num_steps, "residual_scale": scale}
    times = noise.snap(torch.linspace(0.85 * noise.num_train_timesteps, 0, NUM_TIMES + 1))
    return {**options, "schedule": times, "min_steps": num_steps, "max_steps": num_steps}


def make_model(recipe: Recipe, env: VecEnv, args: Args) -> BaseAlgorithm:
    """The algorithm; with residual actions it starts at the few-step baseline."""
    module, _, name = recipe.path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    accepted = inspect.signature(kind).parameters
    residual = isinstance(env.action_space, spaces.Box)
    own = {} if residual else recipe.schedule_options
    options = {**recipe.options, **own, "seed": args.seed, "device": args.device}
    # A new dict each time: Stable-Baselines3 writes into it.
    policy_kwargs = {**options.pop("policy_kwargs", {}), **networks(recipe, args.width)}
    if residual and recipe.std is not None:
        dim = math.prod(env.action_space.shape)
        for target, more in zip(
            (options, policy_kwargs), exploration(accepted, recipe.std, dim), strict=True
        ):
            target.update(more)
    if "buffer_size" in accepted:
        options["buffer_size"] = replay_size(env, args.total_timesteps, args.replay_gigabytes)
    if "n_eval_episodes" in accepted:  # all rows of a batch, which are stepped anyway
        options["n_eval_episodes"] = env.num_envs
    model = kind(recipe.policy, env, policy_kwargs=policy_kwargs, **options)
    if residual and hasattr(model, "actor"):
        start_at_zero(model, recipe.std)
    return model


def networks(recipe: Recipe, width: int) -> dict[str, Any]:
    """Arguments of the policy: two hidden layers, the first of them `LatentFeatures` on dicts.

    One is enough for times.
    """
    if recipe.policy == "LinearPolicy":
        return {}
    if recipe.only_times:
        return {"net_arch": [width], "features_extractor_class": TimeFeatures}
    if recipe.observation == FLAT:
        return {"net_arch": [width, width]}
    return {
        "net_arch": [width],
        "features_extractor_class": LatentFeatures,
        "features_extractor_kwargs": {"features_dim": width},
    }


def exploration(
    accepted: Collection[str], std: float, dim: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a class, and of its policy, that let it explore with `std`.

    Args:
        accepted: Names of the arguments that the class takes.
        std: In units of the action.
        dim: Elements of an action.
    """
    if "target_entropy" in accepted:
        return {"target_entropy": gaussian_entropy(std, dim)}, {}
    if "action_noise" in accepted:
        return {"action_noise": NormalActionNoise(np.zeros(dim), np.full(dim, std))}, {}
    return {}, {"log_std_init": math.log(std)}


def gaussian_entropy(std: float, dim: int) -> float:
    """Differential entropy of `dim` independent Gaussians, `dim / 2 log(2 pi e std^2)`.

    Stable-Baselines3's default target, `-dim`, is that of a std of 0.089.
    """
    return dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))


@torch.no_grad()
def start_at_zero(model: Any, std: float | None) -> None:
    """Let an actor of the SAC or TD3 family start with zero actions, and `std` if it learns one.

    Their last layers are initialised like any other, unlike PPO's: the first actions would be far
    from the baseline, and a std of 1 fills the whole action space.
    """
    heads = [layer for layer in model.actor.mu.modules() if isinstance(layer, nn.Linear)][-1:]
    if hasattr(model.actor, "log_std"):
        heads.append(model.actor.log_std)
    for head, bias in zip(heads, (0.0, math.log(std or 1.0)), strict=False):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, bias)
    if hasattr(model, "actor_target"):
        model.actor_target.load_state_dict(model.actor.state_dict())


def replay_size(env: VecEnv, total_timesteps: int, gigabytes: float) -> int:
    """Transitions for the replay buffer: those of the run, or what fits into the memory.

    A transition holds two observations and an action, and three floats. Stable-Baselines3's default
    of a million would take 0.8 GB for 8x8 latents, and 37 for 32x32 in colour.
    """
    seen = env.observation_space.sample()
    parts = [*(seen.values() if isinstance(seen, dict) else [seen])] * 2
    nbytes = sum(np.asarray(part).nbytes for part in (*parts, env.action_space.sample())) + 12
    return max(env.num_envs, min(total_timesteps, int(gigabytes * 1e9) // nbytes))


def held_out_return(model: Any, env: VecEnv) -> float:
    """Mean return of the deterministic policy on the first N tasks, an episode each.

    Args:
        model: With memory or masks, or without.
        env: N rows, and at least as many tasks; rewards come at the end of an episode.
    """
    masked = "action_masks" in inspect.signature(model.predict).parameters
    env.set_options({"tasks": np.arange(env.num_envs)})
    observation, memory = env.reset(), None
    ended = np.ones(env.num_envs, bool)
    returns = np.full(env.num_envs, np.nan)
    while np.isnan(returns).any():
        masks = {"action_masks": get_action_masks(env)} if masked else {}
        actions, memory = model.predict(
            observation, memory, episode_start=ended, deterministic=True, **masks
        )
        observation, rewards, ended, _ = env.step(actions)
        returns = np.where(ended & np.isnan(returns), rewards, returns)
    return float(returns.mean())


def budget(model: BaseAlgorithm, env: VecEnv, total_timesteps: int) -> int:
    """What to pass to `learn`: ARS counts each step of N rows N times, see docs/upstream.md."""
    return total_timesteps * (env.num_envs if isinstance(model, ARS) else 1)


def main(args: Args) -> dict[str, Any]:
    """Train, print the figures, and return them.

    Returns:
        `algorithm`, `variant`, `seed`, `total_timesteps`; `baseline_return` and `final_return`,
        deterministic on held-out tasks: minus the sum of squared differences from the teacher, of
        the frozen student alone and of the trained policy; `seconds` of CPU time of training, which
        other work on the machine hardly changes.
    """
    recipe, variant = resolve(args)
    options = env_options(
        variant, recipe.scale, load_teacher(args.teacher, device=args.device), args
    )
    seen = recipe.observation
    env = make_sb3_env(
        args.num_envs, variant, seen, relative=True, bank_size=args.bank_size, **options
    )
    held_out = make_sb3_env(
        args.num_held_out, variant, seen, bank_size=args.num_held_out, split="validation", **options
    )
    model = make_model(recipe, env, args)
    started = time.process_time()
    model.learn(budget(model, env, args.total_timesteps))
    seconds = time.process_time() - started
    row = {
        "algorithm": args.algo,
        "variant": variant,
        "seed": args.seed,
        "total_timesteps": args.total_timesteps,
        "baseline_return": float(baseline_returns(held_out.env).mean()),
        "final_return": held_out_return(model, held_out),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    with plain_errors():
        main(require("tyro", "examples").cli(Args))
