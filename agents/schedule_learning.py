"""Learning when to step: what a rollout keeps of the choices of time, and the loss on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from . import losses
from .advantages import batch_relative, group_relative
from .choices import Choice, ScheduleHead

# Which part of a policy with a free schedule is trained.
PARTS = ("student", "schedule", "both", "alternating")


def choosing_rows(trained: str, iteration: int, num_envs: int, group_size: int) -> int:
    """How many rows, the last ones, draw their times in this rollout; the others draw their steps.

    A row explores either its times or its steps, so that its return says something about the one
    or the other: of `"both"` half of the groups each, of `"alternating"` all in turn.
    """
    if trained == "both":
        groups = num_envs // group_size
        return groups // 2 * group_size
    chooses = trained == "schedule" or (trained == "alternating" and iteration % 2 == 1)
    return num_envs if chooses else 0


class ChoiceBatch(NamedTuple):
    """B choices of a time.

    Attributes:
        observations: What was seen, tensors `(B, ...)` by name.
        choice: What was drawn, float32 `(B,)`.
        old_log_prob: Of it then, `(B,)`.
        advantages: `(B,)`.
    """

    observations: dict[str, Tensor]
    choice: Tensor
    old_log_prob: Tensor
    advantages: Tensor


class ChoiceRollout:
    """The choices that the last `num_rows` rows of a rollout drew.

    Args:
        num_rows: Rows that draw their times.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._records: list[dict[str, Any]] = []

    def add(
        self,
        observations: Mapping[str, Tensor],
        choice: Tensor,
        distribution: Choice,
        running: Tensor,
        episode: int,
    ) -> None:
        """Keep a step of all N rows.

        Args:
            observations: By name, `(N, ...)`.
            choice: What was drawn, `(N,)`.
            distribution: From what.
            running: Which rows' episodes are under way, bool `(N,)`.
            episode: Which episode of the rollout it belongs to.
        """
        if not self.num_rows:
            return
        rows = slice(len(choice) - self.num_rows, None)
        self._records.append(
            {
                "observations": {name: value[rows] for name, value in observations.items()},
                "choice": choice[rows],
                "old_log_prob": distribution.log_prob(choice)[rows],
                "counts": (running & distribution.decides)[rows],
                "episode": episode,
            }
        )

    def batches(
        self,
        returns: Tensor,
        group_size: int,
        advantage_clip: float | None,
        batch_size: int,
        generator: torch.Generator,
    ) -> Iterator[ChoiceBatch]:
        """Every choice once, in random minibatches.

        Args:
            returns: Of all rows' episodes, `(E, N)`.
            group_size: Neighbouring rows that share tasks: their mean is the baseline. 1: the mean
                of all.
            advantage_clip: Largest size of an advantage, or None.
            batch_size: Choices of a minibatch.
            generator: Of the order.
        """
        if not self._records:
            return
        own = returns[:, -self.num_rows :]
        relative = batch_relative(own) if group_size == 1 else group_relative(own, group_size)
        if advantage_clip is not None:
            relative = relative.clamp(-advantage_clip, advantage_clip)
        parts = [self._batch(record, relative[record["episode"]]) for record in self._records]
        everything = _joined(parts)
        order = torch.randperm(len(everything.choice), generator=generator, device=generator.device)
        for rows in order.split(batch_size):
            yield _taken(everything, rows)

    def _batch(self, record: dict[str, Any], advantages: Tensor) -> ChoiceBatch:
        batch = ChoiceBatch(
            record["observations"], record["choice"], record["old_log_prob"], advantages
        )
        return _taken(batch, record["counts"].nonzero().squeeze(1))


def begin_episodes(
    head: ScheduleHead, env: VectorEnv, rollout: ChoiceRollout, episode: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Start an episode in every row at the times that a head chooses; all are running.

    Episodes differ in length: what follows one before all have ended is not trained on.

    Args:
        head: Chooses.
        env: A `ReDiFVectorEnv` of N rows with a free schedule.
        rollout: Keeps the choices of the rows that draw; the others take the most likely time.
        episode: Which one of the rollout begins.

    Returns:
        Observations, and which rows' episodes are under way, bool `(N,)`.
    """
    base: Any = env.unwrapped
    _, infos = env.reset()
    tasks = infos["task"]
    condition = None if base.bank.condition is None else base.bank.condition[tasks]
    before = head.before(base.bank.x_T[tasks], condition)
    choosing = torch.arange(len(tasks), device=tasks.device) >= len(tasks) - rollout.num_rows
    running = torch.ones_like(choosing)
    with torch.no_grad():
        first = head(before)
        choice = torch.where(choosing, first.sample(), first.mode())
        rollout.add(before, choice, first, running, episode)
        options = {"tasks": tasks, "start": head.next_time(choice, before)}
    observations, _ = env.reset(options=options)
    return observations, running


def loss(
    head: ScheduleHead, batch: ChoiceBatch, clip_range: float, ent_coef: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clipped loss on choices, minus the entropy bonus; and what to log of it."""
    distribution = head(batch.observations)
    log_ratio = (distribution.log_prob(batch.choice) - batch.old_log_prob).unsqueeze(1)
    entropy = distribution.entropy().mean()
    policy_loss = losses.surrogate(log_ratio, batch.advantages.unsqueeze(1), clip_range)
    statistics = {
        "schedule_loss": policy_loss.detach(),
        "schedule_kl": losses.approximate_kl(log_ratio),
        "schedule_clip_fraction": losses.clip_fraction(log_ratio, clip_range).mean(),
        "schedule_entropy": entropy.detach(),
        "ratio_error": log_ratio.detach().square().mean(),  # mean square, as of `Objective.loss`
    }
    return policy_loss - ent_coef * entropy, statistics


def _joined(parts: list[ChoiceBatch]) -> ChoiceBatch:
    columns = zip(*(part[1:] for part in parts), strict=True)
    return ChoiceBatch(
        {
            name: torch.cat([part.observations[name] for part in parts])
            for name in parts[0].observations
        },
        *map(torch.cat, columns),
    )


def _taken(batch: ChoiceBatch, rows: Tensor) -> ChoiceBatch:
    return ChoiceBatch(
        {name: value[rows] for name, value in batch.observations.items()},
        *(column[rows] for column in batch[1:]),
    )
