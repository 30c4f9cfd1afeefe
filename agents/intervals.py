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
from scipy import optimize, special
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
    r"""A figure's distribution: resampled rows, and Student's t of training seeds.

    The difference of two is one again. Its distribution function averages over the resamples
    :math:`v_b`, so that no number of them limits how small a tail of seeds can be:

    .. math:: P(x) = \frac 1 B \sum_b T_\nu\Big(\frac{x - v_b}{e}\Big)

    Attributes:
        estimate: The figure.
        values: Of resamples, float64 `(B,)`.
        error: Standard error of the mean over seeds, e; 0 for one seed, NaN if a figure overflows.
        degrees: Of freedom of that error, :math:`\nu`.
    """

    estimate: float
    values: Tensor
    error: float = 0.0
    degrees: float = math.inf

    @classmethod
    def of(cls, estimates: Tensor, values: Tensor) -> Draws:
        r"""Draws of the mean over S training seeds.

        A resample repeats rows, which biases distances (a Frechet distance of N samples is too
        large, and that of a resample is so once more). The values are therefore shifted so that
        their mean is the estimate: the interval is of the figure's expectation at *this* number of
        samples, which is why the floor must be measured with as many.

        The error of seeds is :math:`s / \sqrt S` with S - 1 degrees of freedom: resampling three
        seeds would give intervals that are far too short. A single seed adds nothing: the interval
        then says nothing of another training.

        Args:
            estimates: The figure of each seed, `(S,)`.
            values: Of resamples, the same for all seeds, `(S, B)`.
        """
        estimate, seeds = float(estimates.mean()), len(estimates)
        values = values.double().mean(0)
        values = values - values.mean() + estimate
        if seeds == 1:
            return cls(estimate, values)
        error = float(estimates.double().std()) / math.sqrt(seeds)
        return cls(estimate, values, error, seeds - 1)

    def __sub__(self, other: Draws) -> Draws:
        r"""Of the difference; degrees of freedom are Welch's (1947).

        .. math:: \nu = \frac{(e_1^2 + e_2^2)^2}{e_1^4 / \nu_1 + e_2^4 / \nu_2}
        """
        squares = self.error**2, other.error**2
        spread = squares[0] ** 2 / self.degrees + squares[1] ** 2 / other.degrees
        return Draws(
            self.estimate - other.estimate,
            self.values - other.values,
            math.sqrt(sum(squares)),
            sum(squares) ** 2 / spread if spread > 0 else math.inf,
        )

    def interval(self, level: float = 0.95) -> Interval:
        """Between the quantiles of both tails, of a level below 1.

        Of one seed the percentile interval (Efron and Tibshirani 1993, section 13.3).
        """
        tail = (1 - check_number("level", level, 1e-6, 1 - 1e-6)) / 2
        return Interval(self.estimate, self._quantile(tail), self._quantile(1 - tail))

    def p_value(self) -> float:
        """Of the hypothesis that the expectation is 0, two-sided: at least 2 / (B + 1).

        Twice the smaller tail beyond 0, as a count of resamples with one added to it and to B
        (Davison and Hinkley 1997, eq. 4.11). Values that are no numbers, as of figures that
        overflow, count in both tails: they show nothing.
        """
        num = len(self.values)
        if self._has_seeds:
            below = num * self._share_below(0.0)
            tails = [below, num - below]
        else:
            tails = [num - float((side > 0).sum()) for side in (self.values, -self.values)]
        return min(1.0, 2 * (min(tails) + 1) / (num + 1))

    @property
    def _has_seeds(self) -> bool:
        """Whether to smooth by seeds: not one alone, nor what is no number."""
        return self.error > 0 and bool(self.values.isfinite().all())

    def _share_below(self, x: float) -> float:
        scaled = (x - self.values.cpu().numpy()) / self.error
        return float(special.stdtr(self.degrees, scaled).mean())

    def _quantile(self, share: float) -> float:
        if not self._has_seeds:
            return float(self.values.quantile(self.values.new_tensor(share)))
        # Each resample alone has its quantile here; that of all lies between the outermost two, and
        # a little more, since both functions are rounded.
        own = self.error * float(special.stdtrit(self.degrees, share))
        low = float(self.values.min()) + own - 1e-3 * self.error
        high = float(self.values.max()) + own + 1e-3 * self.error
        return float(optimize.brentq(lambda x: self._share_below(x) - share, low, high))


def resample(num_resamples: int, rows: int, generator: torch.Generator) -> Tensor:
    """How often each row is drawn, float64 `(num_resamples, rows)`; each sums to `rows`."""
    num_resamples = check_integer("num_resamples", num_resamples, 1)
    rows = check_integer("rows", rows, 2)
    device = generator.device
    counts = torch.zeros(num_resamples, rows, dtype=torch.float64, device=device)
    drawn = torch.randint(rows, (num_resamples, rows), generator=generator, device=device)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


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
    """The level of each comparison's interval: it excludes 0 wherever Holm's test rejects.

    The i-th smallest p-value is tested at `alpha / (m - i)`, and all from the first that is kept
    at that one's. An interval may exclude 0 a little earlier than the test rejects, because p is
    smoothed (see `Draws.p_value`).
    """
    alpha, order, adjusted = 1 - level, _order(p_values), holm(p_values)
    levels, divisor, rejecting = [level] * len(order), len(order), True
    for rank, index in enumerate(order):
        divisor = len(order) - rank if rejecting else divisor
        rejecting = rejecting and adjusted[index] <= alpha
        levels[index] = 1 - alpha / divisor
    return levels


def needed_resamples(comparisons: int, level: float = 0.95) -> int:
    """Resamples without which no p-value of a family can be small enough, `2 m / alpha - 1`.

    Args:
        comparisons: Of the family, m.
        level: Of the intervals, 1 - alpha.
    """
    return math.ceil(2 * check_integer("comparisons", comparisons, 0) / (1 - level)) - 1


def verdict(
    difference: Interval,
    p_holm: float,
    gap: float | None,
    larger_is_better: bool = False,
    level: float = 0.95,
) -> str:
    """What a difference, a method's figure less its rival's, shows.

    Args:
        difference: With its interval, of the level that Holm tests it at.
        p_holm: Its p-value, adjusted.
        gap: How far the rival is from the floor, of any sign; None where there is no floor.
        larger_is_better: Of the figure.
        level: 1 less what `p_holm` may be.

    Returns:
        `"better"` or `"worse"` where `p_holm` is at most 1 - level; `"matches"` where all of the
        interval lies within a tenth of the gap (so that few samples match nothing); else
        `"not shown"`.
    """
    if p_holm <= 1 - level:  # the interval then excludes 0
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
