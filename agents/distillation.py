"""distill: from a teacher to a few-step student in one call."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import itertools
import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor

from redif_env import parallel, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice, check_integer, check_number
from redif_env.files import write_json
from redif_env.loading import BUNDLED, load_teacher
from redif_env.prompts import INDEX
from redif_env.rewards import Reward, make_reward
from redif_env.teacher import Teacher, TeacherBank

from . import presets, reinforcement, resuming, smaller
from .baselines import METHODS, OutputRegression, Result
from .callbacks import HeldOutEvaluation, ProgressBar
from .evaluation import JUDGE_FOLDER, Judge, compare
from .export import can_export, export_student
from .lora import LEARNING_RATE_SCALE, merge
from .pictures import save_samples
from .ppo import ReDiFPPO

PACKAGES = ("redif", "torch", "diffusers", "gymnasium", "stable_baselines3", "numpy")
SEARCH = "search"
LEARNED = "learned"
PPO = "ppo"
WITH_REWARD = ("backprop", "surrogate")  # other methods have an aim of their own
# Arguments of `distill` that mean something to PPO alone.
PPO_ARGUMENTS = (
    "preset",
    "group_size",
    "stochastic_steps",
    "antithetic",
    "n_epochs",
    "eta",
    "min_std",
    "gap_fraction",
    "lora_rank",
    "lora_targets",
    "micro_batch_size",
    "gradient_checkpointing",
    "precision",
    "shard_student",
    "callback",
)
# Seeds of banks: the searched grid and the reports must not depend on the run's seed.
NUM_VALIDATION = 512
REFERENCE_SEED = 1


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What `distill` returns.

    Attributes:
        student: The averaged student, in evaluation mode.
        timesteps: Its grid, float32 `(num_steps + 1,)`.
        report: What `summary.json` holds.
        model: The agent, to go on training with; None for another method than PPO.
    """

    student: Denoiser
    timesteps: Tensor
    report: dict[str, Any]
    model: ReDiFPPO | None


@dataclasses.dataclass(frozen=True)
class _Banks:
    """Tasks by purpose; no noise is in two of them."""

    train: TeacherBank
    validation: TeacherBank
    test: TeacherBank
    reference: TeacherBank


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
    callback: BaseCallback | None = None,
) -> Distillation:
    """Distil a teacher into a student of `num_steps` steps, and judge it on held-out noise.

    In a script that `torchrun` or `accelerate launch` starts several times, the processes train one
    student together, see docs/scaling.md: each must call this with the same arguments. All return;
    the first one writes, logs and shows progress. A run can be resumed with another number of them.

    Args:
        teacher: Bundled name, diffusers folder, or `Teacher`.
        num_steps: Steps, and network evaluations, of the student.
        method: `"ppo"`, or another technique to compare with, see `baselines.METHODS`. Those make
            `iterations * num_envs / batch_size` updates, and take none of `preset`, `group_size`,
            the options of exploration and memory, `n_epochs`, adapters and `callback`.
        student: For a smaller one: its share of the teacher's parameters, such as 0.25, or settings
            of its network in place of the teacher's, such as `{"layers_per_block": 1}`. It starts
            from the teacher's corresponding weights, see `smaller.copy_weights`. None: all of it.
        warm_up: Iterations of regression on the teacher's answers before training proper, see
            `smaller.WARM_UP`; default: 1000 for a smaller student, else none.
        schedule: `"search"` for the best grid of plain DDIM, `"learned"` for times that start
            there and are trained with the student, a grid name, or a list of times.
        reward: A `Reward` or the name of one. One with a map gets local credit.
        iterations: Rollouts of `num_envs` trajectories, each followed by an update.
        num_envs: Trajectories of a rollout, of all processes together.
        preset: Recipe, see `presets.PRESETS`; `group_size` to `ema_decay` default to its values.
        guidance_scale: Of the student; default: the teacher's. 1 distils guidance away, and halves
            the cost of a step.
        group_size: Trajectories that share noise and class; their mean is the baseline.
        batch_size: Transitions of a minibatch, of all processes together.
        learning_rate: Initial learning rate; with adapters, ten times the preset's by default.
        stochastic_steps, antithetic: Where and how to explore, see `ReDiFPPO`.
        n_epochs: Passes over a rollout.
        eta: Noise factor of the kernel while exploring.
        min_std: Smallest exploration std, in latent units.
        gap_fraction: Exploration std as a share of the distance to the teacher, see `ReDiFPPO`; 0
            explores with `min_std`.
        ema_decay: Of the student's moving average, an iteration.
        lora_rank, lora_targets: Train adapters of this rank on these layers, in place of all
            weights, see `lora.add_adapters`; the student and its folder are ordinary all the same.
        micro_batch_size: Rows that are in the student's network at once, see `ReDiFPPO`; the
            teacher has `load_teacher(batch_size=...)`.
        gradient_checkpointing: Whether to compute activations again in place of keeping them, see
            `StudentPolicy`.
        precision: `"bfloat16"` to let the student's network compute in it while it is trained, see
            `StudentPolicy`; default `"float32"`. What is deployed and judged is float32.
        shard_student: Whether several processes share out the student, see `StudentPolicy`'s
            `shard`, for one that does not fit; not with adapters. The result is whole in each.
        bank_size: Training tasks whose answers the teacher is asked for.
        num_held_out: Test tasks that the report is measured on.
        eval_every: Iterations between two evaluations on validation tasks.
        seed: Of training. Banks have fixed seeds, so that runs share their cache.
        device: Where to train; default: the teacher's, or CPU. Of several processes on CUDA each
            takes the device of its local rank.
        out: Folder of the run to write, which must not exist; None writes nothing. The student is a
            diffusers folder in it, `student/`, or `student.safetensors` for modules of one's own.
        checkpoint_every: Iterations of PPO between two checkpoints in `out/checkpoints`, of which
            the last two and the best are kept; None writes none. With them, SIGTERM and SIGINT
            finish and save the iteration in progress, and exit with 128 + the signal's number.
        resume: Whether to go on with the run in `out`, from its last whole checkpoint, see
            `docs/checkpoints.md`; all arguments but `checkpoint_every` and `progress` must be the
            same. A callback of one's own starts anew.
        progress: Show progress bars.
        callback: A further Stable-Baselines3 callback.

    Raises:
        InvalidArgumentError: for an argument that makes no sense, before anything is written.
        RunFolderError: with `resume`, for a folder of another run, or one that is in use.
        Interrupted: a `SystemExit`, after a signal.
        LostProcessError: if another process of the run ends.
    """
    arguments = {name: value for name, value in locals().items() if name != "callback"}
    started = {"seconds": time.monotonic()}
    iterations = check_integer("iterations", iterations, 1)
    num_held_out = check_integer("num_held_out", num_held_out, 100)
    num_steps = check_integer("num_steps", num_steps, 1)
    if warm_up is None:
        warm_up = 0 if student is None else smaller.WARM_UP_ITERATIONS
    warm_up = check_integer("warm_up", warm_up, 0)
    check_choice("method", method, (PPO, *METHODS))
    if method != PPO:
        _refuse_ppo_arguments(method, {**arguments, "callback": callback})
    recipe = presets.preset(preset)
    if checkpoint_every is not None:
        checkpoint_every = check_integer("checkpoint_every", checkpoint_every, 1)
    folder = _check_out(out, resume)
    reward = make_reward(reward)
    if parallel.launched():
        default = teacher.device if isinstance(teacher, Teacher) else "cpu"
        device = str(parallel.start(device or default))
        check_choice("method", method, (PPO,))  # the others train on one process
        saving = f"{resume} ({checkpoint_every=}, out {'missing' if out is None else 'given'})"
        parallel.check_same("resume", saving)
    run_folder = folder  # in all processes, to save and resume together
    if not parallel.is_main():
        folder, progress = None, False
    teacher = _as_teacher(teacher, device)
    description = None if student is None else smaller.describe_smaller(teacher, student)
    noise = teacher.denoiser.schedule
    uniform = schedules.uniform(noise, num_steps)
    learned = schedule == LEARNED
    searches = learned or schedule == SEARCH
    given = None if searches else schedules.make_grid(schedule, noise, num_steps)
    if lora_rank is not None and learning_rate is None:
        learning_rate = LEARNING_RATE_SCALE * recipe["agent"]["learning_rate"]
    env_options = _given(recipe["env"], group_size=group_size, guidance_scale=guidance_scale)
    env_options.update(reward=reward, bank_size=bank_size, seed=seed)
    agent_options = _given(
        recipe["agent"],
        batch_size=batch_size,
        learning_rate=learning_rate,
        stochastic_steps=stochastic_steps,
        antithetic=antithetic,
        n_epochs=n_epochs,
        eta=eta,
        min_std=min_std,
        gap_fraction=gap_fraction,
        ema_decay=ema_decay,
        micro_batch_size=micro_batch_size,
        credit=None if reward.has_map else "global",
        seed=seed,
        policy_kwargs=_given(
            recipe["policy"],
            student=description,
            lora_rank=lora_rank,
            lora_targets=lora_targets,
            gradient_checkpointing=gradient_checkpointing,
            precision=precision,
            shard=shard_student,
        ),
    )
    used = {**agent_options, "group_size": env_options["group_size"], "warm_up": warm_up}
    rate = check_number("learning_rate", agent_options["learning_rate"])
    agent_options["learning_rate"] = LinearSchedule(rate, 0.0 if recipe["decay"] else rate, 1.0)
    eval_every = check_integer("eval_every", eval_every, 1)
    config = _config({**arguments, **used}, teacher, callback)
    if folder is not None and resume:
        resuming.check_same(folder, config)
    # Everything is made once on the uniform grid, so that bad options meet their errors before the
    # teacher is asked and the grid is searched.
    reinforcement.make_model(teacher, num_envs, uniform, learned, None, env_options, agent_options)

    banks = _build_banks(teacher, bank_size, num_held_out, progress)
    searched, search_evaluations = _search(teacher, banks.validation, num_steps)
    timesteps = searched if given is None else given
    model = reinforcement.make_model(
        teacher, num_envs, timesteps, learned, banks.train, env_options, agent_options
    )
    config["timesteps"] = timesteps.tolist()
    with resuming.claimed(folder, config, resume):
        started["training_seconds"] = time.monotonic()
        start = teacher.denoiser
        if description is not None:
            start = smaller.make_smaller(teacher, description)
        spent: Counter[str] = Counter()
        if warm_up:
            options = {"iterations": warm_up, "seed": seed, **smaller.warm_up_options(num_steps)}
            start, spent["warm_up"] = resuming.warm_up(
                lambda: OutputRegression.train(
                    teacher, banks.train, timesteps, start=start, **options
                ),
                start,
                run_folder,
            )
        began_at = timesteps
        agent: ReDiFPPO | None = None
        if method == PPO:
            agent = model
            policy: Any = agent.policy
            policy.load_student(start.network.state_dict())
            logs = ["tensorboard"] if folder else []
            agent.set_logger(configure(str(folder) if folder else None, logs))
            held_out = HeldOutEvaluation(banks.validation, eval_every)
            code = {**versions(), "source": resuming.source_digest(), "bank": banks.train.digest()}
            about = {"config": config, "code": code}
            with resuming.saving(
                agent, held_out, run_folder, checkpoint_every, resume, started, about
            ) as (callbacks, resumed):
                callbacks += [held_out]
                callbacks += [ProgressBar(iterations, agent.rollouts)] if progress else []
                callbacks += [callback] if callback else []
                remaining = iterations * num_envs * num_steps - agent.num_timesteps
                agent.learn(remaining, callback=callbacks, reset_num_timesteps=not resumed)
            distilled, history = agent.student(), held_out.history
            if learned:
                timesteps = policy.schedule_head.grid()
            spent.update(reinforcement.spent(agent, iterations * num_envs))
        else:
            rounds = _Rounds(iterations, num_envs, used["batch_size"], eval_every)
            result, history = rounds.train(
                method,
                teacher,
                banks,
                timesteps,
                start=start,
                learning_rate=rate,
                ema_decay=used["ema_decay"],
                guidance_scale=guidance_scale,
                seed=seed,
                **({"reward": reward} if method in WITH_REWARD else {}),
            )
            distilled = result.student
            spent.update(result.ledger.evaluations)
        rivals: dict[str, tuple[Denoiser, Tensor]] = {
            "student": (distilled, timesteps),
            "ddim": (teacher.denoiser, uniform),
            "ddim_searched": (teacher.denoiser, searched),
        }
        if warm_up:
            rivals["warm_up"] = (start, began_at)
        samples = {name: _sample(*rival, banks.test) for name, rival in rivals.items()}
        ledger = _ledger(teacher, banks, search_evaluations if given is None else 0, spent)
        threads = torch.get_num_threads()
        report = {
            "method": method,
            "num_steps": num_steps,
            "nfe": num_steps * distilled.nfe,
            "parameters": {
                "teacher": smaller.count_parameters(teacher.denoiser.network),
                "student": smaller.count_parameters(distilled.network),
            },
            "flops": {  # of one prediction
                "teacher": smaller.count_flops(teacher.denoiser),
                "student": smaller.count_flops(distilled),
            },
            "timesteps": [float(t) for t in timesteps[:-1]],
            "seed": seed,
            "trajectories": iterations * num_envs,
            "network_evaluations": sum(ledger.values()),
            "ledger": ledger,
            "held_out": _judge(teacher, banks, samples),
            "history": history,
            **{name: round(time.monotonic() - since, 1) for name, since in started.items()},
            "versions": versions(),
            "hardware": f"{platform.machine()}, {teacher.device}, {threads} threads",
            "processes": parallel.world_size(),
        }
        if folder is not None:
            _finish_folder(folder, report, distilled, timesteps, teacher, banks.test, samples)
        return Distillation(distilled, timesteps, report, agent)


def find_judge(teacher: Teacher) -> Judge | None:
    """The judge in the teacher's folder, on the teacher's device, or None if there is none."""
    if teacher.source is None:
        return None
    folder = BUNDLED.get(teacher.source, Path(teacher.source)) / JUDGE_FOLDER
    return Judge.load(folder).to(teacher.device) if folder.is_dir() else None


def find_base(teacher: Teacher) -> Path | None:
    """The folder of a teacher's pipeline, where it has parts that a student needs too."""
    if teacher.source is None or (teacher.codec is None and teacher.denoiser.conditions is None):
        return None
    folder = Path(teacher.source)
    return folder if (folder / INDEX).is_file() else None


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def next_free(folder: Path) -> Path:
    """`folder`, or `folder-2`, `folder-3`, ... if it exists."""
    return next(each for each in _numbered(folder) if not each.exists())


def last_taken(folder: Path) -> Path:
    """The one of these before the next free one; `folder` if there is none."""
    taken = itertools.takewhile(Path.exists, _numbered(folder))
    return [folder, *taken][-1]


def _numbered(folder: Path) -> Iterator[Path]:
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _check_out(out: str | Path | None, resume: bool) -> Path | None:
    if out is None:
        if resume:
            raise InvalidArgumentError("resume", True, "pass out, the folder of the run.")
        return None
    # Only the first process needs the folder: nodes need not share a disk.
    if resume and parallel.rank_of_launcher() == 0 and not Path(out).is_dir():
        raise resuming.RunFolderError("out", str(out), "it is no folder: leave out resume.")
    if not resume and Path(out).exists():
        raise InvalidArgumentError("out", str(out), "it exists; choose another name or remove it.")
    return Path(out)


def _given(defaults: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    """The defaults, and the arguments that are not None in their place."""
    return {**defaults, **{name: value for name, value in arguments.items() if value is not None}}


def _as_teacher(teacher: str | Path | Teacher, device: str | None) -> Teacher:
    if isinstance(teacher, Teacher):
        return teacher if device is None else teacher.to(device)
    return load_teacher(teacher, device=device or "cpu")


def _search(teacher: Teacher, bank: TeacherBank, num_steps: int) -> tuple[Tensor, int]:
    """The best grid of plain DDIM, and the network evaluations that it took to find."""
    before = teacher.denoiser.network_evaluations
    grid = schedules.search(teacher.denoiser, bank, num_steps)
    parallel.broadcast([grid])  # processes do not share this work, but must agree on its result
    return grid, parallel.world_size() * (teacher.denoiser.network_evaluations - before)


def _build_banks(teacher: Teacher, bank_size: int, num_held_out: int, progress: bool) -> _Banks:
    def build(size: int, split: str, seed: int = 0) -> TeacherBank:
        return TeacherBank.build(teacher, size, split=split, seed=seed, progress=progress)

    return _Banks(
        train=build(bank_size, "train"),
        validation=build(NUM_VALIDATION, "validation"),
        test=build(num_held_out, "test"),
        reference=build(num_held_out, "test", REFERENCE_SEED),
    )


@torch.no_grad()
def _sample(denoiser: Denoiser, grid: Tensor, bank: TeacherBank) -> Tensor:
    def some(rows: Any) -> tuple[Tensor]:
        condition = None if bank.condition is None else bank.condition[rows]
        return (schedules.sample(denoiser, bank.x_T[rows], condition, grid),)

    return parallel.in_shares(some, len(bank), bank.x_T.device)[0]


def _judge(
    teacher: Teacher, banks: _Banks, samples: dict[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """The figures of each method, and of the teacher itself: paired with itself it has no error."""
    judge = find_judge(teacher)
    rows = {**samples, "teacher_floor": banks.test.teacher_x_0}
    figures = {name: compare(x_0, banks.test, banks.reference, judge) for name, x_0 in rows.items()}
    figures["teacher_floor"]["paired_mse"] = None
    return figures


def _ledger(
    teacher: Teacher, banks: _Banks, searched: int, spent: Mapping[str, int]
) -> dict[str, int]:
    """Network-forward equivalents by purpose: 1 a row sent forward, 3 forward and back.

    With gradient checkpointing 4: a row is sent forward twice.

    Counts, whatever the size of the network: a smaller student's rollout, update and warm-up are
    cheaper than the teacher's answers, see the report's `flops`. Of the reward: forward passes of
    its own networks, whatever their size.

    The teacher's answers count in full, also when they came from the cache.
    """
    asked = len(banks.train) + (len(banks.validation) if searched else 0)
    return {
        "teacher": asked * teacher.num_steps * teacher.denoiser.nfe,
        "search": searched,
        **spent,
    }


def _refuse_ppo_arguments(method: str, arguments: dict[str, Any]) -> None:
    defaults = {name: p.default for name, p in inspect.signature(distill).parameters.items()}
    refused = [name for name in PPO_ARGUMENTS if arguments[name] != defaults[name]]
    refused += ["schedule"] if arguments["schedule"] == LEARNED else []
    refused += ["reward"] if method != "backprop" and arguments["reward"] != "mse" else []
    for name in refused:
        raise InvalidArgumentError(
            name, arguments[name], f"leave it out: {method} has no use of it."
        )


@dataclasses.dataclass(frozen=True)
class _Rounds:
    """The length of another method's training in the words of PPO's."""

    iterations: int
    num_envs: int
    batch_size: int
    eval_every: int

    def train(
        self, method: str, teacher: Teacher, banks: _Banks, timesteps: Tensor, **options: Any
    ) -> tuple[Result, list[dict[str, float]]]:
        """Train, and judge on validation tasks after every `eval_every` iterations."""
        updates = max(self.num_envs // self.batch_size, 1)
        history: list[dict[str, float]] = []

        def judge(update: int, student: Denoiser) -> None:
            iteration, rest = divmod(update, updates)
            if rest or (iteration % self.eval_every and iteration != self.iterations):
                return
            error = schedules.paired_mse(student, banks.validation, timesteps)
            history.append({"iteration": iteration, "paired_mse": error})

        result = METHODS[method].train(
            teacher,
            banks.train,
            timesteps,
            iterations=self.iterations * updates,
            batch_size=min(self.batch_size, self.num_envs),
            on_iteration=judge,
            **options,
        )
        return result, history


def _config(
    arguments: dict[str, Any], teacher: Teacher, callback: BaseCallback | None
) -> dict[str, Any]:
    """What is written of a run, and compared when it is resumed; as JSON gives it back."""
    given, reward = arguments["teacher"], arguments["reward"]
    named = {
        "teacher": given.source if isinstance(given, Teacher) else str(given),
        "teacher_fingerprint": teacher.fingerprint(),
        "device": teacher.device.type,
        "reward": make_reward(reward).name,
        "callback": None if callback is None else type(callback).__name__,
        "versions": versions(),
    }
    return json.loads(json.dumps({**arguments, **named}, default=str))


def _finish_folder(
    folder: Path,
    report: dict[str, Any],
    student: Denoiser,
    timesteps: Tensor,
    teacher: Teacher,
    bank: TeacherBank,
    samples: dict[str, Tensor],
) -> None:
    if can_export(student):
        shutil.rmtree(folder / "student", ignore_errors=True)  # of a run that was resumed
        export_student(
            student, timesteps, teacher.make_solver().config, folder / "student", find_base(teacher)
        )
    else:  # a module of one's own, whose code is not ours to write
        save_model(merge(student).network, str(folder / "student.safetensors"))
    steps = report["num_steps"]
    rows = {
        f"teacher, {teacher.num_steps} steps": bank.teacher_x_0,
        f"DDIM, {steps} steps": samples["ddim"],
        f"student, {steps} steps": samples["student"],
    }
    save_samples(folder / "samples.png", rows, bank.condition, teacher.codec)
    write_json(folder / "summary.json", report)
