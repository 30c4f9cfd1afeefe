"""ReDiFEnv: the checks of Gymnasium and Stable-Baselines3, and a row of the vector environment."""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3 import PPO
from stable_baselines3.common import env_checker

import redif_env
from redif_env import ReDiFEnv, ReDiFVectorEnv
from redif_env.errors import InvalidActionError

DIM = 64
OPTIONS = [
    {},
    {"schedule": "uniform", "num_steps": 2},
    {"residual": True, "schedule": [850, 500, 200]},
    {"action_type": "sample", "reward": "psnr", "step_cost": 0.1},
    {"schedule": [850, 500, 200], "solver_order": 2},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture
def make(teacher, bank):
    def build(**options):
        return ReDiFEnv(**{"teacher": teacher, "bank": bank, "seed": 0, **options})

    return build


def play(env, actions, **reset):
    """Reset, and step until the end; every observation, and the last reward and info."""
    observation, info = env.reset(**reset)
    assert info.keys() == {"task"}
    task = info["task"]
    seen = [observation]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation)
        assert not truncated
        if terminated:
            assert info["task"] == task
            return seen, reward, info
        assert reward == 0
        assert info == {}
    raise AssertionError("the episode did not end")


def draw(env, num=4):
    generator = np.random.default_rng(0)
    return [generator.uniform(-1, 1, env.action_space.shape).astype(np.float32) for _ in range(num)]


def assert_equal(one, two):
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_gymnasium_makes_it_and_its_checker_accepts_it():
    env = gym.make("ReDiF-v0")
    assert isinstance(env.unwrapped, ReDiFEnv)
    with warnings.catch_warnings():
        # Latents have no bounds, which Gymnasium advises against.
        warnings.filterwarnings("ignore", message=".*observation space m.* value is.*infinity")
        check_env(env.unwrapped)


@every_option
def test_checkers(make, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on infinite bounds and on images
        check_env(make(**options), skip_render_check=True)
        env_checker.check_env(make(render_mode="rgb_array", **options))


def test_stock_ppo_learns_on_it(make):
    model = PPO("MultiInputPolicy", make(schedule="uniform"), n_steps=16, batch_size=8, seed=0)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(16)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)
    )


@every_option
def test_it_is_a_row_of_the_vector_environment(make, teacher, bank, options):
    single = make(**options)
    many = ReDiFVectorEnv(3, teacher, bank=bank, **options)
    actions = draw(single)
    observation, _ = many.reset(options={"tasks": [7, 3, 9]})
    seen, reward, info = play(single, actions, options={"tasks": [3]})
    for mine, action in zip(seen[:-1], actions, strict=False):
        for name, value in mine.items():
            np.testing.assert_allclose(value, observation[name][1].numpy(), atol=1e-5)
        observation, rewards, *_, infos = many.step(torch.from_numpy(np.stack([action] * 3)))
    assert reward == pytest.approx(float(rewards[1]), rel=1e-4)
    for name, value in seen[-1].items():
        np.testing.assert_allclose(value, infos["final_obs"][name][1].numpy(), atol=1e-5)
    assert info["nfe"] == int(infos["episode"]["nfe"][1])
    assert info["task"] == 3
    if "reward_map" in infos:
        np.testing.assert_allclose(info["reward_map"], infos["reward_map"][1].numpy(), atol=1e-4)


def test_episode_statistics_of_others_have_room(make):
    """Gymnasium's wrapper refuses an environment whose info has an `episode` already."""
    env = gym.wrappers.RecordEpisodeStatistics(make(schedule="uniform", num_steps=2))
    _, reward, info = play(env, draw(env, 2))
    assert info["episode"]["r"] == pytest.approx(reward)
    assert info["episode"]["l"] == info["nfe"] == 2


def test_observations_are_numpy_and_in_their_space(make):
    env = make()
    seen, reward, info = play(env, draw(env))
    assert all(observation in env.observation_space for observation in seen)
    assert seen[0]["latents"].dtype == np.float32
    assert isinstance(seen[0]["condition"], np.int64)
    assert isinstance(reward, float)
    assert info["nfe"] == 4
    assert info["reward_map"].shape == (1, 8, 8)
    assert info["reward_map"].mean() == pytest.approx(reward, rel=1e-5)


def test_observations_are_own_copies(make):
    env, other = make(), make()
    actions = draw(env)
    kept = play(env, actions, seed=1)[0]
    copies = [{name: np.copy(value) for name, value in one.items()} for one in kept]
    for observation in play(env, actions, seed=2)[0]:
        observation["latents"][...] = 0
    for one, two in zip(kept, copies, strict=True):
        assert_equal(one, two)
    assert_equal(play(env, actions, seed=3)[0][2], play(other, actions, seed=3)[0][2])


def test_the_callers_array_may_be_used_again(make):
    env = make(render_mode="rgb_array", schedule="uniform")
    env.reset(seed=0)
    action = draw(env)[0]
    env.step(action)
    before = env.render()
    action[:] = 0
    assert np.array_equal(env.render(), before)


def test_seeds(make):
    env, other = make(), make(seed=5)
    first = env.reset(seed=1)[0]
    assert_equal(first, other.reset(seed=1)[0])
    later = [env.reset()[0]["latents"] for _ in range(4)]
    again = [other.reset()[0]["latents"] for _ in range(4)]
    assert all(np.array_equal(one, two) for one, two in zip(later, again, strict=True))
    assert len({one.tobytes() for one in later}) > 1
    assert not np.array_equal(env.reset(seed=2)[0]["latents"], first["latents"])


def test_reset_is_needed(make):
    env = make(render_mode="rgb_array")
    action = draw(env)[0]
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    with pytest.raises(gym.error.ResetNeeded):
        env.render()
    play(env, draw(env))
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    env.reset()
    env.step(action)


@pytest.mark.parametrize("schedule", ["free", "uniform"])
def test_rendering(make, schedule):
    """Latent, prediction and answer side by side, of the episode that was acted in."""
    env = make(render_mode="rgb_array", schedule=schedule)
    actions = draw(env)
    env.reset(options={"tasks": [0]})
    answer = panel(env.render(), 2)
    for action in actions:
        *_, terminated, _, _ = env.step(action)
        picture = env.render()
        assert picture.shape == (96, 3 * 96 + 2 * 4, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(panel(picture, 2), answer)
        assert np.array_equal(panel(picture, 0), grey(action[:DIM]))
    assert terminated
    assert np.array_equal(panel(picture, 1), panel(picture, 0))  # the data predicts itself


def panel(picture, index):
    return picture[:, index * 100 : index * 100 + 96]


def grey(values):
    """Values in [-1, 1] as an enlarged grey image."""
    pixels = np.round((values.reshape(8, 8) + 1) * 127.5).astype(np.uint8)
    return np.kron(pixels, np.ones((12, 12), np.uint8))[..., None].repeat(3, axis=2)


def test_the_prediction_is_the_teachers(make, teacher, bank):
    """At the noisiest time, and near the data."""
    env = make(render_mode="rgb_array", schedule=[999, 100])
    env.reset(options={"tasks": [4]})
    x_t = bank.x_T[4:5]
    for t in (999.0, 100.0):
        with torch.no_grad():
            x0_pred = teacher.denoiser(x_t, torch.tensor([t]), bank.condition[4:5])
        wanted = grey(x0_pred.clamp(-1, 1).numpy())
        # One level of 255: the batch's sums may round the other way.
        np.testing.assert_allclose(panel(env.render(), 1).astype(int), wanted, atol=1)
        x_t = bank.teacher_x_0[4:5] + 0.1 * x_t
        env.step(x_t.flatten().numpy())


def test_no_render_mode_renders_nothing(make):
    env = make()
    env.reset()
    with pytest.warns(UserWarning, match="render_mode"):
        assert env.render() is None


@pytest.mark.parametrize("shape", [(DIM,), (DIM + 2,), (1, DIM + 1), ()])
def test_shapes_are_checked_as_the_caller_sees_them(make, shape):
    env = make()
    env.reset()
    with pytest.raises(InvalidActionError, match=r"action.*\(65,\)"):
        env.step(np.zeros(shape, np.float32))


def test_lists_and_doubles_are_fine(make):
    env, other = make(), make()
    for each in (env, other):
        each.reset(seed=0)
    action = draw(env)[0]
    assert_equal(env.step(action)[0], other.step(action.astype(np.float64).tolist())[0])


def test_closing_twice_is_fine(make):
    env = make()
    env.close()
    env.close()


def test_arguments_go_through(teacher):
    env = gym.make("redif_env:ReDiF-v0", teacher=teacher, num_steps=2, schedule="karras")
    assert env.unwrapped.vector_env.max_steps == 2
    assert env.spec.id == "ReDiF-v0"
    assert redif_env.__version__
