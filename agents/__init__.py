"""Agents for ReDiF: PPO for denoising on Stable-Baselines3, evaluation and export.

Names are imported when first used, so that `import agents` stays light.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "BatchedTRPO": "trpo",
    "Judge": "evaluation",
    "LatentFeatures": "features",
    "ReDiFPPO": "ppo",
    "StudentPolicy": "policies",
    "TimeFeatures": "features",
    "TorchRolloutBuffer": "buffers",
    "TorchVecEnv": "vec_env",
    "distill": "distillation",
    "export_student": "export",
    "make_sb3_env": "environments",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
