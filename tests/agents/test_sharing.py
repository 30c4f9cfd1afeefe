"""Rows in one state: who they are, that they are, and that asking once changes nothing but cost."""

from __future__ import annotations

import copy

import pytest
import torch
from small_world import ITERATION, NUM_ENVS, OnRolloutEnd, weights
from test_out_of_memory import Limited

from agents import minibatch, ppo, sharing
from agents.buffers import TorchRolloutBuffer
from agents.ppo import RatioError
from redif_env.errors import InvalidArgumentError

GROUPS, SIZE, STEPS = 7, 4, 3


CPU = torch.device("cpu")


@pytest.mark.parametrize("first", [0, 1, 5])
@pytest.mark.parametrize("step", range(STEPS))
def test_each_row_gets_the_answer_of_a_row_in_its_state(step, first):
    """Against the definition: a group is in one state until the step after it explored."""
    torch.manual_seed(0)
    turns = sharing.draw_turns(GROUPS, STEPS, first, CPU)
    shared = sharing.in_rollout(turns, step, SIZE)
    explored = turns.steps
    together = explored.repeat_interleave(SIZE) >= step
    group = torch.arange(GROUPS * SIZE) // SIZE
    source = shared.asked[shared.answer]
    assert torch.equal(group[source], group)
    assert torch.equal(source[~together], torch.arange(GROUPS * SIZE)[~together])
    assert torch.equal(source[together], SIZE * group[together])
    assert len(shared.asked) == (explored >= step).sum() + SIZE * (explored < step).sum()
    assert len(shared.asked.unique()) == len(shared.asked)


def test_steps_are_explored_in_turn():
    torch.manual_seed(0)
    draws = [sharing.draw_turns(GROUPS, STEPS, first, CPU) for first in range(300)]
    counts = torch.stack([each.steps.bincount(minlength=STEPS) for each in draws])
    assert counts.tolist() == [list(each.counts) for each in draws]
    assert counts.min() == GROUPS // STEPS
    assert counts.max() == GROUPS // STEPS + 1
    assert (counts.sum(0) == 300 * GROUPS / STEPS).all()
    # Which group explores which is drawn anew: 4.5 standard errors of a share.
    share = torch.stack([each.steps == 0 for each in draws]).float().mean(0)
    assert (share - 1 / STEPS).abs().max() < 4.5 * (2 / 9 / 300) ** 0.5


@pytest.mark.parametrize("explored", [[2], [0, 2], [1, 2]])
def test_steps_without_a_turn_are_left_out(explored):
    torch.manual_seed(0)
    draws = [sharing.draw_turns(GROUPS, STEPS, first, CPU, explored) for first in range(300)]
    counts = torch.stack([each.steps.bincount(minlength=STEPS) for each in draws])
    assert counts.tolist() == [list(each.counts) for each in draws]
    assert {*torch.cat([each.steps for each in draws]).tolist()} == {*explored}
    assert (counts.sum(0)[explored] == 300 * GROUPS / len(explored)).all()
    # Groups share their states all the longer.
    asked = sum(len(sharing.in_rollout(draws[0], step, SIZE).asked) for step in range(STEPS))
    expected = sum(step + 1 + SIZE * (STEPS - 1 - step) for step in draws[0].steps.tolist())
    assert asked == expected


@pytest.mark.parametrize("window", ["one", 2, "all"])
def test_all_draws_go_into_steps_that_count(make_model, window):
    """Unless several explore at once, of which some may count and others not."""
    model = make_model(step_weights=[0.0, 1.0, 1.0], stochastic_steps=window, batch_size=ITERATION)
    explored = torch.zeros(3, dtype=torch.long)
    for _ in range(3):  # as many as steps: each would have had its turn
        model.learn(ITERATION, reset_num_timesteps=False)
        (batch,) = model.rollout_buffer.get(ITERATION)
        explored += batch.step_index.bincount(minlength=3)
    assert explored.sum() == 3 * NUM_ENVS * {"one": 1, 2: 2, "all": 3}[window]
    assert (explored[0] == 0) == (window == "one")


def test_nothing_is_shared_by_single_rows():
    assert sharing.in_rollout(sharing.draw_turns(3, STEPS, 0, CPU), 0, 1) is None
    assert sharing.neighbours(6, 1, CPU) is None


def test_a_group_is_in_one_state_until_it_has_explored(make_env, make_model):
    """Of the environment's latents in a rollout; afterwards it is not (negative control)."""
    model = make_model(make_env(16), learning_rate=0.0)
    model.learn(16 * STEPS)
    latents = model.rollout_buffer["observation/latents"].unflatten(1, (-1, SIZE))
    alike = (latents == latents[:, :, :1]).flatten(3).all(3).all(2)
    explored = model._turns.steps
    step = torch.arange(STEPS)[:, None]
    assert torch.equal(alike, step <= explored)


def test_asking_once_trains_the_same_student_for_less(make_env, make_model, monkeypatch):
    """Of three steps one is explored by two of four groups: see the numbers of states below."""
    options = {"n_epochs": 2, "divergence": "kl", "divergence_coef": 0.1}
    model = make_model(make_env(16), **options)
    model.learn(2 * 16 * STEPS)
    policy = model.policy
    # The first rollout begins with step 1, the second with step 2.
    rollouts = (4 + (3 + SIZE) + (1 + 3 * SIZE)) + (4 + (3 + SIZE) + (2 + 2 * SIZE))
    in_updates = 2 * 4
    assert model.rows_trained == 2 * in_updates
    assert policy.denoiser.network_evaluations == rollouts + 2 * in_updates
    assert policy.reference_denoiser.network_evaluations == 2 * in_updates

    monkeypatch.setattr(ppo, "in_rollout", lambda *args: None)
    monkeypatch.setattr(minibatch, "neighbours", lambda *args: None)
    plain = make_model(make_env(16), **options)
    plain.learn(2 * 16 * STEPS)
    assert plain.policy.denoiser.network_evaluations == 2 * (16 * STEPS + 2 * 16)
    start = make_model(make_env(16), **options).policy.denoiser.state_dict()
    for name, weight in plain.policy.denoiser.state_dict().items():
        # batches of other sizes add up in another order
        assert torch.allclose(weight, policy.denoiser.state_dict()[name], atol=2e-6), name
    assert any(
        not torch.equal(weight, start[name])
        for name, weight in plain.policy.denoiser.state_dict().items()
    )


@pytest.mark.parametrize("options", [{"stochastic_steps": 2}, {"stochastic_steps": "all"}])
def test_more_steps_that_explore_share_nothing(make_env, make_model, options):
    model = make_model(make_env(16), **options)
    model.learn(16 * STEPS)
    assert model.rollout_buffer.same == 1
    assert model.policy.denoiser.network_evaluations == 16 * STEPS + model.rows_trained


def test_minibatches_hold_whole_groups(make_env, make_model):
    model = make_model(make_env(16), batch_size=11)
    model.learn(16 * STEPS)
    sizes = []
    for batch in model.rollout_buffer.get(11):
        latents = batch.observations["latents"].unflatten(0, (-1, batch.same))
        assert torch.equal(latents, latents[:, :1].expand_as(latents))
        parts = list(minibatch.split(batch, 1))
        assert [len(part.actions) for part in parts] == [SIZE] * (len(batch.actions) // SIZE)
        sizes.append(len(batch.actions))
    assert sizes == [8, 8]


def test_a_rollout_in_which_nothing_explored_has_no_minibatches(make_env, make_model):
    """Of a free schedule, whose episodes may all end before their step."""
    model = make_model(make_env(schedule="free", num_steps=STEPS))
    model.learn(8 * STEPS)
    buffer = model.rollout_buffer
    assert list(buffer.get(4))
    buffer["running"].fill_(False)
    assert not list(buffer.get(4))


REUSED = {"batch_size": 16, "reuse_forward": True}


def learned(make_model, make_env, rollouts=3, env=None, **options):
    """An agent that has learned from 16 trajectories a rollout, and its weights."""
    model = make_model(make_env(16, **(env or {})), **options)
    model.learn(rollouts * 16 * STEPS)
    return model, weights(model)


@pytest.mark.parametrize("step", range(STEPS))
def test_who_explores_in_a_step_comes_first(step):
    torch.manual_seed(0)
    turns = sharing.draw_turns(GROUPS, STEPS, 1, CPU)
    shared = sharing.in_rollout(turns, step, SIZE)
    found = sharing.exploring(turns, step, shared, SIZE)
    rows = shared.asked[found.first]
    explores = turns.steps[rows // SIZE] == step
    assert found.num == (turns.steps == step).sum() == explores.sum()
    assert explores[: found.num].all()
    assert torch.equal(found.groups, rows[: found.num] // SIZE)
    assert torch.equal(found.first.sort().values, torch.arange(len(shared.asked)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "kl", "divergence_coef": 0.1},
        {"credit": "global"},
        {"advantage": "gae", "credit": "local", "stochastic_steps": "one"},
        {"policy_kwargs": {"lora_rank": 2}},
        {"policy_kwargs": {"gradient_checkpointing": True}},
        {"policy_kwargs": {"precision": "bfloat16"}},
        {"env": {"solver_order": 2}},
        {"env": {"guidance_scale": 2.0}},
    ],
    ids=str,
)
def test_going_back_through_the_rollout_trains_the_same_student_for_less(
    make_env, make_model, options
):
    """Of each rollout's four groups one state each is asked about once, and not twice."""
    asked, expected = learned(make_model, make_env, **{**REUSED, **options, "reuse_forward": False})
    kept, found = learned(make_model, make_env, **REUSED, **options)
    # Batches of other sizes add up in another order; Adam makes a step of rounding where a
    # gradient is next to nothing, of 16 bits more often.
    start = learned(make_model, make_env, rollouts=0, **REUSED, **options)[1]
    coarse = "precision" in options.get("policy_kwargs", {})
    assert (found - expected).norm() < (0.5 if coarse else 0.01) * (expected - start).norm()
    assert kept.rows_trained == asked.rows_trained == 3 * 4
    evaluations = [model.policy.denoiser.network_evaluations for model in (asked, kept)]
    assert evaluations[0] - evaluations[1] == kept.rows_trained * kept.policy.denoiser.nfe
    assert (found - start).abs().max() > 1e-5


def test_what_is_kept_is_that_states_own(make_env, make_model, monkeypatch):
    """Negative control: what is said of other states is noticed."""
    _, expected = learned(make_model, make_env, **REUSED)
    keep = TorchRolloutBuffer.keep

    def mixed_up(self, groups, x0_pred):
        with torch.enable_grad():
            keep(self, groups, x0_pred.flip(0))

    monkeypatch.setattr(TorchRolloutBuffer, "keep", mixed_up)
    with pytest.raises(RatioError):
        learned(make_model, make_env, **REUSED)
    assert expected.isfinite().all()


def test_a_student_that_was_changed_since_is_asked_again(make_env, make_model):
    """And is refused: what it says is not what the rollout was drawn from."""
    model = make_model(make_env(16), **REUSED)

    def change(agent) -> None:
        with torch.no_grad():
            for weight in agent.policy.denoiser.network.parameters():
                weight.mul_(1.1)

    with pytest.raises(RatioError):
        model.learn(16 * STEPS, callback=OnRolloutEnd(change))


def test_activations_are_kept_until_the_update_alone(make_env, make_model):
    model, _ = learned(make_model, make_env, rollouts=1, learning_rate=0.0, **REUSED)
    batch = next(model.rollout_buffer.get(16))
    assert batch.kept is None
    copy.deepcopy(model.rollout_buffer)  # tensors with a graph can not be copied
    model.train()  # again: the student is asked
    assert model.updates == 2


@pytest.mark.parametrize("when", ["update", "backward"])
def test_a_rollout_that_does_not_fit_is_asked_again_in_parts(make_env, make_model, when):
    """Both passes may run out of memory; what was kept is not used then."""
    _, expected = learned(make_model, make_env, rollouts=1, **REUSED)
    model = make_model(make_env(16), **REUSED)
    limited = Limited(model, 1, when)
    with pytest.warns(UserWarning, match="out of memory"):
        model.learn(16 * STEPS)
    assert limited.refused
    assert model.micro_batch_size == 1
    assert torch.allclose(weights(model), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("argument", "options", "env"),
    [
        ("n_epochs", {"n_epochs": 2}, {}),
        ("batch_size", {"batch_size": 12}, {}),
        ("n_steps", {"n_steps": 2 * STEPS}, {}),
        ("stochastic_steps", {"stochastic_steps": "all"}, {}),
        ("micro_batch_size", {"micro_batch_size": 4}, {}),
        ("group_size", {"advantage": "batch", "stochastic_steps": "one"}, {"group_size": 1}),
        ("shard_student", {"policy_kwargs": {"shard_student": True}}, {}),
        ("reuse_forward", {}, {"schedule": "free", "num_steps": STEPS}),
    ],
)
def test_it_is_refused_where_the_student_is_not_the_same(
    make_env, make_model, argument, options, env
):
    with pytest.raises(InvalidArgumentError) as caught:
        make_model(make_env(16, **env), **{**REUSED, **options})
    assert caught.value.argument == argument
