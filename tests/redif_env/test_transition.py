"""The kernel against diffusers' DDIM, EDM's ancestral step, and arithmetic."""

import functools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal

from redif_env import transition
from redif_env.loading import noise_schedule
from redif_env.noise import FlowSchedule, VESchedule, to_x0
from redif_env.transition import Gaussian

SHAPE = (4, 2, 3)
VP = noise_schedule(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
VE = VESchedule()
FLOW = FlowSchedule()
schedules = pytest.mark.parametrize("schedule", [VP, VE, FLOW], ids=["vp", "ve", "flow"])


def full(value, num=SHAPE[0]):
    return torch.full((num,), float(value))


def scale(schedule, name, t):
    return float(getattr(schedule, name)(full(t, 1)))


def draw(generator, num=2):
    return torch.randn(num, *SHAPE, generator=generator)


def assert_is_ddim(step, prediction_type, beta_schedule, eta, generator):
    """`step`, with noise added, equals one step of diffusers' scheduler."""
    scheduler = DDIMScheduler(
        beta_schedule=beta_schedule, prediction_type=prediction_type, clip_sample=False
    )
    scheduler.set_timesteps(20)  # diffusers' stride is then 50
    schedule = noise_schedule(scheduler)
    prediction, x_t, noise = draw(generator, 3)
    for t, s in ((850, 800), (400, 350), (60, 10), (30, 0)):
        wanted = scheduler.step(prediction, t, x_t, eta=eta, variance_noise=noise).prev_sample
        alpha, sigma = scale(schedule, "alpha", t), scale(schedule, "sigma", t)
        x0_pred = to_x0(prediction, x_t, torch.tensor(alpha), sigma, prediction_type)
        mean, std = step(schedule, x_t, x0_pred, full(t), full(s), eta)
        # float32, relative to the largest number on the way: x0_pred is divided by alpha.
        tolerance = 1e-5 * max(1.0, float(x0_pred.abs().max()))
        torch.testing.assert_close(mean + std * noise, wanted, rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_step_is_ddim(prediction_type, beta_schedule, eta, generator):
    assert_is_ddim(transition.step, prediction_type, beta_schedule, eta, generator)


def wrong_sign(*args):
    mean, std = transition.step(*args)
    return Gaussian(mean, -std)


def wrong_eta(*args):
    return transition.step(*args[:-1], 0.9 * args[-1])


def wrong_mean(*args):
    return Gaussian(transition.step(*args[:-1], 0.0).mean, transition.step(*args).std)


@pytest.mark.parametrize("step", [wrong_sign, wrong_eta, wrong_mean])
def test_a_wrong_kernel_is_noticed(step, generator):
    with pytest.raises(AssertionError, match="not close"):
        assert_is_ddim(step, "epsilon", "linear", 0.3, generator)


def ancestral(x_t, x0_pred, sigma_t, sigma_s, eta):
    """Mean and std of Karras et al.'s ancestral step, written as k-diffusion does."""
    up = min(sigma_s, eta * math.sqrt(sigma_s**2 * (sigma_t**2 - sigma_s**2) / sigma_t**2))
    down = math.sqrt(sigma_s**2 - up**2)
    return x_t + (x_t - x0_pred) / sigma_t * (down - sigma_t), up


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_step_on_ve_is_the_ancestral_step(eta, generator):
    x_t, x0_pred = draw(generator)
    for t, s in ((1000, 700), (500, 300), (20, 1), (300, 0)):
        sigma_t, sigma_s = scale(VE, "sigma", t), scale(VE, "sigma", s)
        mean, std = transition.step(VE, sigma_t * x_t, x0_pred, full(t), full(s), eta)
        wanted_mean, wanted_std = ancestral(sigma_t * x_t, x0_pred, sigma_t, sigma_s, eta)
        torch.testing.assert_close(mean, wanted_mean, rtol=1e-5, atol=1e-5 * sigma_t)
        assert std.flatten().tolist() == pytest.approx([wanted_std] * 4, rel=1e-5)


def test_step_on_ve_is_diffusers_euler_ancestral(generator):
    scheduler = EulerAncestralDiscreteScheduler()
    scheduler.set_timesteps(5)
    scheduler.sigmas = VE.sigma(torch.tensor([1000.0, 500.0, 200.0, 50.0, 10.0, 0.0]))
    scheduler.is_scale_input_called = True
    x_t, x0_pred = draw(generator)
    x_t = 80 * x_t
    eps_pred = (x_t - x0_pred) / 80
    noise = torch.Generator().manual_seed(1)
    wanted = scheduler.step(eps_pred, scheduler.timesteps[0], x_t, noise).prev_sample
    gaussian = transition.step(VE, x_t, x0_pred, full(1000), full(500), eta=1.0)
    x_s = transition.sample(gaussian, torch.Generator().manual_seed(1))
    torch.testing.assert_close(x_s, wanted, rtol=1e-5, atol=1e-4)  # of numbers up to 80


def test_step_on_flow_is_diffusers_flow_euler(generator):
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(timesteps=[900.0, 400.0])
    x_t, flow = draw(generator)
    wanted = scheduler.step(flow, scheduler.timesteps[0], x_t).prev_sample
    x0_pred = to_x0(flow, x_t, torch.tensor(0.1), torch.tensor(0.9), "flow_prediction")
    mean, std = transition.step(FLOW, x_t, x0_pred, full(900), full(400))
    torch.testing.assert_close(mean, wanted, rtol=1e-5, atol=1e-5)
    assert bool((std == 0).all())


@schedules
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_rows_with_their_own_times_equal_single_rows(schedule, eta, generator):
    x_t, x0_pred = draw(generator)
    t, s = torch.tensor([900.0, 700.0, 300.0, 20.0]), torch.tensor([600.0, 0.0, 299.0, 5.0])
    together = transition.step(schedule, x_t, x0_pred, t, s, eta)
    for row in range(4):
        one = slice(row, row + 1)
        alone = transition.step(schedule, x_t[one], x0_pred[one], t[one], s[one], eta)
        assert torch.equal(together.mean[one], alone.mean)
        assert torch.equal(together.std[one], alone.std)


@schedules
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_step_is_the_prediction_itself(schedule, eta, generator):
    x_t, x0_pred = draw(generator)
    mean, std = transition.step(schedule, x_t, x0_pred, full(500), full(0), eta)
    assert torch.equal(mean, x0_pred)
    assert std.flatten().tolist() == [0.0] * 4


def noise_level(schedule, t, s, eta, step=transition.step):
    """Standard deviation of `x_s - alpha_s x_0` when `x0_pred` is `x_0`, by arithmetic.

    With `x_0 = 0` and `x_t = sigma_t` the noise is 1, so the mean is its coefficient.
    """
    x_t = full(scale(schedule, "sigma", t), 1)[:, None]
    mean, std = step(schedule, x_t, torch.zeros(1, 1), full(t, 1), full(s, 1), eta)
    return math.hypot(float(mean), float(std))


@schedules
@given(
    times=st.lists(st.integers(1, 999), min_size=2, max_size=2, unique=True), eta=st.floats(0, 1)
)
def test_the_marginal_keeps_its_noise_level(schedule, times, eta):
    s, t = sorted(times)
    wanted = scale(schedule, "sigma", s)
    assert noise_level(schedule, t, s, eta) == pytest.approx(wanted, rel=1e-4)  # float32


@schedules
def test_noise_on_the_ode_mean_breaks_the_marginal(schedule):
    """The negative control, and what `mean="sde"` is there for."""
    ode = functools.partial(transition.exploration, min_std=0.0, mean="ode")
    sde = functools.partial(transition.exploration, min_std=0.0, mean="sde")
    wanted = scale(schedule, "sigma", 400)
    assert noise_level(schedule, 800, 400, 1.0, sde) == pytest.approx(wanted, rel=1e-5)
    assert noise_level(schedule, 800, 400, 1.0, ode) > 1.1 * wanted


@schedules
def test_variance_of_gaussian_data(schedule):
    """Var x_s is alpha_s^2 v + sigma_s^2 for data of variance v, whatever eta."""
    generator = torch.Generator().manual_seed(3)
    num, std = 200_000, 0.5
    x_0 = std * torch.randn(num, 1, generator=generator)
    alpha, sigma = scale(schedule, "alpha", 700), scale(schedule, "sigma", 700)
    x_t = alpha * x_0 + sigma * torch.randn(num, 1, generator=generator)
    t, s = full(700, num), full(300, num)
    for eta in (0.0, 0.6, 1.0):
        x_s = transition.sample(transition.step(schedule, x_t, x_0, t, s, eta), generator)
        alpha_s, sigma_s = scale(schedule, "alpha", 300), scale(schedule, "sigma", 300)
        wanted = alpha_s**2 * std**2 + sigma_s**2
        # The standard error of a variance is sqrt(2 / num) = 0.3 %; this is four of them.
        assert float(x_s.var()) == pytest.approx(wanted, rel=0.013)


@schedules
def test_std_grows_with_eta(schedule, generator):
    x_t, x0_pred = draw(generator)
    stds = [
        float(transition.step(schedule, x_t, x0_pred, full(600), full(300), eta).std[0])
        for eta in (0.0, 0.25, 0.5, 1.0)
    ]
    assert stds == pytest.approx([0, stds[3] / 4, stds[3] / 2, stds[3]], rel=1e-6)
    assert 0 < stds[3] < scale(schedule, "sigma", 300)


def test_exploration_floors_the_std_outside_the_root(generator):
    x_t, x0_pred = draw(generator)
    t, s = torch.tensor([900.0, 500.0, 20.0, 300.0]), torch.tensor([500.0, 300.0, 2.0, 0.0])
    kernel = transition.step(VP, x_t, x0_pred, t, s, 0.3)
    sde = transition.exploration(VP, x_t, x0_pred, t, s, 0.3, min_std=0.05, mean="sde")
    assert torch.equal(sde.mean, kernel.mean)  # sigma_s < 0.05 in row 2: a floored root is NaN
    assert torch.equal(sde.std, kernel.std.clamp_min(0.05))
    assert sde.std.flatten()[2:].tolist() == pytest.approx([0.05, 0.05])
    assert float(sde.std[0]) > 0.05


@schedules
@pytest.mark.parametrize(("t", "s"), [(950, 900), (600, 300), (300, 0)])
def test_noise_in_units_of_the_prediction(schedule, t, s, generator):
    """Its std is what the deterministic step makes of a change of the prediction by `min_std`."""
    x_t, x0_pred = draw(generator)
    args = schedule, x_t, x0_pred, full(t), full(s)
    std = transition.exploration(*args, 0.0, 0.05, unit="prediction").std
    moved = transition.step(schedule, x_t, x0_pred + 0.05, full(t), full(s)).mean
    wanted = moved - transition.step(*args).mean
    # float32: a difference of latents that are themselves up to 950 (VE).
    tolerance = 1e-6 * float(x_t.abs().max() + scale(schedule, "sigma", t))
    torch.testing.assert_close(std.expand(SHAPE), wanted, rtol=1e-3, atol=tolerance)
    in_latents = transition.exploration(*args, 0.0, 0.05).std
    assert torch.equal(std, in_latents) if s == 0 else bool((std < 0.99 * in_latents).all())


def test_noise_in_units_of_the_prediction_is_a_floor_too(generator):
    x_t, x0_pred = draw(generator)
    args = VP, x_t, x0_pred, full(600), full(300)
    floor = transition.exploration(*args, 0.0, 0.05, unit="prediction").std
    kernel = transition.step(*args, 0.7).std
    assert bool((kernel > floor).all())
    assert torch.equal(transition.exploration(*args, 0.7, 0.05, unit="prediction").std, kernel)
    near = transition.exploration(
        VP, x_t, x0_pred, full(600), full(599.999), 0.0, 0.05, unit="prediction"
    )
    assert bool((near.std > 0).all())  # or the log-prob is not finite


def test_the_ode_mean_is_what_is_deployed(generator):
    x_t, x0_pred = draw(generator)
    t, s = full(600), full(200)
    ode = transition.exploration(VP, x_t, x0_pred, t, s, 0.7, min_std=0.05)
    assert torch.equal(ode.mean, transition.step(VP, x_t, x0_pred, t, s).mean)
    assert torch.equal(ode.std, transition.step(VP, x_t, x0_pred, t, s, 0.7).std)


def test_sample_is_mean_plus_std_times_the_generators_noise(generator):
    gaussian = Gaussian(torch.full(SHAPE, 3.0), torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None, None])
    x_s = transition.sample(gaussian, torch.Generator().manual_seed(5))
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    assert torch.equal(x_s, gaussian.mean + gaussian.std * noise)
    assert torch.equal(x_s[0], gaussian.mean[0])
    assert not torch.equal(x_s, transition.sample(gaussian, torch.Generator().manual_seed(6)))


@given(x=st.floats(-5, 5), mean=st.floats(-5, 5), std=st.floats(0.01, 10))
def test_log_prob_is_that_of_a_normal(x, mean, std):
    tensors = [torch.tensor([[v]], dtype=torch.float64) for v in (x, mean, std)]
    ours = transition.log_prob_map(tensors[0], Gaussian(*tensors[1:]))
    torch.testing.assert_close(ours, Normal(*tensors[1:]).log_prob(tensors[0]), rtol=1e-9, atol=0)


@given(x=st.floats(-2, 2), mean=st.floats(-2, 2), old=st.floats(-2, 2), std=st.floats(0.1, 2))
def test_log_ratio_is_the_difference_of_log_probs(x, mean, old, std):
    x, mean, old, std = (torch.tensor([[v]]) for v in (x, mean, old, std))
    ours = transition.log_ratio_map(x, mean, Gaussian(old, std))
    wanted = Normal(mean, std).log_prob(x) - Normal(old, std).log_prob(x)
    # float32: log-probs of up to 1,000, of which the difference keeps four decimals.
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-3)


def test_log_ratio_of_the_same_mean_is_zero(generator):
    x_s, mean = draw(generator)
    old = Gaussian(mean, torch.full((4, 1, 1), 0.02))
    assert bool((transition.log_ratio_map(x_s, mean, old) == 0).all())


def test_log_ratio_keeps_digits_that_a_difference_loses(generator):
    """Against double: at least ten times as precise for the small changes of PPO."""
    x_s, change = draw(generator)
    old = Gaussian(x_s + 0.02 * draw(generator, 1)[0], torch.full((4, 1, 1), 0.02))
    mean = old.mean + 1e-4 * change
    exact = [tensor.double() for tensor in (x_s, mean, old.mean, old.std)]
    wanted = Normal(exact[1], exact[3]).log_prob(exact[0])
    wanted -= Normal(exact[2], exact[3]).log_prob(exact[0])
    ours = transition.log_ratio_map(x_s, mean, old)
    difference = transition.log_prob_map(x_s, Gaussian(mean, old.std))
    difference -= transition.log_prob_map(x_s, old)

    def error(tensor):
        return float((tensor - wanted).square().mean().sqrt())

    assert error(ours) < 0.1 * error(difference)


def test_log_ratio_differentiates_like_the_log_prob(generator):
    """At ratio 1 its gradient is the score (x - mean) / std^2."""
    x_s, mean = draw(generator)
    old = Gaussian(mean, torch.full((4, 1, 1), 0.5))
    new = mean.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(transition.log_ratio_map(x_s, new, old).sum(), new)
    torch.testing.assert_close(gradient, (x_s - mean) / 0.25, rtol=1e-5, atol=1e-5)


def log_prob_in_double(x_s, mean, std):
    return Normal(mean.double(), std.double()).log_prob(x_s.double())


@given(
    x=st.floats(-2, 2),
    mean=st.floats(-2, 2),
    old=st.floats(-2, 2),
    std=st.floats(0.1, 2),
    old_std=st.floats(0.1, 2),
)
def test_log_ratio_of_another_std_is_the_difference_of_log_probs(x, mean, old, std, old_std):
    x, mean, old, std, old_std = (torch.tensor([[v]]) for v in (x, mean, old, std, old_std))
    ours = transition.log_ratio_map(x, mean, Gaussian(old, old_std), std)
    wanted = log_prob_in_double(x, mean, std) - log_prob_in_double(x, old, old_std)
    assert ours.dtype == torch.float32
    # float32 of a few terms, the largest of them of the size of the squared distances in stds
    distance = max(float((x - old).abs()), float((x - mean).abs()), float((mean - old).abs()))
    size = 1 + (distance / min(float(std), float(old_std))) ** 2
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=2e-6 * size)


def test_log_ratio_of_the_same_std_is_the_formula_without_one(generator):
    x_s, mean = draw(generator)
    old = Gaussian(draw(generator, 1)[0], torch.tensor([0.02, 0.1, 1.0, 3.0])[:, None, None])
    without = transition.log_ratio_map(x_s, mean, old)
    assert torch.equal(transition.log_ratio_map(x_s, mean, old, old.std.clone()), without)
    # negative control: a std that is 1 % larger is another ratio
    wider = transition.log_ratio_map(x_s, mean, old, 1.01 * old.std)
    assert float((wider - without).abs().min()) > 1e-4


def test_log_ratio_keeps_digits_of_a_small_change_of_std(generator):
    """Against double: at least twice as precise as a difference of log-probs."""
    noise = draw(generator, 1)[0]
    old = Gaussian(draw(generator, 1)[0], torch.full((4, 1, 1), 0.02))
    x_s, std = old.mean + old.std * noise, 1.0001 * old.std
    wanted = log_prob_in_double(x_s, old.mean, std) - log_prob_in_double(x_s, *old)
    ours = transition.log_ratio_map(x_s, old.mean, old, std)
    difference = transition.log_prob_map(x_s, Gaussian(old.mean, std))
    difference -= transition.log_prob_map(x_s, old)

    def error(tensor):
        return float((tensor - wanted).square().mean().sqrt())

    assert error(ours) < error(difference) / 2
    assert error(ours) < 1e-6


def test_log_ratio_differentiates_by_the_std_like_the_log_prob(generator):
    """At ratio 1, by log std: noise^2 - 1."""
    mean, noise = draw(generator)
    old = Gaussian(mean, torch.tensor([0.02, 0.1, 1.0, 3.0])[:, None, None])
    log_std = old.std.log().requires_grad_()
    x_s = mean + old.std * noise
    ratio = transition.log_ratio_map(x_s, mean, old, log_std.exp())
    (gradient,) = torch.autograd.grad(ratio.sum(), log_std)
    wanted = (((x_s - mean) / old.std).square() - 1).sum((1, 2), keepdim=True)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_noise_of_one_size_has_the_gaussians_mean_and_covariance(generator):
    like = torch.zeros(20_000, 6)
    noise = transition.unit_noise(like, "rademacher", generator)
    assert torch.equal(noise.abs(), torch.ones_like(noise))
    # five standard errors of 20,000 draws
    bound = 5 / len(noise) ** 0.5
    assert noise.mean(0).abs().max() < bound
    assert (noise.T.cov() - torch.eye(6)).abs().max() < bound
    assert transition.unit_noise(like, "gaussian", generator).abs().max() > 3
    step = transition.sample(Gaussian(like + 2, torch.full((20_000, 1), 0.5)), noise="rademacher")
    assert set(step.unique().tolist()) == {1.5, 2.5}
