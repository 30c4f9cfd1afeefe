"""Figures with counts: oracles (scipy, torchmetrics, scikit-learn, loops), properties, controls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from agents import frechet, metrics
from agents.diversity import label_balance, recalled
from agents.intervals import Draws, resample
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import distributional
from redif_env.rewards.distributional import MMD, energy_kernel, polynomial_kernel

DIM = 6


class Flat(nn.Module):
    """Features that are the images."""

    num_features = DIM

    def forward(self, images):
        return images.flatten(1)


def draw(generator, num=80, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(num, DIM, generator=generator)


def value(statistic, num, num_reference):
    return float(metrics.estimate(statistic, num, num_reference, torch.device("cpu")))


def all_statistics(x, y):
    labels = [rows[:, 0].gt(0).long() + rows[:, 1].gt(0).long() for rows in (x, y)]
    return {
        "mean": metrics.mean(x[:, 0]),
        "frechet": metrics.frechet_distance(x, y),
        "kid": metrics.discrepancy(polynomial_kernel, x, y),
        "energy": metrics.discrepancy(energy_kernel, x, y),
        "sliced": metrics.sliced_wasserstein(x, y, 16),
        "balance": metrics.class_balance(*labels),
        **metrics.neighbourhoods(x, y, 3),
    }


def test_frechet_is_torchmetrics(generator):
    x, y = draw(generator, 80, 0.3, 1.5), draw(generator, 60)
    metric = FrechetInceptionDistance(Flat(), normalize=True).set_dtype(torch.float64)
    metric.update(x[:, :, None, None].double(), real=False)
    metric.update(y[:, :, None, None].double(), real=True)
    assert value(metrics.frechet_distance(x, y), 80, 60) == pytest.approx(float(metric.compute()))


def test_frechet_stands_far_offsets_and_singular_covariances(generator):
    """Fewer rows than features, and a mean of 1e4: covariances must not cancel."""
    x = draw(generator, 4)
    shifted = value(metrics.frechet_distance(x + 1e4, x + 1e4), 4, 4)
    assert shifted == pytest.approx(0, abs=1e-5)  # float32 keeps 1e-3 of 1e4
    away = value(metrics.frechet_distance(x.double() + 1e4, x), 4, 4)
    assert away == pytest.approx(DIM * 1e8, rel=1e-9)


def test_kid_is_torchmetrics(generator):
    x, y = draw(generator, 50, 0.2), draw(generator, 50)
    metric = KernelInceptionDistance(Flat(), subsets=1, subset_size=50, normalize=True)
    metric.update(x[:, :, None, None], real=False)
    metric.update(y[:, :, None, None], real=True)
    ours = value(metrics.discrepancy(polynomial_kernel, x, y), 50, 50)
    assert ours == pytest.approx(float(metric.compute()[0]), rel=1e-4)  # theirs is float32


@pytest.mark.parametrize("name", ["energy", "mmd", "kid"])
def test_discrepancies_are_those_of_the_rewards(name, generator):
    x, y = draw(generator, 40, 0.2).double(), draw(generator, 50).double()
    kernel = {
        "energy": energy_kernel,
        "mmd": MMD().fit_kernel(y),
        "kid": polynomial_kernel,
    }[name]
    ours = value(metrics.discrepancy(kernel, x, y), 40, 50)
    assert ours == pytest.approx(float(distributional.discrepancy(kernel, x, y)), rel=1e-9)


def test_sliced_wasserstein_is_the_mean_of_scipys(generator):
    x, y = draw(generator, 30, 0.2)[:, :2], draw(generator, 50)[:, :2]
    directions = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    counts, other = resample(1, 30, generator), resample(1, 50, generator)
    theirs = [
        stats.wasserstein_distance(x.double() @ way, y.double() @ way, counts[0], other[0])
        for way in directions
    ]
    ours = metrics.sliced_wasserstein(x, y, 8)(counts, other)
    assert float(ours) == pytest.approx(np.mean(theirs))


def test_sliced_wasserstein_of_a_shift(generator):
    """|shift| times the mean of |cos|, 2 / pi in the plane: 64 directions know it to 6 %."""
    x = torch.randn(200, 2, generator=generator)
    distance = value(metrics.sliced_wasserstein(x + torch.tensor([3.0, 4.0]), x), 200, 200)
    assert distance == pytest.approx(5 * 2 / math.pi, rel=0.15)
    assert value(metrics.sliced_wasserstein(x, x.flip(0)), 200, 200) == pytest.approx(0, abs=1e-9)
    with pytest.raises(InvalidArgumentError, match="pass rows of 2"):
        metrics.sliced_wasserstein(x, x[:, :1])


def test_neighbourhoods_are_those_of_the_papers(generator):
    """With scikit-learn's neighbours, written as in the reference code of Naeem et al. 2020."""
    x, y = draw(generator, 60, 0.5, 0.7), draw(generator, 50)
    k = 3
    own_x = NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, k]
    own_y = NearestNeighbors(n_neighbors=k + 1).fit(y).kneighbors(y)[0][:, k]
    across = np.linalg.norm(y[:, None].numpy() - x[None].numpy(), axis=2)
    expected = {
        "precision": (across < own_y[:, None]).any(0).mean(),
        "recall": (across < own_x[None]).any(1).mean(),
        "density": (across < own_y[:, None]).sum(0).mean() / k,
        "coverage": (across.min(1) < own_y).mean(),
    }
    found = metrics.neighbourhoods(x, y, k)
    assert {name: value(each, 60, 50) for name, each in found.items()} == pytest.approx(expected)
    assert expected["recall"] == pytest.approx(float(recalled(x, y, k).mean()))
    assert 0.1 < expected["recall"] < expected["coverage"] < expected["precision"] <= 1


def test_precision_and_density_do_not_see_collapse_and_recall_does(generator):
    """Copies of the middle: why precision and density are not ranked."""
    reference = draw(generator, 300)
    whole, collapsed = draw(generator, 300), 0.3 * draw(generator, 300)
    figures = [
        {n: value(s, 300, 300) for n, s in metrics.neighbourhoods(x, reference, 5).items()}
        for x in (whole, collapsed)
    ]
    assert figures[1]["precision"] >= figures[0]["precision"]
    assert figures[1]["density"] > 1.3 * figures[0]["density"]
    assert figures[1]["recall"] < 0.2 * figures[0]["recall"]


def test_class_balance_is_the_one_of_the_alarm():
    labels, reference = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 2])
    assert value(metrics.class_balance(labels, reference), 4, 4) == pytest.approx(0.5)
    assert float(label_balance(labels, reference)) == pytest.approx(0.5)


def test_counts_mean_repeated_rows(generator):
    """But for pairs of copies, which discrepancies leave out, and balls, which are kept."""
    x, y = draw(generator, 30, 0.2), draw(generator, 25)
    counts, other = resample(3, 30, generator), resample(3, 25, generator)
    drawn = all_statistics(x, y)
    for b in range(3):
        x_b, y_b = (
            rows.repeat_interleave(number[b].long(), 0)
            for rows, number in ((x, counts), (y, other))
        )
        repeated = all_statistics(x_b, y_b)
        for name in ("mean", "frechet", "sliced", "balance"):
            found = float(drawn[name](counts, other)[b])
            assert found == pytest.approx(value(repeated[name], 30, 25), rel=1e-6), name


@pytest.mark.parametrize("name", ["kid", "energy"])
def test_resamples_of_a_discrepancy_are_not_biased(name, generator):
    """With copies among the pairs, resamples of the same distribution would look far apart."""
    x, y = draw(generator), draw(generator)
    drawn = all_statistics(x, y)[name](resample(1000, 80, generator), resample(1000, 80, generator))
    figure = value(all_statistics(x, y)[name], 80, 80)
    assert abs(float(drawn.mean()) - figure) < 0.2 * float(drawn.std())


def test_a_resample_does_not_depend_on_the_others(generator):
    x, y = draw(generator, 40), draw(generator, 30)
    counts, other = resample(50, 40, generator), resample(50, 30, generator)
    for name, statistic in all_statistics(x, y).items():
        rows = [7, 23]
        torch.testing.assert_close(
            statistic(counts, other)[rows], statistic(counts[rows], other[rows]), msg=name
        )


def test_distances_grow_with_the_distance_and_shares_fall(generator):
    y = draw(generator, 200)
    near, far = (all_statistics(draw(generator, 200, s), y) for s in (0.0, 1.5))
    for name in ("frechet", "kid", "energy", "sliced"):
        assert value(far[name], 200, 200) > 2 * abs(value(near[name], 200, 200)), name
    for name in ("precision", "recall", "density", "coverage", "balance"):
        assert value(far[name], 200, 200) < value(near[name], 200, 200), name


def test_many_rows_are_cut_where_pairs_are_looked_at(generator, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_PAIRWISE", 20)
    x, y = draw(generator, 40), draw(generator, 30)
    counts, other = resample(5, 40, generator), resample(5, 30, generator)
    cut = all_statistics(x[:20], y[:20])
    for name, statistic in all_statistics(x, y).items():
        if name not in ("mean", "frechet", "sliced", "balance"):
            torch.testing.assert_close(
                statistic(counts, other), cut[name](counts[:, :20], other[:, :20])
            )


@pytest.mark.slow
def test_intervals_cover_the_expectation(generator):
    """Of two Gaussians, at the same number of rows; the expectation by 400 fresh draws.

    300 repeats know a coverage of 95 % to 1.3 %. Shares of balls are covered more often, because
    resamples lose samples that hold up a ball; none may be covered less than 90 %.
    """

    def sets():
        return draw(generator, 100, 0.3, 1.1), draw(generator, 100)

    fresh = [
        {name: value(each, 100, 100) for name, each in all_statistics(*sets()).items()}
        for _ in range(400)
    ]
    expected = {name: np.mean([row[name] for row in fresh]) for name in fresh[0]}
    hits = dict.fromkeys(expected, 0)
    for _ in range(300):
        counts, other = (resample(300, 100, generator) for _ in range(2))
        for name, statistic in all_statistics(*sets()).items():
            figure = metrics.estimate(statistic, 100, 100, torch.device("cpu"))
            interval = Draws.of(figure[None], statistic(counts, other)[None]).interval()
            hits[name] += interval.low <= expected[name] <= interval.high
    rates = {name: number / 300 for name, number in hits.items()}
    print(rates)
    assert min(rates.values()) > 0.9, rates
    for name in ("mean", "frechet", "kid", "energy", "balance"):
        assert rates[name] < 0.99, rates  # no wider than it need be


def test_moments_are_torchs(generator):
    x = draw(generator, 20)
    ours = frechet.moments(x)
    torch.testing.assert_close(ours.covariance[0], x.double().T.cov())
    torch.testing.assert_close(ours.mean[0], x.double().mean(0))
