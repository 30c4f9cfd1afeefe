"""Back-propagation through the sampler."""

from __future__ import annotations

import torch

from agents.baselines.backprop import backpropagate
from redif_env import MSE, schedules


def run(teacher, bank, **options):
    grid = schedules.uniform(teacher.denoiser.schedule, 2)
    options = {
        "iterations": 8,
        "batch_size": 16,
        "learning_rate": 3e-4,
        "ema_decay": 0.5,
        **options,
    }
    student = backpropagate(teacher.denoiser, bank, grid, MSE(), **options)
    return schedules.paired_mse(student, bank, grid), student


def test_it_lowers_the_error_and_leaves_the_start_alone(teacher, bank):
    before = {n: p.clone() for n, p in teacher.denoiser.network.state_dict().items()}
    grid = schedules.uniform(teacher.denoiser.schedule, 2)
    start = schedules.paired_mse(teacher.denoiser, bank, grid)
    # 8 steps halve it on every seed tried; 0.8 leaves room for other platforms' rounding.
    assert run(teacher, bank)[0] < 0.8 * start
    for name, value in teacher.denoiser.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_gradient_is_that_of_the_reward(teacher, bank):
    """Negative control: a learning rate of zero changes nothing."""
    grid = schedules.uniform(teacher.denoiser.schedule, 2)
    start = schedules.paired_mse(teacher.denoiser, bank, grid)
    assert run(teacher, bank, learning_rate=0.0)[0] == start


def test_it_reports_every_iteration(teacher, bank):
    seen = []
    run(teacher, bank, iterations=3, on_iteration=lambda i, student: seen.append(i))
    assert seen == [0, 1, 2, 3]
