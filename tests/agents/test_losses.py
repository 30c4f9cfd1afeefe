"""PPO's losses against the exact policy gradient, torch's own distributions, and arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from agents.losses import (
    approximate_kl,
    clip_fraction,
    effective_sample_size,
    reduce_log_ratio,
    surrogate,
    value_loss,
)
from redif_env.transition import Gaussian, log_ratio_map

ROWS, DIM, INPUTS = 6, 4, 3


class LinearPolicy:
    """mean = inputs @ weight, with a std a row, and actions drawn from it."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(ROWS, INPUTS, generator=generator)
        self.weight = torch.randn(INPUTS, DIM, generator=generator).requires_grad_()
        self.std = torch.rand(ROWS, 1, generator=generator) + 0.5
        self.actions = self.mean().detach() + self.std * torch.randn(ROWS, DIM, generator=generator)
        self.advantages = torch.randn(ROWS, DIM, generator=generator)

    def mean(self) -> torch.Tensor:
        return self.inputs @ self.weight

    def gradient(self, ratio: str, advantages: torch.Tensor, moved: float = 0.0) -> torch.Tensor:
        """Gradient of the surrogate, with the acting policy's mean `moved` away."""
        old = Gaussian(self.mean().detach() + moved, self.std)
        log_ratio = reduce_log_ratio(log_ratio_map(self.actions, self.mean(), old), ratio)
        return torch.autograd.grad(surrogate(log_ratio, advantages, 0.2), self.weight)[0]

    def score_gradient(self, advantages: torch.Tensor) -> torch.Tensor:
        """-1/B sum_b sum_d A_bd grad log pi(a_bd), written out for a Gaussian of linear mean."""
        score = (self.actions - self.mean().detach()) / self.std**2
        return -self.inputs.T @ (advantages * score) / ROWS


@pytest.mark.parametrize(("ratio", "factor"), [("element", 1), ("sum", 1), ("mean", 1 / DIM)])
def test_at_ratio_one_the_gradient_is_the_exact_policy_gradient(ratio, factor):
    policy = LinearPolicy()
    advantages = policy.advantages[:, :1]
    expected = factor * policy.score_gradient(advantages)
    torch.testing.assert_close(policy.gradient(ratio, advantages), expected)


def test_with_local_advantages_each_element_has_its_own_weight():
    policy = LinearPolicy(1)
    gradient = policy.gradient("element", policy.advantages)
    torch.testing.assert_close(gradient, policy.score_gradient(policy.advantages))
    # negative control: the global advantage is another gradient
    other = policy.score_gradient(policy.advantages.mean(1, keepdim=True))
    assert (gradient - other).abs().max() > 0.05


def test_away_from_ratio_one_element_and_sum_differ():
    """Negative control: the equality above is first order only."""
    policy = LinearPolicy(2)
    advantages = policy.advantages[:, :1]
    difference = policy.gradient("element", advantages, 0.1) - policy.gradient(
        "sum", advantages, 0.1
    )
    assert difference.abs().max() > 0.01


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.1, 2.0, -2.2),  # inside the interval: the gradient of -ratio A
        (0.9, -2.0, 1.8),
        (1.3, 2.0, 0.0),  # outside, where going on would gain more: clipped away
        (0.7, -2.0, 0.0),
        (1.3, -2.0, 2.6),  # outside, on the side that does harm: kept
        (0.7, 2.0, -1.4),
    ],
)
def test_clipping_acts_only_outside_and_only_on_gains(ratio, advantage, slope):
    log_ratio = torch.tensor([[math.log(ratio)]], requires_grad=True)
    surrogate(log_ratio, torch.tensor([[advantage]]), 0.2).backward()
    assert log_ratio.grad.item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("advantage", [1.0, 0.0, -1.0])
def test_a_ratio_that_overflows_has_no_gradient_and_spoils_no_other(advantage):
    log_ratio = torch.tensor([[100.0], [0.0], [0.0]], requires_grad=True)
    advantages = torch.tensor([[advantage], [1.0], [-1.0]])
    surrogate(log_ratio, advantages, 0.2).backward()
    assert log_ratio.grad.flatten().tolist() == pytest.approx([0, -1 / 3, 1 / 3])


def test_surrogate_sums_over_elements_and_averages_over_rows():
    log_ratio = torch.tensor([[1.1, 0.9], [1.5, 1.0]]).log()
    advantages = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    expected = -((1.1 + 1.8) + (1.2 * 3 - 1.0)) / 2  # 1.5 is clipped to 1.2
    assert surrogate(log_ratio, advantages, 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_reductions_of_the_log_ratio():
    log_ratio = torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]])
    assert reduce_log_ratio(log_ratio, "element") is log_ratio
    assert reduce_log_ratio(log_ratio, "sum").tolist() == [[9.0], [-3.0]]
    assert reduce_log_ratio(log_ratio, "mean").tolist() == [[3.0], [-1.0]]


def test_clip_fraction_counts_ratios_outside():
    log_ratio = torch.tensor([[1.1, 0.7], [1.3, 1.0]]).log()
    assert clip_fraction(log_ratio, 0.2).mean().item() == 0.5
    assert clip_fraction(log_ratio, 0.5).mean().item() == 0.0


def test_approximate_kl_estimates_the_closed_form():
    old, new = Normal(0.0, 1.0), Normal(0.3, 1.0)
    actions = torch.randn(100_000, generator=torch.Generator().manual_seed(5))
    estimate = approximate_kl(new.log_prob(actions) - old.log_prob(actions)).item()
    # the estimator's standard error is about 0.07 / sqrt(100,000) = 2e-4, 0.5 % of the value
    assert estimate == pytest.approx(0.3**2 / 2, rel=0.02)
    # one action of ratio 2, by hand
    assert approximate_kl(torch.tensor(math.log(2.0))).item() == pytest.approx(1 - math.log(2))


def test_value_loss_by_hand():
    values, old_values = torch.tensor([3.0, 0.1]), torch.zeros(2)
    returns = torch.tensor([1.0, 0.0])
    assert value_loss(values, old_values, returns, None).item() == pytest.approx((4 + 0.01) / 2)
    # Stable-Baselines3 clips the change of the value, not the loss: 3 becomes 0.5
    clipped = value_loss(values, old_values, returns, 0.5).item()
    assert clipped == pytest.approx((0.25 + 0.01) / 2)
    assert value_loss(values, old_values, returns, 10.0) == value_loss(
        values, old_values, returns, None
    )


def test_weights_of_rows_by_hand():
    log_ratio = torch.tensor([[1.1, 0.9], [1.5, 1.0]]).log()
    advantages = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    weights = torch.tensor([2.0, 0.5])
    expected = -(2 * (1.1 + 1.8) + 0.5 * (1.2 * 3 - 1.0)) / 2
    weighted = surrogate(log_ratio, advantages, 0.2, weights)
    assert weighted.item() == pytest.approx(expected, rel=1e-6)
    plain = surrogate(log_ratio, advantages, 0.2)
    assert torch.equal(surrogate(log_ratio, advantages, 0.2, torch.ones(2)), plain)


def test_the_effective_sample_size_by_hand():
    assert effective_sample_size(torch.zeros(7, 3)).item() == pytest.approx(1)
    # weights 1 and 3: 4^2 / (2 x 10)
    two = torch.tensor([[1.0], [3.0]]).log()
    assert effective_sample_size(two).item() == pytest.approx(0.8)
    # one row of five has all the weight, even where its ratio overflows float32
    alone = torch.zeros(5, 1)
    alone[2] = 200.0
    assert effective_sample_size(alone).item() == pytest.approx(1 / 5)
    # columns by themselves, then averaged
    both = torch.tensor([[1.0, 1.0], [3.0, 1.0]]).log()
    assert effective_sample_size(both).item() == pytest.approx((0.8 + 1) / 2)


def test_the_effective_sample_size_is_free_of_a_common_factor():
    log_ratio = torch.randn(50, 4, generator=torch.Generator().manual_seed(7))
    size = effective_sample_size(log_ratio)
    torch.testing.assert_close(effective_sample_size(log_ratio + 3), size)
    # negative control: ratios that differ more leave fewer rows
    assert effective_sample_size(2 * log_ratio) < 0.7 * size
    assert 1 / 50 < size < 1
