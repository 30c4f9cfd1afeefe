"""Callbacks: held-out evaluation against the samplers and rewards it is made of."""

from __future__ import annotations

import pytest
import torch
from small_world import ITERATION, weights
from stable_baselines3.common.callbacks import BaseCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents.callbacks import HeldOutEvaluation, IterationCallback, ProgressBar
from redif_env import schedules
from redif_env.errors import InvalidArgumentError


class Counter(IterationCallback):
    """Notes at which number of transitions it was called."""

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.calls = []

    def on_iteration(self) -> None:
        self.calls.append(self.num_timesteps // ITERATION)


@pytest.mark.parametrize(
    ("every", "calls"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])]
)
def test_iterations_are_counted_from_the_start_and_the_end_is_included(make_model, every, calls):
    counter = Counter(every)
    make_model().learn(5 * ITERATION, callback=counter)
    assert counter.calls == calls


def test_an_iteration_between_two_calls_of_learn_is_called_once(make_model):
    model, counter = make_model(), Counter(2)
    model.learn(2 * ITERATION, callback=counter)
    model.learn(2 * ITERATION, callback=counter, reset_num_timesteps=False)
    assert counter.calls == [0, 2, 4]


def test_a_rollout_that_is_stopped_is_no_iteration(make_model):
    class Stop(BaseCallback):
        def _on_step(self) -> bool:
            return self.n_calls < 2 * 3 + 2  # in the middle of the third

    model, counter = make_model(), Counter(2)
    model.learn(5 * ITERATION, callback=[counter, Stop()])
    assert counter.iteration == model.rollouts == 2
    assert counter.calls == [0, 2]


@pytest.mark.parametrize("every", [0, -1, 1.5, "often"])
def test_every_must_be_a_positive_integer(every):
    with pytest.raises(InvalidArgumentError, match="every"):
        Counter(every)


def test_the_contract_has_to_be_filled():
    with pytest.raises(TypeError, match="on_iteration"):
        IterationCallback()


def test_held_out_evaluation_is_the_averaged_students_ddim(make_env, make_model, held_out):
    env = make_env(reward="mse + 0.5*cosine")
    model = make_model(env, ema_decay=0.5, credit="global")
    callback = HeldOutEvaluation(held_out, every=2, num_images=0)
    before = schedules.paired_mse(model.student(), held_out, env.timesteps)
    model.learn(4 * ITERATION, callback=callback)
    assert [record["iteration"] for record in callback.history] == [0, 2, 4]
    first, last = callback.history[0], callback.history[-1]
    assert first["paired_mse"] == pytest.approx(before, rel=1e-4)
    # the averaged student, not the one that is trained
    averaged = schedules.paired_mse(model.student(), held_out, env.timesteps)
    trained = schedules.paired_mse(model.policy.denoiser, held_out, env.timesteps)
    assert last["paired_mse"] == pytest.approx(averaged, rel=1e-4)
    assert abs(trained - averaged) > 1e-3 * averaged
    with torch.no_grad():
        x_0 = schedules.sample(model.student(), held_out.x_T, held_out.condition, env.timesteps)
    cosine = torch.nn.functional.cosine_similarity(x_0.flatten(1), held_out.teacher_x_0.flatten(1))
    expected = -averaged + 0.5 * cosine.mean().item()
    assert last["reward"] == pytest.approx(expected, rel=1e-4)


class Draws(IterationCallback):
    """Draws a number, as an evaluation would that did not put the generator back."""

    def on_iteration(self) -> None:
        torch.randn(1)


def test_held_out_evaluation_does_not_disturb_training(make_model, held_out):
    """However often: neither the noise of training nor what it has cost."""

    def trained(callback=None):
        model = make_model().learn(3 * ITERATION, callback=callback)
        return weights(model), model.policy.denoiser.network_evaluations

    plain, evaluations = trained()
    for every in (1, 2):
        watched = trained(HeldOutEvaluation(held_out, every=every))
        assert torch.equal(watched[0], plain)
        assert watched[1] == evaluations
    # negative control: one number more, and all that follows is other noise
    assert not torch.equal(trained(Draws())[0], plain)


class ByTheEnvironment(IterationCallback):
    """The mean reward of the trained student's exploration in an environment of held-out tasks.

    Called after `HeldOutEvaluation`, which leaves the generator as it was: the noise is the same.
    """

    def __init__(self, env) -> None:
        super().__init__()
        self.env = env
        self.rewards = []

    @torch.no_grad()
    def on_iteration(self) -> None:
        policy = self.model.policy
        bound = self.env.action_bound
        with torch.random.fork_rng():
            obs, _ = self.env.reset(options={"tasks": list(range(self.env.num_envs))})
            for _ in range(self.env.max_steps):
                obs, reward, *_ = self.env.step(policy.explore(obs).actions.clamp(-bound, bound))
        self.rewards.append(reward.mean().item())


@pytest.mark.parametrize("bound", [0.5, 10.0])
def test_the_reward_while_exploring_is_that_of_the_environment(
    make_env, make_model, held_out, bound
):
    """With the settings of the moment, and with the actions that its Box admits."""
    options = {"reward": "mse + 0.5*cosine", "action_bound": bound}
    model = make_model(
        make_env(**options),
        credit="global",
        learning_rate=1e-3,
        eta=lambda left: 0.5 * left,
        gap_fraction=0.5,
        ema_decay=0.9,
    )
    watch = HeldOutEvaluation(held_out, every=1)
    oracle = ByTheEnvironment(make_env(64, bank=held_out, group_size=1, **options))
    model.learn(3 * ITERATION, callback=[watch, oracle])
    exploring = [record["reward_exploring"] for record in watch.history]
    assert exploring == pytest.approx(oracle.rewards, rel=1e-4)
    assert len(exploring) == 4


def test_exploration_costs_reward_and_without_noise_it_does_not(make_model, held_out):
    def rewards(**options) -> dict[str, float]:
        callback = HeldOutEvaluation(held_out, every=1)
        make_model(ema_decay=0.0, **options).learn(ITERATION, callback=callback)
        return callback.history[-1]

    wide = rewards(eta=0.5, min_std=0.2)
    assert wide["reward_exploring"] < 1.5 * wide["reward"] < 0
    # a decay of 0: the averaged student is the trained one
    narrow = rewards(eta=0.0, min_std=1e-3)
    assert narrow["reward_exploring"] == pytest.approx(narrow["reward"], rel=1e-2)


def test_figures_and_pictures_reach_tensorboard(make_model, held_out, tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    callback = HeldOutEvaluation(held_out, every=1, num_images=3)
    model.learn(2 * ITERATION, callback=callback, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"), size_guidance={"images": 0})
    events.Reload()
    curve = [event.value for event in events.Scalars("eval/paired_mse")]
    assert curve == pytest.approx([record["paired_mse"] for record in callback.history])
    for name in ("reward", "reward_exploring"):
        curve = [event.value for event in events.Scalars(f"eval/{name}")]
        assert curve == pytest.approx([record[name] for record in callback.history])
    picture = events.Images("eval/samples")[0]
    assert (picture.width, picture.height) == (3 * 8, 2 * 8)  # teacher above student


def test_the_progress_bar_shows_reward_and_kl(make_model, held_out, capsys):
    bar = ProgressBar(3)
    make_model().learn(3 * ITERATION, callback=[HeldOutEvaluation(held_out, every=1), bar])
    assert bar.bar.n == 3
    shown = capsys.readouterr().err
    assert "3/3" in shown
    for label in ("reward=-0.", "kl=", "held-out mse="):
        assert label in shown


def test_a_progress_bar_needs_a_length():
    with pytest.raises(InvalidArgumentError, match="iterations"):
        ProgressBar(0)


@pytest.mark.parametrize("num_images", [-1, 2.5])
def test_the_number_of_pictures_must_be_an_integer(held_out, num_images):
    with pytest.raises(InvalidArgumentError, match="num_images"):
        HeldOutEvaluation(held_out, num_images=num_images)


def test_a_callback_of_two_agents_is_called_before_each_learns(make_model, held_out):
    callback = HeldOutEvaluation(held_out, every=1)
    for seed in (0, 1):
        make_model(seed=seed).learn(2 * ITERATION, callback=callback)
    assert [entry["iteration"] for entry in callback.history] == [0, 1, 2, 2, 3, 4]
