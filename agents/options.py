"""What each option of `ReDiFPPO` may be by itself; `compatibility` says which go together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from redif_env.errors import (
    InvalidArgumentError,
    check_choice,
    check_flag,
    check_integer,
    check_number,
)

from .divergences import DIVERGENCES
from .losses import RATIOS
from .schedule_learning import PARTS

ADVANTAGES = ("group", "batch", "task", "gae")
CREDITS = ("local", "global")
ADVANTAGE_STDS = ("rollout", "group")
STOCHASTIC_STEPS = ("all", "one")
SHARES = ("gamma", "gae_lambda")
OPTIONAL = ("target_kl", "divergence_target", "clip_range_vf")
# May be functions of the progress that remains.
SCHEDULES = ("learning_rate", "clip_range", "clip_range_vf", "eta", "min_std")
NUMBERS = (
    *("learning_rate", "clip_range", "eta", "min_std", "ent_coef", "vf_coef", "max_grad_norm"),
    *SHARES,
    *OPTIONAL,
)

Check = Callable[[str, Any], Any]  # of a name and a value; returns the value


def check(name: str, value: Any) -> Any:
    """The value of an option in `CHECKS`; raises `InvalidArgumentError` if it makes no sense."""
    return CHECKS[name](name, value)


def check_numbers(options: Mapping[str, Any], seed: object) -> None:
    """Numbers must be finite and not negative, shares at most 1, and a seed one that numpy takes.

    Functions of the remaining progress are called, and checked, in training; None is what it
    stands for.
    """
    for name, value in options.items():
        if (name in SCHEDULES and callable(value)) or (value is None and name in OPTIONAL):
            continue
        check_number(name, value, -1e30 if name == "ent_coef" else 0, 1 if name in SHARES else 1e30)
    if seed is not None and check_integer("seed", seed, 0) >= 2**32:
        raise InvalidArgumentError("seed", seed, "pass one below 2**32.")


def check_again(agent: Any) -> None:
    """Check the attributes of an agent: `load` assigns what it is given over what was saved."""
    for name in CHECKS:
        setattr(agent, name, check(name, getattr(agent, name)))
    check_numbers({name: getattr(agent, name) for name in NUMBERS}, agent.seed)


def _one_of(*choices: str) -> Check:
    return lambda name, value: check_choice(name, value, choices)


def _integer(least: int) -> Check:
    return lambda name, value: check_integer(name, value, least)


def _number(least: float = 0, most: float = float("inf")) -> Check:
    return lambda name, value: check_number(name, value, least, most)


def _optional(own: Check) -> Check:
    return lambda name, value: None if value is None else own(name, value)


def _or_one_of(choices: tuple[str, ...], own: Check) -> Check:
    """One of some words, or something else."""

    def checked(name: str, value: Any) -> Any:
        return check_choice(name, value, choices) if isinstance(value, str) else own(name, value)

    return checked


def _numbers(name: str, value: Any) -> list[float]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise InvalidArgumentError(name, value, "pass a list of numbers.")
    return [check_number(name, each) for each in value]


def _radii(name: str, value: Any) -> int | list[int]:
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        return check_integer(name, value, 0)
    return [check_integer(name, each, 0) for each in value]


CHECKS: dict[str, Check] = {
    "ratio": _one_of(*RATIOS),
    "advantage": _one_of(*ADVANTAGES),
    "credit": _one_of(*CREDITS),
    "local_weight": _number(0, 1),
    "local_radius": _radii,
    "advantage_std": _one_of(*ADVANTAGE_STDS),
    "advantage_clip": _optional(_number(1e-6)),
    "stochastic_steps": _or_one_of(STOCHASTIC_STEPS, _integer(1)),
    "step_weights": _optional(_numbers),
    "micro_batch_size": _optional(_integer(1)),
    "reuse_forward": check_flag,
    "antithetic": check_flag,
    "gap_fraction": _or_one_of(("auto",), _optional(_number())),
    "ema_decay": _number(0, 1),
    "trained": _optional(_one_of(*PARTS)),
    "schedule_clip_range": _number(),
    "schedule_ent_coef": _number(),
    "adaptive_lr": check_flag,
    "divergence": _optional(_one_of(*DIVERGENCES)),
    "divergence_coef": _number(),
    "n_steps": _optional(_integer(1)),
    "batch_size": _integer(2),
    "n_epochs": _integer(1),
}
