"""The kernel's Gaussian as a distribution: torch's Normal and diffusers' DDIM are the oracles."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal

from agents.distributions import KernelDistribution
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
