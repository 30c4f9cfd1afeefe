"""What was tried, and what is used: settings of every entrant, by task and number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..baselines import METHODS
from .entrants import (
    AFTER,
    GAUSSIAN,
    GRID,
    OURS,
    SOLVER_ORDER,
    SURROGATE,
    TIMES,
    UNIFORM,
    Settings,
)
from .tasks import BLIND, DIGITS, IMAGES, MIXTURE, QUARTERED, UNCONDITIONAL


def _rates(*rates: float, **others: Any) -> tuple[Settings, ...]:
    return tuple({**others, "learning_rate": rate} for rate in rates)


def _sizes(*pairs: tuple[float, int], **others: Any) -> tuple[Settings, ...]:
    """Learning rates with smaller minibatches than the default: more updates for a budget."""
    return tuple({**others, "learning_rate": rate, "batch_size": size} for rate, size in pairs)


class Trials(NamedTuple):
    """Settings that were tried under the same conditions, as many for each method.

    Attributes:
        num_steps: Of the students.
        budget: Of each training.
        settings: Of each method.
        task: On which task; None: on those without trials of their own.
    """

    num_steps: int
    budget: int
    settings: dict[str, Sequence[Settings]]
    task: str | None = None


# What follows the teacher's trajectory learns worse on a grid that calls noise by another time.
_UNIFORM: Settings = {"grid": UNIFORM}
_WALK: Settings = {"teacher_steps": 12}
# Of ours: four times as many updates as the default's.
_SMALL: Settings = {"num_envs": 128, "batch_size": 64}
_SECOND: Settings = {SOLVER_ORDER: 2}
_RELATIVE: Settings = {"relative": True}
_PREDICTION: Settings = {"exploration_unit": "prediction"}
_NARROW: Settings = {**_SMALL, **_PREDICTION}
# Steps as long, along the gradient, as they are for back-propagation: benchmarks/credit.py.
_BALANCED: Settings = {"local_radius": [0, 4, 0, 0], "step_weights": [15, 90, 2, 1]}
_OWN_STD: Settings = {"advantage_std": "group"}
# The last two steps, whose credit is near the gradient: docs/decisions.md.
_LAST: dict[int, Settings] = {n: {"step_weights": [0] * (n - 2) + [1, 1]} for n in (3, 4, 8)}
_ONCE: Settings = {"n_epochs": 1, "num_envs": 32, "batch_size": 32}
_REUSED: Settings = {**_ONCE, "reuse_forward": True}
_RATES = _rates(1e-4, 2e-4, 5e-4, 1e-3)
_SIZES = ((5e-4, 128), (5e-4, 64), (2e-4, 64), (2e-4, 32))
_OF_POINTS = (*_rates(1e-3, 3e-3), *_sizes((1e-3, 64), (3e-4, 64)))
TRIALS = (
    Trials(
        2,
        150_000,
        {
            "output_regression": (*_RATES, *_sizes(*_SIZES)),
            "trajectory_regression": (
                *_rates(5e-4),
                *_rates(2e-4, 5e-4, 1e-3, **_WALK),
                *_sizes(*_SIZES, **_WALK),
            ),
            "progressive": (
                *_rates(2e-4, 5e-4, 1e-3, **_UNIFORM),
                *_rates(5e-4),
                *_sizes(*_SIZES, **_UNIFORM),
            ),
            "consistency": (
                *_rates(2e-4, 5e-4, 1e-3, **_UNIFORM),
                *_rates(5e-4),
                *_sizes((1e-3, 128), (1e-3, 64), (5e-4, 64), (5e-4, 32), **_UNIFORM),
            ),
            "distribution_matching": (
                *_rates(1e-4, batch_size=64, fake_updates=1),
                *_rates(5e-5, 1e-4, 2e-4, batch_size=64, fake_updates=2),
                *_sizes((1e-4, 128), (2e-5, 64), fake_updates=2),
                *_rates(5e-5, batch_size=64, fake_updates=2, gan_weight=1e-3),
                *_rates(5e-5, batch_size=64, fake_updates=2, gan_weight=1e-2),
            ),
            "backprop": (*_RATES, *_sizes((2e-4, 128), (2e-4, 64), (1e-4, 64), (1e-4, 32))),
            OURS: (
                *_rates(2e-4, 4e-4),
                *_sizes((1e-4, 128), (2e-4, 128), (1e-4, 64), (2e-4, 64)),
                *_sizes((2e-4, 128), n_epochs=2),
                *_sizes((1e-4, 128), num_envs=256),
            ),
        },
    ),
    # Of one step, where the others are output regression or not made for it.
    Trials(
        1,
        300_000,
        {
            "output_regression": _sizes(
                (2e-4, 32), (5e-4, 32), (1e-4, 16), (2e-4, 16), (5e-4, 16), (2e-4, 8)
            ),
            OURS: (
                *_rates(2e-4),
                *_sizes((2e-4, 32), (2e-4, 64), n_epochs=1),
                *_rates(1e-4, **_ONCE),
                *_sizes((2e-4, 64), n_epochs=1, num_envs=64),
                *_sizes((2e-4, 64), n_epochs=2, num_envs=128),
            ),
        },
    ),
    # The closest again, since what is best at half of the budget need not be at all of it.
    Trials(
        2,
        300_000,
        {
            "trajectory_regression": _sizes(
                (2e-4, 32), (1e-4, 32), (2e-4, 16), (1e-4, 16), **_WALK
            ),
            "backprop": _sizes((2e-4, 64), (1e-4, 32), (1e-4, 16), (5e-5, 16)),
            OURS: (*_rates(1e-4, 2e-4), *_sizes((1e-4, 128)), *_rates(2e-4, n_epochs=5)),
        },
    ),
    Trials(
        4,
        300_000,
        {
            "trajectory_regression": _sizes(
                (5e-4, 64), (2e-4, 32), (1e-4, 32), (2e-4, 16), **_WALK
            ),
            "progressive": _sizes(
                *((5e-4, 64), (5e-4, 32), (2e-4, 32), (1e-4, 32), (2e-4, 16), (1e-4, 16)),
                **_UNIFORM,
            ),
            "backprop": _sizes((1e-4, 32), (1e-4, 16)),
            OURS: _rates(1e-4, 2e-4),
        },
    ),
    Trials(
        4,
        300_000,
        {
            "trajectory_regression": _sizes(
                (2e-4, 32), (1e-4, 32), (1e-4, 16), (5e-5, 16), **_WALK, **_SECOND
            ),
            "backprop": _sizes((1e-4, 32), (5e-5, 32), (5e-5, 16), (2e-5, 16), **_SECOND),
            OURS: _rates(2e-5, 5e-5, 1e-4, 2e-4, **_SECOND),
        },
    ),
    # Of three steps, those of both orders.
    Trials(
        3,
        300_000,
        {
            "trajectory_regression": (
                *_sizes((1e-4, 16), (2e-4, 16), **_WALK),
                *_sizes((1e-4, 16), (2e-4, 16), **_WALK, **_SECOND),
            ),
            "backprop": (
                *_sizes((5e-5, 16), (1e-4, 16)),
                *_sizes((2e-5, 16), (5e-5, 16), **_SECOND),
            ),
            OURS: (*_rates(1e-4, 2e-4), *_rates(5e-5, 1e-4, **_SECOND)),
        },
    ),
    Trials(
        8,
        300_000,
        {
            "trajectory_regression": _sizes(
                (1e-4, 32), (5e-5, 32), (2e-5, 32), (2e-5, 16), **_WALK, **_SECOND
            ),
            "backprop": _sizes((5e-5, 32), (2e-5, 32), (2e-5, 16), (1e-5, 16), **_SECOND),
            OURS: _rates(5e-6, 1e-5, 2e-5, 1e-4, **_SECOND),
        },
    ),
    Trials(
        2,
        100_000,
        {
            "trajectory_regression": _sizes((2e-4, 16), (4e-4, 16), **_WALK),
            "backprop": _sizes((1e-4, 16), (2e-4, 16)),
            OURS: _rates(2e-4, 1e-4, **_SMALL),
        },
        IMAGES,
    ),
    Trials(
        4,
        100_000,
        {
            "trajectory_regression": (
                *_sizes((2e-4, 16), **_WALK),
                *_sizes((1e-4, 16), **_WALK, **_SECOND),
            ),
            "backprop": _sizes((5e-5, 16), **_SECOND),
            OURS: _rates(1e-4, local_radius=[2, 2, 0, 0], **_ONCE, **_SECOND),
        },
        IMAGES,
    ),
    Trials(
        8,
        100_000,
        {
            "trajectory_regression": _sizes((5e-5, 16), (2e-5, 16), **_WALK, **_SECOND),
            "backprop": _sizes((2e-5, 16), (1e-5, 16), **_SECOND),
            OURS: (*_rates(2e-5, **_SMALL, **_SECOND), *_rates(2e-5, **_ONCE, **_SECOND)),
        },
        IMAGES,
    ),
    Trials(
        2,
        300_000,
        {
            "trajectory_regression": _rates(2e-4, 3e-4, 5e-4, 1e-3, batch_size=16, **_WALK),
            "backprop": _rates(1e-4, 3e-4, 5e-4, 1e-3, batch_size=16),
            OURS: (*_rates(2e-4, 5e-4), *_rates(2e-4, 5e-4, **_SMALL)),
        },
        QUARTERED,
    ),
    Trials(
        2,
        150_000,
        {
            SURROGATE: (
                *_rates(2e-4),
                *_sizes((2e-4, 128), (2e-4, 64), (1e-4, 64), (1e-4, 32)),
            ),
            OURS: (*_rates(2e-4), *_sizes((2e-4, 128))),
        },
        BLIND,
    ),
    Trials(
        2,
        300_000,
        {
            SURROGATE: _sizes((1e-4, 32), (1e-4, 16)),
            OURS: (*_rates(2e-4), *_sizes((2e-4, 64), (2e-4, 32), n_epochs=1)),
        },
        BLIND,
    ),
    Trials(
        2,
        1_000_000,
        {
            "output_regression": _OF_POINTS,
            "trajectory_regression": tuple({**_WALK, **each} for each in _OF_POINTS),
            "progressive": _OF_POINTS,
            "consistency": _OF_POINTS,
            "distribution_matching": (
                *_rates(1e-4, 5e-4, batch_size=64, fake_updates=2),
                *_rates(5e-4, 1e-3, batch_size=256, fake_updates=2),
            ),
            "backprop": _OF_POINTS,
            OURS: _OF_POINTS,
        },
        MIXTURE,
    ),
)
# Of rivals alone, where the best was at the edge of what was tried.
BEYOND = (
    Trials(2, 300_000, {SURROGATE: _sizes((1e-4, 8))}, BLIND),
    Trials(2, 300_000, {"backprop": _sizes((1e-4, 8), (1e-4, 4))}, DIGITS),
    # What PPO has in its advantages.
    Trials(1, 300_000, {"output_regression": _sizes((2e-4, 16), **_RELATIVE)}, DIGITS),
    Trials(2, 300_000, {"backprop": _sizes((1e-4, 8), **_RELATIVE)}, DIGITS),
    Trials(
        3,
        300_000,
        {
            "backprop": _sizes(
                *((5e-5, 16), (5e-5, 8), (2e-5, 16), (1e-4, 16)), **_SECOND, **_RELATIVE
            )
        },
        DIGITS,
    ),
    Trials(
        4,
        300_000,
        {
            "trajectory_regression": _sizes((1e-4, 16), **_WALK, **_SECOND, **_RELATIVE),
            "backprop": _sizes((2e-5, 16), **_SECOND, **_RELATIVE),
        },
        DIGITS,
    ),
    Trials(4, 300_000, {"backprop": _sizes((1e-5, 16), **_SECOND)}, DIGITS),
    Trials(
        2,
        300_000,
        {"trajectory_regression": _rates(2e-3, batch_size=16, **_WALK)},
        QUARTERED,
    ),
)
_BY_TRAJECTORY = f"trajectory_regression{AFTER}"
# Of ours alone, each on a task of its own, where it was behind: docs/decisions.md.
REMEDIES = (
    Trials(
        2,
        100_000,
        {
            OURS: (
                *_rates(2e-4, **_NARROW),
                *_rates(2e-4, local_radius=1, **_SMALL),
                *_rates(1e-4, num_envs=64, batch_size=32),
                *_rates(2e-4, step_weights=[8, 1], **_SMALL),
                *_rates(2e-4, step_weights=[8, 1], **_NARROW),
                *_rates(1e-4, local_radius=[8, 0], step_weights=[289, 1], **_SMALL),
                *_rates(2e-4, 1e-4, **_ONCE),
                *_rates(2e-4, **_REUSED),
            ),
            _BY_TRAJECTORY: _rates(
                1e-4, first={**_WALK, "learning_rate": 2e-4, "batch_size": 16}, **_SMALL
            ),
        },
        IMAGES,
    ),
    Trials(
        4,
        100_000,
        {
            OURS: (
                *_rates(2e-4, 1e-4, **_SMALL),
                *_rates(2e-4, gap_fraction=0.2, **_SMALL),
                *_rates(2e-4, **_NARROW),
                *_rates(1e-4),
                *_rates(1e-4, **_ONCE),
                *_sizes((1e-4, 64), n_epochs=1, num_envs=64),
            )
        },
        IMAGES,
    ),
    Trials(8, 40_000, {OURS: (*_rates(2e-4, **_SMALL), *_rates(2e-4, **_NARROW))}, IMAGES),
    Trials(
        4,
        100_000,
        {
            OURS: (
                *_rates(1e-4, **_SMALL, **_SECOND),
                *_rates(1e-4, **_NARROW, **_SECOND),
                *_rates(1e-4, local_radius=[2, 2, 0, 0], **_SMALL, **_SECOND),
                *_rates(1e-4, **_REUSED, **_OWN_STD, **_LAST[4], **_SECOND),
                *_rates(1e-4, **_BALANCED, **_SMALL, **_SECOND),
                *_rates(1e-4, **_BALANCED, **_NARROW, **_SECOND),
                *_rates(
                    5e-5,
                    local_radius=[8, 8, 1, 0],
                    step_weights=[289, 289, 9, 1],
                    **_SMALL,
                    **_SECOND,
                ),
                *_rates(2e-4, local_radius=[2, 2, 0, 0], **_ONCE, **_SECOND),
                *_rates(1e-4, local_radius=[2, 2, 1, 0], **_ONCE, **_SECOND),
            )
        },
        IMAGES,
    ),
    Trials(
        2,
        300_000,
        {
            OURS: _sizes((5e-4, 64), (1e-3, 64), (2e-3, 64), n_epochs=1, num_envs=64),
            _BY_TRAJECTORY: _rates(
                2e-4, first={**_WALK, "learning_rate": 1e-3, "batch_size": 16}, **_SMALL
            ),
        },
        QUARTERED,
    ),
    Trials(2, 300_000, {OURS: _sizes((2e-4, 64), n_epochs=1, num_envs=64)}, UNCONDITIONAL),
    Trials(4, 300_000, {OURS: (*_rates(1e-4), *_rates(2e-4, **_SMALL))}, UNCONDITIONAL),
    Trials(
        4,
        300_000,
        {
            OURS: (
                *_rates(2e-5, **_PREDICTION, **_SECOND),
                *_rates(2e-5, 5e-5, **_SMALL, **_SECOND),
                *_rates(2e-5, local_radius=[1, 1, 0, 0], **_SECOND),
                *_rates(2e-5, local_radius=1, **_PREDICTION, **_SECOND),
                *_sizes((2e-5, 64), n_epochs=1, num_envs=64, **_SECOND),
                *_sizes((2e-5, 32), num_envs=64, **_SECOND),
                *_sizes((2e-5, 32), num_envs=32, n_epochs=2, **_SECOND),
                *_sizes((2e-5, 64), n_epochs=2, **_SECOND),
                *_rates(5e-5, **_ONCE, **_SECOND),
                *_sizes((5e-5, 64), n_epochs=1, num_envs=64, reuse_forward=True, **_SECOND),
                *_rates(5e-5, **_REUSED, **_OWN_STD, **_LAST[4], **_SECOND),
                *_rates(5e-5, step_weights=[0, 0, 0, 1], **_REUSED, **_OWN_STD, **_SECOND),
            ),
            _BY_TRAJECTORY: _rates(
                2e-5,
                first={
                    **_WALK,
                    **_SECOND,
                    **_RELATIVE,
                    "learning_rate": 1e-4,
                    "batch_size": 16,
                },
                **_SECOND,
            ),
        },
        DIGITS,
    ),
    Trials(
        1,
        300_000,
        {OURS: (*_rates(2e-4, **_REUSED), *_rates(2e-4, **_REUSED, **_OWN_STD))},
        DIGITS,
    ),
    Trials(
        8,
        300_000,
        {
            OURS: (
                *_rates(2e-5),
                *_rates(2e-5, **_PREDICTION, **_SECOND),
                *_rates(2e-5, **_REUSED, **_OWN_STD, **_LAST[8], **_SECOND),
            )
        },
        DIGITS,
    ),
    Trials(
        2,
        300_000,
        {
            OURS: (
                *_rates(2e-4, step_weights=[2, 1]),
                *_sizes((1e-4, 64), (2e-4, 64), n_epochs=1, num_envs=64),
                *_rates(1e-4, 2e-4, **_ONCE),
                *_sizes((1e-4, 16), n_epochs=1, num_envs=16),
                *_sizes((1e-4, 32), (2e-4, 32), n_epochs=1),
                *_rates(1e-4, **_REUSED),
                *_rates(1e-4, **_REUSED, **_OWN_STD),
                *_rates(1e-4, step_weights=[0, 1], **_REUSED, **_OWN_STD),
            )
        },
        DIGITS,
    ),
    Trials(
        4,
        300_000,
        {
            OURS: (
                *_rates(1e-4, gap_fraction=0.25),
                *_rates(1e-4, n_epochs=5),
                *(setting for n in (1, 2) for setting in _sizes((1e-4, 128), n_epochs=n)),
            )
        },
        DIGITS,
    ),
    Trials(
        3,
        300_000,
        {
            OURS: (
                *_rates(1e-4, local_radius=[1, 0, 0], **_SECOND),
                *_rates(1e-4, local_radius=[1, 0, 0], step_weights=[9, 1.5, 1], **_SECOND),
                *_rates(1e-4, 5e-5, **_ONCE),
                *_rates(5e-5, **_ONCE, **_SECOND),
                *_sizes((1e-4, 32), n_epochs=1),
                *_sizes((1e-4, 64), n_epochs=2),
                *_rates(1e-4, **_REUSED),
                *_rates(1e-4, **_REUSED, **_OWN_STD),
                *_rates(1e-4, **_REUSED, **_OWN_STD, **_LAST[3]),
                *_rates(5e-5, **_REUSED, **_OWN_STD, **_LAST[3], **_SECOND),
            )
        },
        DIGITS,
    ),
    *(
        Trials(
            num_steps,
            100_000,
            {OURS: (*_rates(rate), *_rates(rate, **_PREDICTION))},
            DIGITS,
        )
        for num_steps, rate in ((2, 2e-4), (4, 1e-4), (8, 1e-4))
    ),
)
# By task (None: those without choices of their own) and fewest steps: the best on validation tasks
# by paired MSE; of distribution matching, which pairs nothing, by Frechet distance. Images have a
# third of the budget, which wants smaller batches; a quarter of the parameters starts far from the
# teacher, the mixture close to it.
CHOICES: dict[str | None, dict[int, dict[str, Settings]]] = {
    None: {
        1: {
            "output_regression": {**_RELATIVE, "learning_rate": 2e-4, "batch_size": 16},
            "trajectory_regression": {**_WALK, "learning_rate": 2e-4, "batch_size": 32},
            "progressive": {**_UNIFORM, "learning_rate": 2e-4, "batch_size": 32},
            "consistency": {**_UNIFORM, "learning_rate": 5e-4, "batch_size": 32},
            "distribution_matching": {
                "batch_size": 64,
                "fake_updates": 2,
                "gan_weight": 1e-2,
                "learning_rate": 5e-5,
            },
            "backprop": {"learning_rate": 1e-4, "batch_size": 16},
            OURS: {**_REUSED, **_OWN_STD, "learning_rate": 2e-4},
            f"progressive{AFTER}": _UNIFORM,
            # Those of benchmarks/schedules.py.
            f"{OURS}-adaptive": {
                "trained": "schedule",
                "group_size": 4,
                "learning_rate": 1e-3,
                "schedule_lr_scale": 10.0,
                "advantage_clip": 3.0,
                "n_epochs": 5,
            },
        },
        2: {
            "output_regression": {"learning_rate": 2e-4, "batch_size": 32},
            "backprop": {**_RELATIVE, "learning_rate": 1e-4, "batch_size": 8},
            OURS: {**_REUSED, **_OWN_STD, "learning_rate": 1e-4},
        },
        3: {
            "trajectory_regression": {**_WALK, "learning_rate": 1e-4, "batch_size": 16},
            "progressive": {**_UNIFORM, "learning_rate": 1e-4, "batch_size": 32},  # tried at 4
            "backprop": {**_SECOND, **_RELATIVE, "learning_rate": 5e-5, "batch_size": 16},
            OURS: {**_REUSED, **_OWN_STD, **_LAST[3], "learning_rate": 1e-4},
            TIMES: {"learning_rate": 1e-4},  # of first order, as ours was then
        },
        4: {
            "trajectory_regression": {
                **_WALK,
                **_SECOND,
                **_RELATIVE,
                "learning_rate": 1e-4,
                "batch_size": 16,
            },
            "backprop": {**_SECOND, **_RELATIVE, "learning_rate": 2e-5, "batch_size": 16},
            OURS: {**_REUSED, **_OWN_STD, **_LAST[4], **_SECOND, "learning_rate": 5e-5},
        },
        6: {
            "trajectory_regression": {
                **_WALK,
                **_SECOND,
                "learning_rate": 5e-5,
                "batch_size": 32,
            },
            "backprop": {**_SECOND, "learning_rate": 1e-5, "batch_size": 16},
            OURS: {**_SECOND, "learning_rate": 2e-5},
        },
    },
    UNCONDITIONAL: {
        4: {"progressive": {**_UNIFORM, "learning_rate": 2e-4, "batch_size": 32}},  # as it was run
    },
    IMAGES: {
        1: {
            "trajectory_regression": {**_WALK, "learning_rate": 2e-4, "batch_size": 16},
            "backprop": {"learning_rate": 1e-4, "batch_size": 16},
            OURS: {**_REUSED, "learning_rate": 2e-4},
        },
        4: {
            "backprop": {**_SECOND, "learning_rate": 5e-5, "batch_size": 16},
            OURS: {**_ONCE, **_SECOND, "learning_rate": 1e-4, "local_radius": [2, 2, 0, 0]},
        },
        5: {
            "trajectory_regression": {
                **_WALK,
                **_SECOND,
                "learning_rate": 5e-5,
                "batch_size": 16,
            },
            "backprop": {**_SECOND, "learning_rate": 1e-5, "batch_size": 16},
            OURS: {**_ONCE, **_SECOND, "learning_rate": 2e-5},
        },
    },
    QUARTERED: {
        1: {
            "trajectory_regression": {**_WALK, "learning_rate": 1e-3, "batch_size": 16},
            "backprop": {"learning_rate": 5e-4, "batch_size": 16},
            OURS: {"n_epochs": 1, "num_envs": 64, "batch_size": 64, "learning_rate": 1e-3},
        },
    },
    BLIND: {
        1: {
            SURROGATE: {"learning_rate": 1e-4, "batch_size": 8},
            "backprop": {"learning_rate": 1e-4, "batch_size": 16},
            OURS: {"learning_rate": 2e-4, "n_epochs": 1, "batch_size": 64},
        },
    },
    MIXTURE: {
        1: {
            "output_regression": _OF_POINTS[1],
            "trajectory_regression": {**_WALK, **_OF_POINTS[2]},
            "progressive": _OF_POINTS[3],
            "consistency": _OF_POINTS[3],
            "distribution_matching": {"learning_rate": 5e-4, "batch_size": 256, "fake_updates": 2},
            "backprop": _OF_POINTS[3],
            OURS: _OF_POINTS[2],
            f"progressive{AFTER}": {},
        },
    },
}
# Ours with something changed: with the settings of ours, where they have none of their own.
OF_DISTRIBUTIONS = (f"{OURS}-mmd", f"{OURS}-discriminator")
VARIANTS = (GAUSSIAN, TIMES, *OF_DISTRIBUTIONS)


def chosen(method: str, task: str, num_steps: int) -> Settings:
    """A method's settings on a task; of two in turn those of the first as `first`."""
    own: dict[str, Settings] = {}
    for place in (None, task):
        for fewest, settings in CHOICES.get(place, {}).items():
            own |= settings if num_steps >= fewest else {}
    if method in VARIANTS:
        settings = dict(own.get(method, own[OURS]))
        if method in OF_DISTRIBUTIONS:  # which are a rollout's: it keeps the default's size
            settings.pop("num_envs", None)
        if method in (TIMES, *OF_DISTRIBUTIONS):  # free times, and rollouts of many minibatches
            settings.pop("reuse_forward", None)
        return _of_order(settings, 1) if method == TIMES else settings
    if not method.endswith(AFTER):
        return own.get(method, {})
    name = method.removesuffix(AFTER)
    order = own[OURS].get(SOLVER_ORDER, 1)
    order = order if order in METHODS[name].solver_orders else 1
    first = _of_order({k: v for k, v in own[name].items() if k != GRID}, order)
    return {**_of_order({**own[OURS], **own.get(method, {})}, order), "first": first}


def _of_order(settings: Settings, order: int) -> Settings:
    """The same for steps of another order."""
    plain = {name: value for name, value in settings.items() if name != SOLVER_ORDER}
    return {**plain, SOLVER_ORDER: order} if order > 1 else plain
