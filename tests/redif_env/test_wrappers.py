"""FlatVectorObservation against gymnasium.spaces.flatten; RelativeReward against the student."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from tripwire import Tripwire, arm

from redif_env import (
    FlatVectorObservation,
    ReDiFScheduleVectorEnv,
    ReDiFVectorEnv,
    RelativeReward,
    TeacherBank,
    baseline_returns,
    check_vector_env,
    schedules,
)
from redif_env.errors import InvalidArgumentError

SIZE = 64 + 1 + 1 + 10  # latents, timestep, steps left, ten classes


@pytest.fixture
def pair(teacher, bank):
    """The same environment, plain and flat; rows end at different times."""

    def build(num_envs=3):
        plain = [ReDiFVectorEnv(num_envs, teacher, bank=bank, seed=0) for _ in range(2)]
        return plain[0], FlatVectorObservation(plain[1])

    return build


def flat_rows(space, observation):
    """What Gymnasium makes of each row."""
    rows = len(observation["latents"])
    picked = [
        {name: value[i].numpy()[()] for name, value in observation.items()} for i in range(rows)
    ]
    return np.stack([spaces.flatten(space, row) for row in picked])


def test_rows_are_gymnasiums(pair):
    plain, flat = pair()
    space = plain.single_observation_space
    observation, both = plain.reset(seed=1)[0], flat.reset(seed=1)[0]
    np.testing.assert_array_equal(both.numpy(), flat_rows(space, observation))
    for choices in ([-1.0, 0.0, 0.5], [0.0, -1.0, 0.5], [-1.0, 0.0, -1.0]):
        actions = torch.linspace(-1, 1, 195).reshape(3, 65)
        actions[:, -1] = torch.tensor(choices)
        observation, rewards, ends, _, infos = plain.step(actions)
        both, flat_rewards, flat_ends, _, flat_infos = flat.step(actions)
        np.testing.assert_array_equal(both.numpy(), flat_rows(space, observation))
        assert ends.any()
        assert not ends.all()
        wanted = flat_rows(space, infos["final_obs"])
        np.testing.assert_array_equal(flat_infos["final_obs"].numpy(), wanted)
        assert not np.array_equal(wanted, both.numpy())
        assert torch.equal(rewards, flat_rewards)
        assert torch.equal(ends, flat_ends)
        assert flat_infos["episode"].keys() == infos["episode"].keys()


def test_spaces(pair):
    plain, flat = pair(4)
    wanted = spaces.flatten_space(plain.single_observation_space)
    space = flat.single_observation_space
    assert (space.shape, space.dtype) == ((SIZE,), np.float32)
    np.testing.assert_array_equal(space.low, wanted.low)
    np.testing.assert_array_equal(space.high, wanted.high)
    assert flat.observation_space.shape == (4, SIZE)
    assert flat.single_action_space == plain.single_action_space


@pytest.mark.parametrize("kind", [ReDiFVectorEnv, ReDiFScheduleVectorEnv])
def test_conformance(teacher, bank, kind):
    check_vector_env(FlatVectorObservation(kind(3, teacher, bank=bank)), num_steps=8)


def test_the_single_environment_has_gymnasiums_wrapper(pair, teacher, bank):
    """`FlattenObservation` gives the same row, in double because classes are integers."""
    single = gym.make("redif_env:ReDiF-v0", teacher=teacher, bank=bank)
    single = gym.wrappers.FlattenObservation(single)
    observation, _ = single.reset(options={"tasks": [7]})
    wanted, _ = pair(1)[1].reset(options={"tasks": [7]})
    np.testing.assert_array_equal(observation, wanted[0].numpy())
    assert observation in single.observation_space


def test_observations_stay_on_the_device(pair, bank):
    _, flat = pair()
    flat.unwrapped._bank = TeacherBank(*map(arm, (bank.x_T, bank.teacher_x_0, bank.condition)))
    assert isinstance(flat.reset()[0], Tripwire)


class OfTuples(VectorEnv):
    num_envs = 2
    single_observation_space = spaces.Dict(pair=spaces.Tuple([spaces.Discrete(2)] * 2))


class OfArrays(VectorEnv):
    num_envs = 2
    single_observation_space = spaces.Box(0, 1, (2,))


@pytest.mark.parametrize("env", [gym.make("CartPole-v1"), None, OfTuples(), OfArrays()])
def test_other_environments_are_refused(env):
    with pytest.raises(InvalidArgumentError, match=r"env=.*pass "):
        FlatVectorObservation(env)


# RelativeReward

STARTS = [850, 744, 638, 531, 425, 319, 213, 106]  # and eight times to choose from


def residual(teacher, bank, num_envs=32, **changes):
    settings = {"schedule": [850, 300], "residual": True, "seed": 0, **changes}
    return ReDiFVectorEnv(num_envs, teacher, bank=bank, **settings)


def scheduled(teacher, bank, num_envs=32, **changes):
    settings = {"schedule": STARTS, "max_steps": 4, "seed": 0, **changes}
    return ReDiFScheduleVectorEnv(num_envs, teacher, bank=bank, **settings)


@pytest.mark.parametrize(
    ("build", "grid"), [(residual, [850, 300, 0]), (scheduled, [850, 638, 425, 213, 0])]
)
def test_baselines_are_plain_ddim(teacher, bank, build, grid):
    """On the grid, or on every second candidate; with the price of the evaluations."""
    x_0 = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, torch.tensor(grid))
    wanted = -(x_0 - bank.teacher_x_0).square().flatten(1).mean(1)
    got = baseline_returns(build(teacher, bank))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    costly = baseline_returns(build(teacher, bank, step_cost=0.25))
    torch.testing.assert_close(costly, wanted - 0.25 * (len(grid) - 1))
    torch.testing.assert_close(baseline_returns(build(teacher, bank), batch_size=5), got)


@pytest.mark.parametrize(("steps", "wanted"), [(3, [1, 4, 7]), (8, list(range(8))), (1, [7])])
def test_even_choices_where_they_do_not_divide(teacher, bank, steps, wanted):
    env = scheduled(teacher, bank, max_steps=steps)
    env.reset(options={"tasks": torch.arange(32)})
    for choice in wanted:
        *_, rewards, ends, _, _ = env.step(torch.full((32,), choice))
    assert ends.all()
    torch.testing.assert_close(baseline_returns(env), rewards)


@pytest.mark.parametrize("num_steps", [4, 16])
def test_rows_that_have_ended_stay(teacher, bank, num_steps):
    """Halving the time comes to the data before the last of many steps."""
    env = ReDiFVectorEnv(32, teacher, residual=True, num_steps=num_steps, bank=bank)
    returns = baseline_returns(env)
    env.reset(options={"tasks": torch.arange(32)})
    zero, ended = torch.zeros(env.action_space.shape), torch.zeros(32, dtype=torch.bool)
    for _ in range(num_steps):
        _, rewards, terminations, *_ = env.step(zero)
        first = terminations & ~ended
        assert torch.equal(returns[first], rewards[first])
        ended |= terminations
    assert bool(ended.all())
    assert bool(returns.isfinite().all())


def test_the_baseline_leaves_the_environment_alone(teacher, bank):
    env, other = residual(teacher, bank), residual(teacher, bank)
    env.reset(seed=3)
    baseline_returns(env)
    other.reset(seed=3)
    actions = torch.full((32, 64), 0.5)
    assert torch.equal(env.step(actions)[0]["latents"], other.step(actions)[0]["latents"])


@pytest.mark.parametrize("action", [0.0, 1.0])
def test_only_doing_nothing_returns_zero(teacher, bank, action):
    env = RelativeReward(residual(teacher, bank))
    env.reset(seed=0)
    _, rewards, ends, _, infos = env.step(torch.full((32, 64), action))
    assert not rewards.any()
    assert not ends.any()
    assert "episode" not in infos
    _, rewards, ends, _, infos = env.step(torch.full((32, 64), action))
    assert ends.all()
    assert torch.equal(infos["episode"]["r"], rewards)
    assert (rewards.abs().max() < 1e-5) == (action == 0)


def test_each_row_is_compared_with_its_own_task(teacher, bank):
    """Rows that end at different times; the plain environment beside it."""
    plain, env = (scheduled(teacher, bank, num_envs=5) for _ in range(2))
    env = RelativeReward(env)
    plain.reset(seed=1)
    env.reset(seed=1)
    baseline = baseline_returns(plain)
    assert baseline.unique().numel() == 32
    seen = 0
    for choices in ([7, 0, 3, 7, 2], [6, 7, 5, 7, 7], [7, 4, 7, 1, 7], [2, 7, 7, 7, 0]):
        observation, rewards, ends, _, infos = plain.step(torch.tensor(choices))
        both, gains, both_ends, _, relative = env.step(torch.tensor(choices))
        assert torch.equal(observation["latents"], both["latents"])
        assert torch.equal(ends, both_ends)
        wanted = torch.where(ends, rewards - baseline[infos["task"]], 0.0)
        torch.testing.assert_close(gains, wanted)
        assert torch.equal(relative["episode"]["r"], gains)
        assert torch.equal(relative["episode"]["l"], infos["episode"]["l"])
        assert infos.keys() - relative.keys() == {"reward_map"}
        seen += int(ends.sum())
        assert 0 < ends.sum() < 5
    assert seen > 5


def test_what_tasks_differ_by_is_gone(teacher, bank):
    """Over tasks, gains by one small correction vary a quarter as much as returns."""
    action = torch.full((32, 64), 0.3)
    spread = []
    for env in (residual(teacher, bank), RelativeReward(residual(teacher, bank))):
        env.reset(options={"tasks": torch.arange(32)})
        env.step(action)
        spread.append(env.step(action)[1].std())
    assert spread[1] < 0.5 * spread[0]


@pytest.mark.parametrize("build", [residual, scheduled])
@pytest.mark.parametrize("flat", [False, True])
def test_conformance_of_relative_rewards(teacher, bank, build, flat):
    env = RelativeReward(build(teacher, bank, num_envs=3))
    check_vector_env(FlatVectorObservation(env) if flat else env, num_steps=8)


def test_gains_stay_on_the_device(teacher, bank):
    env = RelativeReward(residual(teacher, bank, num_envs=2))
    env.reset()
    env.baseline = arm(env.baseline)
    env.step(torch.zeros(2, 64))
    assert isinstance(env.step(torch.zeros(2, 64))[1], Tripwire)


def test_a_reward_over_the_batch_has_no_baseline(teacher, bank):
    env = ReDiFVectorEnv(
        4, teacher, bank=bank, residual=True, schedule=[500], reward="energy_distance"
    )
    with pytest.raises(InvalidArgumentError, match=r"energy_distance.*against the others"):
        RelativeReward(env)


@pytest.mark.parametrize("env", [None, OfArrays(), "plain"])
def test_without_a_frozen_student_there_is_no_baseline(teacher, bank, env):
    env = ReDiFVectorEnv(2, teacher, bank=bank) if env == "plain" else env
    with pytest.raises(InvalidArgumentError, match=r"env=.*residual=True"):
        RelativeReward(env)
