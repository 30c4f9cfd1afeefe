"""The tripwire itself: it must go off, and only when it should."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from tripwire import Tripwire, TripwireError, arm, count_reads, disarm


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: np.add(1, x),
        lambda x: x.cpu(),
        lambda x: x.detach().cpu().numpy(),
        lambda x: np.from_dlpack(x),
    ],
)
def test_conversions_raise(convert):
    with pytest.raises(TripwireError, match="was called"):
        convert(arm(torch.ones(2)))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x + 1,
        lambda x: torch.ones(2) * x,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: torch.ones(3)[(x > 0).long()],
        lambda x: torch.cat([torch.zeros(1), x]),
        lambda x: torch.zeros(2).add_(x),
        lambda x: x.reshape(1, 2)[:, 0],
        lambda x: F.linear(x, torch.ones(3, 2)),
        lambda x: torch.stack([x, x]).unbind()[1],
        lambda x: torch.as_tensor(x).to(torch.float64),
    ],
)
def test_results_are_armed(compute):
    assert isinstance(compute(arm(torch.ones(2))), Tripwire)


def test_containers_are_armed():
    value = arm({"a": (torch.ones(1), 3), "b": torch.ones(1)})
    assert isinstance(value["a"][0], Tripwire)
    assert isinstance(value["b"], Tripwire)
    assert value["a"][1] == 3


def test_reads_are_counted():
    x = arm(torch.ones(2))
    with count_reads() as reads:
        _ = x + 1
        assert bool(x[0] > 0)
        assert float(x[0]) == 1.0
        assert x.tolist() == [1.0, 1.0]
    assert reads == [3]


def test_a_disarmed_tensor_can_be_looked_at():
    plain = disarm(arm(torch.ones(2)))
    assert type(plain) is torch.Tensor
    assert plain.numpy().sum() == 2
