"""ReDiFPPO: equal to stock PPO where it should be, and what its rollouts and updates hold."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from small_world import GRID, ITERATION, PLAIN_EXPLORATION, STOCK, OnRolloutEnd, deployed, weights
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import DummyVecEnv

from agents import ReDiFPPO, TorchVecEnv
from agents.buffers import TorchRolloutBuffer


def stock_settings(**changes):
    settings = {
        "learning_rate": 3e-3,  # large enough for ratios to reach the clip range
        "n_steps": 32,
        "batch_size": 16,
        "n_epochs": 3,
        "gamma": 0.99,
        "gae_lambda": 0.9,
        "clip_range": 0.2,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
        "seed": 3,
        "device": "cpu",
    }
    return {**settings, **changes}


def after_three_iterations(kind, env_id: str, **changes):
    env = DummyVecEnv([lambda: gym.make(env_id)] * 2)
    model = kind("MlpPolicy", env, **stock_settings(**changes))
    return model.learn(3 * 2 * 32)


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"clip_range_vf": 0.05},
        {"target_kl": 0.002, "n_epochs": 10},
        {"normalize_advantage": False, "learning_rate": LinearSchedule(1e-3, 0.0, 1.0)},
    ],
)
def test_on_a_plain_environment_it_is_stock_ppo(env_id, variant):
    stock = after_three_iterations(PPO, env_id, **variant)
    ours = after_three_iterations(ReDiFPPO, env_id, **STOCK, **variant)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=0, atol=1e-6)
    assert ours._n_updates == stock._n_updates
    if "target_kl" in variant:
        assert stock._n_updates < 3 * 10  # the early stop was reached
    # negative control: another clip range is another result
    other = after_three_iterations(ReDiFPPO, env_id, **STOCK, **variant, clip_range=0.02)
    assert (weights(other) - weights(stock)).abs().max() > 1e-5


@pytest.mark.parametrize("schedule", ["free", GRID])
def test_on_tensors_it_is_stock_ppo_too(make_env, schedule):
    """One minibatch a rollout, so that only the order of float32 sums differs."""

    def learned(kind, **changes):
        env = TorchVecEnv(make_env(schedule=schedule, num_steps=3))
        settings = stock_settings(n_steps=6, batch_size=48, policy_kwargs={"net_arch": [16]})
        return kind("MultiInputPolicy", env, **{**settings, **changes}).learn(3 * 48)

    stock, ours = learned(PPO), learned(ReDiFPPO, **STOCK)
    assert isinstance(ours.rollout_buffer, TorchRolloutBuffer)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=0, atol=1e-5)
    assert stock.ep_info_buffer[-1]["r"] < 0
    other = learned(ReDiFPPO, **STOCK, gae_lambda=0.0)  # negative control
    assert (weights(other) - weights(stock)).abs().max() > 1e-4


def rolled_out(make_env, make_model, **changes):
    env_changes = {name: changes.pop(name) for name in ("group_size", "reward") if name in changes}
    model = make_model(make_env(**env_changes), **changes)
    return model.learn(model.n_steps * 8), model.rollout_buffer


def test_the_next_latent_is_the_action(make_env, make_model):
    _, buffer = rolled_out(make_env, make_model, **PLAIN_EXPLORATION)
    assert torch.equal(buffer["observation/latents"][1:].flatten(2), buffer["actions"][:-1])
    assert torch.equal(
        buffer["episode_starts"], torch.tensor([[True], [False], [False]]).expand(3, 8)
    )


def test_a_group_shares_its_task_but_not_its_noise(make_env, make_model):
    _, buffer = rolled_out(make_env, make_model, **PLAIN_EXPLORATION)
    start, actions = buffer["observation/latents"][0], buffer["actions"][0]
    for rows in (slice(0, 4), slice(4, 8)):
        assert torch.equal(start[rows], start[rows][:1].expand(4, -1, -1, -1))
        assert (actions[rows].std(0) > 0).all()
    assert not torch.equal(start[0], start[4])


@pytest.mark.parametrize("credit", ["global", "local"])
def test_advantages_of_a_real_rollout_by_hand(make_env, make_model, credit):
    """From the environment's own last observations, for two episodes a rollout."""
    env = make_env()
    model = make_model(env, credit=credit, n_steps=6, **PLAIN_EXPLORATION)
    recorder = Recorder(env)
    model.learn(48, callback=recorder)
    outcome = torch.stack(
        [-(state.x_t - state.teacher_x_0).square().flatten(1) for state in recorder.ends]
    )
    if credit == "global":
        outcome = outcome.mean(2)
    groups = outcome.reshape(2, 2, 4, *outcome.shape[2:])
    centred = (groups - groups.mean(2, keepdim=True)).reshape(outcome.shape)
    expected = centred / centred.std()
    # float32; the std is at least 1e-4 below the values
    torch.testing.assert_close(model.rollout_buffer["advantages"], expected, rtol=1e-3, atol=1e-3)


class Recorder(BaseCallback):
    """Keeps the states in which episodes ended."""

    def __init__(self, env) -> None:
        super().__init__()
        self.env = env
        self.ends = []

    def _on_step(self) -> bool:
        last = self.env.last_state
        if last is not None and (not self.ends or last is not self.ends[-1]):
            self.ends.append(last)
        return True


def test_one_stochastic_step_explores_in_one_step_only(make_env, make_model):
    model, buffer = rolled_out(
        make_env,
        make_model,
        stochastic_steps="one",
        antithetic=False,
        n_steps=6,
        eta=0.3,
        learning_rate=0.0,  # so that the rollout's policy can be asked
    )
    moved = (buffer["actions"] - deployed(model)).abs().amax(2) > 1e-5  # (6, 8)
    episodes = moved.reshape(2, 3, 8)
    assert torch.equal(episodes.sum(1), torch.ones(2, 8, dtype=torch.int64))
    step = episodes.int().argmax(1)
    assert torch.equal(step, step[:, ::4].repeat_interleave(4, 1))  # the same one in a group
    trained = torch.cat([batch.actions for batch in buffer.get(5)])
    assert torch.equal(trained.sort(0).values, buffer["actions"][moved].sort(0).values)
    assert model.rows_trained == 16 // 4  # the four of a group start in one state


def test_antithetic_neighbours_explore_with_opposite_noise(make_env, make_model):
    _, buffer = rolled_out(make_env, make_model, stochastic_steps="all", antithetic=True)
    noise = buffer["actions"] - buffer["mean"].flatten(2)
    # a difference of float32 numbers near 1
    torch.testing.assert_close(noise[:, ::2], -noise[:, 1::2], rtol=0, atol=1e-6)
    assert (noise[:, 0] - noise[:, 2]).abs().max() > 0.01  # negative control: pairs differ


def test_actions_outside_the_box_are_clipped_for_the_environment_only(make_env, make_model):
    env = make_env(action_bound=0.5)
    model = make_model(env, **PLAIN_EXPLORATION)
    model.learn(ITERATION)
    actions, latents = (model.rollout_buffer[n] for n in ("actions", "observation/latents"))
    assert actions.abs().max() > 0.5
    assert torch.equal(latents[1:].flatten(2), actions[:-1].clamp(-0.5, 0.5))


def test_the_logged_figures_are_finite_and_the_ratio_starts_at_one(make_model):
    model = make_model(n_epochs=2)
    model.learn(2 * ITERATION)
    logged = model.logger.name_to_value
    wanted = {
        "train/kl",
        "train/clip_fraction",
        "train/loss",
        "train/grad_norm",
        "train/ratio_error",
    }
    assert wanted <= set(logged)
    assert all(np.isfinite(value) for value in logged.values() if isinstance(value, float))
    # float32 of other batch sizes: about 1e-6 in the mean, over a std of at least 0.02
    assert logged["train/ratio_error"] < 1e-3
    assert logged["train/kl"] > 0


@pytest.mark.parametrize("ratio", ["element", "mean", "sum"])
def test_every_ratio_trains_with_global_credit(make_model, ratio):
    model = make_model(ratio=ratio, credit="global", n_epochs=2)
    before = weights(model)
    model.learn(2 * ITERATION)
    assert weights(model).isfinite().all()
    assert not torch.equal(weights(model), before)


def test_ratios_are_different_algorithms(make_model):
    """Negative control: with several epochs the clipping differs."""
    settings = {"credit": "global", "n_epochs": 4, "learning_rate": 1e-3, **PLAIN_EXPLORATION}
    element, summed = (
        weights(make_model(ratio=r, **settings).learn(ITERATION)) for r in ("element", "sum")
    )
    assert (element - summed).abs().max() > 1e-4


def test_a_critic_learns_the_return(make_model):
    options = {"advantage": "gae", "credit": "global", **PLAIN_EXPLORATION}
    model = make_model(learning_rate=3e-4, n_epochs=2, **options)
    model.learn(ITERATION)
    first = model.logger.name_to_value["train/value_loss"]
    critic_before = [p.clone() for p in model.policy.value_critic.parameters()]
    model.learn(5 * ITERATION, reset_num_timesteps=False)
    # from 0.05 to 0.001 - 0.005, the variance of the returns themselves
    assert model.logger.name_to_value["train/value_loss"] < first / 4
    changed = zip(critic_before, model.policy.value_critic.parameters(), strict=True)
    assert all(not torch.equal(before, after) for before, after in changed)
    # returns were computed from the critic's values
    buffer = model.rollout_buffer
    torch.testing.assert_close(buffer["returns"], buffer["advantages"] + buffer["values"])
    assert buffer["values"].abs().max() > 0


def test_the_critic_has_its_own_learning_rate_and_gradient_clip(make_model):
    model = make_model(
        advantage="gae", credit="global", learning_rate=LinearSchedule(1e-3, 0.0, 1.0)
    )
    model.learn(2 * ITERATION)
    actor, critic = model.policy.optimizer.param_groups
    assert critic["lr"] == pytest.approx(10 * actor["lr"])
    for group in (actor, critic):
        for weight in group["params"]:
            weight.grad = torch.full_like(weight, 100.0)
    model._clip_gradients()
    for group in (actor, critic):
        norm = torch.stack([weight.grad.norm() for weight in group["params"]]).norm()
        assert norm.item() == pytest.approx(model.max_grad_norm, rel=1e-3)


def test_exploration_can_follow_the_progress(make_model):
    model = make_model(eta=lambda left: 0.4 * left, min_std=lambda left: 0.01 + 0.1 * left)
    seen = []
    callback = OnRolloutEnd(lambda m: seen.append((m.policy.eta, m.policy.min_std)))
    model.learn(4 * ITERATION, callback=callback)
    expected = [(0.4 * left, 0.01 + 0.1 * left) for left in (1, 0.75, 0.5, 0.25)]
    np.testing.assert_allclose(seen, expected)
    stds = model.rollout_buffer["std"]
    assert stds.min().item() == pytest.approx(0.035, rel=1e-4)


def test_the_target_kl_stops_an_iteration(make_model):
    settings = {"n_epochs": 5, "learning_rate": 1e-3, **PLAIN_EXPLORATION}
    free, stopped = make_model(**settings), make_model(target_kl=1e-5, **settings)
    free.learn(ITERATION)
    stopped.learn(ITERATION)
    assert free.rows_trained == 5 * ITERATION
    assert 0 < stopped.rows_trained < free.rows_trained
    for model in (free, stopped):  # the minibatch that stops it counts: what is left is the rollout
        assert model.policy.denoiser.network_evaluations - model.rows_trained == ITERATION


def test_the_average_follows_each_update(make_model):
    model = make_model(ema_decay=0.5)
    start = [p.clone() for p in model.student().network.parameters()]
    model.learn(ITERATION)
    trained = model.policy.denoiser.network.parameters()
    for before, after, averaged in zip(
        start, trained, model.student().network.parameters(), strict=True
    ):
        # one update, and the warm-up's decay after it is (1 + 1) / (10 + 1)
        torch.testing.assert_close(averaged, (2 * before + 9 * after) / 11, rtol=0, atol=1e-6)


def test_the_same_seed_gives_bit_identical_parameters(make_model, make_env):
    def run(seed):
        return weights(make_model(make_env(seed=seed), seed=seed).learn(3 * ITERATION))

    first, second, other = run(0), run(0), run(1)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
