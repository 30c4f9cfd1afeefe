"""The teacher's sampler against a plain diffusers loop; the bank, and its cache under duress."""

import contextlib
import functools
import os
import random
import resource
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors import safe_open

from redif_env import Denoiser, Teacher, TeacherBank, load_teacher
from redif_env.errors import CacheError, InvalidArgumentError
from redif_env.loading import BUNDLED, build_from_description, describe
from redif_env.noise import FlowSchedule, SDESchedule, VESchedule, VPSchedule
from redif_env.teacher import cache_folder, split_seed

DIGITS = BUNDLED["digits"]
SIZE = 6


@pytest.fixture
def fast():
    """A teacher of two steps, whose weights a test may change."""
    return load_teacher("digits", num_steps=2)


class CountingTeacher(Teacher):
    """Counts the rows that it is asked for."""

    rows_asked = 0

    def sample(self, x_T, condition=None):
        self.rows_asked += len(x_T)
        return super().sample(x_T, condition)


def counting(teacher):
    return CountingTeacher(teacher.denoiser, teacher.make_solver, teacher.num_steps)


def build(teacher, folder, **options):
    return TeacherBank.build(teacher, **{"size": SIZE, "cache_dir": folder, **options})


def assert_same(one, two):
    assert torch.equal(one.x_T, two.x_T)
    assert torch.equal(one.teacher_x_0, two.teacher_x_0)
    assert torch.equal(one.condition, two.condition)


def cached_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


@torch.no_grad()
def plain_loop(unet, scheduler, num_steps, x, labels, guidance_scale=1.0):
    """Sampling as diffusers' documentation writes it."""
    null = torch.full_like(labels, 10)
    scheduler.set_timesteps(num_steps)
    for t in scheduler.timesteps:
        prediction = unet(x, t, class_labels=labels).sample
        if guidance_scale != 1:
            uncond = unet(x, t, class_labels=null).sample
            prediction = uncond + guidance_scale * (prediction - uncond)
        x = scheduler.step(prediction, t, x).prev_sample
    return x


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler])
def test_sample_is_the_plain_diffusers_loop(kind, guidance_scale, bank):
    teacher = load_teacher("digits", guidance_scale=guidance_scale)
    make = functools.partial(kind.from_config, teacher.make_solver().config)
    teacher = Teacher(teacher.denoiser, make, num_steps=7)
    unet = UNet2DModel.from_pretrained(DIGITS / "unet")
    rows = bank.x_T[:4], bank.condition[:4]
    wanted = plain_loop(unet, make(), 7, *rows, guidance_scale)
    # Guidance runs both halves in one batch, whose sums have another order.
    torch.testing.assert_close(teacher.sample(*rows), wanted, rtol=0, atol=1e-5)
    other = plain_loop(unet, make(), 8, *rows, guidance_scale)
    assert not torch.allclose(teacher.sample(*rows), other, atol=1e-2)


def test_a_row_does_not_depend_on_its_batch(teacher, bank):
    one = teacher.sample(bank.x_T[2:3], bank.condition[2:3])
    torch.testing.assert_close(one[0], bank.teacher_x_0[2], rtol=0, atol=1e-5)


def test_the_teacher_is_frozen(teacher):
    assert not teacher.denoiser.training
    assert not any(p.requires_grad for p in teacher.denoiser.network.parameters())


def test_the_bank_holds_the_teachers_answers(teacher, bank):
    assert len(bank) == 32
    answers = teacher.sample(bank.x_T, bank.condition)
    torch.testing.assert_close(bank.teacher_x_0, answers, rtol=0, atol=1e-5)
    generator = torch.Generator().manual_seed(split_seed(0, "train"))
    assert torch.equal(bank.x_T, torch.randn(32, 1, 8, 8, generator=generator))


def test_splits_and_seeds_are_disjoint(fast, tmp_path):
    banks = [
        build(fast, tmp_path, size=40, split=split, seed=seed)
        for split in ("train", "validation", "test")
        for seed in (0, 1)
    ]
    noises = torch.cat([bank.x_T for bank in banks]).flatten(1)
    distances = torch.cdist(noises, noises) + 100 * torch.eye(len(noises))
    assert float(distances.min()) > 1  # two draws in 64 dimensions are about 11 apart
    assert len({split_seed(seed, "train") for seed in range(1000)}) == 1000


def test_a_subset_is_the_first_tasks(fast, tmp_path):
    bank = build(fast, tmp_path)
    part = bank.subset(4)
    assert len(part) == 4
    assert torch.equal(part.condition, bank.condition[:4])
    assert torch.equal(part.teacher_x_0, bank.teacher_x_0[:4])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batch_size_does_not_change_the_tasks(fast, tmp_path, batch_size):
    one = build(fast, tmp_path / "one", batch_size=batch_size)
    two = build(fast, tmp_path / "two")
    assert torch.equal(one.x_T, two.x_T)
    torch.testing.assert_close(one.teacher_x_0, two.teacher_x_0, rtol=0, atol=1e-5)


def test_a_second_build_reads_the_cache(fast, tmp_path):
    teacher = counting(fast)
    first = build(teacher, tmp_path)
    assert teacher.rows_asked == SIZE
    assert_same(first, build(teacher, tmp_path))
    assert teacher.rows_asked == SIZE
    build(teacher, tmp_path / "elsewhere")
    assert teacher.rows_asked == 2 * SIZE


def test_the_cache_is_where_the_variable_says(fast, tmp_path, monkeypatch):
    monkeypatch.setenv("REDIF_CACHE", str(tmp_path / "here"))
    TeacherBank.build(fast, SIZE)
    assert cached_file(tmp_path / "here")
    assert cache_folder(tmp_path) == tmp_path
    monkeypatch.delenv("REDIF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "redif"


def change_a_weight(teacher):
    with torch.no_grad():
        next(teacher.denoiser.network.parameters())[0] += 1e-3
    return teacher


def with_solver(teacher, kind=DDIMScheduler, **changes):
    make = functools.partial(kind.from_config, {**teacher.make_solver().config, **changes})
    return Teacher(teacher.denoiser, make, teacher.num_steps)


def with_betas(teacher, beta_schedule):
    config = {**teacher.make_solver().config, "beta_schedule": beta_schedule}
    description = describe(teacher.denoiser, DDIMScheduler.from_config(config))
    denoiser = build_from_description(description)
    denoiser.network.load_state_dict(teacher.denoiser.network.state_dict())
    return Teacher(denoiser, functools.partial(DDIMScheduler.from_config, config), 2)


def with_network(teacher, **changes):
    """The same weights in a network of another architecture."""
    description = describe(teacher.denoiser, teacher.make_solver())
    denoiser = build_from_description(
        {**description, "network": {**description["network"], **changes}}
    )
    denoiser.network.load_state_dict(teacher.denoiser.network.state_dict())
    return Teacher(denoiser, teacher.make_solver, teacher.num_steps)


CHANGES = {
    "a weight": change_a_weight,
    "steps": lambda _: load_teacher("digits", num_steps=3),
    "guidance": lambda _: load_teacher("digits", num_steps=2, guidance_scale=1.5),
    "solver": lambda t: with_solver(t, DPMSolverMultistepScheduler),
    "betas": lambda t: with_betas(t, "linear"),
    "solver's spacing": lambda t: with_solver(t, timestep_spacing="leading"),
    "activation": lambda t: with_network(t, act_fn="gelu"),
    "image size": lambda t: with_network(t, sample_size=16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_key_changes_with_the_teacher(fast, change):
    """Whatever changes the answers must change the key, or old answers would be used."""
    before = fast.fingerprint()
    assert load_teacher("digits", num_steps=2).fingerprint() == before
    assert change(fast).fingerprint() != before


@pytest.mark.parametrize("option", [{"seed": 1}, {"split": "test"}, {"size": SIZE + 1}])
def test_other_options_are_another_file(fast, tmp_path, option):
    teacher = counting(fast)
    one, two = build(teacher, tmp_path), build(teacher, tmp_path, **option)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert teacher.rows_asked == len(one) + len(two)
    if "size" not in option:
        assert not torch.equal(one.x_T, two.x_T)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-8])


def empty(path):
    path.write_bytes(b"")


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": truncate,
    "empty": empty,
    "text": lambda path: path.write_text("not a bank"),
    "a flipped bit of the header": functools.partial(flip, position=20),
    "a flipped bit of the data": functools.partial(flip, position=-100),
    "a flipped bit at the end": functools.partial(flip, position=-1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_cache_is_rebuilt(fast, tmp_path, damage):
    teacher = counting(fast)
    wanted = build(teacher, tmp_path)
    damage(cached_file(tmp_path))
    assert_same(build(teacher, tmp_path), wanted)
    assert teacher.rows_asked == 2 * SIZE
    assert_same(build(teacher, tmp_path), wanted)
    assert teacher.rows_asked == 2 * SIZE  # and is sound again


def test_every_flipped_bit_is_noticed(fast, tmp_path):
    """A sample of all single-bit errors, header and data."""
    teacher = counting(fast)
    wanted = build(teacher, tmp_path, size=1)
    path = cached_file(tmp_path)
    content = path.read_bytes()
    positions = random.Random(0).sample(range(8 * len(content)), 40)
    for position in positions:
        damaged = bytearray(content)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert_same(build(teacher, tmp_path, size=1), wanted)
    assert teacher.rows_asked == 1 + len(positions)


def test_a_bank_under_anothers_name_is_rebuilt(fast, tmp_path):
    build(fast, tmp_path / "zero")
    wanted = build(fast, tmp_path / "one", seed=1)
    right = cached_file(tmp_path / "one")
    cached_file(tmp_path / "zero").rename(right)
    assert_same(build(fast, tmp_path / "one", seed=1), wanted)


# The solver's config is left to diffusers' defaults, which it lists in an order of its own.
FILL = """
import sys, torch
torch.set_num_threads(1)
from diffusers import DPMSolverMultistepScheduler
from redif_env import Teacher, TeacherBank, load_teacher
def make_solver():
    return DPMSolverMultistepScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
    )
teacher = Teacher(load_teacher("digits").denoiser, make_solver, 2)
print("ready", flush=True)
sys.stdin.readline()
bank = TeacherBank.build(teacher, 64, cache_dir=sys.argv[1], batch_size=8)
print(teacher.fingerprint(), float(bank.teacher_x_0.sum()), teacher.denoiser.network_evaluations)
"""


def start_filling(folder, hash_seed):
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", FILL, str(folder)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process


@pytest.fixture(scope="module")
def two_fillers(tmp_path_factory):
    """What two processes print that fill one cache at once, and the cache's folder."""
    folder = tmp_path_factory.mktemp("filled")
    processes = [start_filling(folder, hash_seed) for hash_seed in ("1", "2")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return outputs, folder


def test_two_processes_agree_on_the_key(two_fillers):
    (one, two), _ = two_fillers
    assert one[0] == two[0]


def test_two_processes_fill_the_cache_once(two_fillers):
    (one, two), folder = two_fillers
    assert one[1] == two[1]
    assert sorted([int(one[2]), int(two[2])]) == [0, 64 * 2]  # one asked, the other waited
    with safe_open(cached_file(folder), "pt") as file:
        assert sorted(file.keys()) == ["condition", "teacher_x_0", "x_T"]
    assert not list(folder.glob("*.tmp"))


@contextlib.contextmanager
def files_at_most(size):
    """No file of this process may grow beyond `size` bytes: what a full disk looks like."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_behind(fast, tmp_path):
    with files_at_most(1000), pytest.raises(CacheError, match=r"cache_dir=.*Free some space"):
        build(fast, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert len(build(fast, tmp_path)) == SIZE  # with room again


def test_a_full_disk_keeps_what_was_there(fast, tmp_path):
    wanted = build(fast, tmp_path)
    with files_at_most(1000), pytest.raises(CacheError):
        build(fast, tmp_path, seed=1)
    teacher = counting(fast)
    assert_same(build(teacher, tmp_path), wanted)
    assert teacher.rows_asked == 0


def test_a_folder_that_cannot_be_made(fast, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CacheError, match=r"cache_dir='.*file.*REDIF_CACHE"):
            build(fast, folder)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(fast, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CacheError, match="cache_dir="):
            build(fast, tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_an_interrupted_teacher_leaves_nothing_behind(fast, tmp_path):
    class Interrupted(CountingTeacher):
        def sample(self, x_T, condition=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(Interrupted(fast.denoiser, fast.make_solver, 2), tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("option", [{"size": 0}, {"seed": -1}, {"split": "all"}])
def test_options_are_checked_before_anything_is_written(fast, tmp_path, option):
    with pytest.raises(InvalidArgumentError, match=next(iter(option))):
        build(fast, tmp_path / "new", **option)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", [DDPMScheduler, EulerAncestralDiscreteScheduler, LCMScheduler])
def test_a_solver_that_draws_random_numbers_is_refused(teacher, kind):
    before = torch.get_rng_state()
    with pytest.raises(InvalidArgumentError, match=f"{kind.__name__}.*random") as caught:
        with_solver(teacher, kind)
    assert caught.value.argument == "make_solver"
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "kind",
    [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler, HeunDiscreteScheduler],
)
def test_a_deterministic_solver_is_taken(teacher, kind):
    assert type(with_solver(teacher, kind).make_solver()) is kind


def test_a_solvers_option_can_make_it_stochastic(teacher):
    with pytest.raises(InvalidArgumentError, match="random"):
        with_solver(teacher, DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta_schedule": "linear"}, "another noise schedule"),
        ({"num_train_timesteps": 500}, "another noise schedule"),
        ({"prediction_type": "epsilon"}, "prediction_type='v_prediction'"),
    ],
)
def test_a_solver_of_another_process_is_refused(teacher, changes, message):
    with pytest.raises(InvalidArgumentError, match=message):
        with_solver(teacher, **changes)


@pytest.mark.parametrize(
    ("kind", "num_steps", "options", "message"),
    [
        (RePaintScheduler, 3, {}, "RePaintScheduler.*original_image"),
        (DDIMScheduler, 1001, {}, "1001 steps.*num_steps"),
        (DDIMInverseScheduler, 3, {}, "times from .*fall"),
        (
            EulerDiscreteScheduler,
            3,
            {"timestep_type": "continuous", "sigma_min": 0.002, "sigma_max": 80.0},
            "timestep_type='continuous'",
        ),
    ],
)
def test_a_solver_that_fails_or_has_another_axis_of_time_is_refused(
    teacher, kind, num_steps, options, message
):
    """log(sigma) / 4, and times that rise, would be asked of a student that knows neither."""
    config = teacher.make_solver().config
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        Teacher(teacher.denoiser, lambda: kind.from_config(config, **options), num_steps)
    assert caught.value.argument == "make_solver"


VP = VPSchedule(DDIMScheduler().alphas_cumprod)
OTHER_PROCESSES = {
    "VP, flow matching's solver": (VP, "epsilon", FlowMatchEulerDiscreteScheduler),
    "VP, a solver of flow sigmas": (
        VP,
        "epsilon",
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True),
    ),
    "VE, a VP solver": (VESchedule(), "epsilon", DDIMScheduler),
    "flow matching, a VP solver": (
        FlowSchedule(),
        "sample",
        lambda: DDIMScheduler(prediction_type="sample"),
    ),
    "flow matching, a solver of another prediction": (
        FlowSchedule(),
        "sample",
        FlowMatchEulerDiscreteScheduler,
    ),
    "an SDE, another table": (
        SDESchedule(),
        "epsilon",
        lambda: DDIMScheduler(beta_schedule="squaredcos_cap_v2"),
    ),
    "a sub-VP SDE, the VP one's table": (
        SDESchedule(sub=True),
        "epsilon",
        lambda: DDIMScheduler(trained_betas=betas_of(SDESchedule())),
    ),
}


def betas_of(schedule):
    """Diffusers' betas of a continuous schedule at whole times."""
    alpha_bar = schedule.alpha(torch.arange(0.0, 1000)).double().square()
    return (1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])).tolist()


@pytest.mark.parametrize("case", OTHER_PROCESSES.values(), ids=OTHER_PROCESSES)
def test_a_solver_of_another_kind_of_process_is_refused(case):
    schedule, predicts, make_solver = case
    denoiser = Denoiser(torch.nn.Identity(), schedule, predicts, (2,))
    with pytest.raises(InvalidArgumentError, match=r"noise schedule|prediction_type") as caught:
        Teacher(denoiser, make_solver, 3)
    assert caught.value.argument == "make_solver"


def test_a_solver_with_the_scales_of_another_class_of_schedule_is_taken():
    denoiser = Denoiser(torch.nn.Identity(), SDESchedule(), "epsilon", (2,))
    make_solver = functools.partial(DDIMScheduler, trained_betas=betas_of(SDESchedule()))
    assert Teacher(denoiser, make_solver, 3).num_steps == 3


def test_flow_matching_from_data_to_noise_is_refused():
    denoiser = Denoiser(torch.nn.Identity(), FlowSchedule(), "flow_prediction", (2,))
    assert Teacher(denoiser, FlowMatchEulerDiscreteScheduler, 3).num_steps == 3
    with pytest.raises(InvalidArgumentError, match="invert_sigmas"):
        Teacher(denoiser, lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 3)


def test_what_can_not_step_is_no_solver(teacher):
    with pytest.raises(InvalidArgumentError, match=r"make_solver='object'.*set_timesteps"):
        Teacher(teacher.denoiser, object, num_steps=3)
