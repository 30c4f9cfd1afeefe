"""Asking a network once about a state that several rows are in.

Rows of a group start from the same noise and class. Until one of their steps explores they are in
the same states, that step's included: what the student says there is computed once for all of them,
in the rollout and in the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shared(NamedTuple):
    """Which of N rows a network is asked about, and whose answer each row takes.

    Attributes:
        asked: The rows, int64 `(M,)`.
        answer: Of each row the place of its answer, int64 `(N,)` in [0, M).
    """

    asked: Tensor
    answer: Tensor


class Exploring(NamedTuple):
    """Which of the rows that a network is asked about explore in the current step.

    Attributes:
        first: Their places in `Shared.asked`, and after them those of the others, int64 `(M,)`.
        num: How many explore.
        groups: Their groups, int64 `(num,)`.
    """

    first: Tensor
    num: int
    groups: Tensor


class Turns(NamedTuple):
    """Which step each group of rows explores, of an episode of all.

    Attributes:
        steps: Of each group, int64 `(G,)`.
        counts: Of each step the number of groups: known without asking the device.
    """

    steps: Tensor
    counts: tuple[int, ...]


def draw_turns(
    num_groups: int,
    length: int,
    first: int,
    device: torch.device,
    explored: Sequence[int] | None = None,
) -> Turns:
    """Every step in turn, for groups in random order.

    Args:
        num_groups: Groups, G.
        length: Steps of the episode.
        first: Where the turn begins; the next episode's should begin one later, so that each step
            is explored equally often where groups are no multiple of steps.
        device: Of the result.
        explored: Which steps have a turn, ascending; None: all.
    """
    num = length if explored is None else len(explored)
    places = (torch.randperm(num_groups, device=device) + first) % num
    counts = [len(range((place - first) % num, num_groups, num)) for place in range(num)]
    if explored is None:
        return Turns(places, tuple(counts))
    by_step = dict(zip(explored, counts, strict=True))
    steps = torch.tensor(explored, device=device)[places]
    return Turns(steps, tuple(by_step.get(step, 0) for step in range(length)))


def in_rollout(turns: Turns, step: int, group_size: int) -> Shared | None:
    """What is shared in a step: groups that have not explored yet are in one state each.

    Args:
        turns: Of the current episode.
        step: The current step.
        group_size: Neighbouring rows of a group, K.

    Returns:
        None where nothing is shared.
    """
    explored, sharing = turns.steps, sum(turns.counts[step:])
    if group_size == 1 or not sharing:
        return None
    order = (explored < step).int().argsort(stable=True)
    together, apart = order[:sharing], order[sharing:]
    rows = torch.arange(len(order) * group_size, device=explored.device).reshape(-1, group_size)
    place = torch.empty_like(rows)
    place[together] = rows[:sharing, :1] // group_size
    place[apart] = sharing + rows.flatten()[: len(apart) * group_size].reshape(-1, group_size)
    return Shared(torch.cat([rows[together, 0], rows[apart].flatten()]), place.flatten())


def exploring(turns: Turns, step: int, shared: Shared, group_size: int) -> Exploring:
    """Which of the states of a step explore in it: one for each group whose turn it is."""
    row = shared.asked
    others = turns.steps[row // group_size] != step
    first, num = others.int().argsort(stable=True), turns.counts[step]
    return Exploring(first, num, row[first[:num]] // group_size)


def neighbours(num_rows: int, same: int, device: torch.device) -> Shared | None:
    """Each `same` neighbouring rows are in one state; None where that is 1."""
    if same == 1:
        return None
    rows = torch.arange(num_rows, device=device)
    return Shared(rows[::same], rows // same)
