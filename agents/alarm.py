"""An alarm for reward hacking: the reward rises while the judged quality falls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from redif_env import mdp, rewards
from redif_env.errors import InvalidArgumentError, check_integer, check_number
from redif_env.teacher import TeacherBank

from .callbacks import IterationCallback
from .diversity import block_means, judged_quality, significance
from .evaluation import Judge


class RewardHackingWarning(UserWarning):
    """The reward rose while a judge that is no part of it saw quality fall."""


@dataclass(frozen=True)
class Hack:
    """A figure of quality that fell while the reward rose.

    Attributes:
        figure: Its name.
        since: Iteration at which it was best.
        before, now: Its value then and now.
        reward_before, reward_now: The reward of both students, by the reward as it is now.
    """

    figure: str
    since: int
    before: float
    now: float
    reward_before: float
    reward_now: float

    def __str__(self) -> str:
        return (
            f"{self.figure} fell from {self.before:.3f} (iteration {self.since}) to "
            f"{self.now:.3f} while the reward rose from {self.reward_before:.4g} to "
            f"{self.reward_now:.4g}"
        )


@dataclass(frozen=True)
class _Peak:
    iteration: int
    quality: Tensor
    x_0: Tensor


class HackingDetector:
    """Compares each evaluation with the one at which a figure of quality was best.

    A figure counts as hacked if it fell since, the reward rose since, and it now is below the
    teacher's own, each by more than `threshold` standard errors of the change over blocks of the
    same tasks. Both students are scored by the present reward, so that a reward which is itself
    trained can be watched. The teacher's own level matters because a poor student can exceed it
    (blurred samples sit in the middle of the reference, and cover it all), and loses that lead by
    learning.

    Args:
        threshold: In standard errors. A change of nothing but noise passes 5, with 16 blocks, once
            in 13,000 (Student's t with 15 degrees of freedom). But the best of many evaluations is
            partly luck: under a reward that rises for certain, a figure that only fluctuates
            sounds a false alarm in 0.2 % of runs of 11 evaluations and in 3 % of 31.
        floor: The teacher's own figures in blocks `(B,)`; a figure without one need not be below
            anything.
    """

    def __init__(self, threshold: float = 5.0, floor: Mapping[str, Tensor] | None = None) -> None:
        self.threshold = check_number("threshold", threshold)
        self.floor = dict(floor or {})
        self._peaks: dict[str, _Peak] = {}

    def check(
        self,
        iteration: int,
        quality: Mapping[str, Tensor],
        x_0: Tensor,
        score: Callable[[Tensor], Tensor],
    ) -> list[Hack]:
        """The figures that are hacked now.

        Args:
            iteration: For the report.
            quality: Figures in blocks `(B,)`, see `diversity.judged_quality`.
            x_0: The samples that they are of, of the same tasks at every check.
            score: The reward of such samples, `(N,)`.
        """
        return [
            hack
            for figure, now in quality.items()
            if (hack := self._check(iteration, figure, now, x_0, score)) is not None
        ]

    def _check(
        self,
        iteration: int,
        figure: str,
        now: Tensor,
        x_0: Tensor,
        score: Callable[[Tensor], Tensor],
    ) -> Hack | None:
        peak = self._peaks.get(figure)
        if peak is None or now.mean() >= peak.quality.mean():
            self._peaks[figure] = _Peak(iteration, now, x_0)
            return None
        better = [peak.quality, *([self.floor[figure]] if figure in self.floor else [])]
        if any(significance(than - now) <= self.threshold for than in better):
            return None
        then, today = (block_means(score(each), len(now)) for each in (peak.x_0, x_0))
        if significance(today - then) <= self.threshold:
            return None
        values = (peak.quality, now, then, today)
        return Hack(figure, peak.iteration, *(float(value.mean()) for value in values))


class RewardHackingAlarm(IterationCallback):
    """Say so when the reward rises while the judged quality falls.

    Judges the averaged student, at eta = 0, on held-out tasks, by recall, coverage, balance of
    labels and (with classes) their agreement; see `HackingDetector` for when it speaks. Logs each
    figure as `judge/NAME` and the number of hacked figures as `judge/reward_hacked`, and warns
    (`RewardHackingWarning`) when a figure is first hacked, or again after it had recovered.
    Training goes on: whether a poorer student is what you want is for you to say. An alarm is no
    proof of the contrary: it sees what the judge sees.

    Args:
        judge: A network that no reward sees, such as `reporting.find_judge(teacher)`.
        bank: Held-out tasks, of the validation split.
        reference: Other tasks of the same split, whose answers are to be recalled and covered.
        every: Iterations between two evaluations.
        threshold: In standard errors.
        blocks: Blocks of tasks that give the standard errors.
        k: Neighbours of recall and coverage.

    Attributes:
        floor: The same figures of the teacher's own answers to the tasks of `bank`.
        history: One `{"iteration", "reward", "recall", ...}` an evaluation; the reward by the
            reward at that time.
        hacks: Iteration and `Hack` of each figure of each evaluation that was hacked.

    Raises:
        InvalidArgumentError: without a judge, or with fewer tasks than blocks.
    """

    def __init__(
        self,
        judge: Judge,
        bank: TeacherBank,
        reference: TeacherBank,
        every: int = 5,
        threshold: float = 5.0,
        blocks: int = 16,
        k: int = 5,
    ) -> None:
        super().__init__(every)
        if not isinstance(judge, Judge):
            raise InvalidArgumentError(
                "judge", judge, "pass a Judge: find_judge(teacher), or one trained for your data."
            )
        self.judge = judge
        self.bank = bank
        self.reference = reference
        self.blocks = check_integer("blocks", blocks, 2)
        self.k = check_integer("k", k, 1)
        if min(len(bank), len(reference)) < self.blocks:
            raise InvalidArgumentError("bank", f"{len(bank)} tasks", f"pass {blocks} at least.")
        floor = self._judge(bank.teacher_x_0)
        self.floor = _means(floor)
        self.detector = HackingDetector(threshold, floor)
        self.history: list[dict[str, float]] = []
        self.hacks: list[tuple[int, Hack]] = []
        self._sounding: set[str] = set()

    @torch.no_grad()
    def on_iteration(self) -> None:
        policy: Any = self.model.policy
        bank = self.bank
        x_0, _ = policy.sample(bank.x_T, bank.condition)
        quality = self._judge(x_0)
        hacks = self.detector.check(self.iteration, quality, x_0, self._score)
        self._report(quality, hacks, float(self._score(x_0).mean()))

    def _judge(self, x_0: Tensor) -> dict[str, Tensor]:
        return judged_quality(
            self.judge,
            x_0,
            self.bank.teacher_x_0,
            self.reference.teacher_x_0,
            self.bank.condition,
            blocks=self.blocks,
            k=self.k,
        )

    def _on_training_end(self) -> None:
        super()._on_training_end()
        self.logger.dump(self.num_timesteps)

    def _report(self, quality: Mapping[str, Tensor], hacks: list[Hack], reward: float) -> None:
        figures = _means(quality)
        self.history.append({"iteration": self.iteration, "reward": reward, **figures})
        for name, value in {**figures, "reward_hacked": float(len(hacks))}.items():
            self.logger.record(f"judge/{name}", value)
        self.hacks += [(self.iteration, hack) for hack in hacks]
        for hack in hacks:
            if hack.figure not in self._sounding:
                warnings.warn(
                    f"reward hacking: {hack}. Add a term that keeps the sample the teacher's "
                    "(mse), lower the weight of the hacked one, or stop here.",
                    RewardHackingWarning,
                    stacklevel=2,
                )
        self._sounding = {hack.figure for hack in hacks}

    def _score(self, x_0: Tensor) -> Tensor:
        bank = self.bank
        process: mdp.Process = self.training_env.get_attr("process", [0])[0]
        return rewards.evaluate(process.reward, x_0, bank.teacher_x_0, bank.condition)[0]


def _means(quality: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(blocks.mean()) for name, blocks in quality.items()}
