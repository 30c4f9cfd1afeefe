"""The moving average of weights, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.averaging import update_average, warm_decay


@pytest.mark.parametrize(
    ("decay", "updates", "expected"),
    [
        (0.95, 0, 1 / 10),
        (0.95, 1, 2 / 11),
        (0.95, 8, 1 / 2),
        (0.95, 169, 170 / 179),  # the last one below 0.95
        (0.95, 170, 0.95),
        (0.95, 10**9, 0.95),
        (0.05, 0, 0.05),
        (0.0, 5, 0.0),
        (1.0, 8, 1 / 2),
    ],
)
def test_the_decay_warms_up(decay, updates, expected):
    assert warm_decay(decay, updates) == pytest.approx(expected)


def test_an_update_by_hand():
    averaged = [torch.tensor([1.0, -2.0]), torch.tensor([[8.0]])]
    trained = [torch.tensor([3.0, 0.0]), torch.tensor([[0.0]])]
    update_average(averaged, trained, 0.5, updates=0)  # a decay of 1 / 10
    torch.testing.assert_close(averaged[0], torch.tensor([2.8, -0.2]))
    torch.testing.assert_close(averaged[1], torch.tensor([[0.8]]))
    update_average(averaged, trained, 0.5, updates=1_000)
    torch.testing.assert_close(averaged[0], torch.tensor([2.9, -0.1]))
    torch.testing.assert_close(averaged[1], torch.tensor([[0.4]]))
    assert trained[0].tolist() == [3.0, 0.0]


def test_a_sequence_is_a_weighted_sum_of_what_was_trained():
    averaged, weights = [torch.zeros(1)], []
    for updates in range(1, 30):
        decay = min(0.9, (1 + updates) / (10 + updates))
        weights = [decay * weight for weight in weights] + [1 - decay]
        update_average(averaged, [torch.tensor([float(updates)])], 0.9, updates)
    expected = sum(weight * update for weight, update in zip(weights, range(1, 30), strict=True))
    assert averaged[0].item() == pytest.approx(expected, rel=1e-5)
    # of the start nothing is left, where without a warm-up 5 % of it would be
    assert sum(weights) == pytest.approx(1, abs=1e-6)
    assert 1 - 0.9**29 < 0.96


def test_parameters_are_changed_in_place_and_without_gradients():
    network, average = nn.Linear(2, 1), nn.Linear(2, 1)
    storage = average.weight.data_ptr()
    update_average(average.parameters(), network.parameters(), 0.0, updates=3)
    assert torch.equal(average.weight, network.weight)
    assert average.weight.data_ptr() == storage
    assert average.weight.grad_fn is None


def test_averages_of_other_shapes_are_refused():
    """Negative control: pairs are not matched by chance."""
    with pytest.raises(RuntimeError):
        update_average([torch.zeros(2)], [torch.zeros(3)], 0.5, 0)
