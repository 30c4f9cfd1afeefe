"""The kernel's Gaussian as a distribution: torch's Normal and diffusers' DDIM are the oracles."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from agents.distributions import KernelDistribution, StepScale
from redif_env.noise import VPSchedule

ROWS, SHAPE = 5, (2, 3, 3)


@pytest.fixture
def scheduler() -> DDIMScheduler:
    scheduler = DDIMScheduler(
        prediction_type="sample", clip_sample=False, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(4)
    return scheduler


@pytest.fixture
def schedule(scheduler) -> VPSchedule:
    return VPSchedule(scheduler.alphas_cumprod)


def inputs(t: float = 749.0, s: float = 499.0) -> tuple[torch.Tensor, ...]:
    """x_t, x0_pred, t and s."""
    x_t, x0_pred = torch.randn(2, ROWS, *SHAPE, generator=torch.Generator().manual_seed(0))
    return x_t, x0_pred, torch.full((ROWS,), t), torch.full((ROWS,), s)


def staggered() -> tuple[torch.Tensor, ...]:
    """Rows at different times; the last one steps to the data."""
    x_t, x0_pred, _, _ = inputs()
    t, s = torch.tensor([999.0, 749, 499, 300, 20]), torch.tensor([749.0, 499, 100, 299, 0])
    return x_t, x0_pred, t, s


def made(schedule, eta=0.5, min_std=0.02, mean="ode", at=None) -> KernelDistribution:
    distribution = KernelDistribution(schedule, eta, min_std, mean)
    return distribution.proba_distribution(*(at or staggered()))


@pytest.mark.parametrize("mean", ["ode", "sde"])
def test_log_prob_and_entropy_equal_those_of_torch(schedule, mean):
    distribution = made(schedule, mean=mean)
    normal = Normal(distribution.gaussian.mean, distribution.gaussian.std)
    actions = torch.randn(ROWS, 18, generator=torch.Generator().manual_seed(1))
    expected = normal.log_prob(actions.reshape(ROWS, *SHAPE)).flatten(1)
    # log-probs reach thousands where the std is 0.02: seven digits of them are left
    torch.testing.assert_close(distribution.log_prob_map(actions), expected, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(distribution.log_prob(actions), expected.sum(1), rtol=1e-5, atol=0)
    entropy = normal.entropy().expand(ROWS, *SHAPE).flatten(1).sum(1)
    torch.testing.assert_close(distribution.entropy(), entropy)


def test_log_prob_of_another_std_differs(schedule):
    """Negative control for the oracle above."""
    actions = made(schedule).mode()
    assert not torch.allclose(
        made(schedule, eta=1.0).log_prob(actions), made(schedule).log_prob(actions)
    )


@pytest.mark.parametrize("mean", ["ode", "sde"])
@pytest.mark.parametrize(("eta", "min_std"), [(0.0, 0.02), (0.3, 0.5), (1.0, 1e-6)])
def test_the_mode_is_diffusers_ddim_step_whatever_the_exploration(
    schedule, scheduler, eta, min_std, mean
):
    x_t, x0_pred, _, _ = at = inputs()
    mode = made(schedule, eta, min_std, mean, at).mode()
    expected = scheduler.step(x0_pred, 749, x_t, eta=0.0).prev_sample
    # diffusers takes square roots of float32 products, we of float64 ones
    torch.testing.assert_close(mode, expected.flatten(1), rtol=0, atol=1e-5)


def test_the_sde_mean_and_std_are_diffusers_stochastic_step(schedule, scheduler):
    x_t, x0_pred, _, _ = at = inputs()
    gaussian = made(schedule, 0.8, 1e-6, "sde", at).gaussian
    noise = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))
    step = scheduler.step(x0_pred, 749, x_t, eta=0.8, variance_noise=noise).prev_sample
    torch.testing.assert_close(gaussian.mean + gaussian.std * noise, step, rtol=0, atol=1e-5)
    # negative control: the ode mean is another one at this eta
    assert (made(schedule, 0.8, 1e-6, "ode", at).gaussian.mean - gaussian.mean).abs().max() > 0.05


def test_the_floor_holds_where_the_kernel_is_deterministic(schedule):
    distribution = made(schedule, eta=0.5, min_std=0.07)
    stds = distribution.gaussian.std.flatten()
    assert stds[-1].item() == pytest.approx(0.07)  # the step to the data
    assert (stds[:3] > 0.07).all()
    assert distribution.log_prob(distribution.sample()).isfinite().all()


def test_samples_have_the_mean_and_std_that_are_declared(schedule):
    x_t, x0_pred, t, s = (part[:1].expand(4000, *part.shape[1:]) for part in inputs())
    torch.manual_seed(0)
    distribution = made(schedule, at=(x_t, x0_pred, t, s))
    samples = distribution.sample()
    std = distribution.gaussian.std.flatten()[0].item()
    # four standard errors of a mean and of a std over 4000 samples
    mean_error = (samples.mean(0) - distribution.gaussian.mean[0].flatten()).abs().max()
    assert mean_error < 4 * std / 4000**0.5
    assert (samples.std(0) / std - 1).abs().max() < 4 / (2 * 4000) ** 0.5
    assert samples.shape == (4000, 18)


def test_get_actions_chooses_between_mode_and_sample(schedule):
    distribution = made(schedule)
    assert torch.equal(distribution.get_actions(deterministic=True), distribution.mode())
    assert not torch.equal(distribution.get_actions(), distribution.mode())
    actions, log_prob = distribution.log_prob_from_params(*staggered())
    assert torch.equal(log_prob, distribution.log_prob(actions))


def test_antithetic_samples_are_mirrored_in_pairs(schedule):
    x_t, x0_pred, t, s = (part[:4] for part in staggered())
    torch.manual_seed(0)
    distribution = made(schedule, at=(x_t, x0_pred, t, s))
    mean, std = (part.expand(4, *SHAPE).flatten(1) for part in distribution.gaussian)
    noise = (distribution.sample_antithetic() - mean) / std
    # numbers near 1, divided by stds of 0.02 and more
    torch.testing.assert_close(noise[::2], -noise[1::2], rtol=0, atol=1e-4)
    assert (noise[0] - noise[2]).abs().max() > 0.5
    many = [(distribution.sample_antithetic() - mean) / std for _ in range(400)]
    # four standard errors of a std over 400 x 18 samples a row
    assert (torch.stack(many).std((0, 2)) - 1).abs().max() < 4 / (2 * 400 * 18) ** 0.5


def test_a_learned_scale_widens_the_std_and_nothing_else(schedule):
    at, factors = staggered(), torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    plain = made(schedule, at=at)
    scaled = KernelDistribution(schedule, 0.5, 0.02, "ode").proba_distribution(*at, factors)
    assert torch.equal(scaled.gaussian.mean, plain.gaussian.mean)
    assert torch.equal(scaled.mode(), plain.mode())  # what is deployed has no noise
    wanted = plain.gaussian.std.flatten() * factors  # of the floor too, in the last row
    assert torch.equal(scaled.gaussian.std.flatten(), wanted)
    normal = Normal(plain.gaussian.mean, wanted.reshape(-1, 1, 1, 1))
    actions = scaled.sample()
    expected = normal.log_prob(actions.reshape(ROWS, *SHAPE)).flatten(1).sum(1)
    torch.testing.assert_close(scaled.log_prob(actions), expected, rtol=1e-5, atol=0)
    # each element's entropy grows by the log of the factor
    growth = (scaled.entropy() - plain.entropy()) / 18
    torch.testing.assert_close(growth, factors.log(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("std_range", [1.5, 4.0, 100.0])
def test_the_factor_of_the_std_stays_in_its_range(std_range):
    weights = [-1e9, -50.0, -3.0, -0.1, 0.0, 0.1, 3.0, 50.0, 1e9]
    scale = StepScale(len(weights), std_range)
    scale.weight.data = torch.tensor(weights)
    factors = scale(torch.arange(len(weights))).tolist()
    # float32's exp of a logarithm
    assert factors[0] == pytest.approx(1 / std_range, rel=1e-6)
    assert factors[-1] == pytest.approx(std_range, rel=1e-6)
    assert factors == sorted(factors)
    assert factors[4] == 1.0
    for low, high in zip(factors, factors[::-1], strict=True):
        assert low * high == pytest.approx(1, rel=1e-6)


def test_the_factor_of_the_std_can_always_be_moved():
    """A clamp would have no gradient beyond its range, and stay there for good."""
    weights = torch.linspace(-5, 5, 21)
    scale = StepScale(len(weights), 4.0)
    scale.weight.data = weights.clone()
    scale(torch.arange(len(weights))).log().sum().backward()
    wanted = torch.tensor(4.0).log() / weights.cosh().square()
    torch.testing.assert_close(scale.weight.grad, wanted, rtol=1e-3, atol=0)
    assert scale.weight.grad.min() > 1e-4
    # negative control: the clamp
    clamped = weights.clone().requires_grad_()
    clamped.clamp(-1, 1).sum().backward()
    assert clamped.grad[0] == 0


def test_each_step_has_a_factor_of_its_own():
    scale = StepScale(3, 4.0)
    scale.weight.data = torch.tensor([-1.0, 0.0, 1.0])
    factors = scale(torch.tensor([2, 0, 0, 1]))
    wanted = 4.0 ** torch.tensor([1.0, -1.0, -1.0, 0.0]).tanh()
    torch.testing.assert_close(factors, wanted)
    factors[1].backward()
    assert (scale.weight.grad != 0).tolist() == [True, False, False]
