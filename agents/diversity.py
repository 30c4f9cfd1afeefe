r"""How much of the teacher's variety a student keeps: recall, coverage, and balance of labels.

All are judged in blocks of rows, so that a change between two evaluations on the same tasks can be
compared with its own noise: the mean of a figure's blocks is the figure, and their spread gives its
standard error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_integer
from redif_env.rewards.distributional import distances

from .evaluation import Judge


def radii(features: Tensor, k: int) -> Tensor:
    """Distance of each row `(N, F)` to its k-th nearest other row, float32 `(N,)`.

    Raises:
        InvalidArgumentError: unless there are more than `k` rows.
    """
    if len(features) <= check_integer("k", k, 1):
        raise InvalidArgumentError("k", k, f"pass less than the number of rows, {len(features)}.")
    # The nearest of all is the row itself.
    return distances(features, features).kthvalue(k + 1, dim=1).values


def lies_in(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """Which balls hold which points, bool `(N, M)`.

    Args:
        points: Features `(N, F)`.
        centres: Of the balls, features `(M, F)`; each reaches to its k-th nearest other centre.
        k: Neighbours.
    """
    return distances(points, centres) <= radii(centres, k)


def recalled(samples: Tensor, reference: Tensor, k: int) -> Tensor:
    """Which reference rows lie among the samples (Kynkaanniemi et al. 2019, eq. 2).

    A row does if it is no further from some sample than that sample's k-th nearest other sample.

    Args:
        samples: Features `(N, F)`.
        reference: Features `(M, F)`.
        k: Neighbours.

    Returns:
        float32 `(M,)`, 0 or 1; the mean is the recall.
    """
    return lies_in(reference, samples, k).any(1).float()


def covered(samples: Tensor, reference: Tensor, k: int) -> Tensor:
    """Which reference rows have a sample near them (Naeem et al. 2020, eq. 8).

    Near is within the distance of the k-th nearest other reference row; arguments as for
    `recalled`. Unlike recall it cannot be raised by a few samples that lie far out.

    Returns:
        float32 `(M,)`, 0 or 1; the mean is the coverage.
    """
    return lies_in(samples, reference, k).any(0).float()


def label_balance(labels: Tensor, reference: Tensor) -> Tensor:
    """1 minus the total variation distance between two sets of labels, in [0, 1], a scalar.

    Args:
        labels: int64 `(N,)`.
        reference: int64 `(M,)`, such as the labels of the teacher's answers.
    """
    num = int(torch.cat([labels, reference]).max()) + 1
    shares = [torch.bincount(each, minlength=num) / len(each) for each in (labels, reference)]
    return balance(shares[0], shares[1])


def balance(shares: Tensor, reference: Tensor) -> Tensor:
    """1 minus the total variation distance between shares `(..., classes)`, in [0, 1], `(...)`."""
    return 1 - 0.5 * (shares - reference).abs().sum(-1)


def block_means(values: Tensor, blocks: int) -> Tensor:
    """Means of neighbouring rows `(N,)`, float64 `(blocks,)`; what does not fill a block is left.

    Raises:
        InvalidArgumentError: unless there is a row a block.
    """
    size = len(values) // blocks
    if not size:
        raise InvalidArgumentError("blocks", blocks, f"pass at most {len(values)}, one row each.")
    return values[: size * blocks].double().reshape(blocks, size).mean(1)


def balance_blocks(labels: Tensor, reference: Tensor, blocks: int) -> Tensor:
    r"""Jackknife pseudo-values of `label_balance` over blocks of rows, float64 `(blocks,)`.

    :math:`B \theta - (B - 1) \theta_{-b}` (Tukey 1958): the balance is no mean over rows, but
    these behave as if it were. Block b holds row b of both, so both have the same number of rows.
    """
    size = len(labels) // blocks
    labels, reference = labels[: size * blocks], reference[: size * blocks]
    whole = label_balance(labels, reference).double()
    kept = ~torch.eye(blocks, dtype=torch.bool, device=labels.device).repeat_interleave(size, 1)
    without = [label_balance(labels[row], reference[row]).double() for row in kept]
    return blocks * whole - (blocks - 1) * torch.stack(without)


@torch.no_grad()
def judged_quality(
    judge: Judge,
    samples: Tensor,
    answers: Tensor,
    reference: Tensor,
    condition: Tensor | None,
    *,
    blocks: int = 16,
    k: int = 5,
) -> dict[str, Tensor]:
    """The student's quality in the judge's eyes, each figure in blocks.

    Args:
        judge: Whose features and labels to use; no reward may see them.
        samples: `x_0` of the student, `(N, C, H, W)`.
        answers: The teacher's, to the same tasks.
        reference: The teacher's, to other tasks, `(M, C, H, W)`: recall and coverage of these.
        condition: Classes `(N,)`, or None.
        blocks: Number of blocks, B.
        k: Neighbours of recall and coverage.

    Returns:
        `recall`, `coverage`, `label_balance` and, with classes, `label_agreement`; float64 `(B,)`
        each, larger is better.
    """
    features, targets = judge(samples), judge(reference)
    labels, wanted = (judge.logits(images).argmax(1) for images in (samples, answers))
    quality = {
        "recall": block_means(recalled(features, targets, k), blocks),
        "coverage": block_means(covered(features, targets, k), blocks),
        "label_balance": balance_blocks(labels, wanted, blocks),
    }
    if condition is not None:
        quality["label_agreement"] = block_means((labels == condition).float(), blocks)
    return quality


def significance(change: Tensor) -> float:
    """Mean of paired changes `(B,)` over its standard error: a t statistic, B - 1 degrees.

    Infinite where all changes are the same and not 0.
    """
    mean = float(change.double().mean())
    error = float(change.double().std()) / math.sqrt(len(change))
    if error == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / error
