"""Nothing meets a tensor of another device, from the teacher to the student and its judgement."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from diffusers import DDIMScheduler
from fake_device import DEVICE, FakeDevice
from tiny_models import pixel_unet

from agents import ReDiFPPO, comparison, distill, distillation
from redif_env import Denoiser, ReDiFVectorEnv, Teacher, TeacherBank, load_teacher
from redif_env.loading import noise_schedule

OPTIONS: dict[str, Any] = {
    "num_steps": 2,
    "iterations": 2,
    "num_envs": 8,
    "batch_size": 8,
    "bank_size": 16,
    "num_held_out": 100,
    "eval_every": 1,
}


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(distillation, "NUM_VALIDATION", 16)
    with FakeDevice() as device:
        yield device


def make_teacher() -> Teacher:
    """A teacher on the device, with a diffusers solver."""
    solver = DDIMScheduler(prediction_type="sample")
    network = pixel_unet(num_class_embeds=4)
    denoiser = Denoiser(
        network, noise_schedule(solver), "sample", (3, 8, 8), num_classes=3, null_class=3
    )
    make_solver = functools.partial(DDIMScheduler.from_config, solver.config)
    return Teacher(denoiser, make_solver, 2).to(DEVICE)


def check(result: distillation.Distillation) -> None:
    assert result.student.device == DEVICE
    assert result.report["held_out"]["student"]["paired_mse"] >= 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule": "learned"},
        {"schedule": "karras", "guidance_scale": 2.0, "reward": "psnr"},
        {"schedule": [850.0, 300.0], "stochastic_steps": "all", "antithetic": False},
        pytest.param({"schedule": [850.0, 300.0], "lora_rank": 2}, marks=pytest.mark.slow),
        pytest.param(
            {"schedule": [850.0, 300.0], "micro_batch_size": 2, "gradient_checkpointing": True},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_distill_stays_on_the_device(device, options):
    check(distill(make_teacher(), **{**OPTIONS, **options}))


def test_a_written_run_stays_on_the_device(device, tmp_path):
    out = tmp_path / "run"
    check(distill(make_teacher(), **OPTIONS, schedule="uniform", out=out, checkpoint_every=1))
    assert (out / "student").is_dir()


@pytest.mark.slow
def test_the_bundled_teacher_and_its_judge_stay_on_the_device(device):
    result = distill(load_teacher(num_steps=3, device=DEVICE), **OPTIONS)
    check(result)
    assert result.report["held_out"]["student"]["frechet"] > 0


@pytest.mark.parametrize("method", ["output_regression", "backprop", "distribution_matching"])
def test_other_methods_stay_on_the_device(device, method):
    check(distill(make_teacher(), **OPTIONS, schedule=[850.0, 300.0], method=method))


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "task"},
        {"advantage": "gae"},
        {"advantage": "gae", "credit": "global", "ratio": "sum", "target_kl": 0.1},
        {"divergence": "js", "policy_kwargs": {"exploration_mean": "sde"}},
        {"policy_kwargs": {"schedule_head": {"kind": "beta", "adaptive": True}}},
        {"policy_kwargs": {"schedule_head": {"kind": "categorical"}}},
    ],
    ids=str,
)
def test_agents_stay_on_the_device(device, options):
    free = "schedule_head" in options.get("policy_kwargs", {})
    env = ReDiFVectorEnv(
        8,
        make_teacher(),
        schedule="free" if free else "uniform",
        num_steps=2,
        bank_size=8,
        group_size=2,
        seed=0,
    )
    model = ReDiFPPO("StudentPolicy", env, batch_size=8, seed=0, **options)
    model.learn(32)
    assert model.device == DEVICE
    assert all(weight.device == DEVICE for weight in model.policy.parameters())


def test_figures_are_taken_on_the_device(device):
    bank = TeacherBank.build(make_teacher(), 32)
    yardstick = comparison.Yardstick(bank.teacher_x_0, bank.x_T, bank.condition)
    methods = {"ours": comparison.Method([bank.x_T], bank.condition, paired=True)}
    report = comparison.evaluate(methods, yardstick, num_resamples=100)
    assert report["methods"]["ours"]["paired_mse"]["estimate"] > 0
