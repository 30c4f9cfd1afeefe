"""ReDiFPPO keeps the rest of Stable-Baselines3: files, environments, callbacks, curves."""

from __future__ import annotations

import json
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import VectorWrapper
from small_world import ITERATION, PLAIN_EXPLORATION, Keeps, weights
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CheckpointCallback,
    EvalCallback,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from agents import ReDiFPPO, TorchVecEnv
from agents.advantages import batch_relative
from redif_env import TeacherBank, rewards, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import MSE


def contains_module(value) -> bool:
    if isinstance(value, dict):
        return any(map(contains_module, value.values()))
    if isinstance(value, list | tuple):
        return any(map(contains_module, value))
    return isinstance(value, nn.Module | torch.Tensor)


def observations(env) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in env.reset(seed=11)[0].items()}


def test_save_and_load_give_the_same_agent(make_env, make_model, tmp_path):
    model = make_model(ema_decay=0.9, target_kl=0.5).learn(2 * ITERATION)
    model.save(tmp_path / "agent")
    env = make_env(seed=1)
    loaded = ReDiFPPO.load(tmp_path / "agent", env=env)
    assert torch.equal(weights(loaded), weights(model))
    assert (loaded.ratio, loaded.advantage, loaded.credit) == ("element", "group", "local")
    assert (loaded.ema_decay, loaded.target_kl) == (0.9, 0.5)
    obs = observations(env)
    for deterministic in (True, False):
        torch.manual_seed(0)
        expected, _ = model.predict(obs, deterministic=deterministic)
        torch.manual_seed(0)
        np.testing.assert_array_equal(loaded.predict(obs, deterministic=deterministic)[0], expected)
    # the optimiser came along, and learning goes on
    state = loaded.policy.optimizer.state_dict()["state"]
    assert len(state) == len(model.policy.optimizer.state_dict()["state"]) > 0
    loaded.learn(ITERATION, reset_num_timesteps=False)
    assert loaded.num_timesteps == 3 * ITERATION
    assert not torch.equal(weights(loaded), weights(model))


@pytest.mark.parametrize(
    "options",
    [
        {"credit": "global"},
        {"local_weight": 0.5},
        {"local_radius": 1},
        {"advantage_clip": 0.5},
        {"advantage_std": "group"},
        {"stochastic_steps": "all"},
        {"advantage": "batch", "n_steps": 6},
        {"target_kl": 1e-4, "adaptive_lr": True},
    ],
)
def test_options_of_load_are_those_of_an_agent_made_with_them(
    make_env, make_model, tmp_path, options
):
    path = tmp_path / "agent"
    make_model().save(path)

    def learned(model):
        torch.manual_seed(0)
        return weights(model.learn(4 * ITERATION))

    made = make_model(antithetic=True, **{"stochastic_steps": "one", **options})
    made.set_parameters(path)
    late = ReDiFPPO.load(path, **options)
    late.set_env(make_env())
    expected = learned(made)
    assert torch.equal(learned(ReDiFPPO.load(path, env=make_env(), **options)), expected)
    assert torch.equal(learned(late), expected)
    assert not torch.equal(learned(ReDiFPPO.load(path, env=make_env())), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantage", "best"),
        ("n_steps", 4),
        ("gamma", 2.0),
        ("batch_size", 1.5),
        ("adaptive_lr", True),
        ("divergence", "kl"),
    ],
)
def test_bad_options_of_load_are_refused(make_env, make_model, tmp_path, name, value):
    make_model().save(tmp_path / "agent")
    with pytest.raises(InvalidArgumentError, match=name):
        ReDiFPPO.load(tmp_path / "agent", env=make_env(), **{name: value})


def test_a_critic_that_was_not_made_is_refused_by_load(make_env, make_model, tmp_path):
    make_model(antithetic=False).save(tmp_path / "without")
    with pytest.raises(InvalidArgumentError, match="critic"):
        ReDiFPPO.load(tmp_path / "without", env=make_env(), advantage="gae")
    make_model(advantage="gae").save(tmp_path / "map")
    with pytest.raises(InvalidArgumentError, match="critic"):
        ReDiFPPO.load(tmp_path / "map", env=make_env(), credit="global")


def test_the_buffer_takes_no_option_of_the_agent(make_model):
    with pytest.raises(InvalidArgumentError, match="pass advantage_clip to ReDiFPPO"):
        make_model(rollout_buffer_kwargs={"advantage_clip": 1.0})


def test_a_saved_agent_holds_only_plain_data_beside_its_weights(make_model, tmp_path):
    model = make_model().learn(ITERATION)
    assert not contains_module(model.policy_kwargs)
    model.save(tmp_path / "agent")
    with zipfile.ZipFile(tmp_path / "agent.zip") as archive:
        data = archive.read("data")
        stored = json.loads(data)
    assert not {"_last_obs", "_last_episode_starts", "rollout_buffer"} & set(stored)
    # 524,633 float32 parameters would be 2 MB; spaces and configs are some kB
    assert len(data) < 100_000


def test_a_loaded_agent_predicts_without_an_environment(make_env, make_model, tmp_path):
    model = make_model()
    model.save(tmp_path / "agent")
    obs = observations(make_env())
    loaded = ReDiFPPO.load(tmp_path / "agent")
    expected, _ = model.predict(obs, deterministic=True)
    np.testing.assert_array_equal(loaded.predict(obs, deterministic=True)[0], expected)


def test_a_loaded_agent_trains_with_another_number_of_rows(make_env, make_model, tmp_path):
    make_model().save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent", env=make_env(16))
    assert loaded.learn(48).num_timesteps == 48
    later = ReDiFPPO.load(tmp_path / "agent")
    later.set_env(make_env(seed=3))
    assert later.learn(ITERATION).num_timesteps == ITERATION


def test_training_can_go_on_in_another_environment(make_env, make_model):
    model = make_model().learn(ITERATION)
    model.set_env(make_env(seed=5))
    model.learn(2 * ITERATION, reset_num_timesteps=False)
    assert model.num_timesteps == 3 * ITERATION
    model.learn(ITERATION)
    assert model.num_timesteps == ITERATION


def test_another_grid_is_refused_by_set_env(make_env, make_model):
    """The policy's times are its own: on another grid it would act for the wrong ones."""
    model = make_model()
    with pytest.raises(InvalidArgumentError):
        model.set_env(make_env(schedule=(900.0, 500.0, 100.0)))


def test_another_grid_is_refused_by_load(make_env, make_model, tmp_path):
    make_model().save(tmp_path / "agent")
    with pytest.raises(InvalidArgumentError):
        ReDiFPPO.load(tmp_path / "agent", env=make_env(schedule=(900.0, 500.0, 100.0)))


@pytest.mark.parametrize("how", ["set_env", "load"])
def test_another_group_size_is_adopted_or_refused(make_env, make_model, tmp_path, how):
    """Never ignored: the mean over strangers would be the baseline."""
    model, env = make_model(), make_env(group_size=2)
    model.save(tmp_path / "agent")
    try:
        if how == "load":
            model = ReDiFPPO.load(tmp_path / "agent", env=env)
        else:
            model.set_env(env)
    except InvalidArgumentError:
        return
    assert model.rollout_buffer.group_size == 2


@pytest.mark.parametrize("credit", ["global", "local"])
def test_the_means_of_tasks_are_those_of_the_new_environment(
    make_env, make_model, teacher, tmp_path, credit
):
    """Task 3 of another bank is another task; and it may have more of them."""
    model = make_model(advantage="task", credit=credit, **PLAIN_EXPLORATION).learn(2 * ITERATION)
    others = TeacherBank.build(teacher, 48, seed=1, cache_dir=tmp_path)
    model.set_env(make_env(bank=others))
    model.learn(ITERATION)
    rewards = model.rollout_buffer["rewards"].sum(0, keepdim=True)
    if credit == "local":
        rewards = model.rollout_buffer["reward_map"].flatten(2)
    # no task is known, so the baseline is the rollout's mean
    expected = batch_relative(rewards) if credit == "global" else rewards - rewards.mean((0, 1))
    expected = expected / expected.std()
    # float32 of rewards that differ by less than their size
    torch.testing.assert_close(model.rollout_buffer["advantages"], expected, rtol=1e-3, atol=1e-3)


def test_the_drift_of_a_loaded_agent_is_that_since_it_was_loaded(make_env, make_model, tmp_path):
    """The weights that it was constructed with, before the file's, are random."""

    def drift(model) -> float:
        before = actor_weights(model)
        model.learn(ITERATION)
        expected = (actor_weights(model) - before).norm() / before.norm()
        logged = model.logger.name_to_value["train/parameter_drift"]
        # a difference of float32 weights that moved by a thousandth of their size
        assert logged == pytest.approx(float(expected), rel=1e-2)
        return logged

    model = make_model()
    fresh = drift(model)
    model.save(tmp_path / "agent")
    assert drift(ReDiFPPO.load(tmp_path / "agent", env=make_env(seed=1))) < 2 * fresh
    later = ReDiFPPO.load(tmp_path / "agent")
    later.set_env(make_env(seed=1))
    assert drift(later) < 2 * fresh


def actor_weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.policy.denoiser.network.parameters()])


def test_predict_is_ddim_along_the_grid(make_env, make_model):
    env = make_env()
    model = make_model(env, eta=0.9, min_std=0.3).learn(ITERATION)
    vec_env = model.get_env()
    obs = vec_env.reset()
    x_T, condition = env.state.x_T, env.state.condition
    for _ in range(3):
        actions, _ = model.predict(obs, deterministic=True)
        obs, _, dones, infos = vec_env.step(actions)
    assert dones.all()
    x_0 = np.stack([info["terminal_observation"]["latents"] for info in infos])
    expected = schedules.sample(model.policy.denoiser, x_T, condition, env.timesteps)
    torch.testing.assert_close(torch.as_tensor(x_0), expected.detach(), rtol=0, atol=1e-5)


def test_stable_baselines_callbacks_work(make_env, make_model, tmp_path):
    checkpoints = CheckpointCallback(3, tmp_path / "checkpoints")
    evaluation = EvalCallback(
        TorchVecEnv(make_env(seed=9)),
        eval_freq=3,
        n_eval_episodes=8,
        log_path=str(tmp_path / "evaluations"),
        best_model_save_path=str(tmp_path / "best"),
        verbose=0,
        warn=False,
    )
    make_model().learn(2 * ITERATION, callback=[checkpoints, evaluation])
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["rl_model_24_steps.zip", "rl_model_48_steps.zip"]
    assert evaluation.last_mean_reward < 0
    results = np.load(tmp_path / "evaluations" / "evaluations.npz")
    assert results["ep_lengths"].tolist() == [[3] * 8] * 2
    assert ReDiFPPO.load(tmp_path / "best" / "best_model").num_timesteps in (24, 48)


def test_a_callback_can_stop_after_a_number_of_episodes(make_model):
    model = make_model()
    model.learn(100 * ITERATION, callback=StopTrainingOnMaxEpisodes(2))
    assert model.num_timesteps == 2 * ITERATION  # two episodes in each of the eight rows


class StopAfter(BaseCallback):
    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = calls

    def _on_step(self) -> bool:
        return self.n_calls < self.calls


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_after_a_stop_inside_an_episode_training_goes_on_with_whole_episodes(make_model, calls):
    """Group advantages take a rollout for whole episodes; half a one would be misread."""
    model = make_model(**PLAIN_EXPLORATION)
    model.learn(10 * ITERATION, callback=StopAfter(calls))
    model.learn(ITERATION, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    assert torch.equal(buffer["observation/steps_left"][0], torch.ones(8, 1))
    assert buffer["episode_starts"][0].all()
    assert (buffer["rewards"][-1] < 0).all()


class Interrupt(StopAfter):
    def _on_step(self) -> bool:
        if not super()._on_step():
            raise KeyboardInterrupt
        return True


def test_after_an_exception_inside_an_episode_training_goes_on_with_whole_episodes(
    make_env, make_model
):
    """In a wrapper too, where nobody would have said so."""
    model = make_model(VectorWrapper(make_env()), **PLAIN_EXPLORATION)
    with pytest.raises(KeyboardInterrupt):
        model.learn(10 * ITERATION, callback=Interrupt(5))
    assert model.rollouts == 1
    model.learn(ITERATION, reset_num_timesteps=False)
    buffer = model.rollout_buffer
    assert buffer["episode_starts"][0].all()
    assert (buffer["rewards"][-1] < 0).all()


def test_evaluate_policy_gives_the_deterministic_reward(make_env, make_model):
    env = make_env(seed=2)
    model = make_model()
    returns, lengths = evaluate_policy(
        model, TorchVecEnv(env), n_eval_episodes=8, return_episode_rewards=True, warn=False
    )
    state = env.last_state
    x_0 = schedules.sample(model.policy.denoiser, state.x_T, state.condition, env.timesteps)
    expected, _ = rewards.evaluate(MSE(), x_0, state.teacher_x_0, state.condition)
    np.testing.assert_allclose(returns, expected.detach().numpy(), rtol=1e-4)
    assert lengths == [3] * 8


def test_curves_reach_tensorboard(make_model, tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    model.learn(3 * ITERATION, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"))
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "train/kl", "time/fps"} <= set(scalars)
    assert [event.step for event in events.Scalars("rollout/ep_rew_mean")] == [24, 48, 72]
    assert events.Scalars("rollout/ep_len_mean")[0].value == 3


def test_the_logged_reward_is_that_of_the_rollout(make_model):
    expected, kept = [], Keeps()
    model = make_model()
    model.set_logger(Logger(None, [kept]))
    for _ in range(3):
        model.learn(ITERATION, reset_num_timesteps=False)
        expected.append(model.rollout_buffer["rewards"][-1].mean().item())
        assert kept.values["rollout/ep_rew_mean"] == pytest.approx(expected[-1], rel=1e-5)
    assert max(expected) > 0.95 * min(expected)  # a mean over all of them is another number


def test_the_single_environment_is_taken_as_tensors(teacher, bank):
    env = gym.make("ReDiF-v0", teacher=teacher, bank=bank, schedule=[850.0, 300.0])
    model = ReDiFPPO("StudentPolicy", env, advantage="gae", credit="global", batch_size=2, seed=0)
    assert isinstance(model.get_env(), TorchVecEnv)
    assert model.learn(4).num_timesteps == 4


def test_none_for_what_has_a_default_keeps_what_was_saved(make_env, make_model, tmp_path):
    make_model(credit="global", antithetic=False, stochastic_steps=2).save(tmp_path / "agent")
    names = ("credit", "stochastic_steps", "antithetic", "n_steps", "rollout_buffer_kwargs")
    loaded = ReDiFPPO.load(tmp_path / "agent", make_env(), **dict.fromkeys(names))
    assert (loaded.credit, loaded.stochastic_steps, loaded.antithetic) == ("global", 2, False)


def test_options_of_the_buffer_are_options_of_load(make_env, make_model, tmp_path):
    make_model().save(tmp_path / "agent")
    with pytest.raises(InvalidArgumentError, match="by themselves"):
        ReDiFPPO.load(tmp_path / "agent", make_env(), rollout_buffer_kwargs={"credit": "global"})


def test_a_coefficient_that_load_is_given_is_used(make_env, make_model, tmp_path):
    model = make_model(divergence="kl", divergence_target=0.01).learn(ITERATION)
    model.save(tmp_path / "agent")
    kept = ReDiFPPO.load(tmp_path / "agent", make_env())
    assert kept.adaptive_coef.coefficient == kept.divergence_coef == model.divergence_coef
    given = ReDiFPPO.load(tmp_path / "agent", make_env(), divergence_coef=50.0)
    assert given.adaptive_coef.coefficient == 50
