"""ReDiF: distilling diffusion models as a reinforcement-learning environment.

Importing this package registers `ReDiF-v0` and `ReDiFSchedule-v0`, and loads neither torch nor
diffusers: the names below are imported when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium

__version__ = "0.1.0"

_NAMES = {
    "Codec": "codec",
    "Conditions": "conditions",
    "Decoded": "rewards",
    "Denoiser": "denoiser",
    "EDMNetwork": "adapters",
    "FlatVectorObservation": "wrappers",
    "MSE": "rewards",
    "PSNR": "rewards",
    "SSIM": "rewards",
    "CompressedSize": "rewards",
    "Cosine": "rewards",
    "KernelSolver": "solvers",
    "Label": "rewards",
    "NoiseSchedule": "noise",
    "OnnxNetwork": "onnx_graph",
    "ReDiFEnv": "env",
    "ReDiFError": "errors",
    "ReDiFScheduleEnv": "schedule_env",
    "ReDiFScheduleVectorEnv": "schedule_env",
    "ReDiFVectorEnv": "vector_env",
    "RelativeReward": "wrappers",
    "MapReward": "rewards",
    "Reward": "rewards",
    "ScoreNetwork": "adapters",
    "SigmaNetwork": "adapters",
    "Teacher": "teacher",
    "TeacherBank": "teacher",
    "TimeNetwork": "adapters",
    "TimeScoreNetwork": "adapters",
    "baseline_returns": "wrappers",
    "check_reward": "rewards",
    "check_vector_env": "checker",
    "load_denoiser": "loading",
    "load_teacher": "loading",
    "register_reward": "rewards",
}

__all__ = sorted([*_NAMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


gymnasium.register(
    id="ReDiF-v0",
    entry_point="redif_env.env:ReDiFEnv",
    vector_entry_point="redif_env.vector_env:ReDiFVectorEnv",
)
gymnasium.register(
    id="ReDiFSchedule-v0",
    entry_point="redif_env.schedule_env:ReDiFScheduleEnv",
    vector_entry_point="redif_env.schedule_env:ReDiFScheduleVectorEnv",
)
