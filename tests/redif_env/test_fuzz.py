"""Whatever is passed: a valid result, or one of our typed errors; never a crash, hang or NaN.

The fast tests try a few hundred examples, always the same. `make test-slow` tries thousands.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import shutil

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from agents import ReDiFPPO, distill
from agents.evaluation import JUDGE_FOLDER, Judge
from agents.export import export_student
from examples.evaluate import read_samples
from redif_env import (
    Conditions,
    Denoiser,
    ReDiFScheduleVectorEnv,
    ReDiFVectorEnv,
    Teacher,
    TeacherBank,
    load_teacher,
    noise,
    rewards,
    schedules,
)
from redif_env.errors import ReDiFError
from redif_env.loading import BUNDLED

FAST, SLOW = 12, 250

NUMBERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([0.5, -0.5, 1e-9, 1e30, math.nan, math.inf, -math.inf, 10**30, -(10**30)]),
    st.floats(-2, 2),
)
JUNK = st.one_of(
    NUMBERS,
    st.none(),
    st.booleans(),
    st.text(max_size=5),
    st.binary(max_size=4),
    st.lists(NUMBERS, max_size=3),
    st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
    st.builds(object),
    st.builds(lambda n: torch.full((n,), 2.0), st.integers(0, 3)),
    st.builds(lambda n: np.full(n, 2.0), st.integers(0, 3)),
    st.just(np.float32("nan")),
    st.just(1 + 2j),
    st.just(torch.nn.Identity()),
)


def words(*known):
    return st.one_of(st.sampled_from(known), JUNK)


def options(**strategies):
    """A few of these arguments; each is often junk."""
    return st.fixed_dictionaries({}, optional=strategies)


TIMES = st.lists(
    st.one_of(st.integers(-1, 1001), st.floats(0, 1000), st.just(math.nan)), max_size=5
).map(lambda times: sorted(times, reverse=True))

COMMON = {
    "reward": words("mse", "psnr + 0.5*ssim", "cosine", "mse*", "+", "-1*mse", "1e400*mse"),
    "step_cost": JUNK,
    "group_size": JUNK,
    "bank_size": JUNK.filter(lambda n: not isinstance(n, int) or abs(n) < 10**6),
    "split": words("train", "test"),
    "bank_seed": JUNK,
    "seed": JUNK,
    "device": words("cpu", "meta", "cuda:99"),
    "render_mode": words("rgb_array", "human"),
}
VECTOR = options(
    num_envs=st.one_of(st.integers(1, 6), JUNK),
    num_steps=JUNK,
    schedule=st.one_of(words("free", "uniform", "karras"), TIMES),
    start=st.one_of(st.integers(1, 999), JUNK),
    min_steps=JUNK,
    action_type=words("latent", "sample", "epsilon", "v_prediction", "flow_prediction"),
    guidance_scale=JUNK,
    residual=JUNK,
    residual_scale=JUNK,
    action_bound=JUNK,
    bank=JUNK,
    **COMMON,
)
CHOOSING = options(
    num_envs=st.one_of(st.integers(1, 6), JUNK),
    schedule=st.one_of(words("free", "uniform", "karras"), TIMES),
    num_candidates=JUNK,
    min_steps=JUNK,
    max_steps=JUNK,
    student=JUNK,
    **COMMON,
)


@functools.cache
def small_teacher():
    return load_teacher("digits", num_steps=2)


@functools.cache
def small_bank():
    return TeacherBank.build(small_teacher(), 8)


def run(kind, arguments):
    """Make the environment and take its steps with valid actions; all that comes out is finite."""
    with_bank = {"bank": small_bank()} if arguments.get("bank") is None else {}
    for name in ("bank_size", "bank_seed", "split"):  # a bank of its own takes seconds
        if name in arguments and arguments[name] is not None:
            kind(**{"teacher": small_teacher(), **arguments, **with_bank})
    env = kind(**{"teacher": small_teacher(), **arguments, **with_bank})
    obs, _ = env.reset(seed=0)
    for _ in range(min(env.max_steps, 3)):
        actions = torch.zeros(env.action_space.shape)
        if isinstance(env.action_space, gym.spaces.MultiDiscrete):
            actions = actions.long()
        obs, reward, _, _, _ = env.step(actions)
        assert bool(reward.isfinite().all())
        assert all(bool(part.isfinite().all()) for part in obs.values())


def case_vector(data):
    run(ReDiFVectorEnv, data.draw(VECTOR))


def case_choosing(data):
    run(ReDiFScheduleVectorEnv, data.draw(CHOOSING))


def case_gymnasium(data):
    """`make` and `make_vec`; Gymnasium's own errors are its affair."""
    name = data.draw(st.sampled_from(["ReDiF-v0", "ReDiFSchedule-v0"]))
    chosen = data.draw(VECTOR if name == "ReDiF-v0" else CHOOSING)
    num = chosen.pop("num_envs", 1)
    chosen.pop("render_mode", None)  # Gymnasium looks at it first
    chosen = {"teacher": small_teacher(), **chosen, "bank": small_bank()}
    if data.draw(st.booleans()):
        num = num if isinstance(num, int) and num in range(1, 9) else 1  # Gymnasium's own, too
        gym.make_vec(name, num_envs=num, **chosen).reset(seed=0)
    else:
        gym.make(name, **chosen).reset(seed=0)


SHAPES = st.lists(st.integers(0, 66), max_size=3)
ARRAYS = st.builds(
    lambda shape, value, kind: np.full(shape, value).astype(kind),
    st.one_of(st.just([2, 65]), st.just([65]), SHAPES.filter(lambda s: math.prod(s) < 10_000)),
    st.sampled_from([0.0, 1.0, 3.5, -11.0, math.nan, math.inf]),
    st.sampled_from(["float32", "float64", "float16", "int64", "bool", "complex64", "U1", "O"]),
)


@pytest.mark.filterwarnings("ignore")
def case_actions(data):
    made = ReDiFVectorEnv(2, small_teacher(), bank=small_bank())
    made.reset(seed=0)
    for _ in range(2):
        obs, reward, _, _, _ = made.step(data.draw(st.one_of(ARRAYS, JUNK)))
        assert bool(reward.isfinite().all())
        assert bool(obs["latents"].isfinite().all())


def case_choices(data):
    made = ReDiFScheduleVectorEnv(2, small_teacher(), bank=small_bank())
    made.reset(seed=0)
    action = st.one_of(st.lists(st.integers(-2, 17), min_size=2, max_size=2), ARRAYS, JUNK)
    _, reward, _, _, _ = made.step(data.draw(action))
    assert bool(reward.isfinite().all())


def case_single(data):
    made = gym.make("ReDiF-v0", teacher=small_teacher(), bank=small_bank()).unwrapped
    made.reset(seed=0)
    obs, reward, *_ = made.step(data.draw(st.one_of(ARRAYS, JUNK)))
    assert math.isfinite(reward)
    assert np.isfinite(obs["latents"]).all()


def case_reset(data):
    free = data.draw(st.booleans())
    made = ReDiFVectorEnv(
        2, small_teacher(), bank=small_bank(), schedule="free" if free else "uniform"
    )
    rows = st.lists(st.one_of(st.integers(-2, 9), NUMBERS), min_size=1, max_size=3)
    chosen = data.draw(
        st.one_of(options(tasks=st.one_of(rows, JUNK), start=st.one_of(rows, JUNK)), JUNK)
    )
    obs, _ = made.reset(seed=data.draw(JUNK), options=chosen)
    assert bool(obs["latents"].isfinite().all())


def arguments_of(kind):
    """Junk for the arguments by place that a class takes: how many is Python's own affair."""
    taken = [
        parameter
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    needed = [parameter for parameter in taken if parameter.default is parameter.empty]
    return st.lists(JUNK, min_size=len(needed), max_size=len(taken))


def case_schedules(data):
    kind = data.draw(
        st.sampled_from([noise.VESchedule, noise.FlowSchedule, noise.SDESchedule, noise.VPSchedule])
    )
    # Tables of a gigabyte are not what is tried here.
    made = kind(*data.draw(arguments_of(kind)))
    end = torch.tensor([0.0, made.max_timestep / 2, made.max_timestep])
    assert bool(made.alpha(end).isfinite().all())
    assert bool(made.sigma(end).isfinite().all())
    spec = data.draw(st.one_of(words("uniform", "karras"), TIMES))
    grid = schedules.make_grid(spec, made, data.draw(JUNK))
    assert bool((grid.diff() < 0).all())


REWARDS = [
    rewards.MSE,
    rewards.PSNR,
    rewards.SSIM,
    rewards.MultiScaleSSIM,
    rewards.HistogramKL,
    rewards.Cosine,
    rewards.CompressedSize,
    rewards.Function,
    rewards.Onnx,
    rewards.EnergyDistance,
    rewards.MMD,
]


def case_rewards(data):
    kind = data.draw(st.sampled_from(REWARDS))
    made = kind(*data.draw(arguments_of(kind)))
    made = data.draw(st.sampled_from([lambda r: r, lambda r: r * data.draw(JUNK)]))(made)
    bank = small_bank()
    pair = bank.x_T, bank.teacher_x_0, bank.condition
    values, _ = rewards.evaluate(made, *pair)
    assert bool(values.isfinite().all())


def case_reward_names(data):
    rewards.make_reward(data.draw(st.text("mse psnr+*0.1e", max_size=12)))


class Odd(torch.nn.Module):
    """A network that returns anything, or joins what it is given with weights of its own."""

    def __init__(self, output, dtype):
        super().__init__()
        self.output, self.weight = output, torch.nn.Parameter(torch.ones(2, dtype=dtype))

    def forward(self, x_t, t):
        if self.output is None:  # as people write it
            return x_t * (torch.stack([t, t], 1) @ self.weight).reshape(-1, 1, 1, 1)
        return self.output(x_t)


OUTPUTS = st.sampled_from(
    [None, lambda x: x, lambda x: x[:1], lambda x: x.sum(), lambda x: 3, lambda x: {"sample": x}]
)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


def case_denoiser(data):
    network = Odd(data.draw(OUTPUTS), data.draw(DTYPES))
    shape = data.draw(st.one_of(st.just((1, 8, 8)), st.lists(st.integers(0, 4), max_size=3), JUNK))
    chosen = data.draw(
        options(
            num_classes=JUNK,
            null_class=JUNK,
            guidance_scale=JUNK,
            guidance_rescale=JUNK,
            batch_size=JUNK,
        )
    )
    predicts = data.draw(words("sample", "epsilon", "v_prediction", "flow_prediction"))
    made = Denoiser(network, noise.FlowSchedule(), predicts, shape, **chosen)
    if made.num_classes is None and made.latent_shape == (1, 8, 8):
        with torch.no_grad():
            x0_pred = made(torch.zeros(2, 1, 8, 8), torch.full((2,), 500.0))
        assert x0_pred.shape == (2, 1, 8, 8)


TENSORS = st.builds(
    lambda shape, value, kind: torch.full(shape, value).to(kind),
    st.one_of(st.just((2, 1, 8, 8)), st.just((2,)), SHAPES.filter(lambda s: math.prod(s) < 9999)),
    st.sampled_from([0.0, 3.0, 10.0, 11.0, -1.0, math.nan]),
    st.sampled_from([torch.float32, torch.int64, torch.int32, torch.bool, torch.float16]),
)


def case_sample(data):
    answer = small_teacher().sample(
        data.draw(st.one_of(TENSORS, JUNK)), data.draw(st.one_of(TENSORS, JUNK))
    )
    assert bool(answer.isfinite().all())


def case_bank(data):
    bank = small_bank()
    parts = st.one_of(st.just(bank.x_T), TENSORS, JUNK)
    made = TeacherBank(data.draw(parts), data.draw(parts), data.draw(st.one_of(TENSORS, JUNK)))
    ReDiFVectorEnv(2, small_teacher(), bank=made).reset(seed=0)


PPO = options(
    learning_rate=st.one_of(st.floats(1e-6, 1e-3), JUNK),
    n_steps=JUNK,
    batch_size=JUNK,
    n_epochs=JUNK,
    gamma=JUNK,
    gae_lambda=JUNK,
    clip_range=JUNK,
    normalize_advantage=st.booleans(),
    ent_coef=JUNK,
    max_grad_norm=JUNK,
    ratio=words("element", "mean", "sum"),
    advantage=words("group", "batch", "task", "gae"),
    credit=words("local", "global"),
    local_weight=JUNK,
    local_radius=JUNK,
    advantage_clip=JUNK,
    stochastic_steps=words("all", "one"),
    step_weights=JUNK,
    micro_batch_size=JUNK,
    antithetic=JUNK,
    eta=JUNK,
    min_std=JUNK,
    gap_fraction=words("auto"),
    ema_decay=JUNK,
    trained=words("student", "schedule", "both", "alternating"),
    target_kl=JUNK,
    adaptive_lr=JUNK,
    divergence=words("kl", "js", "renyi"),
    divergence_coef=JUNK,
    divergence_alpha=JUNK,
    divergence_target=JUNK,
    seed=JUNK,
)


def case_ppo(data):
    """Construction: what is wrong must be said before anything is trained."""
    ReDiFPPO("StudentPolicy", student_env(), **data.draw(PPO))


@functools.cache
def student_env():
    env = ReDiFVectorEnv(
        4, small_teacher(), schedule="uniform", num_steps=2, group_size=2, bank=small_bank()
    )
    env.reset(seed=0)
    return env


DISTILL = options(
    num_steps=JUNK,
    reward=words("mse", "nonsense"),
    schedule=words("search", "uniform", "learned"),
    method=words("ppo", "progressive"),
    preset=words("default"),
    num_envs=st.one_of(st.just(3), JUNK),
    group_size=JUNK,
    batch_size=JUNK,
    learning_rate=JUNK,
    bank_size=JUNK,
    eval_every=JUNK,
    warm_up=JUNK,
    student=JUNK,
    lora_rank=JUNK,
    seed=JUNK,
)


def case_distill(data):
    """One argument is always wrong, so that nothing is ever trained."""
    wrong = data.draw(
        st.sampled_from(
            [{"iterations": 0}, {"num_held_out": 5}, {"num_steps": -1}, {"warm_up": -1}]
        )
    )
    with pytest.raises(ReDiFError):
        distill(**{"teacher": small_teacher(), **data.draw(DISTILL), **wrong})


CASES = {
    name.removeprefix("case_"): case for name, case in globals().items() if name[:5] == "case_"
}


def try_many(case, number):
    """The case on so many examples; what it raises must be ours."""

    @settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def trial(data):
        with contextlib.suppress(ReDiFError):
            case(data)

    trial()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_a_few(name):
    try_many(CASES[name], FAST)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_many(name):
    try_many(CASES[name], SLOW)


def test_the_slow_suite_is_large():
    assert (len(CASES) + len(FILES)) * SLOW >= 5_000


def test_a_crash_would_be_noticed():
    with pytest.raises(ZeroDivisionError):
        try_many(lambda data: 1 / data.draw(st.just(0)), 3)


def test_silent_nan_would_be_noticed():
    class Nan(rewards.Reward):
        def __call__(self, x_0, teacher_x_0, condition):
            return x_0.flatten(1).mean(1) * math.nan

    def case(data):
        bank = small_bank()
        values, _ = rewards.evaluate(Nan(), bank.x_T, bank.teacher_x_0, bank.condition)
        assert bool(values.isfinite().all())

    with pytest.raises(AssertionError):
        try_many(case, 2)


# Files: a valid one with some bytes changed, or cut off, or replaced.
def damage(content, data):
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "replace"]))
    place = data.draw(st.integers(0, min(len(content), 4000)))
    junk = data.draw(st.binary(min_size=1, max_size=16))
    if kind == "flip":
        return content[:place] + junk + content[place + len(junk) :]
    if kind == "cut":
        return content[:place]
    return content[:place] + junk + content[place:] if kind == "insert" else junk


def damage_json(content, data):
    """One value of the object, at any depth, as something else."""
    held = json.loads(content)
    name = data.draw(st.sampled_from(sorted(held)))
    values = [None, -1, 0, 3, 1.5, "", "x", [], [1, "a"], {}, True, 1e308, 10**30, "../x"]
    held[name] = data.draw(st.sampled_from(values))
    return json.dumps(held).encode()


def damaged(path, data):
    content = path.read_bytes()
    whole = path.suffix == ".json" and data.draw(st.booleans())
    path.write_bytes(damage_json(content, data) if whole else damage(content, data))


def file_teacher(folder, data):
    names = ["unet/config.json", "scheduler/scheduler_config.json", "redif.json"]
    names.append("unet/diffusion_pytorch_model.safetensors")
    damaged(folder / data.draw(st.sampled_from(names)), data)
    teacher = load_teacher(folder, num_steps=2)
    assert isinstance(teacher, Teacher)


def file_judge(folder, data):
    names = ["config.json", "model.safetensors"]
    damaged(folder / JUDGE_FOLDER / data.draw(st.sampled_from(names)), data)
    Judge.load(folder / JUDGE_FOLDER)


def file_bank(folder, data):
    honest = TeacherBank.build(small_teacher(), 4, cache_dir=folder)
    (path,) = folder.glob("bank-*.safetensors")
    damaged(path, data)
    again = TeacherBank.build(small_teacher(), 4, cache_dir=folder)
    assert torch.equal(again.teacher_x_0, honest.teacher_x_0)


def file_conditions(folder, data):
    table = Conditions({"told": torch.ones(3, 2)}, null={"told": torch.zeros(2)}, texts=list("abc"))
    table.save(folder / "table.safetensors")
    damaged(folder / "table.safetensors", data)
    assert len(Conditions.load(folder / "table.safetensors")) > 0


def file_forged_conditions(folder, data):
    """Well-formed safetensors with a record of our own making."""
    path = folder / "table.safetensors"
    record = data.draw(st.one_of(JUNK.map(repr), st.sampled_from(["{}", "[]", "null", "3"])))
    save_file({"told": data.draw(TENSORS)}, path, {"conditions": record})
    with safe_open(path, "pt"):
        pass
    Conditions.load(path)


def file_samples(folder, data):
    kind = data.draw(st.sampled_from(["npy", "safetensors"]))
    path = folder / f"samples.{kind}"
    if kind == "npy":
        np.save(path, data.draw(ARRAYS), allow_pickle=True)
    else:
        save_file({data.draw(st.sampled_from(["samples", "a"])): data.draw(TENSORS)}, path)
    if data.draw(st.booleans()):
        damaged(path, data)
    read_samples(path, small_bank())


def file_export(folder, data):
    teacher = small_teacher()
    index = {"_class_name": "DDPMPipeline", data.draw(st.text(max_size=5)): data.draw(INDEX)}
    (folder / "model_index.json").write_text(json.dumps(index))
    export_student(
        teacher.denoiser,
        data.draw(st.one_of(TIMES, JUNK)),
        teacher.make_solver().config,
        folder / "out",
        data.draw(st.sampled_from([None, folder])),
    )


INDEX = st.one_of(
    st.none(),
    st.integers(),
    st.text(max_size=5),
    st.lists(st.one_of(st.none(), st.sampled_from(["diffusers", "os", "X"])), max_size=3),
)
FILES = {
    name.removeprefix("file_"): case for name, case in globals().items() if name[:5] == "file_"
}


def in_a_folder(case, place):
    def trial(data):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(BUNDLED["digits"], place)
        case(place, data)

    return trial


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_few_files(tmp_path, name):
    try_many(in_a_folder(FILES[name], tmp_path / "folder"), FAST)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_many_files(tmp_path, name):
    try_many(in_a_folder(FILES[name], tmp_path / "folder"), SLOW)
