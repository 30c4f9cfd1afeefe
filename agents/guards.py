"""When training must stop: ratios that are wrong from the start, and updates that make no sense."""

from __future__ import annotations

from torch import Tensor

from redif_env.errors import ReDiFError

# Root-mean-square log-ratio an element before the first update. float32 on different batch sizes
# gives about 1e-5; active dropout, another guidance scale or mixed dtypes give 0.1 and more.
RATIO_TOLERANCE = 1e-2
MAX_SKIPPED = 3  # updates in a row that may have no finite loss or gradient


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
