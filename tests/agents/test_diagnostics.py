"""What is logged: by hand, and name by name against docs/metrics.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_world import ITERATION, STOCK, Keeps
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from agents import ReDiFPPO, diagnostics
from agents.alarm import RewardHackingAlarm
from agents.callbacks import HeldOutEvaluation
from agents.distillation import find_judge
from agents.online import UpdateReward
from redif_env.rewards import Discriminator, EnergyDistance
from redif_env.transition import Gaussian

METRICS = Path(__file__).parents[2] / "docs" / "metrics.md"
STEPS = 3


def minibatch(step_index: list[int], std: list[float]) -> Any:
    """Of latents `(1, 1, 2)`; the Gaussian's std is all that is looked at beside the steps."""
    stds = torch.tensor(std).reshape(-1, 1, 1, 1)
    old = Gaussian(torch.zeros(len(std), 1, 1, 2), stds)
    return SimpleNamespace(step_index=torch.tensor(step_index), old=old)


def evaluation(ratio: list[list[float]], kl: list[float]) -> Any:
    return SimpleNamespace(log_ratio=torch.tensor(ratio).log(), kl=torch.tensor(kl))


def first_sums() -> Tensor:
    """Steps 2, 0 and 2: of ratios beyond 0.2 from 1 they have a half, none and all."""
    batch = minibatch([2, 0, 2], [0.5, 0.1, 0.3])
    new = evaluation([[1.1, 1.3], [0.9, 1.0], [0.7, 2.0]], [0.02, 0.01, 0.04])
    return diagnostics.per_step(batch, new, clip_range=0.2, num_steps=STEPS)


def second_sums() -> Tensor:
    batch = minibatch([0, 2], [0.3, 0.4])
    new = evaluation([[1.5, 1.0], [1.0, 1.0]], [0.03, 0.0])
    return diagnostics.per_step(batch, new, clip_range=0.2, num_steps=STEPS)


def test_sums_by_step_by_hand():
    expected = [
        [1.0, 0.0, 2.0],  # rows
        [0.01, 0.0, 0.06],  # KL
        [0.0, 0.0, 1.5],  # share of clipped ratios
        [0.1, 0.0, 0.8],  # std
    ]
    torch.testing.assert_close(first_sums(), torch.tensor(expected))


def test_means_by_step_by_hand():
    """Over all transitions of the minibatches, not over the minibatches' means."""
    means = diagnostics.step_means([{"per_step": first_sums()}, {"per_step": second_sums()}])
    assert means == pytest.approx(
        {
            "kl_step_0": 0.02,
            "clip_fraction_step_0": 0.25,
            "exploration_std_step_0": 0.2,
            "kl_step_2": 0.02,
            "clip_fraction_step_2": 0.5,
            "exploration_std_step_2": 0.4,
        }
    )  # the step between did not explore
    # negative control: the mean of the two means of step 2 would be another one
    parts = [diagnostics.step_means([{"per_step": s()}]) for s in (first_sums, second_sums)]
    assert sum(part["kl_step_2"] for part in parts) / 2 == pytest.approx(0.015)


def test_figures_of_each_step_belong_to_it(make_model):
    """With a std that differs between steps, from the agent's own logs."""
    options = {"stochastic_steps": "all", "antithetic": False, "eta": 0.0}
    policy = {"learn_std": True}
    model = make_model(policy_kwargs=policy, learning_rate=0.0, **options)
    model.policy.step_scale.weight.data = torch.tensor([0.5, 0.0, -1.0])
    model.learn(ITERATION)
    wanted = 0.02 * 4.0 ** torch.tensor([0.5, 0.0, -1.0]).tanh()
    logged = [model.logger.name_to_value[f"train/exploration_std_step_{i}"] for i in range(STEPS)]
    assert logged == pytest.approx(wanted.tolist(), rel=1e-5)


def test_the_mean_of_the_steps_is_the_mean_of_all(make_model):
    """As many transitions of each, in minibatches of one size."""
    options = {"stochastic_steps": "all", "antithetic": False, "learning_rate": 1e-3}
    model = make_model(n_epochs=4, **options).learn(ITERATION)
    logged = model.logger.name_to_value
    for name in ("kl", "clip_fraction"):
        steps = [logged[f"train/{name}_step_{step}"] for step in range(STEPS)]
        assert sum(steps) / STEPS == pytest.approx(logged[f"train/{name}"], rel=1e-4)
        assert len(set(steps)) == STEPS


@pytest.mark.parametrize("learn_std", [False, True])
def test_the_kl_is_torchs_from_the_old_steps_to_the_new(make_model, learn_std):
    """Both ways round differ where the std is learned; no gradient flows."""
    options = {"stochastic_steps": "all", "antithetic": False, "learning_rate": 1e-2}
    model = make_model(policy_kwargs={"learn_std": learn_std}, **options).learn(ITERATION)
    batch = next(model.rollout_buffer.get(ITERATION))
    new = model._evaluate(batch)
    assert new.log_ratio.requires_grad
    assert not new.kl.requires_grad
    std = new.gaussian.std if learn_std else batch.old.std
    old_steps, new_steps = Normal(*batch.old), Normal(new.gaussian.mean.detach(), std.detach())
    expected = kl_divergence(old_steps, new_steps).flatten(1).mean(1)
    torch.testing.assert_close(new.kl, expected, rtol=1e-3, atol=1e-6)
    if learn_std:  # negative control
        reverse = kl_divergence(new_steps, old_steps).flatten(1).mean(1)
        assert (reverse / expected - 1).abs().max() > 0.01


def test_drift_by_hand():
    start = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0, 4.0]])]
    now = [torch.tensor([3.0, 1.0]), torch.tensor([[2.0, 6.0]])]
    # |(0, 1, 2, 2)| / |(3, 0, 0, 4)|
    assert diagnostics.drift(now, start).item() == pytest.approx(3 / 5)
    assert diagnostics.drift(start, start).item() == 0
    # from nothing, as adapters start, it is large but a number
    assert diagnostics.drift([torch.ones(2)], [torch.zeros(2)]).isfinite()


def test_copies_do_not_follow():
    weight = torch.nn.Parameter(torch.ones(2))
    (copy,) = diagnostics.copies([weight])
    weight.data += 1
    assert copy.tolist() == [1.0, 1.0]
    assert not copy.requires_grad


def test_the_effective_sample_size_is_one_until_the_policy_has_moved(make_model):
    options = {"stochastic_steps": "all", "antithetic": False, "learning_rate": 1e-3}
    once = make_model(batch_size=ITERATION, **options).learn(ITERATION)
    assert once.logger.name_to_value["train/effective_sample_size"] == pytest.approx(1, abs=1e-5)
    # negative control: after ten epochs ratios differ
    often = make_model(batch_size=ITERATION, n_epochs=10, **options).learn(ITERATION)
    assert often.logger.name_to_value["train/effective_sample_size"] < 0.99


def logged(model: ReDiFPPO, callback: BaseCallback | None = None) -> set[str]:
    """Names of what two iterations log."""
    writer = Keeps()
    model.set_logger(Logger(None, [writer]))
    model.learn(2 * model.n_steps * model.n_envs, callback=callback)
    model.logger.dump()  # of the last update, too
    names = {re.sub(r"(_step|/time)_\d+$", r"\1_i", name) for name in writer.values}
    return {re.sub(r"^rollout/reward/.*", "rollout/reward/NAME", name) for name in names}


def documented() -> set[str]:
    """Names of the first column of the table in docs/metrics.md."""
    rows = re.findall(r"^\|(.*?)\|", METRICS.read_text(), re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names))
    return set(names)


# What each way to train adds to what every way logs.
ALWAYS = {
    "rollout/ep_rew_mean",
    "rollout/ep_len_mean",
    "rollout/reward/NAME",
    "time/fps",
    "time/iterations",
    "time/time_elapsed",
    "time/total_timesteps",
    "train/advantage_scale",
    "train/clip_fraction",
    "train/clip_range",
    "train/effective_sample_size",
    "train/grad_norm",
    "train/kl",
    "train/learning_rate",
    "train/loss",
    "train/n_updates",
    "train/parameter_drift",
    "train/policy_gradient_loss",
    "train/ratio_error",
    "train/updates_skipped",
}
STUDENT = {
    "train/clip_fraction_step_i",
    "train/eta",
    "train/exploration_std_step_i",
    "train/kl_step_i",
    "train/min_std",
}
CRITIC = {"train/explained_variance", "train/value_loss"}
GAE = {"advantage": "gae"}
STUDENTS = [
    pytest.param({}, set(), id="student"),
    pytest.param({"gap_fraction": 0.5}, {"train/gap"}, id="gap"),
    pytest.param(GAE, {*CRITIC, "train/critic_grad_norm"}, id="critic"),
    pytest.param(
        {"policy_kwargs": {"learn_std": True}},
        {"train/entropy_loss", "train/std_grad_norm"},
        id="std",
    ),
    pytest.param(
        {"divergence": "kl"}, {"train/divergence", "train/divergence_coef"}, id="divergence"
    ),
]
EVALUATION = {
    "eval/num_steps",
    "eval/paired_mse",
    "eval/reward",
    "eval/reward_exploring",
    "eval/samples",
}
CHOICES = {
    "train/schedule_clip_fraction",
    "train/schedule_entropy",
    "train/schedule_grad_norm",
    "train/schedule_kl",
    "train/schedule_loss",
}
SCHEDULES = [
    pytest.param({}, CHOICES | {"schedule/time_i"}, id="global"),
    pytest.param({"adaptive": True}, CHOICES | {"train/schedule_network_grad_norm"}, id="adaptive"),
]
ALARM = {
    "judge/coverage",
    "judge/label_agreement",
    "judge/label_balance",
    "judge/recall",
    "judge/reward_hacked",
}
ONLINE = {
    "reward/discriminator_accuracy",
    "reward/discriminator_loss",
    "reward/discriminator_penalty",
    "reward/energy_distance_estimate",
    "reward/energy_distance_memory",
}


@pytest.mark.parametrize(("options", "added"), STUDENTS)
def test_what_a_student_logs(make_model, options, added):
    names = logged(make_model(**options))
    assert names == ALWAYS | STUDENT | added
    assert names <= documented()


@pytest.mark.parametrize(("head", "added"), SCHEDULES)
def test_what_a_free_schedule_logs(make_env, make_model, head, added):
    env = make_env(schedule="free", num_steps=3)
    names = logged(make_model(env, policy_kwargs={"schedule_head": head}))
    assert names == ALWAYS | STUDENT | added
    assert names <= documented()


def test_what_another_policy_logs(make_env):
    options = {**STOCK, "batch_size": 8, "policy_kwargs": {"net_arch": [8]}}
    names = logged(ReDiFPPO("MultiInputPolicy", make_env(), **options))
    assert names == ALWAYS | CRITIC | {"train/entropy_loss"}
    assert names <= documented()


def test_what_an_evaluation_logs(make_model, held_out):
    names = logged(make_model(), HeldOutEvaluation(held_out, every=1))
    assert names == ALWAYS | STUDENT | EVALUATION
    assert names <= documented()


def test_what_the_alarm_logs(teacher, bank, make_model, held_out):
    alarm = RewardHackingAlarm(find_judge(teacher), held_out, bank, every=1)
    names = logged(make_model(), alarm)
    assert names == ALWAYS | STUDENT | ALARM
    assert names <= documented()


def test_what_rewards_that_are_trained_log(make_env, make_model):
    env = make_env(reward=Discriminator((1, 8, 8)) + EnergyDistance(memory=8))
    names = logged(make_model(env, credit="global"), UpdateReward())
    assert names == ALWAYS | STUDENT | ONLINE
    assert names <= documented()


def test_nothing_is_documented_that_is_not_logged():
    """The sets above are what is logged, see the tests that use them."""
    added = set().union(*(case.values[1] for case in (*STUDENTS, *SCHEDULES)))
    assert documented() == ALWAYS | STUDENT | EVALUATION | ALARM | ONLINE | added
