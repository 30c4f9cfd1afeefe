"""Rewards as strangers write them: what breaks the protocol is said, or does no harm."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from redif_env import MSE, Codec, Decoded, ReDiFEnv, ReDiFVectorEnv, Reward
from redif_env.errors import InvalidArgumentError, InvalidRewardError
from redif_env.rewards import EnergyDistance, Function

GRID = (850.0, 300.0)


class Own(Reward):
    def __init__(self, function):
        self.function = function

    def __call__(self, x_0, teacher_x_0, condition):
        return self.function(x_0, teacher_x_0).flatten(1).mean(1)


class Pixels(nn.Module):
    def decode(self, z):
        return 2 * z


def clip_teacher(x_0, teacher_x_0):
    teacher_x_0.clamp_(-0.1, 0.1)
    return -((x_0 - teacher_x_0) ** 2)


CODEC = Codec(Pixels())
IN_PLACE = {
    "samples": (Own(lambda x_0, teacher_x_0: x_0.clamp_(-0.1, 0.1)), "x_0"),
    "answers": (Own(clip_teacher), "teacher_x_0"),
    "a sum": (MSE() + Own(lambda x_0, teacher_x_0: x_0.mul_(2)), "x_0"),
    "a function": (Function(lambda samples, condition: samples.zero_().mean((1, 2, 3))), "x_0"),
    "pixels": (Decoded(Own(lambda x_0, teacher_x_0: x_0.mul_(2)), CODEC) + MSE(), "x_0"),
}


def last_step(env, actions):
    env.reset(seed=0)
    env.step(actions)
    return env.step(actions)


@pytest.mark.parametrize("name", IN_PLACE)
def test_samples_may_not_be_changed_in_place(teacher, bank, name):
    """The terms after it, and the agent's last observation, would see the changed samples."""
    reward, argument = IN_PLACE[name]
    env = ReDiFVectorEnv(4, teacher, bank=bank, schedule=GRID, reward=reward, seed=0)
    with pytest.raises(InvalidRewardError, match=f"changed='{argument}'"):
        last_step(env, torch.zeros(4, 64))


def test_weights_that_ask_for_gradients_do_no_harm(teacher, bank):
    weight = nn.Parameter(torch.tensor(2.0))
    reward = Own(lambda x_0, teacher_x_0: weight * x_0)
    env = ReDiFVectorEnv(4, teacher, bank=bank, schedule=GRID, reward=reward, seed=0)
    rewards = last_step(env, torch.ones(4, 64))[1]
    assert rewards.tolist() == [2.0] * 4
    assert not rewards.requires_grad
    single = ReDiFEnv(teacher=teacher, bank=bank, schedule=GRID, reward=reward)
    actions = torch.ones(64).numpy()
    assert last_step(single, actions)[1] == 2.0


def test_a_scale_does_not_hang_on_the_size_of_batches(teacher, bank):
    """The last batch of a distance between distributions must not be a rest of a row or two."""
    reward = MSE() + EnergyDistance()
    size = len(bank) - 1
    weights = [weight for weight, _ in reward.normalised(bank, teacher.denoiser, GRID, size).terms]
    assert all(0 < weight < float("inf") for weight in weights)


def test_rounding_is_no_scale(teacher, bank):
    reward = MSE() + Own(lambda x_0, teacher_x_0: 1 + 1e-7 * x_0)
    with pytest.raises(InvalidArgumentError, match="no scale"):
        reward.normalised(bank, teacher.denoiser, GRID)


def test_a_memory_begins_with_a_single_sample(bank):
    """A single environment ends one episode at a time."""
    reward = EnergyDistance(memory=8, reference=bank.teacher_x_0)
    for row in range(3):
        samples = bank.x_T[row : row + 1], bank.teacher_x_0[row : row + 1], None
        before = reward(*samples)
        assert bool(before == 0) == (row < 2)
        figures = reward.update(*samples)
        assert figures["memory"] == row + 1
    with pytest.raises(InvalidArgumentError, match="memory=1"):
        EnergyDistance(memory=1)
