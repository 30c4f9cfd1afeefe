"""distill: from a teacher to a few-step student in one call."""

from __future__ import annotations

import copy
import dataclasses
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.type_aliases import MaybeCallback
from torch import Tensor

from redif_env import parallel, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice
from redif_env.loading import load_teacher
from redif_env.rewards import Reward, make_reward
from redif_env.teacher import Teacher, TeacherBank

from . import presets, reinforcement, reporting, resuming, run_folder, smaller
from .baselines import METHODS, UNTRAINED, OutputRegression
from .callbacks import HeldOutEvaluation, ProgressBar
from .planning import (
    LEARNED,
    PPO,
    WITH_REWARD,
    Options,
    Plan,
    check_arguments,
    choose_order,
    make_config,
    make_options,
    with_order,
)
from .ppo import ReDiFPPO
from .reporting import REFERENCE_SEED, Banks, find_judge, versions
from .run_folder import find_base, last_taken, next_free

__all__ = [
    "REFERENCE_SEED",
    "Distillation",
    "distill",
    "find_base",
    "find_judge",
    "last_taken",
    "next_free",
    "versions",
]

SEARCH = "search"
# Of other methods than PPO, whose recipe knows what is best for it alone: their own defaults.
OF_OTHERS = {"batch_size": 256, "learning_rate": 2e-4}
NUM_VALIDATION = 512  # tasks that the grid is searched on, and training is followed


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What `distill` returns.

    Attributes:
        student: The averaged student, in evaluation mode; a copy, that training on does not change.
        timesteps: Its grid, float32 `(num_steps + 1,)`.
        report: What `summary.json` holds.
        model: The agent, to go on training with; None for another method than PPO.
    """

    student: Denoiser
    timesteps: Tensor
    report: dict[str, Any]
    model: ReDiFPPO | None


@dataclasses.dataclass(frozen=True)
class _Trained:
    """What training ends with.

    Attributes:
        student: The averaged student.
        timesteps: Its grid.
        history: Its evaluations on validation tasks.
        spent: Network-forward equivalents by purpose, without the warm-up's.
        trajectories: How many it was trained on; fewer than planned if a callback stopped it.
        model: The agent, or None.
    """

    student: Denoiser
    timesteps: Tensor
    history: list[dict[str, float]]
    spent: Counter[str]
    trajectories: int
    model: ReDiFPPO | None = None


def distill(
    teacher: str | Path | Teacher = "digits",
    num_steps: int = 4,
    *,
    method: str = PPO,
    student: float | Mapping[str, Any] | None = None,
    warm_up: int | None = None,
    schedule: str | Sequence[float] = SEARCH,
    reward: str | Reward = "mse",
    iterations: int = 150,
    num_envs: int = 512,
    preset: str = "default",
    guidance_scale: float | None = None,
    solver_order: int | None = None,
    group_size: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    stochastic_steps: str | None = None,
    antithetic: bool | None = None,
    n_epochs: int | None = None,
    eta: float | None = None,
    min_std: float | None = None,
    gap_fraction: float | None = None,
    ema_decay: float | None = None,
    changes: Mapping[str, Any] | None = None,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool | None = None,
    precision: str | None = None,
    shard_student: bool | None = None,
    bank_size: int = 6144,
    num_held_out: int = 1000,
    eval_every: int = 10,
    seed: int = 0,
    device: str | None = None,
    out: str | Path | None = None,
    checkpoint_every: int | None = 10,
    resume: bool = False,
    progress: bool = False,
    callback: MaybeCallback = None,
) -> Distillation:
    """Distil a teacher into a student of `num_steps` steps, and judge it on held-out noise.

    In a script that `torchrun` or `accelerate launch` starts several times, the processes train one
    student together, see docs/scaling.md: each must call this with the same arguments. All return;
    the first one writes, logs and shows progress. A run can be resumed with another number of them.

    Args:
        teacher: Bundled name, diffusers folder, or `Teacher`.
        num_steps: Steps, and network evaluations, of the student.
        method: `"ppo"`, or another technique to compare with, see `baselines.METHODS`. Those make
            `iterations * num_envs / batch_size` updates, by default of 256 tasks at 2e-4, and take
            none of `preset`, `group_size`, the options of exploration and memory, `n_epochs`,
            `changes`, adapters and `callback`.
        student: For a smaller one: its share of the teacher's parameters, such as 0.25, or settings
            of its network in place of the teacher's, such as `{"layers_per_block": 1}`. It starts
            from the teacher's corresponding weights, see `smaller.copy_weights`. None: all of it.
        warm_up: Iterations of regression on the teacher's answers before training proper, see
            `smaller.WARM_UP`; default: 1000 for a smaller student, else none.
        schedule: `"search"` for the best grid of the untrained student, `"learned"` for times that
            start there and are trained with the student, a grid name, or a list of times.
        reward: A `Reward` or the name of one. One with a map gets local credit.
        iterations: Rollouts of `num_envs` trajectories, each followed by an update.
        num_envs: Trajectories of a rollout, of all processes together.
        preset: Recipe, see `presets.PRESETS`; `group_size` to `ema_decay` default to its values.
        guidance_scale: Of the student; default: the teacher's. 1 distils guidance away, and halves
            the cost of a step.
        solver_order: Of the student's steps: 1 for DDIM's, 2 for DPM-Solver++ 2M's, the same for 1
            and 2 steps. It starts closer from 3 on, and students end closer from 4 on. Default: 1;
            of PPO's `"default"` 2 from 4 steps on with fixed times, if the reward's terms have maps
            and diffusers has such steps, as for teachers with `alphas_cumprod`.
        group_size: Trajectories that share noise and class; their mean is the baseline.
        batch_size: Transitions of a minibatch, of all processes together. Of `"default"`: 256 for
            2 steps, else 32; where times are learned 64 for one step, else 256; 64 with a reward
            with a term that has no map.
        learning_rate: Initial learning rate; with adapters, ten times the preset's by default. That
            of `"default"` is 2e-4, from 3 steps on 1e-4, at 4 and 5 5e-5, from 6 on 2e-5.
        stochastic_steps, antithetic: Where and how to explore, see `ReDiFPPO`.
        n_epochs: Passes over a rollout. Of `"default"`: 3, or 1 where `batch_size` is less than
            256: such iterations cost about half, and more of them are the better use.
        eta: Noise factor of the kernel while exploring.
        min_std: Smallest exploration std, in latent units.
        gap_fraction: Exploration std as a share of the distance to the teacher, see `ReDiFPPO`; 0
            explores with `min_std`.
        ema_decay: Of the student's moving average, an iteration.
        changes: Further changes to the recipe, by name, such as `{"target_kl": 0.05}`: what has no
            argument here of those that `reinforcement.train` knows; plain values, so that
            `resume` can compare them.
        lora_rank, lora_targets: Train adapters of this rank on these layers, in place of all
            weights, see `lora.add_adapters`; the student and its folder are ordinary all the same.
        micro_batch_size: Rows that are in the student's network at once, see `ReDiFPPO`; the
            teacher has `load_teacher(batch_size=...)`.
        gradient_checkpointing: Whether to compute activations again in place of keeping them, see
            `StudentPolicy`.
        precision: `"bfloat16"` to let the student's network compute in it while it is trained, see
            `StudentPolicy`; default `"float32"`. What is deployed and judged is float32.
        shard_student: Whether several processes share out the student, see `StudentPolicy`, for one
            that does not fit; not with adapters. The result is whole in each.
        bank_size: Training tasks whose answers the teacher is asked for.
        num_held_out: Test tasks that the report is measured on.
        eval_every: Iterations between two evaluations on validation tasks.
        seed: Of training. Banks have fixed seeds, so that runs share their cache.
        device: Where to train; default: the teacher's, or CPU. Of several processes on CUDA each
            takes the device of its local rank.
        out: Folder of the run to write, which must not exist; None writes nothing. The student is a
            diffusers folder in it, `student/`, or `student.safetensors` for modules and noise
            schedules of one's own that diffusers can not sample.
        checkpoint_every: Iterations of PPO between two checkpoints in `out/checkpoints`, of which
            the last two and the best are kept; None writes none. With them, SIGTERM and SIGINT
            finish and save the iteration in progress, and exit with 128 + the signal's number.
        resume: Whether to go on with the run in `out`, from its last whole checkpoint, see
            `docs/checkpoints.md`; all arguments but `checkpoint_every` and `progress` must be the
            same. A callback of one's own starts anew.
        progress: Show progress bars.
        callback: A further Stable-Baselines3 callback, a list of them, or a function as `learn` of
            Stable-Baselines3 takes.

    Raises:
        InvalidArgumentError: for an argument that makes no sense, before anything is written.
        RunFolderError: with `resume`, for a folder of another run, or one that is in use.
        Interrupted: a `SystemExit`, after a signal.
        LostProcessError: if another process of the run ends.
    """
    arguments = {name: value for name, value in locals().items() if name != "callback"}
    started = {"seconds": time.monotonic()}
    plan = check_arguments(arguments, callback)
    reward = make_reward(reward)
    learned = schedule == LEARNED
    recipe = presets.preset(preset, plan.num_steps, reward, learned)
    recipe = reinforcement.changed(recipe, changes or {})
    if method != PPO:
        METHODS[method].check_reward(reward)
        recipe["agent"] |= OF_OTHERS
    teacher = _as_teacher(teacher, _join_processes(teacher, device, plan))
    solver_order = choose_order(solver_order, recipe, method, teacher.denoiser)
    arguments["solver_order"] = solver_order
    description = None if student is None else smaller.describe_smaller(teacher, student)
    if description is not None and guidance_scale is not None:
        description["guidance_scale"] = guidance_scale
    noise = teacher.denoiser.schedule
    uniform = schedules.uniform(noise, plan.num_steps)
    searches = learned or schedule == SEARCH
    own = (SEARCH, LEARNED)
    given = None if searches else schedules.make_grid(schedule, noise, plan.num_steps, own)
    options = make_options(recipe, arguments, reward, description)
    config = make_config(arguments, plan, options, teacher, reward)
    if plan.written is not None and resume:
        resuming.check_same(plan.written, config)
    if plan.folder is not None:
        run_folder.check_export(teacher, guidance_scale)
    # Everything is made once on the uniform grid, so that bad options meet their errors before the
    # teacher is asked and the grid is searched.
    options.make_model(teacher, num_envs, uniform, learned)

    banks = _build_banks(teacher, plan)
    untrained = with_order(teacher.denoiser, solver_order)
    searched, search_evaluations = _search(untrained, banks.validation, plan.num_steps)
    grid = searched if given is None else given
    model = options.make_model(teacher, num_envs, grid, learned, banks.train)
    config["timesteps"] = grid.tolist()
    with resuming.claimed(plan.written, config, resume):
        started["training_seconds"] = time.monotonic()
        start, spent = _warm_up(
            plan, teacher, banks, grid, description, solver_order, guidance_scale
        )
        if method == PPO:
            trained = _train_ppo(plan, model, start, banks, grid, started, config)
        else:
            trained = _train_other(plan, teacher, start, banks, grid, reward, options)
        spent.update(trained.spent)
        rivals = {
            "student": (trained.student, trained.timesteps),
            "ddim": (teacher.denoiser, uniform),
            f"{UNTRAINED[solver_order]}_searched": (untrained, searched),
            **({"warm_up": (start, grid)} if plan.warm_up else {}),
        }
        samples = {name: reporting.sample(*rival, banks.test) for name, rival in rivals.items()}
        ledger = reporting.ledger(teacher, banks, search_evaluations if given is None else 0, spent)
        held_out = reporting.held_out(teacher, banks, samples)
        report = _report(plan, teacher, trained, ledger, held_out, started)
        if plan.written is not None:
            run_folder.write_student(plan.written, trained.student, trained.timesteps, teacher)
            run_folder.write_results(plan.written, report, teacher, banks.test, samples)
    return Distillation(trained.student, trained.timesteps, report, trained.model)


# ---- before training


def _join_processes(teacher: str | Path | Teacher, device: str | None, plan: Plan) -> str | None:
    """Meet the run's other processes, if it has any; returns the device to train on."""
    if not parallel.launched():
        return device
    default = teacher.device if isinstance(teacher, Teacher) else "cpu"
    device = str(parallel.start(device or default))
    check_choice("method", plan.method, (PPO,))  # the others train on one process
    out = "missing" if plan.folder is None else "given"
    saving = f"{plan.resume} (checkpoint_every={plan.checkpoint_every}, out {out})"
    parallel.check_same("resume", saving)
    return device


def _as_teacher(teacher: str | Path | Teacher, device: str | None) -> Teacher:
    if isinstance(teacher, Teacher):
        return teacher if device is None else teacher.to(device)
    if not isinstance(teacher, str | Path):
        raise InvalidArgumentError(
            "teacher", teacher, "pass a folder, a name, or a Teacher: load_teacher(...) makes one."
        )
    return load_teacher(teacher, device=device or "cpu")


def _build_banks(teacher: Teacher, plan: Plan) -> Banks:
    """Their seeds are fixed: the searched grid and the reports must not depend on the run's."""

    def build(size: int, split: str, seed: int = 0) -> TeacherBank:
        return TeacherBank.build(teacher, size, split=split, seed=seed, progress=plan.shows)

    return Banks(
        train=build(plan.bank_size, "train"),
        validation=build(NUM_VALIDATION, "validation"),
        test=build(plan.num_held_out, "test"),
        reference=build(plan.num_held_out, "test", REFERENCE_SEED),
    )


def _search(untrained: Denoiser, bank: TeacherBank, num_steps: int) -> tuple[Tensor, int]:
    """The best grid of the untrained student, and the evaluations that it took to find."""
    before = untrained.network_evaluations
    grid = schedules.search(untrained, bank, num_steps)
    parallel.broadcast([grid])  # processes do not share this work, but must agree on its result
    return grid, parallel.world_size() * (untrained.network_evaluations - before)


# ---- training


def _warm_up(
    plan: Plan,
    teacher: Teacher,
    banks: Banks,
    grid: Tensor,
    description: dict[str, Any] | None,
    solver_order: int,
    guidance_scale: float | None,
) -> tuple[Denoiser, Counter[str]]:
    """What training proper starts from, and what that cost."""
    start = teacher.denoiser
    if description is not None:
        start = smaller.make_smaller(teacher, description)
    start = with_order(start, solver_order)
    if guidance_scale is not None:
        start.set_guidance(guidance_scale, start.guidance_rescale)
    if not plan.warm_up:
        return start, Counter()
    options = {
        "iterations": plan.warm_up,
        "seed": plan.seed,
        "solver_order": solver_order,
        **smaller.warm_up_options(plan.num_steps),
    }
    warm, evaluations = resuming.warm_up(
        lambda: OutputRegression.train(teacher, banks.train, grid, start=start, **options),
        start,
        plan.folder,
    )
    return warm, Counter(warm_up=evaluations)


def _train_ppo(
    plan: Plan,
    model: ReDiFPPO,
    start: Denoiser,
    banks: Banks,
    grid: Tensor,
    started: dict[str, float],
    config: dict[str, Any],
) -> _Trained:
    """Train the agent, from its last checkpoint if it is resumed."""
    policy: Any = model.policy
    policy.load_student(start.network.state_dict())
    logs = plan.written
    model.set_logger(configure(str(logs) if logs else None, ["tensorboard"] if logs else []))
    held_out = HeldOutEvaluation(banks.validation, plan.eval_every)
    code = {**versions(), "source": resuming.source_digest(), "bank": banks.train.digest()}
    about = {"config": config, "code": code}
    with resuming.saving(
        model, held_out, plan.folder, plan.checkpoint_every, plan.resume, started, about
    ) as (callbacks, resumed):
        callbacks += [held_out]
        callbacks += [ProgressBar(plan.iterations, model.rollouts)] if plan.shows else []
        callbacks += [plan.callback] if plan.callback else []
        remaining = plan.iterations - model.rollouts
        model.learn(
            remaining * plan.num_envs * plan.num_steps,
            callback=callbacks,
            reset_num_timesteps=not resumed,
        )
    head = policy.schedule_head
    trajectories = model.rollouts * plan.num_envs
    return _Trained(
        student=copy.deepcopy(model.student()),
        timesteps=grid if head is None else head.grid(),
        history=held_out.history,
        spent=reinforcement.spent(model, trajectories),
        trajectories=trajectories,
        model=model,
    )


def _train_other(
    plan: Plan,
    teacher: Teacher,
    start: Denoiser,
    banks: Banks,
    grid: Tensor,
    reward: Reward,
    options: Options,
) -> _Trained:
    """Train by another method for as long; judge on validation tasks as often as PPO's student."""
    batch_size = options.agent["batch_size"]
    updates = max(plan.num_envs // batch_size, 1)  # an iteration
    history: list[dict[str, float]] = []

    def judge(update: int, student: Denoiser) -> None:
        iteration, rest = divmod(update, updates)
        if rest or (iteration % plan.eval_every and iteration != plan.iterations):
            return
        error = schedules.paired_mse(student, banks.validation, grid)
        history.append({"iteration": iteration, "paired_mse": error})

    aim: dict[str, Any] = {"reward": reward} if plan.method in WITH_REWARD else {}
    result = METHODS[plan.method].train(
        teacher,
        banks.train,
        grid,
        start=start,
        iterations=plan.iterations * updates,
        batch_size=min(batch_size, plan.num_envs),
        learning_rate=options.learning_rate,
        ema_decay=options.agent["ema_decay"],
        guidance_scale=options.env.get("guidance_scale"),
        solver_order=options.env["solver_order"],
        seed=plan.seed,
        on_iteration=judge,
        **aim,
    )
    trajectories = plan.iterations * plan.num_envs
    return _Trained(result.student, grid, history, result.ledger.evaluations, trajectories)


# ---- after training


def _report(
    plan: Plan,
    teacher: Teacher,
    trained: _Trained,
    ledger: dict[str, int],
    held_out: dict[str, dict[str, float | None]],
    started: Mapping[str, float],
) -> dict[str, Any]:
    """What `summary.json` holds."""
    threads = torch.get_num_threads()
    return {
        "method": plan.method,
        "num_steps": plan.num_steps,
        "nfe": plan.num_steps * trained.student.nfe,
        "solver_order": trained.student.solver_order,
        **reporting.sizes(teacher.denoiser, trained.student),
        "timesteps": [float(t) for t in trained.timesteps[:-1]],
        "seed": plan.seed,
        "trajectories": trained.trajectories,
        "network_evaluations": sum(ledger.values()),
        "ledger": ledger,
        "held_out": held_out,
        "history": trained.history,
        **{name: round(time.monotonic() - since, 1) for name, since in started.items()},
        "versions": versions(),
        "hardware": f"{platform.machine()}, {teacher.device}, {threads} threads",
        "processes": parallel.world_size(),
    }
