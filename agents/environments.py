"""make_sb3_env: ReDiF's environments as Stable-Baselines3 wants them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gymnasium.vector import VectorEnv
from stable_baselines3.common.vec_env import VecEnv

from redif_env.errors import check_choice
from redif_env.schedule_env import ReDiFScheduleVectorEnv
from redif_env.vector_env import FREE, ReDiFVectorEnv
from redif_env.wrappers import FlatVectorObservation, RelativeReward

from .vec_env import TorchVecEnv

OBSERVATIONS = ("dict", "flat")


def make_sb3_env(
    num_envs: int,
    variant: str = "residual",
    observation: str = "dict",
    *,
    relative: bool = False,
    **env_kwargs: Any,
) -> VecEnv:
    """One batched environment for Stable-Baselines3: N trajectories share one teacher.

    Args:
        num_envs: N.
        variant: `"residual"`: the action corrects a frozen student on a fixed schedule, uniform
            unless `schedule` says otherwise; for SAC, TD3, TQC, CrossQ, ARS. `"joint"`: the action
            is the next latent and a schedule choice; for PPO, A2C, TRPO. `"schedule"`: a discrete
            choice of times; for MaskablePPO, DQN, QR-DQN.
        observation: `"dict"` for `MultiInputPolicy`; `"flat"` for `MlpPolicy`, which CrossQ and
            ARS need.
        relative: Whether to reward what is gained over the frozen student alone on the same task,
            see `redif_env.RelativeReward`; not with `"joint"`, which has none.
        env_kwargs: For `ReDiFVectorEnv` or, with `"schedule"`, `ReDiFScheduleVectorEnv`.

    Raises:
        InvalidArgumentError: for an unknown variant or observation, and as the environments do.
    """
    check_choice("variant", variant, tuple(_VARIANTS))
    check_choice("observation", observation, OBSERVATIONS)
    env = _VARIANTS[variant](num_envs, **env_kwargs)
    env = RelativeReward(env) if relative else env
    return TorchVecEnv(FlatVectorObservation(env) if observation == "flat" else env)


def _residual(num_envs: int, *, schedule: Any = "uniform", **options: Any) -> VectorEnv:
    return ReDiFVectorEnv(num_envs, schedule=schedule, residual=True, **options)


def _joint(num_envs: int, **options: Any) -> VectorEnv:
    return ReDiFVectorEnv(num_envs, schedule=FREE, **options)


_VARIANTS: dict[str, Callable[..., VectorEnv]] = {
    "residual": _residual,
    "joint": _joint,
    "schedule": ReDiFScheduleVectorEnv,
}
