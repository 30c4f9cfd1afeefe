"""Back-propagation through the sampler: the control that may differentiate the reward.

What DRaFT (Clark et al. 2024) does with a reward model, here with the reward of the student: the
gradient of the reward flows through every step of the deterministic sampler into the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from redif_env import rewards, schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_integer, check_number
from redif_env.rewards import Reward
from redif_env.teacher import TeacherBank

from ..averaging import update_average


def backpropagate(
    start: Denoiser,
    bank: TeacherBank,
    timesteps: Tensor,
    reward: Reward,
    *,
    iterations: int,
    batch_size: int = 256,
    learning_rate: float = 2e-4,
    max_grad_norm: float = 0.5,
    ema_decay: float = 0.95,
    seed: int = 0,
    on_iteration: Callable[[int, Denoiser], None] = lambda iteration, student: None,
) -> Denoiser:
    """Maximise a differentiable reward of the final sample by gradient ascent.

    Args:
        start: The student's start; not changed.
        bank: Training tasks.
        timesteps: The student's grid, `(num_steps + 1,)`.
        reward: Must be `differentiable`.
        iterations: Optimiser steps; the learning rate falls linearly to 0.
        batch_size: Trajectories of a step.
        learning_rate: Initial learning rate of Adam.
        max_grad_norm: Largest gradient norm.
        ema_decay: Of the moving average, an iteration; reached after a warm-up.
        seed: Of the order of tasks.
        on_iteration: Called with the iterations done and the averaged student.

    Returns:
        The averaged student, in evaluation mode.

    Raises:
        InvalidArgumentError: for a reward that is not differentiable.
    """
    if not reward.differentiable:
        raise InvalidArgumentError(
            "reward",
            reward.name,
            "pass one with differentiable = True: no gradient leads through this one.",
        )
    iterations = check_integer("iterations", iterations, 1)
    batch_size = check_integer("batch_size", batch_size, 1)
    learning_rate = check_number("learning_rate", learning_rate)
    student = copy.deepcopy(start).eval().requires_grad_(True)
    average = copy.deepcopy(start).eval().requires_grad_(False)
    trained: list[Tensor] = list(student.network.parameters())
    averaged: list[Tensor] = list(average.network.parameters())
    optimizer = torch.optim.Adam(trained, learning_rate, eps=1e-5)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    generator = torch.Generator().manual_seed(seed)
    on_iteration(0, average)
    for iteration in range(iterations):
        rows = torch.randint(len(bank), (batch_size,), generator=generator).to(bank.x_T.device)
        condition = None if bank.condition is None else bank.condition[rows]
        x_0 = schedules.sample(student, bank.x_T[rows], condition, timesteps)
        values, _ = rewards.evaluate(reward, x_0, bank.teacher_x_0[rows], condition)
        optimizer.zero_grad()
        (-values.mean()).backward()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        decay.step()
        update_average(averaged, trained, ema_decay, iteration + 1)
        on_iteration(iteration + 1, average)
    return average
