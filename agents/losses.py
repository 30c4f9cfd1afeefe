"""The losses of PPO on factorised Gaussians, as functions."""

from __future__ import annotations

import torch
from torch import Tensor

RATIOS = ("element", "mean", "sum")
MAX_LOG_RATIO = 80.0  # exp() of more than 88 is infinite in float32


def reduce_log_ratio(log_ratio_map: Tensor, ratio: str) -> Tensor:
    """The log-ratios that are clipped, one a column.

    Args:
        log_ratio_map: Log-ratio of each element of the action, float32 `(B, D)`.
        ratio: `"element"`: one ratio an element, as language-model PPO has one a token;
            `"sum"`: the exact joint ratio; `"mean"`: the mean log-ratio (DDPO, Black et al. 2024,
            whose code clips it at 1e-4).

    Returns:
        `(B, D)` for `"element"`, else `(B, 1)`.
    """
    if ratio == "element":
        return log_ratio_map
    if ratio == "sum":
        return log_ratio_map.sum(1, keepdim=True)
    return log_ratio_map.mean(1, keepdim=True)


def surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_range: float, weights: Tensor | None = None
) -> Tensor:
    r"""PPO's clipped objective (Schulman et al. 2017, eq. 7), negated, summed over elements.

    .. math:: -\frac1B \sum_b w_b \sum_d
        \min(\rho_{bd} A_{bd}, \mathrm{clip}(\rho_{bd}) A_{bd})

    At ratio 1 its gradient is that of the joint objective, for any number of elements. It has none
    for log-ratios above `MAX_LOG_RATIO`, whatever the sign of the advantage.

    Args:
        log_ratio: `(B, E)`, from `reduce_log_ratio`.
        advantages: `(B, E)` or `(B, 1)`.
        clip_range: Half-width of the interval around 1 that ratios are clipped to.
        weights: Of the rows, `(B,)`; None: 1 each.
    """
    # An infinite ratio times the clip's gradient of 0 would be NaN, for all of the minibatch.
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    rows = torch.min(ratio * advantages, clipped * advantages).sum(1)
    return -(rows if weights is None else weights * rows).mean()


def clip_fraction(log_ratio: Tensor, clip_range: float) -> Tensor:
    """Share of each row's ratios outside the interval that they are clipped to, `(B,)`."""
    return ((log_ratio.detach().exp() - 1).abs() > clip_range).float().mean(1)


def effective_sample_size(log_ratio: Tensor) -> Tensor:
    r"""Share of the rows that importance weights leave, :math:`(\sum\rho)^2 / (B\sum\rho^2)`.

    Of each column (Kish 1965), averaged: 1 while no ratio has moved, 1/B when one row has it all.

    Args:
        log_ratio: `(B, E)`.
    """
    log_weights = log_ratio.detach()
    sizes = 2 * log_weights.logsumexp(0) - (2 * log_weights).logsumexp(0)
    return (sizes.exp() / len(log_ratio)).mean()


def approximate_kl(log_ratio: Tensor) -> Tensor:
    """Mean KL(old || new) from log-ratios alone: the k3 estimator (Schulman 2020)."""
    log_ratio = log_ratio.detach()
    return (log_ratio.exp() - 1 - log_ratio).mean()


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None
) -> Tensor:
    """Mean squared error of the critic, all `(B,)`; `clip_range` limits its change."""
    if clip_range is not None:
        values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.nn.functional.mse_loss(returns, values)
