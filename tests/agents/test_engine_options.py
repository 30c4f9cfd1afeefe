"""Mixed credit, clipping, penalties, the trust region, and updates that must not be taken."""

from __future__ import annotations

import pytest
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from agents import ReDiFPPO, presets
from agents.advantages import batch_relative
from agents.ppo import TrainingDivergedError
from redif_env import ReDiFVectorEnv
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import MSE, PSNR

NUM_ENVS, NUM_STEPS = 16, 2


def make_model(teacher, bank, env=None, **options):
    env = ReDiFVectorEnv(
        NUM_ENVS,
        teacher,
        num_steps=NUM_STEPS,
        schedule="uniform",
        bank=bank,
        seed=0,
        **(env or {"group_size": 2}),
    )
    fixed = {"batch_size": 8, "n_epochs": 1, "eta": 0.1, "min_std": 0.02, "gap_fraction": None}
    model = ReDiFPPO("StudentPolicy", env, seed=0, **{**fixed, **options})
    model.set_logger(configure(None, []))
    return model


def train(model, iterations=1):
    return model.learn(iterations * NUM_ENVS * NUM_STEPS)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.policy.denoiser.network.parameters()])


def logged(model, name):
    return model.logger.name_to_value[f"train/{name}"]


def test_whole_batch_whitening_by_hand():
    advantages = batch_relative(torch.tensor([[1.0, 2.0, 3.0]]))
    torch.testing.assert_close(advantages, torch.tensor([[-1.0, 0.0, 1.0]]))


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_credit_is_mixed_by_weight(teacher, bank, weight):
    def advantages(**options):
        return train(make_model(teacher, bank, **options)).rollout_buffer["advantages"]

    mixed = advantages(local_weight=weight)
    local, whole = advantages(), advantages(credit="global")
    # The first rollout does not depend on how credit is given.
    torch.testing.assert_close(mixed, weight * local + (1 - weight) * whole.unsqueeze(2))


@pytest.mark.parametrize("credit", ["local", "global"])
def test_a_group_may_be_divided_by_its_own_std(teacher, bank, credit):
    """What a rollout gives is that of one scale for all, with each group of mean square 1."""

    def advantages(**options):
        model = train(make_model(teacher, bank, credit=credit, **options))
        return model.rollout_buffer["advantages"].unflatten(1, (-1, 2)).flatten(2)

    own, shared = advantages(advantage_std="group"), advantages()
    squares = own.square().mean(2)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-3, atol=0)
    spread = shared.square().mean(2, keepdim=True).sqrt()
    torch.testing.assert_close(own, shared / spread, rtol=1e-3, atol=1e-5)
    assert spread.max() > 1.1 * spread.min()  # negative control: groups do differ


def test_grpo_is_relative_to_the_spread_of_each_group(teacher, bank):
    """As published: rewards less their group's mean, divided by its standard deviation."""
    recipe = presets.preset("grpo")
    agent = {**recipe["agent"], "advantage_clip": None, "batch_size": 8}
    model = train(make_model(teacher, bank, recipe["env"], **agent))
    found = model.rollout_buffer["advantages"].unflatten(1, (-1, recipe["env"]["group_size"]))
    torch.testing.assert_close(found.mean(2), torch.zeros(found.shape[:2]), rtol=0, atol=1e-5)
    squares = found.square().mean(2)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-2, atol=0)


class TaskMeansByHand:
    """Of one number a task, with a horizon of four visits."""

    def __init__(self):
        self.means, self.visits = {}, {}

    def relative(self, returns, tasks):
        mean = returns.mean(0)
        baseline = torch.stack([self.means.get(task, mean) for task in tasks])
        for task in set(tasks):
            new = [value for value, other in zip(returns, tasks, strict=True) if other == task]
            visits = self.visits.get(task, 0)
            total = visits * self.means.get(task, 0 * mean) + sum(new)
            self.means[task] = total / (visits + len(new))
            self.visits[task] = min(visits + len(new), 4)
        return (returns - baseline) / (returns - baseline).std()


class Rewarded(BaseCallback):
    """Keeps the last rollout's advantages, and the states in which its episodes ended."""

    def __init__(self):
        super().__init__()
        self.rollouts = []

    def _on_rollout_end(self):
        state = self.training_env.env.last_state
        self.rollouts.append((state, self.model.rollout_buffer["advantages"][0].clone()))

    def _on_step(self):
        return True


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_task_baselines_from_the_environment_to_the_advantage(teacher, bank, weight):
    """Which task a row played is seen from its noise alone."""
    options = {"advantage": "task", "local_weight": weight, "stochastic_steps": "all"}
    model = make_model(teacher, bank, env={"group_size": 1}, **options)
    callback = Rewarded()
    model.learn(4 * NUM_ENVS * NUM_STEPS, callback=callback)
    rows, maps = TaskMeansByHand(), TaskMeansByHand()
    known = 0
    for state, advantages in callback.rollouts:
        same = (bank.x_T.flatten(1) == state.x_T.flatten(1)[:, None]).all(2)
        tasks = same.int().argmax(1).tolist()
        known += sum(task in rows.means for task in tasks)
        outcome = -(state.x_t - state.teacher_x_0).square().flatten(1)
        local = maps.relative(outcome, tasks)
        whole = rows.relative(outcome.mean(1), tasks)
        expected = weight * local + (1 - weight) * whole.unsqueeze(1)
        # float32, of rewards near 0.1 over a std near 0.05
        torch.testing.assert_close(advantages, expected, rtol=1e-3, atol=1e-4)
    assert known > NUM_ENVS  # means of earlier visits were used


def test_advantages_are_clipped(teacher, bank):
    free = train(make_model(teacher, bank)).rollout_buffer["advantages"]
    clipped = train(make_model(teacher, bank, advantage_clip=0.5)).rollout_buffer["advantages"]
    assert float(free.abs().max()) > 0.5
    torch.testing.assert_close(clipped, free.clamp(-0.5, 0.5))


@pytest.mark.parametrize("name", ["kl", "js", "chi_square", "renyi", "power"])
def test_a_strong_penalty_holds_the_student(teacher, bank, name):
    start = weights(make_model(teacher, bank))
    options = {"learning_rate": 1e-4, "n_epochs": 4, "min_std": 0.05}
    free = train(make_model(teacher, bank, divergence=name, divergence_coef=0.0, **options), 2)
    held = train(make_model(teacher, bank, divergence=name, divergence_coef=100.0, **options), 2)
    assert 0 < logged(held, "divergence") < logged(free, "divergence")
    assert not torch.equal(weights(held), start)


def test_no_penalty_at_the_start(teacher, bank):
    model = make_model(teacher, bank, divergence="kl", batch_size=NUM_ENVS)
    train(model)
    # One minibatch, so the only measurement precedes the only update.
    assert logged(model, "divergence") == pytest.approx(0, abs=1e-8)


def test_the_coefficient_follows_its_target(teacher, bank):
    loose = make_model(teacher, bank, divergence="kl", divergence_target=10.0)
    assert train(loose).divergence_coef == pytest.approx(1 / 1.5)
    tight = make_model(teacher, bank, divergence="kl", divergence_target=1e-12)
    assert train(tight).divergence_coef == pytest.approx(1.5)


@pytest.mark.parametrize(("target", "factor"), [(1e-12, 1 / 1.5), (10.0, 1.5)])
def test_the_learning_rate_follows_the_kl(teacher, bank, target, factor):
    model = make_model(
        teacher, bank, learning_rate=1e-5, target_kl=target, adaptive_lr=True, batch_size=4
    )
    train(model, 2)
    assert model.policy.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5 * factor)


class Spoil(BaseCallback):
    """Makes advantages infinite at the end of the rollouts numbered `when`."""

    def __init__(self, when):
        super().__init__()
        self.when, self.rollout = when, 0

    def _on_rollout_end(self):
        if self.rollout in self.when:
            self.model.rollout_buffer["advantages"].fill_(float("inf"))
        self.rollout += 1

    def _on_step(self):
        return True


def test_updates_without_a_finite_loss_are_skipped_and_counted(teacher, bank):
    model = make_model(teacher, bank, batch_size=NUM_ENVS)
    start = weights(model)
    model.learn(NUM_ENVS * NUM_STEPS, callback=Spoil({0}))
    assert torch.equal(weights(model), start)
    assert model.updates_skipped == 1
    train(model)  # and training goes on
    assert not torch.equal(weights(model), start)


def test_an_infinite_gradient_of_the_critic_alone_is_skipped_too(teacher, bank):
    options = {"advantage": "gae", "antithetic": False, "stochastic_steps": "all"}
    model = make_model(teacher, bank, batch_size=NUM_ENVS * NUM_STEPS, **options)
    start = weights(model)
    parameter = next(model.policy.value_critic.parameters())
    hook = parameter.register_hook(lambda gradient: gradient * float("inf"))
    train(model)
    assert torch.equal(weights(model), start)
    assert model.updates_skipped == 1
    hook.remove()
    train(model)
    assert not torch.equal(weights(model), start)


def test_training_stops_when_no_update_is_finite(teacher, bank):
    model = make_model(teacher, bank, batch_size=4)
    start = weights(model)
    with pytest.raises(TrainingDivergedError, match="learning_rate"):
        model.learn(NUM_ENVS * NUM_STEPS, callback=Spoil({0}))
    assert torch.equal(weights(model), start)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_recipe_changes_the_student(teacher, bank, name):
    recipe = presets.preset(name)
    recipe["agent"]["batch_size"] = 8
    model = make_model(
        teacher, bank, recipe["env"], policy_kwargs=recipe["policy"], **recipe["agent"]
    )
    start = weights(model)
    assert not torch.equal(weights(train(model)), start)


def test_the_default_recipe_goes_slower_the_more_steps_there_are():
    rates = [agent_of(steps)["learning_rate"] for steps in (1, 2, 3, 4, 5, 6, 20)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > rates[-1]


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 8])
def test_the_default_recipe_explores_the_last_two_steps_with_credit_of_their_own(num_steps):
    recipe = presets.preset("default", num_steps)
    weights = recipe["agent"].get("step_weights")
    if num_steps <= 2:
        assert weights is None
    else:
        assert weights == [0.0] * (num_steps - 2) + [1.0, 1.0]
    assert recipe["env"]["solver_order"] == (2 if num_steps >= 4 else 1)
    alike = recipe["agent"].get("advantage_std") == "group"
    assert alike == (recipe["agent"]["n_epochs"] == 1) == (num_steps != 2)


@pytest.mark.parametrize(
    "case",
    [{"learned": True}, {"reward": PSNR()}, {"reward": MSE() + 0.1 * PSNR()}],
    ids=["learned times", "no map", "a term has no map"],
)
def test_where_no_step_is_known_to_be_early_all_are_explored_to_first_order(case):
    for num_steps in (1, 4):
        recipe = presets.preset("default", num_steps, **case)
        assert not {"step_weights", "advantage_std"} & recipe["agent"].keys()
        assert "solver_order" not in recipe["env"]


def agent_of(num_steps, reward=None):
    return presets.preset("default", num_steps, reward)["agent"]


@pytest.mark.parametrize(
    ("reward", "credit", "updates"),
    [
        (MSE(), "local", (3, 256)),
        (PSNR(), "global", (1, 64)),
        (MSE() + 0.1 * PSNR(), "local", (1, 64)),
    ],
)
def test_the_recipe_is_that_of_the_reward(reward, credit, updates):
    """A number for the whole sample is noise to each element, which three looks do not lower."""
    agent = agent_of(2, reward)
    assert (agent["credit"], (agent["n_epochs"], agent["batch_size"])) == (credit, updates)
    assert agent["learning_rate"] == agent_of(2)["learning_rate"]
    grpo = presets.preset("grpo", 4, reward)
    assert grpo == presets.preset("grpo", 4)  # which has global credit already


def test_recipes_are_copies():
    presets.preset("ddpo")["agent"]["eta"] = 7
    assert presets.preset("ddpo")["agent"]["eta"] == 1.0


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"divergence": "wasserstein"}, "divergence"),
        ({"divergence": "renyi", "divergence_alpha": -1}, "alpha"),
        ({"divergence_coef": -1}, "divergence_coef"),
        ({"local_weight": 2}, "local_weight"),
        ({"local_radius": -1}, "local_radius"),
        ({"local_radius": [0, -1, 0]}, "local_radius"),
        ({"local_radius": [1, 0, 0, 0]}, "local_radius"),  # of fewer steps
        ({"local_radius": [1, 0], "stochastic_steps": "all"}, "local_radius"),
        ({"advantage_std": "task"}, "advantage_std"),
        ({"advantage": "batch", "advantage_std": "group"}, "advantage_std"),
        ({"advantage_clip": 0}, "advantage_clip"),
        ({"adaptive_lr": True}, "adaptive_lr"),
        ({"divergence_target": 0.1}, "divergence_target"),
        ({"advantage": "gae", "credit": "global", "advantage_clip": 5}, "advantage_clip"),
        ({"advantage": "vibes"}, "advantage"),
    ],
)
def test_bad_options(teacher, bank, options, argument):
    with pytest.raises(InvalidArgumentError, match=argument):
        make_model(teacher, bank, **options)


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(InvalidArgumentError, match="redif-paper"):
        presets.preset("dpo")
