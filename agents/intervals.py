r"""How sure a figure is: bootstrap intervals, Holm's correction, and what a difference means.

A resample draws N rows from N with replacement, and is kept as counts `(B, N)`: how often each row
was drawn. Figures that share rows (methods that answer the same tasks, the reference of all) are
given the same counts, so that a difference has the noise of a difference.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_integer, check_number

TOLERANCE = 0.1  # of the gap to the floor: less counts as a match


@dataclasses.dataclass(frozen=True)
class Interval:
    """A figure, and where its expectation lies.

    Attributes:
        estimate: The figure.
        low, high: Ends of the confidence interval.
    """

    estimate: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Draws:
    """A figure and its bootstrap distribution; the difference of two is one again.

    Attributes:
        estimate: The figure.
        values: Of resamples, float64 `(B,)`.
    """

    estimate: float
    values: Tensor

    @classmethod
    def of(cls, estimates: Tensor, values: Tensor, generator: torch.Generator) -> Draws:
        r"""Draws of the mean over S training seeds.

        A resample repeats rows, which biases distances (a Frechet distance of N samples is too
        large, and that of a resample is so once more). The values are therefore shifted so that
        their mean is the estimate: the interval is of the figure's expectation at *this* number of
        samples, which is why the floor must be measured with as many.

        What seeds add is drawn from :math:`s / \sqrt S` times Student's t with S - 1 degrees of
        freedom: resampling three seeds would give intervals that are far too short. A single seed
        adds nothing: the interval then says nothing of another training.

        Args:
            estimates: The figure of each seed, `(S,)`.
            values: Of resamples, the same for all seeds, `(S, B)`.
            generator: Of Student's t.
        """
        estimate, seeds = float(estimates.mean()), len(estimates)
        values = values.double().mean(0)
        values = values - values.mean() + estimate
        if seeds > 1:
            error = float(estimates.double().std()) / math.sqrt(seeds)
            values = values + error * student_t(len(values), seeds - 1, generator)
        return cls(estimate, values)

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.estimate - other.estimate, self.values - other.values)

    def interval(self, level: float = 0.95) -> Interval:
        """The percentile interval (Efron and Tibshirani 1993, section 13.3), of a level below 1."""
        tail = (1 - check_number("level", level, 1e-6, 1 - 1e-6)) / 2
        low, high = self.values.quantile(self.values.new_tensor([tail, 1 - tail])).tolist()
        return Interval(self.estimate, low, high)

    def p_value(self) -> float:
        """Of the hypothesis that the expectation is 0, two-sided: at least 2 / (B + 1).

        Twice the share of values beyond 0, with one added to both counts (Davison and Hinkley
        1997, eq. 4.11).
        """
        beyond = min(int((self.values <= 0).sum()), int((self.values >= 0).sum()))
        return min(1.0, 2 * (beyond + 1) / (len(self.values) + 1))


def resample(num_resamples: int, rows: int, generator: torch.Generator) -> Tensor:
    """How often each row is drawn, float64 `(num_resamples, rows)`; each sums to `rows`."""
    num_resamples = check_integer("num_resamples", num_resamples, 1)
    rows = check_integer("rows", rows, 2)
    device = generator.device
    counts = torch.zeros(num_resamples, rows, dtype=torch.float64, device=device)
    drawn = torch.randint(rows, (num_resamples, rows), generator=generator, device=device)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def student_t(num: int, degrees: int, generator: torch.Generator) -> Tensor:
    """Student's t: a normal over the root of a mean of `degrees` squared ones, float64 `(num,)`."""
    normals = torch.randn(
        degrees + 1, num, generator=generator, dtype=torch.float64, device=generator.device
    )
    return normals[0] / normals[1:].square().mean(0).sqrt()


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values (Holm 1979): reject those up to alpha, and any false one is found with
    probability alpha at most, however they depend on each other.

    Args:
        p_values: Of a family of m comparisons. Sorted, the i-th is multiplied by `m - i`, from 0,
            and none is left smaller than the one before.
    """
    order = _order(p_values)
    scaled = [min(1.0, (len(order) - rank) * p_values[index]) for rank, index in enumerate(order)]
    adjusted = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [adjusted[index] for index in range(len(order))]


def holm_levels(p_values: Sequence[float], level: float = 0.95) -> list[float]:
    """The level of each comparison's interval: it then excludes 0 where Holm's test rejects.

    The i-th smallest p-value is tested at `alpha / (m - i)`, and all from the first that is kept
    at that one's.
    """
    alpha, order = 1 - level, _order(p_values)
    levels, divisor, rejecting = [level] * len(order), len(order), True
    for rank, index in enumerate(order):
        divisor = len(order) - rank if rejecting else divisor
        rejecting = rejecting and p_values[index] <= alpha / divisor
        levels[index] = 1 - alpha / divisor
    return levels


def verdict(difference: Interval, gap: float | None, larger_is_better: bool = False) -> str:
    """What a difference, a method's figure less its rival's, shows.

    Args:
        difference: With its interval.
        gap: How far the rival is from the floor, of any sign; None where there is no floor.
        larger_is_better: Of the figure.

    Returns:
        `"better"` or `"worse"` where the interval excludes 0; `"matches"` where all of it lies
        within a tenth of the gap (so that few samples match nothing); else `"not shown"`.
    """
    if difference.low > 0 or difference.high < 0:
        return "better" if (difference.low > 0) == larger_is_better else "worse"
    largest = max(abs(difference.low), abs(difference.high))
    if gap is not None and largest <= TOLERANCE * abs(gap):
        return "matches"
    return "not shown"


def _order(p_values: Sequence[float]) -> list[int]:
    """Places of the p-values, smallest first."""
    for p in p_values:
        if not 0 <= p <= 1:
            raise InvalidArgumentError("p_values", p, "pass numbers in [0, 1].")
    return sorted(range(len(p_values)), key=p_values.__getitem__)
