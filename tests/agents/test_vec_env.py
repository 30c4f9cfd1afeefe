"""TorchVecEnv: Stable-Baselines3's conventions on one side, tensors on the other."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.monitor import Monitor

import redif_env  # noqa: F401 (registers ReDiF-v0)
from agents.vec_env import TorchVecEnv
from redif_env.errors import InvalidArgumentError


@pytest.fixture
def env(make_env) -> TorchVecEnv:
    return TorchVecEnv(make_env())


@pytest.fixture
def free_env(make_env) -> TorchVecEnv:
    """Rows of a free schedule end at different times."""
    return TorchVecEnv(make_env(schedule="free", num_steps=3))


def staggered_actions(rows: int) -> np.ndarray:
    """Even rows go straight to the data, odd rows keep half of the time."""
    actions = np.zeros((rows, 65), np.float32)
    actions[::2, -1] = -1
    return actions


def test_reset_and_step_give_numpy_as_stable_baselines_expects(env):
    obs = env.reset()
    assert {name: (value.dtype.str, value.shape) for name, value in obs.items()} == {
        "latents": ("<f4", (8, 1, 8, 8)),
        "timestep": ("<f4", (8, 1)),
        "steps_left": ("<f4", (8, 1)),
        "condition": ("<i8", (8,)),
    }
    for step in range(3):
        obs, rewards, dones, infos = env.step(np.zeros((8, 64), np.float32))
        assert (rewards.dtype, rewards.shape) == (np.float32, (8,))
        assert (dones.dtype, dones.all(), dones.any()) == (bool, step == 2, step == 2)
        assert isinstance(infos, list)
        assert len(infos) == 8
        assert all(bool(info) == (step == 2) for info in infos)


def test_the_last_step_reports_the_terminal_observation_and_the_episode(env):
    env.reset()
    actions = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
    for _ in range(3):
        obs, rewards, _, infos = env.step(actions)
    for row, info in enumerate(infos):
        final = info["terminal_observation"]
        np.testing.assert_array_equal(final["latents"].ravel(), actions[row])  # x_0 is the action
        assert final["timestep"] == 0
        assert final["steps_left"] == 0
        assert obs["steps_left"][row] == 1  # the next episode's
        assert info["episode"]["r"] == pytest.approx(rewards[row])
        assert info["episode"]["l"] == info["episode"]["nfe"] == 3
        assert info["TimeLimit.truncated"] is False
        assert env.observation_space.contains(final)


def test_only_rows_that_ended_report(free_env):
    free_env.reset()
    for step in range(2):
        _, rewards, dones, infos = free_env.step(staggered_actions(8))
        # even rows end at every step; odd rows not before their third
        np.testing.assert_array_equal(dones, [True, False] * 4)
        assert [bool(info) for info in infos] == dones.tolist(), step
        assert (rewards[1::2] == 0).all()
        assert {info["episode"]["l"] for info in infos[::2]} == {1}


def test_numpy_and_tensors_are_the_same_environment(make_env):
    by_numpy, by_tensor = TorchVecEnv(make_env(seed=3)), TorchVecEnv(make_env(seed=3))
    assert by_tensor.device == torch.device("cpu")
    arrays, tensors = by_numpy.reset(), by_tensor.reset_tensor()
    for seed in range(4):
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, tensors[name].numpy())
        actions = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed))
        arrays, rewards, dones, _ = by_numpy.step(actions.numpy())
        tensors, tensor_rewards, tensor_dones, infos = by_tensor.step_tensor(actions)
        np.testing.assert_array_equal(rewards, tensor_rewards.numpy())
        np.testing.assert_array_equal(dones, tensor_dones.numpy())
        assert ("reward_map" in infos) == bool(dones.all())


def test_what_was_returned_is_not_overwritten(env):
    kept = env.reset()
    copies = {name: value.copy() for name, value in kept.items()}
    for _ in range(4):
        env.step(np.ones((8, 64), np.float32))
    for name, value in kept.items():
        np.testing.assert_array_equal(value, copies[name])


def test_a_seed_counts_for_the_next_reset_only(env):
    env.seed(5)
    first, second = env.reset(), env.reset()
    env.seed(5)
    np.testing.assert_array_equal(env.reset()["latents"], first["latents"])
    assert not np.array_equal(first["latents"], second["latents"])


def test_options_count_for_the_next_reset_only(env):
    tasks = np.repeat([5, 2], 4)  # the neighbours of a group share one
    env.set_options({"tasks": tasks})
    chosen = env.reset()["latents"]
    np.testing.assert_array_equal(chosen, env.env.bank.x_T[tasks].numpy())
    assert not np.array_equal(env.reset()["latents"], chosen)


def test_attributes_belong_to_all_rows(env):
    assert env.get_attr("group_size") == [4] * 8
    assert env.get_attr("max_steps", [0, 5]) == [3, 3]
    assert env.get_attr("max_steps", 2) == [3]
    env.set_attr("render_mode", "rgb_array")
    assert env.env.unwrapped.render_mode == "rgb_array"
    assert env.env_is_wrapped(Monitor) == [False] * 8
    assert env.env_is_wrapped(Monitor, [1]) == [False]


def test_methods_give_one_value_a_row(env):
    env.reset()
    pictures = env.env_method("draw", env.env.state)
    assert len(pictures) == 8
    assert pictures[0].dtype == np.uint8
    picked = env.env_method("draw", env.env.state, indices=[6, 1])
    np.testing.assert_array_equal(picked[0], pictures[6])
    np.testing.assert_array_equal(picked[1], pictures[1])


def test_tensors_of_a_method_become_numpy(env):
    """As `MaskablePPO`, which stacks the values with numpy, needs them."""
    env.env.values = lambda: torch.arange(16).reshape(8, 2)
    values = env.env_method("values", indices=[3, 0])
    assert [type(value) for value in values] == [np.ndarray] * 2
    assert [value.tolist() for value in values] == [[6, 7], [0, 1]]


def test_a_method_without_a_value_can_be_called(env):
    """As `DummyVecEnv`, which answers with one None a row."""
    assert env.env_method("close") == [None] * 8


def test_images_are_the_environments(make_env):
    env = TorchVecEnv(make_env(4, render_mode="rgb_array"))
    env.reset()
    images = env.get_images()
    assert len(images) == 4
    assert images[0].shape[-1] == 3
    assert env.render("rgb_array").ndim == 3  # Stable-Baselines3's tiling


@pytest.mark.parametrize("other", [gym.make("CartPole-v1"), None, "ReDiF-v0"])
def test_anything_but_a_vector_environment_is_refused(other):
    with pytest.raises(InvalidArgumentError, match=r"env=.*VectorEnv"):
        TorchVecEnv(other)


def test_another_autoreset_mode_is_refused():
    other = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    with pytest.raises(InvalidArgumentError, match="SAME_STEP"):
        TorchVecEnv(other)


class TruncatingEnv(VectorEnv):
    """Truncates both rows at every step."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    num_envs, device = 2, "cpu"
    single_observation_space = gym.spaces.Dict(x=gym.spaces.Box(-1, 1, (1,)))
    single_action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        return {"x": torch.zeros(2, 1)}, {}

    def step(self, actions):
        both = torch.ones(2, dtype=torch.bool)
        episode = {"r": torch.ones(2), "l": torch.ones(2, dtype=torch.int64)}
        infos = {"final_obs": {"x": torch.ones(2, 1)}, "_final_obs": both, "episode": episode}
        return {"x": torch.zeros(2, 1)}, torch.ones(2), ~both, both, {**infos, "_episode": both}


def test_truncation_is_reported_as_truncation():
    """Stable-Baselines3 bootstraps from the terminal observation where this is True."""
    env = TorchVecEnv(TruncatingEnv())
    env.reset()
    _, _, dones, infos = env.step(np.zeros((2, 1), np.float32))
    assert dones.all()
    assert [info["TimeLimit.truncated"] for info in infos] == [True, True]


SMALL = {"policy_kwargs": {"net_arch": [8]}}
ALGORITHMS = [
    pytest.param(PPO, {"batch_size": 8, **SMALL}, id="PPO"),
    pytest.param(A2C, SMALL, id="A2C"),
]


@pytest.mark.parametrize(("kind", "options"), ALGORITHMS)
def test_stock_algorithms_learn_on_it(kind, options, free_env):
    model = kind("MultiInputPolicy", free_env, n_steps=4, seed=0, **options)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(64)
    assert model.num_timesteps == 64
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)
    )
    assert len(model.ep_info_buffer) > 8  # episodes of one to three steps were counted
    assert all(info["r"] < 0 for info in model.ep_info_buffer)


@pytest.mark.parametrize(("kind", "options"), ALGORITHMS)
def test_stock_algorithms_learn_on_the_registered_environment(kind, options, teacher, bank):
    env = gym.make("ReDiF-v0", teacher=teacher, bank=bank)
    model = kind("MultiInputPolicy", env, n_steps=8, seed=0, **options)
    model.learn(16)
    assert model.num_timesteps == 16


def test_the_registered_vector_environment_can_be_wrapped(teacher, bank):
    env = TorchVecEnv(gym.make_vec("ReDiF-v0", num_envs=4, teacher=teacher, bank=bank))
    assert env.reset()["latents"].shape == (4, 1, 8, 8)
    assert env.action_space.shape == (65,)
