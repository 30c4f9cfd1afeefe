"""PPO as one technique among others: the same arguments, ledger and result as the baselines."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from redif_env import parallel, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice, check_integer, check_number
from redif_env.loading import describe
from redif_env.rewards import Reward, make_reward, online_terms
from redif_env.teacher import Teacher, TeacherBank, architecture
from redif_env.vector_env import FREE, ReDiFVectorEnv

from . import presets
from .baselines.base import FORWARD_AND_BACKWARD, Ledger, Result
from .callbacks import IterationCallback
from .choices import ScheduleHead
from .online import UpdateReward
from .ppo import ReDiFPPO
from .sampling import sample

NUM_COUNTED = 512  # tasks whose steps are counted for a mean
# What a recipe's changes mean that are no arguments of `ReDiFPPO`.
ENV_OPTIONS = ("group_size", "step_cost", "solver_order")
POLICY_OPTIONS = (
    "exploration_mean",
    "exploration_noise",
    "exploration_unit",
    "learn_std",
    "schedule_lr_scale",
)
# Arguments that are made here: a rollout is an episode of all, and figures go to the history.
MADE = (
    *("policy", "env", "policy_kwargs", "_init_setup_model", "n_steps"),
    *("rollout_buffer_class", "rollout_buffer_kwargs", "tensorboard_log"),
)
# Starts close to the grid, and stops early or late often enough to learn from it.
ADAPTIVE_HEAD = {"kind": "beta", "adaptive": True, "concentration": 60.0, "stop_prob": 0.3}


def make_model(
    teacher: Teacher,
    num_envs: int,
    timesteps: Tensor,
    learned: bool,
    bank: TeacherBank | None,
    env_options: Mapping[str, Any],
    agent_options: Mapping[str, Any],
    adaptive: bool = False,
) -> ReDiFPPO:
    """The agent on a fixed grid, or on times that start there and are learned, see `train`."""
    times: dict[str, Any] = {"schedule": timesteps}
    if learned:
        num_steps = len(timesteps) - 1
        fewest = 1 if adaptive else num_steps
        times = {"schedule": FREE, "num_steps": num_steps, "min_steps": fewest}
        policy = {**agent_options["policy_kwargs"], "timesteps": timesteps.tolist()}
        policy |= {"schedule_head": ADAPTIVE_HEAD} if adaptive else {}
        agent_options = {**agent_options, "policy_kwargs": policy}
    env = ReDiFVectorEnv(
        num_envs, teacher, bank=bank, shard=parallel.shard(), **times, **env_options
    )
    return ReDiFPPO("StudentPolicy", env, **agent_options)


def spent(model: ReDiFPPO, trajectories: int) -> Counter[str]:
    """What an agent's training asked networks for, in network-forward equivalents by purpose.

    1 a row sent forward, 3 forward and back, 4 with gradient checkpointing, which sends a row
    forward twice. Of a reward: its own networks, whatever their size. The critic and the network of
    an adaptive schedule, which are far smaller than any student, do not count.

    Args:
        model: The agent.
        trajectories: How many there were, of all processes. Where they end at times of their own,
            all rows are scored at every step.
    """
    policy: Any = model.policy
    env: Any = model.env
    process = env.get_attr("process", [0])[0]
    reward, scored = process.reward, trajectories if process.lock_step else model.num_timesteps
    trained = model.rows_trained * policy.denoiser.nfe
    factor = 4 if policy.settings["gradient_checkpointing"] else FORWARD_AND_BACKWARD
    reference = policy.reference_denoiser
    learning = sum(getattr(term, "network_evaluations", 0) for term in online_terms(reward))
    processes = parallel.world_size()  # each has counted its own, and all are alike
    return Counter(
        rollout=processes * (policy.denoiser.network_evaluations - trained),
        update=processes * factor * trained,
        reference=0 if reference is None else processes * reference.network_evaluations,
        reward=scored * reward.nfe + processes * learning,
    )


def train(
    teacher: Teacher,
    bank: TeacherBank,
    grid: Tensor,
    *,
    preset: str = "default",
    iterations: int | None = None,
    budget: int | None = None,
    num_envs: int = 512,
    start: Denoiser | None = None,
    learned: bool = False,
    adaptive: bool = False,
    reward: str | Reward = "mse",
    seed: int = 0,
    on_iteration: Callable[[int, Denoiser], None] | None = None,
    **changes: Any,
) -> Result:
    """Train a student by a recipe of PPO; arguments and result as of `baselines.run`.

    Args:
        teacher: The teacher; not changed.
        bank: Training tasks, on the teacher's device.
        grid: The student's times, `(num_steps + 1,)`.
        preset: Recipe, see `presets.PRESETS`.
        iterations: Rollouts of `num_envs` trajectories, each followed by an update.
        budget: In its place, network-forward equivalents to spend: as many iterations as fit, by
            what the first two of another agent with the same settings cost.
        num_envs: Trajectories of a rollout.
        start: What training starts from, with its guidance scale; not changed. Default: the
            teacher.
        learned: Whether to train the times too, from `grid`.
        adaptive: With `learned`: whether each sample has times and a number of steps of its own,
            at most as many as `grid`. A step should have a `step_cost` then.
        reward: Without a map credit is global. Terms that are trained are, after every rollout.
        seed: Of training.
        on_iteration: Called with the iterations done and the averaged student, see
            `ReDiFPPO.student`.
        changes: To the recipe: `group_size`, `step_cost`, `solver_order`, `decay`,
            `exploration_mean`, `exploration_noise`, `exploration_unit`, `learn_std`,
            `schedule_lr_scale`, and arguments of `ReDiFPPO`.

    Raises:
        InvalidArgumentError: for an argument that makes no sense, before anything is computed.
    """
    if (iterations is None) == (budget is None):
        raise InvalidArgumentError(
            "iterations", iterations, "pass either iterations or budget, and not both."
        )
    if adaptive and not learned:
        raise InvalidArgumentError("adaptive", adaptive, "pass learned=True, too.")
    grid = schedules.explicit(grid, teacher.denoiser.schedule)

    def make() -> ReDiFPPO:
        own = copy.deepcopy(make_reward(reward))  # one that is trained starts anew
        env_options, agent_options = recipe_options(preset, changes, own, len(grid) - 1, learned)
        if start is not None and _differs(start, teacher.denoiser):
            description = describe(start, teacher.make_solver())
            agent_options["policy_kwargs"]["student"] = description
        if start is not None:
            env_options["guidance_scale"] = start.guidance_scale
        env_options |= {"reward": own, "seed": seed}
        agent_options["seed"] = seed
        model = make_model(
            teacher, num_envs, grid, learned, bank, env_options, agent_options, adaptive
        )
        model.set_logger(configure(None, []))
        policy: Any = model.policy
        policy.load_student((start or teacher.denoiser).network.state_dict())
        return model

    def learn(model: ReDiFPPO, iterations: int, callbacks: list[BaseCallback]) -> Counter[str]:
        env: Any = model.env
        if online_terms(env.get_attr("process", [0])[0].reward):
            callbacks = [UpdateReward(), *callbacks]
        model.learn(iterations * num_envs * (len(grid) - 1), callback=callbacks)
        return spent(model, iterations * num_envs)

    model = make()
    if budget is not None:
        budget = check_integer("budget", budget, 1)
        # The first also measures the gap to the teacher.
        first, second = (learn(make(), iterations, []).total() for iterations in (1, 2))
        iterations = 1 + max(budget - first, 0) // (second - first)
    length = check_integer("iterations", iterations, 1)
    ledger = Ledger()
    follower = _Follower(ledger, num_envs, on_iteration)
    ledger.evaluations = learn(model, length, [follower])
    ledger.updates["student"] = model.updates
    policy: Any = model.policy
    student = model.student()
    result = Result(
        student=student,
        timesteps=policy.schedule_head.grid() if learned and not adaptive else grid,
        ledger=ledger,
        history=follower.history,
        sampler=schedules.sample,
        nfe=(len(grid) - 1) * student.nfe,
    )
    return _adaptively(result, policy.schedule_head, bank) if adaptive else result


def _adaptively(result: Result, head: ScheduleHead, bank: TeacherBank) -> Result:
    """The result with a sampler whose times a head chooses, and its mean evaluations a sample."""

    def sampler(
        student: Denoiser, x_T: Tensor, condition: Tensor | None, timesteps: Tensor
    ) -> Tensor:
        return sample(student, head, x_T, condition)[0]

    tasks = bank.subset(min(len(bank), NUM_COUNTED))
    _, num_steps = sample(result.student, head, tasks.x_T, tasks.condition)
    nfe = float(num_steps.double().mean()) * result.student.nfe
    return dataclasses.replace(result, sampler=sampler, nfe=nfe)


def recipe_options(
    preset: str,
    changes: Mapping[str, Any],
    reward: Reward,
    num_steps: int | None = None,
    learned: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of environment and agent: of `presets.preset`, with changes as of `train`."""
    recipe = changed(presets.preset(preset, num_steps, reward, learned), changes)
    agent = recipe["agent"]
    rate = check_number("learning_rate", agent["learning_rate"])
    agent["learning_rate"] = LinearSchedule(rate, 0.0 if recipe["decay"] else rate, 1.0)
    return recipe["env"], {**agent, "policy_kwargs": recipe["policy"]}


def changed(recipe: presets.Recipe, changes: Mapping[str, Any]) -> presets.Recipe:
    """A recipe with changes by name, see `train`.

    Raises:
        InvalidArgumentError: for a name that nothing knows.
    """
    recipe = copy.deepcopy(recipe)
    options = [name for name in inspect.signature(ReDiFPPO).parameters if name not in MADE]
    for name, value in changes.items():
        check_choice("changes", name, ("decay", *ENV_OPTIONS, *POLICY_OPTIONS, *options))
        if name == "decay":
            recipe["decay"] = value
        else:
            recipe[_part(name)][name] = value
    return recipe


def _part(name: str) -> str:
    """The part of a recipe that an option is in."""
    return "env" if name in ENV_OPTIONS else "policy" if name in POLICY_OPTIONS else "agent"


class _Follower(IterationCallback):
    """Keeps the history and the time of a run, without the time of `on_iteration`."""

    def __init__(
        self,
        ledger: Ledger,
        num_envs: int,
        on_iteration: Callable[[int, Denoiser], None] | None,
    ) -> None:
        super().__init__()
        self.ledger = ledger
        self.num_envs = num_envs
        self.called = on_iteration
        self.history: list[dict[str, float]] = []
        self.started = time.monotonic()

    def on_iteration(self) -> None:
        model: Any = self.model
        self.ledger.seconds += time.monotonic() - self.started
        if self.iteration:
            self.history.append(
                {
                    "iteration": self.iteration,
                    "loss": -model.ep_info_buffer[-1]["r"],
                    "network_evaluations": spent(model, self.iteration * self.num_envs).total(),
                }
            )
        if self.called is not None:
            self.called(self.iteration, model.student())
        self.started = time.monotonic()


def _differs(student: Denoiser, teacher: Denoiser) -> bool:
    """Whether the two have other architectures, or guide in another way."""
    if student.guidance_rescale != teacher.guidance_rescale:
        return True
    return architecture(student.network) != architecture(teacher.network)
