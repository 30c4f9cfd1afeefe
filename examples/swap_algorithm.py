"""Any algorithm of Stable-Baselines3 and sb3-contrib, unmodified, in place of ReDiF's PPO.

`python examples/swap_algorithm.py --algo SAC`; `--help` lists the rest. `ALGORITHMS` says what each
algorithm is given, and why; docs/algorithms.md, which to choose.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sb3_contrib.common.maskable.utils import get_action_masks
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents import LatentFeatures, make_sb3_env
from redif_env import Teacher, TeacherBank, load_teacher
from redif_env.errors import InvalidArgumentError, check_choice, check_integer, require

RESIDUAL, SCHEDULE = "residual", "schedule"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an algorithm is used; plain data.

    Attributes:
        path: Of the class.
        why: What decided the options.
        options: Keyword arguments of the class.
        variants: Of `make_sb3_env`; the first is the default.
        observation: `"dict"` where the class has a policy for it.
        policy: Name of the policy.
        std: Exploration std in units of the action, which is in [-1, 1]; None where the algorithm
            explores by other means. See `exploration`.
    """

    path: str
    why: str
    options: dict[str, Any]
    variants: tuple[str, ...] = (RESIDUAL,)
    observation: str = "dict"
    policy: str = "MultiInputPolicy"
    std: float | None = None


# Episodes are one to four steps long, and only the last is rewarded: nothing is discounted.
_ON_POLICY = {"gamma": 1.0, "learning_rate": 1e-3, "n_steps": 16}
_PPO = {**_ON_POLICY, "batch_size": 256, "n_epochs": 10}
# A step of the batched environment is `num_envs` transitions; `gradient_steps` follow it.
_OFF_POLICY = {
    "gamma": 1.0,
    "learning_rate": 1e-3,
    "learning_starts": 5000,
    "batch_size": 256,
    "train_freq": 1,
    "gradient_steps": 16,
}
_SAC = {**_OFF_POLICY, "ent_coef": "auto_0.001"}
_TD3 = {**_OFF_POLICY}
_DQN = {
    **_OFF_POLICY,
    "learning_starts": 1000,
    "gradient_steps": 8,
    "target_update_interval": 1000,
    "exploration_fraction": 0.5,
    "exploration_final_eps": 0.05,
}
ALGORITHMS: dict[str, Recipe] = {
    "PPO": Recipe("stable_baselines3.PPO", "", _PPO, (RESIDUAL, SCHEDULE), std=0.1),
    "A2C": Recipe("stable_baselines3.A2C", "", {**_ON_POLICY, "n_steps": 4}, (RESIDUAL, SCHEDULE), std=0.1),
    "TRPO": Recipe("sb3_contrib.TRPO", "", {**_ON_POLICY, "batch_size": 256, "target_kl": 0.05}, (RESIDUAL, SCHEDULE), std=0.1),
    "RecurrentPPO": Recipe("sb3_contrib.RecurrentPPO", "", _PPO, policy="MultiInputLstmPolicy", std=0.1),
    "MaskablePPO": Recipe("sb3_contrib.MaskablePPO", "", _PPO, (SCHEDULE,)),
    "SAC": Recipe("stable_baselines3.SAC", "", _SAC, std=0.1),
    "TQC": Recipe("sb3_contrib.TQC", "", _SAC, std=0.1),
    "CrossQ": Recipe("sb3_contrib.CrossQ", "", _SAC, observation="flat", policy="MlpPolicy", std=0.1),
    "TD3": Recipe("stable_baselines3.TD3", "", {**_TD3, "target_policy_noise": 0.05, "target_noise_clip": 0.1}, std=0.1),
    "DDPG": Recipe("stable_baselines3.DDPG", "", _TD3, std=0.1),
    "DQN": Recipe("stable_baselines3.DQN", "", _DQN, (SCHEDULE,)),
    "QR-DQN": Recipe("sb3_contrib.QRDQN", "", _DQN, (SCHEDULE,)),
    "ARS": Recipe("sb3_contrib.ARS", "", {"n_delta": 8, "n_eval_episodes": 64}, (RESIDUAL, SCHEDULE), "flat", "LinearPolicy"),
}


@dataclasses.dataclass
class Args:
    """Train an algorithm of Stable-Baselines3 or sb3-contrib."""

    algo: str = "PPO"
    variant: str | None = None
    num_steps: int | None = None
    total_timesteps: int = 50_000
    num_envs: int = 64
    width: int = 256
    replay_gigabytes: float = 1.0
    bank_size: int = 2048
    num_held_out: int = 512
    teacher: str = "digits"
    seed: int = 0
    device: str = "cpu"


def resolve(args: Args) -> tuple[Recipe, str]:
    """The algorithm's recipe and variant.

    Raises:
        InvalidArgumentError: for names that do not exist, or do not go together.
    """
    recipe = ALGORITHMS[check_choice("algo", args.algo, tuple(ALGORITHMS))]
    variant = check_choice("variant", args.variant or recipe.variants[0], recipe.variants)
    starts = recipe.options.get("learning_starts", 0)
    if args.total_timesteps <= starts:
        raise InvalidArgumentError(
            "total_timesteps", args.total_timesteps, f"pass more than {starts=}: before, nothing is learnt."
        )
    return recipe, variant


def env_options(variant: str, teacher: Teacher, num_steps: int | None) -> dict[str, Any]:
    """Arguments of the environment that leave something to gain, and rewards of a sane size."""
    dim = math.prod(teacher.denoiser.latent_shape)
    options: dict[str, Any] = {"reward": f"{dim}*mse"}
    if variant == RESIDUAL:
        return {**options, "schedule": "uniform", "num_steps": num_steps or 2, "residual_scale": 0.2}
    start = 0.85 * teacher.denoiser.schedule.num_train_timesteps
    return {**options, "schedule": np.linspace(start, 0, 9).round(), "min_steps": num_steps or 4, "max_steps": num_steps or 4}


def make_model(recipe: Recipe, env: VecEnv, args: Args) -> BaseAlgorithm:
    """The algorithm as its recipe says, starting from the few-step baseline."""
    module, _, name = recipe.path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    accepted = inspect.signature(kind).parameters
    options = {**recipe.options, "seed": args.seed, "device": args.device}
    options["policy_kwargs"] = {} if recipe.policy == "LinearPolicy" else {"net_arch": [args.width]}
    if recipe.observation == "dict":
        options["policy_kwargs"] |= {"features_extractor_class": LatentFeatures, "features_extractor_kwargs": {"features_dim": args.width}}
    if "buffer_size" in accepted:
        options["buffer_size"] = replay_size(env, args.total_timesteps, args.replay_gigabytes)
    if recipe.std is not None:
        explore(options, recipe.std, env, accepted)
    model = kind(recipe.policy, env, **options)
    if recipe.std is not None and hasattr(model, "actor"):
        start_at_zero(model, recipe.std)
    return model


def explore(options, std, env, accepted):
    dim = math.prod(env.action_space.shape)
    if "target_entropy" in accepted:
        options["target_entropy"] = gaussian_entropy(std, dim)
    elif "action_noise" in accepted:
        options["action_noise"] = NormalActionNoise(np.zeros(dim), np.full(dim, std))
    else:
        options["policy_kwargs"]["log_std_init"] = math.log(std)


def gaussian_entropy(std: float, dim: int) -> float:
    return dim * (0.5 * math.log(2 * math.pi * math.e) + math.log(std))


@torch.no_grad()
def start_at_zero(model, std):
    actor = model.actor
    mu = [m for m in actor.mu.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(mu.weight)
    nn.init.zeros_(mu.bias)
    if hasattr(actor, "log_std"):
        nn.init.zeros_(actor.log_std.weight)
        nn.init.constant_(actor.log_std.bias, math.log(std))
    target = getattr(model, "actor_target", None)
    if target is not None:
        target.load_state_dict(actor.state_dict())


def replay_size(env, total_timesteps, gigabytes):
    seen = env.observation_space.sample()
    parts = list(seen.values()) if isinstance(seen, dict) else [seen]
    action = np.asarray(env.action_space.sample()).nbytes
    size = 2 * sum(np.asarray(part).nbytes for part in parts) + action + 3 * 4
    return max(env.num_envs, min(total_timesteps, int(gigabytes * 1e9 / size)))


Choose = Callable[[Any, np.ndarray], np.ndarray]


def held_out_return(env: VecEnv, choose: Choose) -> float:
    """Mean return of one episode from each of the first N tasks of the bank."""
    env.set_options({"tasks": np.arange(env.num_envs)})
    observation = env.reset()
    ended = np.ones(env.num_envs, bool)
    returns = np.full(env.num_envs, np.nan)
    while np.isnan(returns).any():
        observation, rewards, ended, _ = env.step(choose(observation, ended))
        returns = np.where(np.isnan(returns) & ended, rewards, returns)
    return float(returns.mean())


def baseline(env: VecEnv) -> Choose:
    """zero or uniform"""
    if hasattr(env.action_space, "n"):
        num, steps = int(env.action_space.n), env.get_attr("max_steps")[0]
        plan = iter([round(num * (k + 1) / steps) - 1 for k in range(steps)])
        return lambda *_: np.full(env.num_envs, next(plan))
    return lambda *_: np.zeros((env.num_envs, *env.action_space.shape), np.float32)


def deterministic(model: Any, env: VecEnv) -> Choose:
    state = None
    masked = "action_masks" in inspect.signature(model.predict).parameters

    def choose(observation: Any, episode_start: np.ndarray) -> np.ndarray:
        nonlocal state
        masks = {"action_masks": get_action_masks(env)} if masked else {}
        actions, state = model.predict(observation, state, episode_start, deterministic=True, **masks)
        return actions

    return choose


def main(args: Args) -> dict[str, Any]:
    """Train, and return the figures."""
    recipe, variant = resolve(args)
    teacher = load_teacher(args.teacher)
    options = env_options(variant, teacher, args.num_steps)
    make = functools.partial(make_sb3_env, variant=variant, observation=recipe.observation, teacher=teacher, seed=args.seed, **options)
    env = make(args.num_envs, bank_size=args.bank_size)
    inner = env.env.unwrapped
    grid = inner.timesteps
    if grid is None:
        num, steps = len(inner.candidates), inner.max_steps
        grid = inner.process.candidates[[0] + [round(num * (k + 1) / steps) for k in range(steps)]]
    from redif_env.wrappers import RelativeReward
    from agents import TorchVecEnv
    env = TorchVecEnv(RelativeReward(env.env, grid))
    held_out = make(args.num_held_out, bank_size=args.num_held_out, split="validation")
    model = make_model(recipe, env, args)
    before = held_out_return(held_out, baseline(held_out))
    started = time.monotonic()
    model.learn(args.total_timesteps, callback=globals().get("CALLBACK", lambda *a: None)(model, held_out))
    row = {
        "algorithm": args.algo,
        "variant": variant,
        "seed": args.seed,
        "baseline_return": before,
        "final_return": held_out_return(held_out, deterministic(model, held_out)),
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(row))
    return row


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
