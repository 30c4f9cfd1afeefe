r"""The Frechet distance between two sets of features, for resamples too.

With means :math:`\mu` and covariances :math:`\Sigma` (Heusel et al. 2017, eq. 6)

.. math:: |\mu_x - \mu_y|^2 + \mathrm{tr}\,(\Sigma_x + \Sigma_y - 2 (\Sigma_x \Sigma_y)^{1/2}).

The product has the eigenvalues of :math:`\Sigma_y^{1/2} \Sigma_x \Sigma_y^{1/2}`, which is
symmetric, so that no root of a general matrix is needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Mean `(F,)` and covariance `(F, F)` of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, counts: Tensor | None = None) -> Moments:
    """Unbiased moments of features `(N, F)`, each row as often as `counts` `(N,)` says."""
    features = features.double()
    if counts is None:
        counts = torch.ones_like(features[:, 0])
    total = counts.sum()
    mean = counts @ features / total
    centred = features - mean
    return Moments(mean, centred.T @ (counts[:, None] * centred) / (total - 1))


def distance(x: Moments, y: Moments) -> Tensor:
    """The Frechet distance, a float64 scalar, not below 0 but for rounding."""
    values, vectors = torch.linalg.eigh(y.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ x.covariance @ root).clamp_min(0).sqrt().sum()
    shift = (x.mean - y.mean).square().sum()
    return shift + x.covariance.trace() + y.covariance.trace() - 2 * cross
