"""Who takes part: solvers on two grids, rivals that are trained, and ours.

Everything that is trained starts from the same weights, on the same tasks, on the grid that is best
for its steps before training, spends the same number of network-forward equivalents, and is
averaged alike. `settings` has what was tried, and what is used.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.rewards import MMD, Discriminator, Reward

from .. import baselines, presets, reinforcement
from ..baselines import METHODS, SOLVERS, Ledger, Method, Result
from .tasks import Task

SEARCHED = "+search"
SURROGATE = "surrogate"  # only where the reward has no gradient
GRID, UNIFORM = "grid", "uniform"  # a setting: not the searched grid
SOLVER_ORDER = "solver_order"  # a setting: of a student's steps
# What the recipe of ours has for some numbers of steps, and here by settings alone.
BY_SETTINGS = {SOLVER_ORDER: 1, "advantage_std": "rollout", "step_weights": None}
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
    del values["seed"], values[SOLVER_ORDER], values["relative"]  # a run's own, and settings
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
    # What a recipe changes by itself is left to settings, which say what was tried; but for credit,
    # which is as the reward has it.
    plain = {**BY_SETTINGS, **presets.PRESETS[recipe.get("preset", "default")]["agent"]}
    del plain["credit"]
    return reinforcement.train(
        task.teacher,
        task.train,
        grid,
        budget=budget,
        seed=seed,
        start=start,
        reward=reward,
        **{**plain, **AVERAGED, **recipe},
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
GAUSSIAN, TIMES = f"{OURS}-gaussian", f"{OURS}-times"
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
    TIMES: _ours(learned=True),
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
