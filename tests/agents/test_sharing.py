"""Rows in one state: who they are, that they are, and that asking once changes nothing but cost."""

from __future__ import annotations

import pytest
import torch

from agents import minibatch, ppo, sharing

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
