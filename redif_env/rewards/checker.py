"""check_reward: does a reward keep the protocol?"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidRewardError
from ..teacher import TeacherBank
from .base import Reward, WeightedSum, evaluate

# Between batches and calls, relative and absolute: batched float32 networks differ by 1e-6 or so.
TOLERANCE = 1e-4

Samples = tuple[Tensor, Tensor, Tensor | None]


def check_reward(reward: Reward, bank: TeacherBank, num: int = 8) -> None:
    """Check that a reward keeps the protocol of `Reward`, on samples of a teacher's bank.

    Scores answers to other noise in the place of the student's samples, and checks: the
    attributes; shape, dtype and device; that values are finite, also for copies, constant images
    and samples far outside [-1, 1]; that calls agree and leave their arguments alone; that rows do
    not influence each other, unless `over_batch`; that the reward is the mean of its map, where it
    has one; and that gradients arrive, where it says so. Of a sum, each term is checked.

    Args:
        reward: The reward.
        bank: Tasks of the teacher it is meant for; at least 2.
        num: Tasks to use.

    Raises:
        InvalidRewardError: at the first part of the protocol that is broken; says how to mend it.
        InvalidArgumentError: for something that is no reward, or a bank of one task.
    """
    if not isinstance(reward, Reward):
        raise InvalidArgumentError("reward", reward, "pass an instance of a subclass of Reward.")
    if len(bank) < 2 or num < 2:
        raise InvalidArgumentError("bank", min(len(bank), num), "pass at least 2 tasks.")
    if isinstance(reward, WeightedSum):
        for _, term in reward.terms:
            check_reward(term, bank, num)
        return
    _check_attributes(reward)
    bank = bank.subset(num)
    samples = bank.teacher_x_0.roll(1, 0), bank.teacher_x_0, bank.condition
    values = _check_values(reward, samples)
    _check_repeats(reward, samples, values)
    if not reward.over_batch:
        _check_rows(reward, samples, values)
    if reward.has_map:
        _check_mean(reward, samples)
    _check_odd_samples(reward, samples)
    if reward.differentiable:
        _check_gradient(reward, samples)


def _refuse(reward: Reward, got: object, remedy: str) -> NoReturn:
    raise InvalidRewardError(f"reward {reward.name!r}", got, remedy)


def _check_attributes(reward: Reward) -> None:
    for name in ("has_map", "differentiable", "over_batch"):
        if not isinstance(getattr(reward, name), bool):
            _refuse(reward, f"{name}={getattr(reward, name)!r}", "set it to True or False.")
    if isinstance(reward.nfe, bool) or not isinstance(reward.nfe, int) or reward.nfe < 0:
        _refuse(reward, f"nfe={reward.nfe!r}", "set it to a whole number of forward passes.")
    if not isinstance(reward.name, str) or not reward.name:
        _refuse(reward, f"name={reward.name!r}", "set it to a string that is not empty.")


def _check_values(reward: Reward, samples: Samples) -> Tensor:
    """Score copies of the samples; check the values, and that the copies are as before."""
    copies = tuple(None if part is None else part.clone() for part in samples)
    values, _ = evaluate(reward, *copies)  # type: ignore[arg-type]
    if not bool(values.isfinite().all()):
        _refuse(reward, "NaN or infinity", "return finite values for any sample.")
    for name, copy, part in zip(("x_0", "teacher_x_0", "condition"), copies, samples, strict=True):
        if part is not None and copy is not None and not torch.equal(copy, part):
            _refuse(reward, f"{name} was changed", "leave the arguments alone: work on copies.")
    return values.detach()


def _close(one: Tensor, two: Tensor) -> bool:
    return torch.allclose(one, two, rtol=TOLERANCE, atol=TOLERANCE)


def _check_repeats(reward: Reward, samples: Samples, values: Tensor) -> None:
    if not _close(_check_values(reward, samples), values):
        _refuse(
            reward,
            "another value at the second call",
            "use no random numbers and no state: call .eval() on networks with dropout.",
        )
    called = reward(*samples).detach().float()
    if not _close(called, values):
        _refuse(reward, "reward(...) differs from reward.score(...)", "make them agree.")


def _check_rows(reward: Reward, samples: Samples, values: Tensor) -> None:
    for row in range(len(values)):
        alone = tuple(None if part is None else part[row : row + 1] for part in samples)
        if not _close(_check_values(reward, alone)[0], values[row]):  # type: ignore[arg-type]
            _refuse(
                reward,
                f"row {row} scores otherwise when it is alone",
                "score rows by themselves, or set over_batch = True.",
            )


def _check_mean(reward: Reward, samples: Samples) -> None:
    reward_map = reward.reward_map(*samples).detach().float()
    if not _close(reward_map.flatten(1).mean(1), reward(*samples).detach().float()):
        _refuse(reward, "it is not the mean of its map", "derive from MapReward, or drop the map.")


def _check_odd_samples(reward: Reward, samples: Samples) -> None:
    x_0, teacher_x_0, condition = samples
    odd = {
        "a copy": teacher_x_0,
        "an empty image": torch.zeros_like(x_0),
        "a white image": torch.ones_like(x_0),
        "a sample far outside [-1, 1]": 10 * x_0,
    }
    for name, sample in odd.items():
        if not bool(evaluate(reward, sample, teacher_x_0, condition)[0].isfinite().all()):
            _refuse(reward, f"NaN or infinity for {name}", "return finite values for any sample.")


def _check_gradient(reward: Reward, samples: Samples) -> None:
    x_0 = samples[0].clone().requires_grad_()
    with torch.enable_grad():
        values = reward(x_0, *samples[1:])
        gradient = None
        if values.requires_grad:
            (gradient,) = torch.autograd.grad(values.sum(), x_0, allow_unused=True)
    if gradient is None or not bool(gradient.any()):
        _refuse(reward, "no gradient reaches x_0", "set differentiable = False, or use no no_grad.")
    if not bool(gradient.isfinite().all()):
        _refuse(reward, "its gradient is not finite", "keep away from the poles, or say False.")
