"""Distances between distributions: by hand, by leaving samples out, and by their gradients."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from redif_env import MSE, ReDiFScheduleVectorEnv, ReDiFVectorEnv
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import MMD, EnergyDistance, make_reward, online_terms
from redif_env.rewards.distributional import (
    Reference,
    discrepancy,
    energy_kernel,
    gaussian_kernel,
    mean_between_others,
    pseudo_values,
    pseudo_values_beside,
)


def wide_kernel(x, y):
    return gaussian_kernel(x, y, 1.3)


KERNELS = [energy_kernel, wide_kernel]
REWARDS = [EnergyDistance, MMD]


def column(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None]


def reference(kernel, y):
    return Reference(kernel, y, mean_between_others(kernel(y, y)))


@pytest.fixture
def samples(generator):
    """Nine student samples and seven teacher answers, of 2 x 3 elements."""
    x = torch.randn(9, 2, 3, generator=generator)
    return x, 0.5 + torch.randn(7, 2, 3, generator=generator)


def test_energy_by_hand():
    """Distances 1, 3, 2 among the samples, 2 between the answers; to the answers 1, 1, 2."""
    x, y = column(0, 1, 3), column(0, 2)
    assert float(discrepancy(energy_kernel, x, y)) == pytest.approx(2 * 4 / 3 - 2 - 2)
    assert pseudo_values(reference(energy_kernel, y), x).tolist() == pytest.approx([-2, 0, -2])
    scores = EnergyDistance()(x, y, None)
    assert scores.tolist() == pytest.approx([2, 0, 2])


def test_mmd_by_hand():
    x, y = column(0, 0, 2), column(0, 2)
    k = math.exp(-2)  # distance 2, bandwidth 1
    among = (1 + 2 * k) / 3
    expected = among + k - 2 * (1 + k) / 2
    scores = MMD(bandwidth=1.0)(x, y, None)
    assert float(scores.mean()) == pytest.approx(-expected)
    # without the third sample only equal ones are left: B = 1
    assert float(scores[2]) == pytest.approx(-(2 * k - 1 + k - (1 + k)))


def test_energy_is_scipys(generator):
    """Scipy gives the root of the biased estimate, whose means take in the zeros as well."""
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.randn(20, generator=generator), 1 + torch.randn(30, generator=generator)
    ours = float(discrepancy(energy_kernel, x[:, None].double(), y[:, None].double()))
    within = [mean_between_others(energy_kernel(v[:, None], v[:, None])) for v in (x, y)]
    biased = ours - float(within[0]) / 20 - float(within[1]) / 30
    assert biased == pytest.approx(stats.energy_distance(x.numpy(), y.numpy()) ** 2, rel=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_share_is_what_leaving_the_sample_out_changes(samples, kernel):
    x, y = (each.flatten(1).double() for each in samples)
    shares = pseudo_values(reference(kernel, y), x)
    whole = discrepancy(kernel, x, y)
    for row in range(len(x)):
        without = discrepancy(kernel, torch.cat([x[:row], x[row + 1 :]]), y)
        expected = len(x) * whole - (len(x) - 1) * without
        torch.testing.assert_close(shares[row], expected)
    torch.testing.assert_close(shares.mean(), whole)
    assert float(shares.std()) > 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_memory_serves_as_the_others(samples, kernel):
    x, y = (each.flatten(1) for each in samples)
    known = reference(kernel, y)
    shares = pseudo_values(known, x)
    for row in range(len(x)):
        others = torch.cat([x[:row], x[row + 1 :]])
        alone = pseudo_values_beside(known, x[row : row + 1], others)
        torch.testing.assert_close(alone[0], shares[row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_estimate_is_unbiased(generator, kernel):
    """Of the same distribution it is 0 on average, within four standard errors."""
    draws = torch.randn(2, 2000, 6, 3, generator=generator)
    values = torch.stack([discrepancy(kernel, x, y) for x, y in zip(*draws, strict=True)])
    error = float(values.std()) / math.sqrt(2000)
    assert abs(float(values.mean())) < 4 * error
    # negative control: with the diagonal it would not be
    pairs = zip(*draws, strict=True)
    biased = torch.stack([2 * kernel(x, x).mean() - 2 * kernel(x, y).mean() for x, y in pairs])
    assert float(biased.mean()) > 0.1


def test_the_score_function_gradient_is_that_of_the_distance(generator):
    r"""Student N(theta, 1) on a line: d/dtheta 2 E|x - y| = 2 (2 Phi(theta - y) - 1).

    E|x - x'| does not depend on theta. The estimate is the mean of score times reward.
    """
    theta, y = 0.4, column(-1.0, 0.0, 0.3)
    known = reference(energy_kernel, y)
    x = theta + torch.randn(6000, 8, generator=generator)
    shares = torch.stack([pseudo_values(known, batch[:, None]) for batch in x])
    estimates = ((x - theta) * shares).mean(1)
    exact = 2 * torch.erf((theta - y) / math.sqrt(2)).mean()
    error = float(estimates.std()) / math.sqrt(6000)
    assert abs(float(estimates.mean() - exact)) < 4 * error
    assert float(exact) > 20 * error
    # the distance itself, paid to every sample, has the same mean times n and more variance
    plain = (x - theta).mean(1) * shares.mean(1)
    assert float(plain.std()) * 8 > 1.5 * float(estimates.std())


@pytest.mark.parametrize("kind", REWARDS)
def test_a_missing_mode_pays_more_than_a_crowded_one(kind):
    """Teacher: half at -1, half at 1. The student is nearly always at -1."""
    y = column(*[-1.0] * 8, *[1.0] * 8)
    x = column(*[-1.0] * 15, 1.0)
    scores = kind()(x, y[:16], None)
    assert float(scores[15]) > float(scores[0]) + 0.1
    # negative control: where the student is balanced, neither does
    even = kind()(y, y, None)
    torch.testing.assert_close(even[0], even[15])


@pytest.mark.parametrize("kind", REWARDS)
def test_order_does_not_matter(samples, kind):
    x, y = samples
    scores = kind()(x, y, None)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kind()(x[order], y.flip(0), None), scores[order])


def test_the_bandwidth_is_the_median_distance():
    y = column(0, 1, 5)  # distances 1, 4, 5
    x = column(0, 2, 3)
    torch.testing.assert_close(MMD()(x, y, None), MMD(bandwidth=4.0)(x, y, None))
    assert not torch.allclose(MMD(bandwidth=1.0)(x, y, None), MMD(bandwidth=4.0)(x, y, None))


@pytest.mark.parametrize("kind", REWARDS)
def test_a_reference_replaces_the_answers_of_the_batch(samples, kind):
    x, y = samples
    torch.testing.assert_close(kind(reference=y)(x, x, None), kind()(x, y, None))
    assert not torch.allclose(kind(reference=y)(x, x, None), kind()(x, x, None), atol=1e-3)


class Halves(nn.Module):
    """The first elements, times a weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.flatten(1)[:, :2]


@pytest.mark.parametrize("kind", REWARDS)
def test_features(samples, kind):
    x, y = samples
    module = Halves()
    reward = kind(features=module)
    expected = kind()(x.flatten(1)[:, :2], y.flatten(1)[:, :2], None)
    torch.testing.assert_close(reward(x, y, None), expected)
    torch.testing.assert_close(kind(features=lambda x: x.flatten(1)[:, :2])(x, y, None), expected)
    with torch.no_grad():
        module.scale.fill_(3.0)  # trained on: the reward keeps its copy
    torch.testing.assert_close(reward(x, y, None), expected)
    assert not reward(x.requires_grad_(), y, None).requires_grad


@pytest.mark.parametrize("kind", REWARDS)
def test_a_memory_changes_in_update_alone(samples, kind):
    x, y = samples
    reward = kind(reference=y, memory=6)
    assert reward(x, x, None).tolist() == [0] * 9  # nothing is known of the student yet
    figures = reward.update(x[:4], y[:4], None)
    assert figures["memory"] == 4
    reward.update(x[4:], y, None)
    scores = reward(x, x, None)
    assert torch.equal(reward(x, x, None), scores)
    for row in range(9):  # and rows are alone
        alone = reward(x[row : row + 1], x[row : row + 1], None)
        torch.testing.assert_close(alone[0], scores[row], rtol=1e-5, atol=1e-6)
    fresh = kind(reference=y, memory=6)
    fresh.update(x[3:], y, None)  # the last six are the same
    torch.testing.assert_close(fresh(x, x, None), scores)
    fresh.update(y[:6], y, None)
    assert not torch.allclose(fresh(x, x, None), scores, atol=1e-3)


def test_the_memorys_figure_is_the_distance(samples):
    x, y = samples
    figures = EnergyDistance(reference=y, memory=9).update(x, x, None)
    expected = discrepancy(energy_kernel, x.flatten(1), y.flatten(1))
    assert figures["estimate"] == pytest.approx(float(expected), rel=1e-5)


def test_a_memory_is_saved(samples, tmp_path):
    x, y = samples
    reward = EnergyDistance(reference=y, memory=6)
    reward.update(x, y, None)
    torch.save(reward.state_dict(), tmp_path / "state.pt")
    again = EnergyDistance(reference=y, memory=6)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(again(x, y, None), reward(x, y, None))


@pytest.mark.parametrize("kind", REWARDS)
def test_a_memory_without_a_reference_scores_each_row_alone(samples, kind):
    x, y = samples
    reward = kind(memory=len(x))
    assert not reward(x[:1], y[:1], None).any()
    reward.update(x, y, None)
    together = reward(x, y, None)
    alone = torch.cat([reward(x[i : i + 1], y[i : i + 1], None) for i in range(len(x))])
    torch.testing.assert_close(alone, together)
    given = kind(reference=y, memory=len(x))
    given.update(x, y, None)
    torch.testing.assert_close(together, given(x, y, None))
    again = kind(memory=len(x))
    again.load_state_dict(reward.state_dict())
    assert torch.equal(again(x, y, None), together)


def test_a_memory_keeps_no_more_than_it_holds(samples):
    x, y = samples
    reward = EnergyDistance(memory=2)
    reward.update(x.repeat(100, 1, 1), y.repeat(100, 1, 1), None)
    assert reward.state_dict()["memory"].untyped_storage().nbytes() == 2 * x[0].numel() * 4


@pytest.mark.parametrize(
    ("options", "nfe"), [({}, 2), ({"reference": True}, 1), ({"memory": 8}, 3)], ids=str
)
def test_networks_of_features_are_counted(samples, options, nfe):
    """Of a sample, of its answer, and again where they are remembered."""
    x, y = samples
    calls = []
    options = {**options, "reference": y} if "reference" in options else options
    reward = EnergyDistance(features=torch.nn.Flatten(), **options)
    reward.features.register_forward_hook(lambda *_: calls.append(1))
    reward(x, y, None)
    calls.clear()  # of what a reference takes once
    reward(x, y, None)
    reward.update(x, y, None)
    assert len(calls) == reward.nfe == nfe


@pytest.mark.parametrize("kind", REWARDS)
def test_nan_is_not_hidden(samples, kind):
    x, y = samples
    x[2, 0, 0] = torch.nan
    assert not bool(kind()(x, y, None).isfinite().all())


def test_by_name(samples):
    x, y = samples
    for name, kind in (("energy_distance", EnergyDistance), ("mmd", MMD)):
        assert torch.equal(make_reward(name)(x, y, None), kind()(x, y, None))


def test_rows_must_end_together(teacher, bank):
    """Rows under way would count as samples of the student."""
    mixed = MSE() + 0.1 * EnergyDistance()
    for make in (ReDiFVectorEnv, ReDiFScheduleVectorEnv):
        with pytest.raises(InvalidArgumentError, match=r"energy_distance'.*fixed schedule"):
            make(4, teacher, reward=mixed, bank=bank)
    ReDiFVectorEnv(4, teacher, reward=EnergyDistance(memory=8), bank=bank)
    for make in (ReDiFVectorEnv, ReDiFScheduleVectorEnv):  # all of one length
        steps = {"max_steps" if make is ReDiFScheduleVectorEnv else "num_steps": 2, "min_steps": 2}
        make(4, teacher, reward=mixed, bank=bank, **steps)
    env = ReDiFVectorEnv(4, teacher, reward=mixed, bank=bank, schedule=[500])
    env.reset(seed=0)
    _, rewards, *_ = env.step(torch.zeros(4, 64))
    assert bool(rewards.isfinite().all())


def test_online_terms_are_found_in_sums():
    energy, mmd = EnergyDistance(), MMD()
    assert online_terms(MSE() + 0.5 * (energy + MSE()) + mmd + energy) == [energy, mmd]
    assert online_terms(MSE()) == []


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"features": 3}, r"features=3.*function or module"),
        ({"reference": torch.zeros(1, 2)}, "reference=.*two teacher answers"),
        ({"reference": "bank"}, "reference='bank'"),
        ({"memory": -1}, "memory=-1"),
        ({"memory": 0.5}, r"memory=0\.5"),
    ],
)
@pytest.mark.parametrize("kind", REWARDS)
def test_bad_arguments(kind, arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        kind(**arguments)


def test_a_bandwidth_is_positive():
    with pytest.raises(InvalidArgumentError, match="bandwidth=0"):
        MMD(bandwidth=0)


def test_bad_calls(samples):
    x, y = samples
    with pytest.raises(InvalidArgumentError, match=r"x_0='2 rows'.*more environments"):
        EnergyDistance()(x[:2], y, None)
    with pytest.raises(InvalidArgumentError, match="teacher_x_0='1 rows'"):
        EnergyDistance()(x, y[:1], None)
    for features in (lambda x: x.mean(), lambda x: x.flatten()[:9], lambda x: x[:4].flatten(1)):
        with pytest.raises(InvalidArgumentError, match=r"features\(x_0\)="):
            EnergyDistance(features=features)(x, y, None)
