"""When training must stop, or take smaller bites.

Ratios that are wrong from the start and updates that make no sense end it; what the device has no
room for at once is asked in parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from redif_env.errors import ReDiFError

from .policies import StudentPolicy

# Root-mean-square log-ratio an element before the first update. float32 on different batch sizes
# gives about 1e-5; active dropout, another guidance scale or mixed dtypes give 0.1 and more.
RATIO_TOLERANCE = 1e-2
MAX_SKIPPED = 3  # updates in a row that may have no finite loss or gradient
Answer = TypeVar("Answer")


class RatioError(ReDiFError, RuntimeError):
    """The policy no longer gives the probabilities it acted with, before any update was made."""


class TrainingDivergedError(ReDiFError, RuntimeError):
    """Several updates in a row had a loss or gradient that is not finite."""


def check_ratio(error: Tensor) -> None:
    """Before the first update of an iteration the ratio is 1, or the gradient is biased.

    Args:
        error: Root-mean-square log-ratio an element.
    """
    value = float(error)
    if not value <= RATIO_TOLERANCE:
        raise RatioError(
            f"before the first update the root-mean-square log-ratio is {value:.3g}, not 0: "
            "the update does not see the policy that acted. Usual causes: dropout or batch "
            "normalisation in training mode, another dtype or autocast in the update than in "
            "the rollout, another guidance scale, or weights changed by a callback."
        )


def check_skipped(in_a_row: int) -> None:
    """Give up after a few updates in a row that could not be taken."""
    if in_a_row >= MAX_SKIPPED:
        raise TrainingDivergedError(
            f"{MAX_SKIPPED} updates in a row had a loss or gradient that is not finite. Lower "
            "learning_rate, raise min_std (log-ratios grow with its inverse), set "
            "advantage_clip=5, or check that the reward is finite."
        )


def within_memory(agent: Any, work: Callable[[], Answer], num_rows: int) -> Answer:
    """What `work` returns; where it runs out of memory, done anew with half the rows at once.

    Args:
        agent: A `ReDiFPPO`, whose `micro_batch_size` is halved then.
        work: Asks the network about `num_rows` rows, `micro_batch_size` at once; may be called
            again as if it had never been before.
        num_rows: The rows.
    """
    policy = agent.policy
    if not isinstance(policy, StudentPolicy) or policy.sharded:  # others would wait for more
        return work()
    while True:
        counts = policy.network_evaluations
        try:
            return work()
        except torch.OutOfMemoryError:
            size = min(agent.micro_batch_size or num_rows, num_rows)
            if size == 1:
                raise
        # Not in the except clause: the error's traceback holds on to all activations.
        policy.network_evaluations = counts
        agent.micro_batch_size = (size + 1) // 2
        policy.set_batch_size(agent.micro_batch_size)
        warnings.warn(
            f"out of memory: goes on with micro_batch_size={agent.micro_batch_size}, which "
            "changes speed, not what is learned. Pass it to start with.",
            stacklevel=2,
        )
