"""Figures of samples against a reference, as functions of how often each row counts.

A `Statistic` takes counts of the samples `(B, N)` and of the reference `(B, M)`, float64, and gives
the figure of each of B resamples, float64 `(B,)`; counts of 1 give the figure itself. Everything
that does not depend on counts (kernels, neighbours, sorting) is computed once.

Pairs of all rows take memory that grows with N M. These figures look at the first
`MAX_PAIRWISE` rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_integer
from redif_env.rewards.distributional import Kernel

from . import frechet
from .diversity import balance, lies_in

Statistic = Callable[[Tensor, Tensor], Tensor]

MAX_PAIRWISE = 4000
CHUNK = 2**17  # numbers of resamples that are worked on at once: what fits a processor's cache


def estimate(statistic: Statistic, num: int, num_reference: int, device: torch.device) -> Tensor:
    """The figure itself, of N samples and M reference rows, a float64 scalar."""
    ones = [
        torch.ones(1, rows, dtype=torch.float64, device=device) for rows in (num, num_reference)
    ]
    return statistic(*ones)[0]


def mean(values: Tensor) -> Statistic:
    """The mean of a number a sample, `(N,)`."""
    column = values.double()
    return lambda counts, _: counts @ column / counts.sum(1)


def frechet_distance(samples: Tensor, reference: Tensor) -> Statistic:
    """See `frechet`; of features `(N, F)` and `(M, F)`."""
    rows = max(len(samples), len(reference), samples.shape[1])
    size = max(1, CHUNK // (rows * samples.shape[1]))

    def statistic(counts: Tensor, reference_counts: Tensor) -> Tensor:
        parts = zip(counts.split(size), reference_counts.split(size), strict=True)
        return torch.cat(
            [
                frechet.distance(frechet.moments(samples, own), frechet.moments(reference, other))
                for own, other in parts
            ]
        )

    return statistic


def discrepancy(kernel: Kernel, samples: Tensor, reference: Tensor) -> Statistic:
    """The unbiased squared discrepancy of `redif_env.rewards.distributional`, with counts.

    Pairs of a row with its own copy in a resample are left out, as those of a row with itself are:
    they would make resamples look more alike among themselves than draws are.

    Args:
        kernel: Of features: `polynomial_kernel` gives the kernel inception distance.
        samples: Features `(N, F)`.
        reference: Features `(M, F)`.
    """
    x, y = (rows[:MAX_PAIRWISE].double() for rows in (samples, reference))
    among_x, among_y, across = kernel(x, x), kernel(y, y), kernel(x, y)

    def statistic(counts: Tensor, reference_counts: Tensor) -> Tensor:
        own, other = counts[:, : len(x)], reference_counts[:, : len(y)]
        between = _weighted(across, own, other) / (own.sum(1) * other.sum(1))
        return _among(among_x, own) + _among(among_y, other) - 2 * between

    return statistic


def _weighted(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`rows_b . matrix . columns_b` of each b, `(B,)`."""
    return ((rows @ matrix) * columns).sum(1)


def _among(matrix: Tensor, counts: Tensor) -> Tensor:
    """Mean of a symmetric matrix over pairs of different rows, `(B,)`."""
    squares = counts.square()
    pairs = counts.sum(1).square() - squares.sum(1)
    return (_weighted(matrix, counts, counts) - squares @ matrix.diagonal()) / pairs


def neighbourhoods(samples: Tensor, reference: Tensor, k: int) -> dict[str, Statistic]:
    """Precision, recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Precision and density ask whether samples lie among the reference: the share in any of its
    balls (see `diversity.lies_in`), and the number of balls that hold one, over k. Recall is the
    share of the reference in any ball of the samples, coverage the share of its balls that hold a
    sample. Resamples keep the balls; a ball, or a sample, counts while it is drawn.

    Args:
        samples: Features `(N, F)`.
        reference: Features `(M, F)`.
        k: Neighbours that a ball reaches to.

    Returns:
        `precision`, `recall`, `density` and `coverage`.
    """
    samples, reference = samples[:MAX_PAIRWISE], reference[:MAX_PAIRWISE]
    held = lies_in(samples, reference, k).double()
    holding = lies_in(reference, samples, k).double()

    def weights(counts: Tensor, reference_counts: Tensor) -> tuple[Tensor, Tensor]:
        return counts[:, : len(samples)], reference_counts[:, : len(reference)]

    def precision(counts: Tensor, reference_counts: Tensor) -> Tensor:
        own, other = weights(counts, reference_counts)
        return _share_touching(own, other, held)

    def recall(counts: Tensor, reference_counts: Tensor) -> Tensor:
        own, other = weights(counts, reference_counts)
        return _share_touching(other, own, holding)

    def density(counts: Tensor, reference_counts: Tensor) -> Tensor:
        own, other = weights(counts, reference_counts)
        scale = len(reference) / (k * own.sum(1) * other.sum(1))
        return scale * _weighted(held, own, other)

    def coverage(counts: Tensor, reference_counts: Tensor) -> Tensor:
        own, other = weights(counts, reference_counts)
        return _share_touching(other, own, held.T)

    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}


def _share_touching(rows: Tensor, others: Tensor, touching: Tensor) -> Tensor:
    """Share of rows, counted, that touch any other that was drawn, `(B,)`.

    Args:
        rows, others: Counts, `(B, N)` and `(B, M)`.
        touching: 0 or 1, `(N, M)`.
    """
    hit = (others @ touching.T > 0).double()
    return (rows * hit).sum(1) / rows.sum(1)


def class_balance(labels: Tensor, reference: Tensor) -> Statistic:
    """`diversity.label_balance` of labels `(N,)` and `(M,)`, int64; larger is better."""
    num = int(torch.cat([labels, reference]).max()) + 1
    own, other = (torch.nn.functional.one_hot(each, num).double() for each in (labels, reference))

    def statistic(counts: Tensor, reference_counts: Tensor) -> Tensor:
        shares = counts @ own / counts.sum(1, keepdim=True)
        targets = reference_counts @ other / reference_counts.sum(1, keepdim=True)
        return balance(shares, targets)

    return statistic


def sliced_wasserstein(
    samples: Tensor, reference: Tensor, num_directions: int = 64, seed: int = 0
) -> Statistic:
    r"""The mean Wasserstein-1 distance of projections on random directions (Bonneel et al. 2015).

    In one dimension it is :math:`\int |F - G|` of the distribution functions, exactly, for any
    number of rows. For rows of zero mean and unit scale it is of order 1 in any dimension.

    Args:
        samples: Points `(N, F)`; flattened, if they have more axes.
        reference: Points `(M, F)`.
        num_directions: Unit vectors, the same for all that is compared.
        seed: Of the directions.
    """
    check_integer("num_directions", num_directions, 1)
    x, y = samples.flatten(1).double(), reference.flatten(1).double()
    if x.shape[1] != y.shape[1]:
        raise InvalidArgumentError(
            "reference", f"{y.shape[1]} elements a row", f"pass rows of {x.shape[1]}."
        )
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(num_directions, x.shape[1], generator=generator, dtype=torch.float64)
    directions = torch.nn.functional.normalize(directions, dim=1).to(x.device)
    places, order = (torch.cat([x, y]) @ directions.T).sort(dim=0)
    gaps = places.diff(dim=0)
    size = max(1, CHUNK // len(order))

    def distance(signed: Tensor) -> Tensor:
        """Of masses less the reference's, `(N + M, B)`."""
        total = torch.zeros_like(signed[0])
        for own_order, own_gaps in zip(order.T, gaps.T, strict=True):
            total += own_gaps @ signed[own_order].cumsum(0)[:-1].abs_()
        return total / num_directions

    def statistic(counts: Tensor, reference_counts: Tensor) -> Tensor:
        mass = counts / counts.sum(1, keepdim=True)
        other = reference_counts / reference_counts.sum(1, keepdim=True)
        signed = torch.cat([mass, -other], dim=1)
        return torch.cat([distance(part.T.contiguous()) for part in signed.split(size)])

    return statistic
