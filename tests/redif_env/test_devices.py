"""Nothing meets a tensor of another device, in the environments and what they are made of."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from fake_device import CPU, DEVICE, DeviceMixError, FakeDevice
from tiny_models import pixel_unet

from redif_env import (
    Denoiser,
    KernelSolver,
    ReDiFScheduleVectorEnv,
    ReDiFVectorEnv,
    Teacher,
    TeacherBank,
    load_teacher,
    schedules,
)
from redif_env.errors import InvalidArgumentError
from redif_env.noise import FlowSchedule, SDESchedule, VESchedule, VPSchedule
from redif_env.rewards import make_reward
from redif_env.rewards.discriminator import Discriminator
from redif_env.rewards.distributional import MMD
from redif_env.rewards.likelihood import TeacherLikelihood
from redif_env.wrappers import FlatVectorObservation, RelativeReward

SHAPE = (3, 8, 8)
NOISES = {
    "vp": lambda: VPSchedule(DDIMScheduler().alphas_cumprod),
    "sde": SDESchedule,
    "ve": VESchedule,
    "flow": FlowSchedule,
}


@pytest.fixture
def device():
    with FakeDevice() as device:
        yield device


def make_denoiser(noise: str = "vp") -> Denoiser:
    network = pixel_unet(num_class_embeds=4)
    return Denoiser(network, NOISES[noise](), "sample", SHAPE, num_classes=3, null_class=3)


def make_teacher(noise: str = "vp") -> Teacher:
    """A teacher on the device."""
    denoiser = make_denoiser(noise)
    return Teacher(denoiser, functools.partial(KernelSolver, denoiser), 2).to(DEVICE)


def answers(teacher: Teacher) -> TeacherBank:
    """A bank on the device, of noise as data."""
    x_T = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    return TeacherBank(x_T, x_T / 2, torch.arange(8) % 3).to(teacher.device)


# ---- the helper


def test_the_device_refuses_what_cuda_refuses(device):
    here, there = torch.zeros(3), torch.zeros(3).to(DEVICE)
    assert (here.device, there.device) == (CPU, DEVICE)
    for mix in (
        lambda: here + there,
        lambda: here[there.long()],
        lambda: torch.cat([here, there]),
        lambda: torch.stack([here[0], there[0]]),
        lambda: torch.where(there > 0, here, there),
        lambda: there.add_(here),
        lambda: there.index_put_((here.long(),), here),
        lambda: torch.randn(3, device=DEVICE, generator=torch.Generator()),
        lambda: torch.nn.Linear(3, 1)(there),
    ):
        with pytest.raises(DeviceMixError):
            mix()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()


def test_the_device_allows_what_cuda_allows(device):
    here, there = torch.zeros(3), torch.zeros(3).to(DEVICE)
    for allowed in (there + here[0], there[here.long()], there.view(3, 1), torch.ones_like(there)):
        assert allowed.device == DEVICE
    for fetched in (there.cpu(), there.to(here), torch.tensor(there.tolist())):
        assert fetched.device == CPU
    assert there.copy_(here).device == DEVICE
    assert torch.nn.Linear(3, 1).to(DEVICE)(there).device == DEVICE
    assert device.reads == 3
    assert float(there[0]) == 0
    assert device.reads == 4


# ---- schedules, denoisers


@pytest.mark.parametrize("noise", NOISES)
def test_grids_do_not_ask_where_the_schedule_is(device, noise):
    here, there = NOISES[noise](), NOISES[noise]().to(DEVICE)
    for name in schedules.GRID_NAMES:
        grid = schedules.make_grid(name, there, 4)
        assert grid.device == CPU
        assert torch.equal(grid, schedules.make_grid(name, here, 4))
    for t in (torch.tensor([1.0, 7.0]), torch.tensor([1.0, 7.0]).to(DEVICE)):
        for schedule in (here, there):
            assert schedule.alpha(t).device == schedule.sigma(t).device == t.device


@pytest.mark.parametrize("noise", NOISES)
def test_a_schedule_follows_its_network(device, noise):
    """Networks come to the device before they meet their schedule."""
    network = pixel_unet().to(DEVICE)
    for prediction in ("sample", "epsilon")[: 1 if noise == "flow" else 2]:
        denoiser = Denoiser(network, NOISES[noise](), prediction, SHAPE)
        assert all(table.device == DEVICE for table in denoiser.schedule.buffers())
        Teacher(denoiser, functools.partial(KernelSolver, denoiser), 2)
    with pytest.raises(InvalidArgumentError, match="alpha is 0"):
        Denoiser(network, FlowSchedule(), "epsilon", SHAPE)


def test_a_pipeline_may_be_on_the_device_already(device):
    scheduler = DDIMScheduler()
    pipeline = DDPMPipeline(pixel_unet().to(DEVICE), scheduler)
    pipeline.scheduler = scheduler  # which the pipeline makes its own kind of
    teacher = load_teacher(pipeline, num_steps=2, device=DEVICE)
    assert teacher.sample(torch.zeros(1, *SHAPE, device=DEVICE)).device == DEVICE


def test_the_best_grid_is_found_on_the_device(device):
    teacher = make_teacher()
    grid = schedules.search(teacher.denoiser, answers(teacher), 2, rounds=1)
    assert (grid.device, len(grid)) == (CPU, 3)


def test_banks_go_to_the_device_and_come_from_the_cache(device, tmp_path):
    teacher = make_teacher()
    first, second = (TeacherBank.build(teacher, 4, cache_dir=tmp_path) for _ in range(2))
    assert first.x_T.device == second.x_T.device == DEVICE
    assert torch.equal(first.teacher_x_0, second.teacher_x_0)


# ---- environments

REST = 3  # flags, that are looked at when all episodes can have ended


def host_reads(device: FakeDevice, env, act, steps: int = 4) -> list[int]:
    """How often the host waits in each step."""
    env.reset(seed=0)
    counts = []
    for _ in range(steps):
        before = device.reads
        observation, rewards, *_ = env.step(act())
        assert rewards.device == DEVICE
        assert all(part.device == DEVICE for part in observation.values())
        counts.append(device.reads - before)
    return counts


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "karras"},
        {"residual": True, "start": 800.0, "min_steps": 2},
        {"schedule": "uniform", "residual": True, "action_type": "v_prediction"},
        {"schedule": "uniform", "residual": True, "guidance_scale": 2.0},
    ],
    ids=str,
)
def test_steps_stay_on_the_device(device, noise, options):
    teacher = make_teacher(noise)
    env = ReDiFVectorEnv(4, teacher, num_steps=2, bank=answers(teacher), group_size=2, **options)
    zero = torch.zeros(env.action_space.shape, device=DEVICE)
    assert host_reads(device, env, lambda: zero) == [0, REST, 0, REST]
    env.reset(options={"tasks": [0, 0, 1, 1]})
    assert env.draw(env.state).shape[0] == 4


@pytest.mark.parametrize("wanted", ["xpu:1", "cpu", "cpu:0"])
def test_another_device_than_the_teachers_is_refused(device, wanted):
    with pytest.raises(InvalidArgumentError, match="the teacher is on xpu:0"):
        ReDiFVectorEnv(2, make_teacher(), device=wanted)


@pytest.mark.parametrize("wanted", ["xpu:0", "xpu", DEVICE])
def test_the_teachers_own_device_may_be_named(device, wanted):
    assert ReDiFVectorEnv(2, make_teacher(), device=wanted).device == DEVICE


def test_times_may_be_given_where_they_are_free(device):
    teacher = make_teacher()
    env = ReDiFVectorEnv(2, teacher, bank=answers(teacher), seed=0)
    observation, _ = env.reset(options={"start": [500.0, 600.0]})
    assert observation["timestep"].device == DEVICE


def test_choices_stay_on_the_device(device):
    teacher = make_teacher()
    env = ReDiFScheduleVectorEnv(3, teacher, max_steps=2, min_steps=2, bank=answers(teacher))
    counts = host_reads(device, env, lambda: env.action_masks().long().argmax(1))
    assert counts == [0, REST, 0, REST]


def test_wrappers_stay_on_the_device(device):
    teacher = make_teacher()
    env = ReDiFVectorEnv(
        2, teacher, num_steps=2, schedule="uniform", residual=True, bank=answers(teacher), seed=0
    )
    relative, flat = RelativeReward(env), FlatVectorObservation(env)
    zero = torch.zeros(env.action_space.shape, device=DEVICE)
    assert host_reads(device, relative, lambda: zero) == [0, REST, 0, REST]
    assert flat.reset(seed=0)[0].device == DEVICE
    assert flat.step(zero)[0].device == DEVICE


REWARDS = {
    **{
        name: functools.partial(lambda name, teacher: make_reward(name), name)
        for name in ("mse", "psnr", "ssim", "ms_ssim", "cosine", "histogram_kl", "compressed_size")
    },
    "mmd": lambda teacher: MMD(memory=8),
    "mmd of a reference": lambda teacher: MMD(reference=torch.randn(8, *SHAPE), memory=8),
    "discriminator": lambda teacher: Discriminator(SHAPE, 3, batch_size=4),
    "likelihood": lambda teacher: TeacherLikelihood(teacher, num_levels=2),
}


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_stay_on_the_device(device, name):
    teacher = make_teacher()
    reward, bank = REWARDS[name](teacher), answers(teacher)
    samples = bank.x_T, bank.teacher_x_0, bank.condition
    for _ in range(2):
        assert reward(*samples).device == DEVICE
        if hasattr(reward, "update"):
            reward.update(*samples)
    before = device.reads
    reward(*samples)
    assert device.reads == before + (name == "compressed_size")  # zlib is the host's
