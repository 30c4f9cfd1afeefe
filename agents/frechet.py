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
    """Means `(B, F)` and covariances `(B, F, F)` of B resamples of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor, counts: Tensor | None = None) -> Moments:
    """Unbiased moments of features `(N, F)`.

    Args:
        features: One row a sample.
        counts: How often each row counts, `(B, N)`; default: once, B = 1.
    """
    features = features.double()
    if counts is None:
        counts = torch.ones_like(features[:, 0])[None]
    # Taken away first: what is left of the means below is small, and so is what cancels.
    centre = features.mean(0)
    features = features - centre
    total = counts.sum(1)[:, None]
    mean = counts @ features / total
    second = features.T @ (counts[:, :, None] * features)
    covariance = second - total[:, :, None] * mean[:, :, None] * mean[:, None, :]
    return Moments(mean + centre, covariance / (total[:, :, None] - 1))


def distance(x: Moments, y: Moments) -> Tensor:
    """The Frechet distances, float64 `(B,)`, not below 0 but for rounding."""
    values, vectors = torch.linalg.eigh(y.covariance)
    root = (vectors * values.clamp_min(0).sqrt()[:, None, :]) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ x.covariance @ root).clamp_min(0).sqrt().sum(1)
    shift = (x.mean - y.mean).square().sum(1)
    return shift + _trace(x.covariance) + _trace(y.covariance) - 2 * cross


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2).sum(1)
