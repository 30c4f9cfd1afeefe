"""Rollouts and updates never leave the device: every tensor in them refuses to become numpy."""

from __future__ import annotations

import pytest
import torch
from small_world import ITERATION, STOCK, OnRolloutEnd
from stable_baselines3 import PPO
from tripwire import Tripwire, TripwireError, arm

from agents import ReDiFPPO, TorchVecEnv
from redif_env.teacher import TeacherBank


@pytest.fixture
def arm_env(bank):
    """Makes tripwires of an environment's tasks, and of everything that it returns."""

    def arm_all(env) -> None:
        env._bank = TeacherBank(arm(bank.x_T), arm(bank.teacher_x_0), arm(bank.condition))
        step, reset = env.step, env.reset
        env.step = lambda actions: arm(step(actions))
        env.reset = lambda **options: arm(reset(**options))

    return arm_all


@pytest.fixture
def armed(arm_env):
    """Arms a started agent's environment, so that its next rollout holds tripwires only."""

    def arm_agent(model) -> ReDiFPPO:
        model.learn(ITERATION)
        arm_env(model.env.env)
        model._last_obs = model.env.reset_tensor()
        model._last_episode_starts = arm(torch.ones(8, dtype=torch.bool))
        model.rollout_buffer._store.clear()
        return model

    return arm_agent


def assert_holds_tripwires(buffer) -> None:
    """All that is stored, but for what is computed from shapes alone."""
    names = set(buffer._store) - {"explored_step"}
    first = "observation/latents" if buffer.action_bound is None else "start"
    assert {first, "actions", "rewards", "advantages", "returns"} <= names
    for name in names:
        assert isinstance(buffer[name], Tripwire), name


STUDENT_OPTIONS = [
    {"stochastic_steps": "all", "antithetic": False},
    {"stochastic_steps": "one", "antithetic": True},
    {"credit": "global", "ratio": "sum"},
    {"advantage": "gae", "credit": "global"},
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("options", STUDENT_OPTIONS, ids=["all", "one", "sum", "gae"])
def test_a_rollout_and_an_update_stay_on_the_device(armed, make_env, make_model, options, order):
    model = armed(make_model(make_env(solver_order=order), **options))
    before = [p.clone() for p in model.policy.denoiser.network.parameters()]
    model.learn(2 * ITERATION, reset_num_timesteps=False)
    assert_holds_tripwires(model.rollout_buffer)
    after = model.policy.denoiser.network.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_other_policies_stay_on_the_device_too(armed, make_env):
    options = {**STOCK, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    model = armed(ReDiFPPO("MultiInputPolicy", make_env(), **options))
    model.learn(2 * ITERATION, reset_num_timesteps=False)
    assert_holds_tripwires(model.rollout_buffer)


def test_the_first_reset_stays_on_the_device(arm_env, make_env, make_model):
    """Stable-Baselines3's `learn` starts with `env.reset()`, which gives numpy."""
    env = make_env()
    model = make_model(env)  # it reads the grid once, as a list
    arm_env(env)
    model.learn(ITERATION)
    assert isinstance(model.rollout_buffer["observation/latents"], Tripwire)


def test_stock_ppo_trips(arm_env, make_env):
    """Negative control."""
    env = make_env()
    arm_env(env)
    options = {"n_steps": 3, "batch_size": 24, "policy_kwargs": {"net_arch": [8]}}
    model = PPO("MultiInputPolicy", TorchVecEnv(env), **options)
    with pytest.raises(TripwireError):
        model.learn(ITERATION)


def test_the_host_waits_once_a_minibatch(armed, make_model):
    """Whether the loss is finite must be known before the step; figures are read at the end."""

    def reads(batch_size: int) -> int:
        model = armed(make_model(batch_size=batch_size, stochastic_steps="all", n_epochs=2))
        before = []
        callback = OnRolloutEnd(lambda _: before.append(Tripwire.reads))
        model.learn(ITERATION, callback=callback, reset_num_timesteps=False)
        return Tripwire.reads - before[0]

    # 24 transitions, two epochs: 12 minibatches against 2
    assert reads(4) - reads(24) == 10
    assert reads(24) <= 16
