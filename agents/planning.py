"""What a run is to do: the arguments of `distill`, checked, and what they mean for the agent."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback
from stable_baselines3.common.type_aliases import MaybeCallback
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from redif_env import parallel
from redif_env.denoiser import Denoiser, check_order
from redif_env.errors import InvalidArgumentError, check_choice, check_integer, check_number
from redif_env.rewards import Reward
from redif_env.teacher import Teacher, TeacherBank

from . import presets, reinforcement, run_folder, smaller
from .baselines import METHODS
from .export import can_export
from .lora import LEARNING_RATE_SCALE
from .ppo import ReDiFPPO
from .reporting import versions

LEARNED = "learned"
PPO = "ppo"
WITH_REWARD = ("backprop", "surrogate")  # other methods of `METHODS` have an aim of their own
# Arguments of `distill` that stand in place of a recipe's, by what they are an option of.
ENV_OPTIONS = ("group_size", "guidance_scale", "solver_order")
AGENT_OPTIONS = (
    "batch_size",
    "learning_rate",
    "stochastic_steps",
    "antithetic",
    "n_epochs",
    "eta",
    "min_std",
    "gap_fraction",
    "ema_decay",
    "micro_batch_size",
)
POLICY_OPTIONS = (
    "lora_rank",
    "lora_targets",
    "gradient_checkpointing",
    "precision",
    "shard_student",
)
OTHERS = ("changes", "callback")  # what else PPO alone takes
# The options of other methods than PPO.
SHARED_OPTIONS = ("guidance_scale", "solver_order", "batch_size", "learning_rate", "ema_decay")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Arguments of `distill` of the same names that make sense by themselves.

    `folder` is `out`, None for what writes nothing; of several processes the first one writes.
    """

    method: str
    num_steps: int
    iterations: int
    num_envs: int
    warm_up: int
    bank_size: int
    num_held_out: int
    eval_every: int
    seed: int
    folder: Path | None
    checkpoint_every: int | None
    resume: bool
    progress: bool
    callback: BaseCallback | None

    @property
    def written(self) -> Path | None:
        """The folder that this process writes, or None."""
        return self.folder if parallel.is_main() else None

    @property
    def shows(self) -> bool:
        """Whether this process shows progress."""
        return self.progress and parallel.is_main()


@dataclasses.dataclass(frozen=True)
class Options:
    """A recipe with the arguments that stand in place of its own.

    Attributes:
        env: Of `ReDiFVectorEnv`.
        agent: Of `ReDiFPPO`, but for the learning rate.
        learning_rate: Initial learning rate.
        decays: Whether it falls linearly to 0.
    """

    env: dict[str, Any]
    agent: dict[str, Any]
    learning_rate: float
    decays: bool

    def make_model(
        self,
        teacher: Teacher,
        num_envs: int,
        grid: Tensor,
        learned: bool,
        bank: TeacherBank | None = None,
    ) -> ReDiFPPO:
        """The agent, see `reinforcement.make_model`."""
        last = 0.0 if self.decays else self.learning_rate
        agent = {**self.agent, "learning_rate": LinearSchedule(self.learning_rate, last, 1.0)}
        return reinforcement.make_model(teacher, num_envs, grid, learned, bank, self.env, agent)


def check_arguments(given: Mapping[str, Any], callback: MaybeCallback) -> Plan:
    """Refuse arguments that make no sense whatever the teacher is.

    Args:
        given: All arguments of `distill` but the callback, by name.
        callback: This one.

    Raises:
        InvalidArgumentError: naming the argument. `num_envs`, `bank_size` and `seed` are checked
            where they are used.
    """

    def count(name: str, least: int = 1) -> int:
        return check_integer(name, given[name], least)

    warm_up = given["warm_up"]
    if warm_up is None:
        warm_up = 0 if given["student"] is None else smaller.WARM_UP_ITERATIONS
    plan = Plan(
        iterations=count("iterations"),
        num_held_out=count("num_held_out", 100),
        num_steps=count("num_steps"),
        eval_every=count("eval_every"),
        warm_up=check_integer("warm_up", warm_up, 0),
        method=check_choice("method", given["method"], (PPO, *METHODS)),
        checkpoint_every=None if given["checkpoint_every"] is None else count("checkpoint_every"),
        folder=run_folder.check_out(given["out"], given["resume"]),
        num_envs=given["num_envs"],
        bank_size=given["bank_size"],
        seed=given["seed"],
        resume=given["resume"],
        progress=given["progress"],
        callback=_as_callback(callback),
    )
    _check_changes(given)
    order = given["solver_order"]
    order = None if order is None else check_order(order)
    if plan.method != PPO:
        _refuse_ppo_arguments(plan.method, {**given, "callback": callback})
        METHODS[plan.method].check_order(order or 1)
    return plan


def choose_order(given: int | None, recipe: presets.Recipe, method: str, denoiser: Denoiser) -> int:
    """The order of a student's steps: PPO's recipe has its own, if diffusers knows such a student.

    Args:
        given: What the caller asks for; None: nothing.
        recipe: With steps of second order or of first.
        method: Others than PPO step to first order.
        denoiser: The teacher's, whose student diffusers may know in first order alone.
    """
    if given is not None or method != PPO:
        return given or 1
    order: int = recipe["env"].get("solver_order", 1)
    lost = can_export(denoiser) and not can_export(with_order(denoiser, order))
    return 1 if lost else order


def with_order(denoiser: Denoiser, solver_order: int) -> Denoiser:
    """The same network, sampled with steps of this order."""
    stepping = copy.copy(denoiser)
    stepping.set_solver_order(solver_order)
    return stepping


def _as_callback(callback: MaybeCallback) -> BaseCallback | None:
    """One callback of what Stable-Baselines3 takes for one."""
    if callback is None or isinstance(callback, BaseCallback):
        return callback
    if isinstance(callback, list) and all(isinstance(each, BaseCallback) for each in callback):
        return CallbackList(callback)
    if callable(callback) and not isinstance(callback, type):
        return ConvertCallback(callback)
    raise InvalidArgumentError(
        "callback", callback, "pass a callback of Stable-Baselines3, a list of them, or a function."
    )


def _check_changes(given: Mapping[str, Any]) -> None:
    """What has an argument of its own is given there, or one of the two would be ignored."""
    changes = given["changes"]
    if not isinstance(changes, Mapping | None):
        raise InvalidArgumentError(
            "changes", changes, "pass options by name, such as {'target_kl': 0.05}."
        )
    for name in changes or {}:
        if name in given:
            raise InvalidArgumentError("changes", name, f"pass it as {name}=, without changes.")


def _refuse_ppo_arguments(method: str, arguments: Mapping[str, Any]) -> None:
    own = {*ENV_OPTIONS, *AGENT_OPTIONS, *POLICY_OPTIONS, *OTHERS} - set(SHARED_OPTIONS)
    refused = [name for name in arguments if name in own and arguments[name] is not None]
    refused += ["preset"] if arguments["preset"] != "default" else []
    refused += ["schedule"] if arguments["schedule"] == LEARNED else []
    for name in refused:
        raise InvalidArgumentError(
            name, arguments[name], f"leave it out: {method} has no use of it."
        )


def make_options(
    recipe: presets.Recipe,
    arguments: Mapping[str, Any],
    reward: Reward,
    description: Mapping[str, Any] | None,
) -> Options:
    """What the environment and the agent are made with."""

    def given(names: Sequence[str]) -> dict[str, Any]:
        return {name: arguments[name] for name in names if arguments[name] is not None}

    agent = {**recipe["agent"], **given(AGENT_OPTIONS), "seed": arguments["seed"]}
    if arguments["lora_rank"] is not None and arguments["learning_rate"] is None:
        agent["learning_rate"] *= LEARNING_RATE_SCALE
    agent["policy_kwargs"] = {**recipe["policy"], **given(POLICY_OPTIONS)}
    if description is not None:
        agent["policy_kwargs"]["student"] = description
    env = {**recipe["env"], **given(ENV_OPTIONS), "reward": reward}
    env |= {"bank_size": arguments["bank_size"], "seed": arguments["seed"]}
    rate = check_number("learning_rate", agent.pop("learning_rate"))
    return Options(env, agent, rate, recipe["decay"])


def make_config(
    arguments: Mapping[str, Any], plan: Plan, options: Options, teacher: Teacher, reward: Reward
) -> dict[str, Any]:
    """What is written of a run, and compared when it is resumed; as JSON gives it back."""
    given, callback = arguments["teacher"], plan.callback
    named = {
        "warm_up": plan.warm_up,
        "group_size": options.env["group_size"],
        "learning_rate": options.learning_rate,
        "teacher": given.source if isinstance(given, Teacher) else str(given),
        "teacher_fingerprint": teacher.fingerprint(),
        "device": teacher.device.type,
        "reward": reward.name,
        "callback": None if callback is None else type(callback).__name__,
        "versions": versions(),
    }
    return json.loads(json.dumps({**arguments, **options.agent, **named}, default=str))
