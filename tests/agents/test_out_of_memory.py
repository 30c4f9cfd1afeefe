"""Out of memory: half as many rows at once, and the same gradients, figures and ledger."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from small_world import ITERATION, NUM_ENVS, PLAIN_EXPLORATION, weights

from agents import ReDiFPPO
from agents.guards import within_memory


class Limited:
    """Lets a network run out of memory beyond a number of rows, in its forward or backward pass.

    Args:
        model: Whose network.
        rows: The most that fit.
        when: `"update"`, only where gradients are computed, `"backward"`, only once they are, or
            `"always"`.
        later: Calls that fit whatever their size.
    """

    def __init__(self, model, rows, when="update", later=0) -> None:
        self.rows, self.when, self.later = rows, when, later
        self.refused = 0
        network = model.policy.denoiser.network
        network.register_forward_pre_hook(self.before)
        network.register_forward_hook(self.after)

    def before(self, network, args) -> None:
        if self.when == "always" or (self.when == "update" and torch.is_grad_enabled()):
            self.check(len(args[0]))

    def after(self, network, args, output) -> None:
        if self.when == "backward" and output[0].requires_grad:
            output[0].register_hook(lambda grad: self.check(len(grad)))

    def check(self, rows) -> None:
        self.later -= 1
        if rows > self.rows and self.later < 0:
            self.refused += 1
            raise torch.OutOfMemoryError(f"{rows} rows")


def rolled_out(make_model, **options):
    """An agent and a minibatch of a rollout that it has not been updated with."""
    model = make_model(batch_size=ITERATION, learning_rate=0.0, **{**PLAIN_EXPLORATION, **options})
    model.learn(ITERATION)
    return model, next(model.rollout_buffer.get(ITERATION))


def add_gradients(model, batch):
    counts = model.policy.network_evaluations
    work = lambda: model._add_gradients(batch, 0.2, None)  # noqa: E731
    statistics = within_memory(model, work, len(batch.actions))
    asked = [b - a for a, b in zip(counts, model.policy.network_evaluations, strict=True)]
    gradients = [p.grad.clone() for p in model.policy.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in gradients]), statistics, asked


@pytest.mark.parametrize(
    ("options", "when", "rows"),
    [
        ({}, "update", 5),
        ({}, "backward", 5),
        ({}, "update", 1),
        ({"advantage": "gae", "divergence": "kl"}, "backward", 5),
    ],
    ids=str,
)
def test_a_retried_minibatch_has_the_gradients_of_one_that_fits(make_model, options, when, rows):
    """24 rows: bit for bit those in parts of the size that was found, else but for rounding."""
    model, batch = rolled_out(make_model, **options)
    whole, _, asked = add_gradients(model, batch)
    limited = Limited(model, rows, when)
    with pytest.warns(UserWarning, match="out of memory"):
        retried, statistics, asked_again = add_gradients(model, batch)
    assert limited.refused == {5: 3, 1: 5}[rows]  # 24, 12, 6 | 3; or 24, 12, 6, 3, 2 | 1
    assert model.micro_batch_size == {5: 3, 1: 1}[rows]
    assert model.policy.denoiser.batch_size == model.micro_batch_size
    assert asked_again == asked  # what failed is in no ledger
    torch.testing.assert_close(retried, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitting, figures, _ = add_gradients(model, batch)
    assert torch.equal(retried, fitting)
    assert all(torch.equal(statistics[name], figures[name]) for name in figures)


def test_what_earlier_parts_left_behind_does_not_count_twice(make_model):
    """It fails in the third part: the gradients of the first two were there already."""
    model, batch = rolled_out(make_model, micro_batch_size=8)
    whole, *_ = add_gradients(model, batch)
    Limited(model, 4, later=2)
    with pytest.warns(UserWarning, match="micro_batch_size=4"):
        retried, *_ = add_gradients(model, batch)
    torch.testing.assert_close(retried, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    # negative control: without a fresh start they would
    assert (retried + whole * 2 / 3 - whole).abs().max() > 0.1 * whole.abs().max()


@pytest.mark.parametrize("when", ["update", "always"])
def test_training_goes_on_as_with_the_size_that_fits(make_model, when):
    """Rollouts too: noise is drawn after the network has answered, so none is drawn twice."""
    model = make_model(batch_size=ITERATION, **PLAIN_EXPLORATION)
    Limited(model, 6, when)
    with pytest.warns(UserWarning, match="out of memory"):
        model.learn(2 * ITERATION)
    found = {"update": 6, "always": 4}[when]
    assert model.micro_batch_size == found
    other = make_model(batch_size=ITERATION, micro_batch_size=found, **PLAIN_EXPLORATION)
    other.learn(2 * ITERATION)
    torch.testing.assert_close(weights(model), weights(other), rtol=0, atol=1e-5)
    assert model.policy.network_evaluations == other.policy.network_evaluations
    assert model.rows_trained == other.rows_trained


def test_shared_states_are_what_is_halved(make_model):
    """Of groups of four, a state each: 2 rows of the network, not 8 transitions."""
    model = make_model(batch_size=ITERATION)
    Limited(model, 1)
    with pytest.warns(UserWarning, match="micro_batch_size=1,"):
        model.learn(ITERATION)


def test_the_size_that_was_found_is_saved(make_model, tmp_path):
    model = make_model(batch_size=ITERATION, **PLAIN_EXPLORATION)
    Limited(model, 6)
    with pytest.warns(UserWarning, match="out of memory"):
        model.learn(ITERATION)
    clean = copy.deepcopy(model.policy.state_dict())
    model.policy.denoiser.network._forward_pre_hooks.clear()
    model.policy.denoiser.network._forward_hooks.clear()
    model.save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent")
    assert loaded.micro_batch_size == 6
    assert all(torch.equal(v, clean[k]) for k, v in loaded.policy.state_dict().items())


def test_one_row_that_does_not_fit_is_an_error(make_model):
    model = make_model(batch_size=ITERATION, **PLAIN_EXPLORATION)
    Limited(model, 0)
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        model.learn(ITERATION)
    assert model.micro_batch_size == 1


def test_other_errors_are_not_taken_for_it(make_model):
    """Negative control."""
    model = make_model(batch_size=ITERATION)

    def broken(network, args):
        raise RuntimeError("a defect")

    model.policy.denoiser.network.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError, match="a defect"):
        model.learn(NUM_ENVS)
    assert model.micro_batch_size is None
