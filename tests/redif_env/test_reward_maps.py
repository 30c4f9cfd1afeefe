"""Maps of other resolutions, and sums of rewards with and without maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from redif_env import MSE, Cosine, Reward
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import evaluate, fit_map


class Patches(Reward):
    """Minus the squared error, averaged over 4x4 patches."""

    has_map = True

    def __call__(self, x_0, teacher_x_0, condition):
        return self.reward_map(x_0, teacher_x_0, condition).flatten(1).mean(1)

    def reward_map(self, x_0, teacher_x_0, condition):
        return -functional.avg_pool2d((x_0 - teacher_x_0) ** 2, 4)


@pytest.fixture
def pair(generator):
    return torch.randn(2, 3, 1, 8, 8, generator=generator).unbind()


def test_a_map_on_the_right_grid_is_left_alone(generator):
    reward_map = torch.randn(2, 3, 8, 8, generator=generator)
    assert fit_map(reward_map, (3, 8, 8)) is reward_map


def test_finer_maps_are_averaged_over_area():
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    coarse = fit_map(fine, (1, 2, 2))
    assert coarse.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_coarser_maps_are_repeated():
    coarse = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    fine = fit_map(coarse, (1, 4, 4))
    assert fine[0, 0, 0].tolist() == [1, 1, 2, 2]
    assert fine[0, 0, 3].tolist() == [3, 3, 4, 4]


def test_other_channels_are_averaged_and_spread(generator):
    reward_map = torch.randn(2, 3, 8, 8, generator=generator)
    fitted = fit_map(reward_map, (4, 8, 8))
    assert fitted.shape == (2, 4, 8, 8)
    torch.testing.assert_close(fitted[:, 2], reward_map.mean(1))


def test_the_radius_is_a_neighbourhood():
    reward_map = torch.zeros(1, 1, 5, 5)
    reward_map[0, 0, 2, 2] = 9.0
    blurred = fit_map(reward_map, (1, 5, 5), radius=1)[0, 0]
    assert blurred[1:4, 1:4].tolist() == [[1.0] * 3] * 3
    assert float(blurred[0].abs().sum()) == 0
    # at the border only places inside count: a constant map stays constant
    constant = torch.ones(1, 1, 5, 5)
    torch.testing.assert_close(fit_map(constant, (1, 5, 5), radius=2), constant)


def test_maps_that_are_no_images_must_fit():
    with pytest.raises(InvalidArgumentError, match="reward_map"):
        fit_map(torch.zeros(2, 5), (7,))


def test_a_sum_keeps_its_value_whatever_the_terms(pair):
    mapped = 0.5 * MSE()(*pair, None) + 2 * Patches()(*pair, None)
    values, reward_map = evaluate(0.5 * MSE() + 2 * Patches() + Cosine(), *pair, None)
    torch.testing.assert_close(values, mapped + Cosine()(*pair, None))
    whole = mapped + 64 * Cosine()(*pair, None)
    torch.testing.assert_close(reward_map.flatten(1).mean(1), whole)


def test_a_term_without_a_map_counts_the_same_everywhere(pair):
    with_term = evaluate(MSE() + Cosine(), *pair, None)[1]
    without = evaluate(MSE(), *pair, None)[1]
    difference = (with_term - without).flatten(1)
    torch.testing.assert_close(difference, 64 * Cosine()(*pair, None)[:, None].expand(-1, 64))


class Blind(Reward):
    """The paired error without its map."""

    def __call__(self, x_0, teacher_x_0, condition):
        return MSE()(x_0, teacher_x_0, condition)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_local_credit_climbs_the_sum_as_it_is_weighted(generator, weight):
    """The same reward with and without its map: what the elements' own noise learns of each.

    The score-function gradient of an element's credit is `E[credit_d noise_d] / std`. For the
    squared error it is `-2 error_d`, with its map and without. Opposite noise cancels the even
    orders. The largest standard error is 2 |errors| sqrt(2) (1 + weight) / sqrt(pairs), 0.05 here.
    """
    error, std = torch.tensor([0.5, -1.0, 2.0, 0.0]).reshape(1, 1, 2, 2), 0.1
    noise = torch.randn(400_000, 1, 2, 2, generator=generator)
    answer = torch.zeros_like(noise)

    def learnt(reward):
        plus, minus = (
            evaluate(reward, error + sign * std * noise, answer, None)[1] for sign in (1, -1)
        )
        return ((plus - minus) * noise).mean(0, keepdim=True) / (2 * std)

    torch.testing.assert_close(learnt(MSE()), -2 * error, atol=0.1, rtol=0)
    both = learnt(MSE() + weight * Blind())
    torch.testing.assert_close(both, -2 * error * (1 + weight), atol=0.2, rtol=0)
    assert not torch.allclose(both, -2 * error * (1 + weight / 4), atol=1)
