"""make_sb3_env: unmodified algorithms of Stable-Baselines3 and sb3-contrib on batched variants."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import ARS, QRDQN, TQC, CrossQ, MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from small_world import STOCK
from stable_baselines3 import DQN, PPO, SAC
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnv, VecMonitor

import redif_env
from agents import ReDiFPPO, TorchVecEnv, make_sb3_env
from redif_env import schedules
from redif_env.errors import InvalidArgumentError

NUM_ENVS = 4
FLAT_SIZE = 76
GRID = [850, 533, 289, 120]


@pytest.fixture
def make(teacher, bank):
    """Makes small environments of any variant."""

    def build(variant, observation="dict", num_envs=NUM_ENVS, **options):
        settings = {"teacher": teacher, "bank": bank, "seed": 0, **options}
        return make_sb3_env(num_envs, variant, observation, **settings)

    return build


class Episodes(BaseCallback):
    """Keeps the statistics of every episode."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[dict] = []

    def _on_step(self) -> bool:
        self.seen += [info["episode"] for info in self.locals["infos"] if "episode" in info]
        return True


def learn(model, steps):
    """Train; the parameters must move and stay finite. Returns the episodes' statistics."""
    before = [p.clone() for p in model.policy.parameters()]
    episodes = Episodes()
    model.learn(steps, callback=episodes)
    after = list(model.policy.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(bool(p.isfinite().all()) for p in after)
    assert episodes.seen
    return episodes.seen


ACTIONS = {
    "residual": gym.spaces.Box(-1, 1, (64,)),
    "joint": gym.spaces.Box(np.float32([-10] * 64 + [-1]), np.float32([10] * 64 + [1])),
    "schedule": gym.spaces.Discrete(16),
}


@pytest.mark.parametrize("observation", ["dict", "flat"])
@pytest.mark.parametrize("variant", ACTIONS)
def test_variants(make, variant, observation):
    env = make(variant, observation)
    assert isinstance(env, VecEnv)
    assert env.action_space == ACTIONS[variant]
    seen = env.reset()
    assert env.observation_space.contains(
        seen[0] if observation == "flat" else {name: value[0] for name, value in seen.items()}
    )
    if observation == "flat":
        assert (seen.shape, seen.dtype) == ((NUM_ENVS, FLAT_SIZE), np.float32)
    for _ in range(8):
        actions = np.stack([env.action_space.sample() for _ in range(NUM_ENVS)])
        seen, rewards, dones, infos = env.step(actions)
        assert (rewards.shape, dones.dtype) == ((NUM_ENVS,), bool)
        for row in np.flatnonzero(dones):
            assert env.observation_space.contains(infos[row]["terminal_observation"])
            assert infos[row]["episode"]["nfe"] == infos[row]["episode"]["l"]
            assert infos[row]["episode"]["r"] == pytest.approx(rewards[row])


def test_rows_share_one_environment_and_one_teacher(make, teacher):
    env = make("residual")
    assert all(one is teacher for one in env.get_attr("teacher"))
    assert isinstance(env, TorchVecEnv)
    assert isinstance(env.env, redif_env.ReDiFVectorEnv)


def test_the_residual_variant_starts_as_the_few_step_baseline(make, teacher, bank):
    env = make("residual", "flat", schedule=GRID)
    env.set_options({"tasks": np.arange(NUM_ENVS)})
    env.reset()
    for _ in GRID:
        *_, infos = env.step(np.zeros((NUM_ENVS, 64), np.float32))
    grid = torch.tensor([*GRID, 0.0])
    wanted = schedules.sample(
        teacher.denoiser, bank.x_T[:NUM_ENVS], bank.condition[:NUM_ENVS], grid
    )
    for row, info in enumerate(infos):  # ten classes first, then the latents
        np.testing.assert_array_equal(
            info["terminal_observation"][10:74], wanted[row].flatten().numpy()
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("hybrid", "dict"), "variant='hybrid'"),
        (("joint", "image"), "observation='image'"),
        (("schedule", "dict", 0), "num_envs=0"),
    ],
)
def test_bad_arguments(make, arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        make(*arguments)


@pytest.mark.parametrize(
    ("variant", "name"), [("residual", "residual"), ("joint", "schedule"), ("schedule", "residual")]
)
def test_what_the_variant_decides_cannot_be_passed(make, variant, name):
    with pytest.raises(TypeError, match=name):
        make(variant, **{name: "uniform"})


# Masks


@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_masks_reach_sb3_contrib(make, observation):
    env = make("schedule", observation, min_steps=2)
    env.reset()
    env.step(np.array([3, 0, 7, 14]))
    masks = get_action_masks(env)
    assert is_masking_supported(env)
    assert (type(masks), masks.dtype) == (np.ndarray, np.bool_)
    assert masks.sum(1).tolist() == [12, 15, 8, 1]
    np.testing.assert_array_equal(masks, env.env.unwrapped.action_masks().numpy())
    picked = env.env_method("action_masks", indices=[2, 1])
    np.testing.assert_array_equal(picked, masks[[2, 1]])
    np.testing.assert_array_equal(get_action_masks(VecMonitor(env)), masks)


def test_other_variants_have_no_masks(make):
    assert not is_masking_supported(make("joint"))


ONLINE = {"n_steps": 8, "batch_size": 16}
REPLAY = {"learning_starts": 8, "batch_size": 8, "buffer_size": 200}


def agent(kind, policy, env):
    options = ONLINE if issubclass(kind, OnPolicyAlgorithm) else REPLAY
    # a dict of its own: Stable-Baselines3 writes into it
    return kind(policy, env, seed=0, policy_kwargs={"net_arch": [8]}, **options)


@pytest.mark.parametrize(("observation", "policy"), [("dict", "MultiInput"), ("flat", "Mlp")])
def test_maskable_ppo_makes_no_invalid_choice(make, observation, policy):
    env = make("schedule", observation, min_steps=2, max_steps=5, step_cost=0.001)
    model = agent(MaskablePPO, f"{policy}Policy", env)
    episodes = learn(model, 192)
    assert {episode["invalid_actions"] for episode in episodes} == {0}
    assert {episode["l"] for episode in episodes} <= {2, 3, 4, 5}
    assert all(episode["nfe"] == episode["l"] for episode in episodes)
    mean, _ = evaluate_policy(model, env, n_eval_episodes=4, warn=False)
    assert mean < 0


def test_maskable_ppo_learns_on_the_single_environment(teacher, bank):
    env = gym.make("ReDiFSchedule-v0", teacher=teacher, bank=bank, min_steps=2)
    model = agent(MaskablePPO, "MultiInputPolicy", env)
    episodes = learn(model, 64)
    assert len(model.ep_info_buffer) == len(episodes)
    assert all(-5 < episode["r"] < 0 for episode in episodes)


@pytest.mark.parametrize("kind", [DQN, QRDQN, PPO])
def test_algorithms_without_masks_take_the_nearest_choice(make, kind):
    """Negative control of the masks: these do make invalid choices, and go on."""
    env = make("schedule", min_steps=2)
    episodes = learn(agent(kind, "MultiInputPolicy", env), 200)
    assert sum(episode["invalid_actions"] for episode in episodes) > 0
    assert {episode["l"] for episode in episodes} <= {2, 3, 4}


# Continuous actions


@pytest.mark.parametrize(
    ("kind", "policy", "observation"),
    [
        (SAC, "MultiInputPolicy", "dict"),
        (TQC, "MultiInputPolicy", "dict"),
        (CrossQ, "MlpPolicy", "flat"),
    ],
)
def test_off_policy_algorithms_correct_the_student(make, kind, policy, observation):
    env = make("residual", observation, num_steps=2)
    episodes = learn(agent(kind, policy, env), 60)
    assert {episode["l"] for episode in episodes} == {2}


def test_ars_searches_corrections(make):
    env = make("residual", "flat", num_steps=2)
    model = ARS("LinearPolicy", env, n_delta=4, n_eval_episodes=1, seed=0)
    before = [p.clone() for p in model.policy.parameters()]
    model.learn(64)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True)
    )


def test_crossq_learns_on_the_flattened_single_environment(teacher, bank):
    options = {"teacher": teacher, "bank": bank, "residual": True, "schedule": "uniform"}
    env = gym.wrappers.FlattenObservation(gym.make("ReDiF-v0", **options))
    learn(agent(CrossQ, "MlpPolicy", env), 24)


def test_ppo_acts_in_both_parts(make):
    episodes = learn(agent(PPO, "MultiInputPolicy", make("joint")), 64)
    assert {episode["l"] for episode in episodes} <= {1, 2, 3, 4}


@pytest.mark.parametrize("variant", ACTIONS)
@pytest.mark.parametrize(("observation", "policy"), [("dict", "MultiInput"), ("flat", "Mlp")])
def test_our_ppo_takes_every_variant_as_stock_ppo_does(make, variant, observation, policy):
    """On tensors, with the same seed: the same network, actions and first update."""
    options = {"n_steps": 4, "batch_size": 16, "n_epochs": 1, "seed": 0, "gamma": 1.0}
    # not Adam, whose first steps blow up float32's rounding where a gradient is nearly zero
    options["policy_kwargs"] = {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {}}

    def trained(kind, **more):
        model = kind(f"{policy}Policy", make(variant, observation), **options, **more)
        model.learn(16)
        return torch.cat([p.detach().flatten() for p in model.policy.parameters()])

    stock = trained(PPO, learning_rate=0.1)
    torch.testing.assert_close(
        trained(ReDiFPPO, learning_rate=0.1, **STOCK), stock, rtol=0, atol=1e-5
    )
    # negative control: the update is far larger than the tolerance
    assert float((stock - trained(PPO, learning_rate=0.0)).abs().max()) > 1e-3


def test_a_frozen_student_cannot_be_trained(make):
    with pytest.raises(InvalidArgumentError, match="frozen") as caught:
        ReDiFPPO("StudentPolicy", make("schedule"))
    assert caught.value.argument == "env"
