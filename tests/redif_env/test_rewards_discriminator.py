"""The discriminator: its losses by hand, the density ratio it must find, and how it is trained."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from redif_env.errors import InvalidArgumentError
from redif_env.rewards import Discriminator
from redif_env.rewards.discriminator import (
    ProjectionNetwork,
    gradient_penalty,
    logistic_loss,
)


class Line(nn.Module):
    """f(x) = w x + b on a line."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1)

    def forward(self, x_0):
        return self.linear(x_0).squeeze(1)


def train(reward, student, teacher, condition=None, times=1):
    for _ in range(times):
        figures = reward.update(student, teacher, condition)
    return figures


def test_the_loss_by_hand():
    zero = torch.zeros(3)
    assert float(logistic_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    loss = logistic_loss(torch.tensor([1.0, 3.0]), torch.tensor([-2.0]))
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2 + math.log1p(math.exp(-2))
    assert float(loss) == pytest.approx(expected)


def test_the_penalty_by_hand(generator):
    """F = 3 u + u v^2: gradient (3 + v^2, 2 u v)."""
    samples = torch.tensor([[1.0, 0.0], [2.0, 1.0]], requires_grad=True)
    u, v = samples.unbind(1)
    penalty = gradient_penalty(3 * u + u * v**2, samples)
    assert float(penalty.detach()) == pytest.approx((9 + (16 + 16)) / 2)


def test_it_finds_the_density_ratio(generator):
    """N(m, 1) against N(-m, 1): log ratio 2 m x, and -KL = -2 m^2 on average over the student."""
    m = 0.5
    teacher = m + torch.randn(4000, 1, generator=generator)
    student = -m + torch.randn(4000, 1, generator=generator)
    reward = Discriminator(
        (1,), network=Line(), penalty=0.0, batch_size=1000, n_epochs=1, learning_rate=0.02
    )
    train(reward, student, teacher, times=60)
    weight, bias = (float(p.detach()) for p in reward.network.linear.parameters())
    # the weight's standard error is about sqrt(4 / 4000) = 0.03
    assert weight == pytest.approx(2 * m, abs=0.1)
    assert bias == pytest.approx(0, abs=0.1)
    logits = reward(student, teacher, None)
    torch.testing.assert_close(logits, weight * student[:, 0] + bias)
    assert float(logits.mean()) == pytest.approx(-2 * m**2, abs=0.1)
    odds = torch.sigmoid(logits)
    torch.testing.assert_close(odds.log() - (1 - odds).log(), logits, rtol=1e-4, atol=1e-5)


def test_it_learns_what_differs_and_nothing_where_nothing_does(bank, generator):
    answers, other = bank.teacher_x_0[:16], bank.teacher_x_0[16:]
    blurred = nn.functional.avg_pool2d(other, 3, stride=1, padding=1)
    reward = Discriminator((1, 8, 8), batch_size=16)
    figures = train(reward, blurred, answers, times=30)
    assert figures["accuracy"] > 0.9
    assert float((reward(answers, answers, None) - reward(blurred, answers, None)).mean()) > 1
    # the same samples on both sides: chance
    same = Discriminator((1, 8, 8), batch_size=16)
    figures = train(same, answers, answers, times=30)
    assert figures["accuracy"] == pytest.approx(0.5)
    assert figures["loss"] == pytest.approx(2 * math.log(2), abs=1e-2)


def test_classes_are_told_apart_only_if_it_knows_them(generator):
    """Class 0: teacher at 1, student at -1; class 1 the other way round; together all are equal."""
    condition = torch.arange(200) % 2
    teacher = (1 - 2 * condition)[:, None] + 0.1 * torch.randn(200, 1, generator=generator)
    student = -teacher
    knows = Discriminator((1,), num_classes=2, learning_rate=5e-3, penalty=0.1)
    assert train(knows, student, teacher, condition, times=30)["accuracy"] > 0.95
    ignores = Discriminator((1,), learning_rate=5e-3, penalty=0.1)
    assert train(ignores, student, teacher, condition, times=30)["accuracy"] < 0.6
    swapped = knows(teacher, teacher, 1 - condition)
    assert float(knows(teacher, teacher, condition).mean() - swapped.mean()) > 2


def test_a_penalty_bounds_the_slope(generator):
    teacher = 2 + 0.01 * torch.randn(64, 1, generator=generator)

    def slope(penalty):
        torch.manual_seed(0)
        reward = Discriminator((1,), network=Line(), penalty=penalty, learning_rate=0.1)
        train(reward, -teacher, teacher, times=200)
        return float(reward.network.linear.weight.detach())

    # With logits +-2 w, 2 log(1 + exp(-2 w)) + w^2 gamma / 2 is least where its derivative is 0.
    w = slope(1.0)
    assert w - 4 / (1 + math.exp(2 * w)) == pytest.approx(0, abs=0.05)
    assert slope(0.0) > 2 * w


@pytest.mark.parametrize(
    ("shape", "classes"), [((1, 8, 8), None), ((3, 16, 20), 4), ((2, 3), 3), ((7,), None)]
)
def test_networks_for_any_shape(generator, shape, classes):
    network = ProjectionNetwork(shape, classes)
    x = torch.randn(5, *shape, generator=generator)
    condition = None if classes is None else torch.arange(5) % classes
    together = network(x, condition)
    assert together.shape == (5,)
    for row in range(5):  # nothing is normalised over the batch
        own = None if condition is None else condition[row : row + 1]
        torch.testing.assert_close(network(x[row : row + 1], own)[0], together[row])


def test_scoring_changes_nothing_and_has_no_gradient(bank):
    reward = Discriminator((1, 8, 8))
    before = reward.state_dict()["network"]
    scores = reward(bank.x_T.clone().requires_grad_(), bank.teacher_x_0, None)
    assert torch.equal(reward(bank.x_T, bank.teacher_x_0, None), scores)
    assert not scores.requires_grad
    after = reward.state_dict()["network"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    reward.update(bank.x_T, bank.teacher_x_0, None)
    assert not torch.equal(reward(bank.x_T, bank.teacher_x_0, None), scores)


def test_global_randomness_is_left_alone(bank):
    before = torch.get_rng_state()
    reward = Discriminator((1, 8, 8))
    with torch.no_grad():  # as a callback may run
        reward.update(bank.x_T, bank.teacher_x_0, None)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    again = Discriminator((1, 8, 8))
    again.update(bank.x_T, bank.teacher_x_0, None)
    scores = reward(bank.x_T, bank.x_T, None)
    assert torch.equal(again(bank.x_T, bank.x_T, None), scores)
    other = Discriminator((1, 8, 8), seed=1)
    assert not torch.equal(other(bank.x_T, bank.x_T, None), scores)


def test_training_goes_on_after_loading_as_if_nothing_had_happened(bank, tmp_path):
    def scores(reward, times):
        train(reward, bank.x_T, bank.teacher_x_0, bank.condition, times)
        return reward(bank.x_T, bank.x_T, bank.condition)

    def make(seed=0):
        return Discriminator((1, 8, 8), 10, batch_size=8, seed=seed)

    first = make()
    scores(first, 2)
    torch.save(first.state_dict(), tmp_path / "reward.pt")
    expected = scores(first, 2)
    second = make(seed=5)
    second.load_state_dict(torch.load(tmp_path / "reward.pt", weights_only=True))
    assert second.updates == 2 * 2 * 4
    assert torch.equal(scores(second, 2), expected)
    # negative control: weights alone are not enough
    third = make(seed=5)
    third.network.load_state_dict(torch.load(tmp_path / "reward.pt")["network"])
    assert not torch.equal(scores(third, 2), expected)


def test_a_state_is_a_copy(bank):
    reward = Discriminator((1, 8, 8))
    reward.update(bank.x_T, bank.teacher_x_0, None)
    state = reward.state_dict()
    kept = {name: value.clone() for name, value in state["network"].items()}
    reward.update(bank.x_T, bank.teacher_x_0, None)
    assert all(torch.equal(state["network"][name], kept[name]) for name in kept)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"network": 3}, "network=3.*module"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"penalty": -1}, "penalty=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_epochs": 0}, "n_epochs=0"),
        ({"seed": -1}, "seed=-1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Discriminator((1, 8, 8), **options)


def test_bad_calls(bank):
    with pytest.raises(InvalidArgumentError, match=r"condition=None.*num_classes"):
        Discriminator((1, 8, 8), 10)(bank.x_T, bank.x_T, None)
    flat = Discriminator((1, 8, 8), network=nn.Sequential(nn.Flatten(), nn.Linear(64, 1)))
    with pytest.raises(InvalidArgumentError, match=r"network\(x_0\)=\(32, 1\).*\(32,\)"):
        flat(bank.x_T, bank.x_T, None)


def test_no_rows_change_nothing(bank):
    """As when no episode of a free schedule has ended: a step on none makes all weights NaN."""
    reward = Discriminator((1, 8, 8))
    before = reward(bank.x_T, bank.x_T, None)
    assert reward.update(bank.x_T[:0], bank.x_T[:0], None) == {}
    assert torch.equal(reward(bank.x_T, bank.x_T, None), before)
    assert reward.updates == 0
