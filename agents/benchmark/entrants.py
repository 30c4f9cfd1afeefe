"""Who takes part: solvers on two grids, rivals that are trained, and ours.

Everything that is trained starts from the same weights, on the same tasks, on plain DDIM's searched
grid, spends the same number of network-forward equivalents, and is averaged alike. `TRIALS` has the
settings that were tried; `CHOSEN` and its like those that were best on validation tasks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.rewards import MMD, Discriminator, Reward

from .. import baselines, presets, reinforcement
from ..baselines import METHODS, SOLVERS, Ledger, Method, Result
from .tasks import DIGITS, IMAGES, MIXTURE, QUARTERED, UNCONDITIONAL, Task

SEARCHED = "+search"
SURROGATE = "surrogate"  # only where the reward has no gradient
GRID, UNIFORM = "grid", "uniform"  # a setting: not the searched grid
EMA_DECAY = 0.95
AVERAGED: dict[str, Any] = {"ema_decay": EMA_DECAY}
NUM_LIKE = 512  # answers that an MMD compares samples with
Settings = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Entrant:
    """One technique.

    Attributes:
        kind: `"solver"`, `"rival"` or `"ours"`.
        train: `train(task, grid, budget, seed, **settings)`; None for a solver.
        solver: The solver, for one.
        searched: Whether its grid is searched; a solver's with that solver, else with DDIM.
        changes: To the default recipe, or all of a rival's defaults, beside a run's settings.
        fewest: Steps from which on it is another than the one before.
    """

    kind: str
    train: Callable[..., Result] | None = None
    solver: str = "ddim"
    searched: bool = True
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    fewest: int = 1

    @property
    def recipe(self) -> dict[str, Any]:
        """All that settings are added to, as plain data; nothing of a solver."""
        if self.kind != "ours":
            return self.changes
        changes = dict(self.changes)
        return {**presets.preset(changes.pop("preset", "default")), **changes}


def _rival(name: str) -> Entrant:
    def train(task: Task, grid: Tensor, budget: int, seed: int, **settings: Any) -> Result:
        settings = {"start": task.start, **settings}
        settings |= {"reward": task.reward} if name == SURROGATE else {}
        return METHODS[name].train(
            task.teacher,
            task.train,
            grid,
            budget=budget,
            seed=seed,
            ema_decay=EMA_DECAY,
            **settings,
        )

    return Entrant("rival", train, changes=_defaults(METHODS[name]))


def _defaults(method: type[Method]) -> dict[str, Any]:
    """How a method trains where settings say nothing."""
    signatures = inspect.signature(method.train), inspect.signature(method)
    values = {name: p.default for each in signatures for name, p in each.parameters.items()}
    del values["seed"]
    plain = {name: value for name, value in values.items() if isinstance(value, (int, float, str))}
    return {**plain, "ema_decay": EMA_DECAY}


def _ours(reward: Callable[[Task], Reward] = lambda task: task.reward, **recipe: Any) -> Entrant:
    def train(task: Task, grid: Tensor, budget: int, seed: int, **settings: Any) -> Result:
        return _reinforce(
            task, grid, budget, seed, task.start, reward(task), {**recipe, **settings}
        )

    return Entrant("ours", train, changes={**AVERAGED, **recipe})


def _reinforce(
    task: Task,
    grid: Tensor,
    budget: int,
    seed: int,
    start: Denoiser | None,
    reward: Reward,
    recipe: dict[str, Any],
) -> Result:
    return reinforcement.train(
        task.teacher,
        task.train,
        grid,
        budget=budget,
        seed=seed,
        start=start,
        reward=reward,
        **{**AVERAGED, **recipe},
    )


def _warm(name: str) -> Entrant:
    """Half of the budget each: a rival, with settings of its own; ours from where it ended."""

    def train(
        task: Task, grid: Tensor, budget: int, seed: int, first: Settings, **settings: Any
    ) -> Result:
        rival = ENTRANTS[name].train
        assert rival is not None
        began = rival(task, grid, budget // 2, seed, **first)
        left = budget - began.ledger.total
        result = _reinforce(task, grid, left, seed, began.student, task.reward, settings)
        return dataclasses.replace(result, ledger=_added(began.ledger, result.ledger))

    began = _defaults(METHODS[name])
    return Entrant("ours", train, changes={**AVERAGED, "first": began})


def _added(first: Ledger, second: Ledger) -> Ledger:
    return Ledger(
        first.evaluations + second.evaluations,
        first.updates + second.updates,
        first.seconds + second.seconds,
    )


ADAPTIVE = {"learned": True, "adaptive": True}


def _adaptive(task: Task, grid: Tensor, budget: int, seed: int, **settings: Any) -> Result:
    """Times and a number of steps for each sample; the network is the start's, and stays so.

    A step costs what one more, to half of the last time, saves on the whole: it pays only where it
    saves more than that.
    """
    denoiser, bank = task.start or task.teacher.denoiser, task.validation
    longer = _one_more(grid, task)
    before = denoiser.network_evaluations
    errors = [
        schedules.sample(denoiser, bank.x_T, bank.condition, times).sub(bank.teacher_x_0).square()
        for times in (grid, longer)
    ]
    spent = denoiser.network_evaluations - before
    saved = float((errors[0].mean() - errors[1].mean()).clamp_min(0))
    recipe = {**ADAPTIVE, "step_cost": saved, **settings}
    result = _reinforce(
        task, _one_more(longer, task), budget, seed, task.start, task.reward, recipe
    )
    result.ledger.evaluations["search"] += spent
    return result


def _one_more(grid: Tensor, task: Task) -> Tensor:
    """The grid with one more step, from half of its last time; the grid if that is no time."""
    half = task.teacher.denoiser.schedule.snap(grid[-2:-1] / 2)
    return torch.cat([grid[:-1], half, grid[-1:]]) if 0 < half < grid[-2] else grid


def _mmd(task: Task) -> Reward:
    """Beside the error: the answers to training tasks are what samples are to look like."""
    return task.reward + 0.1 * MMD(reference=task.train.subset(NUM_LIKE).teacher_x_0)


def _discriminator(task: Task) -> Reward:
    denoiser = task.teacher.denoiser
    return task.reward + 0.01 * Discriminator(denoiser.latent_shape, denoiser.num_classes)


OURS = "ours"
AFTER = f"+{OURS}"
FIRST = ("output_regression", "trajectory_regression", "progressive")
GAUSSIAN = f"{OURS}-gaussian"
# Up to four steps diffusers' takes those of second order.
FEWEST = {"dpmpp3m": 5}
ENTRANTS: dict[str, Entrant] = {
    **{
        name: Entrant("solver", solver=name, searched=False, fewest=FEWEST.get(name, 1))
        for name in SOLVERS
    },
    **{
        name + SEARCHED: Entrant("solver", solver=name, fewest=FEWEST.get(name, 1))
        for name, solver in SOLVERS.items()
        if solver.any_grid
    },
    **{name: _rival(name) for name in METHODS},
    OURS: _ours(),
    **{first + AFTER: _warm(first) for first in FIRST},
    GAUSSIAN: _ours(exploration_noise="gaussian"),
    f"{OURS}-times": _ours(learned=True),
    f"{OURS}-adaptive": Entrant("ours", _adaptive, changes={**AVERAGED, **ADAPTIVE}),
    f"{OURS}-mmd": _ours(_mmd),
    f"{OURS}-discriminator": _ours(_discriminator),
    "grpo": _ours(preset="grpo"),
    # Its best settings of benchmarks/sample_efficiency.py's eight trials.
    "ddpo": _ours(
        preset="ddpo", learning_rate=5e-5, eta=0.0, min_std=0.1, clip_range=1e-2, decay=True
    ),
}


def taking_part(task: Task) -> tuple[str, ...]:
    """Whom to compare on a task: all, or where the reward has no gradient those that raise it.

    Beside these, controls that learn the teacher's answers and know nothing of the reward.
    """
    if not task.blind:
        unfit = {name for name in SOLVERS if not baselines.fits(name, task.teacher)}
        return tuple(
            name
            for name, entrant in ENTRANTS.items()
            if name != SURROGATE and not (entrant.train is None and entrant.solver in unfit)
        )
    raising = (OURS, GAUSSIAN, "grpo", "ddpo", SURROGATE)
    return ("ddim+search", "output_regression", "backprop", *raising)


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
_NARROW: Settings = {**_SMALL, "exploration_unit": "prediction"}
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
            SURROGATE: (
                *_rates(2e-4),
                *_rates(1e-4, 2e-4, surrogate_updates=2),
                *_rates(2e-4, noise_std=0.3),
                *_sizes((2e-4, 128), (2e-4, 64), (1e-4, 64), (1e-4, 32)),
            ),
            OURS: (
                *_rates(2e-4, 4e-4),
                *_sizes((1e-4, 128), (2e-4, 128), (1e-4, 64), (2e-4, 64)),
                *_sizes((2e-4, 128), n_epochs=2),
                *_sizes((1e-4, 128), num_envs=256),
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
            "trajectory_regression": (
                *_sizes((5e-4, 64), (2e-4, 32), (1e-4, 32), (2e-4, 16), (1e-4, 16), **_WALK),
                *_sizes((2e-4, 32), teacher_steps=24),
            ),
            "progressive": _sizes(
                *((5e-4, 64), (5e-4, 32), (2e-4, 32), (1e-4, 32), (2e-4, 16), (1e-4, 16)),
                **_UNIFORM,
            ),
            "backprop": _sizes(
                (2e-4, 64), (2e-4, 32), (1e-4, 32), (5e-5, 32), (1e-4, 16), (5e-5, 16)
            ),
            OURS: (
                *_rates(1e-4, 2e-4),
                *_rates(1e-4, gap_fraction=0.25),
                *_rates(1e-4, n_epochs=5),
                *(setting for n in (1, 2) for setting in _sizes((1e-4, 128), n_epochs=n)),
            ),
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
            )
        },
        IMAGES,
    ),
    Trials(8, 40_000, {OURS: (*_rates(2e-4, **_SMALL), *_rates(2e-4, **_NARROW))}, IMAGES),
    Trials(
        2,
        300_000,
        {
            _BY_TRAJECTORY: _rates(
                2e-4, first={**_WALK, "learning_rate": 1e-3, "batch_size": 16}, **_SMALL
            )
        },
        QUARTERED,
    ),
    Trials(4, 300_000, {OURS: (*_rates(1e-4), *_rates(2e-4, **_SMALL))}, UNCONDITIONAL),
    *(
        Trials(
            num_steps,
            100_000,
            {OURS: (*_rates(rate), *_rates(rate, exploration_unit="prediction"))},
            DIGITS,
        )
        for num_steps, rate in ((2, 2e-4), (4, 1e-4), (8, 1e-4))
    ),
)
# The best at 2 steps by paired MSE; of distribution matching, which pairs nothing, by Frechet
# distance.
CHOSEN: dict[str, Settings] = {
    "output_regression": {"learning_rate": 2e-4, "batch_size": 32},
    "trajectory_regression": {**_WALK, "learning_rate": 2e-4, "batch_size": 16},
    "progressive": {**_UNIFORM, "learning_rate": 2e-4, "batch_size": 32},
    "consistency": {**_UNIFORM, "learning_rate": 1e-3},
    "distribution_matching": {"batch_size": 64, "fake_updates": 2, "learning_rate": 5e-5},
    "backprop": {"learning_rate": 1e-4, "batch_size": 16},
    SURROGATE: {"learning_rate": 1e-4, "batch_size": 32},
    OURS: {"learning_rate": 2e-4},
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
}
# At 3 steps and more those of the trials at 4.
CHOSEN_AT_4: dict[str, Settings] = {
    "trajectory_regression": {**_WALK, "learning_rate": 2e-4, "batch_size": 32},
    "backprop": {"learning_rate": 1e-4, "batch_size": 32},
    OURS: {"learning_rate": 1e-4},
    f"trajectory_regression{AFTER}": {"learning_rate": 5e-5},
}
# By trials of their own: images have a third of the budget, which wants smaller batches; a quarter
# of the parameters starts far from the teacher, the mixture close to it.
CHOSEN_ON: dict[str, dict[str, Settings]] = {
    IMAGES: {
        "trajectory_regression": {**_WALK, "learning_rate": 2e-4, "batch_size": 16},
        "backprop": {"learning_rate": 1e-4, "batch_size": 16},
        OURS: {**_SMALL, "learning_rate": 2e-4},
        f"trajectory_regression{AFTER}": {"learning_rate": 1e-4},
    },
    QUARTERED: {
        "trajectory_regression": {**_WALK, "learning_rate": 1e-3, "batch_size": 16},
        "backprop": {"learning_rate": 5e-4, "batch_size": 16},
        OURS: {**_SMALL, "learning_rate": 5e-4},
        f"trajectory_regression{AFTER}": {"learning_rate": 2e-4},
    },
    MIXTURE: {
        "output_regression": _OF_POINTS[1],
        "trajectory_regression": {**_WALK, **_OF_POINTS[2]},
        "progressive": _OF_POINTS[3],
        "consistency": _OF_POINTS[3],
        "distribution_matching": {"learning_rate": 5e-4, "batch_size": 256, "fake_updates": 2},
        "backprop": _OF_POINTS[3],
        OURS: _OF_POINTS[2],
        f"progressive{AFTER}": {},
    },
}
# From 5 steps on.
CHOSEN_ON_AT_8: dict[str, dict[str, Settings]] = {
    IMAGES: {OURS: {**_NARROW, "learning_rate": 2e-4}},
}


# Ours with something changed: with the settings of ours.
VARIANTS = (GAUSSIAN, f"{OURS}-times", f"{OURS}-mmd", f"{OURS}-discriminator")


def chosen(method: str, task: str, num_steps: int) -> Settings:
    """A method's settings on a task; of two in turn those of the first as `first`."""
    own = {**CHOSEN, **(CHOSEN_AT_4 if num_steps > 2 else {}), **CHOSEN_ON.get(task, {})}
    own |= CHOSEN_ON_AT_8.get(task, {}) if num_steps > 4 else {}
    if method in VARIANTS:
        return own[OURS]
    if not method.endswith(AFTER):
        return own.get(method, {})
    first = {k: v for k, v in own[method.removesuffix(AFTER)].items() if k != GRID}
    return {**own[OURS], **own.get(method, {}), "first": first}


def solve(entrant: Entrant, task: Task, num_steps: int) -> Result:
    """A solver's run, with the search of its grid on the ledger."""
    grid, spent = task.uniform(num_steps), 0
    if entrant.searched:
        grid, spent = task.search(entrant.solver, num_steps)
    result = baselines.solve(entrant.solver, task.teacher, grid)
    result.ledger.evaluations["search"] += spent
    return result
