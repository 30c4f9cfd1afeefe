"""Advantages: how much better than expected each action, or each element of it, turned out."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    episode_starts: Tensor,
    last_values: Tensor,
    last_dones: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), over time in one pass.

    Args:
        rewards: float32 `(T, N)`.
        values: Critic's values of the observations that were acted on, `(T, N)`.
        episode_starts: 1 where a step is the first of its episode, `(T, N)`.
        last_values: Values of the observations after the last step, `(N,)`.
        last_dones: Whether the last step ended its episode, `(N,)`.
        gamma: Discount factor.
        gae_lambda: Trade-off between bias (0) and variance (1).

    Returns:
        Advantages, float32 `(T, N)`; returns are advantages plus values.
    """
    alive = 1 - torch.cat([episode_starts[1:], last_dones[None]]).float()
    next_values = torch.cat([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * alive - values
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(last_values)
    for step in reversed(range(len(rewards))):
        running = deltas[step] + gamma * gae_lambda * alive[step] * running
        advantages[step] = running
    return advantages


def batch_relative(returns: Tensor) -> Tensor:
    """Returns, float32 `(E, N, ...)`, minus their mean over their std: DDPO's whitening."""
    return (returns - returns.mean()) / (returns.std() + 1e-8)


def group_relative(returns: Tensor, group_size: int) -> Tensor:
    """Returns minus the mean of their group, over one global standard deviation.

    The group mean is the baseline of GRPO (Shao et al. 2024, eq. 3) and RLOO; the scale is shared,
    so that an easy task, whose members differ little, does not shout as loud as a hard one.

    Args:
        returns: Returns, or maps of them, float32 `(E, N, ...)`; groups are neighbours in N.
        group_size: K, which divides N.

    Returns:
        Advantages like `returns`.
    """
    groups = returns.unflatten(1, (-1, group_size))
    centred = groups - groups.mean(2, keepdim=True)
    return (centred / (centred.std() + 1e-8)).flatten(1, 2)
