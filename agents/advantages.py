"""Advantages: how much better than expected each action, or each element of it, turned out.

Of several processes their means and standard deviations are those of all rows together.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from redif_env import parallel

LEAST_STD = 0.01  # of a group, as a share of that of all


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

    With maps of rewards and values each element has its own sequence: element-wise GAE.

    Args:
        rewards: float32 `(T, N)`, or maps `(T, N, D)`.
        values: Critic's values of the observations that were acted on, like `rewards`.
        episode_starts: 1 where a step is the first of its episode, `(T, N)`.
        last_values: Values of the observations after the last step, `(N,)` or `(N, D)`.
        last_dones: Whether the last step ended its episode, `(N,)`.
        gamma: Discount factor.
        gae_lambda: Trade-off between bias (0) and variance (1).

    Returns:
        Advantages like `rewards`; returns are advantages plus values.
    """
    alive = 1 - torch.cat([episode_starts[1:], last_dones[None]]).float()
    alive = alive.reshape(*alive.shape, *[1] * (rewards.ndim - 2))
    next_values = torch.cat([values[1:], last_values[None]])
    deltas = rewards + gamma * next_values * alive - values
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(last_values)
    for step in reversed(range(len(rewards))):
        running = deltas[step] + gamma * gae_lambda * alive[step] * running
        advantages[step] = running
    return advantages


def standardised(values: Tensor) -> Tensor:
    """Values over their one global standard deviation; their mean is left alone."""
    return values / (parallel.std(values) + 1e-8)


def batch_relative(returns: Tensor) -> Tensor:
    """Returns, float32 `(E, N, ...)`, minus their mean over their std: DDPO's whitening."""
    return standardised(returns - parallel.mean(returns.mean()))


def group_relative(returns: Tensor, group_size: int, own_std: bool = False) -> Tensor:
    """Returns minus the mean of their group, over a standard deviation.

    The group mean is the baseline of GRPO (Shao et al. 2024, eq. 3) and RLOO. With one standard
    deviation for all, hard tasks, whose members differ much, count for more; GRPO divides by the
    group's own. Of two members with a number each that leaves the sign alone.

    Args:
        returns: Returns, or maps of them, float32 `(E, N, ...)`; groups are neighbours in N.
        group_size: K, which divides N.
        own_std: Whether each group is divided by its own, over its members and their elements,
            in place of that of all, but by no less than a hundredth of the latter: what differs by
            rounding alone is not blown up.

    Returns:
        Advantages like `returns`.
    """
    groups = returns.unflatten(1, (-1, group_size))
    centred = groups - groups.mean(2, keepdim=True)
    if not own_std:
        return standardised(centred).flatten(1, 2)
    within = tuple(range(2, centred.ndim))
    std = centred.square().mean(within, keepdim=True).sqrt()
    least = LEAST_STD * parallel.std(centred) + 1e-8
    return (centred / std.clamp_min(least)).flatten(1, 2)


class TaskMeans:
    """A running mean of the returns of each task: a baseline without groups or a critic.

    DDPO (Black et al. 2024, section 4.3) keeps one a prompt; here one a task of the bank, or one a
    task and element of its reward map. Tasks that were never seen get the mean of the rollout.

    Args:
        num_tasks: Tasks of the bank. Memory: `num_tasks` returns, or maps of them.
        horizon: Visits that the mean remembers, since the student improves meanwhile.
    """

    def __init__(self, num_tasks: int, horizon: int = 4) -> None:
        self.num_tasks = num_tasks
        self.horizon = horizon
        self._means: Tensor | None = None
        self._visits: Tensor

    def relative(self, returns: Tensor, tasks: Tensor) -> Tensor:
        """Returns minus their task's mean *before* them, over one global standard deviation.

        Args:
            returns: float32 `(E, N, ...)`; they are then added to the means.
            tasks: Rows of the bank, int64 `(E, N)`.

        Returns:
            Advantages like `returns`.
        """
        flat, rows = returns.flatten(0, 1), tasks.flatten()
        if self._means is None:
            self._means = flat.new_zeros(self.num_tasks, *flat.shape[1:])
            self._visits = flat.new_zeros(self.num_tasks)
        known = _like(self._visits[rows] > 0, flat)
        baseline = torch.where(known, self._means[rows], parallel.mean(flat.mean(0)))
        self._remember(parallel.gather(flat), parallel.gather(rows))
        return standardised(flat - baseline).reshape(returns.shape)

    def state_dict(self) -> dict[str, Tensor] | None:
        """The means, and how often each task was seen; None before the first."""
        if self._means is None:
            return None
        return {"means": self._means, "visits": self._visits}

    def load_state_dict(self, state: Mapping[str, Tensor] | None, device: torch.device) -> None:
        """Go on from what `state_dict` returned."""
        if state is None:
            self._means = None
        else:
            self._means, self._visits = state["means"].to(device), state["visits"].to(device)

    def _remember(self, returns: Tensor, rows: Tensor) -> None:
        assert self._means is not None
        sums = torch.zeros_like(self._means).index_add_(0, rows, returns)
        counts = torch.zeros_like(self._visits).index_add_(0, rows, torch.ones_like(rows).to(sums))
        total = _like(self._visits + counts, sums)
        updated = (_like(self._visits, sums) * self._means + sums) / total.clamp_min(1)
        self._means = torch.where(total > 0, updated, self._means)
        self._visits = (self._visits + counts).clamp_max(self.horizon)


def _like(rows: Tensor, values: Tensor) -> Tensor:
    """A value a row, shaped to broadcast over `values`."""
    return rows.reshape(-1, *[1] * (values.ndim - 1))
