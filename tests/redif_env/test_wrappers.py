"""FlatVectorObservation: gymnasium.spaces.flatten, row by row, on tensors."""

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
    TeacherBank,
    check_vector_env,
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
