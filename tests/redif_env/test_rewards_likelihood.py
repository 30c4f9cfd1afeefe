"""The teacher's likelihood: the density of a Gaussian teacher, and order on the real one."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian import MEAN, SHAPE, STD, gaussian_denoiser, gaussian_teacher

from redif_env import Denoiser, KernelSolver, Teacher
from redif_env.errors import InvalidArgumentError
from redif_env.noise import FlowSchedule, VESchedule
from redif_env.rewards import TeacherLikelihood
from redif_env.rewards.likelihood import log_snr_levels

WIDE = {"num_levels": 60, "log_snr": (-30.0, 30.0)}


@pytest.fixture
def samples(generator):
    """Eight rows at up to three standard deviations of the Gaussian teacher's data."""
    return MEAN + STD * torch.linspace(0, 3, 8)[:, None, None, None] * torch.randn(
        8, *SHAPE, generator=generator
    )


def log_density(x):
    """Of N(MEAN, STD^2), in nats an element without its constant."""
    return (-((x - MEAN) ** 2) / (2 * STD**2)).flatten(1).mean(1)


def score(reward, x_0, condition=None):
    return reward(x_0, torch.zeros_like(x_0), condition)


def differences(values):
    return values[1:] - values[0]


def test_it_is_the_density_of_a_gaussian_teacher(samples):
    """Opposite noise cancels the term odd in it, so what is left is the midpoint rule's error."""
    reward = TeacherLikelihood(gaussian_teacher(), num_noises=2, **WIDE)
    exact = differences(log_density(samples))
    torch.testing.assert_close(differences(score(reward, samples)), exact, rtol=0.02, atol=0.02)
    assert float(exact.abs().max()) > 2
    # negative control: with one draw the odd term stays
    noisy = TeacherLikelihood(gaussian_teacher(), num_noises=1, **WIDE)
    error = differences(score(noisy, samples)) - exact
    assert float(error.abs().max()) > 0.1


@pytest.mark.parametrize("schedule", [FlowSchedule(), VESchedule()], ids=["flow", "ve"])
def test_it_is_the_same_under_any_schedule(samples, schedule):
    denoiser = gaussian_denoiser(schedule)
    other = Teacher(denoiser, lambda: KernelSolver(denoiser), 2)
    reward = TeacherLikelihood(other, num_noises=2, **WIDE)
    exact = differences(log_density(samples))
    torch.testing.assert_close(differences(score(reward, samples)), exact, rtol=0.03, atol=0.03)


def test_one_level_by_hand():
    """A denoiser that always says 0: error alpha x_0 / sigma, minus the half width times it."""

    class Zero(torch.nn.Module):
        def forward(self, x_t, t):
            return torch.zeros_like(x_t)

    denoiser = Denoiser(Zero(), FlowSchedule(), "sample", (2,))
    teacher = Teacher(denoiser, lambda: KernelSolver(denoiser), 2)
    reward = TeacherLikelihood(teacher, num_levels=1, num_noises=1, log_snr=(-1.0, 1.0))
    assert reward.timesteps.tolist() == [500.0]  # alpha = sigma
    scores = score(reward, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert scores.tolist() == pytest.approx([-0.5 * 2 * 2.5, 0.0], abs=1e-5)


def test_levels_are_midpoints():
    """Flow matching: log-SNR 2 log((1 - u) / u), so u = 1 / (1 + exp(half of it))."""
    times, width = log_snr_levels(FlowSchedule(), (-4.0, 4.0), 4)
    wanted = [1000 / (1 + math.exp(each / 2)) for each in (-3, -1, 1, 3)]
    assert times.tolist() == [round(each) for each in wanted]
    assert width == 8


def test_the_range_is_cut_to_the_schedule(teacher):
    schedule = teacher.denoiser.schedule
    times, width = log_snr_levels(schedule, (-1e3, 1e3), 3)
    assert 5 < width < 100
    assert bool((times >= 1).all())
    assert bool((times <= schedule.max_timestep).all())
    with pytest.raises(InvalidArgumentError, match=r"log_snr=\(90.*overlaps \["):
        TeacherLikelihood(teacher, log_snr=(90, 95))


@pytest.mark.parametrize("options", [{}, {"num_levels": 3, "num_noises": 1}])
def test_the_cost_is_what_it_says(teacher, bank, options):
    reward = TeacherLikelihood(teacher, **options)
    before = teacher.denoiser.network_evaluations
    score(reward, bank.teacher_x_0, bank.condition)
    spent = teacher.denoiser.network_evaluations - before
    assert spent == 32 * reward.nfe
    assert reward.nfe == (3 if options else 8)


def test_it_is_a_function_of_the_row(teacher, bank):
    reward = TeacherLikelihood(teacher)
    x_0, condition = bank.teacher_x_0[:6], bank.condition[:6]
    before = torch.get_rng_state()
    scores = score(reward, x_0, condition)
    assert torch.equal(score(reward, x_0, condition), scores)
    assert torch.equal(torch.get_rng_state(), before)
    for row in range(6):
        alone = score(reward, x_0[row : row + 1], condition[row : row + 1])
        torch.testing.assert_close(alone[0], scores[row], rtol=1e-4, atol=1e-5)
    other = score(TeacherLikelihood(teacher, seed=1), x_0, condition)
    assert not torch.allclose(other, scores, rtol=1e-2)


def test_the_teachers_own_answers_are_likely(teacher, bank, generator):
    reward = TeacherLikelihood(teacher)
    answers, condition = bank.teacher_x_0, bank.condition
    own = score(reward, answers, condition)
    noisy = answers + 0.3 * torch.randn(answers.shape, generator=generator)
    assert bool((score(reward, noisy, condition) < own).all())
    mislabelled = score(reward, answers, (condition + 1) % 10)
    assert float((mislabelled < own).float().mean()) > 0.9
    assert not reward(answers.clone().requires_grad_(), answers, condition).requires_grad


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_levels": 0}, "num_levels=0"),
        ({"num_noises": 0}, "num_noises=0"),
        ({"log_snr": (1.0, 0.0)}, "log_snr="),
        ({"log_snr": (float("nan"), 0.0)}, "log_snr=nan"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(teacher, options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        TeacherLikelihood(teacher, **options)


def test_bad_inputs(teacher):
    with pytest.raises(InvalidArgumentError, match="teacher='digits'"):
        TeacherLikelihood("digits")
    with pytest.raises(InvalidArgumentError, match=r"x_0=\(2, 1, 4, 4\).*\(1, 8, 8\)"):
        score(TeacherLikelihood(teacher), torch.zeros(2, 1, 4, 4), torch.zeros(2).long())
