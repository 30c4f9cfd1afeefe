"""Callbacks: held-out evaluation against the samplers and rewards it is made of."""

from __future__ import annotations

import pytest
import torch
from small_world import ITERATION, weights
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


def test_held_out_evaluation_does_not_disturb_training(make_model, held_out):
    plain = make_model().learn(2 * ITERATION)
    watched = make_model().learn(2 * ITERATION, callback=HeldOutEvaluation(held_out, every=1))
    assert torch.equal(weights(plain), weights(watched))


def test_figures_and_pictures_reach_tensorboard(make_model, held_out, tmp_path):
    model = make_model(tensorboard_log=str(tmp_path))
    callback = HeldOutEvaluation(held_out, every=1, num_images=3)
    model.learn(2 * ITERATION, callback=callback, tb_log_name="run")
    events = EventAccumulator(str(tmp_path / "run_1"), size_guidance={"images": 0})
    events.Reload()
    curve = [event.value for event in events.Scalars("eval/paired_mse")]
    assert curve == pytest.approx([record["paired_mse"] for record in callback.history])
    assert len(events.Scalars("eval/reward")) == len(callback.history)
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
