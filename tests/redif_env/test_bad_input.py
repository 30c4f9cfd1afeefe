"""Bad input meets a typed error that names the argument, the value and the remedy.

One table for the whole public surface. Each case: what is called, the error's class, the argument
that the message names, and a piece of the value that it shows.
"""

import contextlib
import re
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from agents import ReDiFPPO, TorchVecEnv, distill, export_student
from agents.evaluation import Judge
from redif_env import (
    MSE,
    PSNR,
    SSIM,
    Denoiser,
    FlatVectorObservation,
    ReDiFEnv,
    ReDiFScheduleVectorEnv,
    ReDiFVectorEnv,
    Reward,
    Teacher,
    TeacherBank,
    load_denoiser,
    load_teacher,
    rewards,
    schedules,
    transition,
)
from redif_env import noise as noises
from redif_env.errors import (
    CacheError,
    InvalidActionError,
    InvalidArgumentError,
    InvalidRewardError,
    ReDiFError,
    TeacherFolderError,
)

DIM = 65
NAN, INF = float("nan"), float("inf")
MISSING = "cuda:99" if torch.cuda.is_available() else "cuda"  # a device that torch has not here


@pytest.fixture(scope="module")
def given(teacher, bank, tmp_path_factory):
    """What cases need: teacher, bank, an empty folder, and makers of environments."""
    folder = tmp_path_factory.mktemp("bad-input")
    (folder / "file").write_text("")
    return SimpleNamespace(
        teacher=teacher,
        bank=bank,
        schedule=teacher.denoiser.schedule,
        folder=folder,
        make=lambda n=4, **options: ReDiFVectorEnv(n, teacher, **{"bank": bank, **options}),
        zeros=torch.zeros(4, DIM),
    )


def env(num_envs=4, **options):
    """A case that makes an environment."""
    return lambda given: given.make(num_envs, **options)


def act(change):
    """A case that steps an environment with changed zeros."""

    def case(given):
        made = given.make()
        made.reset(seed=0)
        made.step(change(given.zeros.clone()))

    return case


def act_single(action):
    def case(given):
        made = ReDiFEnv(teacher=given.teacher, bank=given.bank)
        made.reset(seed=0)
        made.step(action)

    return case


def choosing(**options):
    """A case that makes an environment of schedule choices."""
    return lambda given: ReDiFScheduleVectorEnv(4, given.teacher, bank=given.bank, **options)


def choose(actions):
    """A case that steps one."""

    def case(given):
        made = choosing()(given)
        made.reset(seed=0)
        made.step(actions)

    return case


def put(row, column, value):
    def change(actions):
        actions[row, column] = value
        return actions

    return change


def tasks(value):
    return lambda given: given.make().reset(options={"tasks": value})


def build(**options):
    """A case that builds a bank."""

    def case(given):
        return TeacherBank.build(
            given.teacher, **{"size": 2, "cache_dir": given.folder / "bank", **options}
        )

    return case


def with_bank(**changes):
    def case(given):
        parts = {name: getattr(given.bank, name) for name in ("x_T", "teacher_x_0", "condition")}
        made = {name: change(parts[name]) for name, change in changes.items()}
        given.make(bank=TeacherBank(**{**parts, **made}))

    return case


def denoiser(network=None, schedule=None, prediction="sample", shape=(1, 8, 8), **options):
    def case(given):
        Denoiser(network or nn.Identity(), schedule or given.schedule, prediction, shape, **options)

    return case


def folder(name):
    return lambda given: load_teacher(given.folder / name)


class Shapeless(Reward):
    def __call__(self, x_0, teacher_x_0, condition):
        return torch.zeros(())


class Infinite(Reward):
    def __call__(self, x_0, teacher_x_0, condition):
        return torch.full((len(x_0),), INF)


def reward_of(reward):
    def case(given):
        made = given.make(reward=reward, schedule=[500])
        made.reset(seed=0)
        made.step(torch.zeros(4, DIM - 1))

    return case


def ppo(env_options=None, **options):
    def case(given):
        made = given.make(**{"schedule": "uniform", "group_size": 2, **(env_options or {})})
        ReDiFPPO("StudentPolicy", made, **options)

    return case


def existing(given):
    return export_student(
        given.teacher.denoiser, torch.tensor([500.0, 0.0]), {}, given.folder / "file"
    )


def small_ssim(given):
    x_0 = torch.zeros(1, 1, 4, 4)
    return SSIM()(x_0, x_0, None)


def unguided(given):
    guided = load_denoiser("digits", guidance_scale=2.0)
    return guided(given.bank.x_T[:1], torch.ones(1), None)


def explore(mean):
    def case(given):
        x, t, s = torch.zeros(1, 2), torch.full((1,), 500.0), torch.full((1,), 100.0)
        return transition.exploration(given.schedule, x, x, t, s, 0.1, 0.1, mean=mean)

    return case


BAD, ACTION, REWARD = InvalidArgumentError, InvalidActionError, InvalidRewardError
FOLDER, CACHE = TeacherFolderError, CacheError

CASES = {
    # the environment's arguments
    "no environments": (env(0), BAD, "num_envs", "0"),
    "half an environment": (env(2.5), BAD, "num_envs", "2.5"),
    "environments in words": (env("four"), BAD, "num_envs", "'four'"),
    "a group that does not divide": (env(4, group_size=3), BAD, "group_size", "3"),
    "an empty group": (env(group_size=0), BAD, "group_size", "0"),
    "no steps": (env(num_steps=0), BAD, "num_steps", "0"),
    "a step too few": (env(schedule=[500, 100], num_steps=3), BAD, "num_steps", "3"),
    "True steps": (env(num_steps=True), BAD, "num_steps", "True"),
    "steps of an array": (env(num_steps=np.array([4, 4])), BAD, "num_steps", "array"),
    "too many steps": (env(schedule="uniform", num_steps=1000), BAD, "num_steps", "1000"),
    "an unknown schedule": (env(schedule="cosine"), BAD, "schedule", "'cosine'"),
    "a rising grid": (env(schedule=[100, 500]), BAD, "schedule", "[100, 500]"),
    "a grid that stands still": (env(schedule=[500, 500, 0]), BAD, "schedule", "[500, 500, 0]"),
    "a grid beyond the noise": (env(schedule=[1000, 500]), BAD, "schedule", "[1000, 500]"),
    "an empty grid": (env(schedule=[]), BAD, "schedule", "[]"),
    "a grid with NaN": (env(schedule=[NAN, 3]), BAD, "schedule", "[nan, 3]"),
    "a grid between timesteps": (env(schedule=[500.5]), BAD, "schedule", "[500.5]"),
    "a grid of words": (env(schedule=["late", "early"]), BAD, "schedule", "late"),
    "an unknown action type": (env(action_type="noise"), BAD, "action_type", "'noise'"),
    "an unknown reward": (env(reward="beauty"), BAD, "reward", "'beauty'"),
    "a reward of another kind": (env(reward=3), BAD, "reward", "3"),
    "an unknown term": (env(reward="mse + 2*beauty"), BAD, "reward", "'2*beauty'"),
    "a weight in words": (env(reward="much*mse"), BAD, "weight", "'much"),
    "a cost below zero": (env(step_cost=-0.1), BAD, "step_cost", "-0.1"),
    "a cost of NaN": (env(step_cost=NAN), BAD, "step_cost", "nan"),
    "a cost of two": (env(step_cost=torch.ones(2)), BAD, "step_cost", "tensor"),
    "a bound of zero": (env(action_bound=0), BAD, "action_bound", "0"),
    "an infinite bound": (env(action_bound=INF), BAD, "action_bound", "inf"),
    "an infinite scale": (env(residual_scale=INF), BAD, "residual_scale", "inf"),
    "an unknown split": (env(split="holdout"), BAD, "split", "'holdout'"),
    "an empty bank": (env(bank_size=0), BAD, "bank_size", "0"),
    "a bank's seed below zero": (env(bank_seed=-1), BAD, "bank_seed", "-1"),
    "a seed below zero": (env(seed=-5), BAD, "seed", "-5"),
    "a seed in words": (lambda g: g.make().reset(seed="one"), BAD, "seed", "'one'"),
    "an unknown render mode": (env(render_mode="human"), BAD, "render_mode", "'human'"),
    "an unknown device": (lambda g: ReDiFVectorEnv(device="abacus"), BAD, "device", "'abacus'"),
    "another device": (env(device="meta"), BAD, "device", "'meta'"),
    "a teacher of another kind": (lambda g: ReDiFVectorEnv(2, 7), BAD, "teacher", "7"),
    "a bank of another kind": (env(bank=[1, 2]), BAD, "bank", ""),
    "a bank of other images": (with_bank(x_T=lambda v: v[:, :, :4]), BAD, "bank", "(1, 4, 8)"),
    "a bank without classes": (with_bank(condition=lambda v: None), BAD, "bank", "without"),
    "a bank with missing classes": (with_bank(condition=lambda v: v[:3]), BAD, "bank", ""),
    "a bank with missing answers": (with_bank(teacher_x_0=lambda v: v[:3]), BAD, "bank", ""),
    "too few tasks": (tasks([1, 2]), BAD, "options['tasks']", "[1, 2]"),
    "a task too large": (tasks([0, 1, 2, 32]), BAD, "options['tasks']", "32"),
    "a task below zero": (tasks([0, 1, 2, -1]), BAD, "options['tasks']", "-1"),
    "half a task": (tasks([0, 1, 2, 0.5]), BAD, "options['tasks']", "0.5"),
    "tasks in words": (tasks("abcd"), BAD, "options['tasks']", "'abcd'"),
    "a group of two tasks": (
        lambda g: g.make(group_size=2).reset(options={"tasks": [0, 0, 1, 2]}),
        BAD,
        "options['tasks']",
        "[0, 0, 1, 2]",
    ),
    "an option that is none": (
        lambda g: g.make().reset(options={"task": [0, 1, 2, 3]}),
        BAD,
        "options",
        "'task'",
    ),
    "a schedule's option that is none": (
        lambda g: ReDiFScheduleVectorEnv(1, g.teacher, bank=g.bank).reset(options={"grid": 3}),
        BAD,
        "options",
        "'grid'",
    ),
    "a single environment's option": (
        lambda g: ReDiFEnv(teacher=g.teacher, bank=g.bank).reset(options={"task": [0]}),
        BAD,
        "options",
        "'task'",
    ),
    # actions
    "an action of NaN": (act(put(2, 7, NAN)), ACTION, "actions", "NaN"),
    "an infinite action": (act(put(0, 0, -INF)), ACTION, "actions", "infinity"),
    "an infinite choice": (act(put(0, 64, INF)), ACTION, "actions", "infinity"),
    "an action outside the Box": (act(put(1, 0, 10.5)), ACTION, "actions", "outside"),
    "a choice outside the Box": (act(put(1, 64, -1.1)), ACTION, "actions", "outside"),
    "an action too short": (act(lambda a: a[:, 1:]), ACTION, "actions.shape", "(4, 64)"),
    "an action too few": (act(lambda a: a[1:]), ACTION, "actions.shape", "(3, 65)"),
    "an action for one": (act(lambda a: a[0]), ACTION, "actions.shape", "(65,)"),
    "actions in integers": (act(lambda a: a.long()), ACTION, "actions.dtype", "torch.int64"),
    "actions in bits": (act(lambda a: a.numpy() > 0), ACTION, "actions.dtype", "torch.bool"),
    "complex actions": (act(lambda a: a + 0j), ACTION, "actions.dtype", "torch.complex64"),
    "actions in words": (act(lambda a: "left"), ACTION, "actions", "'left'"),
    "no actions": (act(lambda a: None), ACTION, "actions", "None"),
    "actions of many lengths": (act(lambda a: [[1.0], [1.0, 2.0]]), ACTION, "actions", "[[1.0]"),
    "a single action too long": (act_single(np.zeros(66)), ACTION, "action.shape", "(66,)"),
    "a single action of NaN": (act_single(np.full(DIM, NAN)), ACTION, "actions", "NaN"),
    "a single action in integers": (
        act_single(np.zeros(DIM, int)),
        ACTION,
        "actions.dtype",
        "torch.int64",
    ),
    # schedule choices
    "a free schedule to choose from": (choosing(schedule="free"), BAD, "schedule", "'free'"),
    "rising candidates": (choosing(schedule=[1, 2]), BAD, "schedule", "[1, 2]"),
    "no candidates": (choosing(num_candidates=0), BAD, "num_candidates", "0"),
    "too many candidates": (choosing(num_candidates=5000), BAD, "num_candidates", "5000"),
    "a number of listed candidates": (
        choosing(schedule=[9, 5], num_candidates=2),
        BAD,
        "num_candidates",
        "2",
    ),
    "at least no steps": (choosing(min_steps=0), BAD, "min_steps", "0"),
    "at most no steps": (choosing(max_steps=0), BAD, "max_steps", "0"),
    "at least more than at most": (choosing(min_steps=4, max_steps=3), BAD, "min_steps", "4"),
    "more steps than candidates": (choosing(max_steps=17), BAD, "max_steps", "17"),
    "at least more than candidates": (
        choosing(schedule=[9, 5], min_steps=3),
        BAD,
        "min_steps",
        "3",
    ),
    "a student in words": (choosing(student="digits"), BAD, "student", "'digits'"),
    "a student of another shape": (
        lambda g: choosing(student=Denoiser(nn.Identity(), g.schedule, "sample", (1, 4, 4)))(g),
        BAD,
        "student",
        "latent_shape=(1, 4, 4)",
    ),
    "a student without classes": (
        lambda g: choosing(student=Denoiser(nn.Identity(), g.schedule, "sample", (1, 8, 8)))(g),
        BAD,
        "student",
        "num_classes=None",
    ),
    "a student of louder noise": (
        lambda g: choosing(
            student=Denoiser(
                nn.Identity(), noises.VESchedule(), "sample", (1, 8, 8), num_classes=10
            )
        )(g),
        BAD,
        "student",
        "schedule.initial_std=",
    ),
    "choices for three": (
        choose(torch.zeros(3, dtype=torch.int64)),
        ACTION,
        "actions.shape",
        "(3,)",
    ),
    "choices in float": (choose(torch.zeros(4)), ACTION, "actions.dtype", "torch.float32"),
    "choices of yes and no": (choose([True] * 4), ACTION, "actions.dtype", "torch.bool"),
    "choices in words": (choose(["0"] * 4), ACTION, "actions", "['0', '0', '0', '0']"),
    "a choice too high": (choose([0, 0, 16, 0]), ACTION, "actions", "outside the action space"),
    "a choice below zero": (choose([0, -1, 0, 0]), ACTION, "actions", "outside the action space"),
    "a flat view of nothing": (lambda g: FlatVectorObservation(None), BAD, "env", "None"),
    # rewards
    "a reward for all": (reward_of(Shapeless()), REWARD, "reward 'shapeless' returned", "()"),
    "an infinite reward": (reward_of(Infinite()), REWARD, "reward 'infinite' returned", "infinity"),
    "an infinite weight": (lambda g: INF * MSE(), BAD, "weight", "inf"),
    "a weight of NaN": (lambda g: rewards.make_reward("nan*mse"), BAD, "weight", "nan"),
    "a missing map": (lambda g: PSNR().reward_map(*[g.zeros] * 3), BAD, "reward", "'psnr'"),
    "a data range of zero": (lambda g: PSNR(data_range=0), BAD, "data_range", "0"),
    "a window of zero": (lambda g: SSIM(sigma=0), BAD, "sigma", "0"),
    "a window larger than the image": (small_ssim, BAD, "sigma", "1.5"),
    # schedules and the kernel
    "no steps of a grid": (lambda g: schedules.uniform(g.schedule, 0), BAD, "num_steps", "0"),
    "no steps to search": (
        lambda g: schedules.search(g.teacher.denoiser, g.bank, 0),
        BAD,
        "num_steps",
        "0",
    ),
    "a table that rises": (
        lambda g: noises.VPSchedule(torch.tensor([0.1, 0.2])),
        BAD,
        "alpha_bar",
        "tensor([0.1000, 0.2000])",
    ),
    "a table of NaN": (lambda g: noises.VPSchedule(torch.full((3,), NAN)), BAD, "alpha_bar", "nan"),
    "a table of two rows": (
        lambda g: noises.VPSchedule(torch.ones(2, 3)),
        BAD,
        "alpha_bar",
        "(2, 3)",
    ),
    "an empty axis": (lambda g: noises.FlowSchedule(0), BAD, "num_train_timesteps", "0"),
    "noise that shrinks": (lambda g: noises.VESchedule(3.0, 2.0), BAD, "sigma_max", "2.0"),
    "no curvature": (lambda g: noises.VESchedule(rho=0), BAD, "rho", "0"),
    "an unknown mean": (explore("sum"), BAD, "mean", "'sum'"),
    # denoisers, teachers and folders
    "a function as network": (
        lambda g: Denoiser(lambda x_t, t: x_t, noises.FlowSchedule(), "sample", (1, 8, 8)),
        BAD,
        "network",
        "<function",
    ),
    "a scheduler as schedule": (
        lambda g: Denoiser(nn.Identity(), DDIMScheduler(), "sample", (1, 8, 8)),
        BAD,
        "schedule",
        "'DDIMScheduler'",
    ),
    "a solver that is made already": (
        lambda g: Teacher(g.teacher.denoiser, DDIMScheduler()),
        BAD,
        "make_solver",
        "'DDIMScheduler'",
    ),
    "a network as teacher's denoiser": (
        lambda g: Teacher(nn.Identity(), DDIMScheduler),
        BAD,
        "denoiser",
        "'Identity'",
    ),
    "a teacher on no device": (lambda g: load_teacher(device="gpu"), BAD, "device", "'gpu'"),
    "a teacher where torch is not": (lambda g: load_teacher(device=MISSING), BAD, "device", ""),
    "a run on no device": (lambda g: distill("digits", device="gpu"), BAD, "device", "'gpu'"),
    "a run where torch is not": (lambda g: distill(g.teacher, device=MISSING), BAD, "device", ""),
    "a dtype by name": (lambda g: load_teacher(dtype="float16"), BAD, "dtype", "'float16'"),
    "a dtype of integers": (lambda g: load_teacher(dtype=torch.int8), BAD, "dtype", "torch.int8"),
    "an unknown prediction": (denoiser(prediction="eps"), BAD, "prediction_type", "'eps'"),
    "epsilon without signal": (
        denoiser(prediction="epsilon", schedule=noises.FlowSchedule()),
        BAD,
        "prediction_type",
        "'epsilon'",
    ),
    "a side of zero": (denoiser(shape=(1, 0)), BAD, "latent_shape", "0"),
    "a shape that is a number": (denoiser(shape=64), BAD, "latent_shape", "64"),
    "no classes": (denoiser(num_classes=0), BAD, "num_classes", "0"),
    "guidance without classes": (denoiser(guidance_scale=2), BAD, "guidance_scale", "2"),
    "guidance below zero": (denoiser(guidance_scale=-1), BAD, "guidance_scale", "-1"),
    "guidance without a condition": (unguided, BAD, "condition", "None"),
    "a teacher of no steps": (lambda g: load_teacher(num_steps=0), BAD, "num_steps", "0"),
    "a teacher of half a step": (
        lambda g: Teacher(g.teacher.denoiser, g.teacher.make_solver, 0.5),
        BAD,
        "num_steps",
        "0.5",
    ),
    "a folder that is missing": (folder("nowhere"), FOLDER, "teacher", "nowhere"),
    "a folder that is a file": (folder("file"), FOLDER, "teacher", "file"),
    "an empty folder": (folder("."), FOLDER, "teacher", "config.json"),
    "a name that is unknown": (lambda g: load_denoiser("letters"), FOLDER, "teacher", "'letters'"),
    "an environment of a missing teacher": (
        lambda g: gym.make_vec("ReDiF-v0", num_envs=2, teacher="letters"),
        FOLDER,
        "teacher",
        "'letters'",
    ),
    # banks and their cache
    "a bank of no tasks": (build(size=0), BAD, "size", "0"),
    "a bank of another split": (build(split="all"), BAD, "split", "'all'"),
    "a bank of a seed below zero": (build(seed=-1), BAD, "seed", "-1"),
    "a batch of nothing": (build(batch_size=0), BAD, "batch_size", "0"),
    "a cache in a file": (
        lambda g: TeacherBank.build(g.teacher, 2, cache_dir=g.folder / "file"),
        CACHE,
        "cache_dir",
        "file",
    ),
    # agents
    "an unknown ratio": (ppo(ratio="product"), BAD, "ratio", "'product'"),
    "an unknown advantage": (ppo(advantage="vtrace"), BAD, "advantage", "'vtrace'"),
    "an unknown credit": (ppo(credit="blame"), BAD, "credit", "'blame'"),
    "local credit of one ratio": (ppo(ratio="sum", credit="local"), BAD, "ratio", "'sum'"),
    "groups of one": (ppo({"group_size": 1}), BAD, "group_size", "1"),
    "times of a fixed schedule": (ppo(trained="schedule"), BAD, "trained", "'schedule'"),
    "an adapter of nothing": (lambda g: TorchVecEnv(3), BAD, "env", "3"),
    "a student where something is": (existing, BAD, "folder", "file"),
    "a run of no steps": (lambda g: distill(num_steps=0), BAD, "num_steps", "0"),
    "a run where something is": (lambda g: distill(out=g.folder), BAD, "out", "bad-input"),
    "a judge that is missing": (lambda g: Judge.load(g.folder / "no"), FOLDER, "judge", "no"),
}


def assert_helps(message, argument, value):
    """`argument=value: remedy.`, where the remedy says at least what to do with what."""
    found = re.match(r"(?s)(.*?)=(.*?): (.*)", message)
    assert found, message
    assert found[1] == argument
    assert value in message
    remedy = found[3]
    assert remedy.endswith("."), remedy
    assert len(remedy.split()) >= 2, remedy


@pytest.mark.parametrize(("call", "kind", "argument", "value"), CASES.values(), ids=CASES.keys())
def test_bad_input_meets_a_typed_error(given, call, kind, argument, value):
    with pytest.raises(ReDiFError) as caught:
        call(given)
    assert type(caught.value) is kind
    assert_helps(str(caught.value), argument, value)
    if kind is not CacheError:
        assert isinstance(caught.value, ValueError)
        assert caught.value.argument == argument


def test_the_table_is_long_enough():
    assert len(CASES) >= 40


def test_nothing_was_written(given):
    """Every refusal came before the first file."""
    for call, *_ in CASES.values():
        with contextlib.suppress(Exception):  # which one is the other test's business
            call(given)
    assert [path.name for path in given.folder.iterdir()] == ["file"]


@pytest.mark.parametrize("message", ["num_envs is wrong", "num_envs=0: no."])
def test_a_message_that_does_not_help_is_noticed(message):
    with pytest.raises(AssertionError):
        assert_helps(message, "num_envs", "0")
