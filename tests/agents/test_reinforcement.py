"""PPO behind the baselines' interface: its ledger against counted calls, budgets and starts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from agents import presets, reinforcement
from agents.baselines import OutputRegression
from agents.smaller import describe_smaller, make_smaller
from redif_env import schedules
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import MSE, Discriminator

GRID = torch.tensor([850.0, 300.0, 0.0])
FEW = {"num_envs": 16, "batch_size": 16}


@pytest.fixture
def calls(monkeypatch, teacher):
    """Network-forward equivalents that all copies of the student's network are asked for."""
    seen = {"total": 0}
    kind = type(teacher.denoiser.network)
    forward = kind.forward

    def counted(self: nn.Module, sample: torch.Tensor, *args, **kwargs):
        trains = torch.is_grad_enabled() and next(self.parameters()).requires_grad
        seen["total"] += len(sample) * (3 if trains else 1)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", counted)
    return seen


@pytest.mark.parametrize(
    ("preset", "rollout", "reference"),
    # The default measures its gap to the teacher before it first explores, and asks once about the
    # states of a pair: of eight pairs in the first step, of four in the second.
    [("default", 2 * 16 + 2 * (8 + 4 + 8), 0), ("grpo", 2 * 2 * 16, 2 * 2 * 16)],
)
def test_the_ledger_is_what_networks_were_asked(teacher, bank, calls, preset, rollout, reference):
    """Of both iterations; with a KL penalty each trained transition is asked of the start, too."""
    result = reinforcement.train(teacher, bank, GRID, preset=preset, iterations=2, **FEW)
    assert result.ledger.total == calls["total"]
    assert result.ledger.evaluations["rollout"] == rollout
    assert result.ledger.evaluations["reference"] == reference
    assert result.history[-1]["network_evaluations"] == result.ledger.total
    assert [record["iteration"] for record in result.history] == [1, 2]
    assert result.nfe == 2
    assert result.ledger.updates["student"] > 0


def test_a_forward_pass_that_is_reused_counts_once(teacher, bank, calls):
    """A state a pair and iteration less than where it is sent forward again: by counted calls."""
    options = {"iterations": 2, "n_epochs": 1, **FEW}
    totals = []
    for reuse in (False, True):
        calls["total"] = 0
        result = reinforcement.train(teacher, bank, GRID, reuse_forward=reuse, **options)
        assert result.ledger.total == calls["total"]
        assert result.ledger.evaluations["update"] == 3 * 2 * 8
        totals.append(result.ledger.total)
    assert totals[0] - totals[1] == 2 * 8


def test_the_recipe_is_that_of_the_number_of_steps():
    rates = [
        reinforcement.recipe_options("default", {}, MSE(), num_steps)[1]["learning_rate"](1.0)
        for num_steps in (2, 3)
    ]
    assert rates == [2e-4, 1e-4]


@pytest.mark.parametrize(("learned", "order"), [(False, 2), (True, 1)])
def test_four_steps_are_of_second_order_unless_their_times_are_learned(
    teacher, bank, learned, order
):
    grid = torch.tensor([850.0, 600.0, 300.0, 150.0, 0.0])
    student = reinforcement.train(teacher, bank, grid, iterations=1, learned=learned, **FEW).student
    assert student.solver_order == order


def test_a_change_that_nothing_knows_is_refused(teacher, bank):
    with pytest.raises(InvalidArgumentError, match="learning_rat'"):
        reinforcement.train(teacher, bank, GRID, iterations=1, learning_rat=1e-3)


@pytest.mark.parametrize("name", ["policy_kwargs", "env", "policy"])
def test_what_is_made_here_is_no_change(name):
    with pytest.raises(InvalidArgumentError, match=f"changes='{name}'"):
        reinforcement.recipe_options("default", {name: {}}, MSE(), 2)


def test_changes_find_their_part_of_a_recipe():
    recipe = presets.preset("default")
    changes = {"decay": False, "step_cost": 0.1, "exploration_unit": "prediction", "target_kl": 0.2}
    changed = reinforcement.changed(recipe, changes)
    assert changed["decay"] is False
    assert changed["env"] == {**recipe["env"], "step_cost": 0.1}
    assert changed["policy"] == {**recipe["policy"], "exploration_unit": "prediction"}
    assert changed["agent"] == {**recipe["agent"], "target_kl": 0.2}
    assert recipe == presets.preset("default")


def test_a_budget_buys_as_many_iterations_as_fit(teacher, bank):
    four = reinforcement.train(teacher, bank, GRID, iterations=4, **FEW)
    cost = four.ledger.total
    for budget, iterations in ((cost, 4), (cost - 1, 3), (cost + 1, 4), (1, 1)):
        result = reinforcement.train(teacher, bank, GRID, budget=budget, **FEW)
        assert len(result.history) == iterations
        assert result.ledger.total <= max(budget, four.history[0]["network_evaluations"])


def test_training_starts_where_it_is_told_to(teacher, bank, held_out):
    start = OutputRegression.train(teacher, bank, GRID, iterations=3, batch_size=16).student
    wanted = schedules.paired_mse(start, held_out, GRID)
    assert wanted != schedules.paired_mse(teacher.denoiser, held_out, GRID)
    seen = []

    def follow(iteration, student):
        seen.append(schedules.paired_mse(student, held_out, GRID))

    options = {"iterations": 2, "on_iteration": follow, **FEW}
    reinforcement.train(teacher, bank, GRID, start=start, **options)
    assert seen[0] == wanted
    assert seen[1] != wanted
    # Not changed, and a plain run starts elsewhere.
    assert schedules.paired_mse(start, held_out, GRID) == wanted
    reinforcement.train(teacher, bank, GRID, **options)
    assert seen[3] != wanted


def test_a_reward_that_learns_starts_anew_and_is_on_the_ledger(teacher, bank):
    reward = Discriminator(teacher.denoiser.latent_shape, n_epochs=1, batch_size=16)
    options = {"reward": reward, "iterations": 2, **FEW}
    first = reinforcement.train(teacher, bank, GRID, **options)
    # Each rollout: 16 samples scored; one update of 16 samples and 16 answers, forward and back.
    assert first.ledger.evaluations["reward"] == 2 * (16 + 3 * 2 * 16)
    assert reward.updates == 0
    again = reinforcement.train(teacher, bank, GRID, **options)
    assert first.history == again.history


@pytest.mark.parametrize("options", [{}, {"iterations": 1, "budget": 100}])
def test_the_length_must_be_said_once(teacher, bank, options):
    with pytest.raises(InvalidArgumentError) as caught:
        reinforcement.train(teacher, bank, GRID, **options)
    assert caught.value.argument == "iterations"


@pytest.mark.parametrize("smaller", [False, True])
def test_a_students_guidance_scale_is_that_of_its_start(teacher, bank, smaller):
    start = copy.deepcopy(teacher.denoiser)
    if smaller:
        description = describe_smaller(teacher, {"layers_per_block": 1})
        start = make_smaller(teacher, description)
    start.set_guidance(3.0)
    result = reinforcement.train(teacher, bank, GRID, start=start, iterations=1, **FEW)
    assert result.student.guidance_scale == 3.0
    assert result.nfe == 2 * (len(GRID) - 1)
    plain = reinforcement.train(teacher, bank, GRID, iterations=1, **FEW)
    assert plain.student.guidance_scale == 1.0
    assert result.ledger.evaluations["update"] == 2 * plain.ledger.evaluations["update"]
