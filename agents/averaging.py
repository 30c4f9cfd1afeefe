"""The moving average of a student's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def warm_decay(decay: float, updates: int) -> float:
    """The decay after so many updates, `min(decay, (1 + updates) / (10 + updates))`.

    Without it the average lags behind a fast start by `1 / (1 - decay)` updates; the formula is
    TensorFlow's `ExponentialMovingAverage`'s.
    """
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def update_average(
    averaged: Iterable[Tensor], trained: Iterable[Tensor], decay: float, updates: int
) -> None:
    """Move averaged weights a share `1 - decay` towards the trained ones, in place.

    Args:
        averaged: Weights of the average.
        trained: The same weights of what is trained.
        decay: In [0, 1]; reached after a warm-up.
        updates: Updates made so far, of which the average follows.
    """
    torch._foreach_lerp_(list(averaged), list(trained), 1 - warm_decay(decay, updates))
