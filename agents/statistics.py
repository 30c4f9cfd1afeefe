"""What a rollout reports to Stable-Baselines3 without leaving the device."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from redif_env import parallel


class HostView:
    """A tensor for callbacks: an array once somebody looks, and no transfer until then."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.tensor.cpu().numpy(), dtype)


class EpisodeStatistics:
    """Means over the episodes of a rollout, summed on the device: return, length, reward terms."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.terms: list[str] = []
        self.sums: Tensor | None = None

    def add(self, infos: Mapping[str, Any]) -> None:
        """Account for the episodes that ended in a step, from the environment's infos."""
        if "episode" not in infos:
            return
        ended, episode = infos["_episode"], infos["episode"]
        terms = infos.get("reward_terms", {})
        self.terms = list(terms)
        parts = torch.stack([ended, episode["r"], episode["l"], *terms.values()])
        sums = torch.where(ended, parts, 0.0).sum(1)
        self.sums = sums if self.sums is None else self.sums + sums

    def record(self, buffer: Any, logger: Logger) -> None:
        """Leave the means alone in Stable-Baselines3's episode buffer; log the reward's terms.

        Its log is of the mean over the buffer: of this iteration then, not of a hundred.
        """
        count, *sums = [0.0] if self.sums is None else parallel.total(self.sums).tolist()
        if not count:
            return
        returns, length, *terms = (part / count for part in sums)
        buffer.clear()
        buffer.append({"r": returns, "l": length, "t": time.monotonic() - self.started})
        for name, mean in zip(self.terms, terms, strict=True):
            logger.record(f"rollout/reward/{name}", mean)
