"""Advantages against Stable-Baselines3's own loop, closed forms, and hand-made numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from stable_baselines3.common.buffers import RolloutBuffer

from agents import advantages
from agents.advantages import TaskMeans, gae, group_relative, standardised

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
    for own_std in (False, True):
        same = group_relative(torch.full((2, 6), 3.0), 3, own_std)
        assert torch.equal(same, torch.zeros(2, 6))


def test_each_group_has_a_scale_of_its_own():
    """GRPO, with numpy: a task whose members differ ten times as much gets the same advantages."""
    easy = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    hard = 7 + 10 * easy
    advantages = group_relative(torch.cat([easy, hard], 1), 4, own_std=True)
    numbers = easy.numpy()
    expected = (numbers - numbers.mean(1, keepdims=True)) / numbers.std(1, keepdims=True)
    torch.testing.assert_close(advantages[:, :4], torch.from_numpy(expected))
    torch.testing.assert_close(advantages[:, 4:], advantages[:, :4], atol=1e-5, rtol=1e-4)
    # negative control: with one scale for all the hard ones count for more
    shared = group_relative(torch.cat([easy, hard], 1), 4)
    assert shared[:, 4:].square().mean() > 50 * shared[:, :4].square().mean()
    # one whose members differ by rounding stays far behind
    equal = torch.cat([easy, 1 + 1e-6 * easy], 1)
    assert group_relative(equal, 4, own_std=True)[:, 4:].abs().max() < 1e-3


def test_a_group_of_maps_is_scaled_as_a_whole():
    """Elements keep their proportions: only tasks are made alike, each of mean square 1."""
    maps = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    maps[:, :3] *= 100
    advantages = group_relative(maps, 3, own_std=True).unflatten(1, (2, 3))
    torch.testing.assert_close(advantages.square().mean((2, 3)), torch.ones(2, 2))
    centred = maps.unflatten(1, (2, 3))
    centred = centred - centred.mean(2, keepdim=True)
    ratios = advantages / centred
    torch.testing.assert_close(ratios, ratios[:, :, :1, :1].expand_as(ratios), rtol=1e-3, atol=1e-6)


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


DIM = 4


def random_maps(seed: int) -> dict[str, torch.Tensor]:
    """A rollout of maps `(T, N, D)`: a rollout an element, of one set of episodes."""
    layers = [random_rollout(seed + 100 * element) for element in range(DIM)]
    shared = {name: layers[0][name] for name in ("episode_starts", "last_dones")}
    names = ("rewards", "values", "last_values")
    return {**shared, **{name: torch.stack([it[name] for it in layers], -1) for name in names}}


def element_of(rollout, element: int) -> dict[str, torch.Tensor]:
    alone = {name: rollout[name][..., element] for name in ("rewards", "values", "last_values")}
    return {**rollout, **alone}


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (0.99, 0.95), (0.9, 0.0)])
def test_gae_of_maps_is_that_of_each_element(gamma, gae_lambda):
    rollout = random_maps(3)
    maps = gae(**rollout, gamma=gamma, gae_lambda=gae_lambda)
    assert maps.shape == (STEPS, ROWS, DIM)
    for element in range(DIM):
        alone = element_of(rollout, element)
        assert torch.equal(maps[..., element], gae(**alone, gamma=gamma, gae_lambda=gae_lambda))
        # float32 against float32, twelve additions of numbers near 1
        torch.testing.assert_close(
            maps[..., element], stable_baselines_gae(alone, gamma, gae_lambda)
        )
    # negative control: elements differ, so that a mixed-up one would be noticed
    assert (maps[..., 0] - maps[..., 1]).abs().max() > 0.1


def test_gae_of_maps_of_one_element_is_that_of_rows():
    """Of as many rows as steps, where a wrong broadcast would go unnoticed by its shape."""
    rollout = {name: part[:ROWS] for name, part in random_rollout(5).items()}
    maps = {name: rollout[name][..., None] for name in ("rewards", "values", "last_values")}
    scalar = gae(**rollout, gamma=0.99, gae_lambda=0.95)
    as_maps = gae(**{**rollout, **maps}, gamma=0.99, gae_lambda=0.95)
    assert torch.equal(as_maps[..., 0], scalar)


FIRST, SECOND, THIRD = [1.0, 2.0, 6.0], [4.0, 0.0, 7.0], [3.0, 5.0, 9.0]


def relative(means: TaskMeans, returns: list[float], tasks: list[int]) -> torch.Tensor:
    return means.relative(torch.tensor([returns]), torch.tensor([tasks]))[0]


def centred(values: list[float], baseline: list[float]) -> torch.Tensor:
    difference = torch.tensor(values) - torch.tensor(baseline)
    return difference / difference.std()


def test_task_means_by_hand_over_three_visits():
    means = TaskMeans(10)
    # nothing is known: all get the mean of the rollout
    torch.testing.assert_close(relative(means, FIRST, [7, 1, 4]), centred(FIRST, [3.0, 3.0, 3.0]))
    # task 1 is now worth 2, task 7 is worth 1; task 2 is new and gets the mean of (4, 0, 7)
    torch.testing.assert_close(
        relative(means, SECOND, [1, 7, 2]), centred(SECOND, [2.0, 1.0, 11 / 3])
    )
    # two visits each: task 1 has (2 + 4) / 2, task 7 has (1 + 0) / 2; task 2 has 7
    torch.testing.assert_close(relative(means, THIRD, [7, 2, 1]), centred(THIRD, [0.5, 7.0, 3.0]))


def test_task_means_by_hand_with_a_task_twice_in_a_rollout():
    means = TaskMeans(3)
    relative(means, [1.0, 3.0, 8.0], [0, 0, 2])  # task 0 is worth 2 after two visits at once
    wanted = centred([5.0, 0.0, 4.0], [2.0, 8.0, 2.0])
    torch.testing.assert_close(relative(means, [5.0, 0.0, 4.0], [0, 2, 0]), wanted)
    # four visits of 1, 3, 5, 4, two of 8, 0
    wanted = centred([0.0, 1.0, 5.0], [13 / 4, 4.0, 13 / 4])
    torch.testing.assert_close(relative(means, [0.0, 1.0, 5.0], [0, 2, 0]), wanted)


@pytest.mark.parametrize(("horizon", "left"), [(1, 0.5), (4, 0.8)])
def test_a_mean_forgets_what_lies_beyond_its_horizon(horizon, left):
    """Once full, a mean keeps the share horizon / (horizon + 1) at each visit."""
    means = TaskMeans(2, horizon)
    for _ in range(horizon + 3):
        relative(means, [10.0, 0.0], [0, 1])
    relative(means, [0.0, 0.0], [0, 1])
    wanted = centred([1.0, 2.0], [10 * left, 0.0])
    torch.testing.assert_close(relative(means, [1.0, 2.0], [0, 1]), wanted)
    # negative control: the plain mean of all visits remembers more
    plain = 10 * (horizon + 3) / (horizon + 4)
    assert (wanted - centred([1.0, 2.0], [plain, 0.0])).abs().max() > 1e-3


def test_task_means_of_maps_are_those_of_each_element():
    generator = torch.Generator().manual_seed(2)
    maps, rows = TaskMeans(6), [TaskMeans(6) for _ in range(DIM)]
    for _ in range(3):
        returns = torch.randn(2, ROWS, DIM, generator=generator)
        tasks = torch.randint(6, (2, ROWS), generator=generator)
        together = maps.relative(returns, tasks)
        assert together.shape == returns.shape
        for element, alone in enumerate(rows):
            expected = alone.relative(returns[..., element], tasks)
            # the scale is the whole map's
            torch.testing.assert_close(standardised(together[..., element]), expected)
    assert float(together.std()) == pytest.approx(1, rel=1e-5)


class RemembersFirst(TaskMeans):
    """Negative control: the baseline holds the very return that it is subtracted from."""

    def relative(self, returns, tasks):
        if self._means is not None:
            self._remember(returns.flatten(0, 1), tasks.flatten())
        return super().relative(returns, tasks)


@pytest.mark.parametrize(("kind", "unbiased"), [(TaskMeans, True), (RemembersFirst, False)])
def test_the_baseline_is_known_before_the_return(monkeypatch, kind, unbiased):
    """Else part of every advantage is its own mirror image, and the gradient is too short.

    Of pure noise, the advantage's slope by the return is 1, or half of it where the second visit's
    return is in the mean of two.
    """
    monkeypatch.setattr(advantages, "standardised", lambda values: values)
    generator = torch.Generator().manual_seed(4)
    num = 4000
    means, tasks = kind(num), torch.randperm(num, generator=generator)[None]
    means.relative(torch.randn(1, num, generator=generator), tasks)
    returns = torch.randn(1, num, generator=generator)
    slope = (means.relative(returns, tasks) * returns).mean() / returns.square().mean()
    # the other return's noise: 1 / sqrt(4000) = 0.016, and 4.5 of that for other random numbers
    assert float(slope) == pytest.approx(1.0 if unbiased else 0.5, abs=0.072)
