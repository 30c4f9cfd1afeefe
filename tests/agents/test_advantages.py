"""Advantages against Stable-Baselines3's own loop, closed forms, and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.buffers import RolloutBuffer

from agents.advantages import gae, group_relative

STEPS, ROWS = 12, 5


def random_rollout(seed: int) -> dict[str, torch.Tensor]:
    """Episodes that end at random times, different in each row."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    starts = torch.rand((STEPS + 1, ROWS), generator=generator) < 0.3
    return {
        "rewards": normal(STEPS, ROWS),
        "values": normal(STEPS, ROWS),
        "episode_starts": starts[:-1].float(),
        "last_values": normal(ROWS),
        "last_dones": starts[-1],
    }


def stable_baselines_gae(rollout, gamma: float, gae_lambda: float) -> torch.Tensor:
    space = Box(-1, 1, (1,))
    buffer = RolloutBuffer(STEPS, space, space, gae_lambda=gae_lambda, gamma=gamma, n_envs=ROWS)
    nothing = np.zeros((ROWS, 1), np.float32)
    for step in range(STEPS):
        buffer.add(
            nothing,
            nothing,
            rollout["rewards"][step].numpy(),
            rollout["episode_starts"][step].numpy(),
            rollout["values"][step],
            torch.zeros(ROWS),
        )
    buffer.compute_returns_and_advantage(rollout["last_values"], rollout["last_dones"].numpy())
    return torch.as_tensor(buffer.advantages)


def reward_to_go(rollout) -> torch.Tensor:
    """Undiscounted rewards until the end of the episode, bootstrapped where it goes on."""
    ends = torch.cat([rollout["episode_starts"][1:], rollout["last_dones"][None].float()])
    following = rollout["last_values"]
    result = torch.empty(STEPS, ROWS)
    for step in reversed(range(STEPS)):
        following = rollout["rewards"][step] + torch.where(ends[step] > 0, 0.0, following)
        result[step] = following
    return result


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_equals_stable_baselines(seed, gamma, gae_lambda):
    rollout = random_rollout(seed)
    expected = stable_baselines_gae(rollout, gamma, gae_lambda)
    # float32 against float32, twelve additions of numbers near 1
    torch.testing.assert_close(gae(**rollout, gamma=gamma, gae_lambda=gae_lambda), expected)


def test_without_discount_gae_is_the_reward_to_go_minus_the_value():
    rollout = random_rollout(7)
    advantages = gae(**rollout, gamma=1.0, gae_lambda=1.0)
    expected = reward_to_go(rollout) - rollout["values"]
    # the values cancel along an episode: a few float32 roundings of numbers below 10
    torch.testing.assert_close(advantages, expected, atol=1e-5, rtol=0)


def test_lambda_zero_gives_one_step_errors():
    rollout = random_rollout(8)
    rollout["episode_starts"].zero_()
    rollout["last_dones"] = torch.zeros(ROWS, dtype=torch.bool)
    following = torch.cat([rollout["values"][1:], rollout["last_values"][None]])
    expected = rollout["rewards"] + 0.9 * following - rollout["values"]
    torch.testing.assert_close(gae(**rollout, gamma=0.9, gae_lambda=0.0), expected)


@pytest.mark.parametrize("changed", ["episode_starts", "last_dones"])
def test_gae_that_ignores_the_end_of_episodes_differs(changed):
    """Negative control: the oracle above would notice."""
    rollout = random_rollout(0)
    correct = gae(**rollout, gamma=0.99, gae_lambda=0.95)
    wrong = {**rollout, changed: torch.zeros_like(rollout[changed])}
    assert (gae(**wrong, gamma=0.99, gae_lambda=0.95) - correct).abs().max() > 0.1


def test_gae_does_not_leak_between_episodes_or_rows():
    rollout = random_rollout(1)
    rollout["episode_starts"].zero_()
    rollout["episode_starts"][6] = 1
    before = gae(**rollout, gamma=0.99, gae_lambda=0.95)
    rollout["rewards"][6:, 2] += 100
    after = gae(**rollout, gamma=0.99, gae_lambda=0.95)
    others = [0, 1, 3, 4]
    assert torch.equal(before[:6], after[:6])
    assert torch.equal(before[:, others], after[:, others])
    assert (after[6:, 2] - before[6:, 2]).min() > 10


def test_group_relative_by_hand():
    returns = torch.tensor([[1.0, 3.0, 10.0, 20.0]])
    expected = torch.tensor([[-1.0, 1.0, -5.0, 5.0]]) / (52 / 3) ** 0.5
    torch.testing.assert_close(group_relative(returns, 2), expected)


def test_a_constant_a_task_changes_nothing():
    returns = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    per_task = torch.randn(3, 2, generator=torch.Generator().manual_seed(1))
    shifted = returns + per_task.repeat_interleave(4, 1)
    # float32 after adding and subtracting numbers near 1
    torch.testing.assert_close(
        group_relative(shifted, 4), group_relative(returns, 4), atol=1e-5, rtol=0
    )
    # negative control: the tasks of groups of two are others
    difference = group_relative(returns + per_task.repeat_interleave(4, 1).roll(1, 1), 4)
    assert (difference - group_relative(returns, 4)).abs().max() > 0.1


def test_the_scale_is_one_for_all_groups():
    """A task whose members differ ten times as much keeps ten times the advantage."""
    easy, hard = torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 10.0, 20.0, 30.0])
    advantages = group_relative(torch.cat([easy, hard])[None], 4)[0]
    torch.testing.assert_close(advantages[4:], 10 * advantages[:4])
    assert advantages.std().item() == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(  # and is free of the unit of the reward
        group_relative(1000 * torch.cat([easy, hard])[None], 4)[0], advantages
    )


def test_equal_members_get_no_advantage():
    assert torch.equal(group_relative(torch.full((2, 6), 3.0), 3), torch.zeros(2, 6))


def test_maps_are_centred_element_by_element():
    maps = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    advantages = group_relative(maps, 3)
    centred = torch.cat(
        [
            maps[:, rows] - maps[:, rows].mean(1, keepdim=True)
            for rows in (slice(0, 3), slice(3, 6))
        ],
        1,
    )
    torch.testing.assert_close(advantages, centred / centred.std())
    # negative control: one mean for the whole map is something else
    whole = maps - maps.mean((1, 2), keepdim=True)
    assert (advantages - whole / whole.std()).abs().max() > 0.1
