"""What a rollout reports to Stable-Baselines3 without leaving the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


class HostView:
    """A tensor for callbacks: an array once somebody looks, and no transfer until then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.tensor.cpu().numpy(), dtype)


class EpisodeStatistics:
    """Mean return and length of the episodes of a rollout, summed on the device."""

    def __init__(self, device: torch.device) -> None:
        self.started = time.monotonic()
        self.sums = torch.zeros(3, device=device)

    def add(self, infos: Mapping[str, Any]) -> None:
        """Account for the episodes that ended in a step, from the environment's infos."""
        if "episode" not in infos:
            return
        ended, episode = infos["_episode"], infos["episode"]
        parts = (torch.where(ended, episode[name], 0).sum() for name in ("r", "l"))
        self.sums += torch.stack([*parts, ended.sum()])

    def record(self, buffer: Any) -> None:
        """Append the means to Stable-Baselines3's episode buffer."""
        returns, length, count = (float(part) for part in self.sums.unbind())
        if count:
            elapsed = time.monotonic() - self.started
            buffer.append({"r": returns / count, "l": length / count, "t": elapsed})
