"""The alarm: made-up histories, false alarms, and a student that hacks the compressed size."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_world import ITERATION, STOCK, Keeps, weights
from stable_baselines3.common.logger import Logger, configure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agents import ReDiFPPO, presets
from agents.alarm import HackingDetector, RewardHackingAlarm, RewardHackingWarning
from agents.distillation import find_judge
from agents.online import UpdateReward
from redif_env import MSE, ReDiFVectorEnv, TeacherBank, load_teacher, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import CompressedSize, Discriminator, EnergyDistance

BLOCKS = 16
ROWS = 64


def history(quality, reward, generator, noise=0.02, steps=6, threshold=5.0):
    """Hacks of a made-up run whose figure and reward change by that much an evaluation.

    Tasks differ ten times more than evaluations do, as they do when all are of the same tasks.
    """
    tasks = 10 * noise * torch.randn(2, ROWS, generator=generator)
    detector, found = HackingDetector(threshold), []
    for step in range(steps):
        jitter = noise * torch.randn(2, ROWS, generator=generator)
        figure, x_0 = tasks + jitter + torch.tensor([[quality], [reward]]) * step
        blocks = figure.double().reshape(BLOCKS, -1).mean(1)
        found += detector.check(step, {"coverage": blocks}, x_0, lambda x: x)
    return found


@pytest.mark.parametrize(
    ("quality", "reward", "hacked"),
    [
        (-0.02, 0.02, True),
        (0.02, 0.02, False),
        (-0.02, -0.02, False),
        (0.02, -0.02, False),
        (-0.02, 0.0, False),
        (0.0, 0.02, False),
    ],
)
def test_only_a_falling_quality_under_a_rising_reward_is_hacking(
    generator, quality, reward, hacked
):
    found = history(quality, reward, generator)
    assert bool(found) == hacked
    if hacked:
        last = found[-1]
        assert last.figure == "coverage"
        assert last.since == 0
        assert last.now - last.before == pytest.approx(-0.1, abs=0.02)
        assert last.reward_now - last.reward_before == pytest.approx(0.1, abs=0.02)


def test_unpaired_the_same_change_would_drown(generator):
    """Tasks differ by more than the change: it is seen because the tasks are the same."""
    assert history(-0.02, 0.02, generator, noise=0.02)
    assert not history(-0.02, 0.02, generator, noise=1.0)


def test_noise_alone_does_not_sound_it(generator):
    """Reward rising for certain, quality constant: 400 runs of 11 evaluations.

    A figure is compared with its best, which is partly luck: measured on 1,000 other runs, 2 sound
    it. Of 400 that is 0.8; a Poisson variable of that mean is above 5 once in 5,000 times.
    """

    def alarms(threshold):
        runs = [history(0.0, 0.05, generator, steps=11, threshold=threshold) for _ in range(400)]
        return sum(bool(found) for found in runs)

    assert alarms(5.0) <= 5
    assert alarms(2.0) > 100  # what a naive two standard errors would do


def test_both_students_are_scored_by_the_present_reward(generator):
    """A reward that moves: what it was paid then does not count."""
    x_0 = torch.randn(2, ROWS, generator=generator)
    detector = HackingDetector()
    high, low = torch.full((BLOCKS,), 0.9), torch.full((BLOCKS,), 0.5)
    assert detector.check(0, {"recall": high}, x_0[0], lambda x: 0 * x) == []
    # all rewards have gone up by 5, of the old samples too: the student has gained nothing
    assert detector.check(1, {"recall": low}, x_0[1], lambda x: 0 * x + 5) == []
    gained = detector.check(2, {"recall": low}, x_0[1], lambda x: (x == x_0[1]).float() + 5)
    assert [hack.figure for hack in gained] == ["recall"]
    assert (gained[0].reward_before, gained[0].reward_now) == (5, 6)
    assert "recall fell from 0.900 (iteration 0) to 0.500" in str(gained[0])


@pytest.mark.parametrize(("teachers", "hacked"), [(0.97, True), (0.9, True), (0.6, False)])
def test_a_lead_over_the_teacher_may_be_lost(generator, teachers, hacked):
    """From 0.99 to 0.7, where the teacher itself has that much."""
    noise = 0.01 * torch.randn(3, BLOCKS, generator=generator).double()
    detector = HackingDetector(floor={"coverage": teachers + noise[0]})
    x_0 = torch.arange(2.0)[:, None].expand(2, ROWS)
    for step, figure in enumerate((0.99, 0.7)):
        blocks = {"coverage": figure + noise[1 + step]}
        found = detector.check(step, blocks, x_0[step], lambda x: x)
    assert bool(found) == hacked


@pytest.fixture
def watch(teacher, bank, held_out):
    def make(**options):
        return RewardHackingAlarm(find_judge(teacher), held_out, bank, **{"every": 1, **options})

    return make


def test_it_logs_and_warns_once(make_env, make_model, watch, held_out, tmp_path, monkeypatch):
    """A policy that is replaced by a blank page between two iterations."""
    model = make_model(make_env(reward=CompressedSize()), credit="global")
    model.set_logger(configure(str(tmp_path), ["tensorboard"]))
    alarm = watch()
    real, calls = schedules.sample, []

    def sample(*arguments):
        calls.append(0)
        x_0 = real(*arguments)
        return x_0 if len(calls) == 1 else 0 * x_0 - 1

    monkeypatch.setattr(schedules, "sample", sample)
    with pytest.warns(RewardHackingWarning) as seen:
        model.learn(3 * ITERATION, callback=alarm)
    assert any("coverage fell from" in str(each.message) for each in seen)
    figures = [str(each.message).split()[2] for each in seen]
    assert sorted(figures) == sorted(set(figures))  # once each, though it sounds three times
    assert len(alarm.hacks) == 3 * len(figures)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curve = [event.value for event in events.Scalars("judge/reward_hacked")]
    assert curve[0] == 0
    assert curve[1:] == [len(figures)] * 3
    for name in ("recall", "coverage", "label_balance", "label_agreement"):
        curve = [event.value for event in events.Scalars(f"judge/{name}")]
        assert curve == pytest.approx([record[name] for record in alarm.history])
    sizes = [record["reward"] for record in alarm.history]
    assert sizes[1] > -13 > sizes[0]  # of a blank page, see the tests of the reward


def test_watching_does_not_disturb_training(make_model, watch):
    plain = weights(make_model().learn(2 * ITERATION))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RewardHackingWarning)
        alarm = watch()  # a network is made, and drawn, before training is seeded
        assert torch.equal(weights(make_model().learn(2 * ITERATION, callback=alarm)), plain)
    assert len(alarm.history) == 3


def test_bad_arguments(teacher, bank, held_out, watch):
    judge = find_judge(teacher)
    with pytest.raises(InvalidArgumentError, match=r"judge=None.*find_judge"):
        RewardHackingAlarm(None, held_out, bank)
    with pytest.raises(InvalidArgumentError, match=r"bank='64 tasks'.*65 at least"):
        RewardHackingAlarm(judge, held_out, bank, blocks=65)
    for options in ({"blocks": 1}, {"k": 0}, {"threshold": -1}, {"every": 0}):
        (name, value), *_ = options.items()
        with pytest.raises(InvalidArgumentError, match=f"{name}={value}"):
            watch(**options)


# --- rewards that are trained ---


def test_online_rewards_are_updated_once_a_rollout(make_env, make_model, bank):
    calls = []

    class Spy(Discriminator):
        def update(self, x_0, teacher_x_0, condition):
            calls.append((x_0, teacher_x_0, condition))
            return super().update(x_0, teacher_x_0, condition)

    energy = EnergyDistance(reference=bank.teacher_x_0, memory=20)
    spy = Spy((1, 8, 8), 10)
    env = make_env(reward=MSE() + 0.01 * spy + energy)
    model = make_model(env, credit="global")
    writer = Keeps()
    model.set_logger(Logger(None, [writer]))
    model.learn(3 * ITERATION, callback=UpdateReward())
    assert len(calls) == 3
    assert spy.updates == 3 * spy.n_epochs
    assert len(energy.memory) == 20
    x_0, answers, condition = calls[-1]
    state = env.last_state
    assert torch.equal(x_0, state.x_t)
    assert torch.equal(answers, state.teacher_x_0)
    assert torch.equal(condition, state.condition)
    logged = {name: value for name, value in writer.values.items() if name[:7] == "reward/"}
    assert logged.keys() == {
        "reward/spy_loss",
        "reward/spy_accuracy",
        "reward/spy_penalty",
        "reward/energy_distance_estimate",
        "reward/energy_distance_memory",
    }
    assert logged["reward/spy_loss"] > 0
    assert logged["reward/energy_distance_memory"] == 20


def test_only_finished_samples_train_a_reward(make_env, make_model):
    """On a free schedule some rows are under way when the rollout ends."""
    seen = []

    class Spy(Discriminator):
        def update(self, x_0, teacher_x_0, condition):
            seen.append(len(x_0))
            return {}

    env = make_env(32, schedule="free", num_steps=4, reward=Spy((1, 8, 8)), group_size=1)
    model = ReDiFPPO("MultiInputPolicy", env, n_steps=3, batch_size=32, seed=0, **STOCK)
    model.learn(3 * 96, callback=UpdateReward())
    ended = int((env.last_state.t <= 0).sum())
    assert seen[-1] == ended
    assert 0 < ended < 32


def test_update_reward_needs_something_to_update(make_model):
    with pytest.raises(InvalidArgumentError, match=r"reward='mse'.*leave UpdateReward out"):
        make_model().learn(ITERATION, callback=UpdateReward())


# --- for real ---


def train(reward, iterations=20, seed=0):
    """A two-step student of the bundled teacher, watched; about half a minute."""
    teacher = load_teacher()
    validation = TeacherBank.build(teacher, 512, split="validation")
    reference = TeacherBank.build(teacher, 512, split="validation", seed=1)
    env = ReDiFVectorEnv(
        256,
        teacher,
        schedule=[850, 300],
        reward=reward,
        bank=TeacherBank.build(teacher, 2048),
        seed=seed,
        **presets.preset("default")["env"],
    )
    recipe = presets.preset("default")
    options = {**recipe["agent"], "credit": "local" if reward.has_map else "global"}
    model = ReDiFPPO(
        "StudentPolicy", env, policy_kwargs=recipe["policy"], **{**options, "seed": seed}
    )
    model.set_logger(configure(None, []))
    alarm = RewardHackingAlarm(find_judge(teacher), validation, reference, every=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.learn(iterations * 256 * 2, callback=alarm)
    said = [w for w in caught if issubclass(w.category, RewardHackingWarning)]
    assert bool(said) == bool(alarm.hacks)
    return alarm


@pytest.mark.slow
def test_a_blank_page_compresses_best_and_the_alarm_says_so():
    alarm = train(CompressedSize())
    first, last = alarm.history[0], alarm.history[-1]
    assert last["reward"] > first["reward"] + 1
    assert alarm.hacks
    assert any(hack.figure in ("recall", "coverage") for _, hack in alarm.hacks)
    assert last["coverage"] < alarm.floor["coverage"] - 0.2


@pytest.mark.slow
def test_the_paired_error_does_not_sound_it():
    alarm = train(MSE())
    assert alarm.history[-1]["reward"] > alarm.history[0]["reward"]
    assert alarm.hacks == []
