"""Noise schedules against diffusers and by hand; conversions between predictions."""

import functools
import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.noise import (
    PREDICTION_TYPES,
    FlowSchedule,
    SDESchedule,
    VESchedule,
    VPSchedule,
    expand,
    from_x0,
    to_x0,
)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
TIMES = torch.arange(1.0, 1000.0)

angles = st.floats(0.05, math.pi / 2 - 0.05)  # away from alpha = 0 and sigma = 0
values = st.floats(-3, 3)


def scalar(value):
    return torch.tensor([[value]], dtype=torch.float64)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_vp_scales_are_those_of_diffusers(beta_schedule, zero_snr):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule, rescale_betas_zero_snr=zero_snr)
    schedule = noise_schedule(scheduler)
    alpha_bar = scheduler.alphas_cumprod[1:].double()
    # Both are float32 roots of the same float32 table: one rounding each.
    torch.testing.assert_close(schedule.alpha(TIMES), alpha_bar.sqrt().float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(schedule.sigma(TIMES), (1 - alpha_bar).sqrt().float())


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_zero_terminal_snr_is_zero_where_schedulers_write_a_little_more(kind, beta_schedule):
    """2^-24 is more than the entry before it of linear betas: no falling table."""
    options = {"beta_schedule": beta_schedule, "rescale_betas_zero_snr": True}
    scheduler = kind(prediction_type="v_prediction", **options)
    assert scheduler.alphas_cumprod[-1] == 2**-24
    ours, exact = noise_schedule(scheduler), noise_schedule(DDIMScheduler(**options))
    assert float(ours.alpha(torch.tensor([999.0]))) == 0
    torch.testing.assert_close(ours.alpha_table, exact.alpha_table, rtol=1e-5, atol=1e-6)
    assert scheduler.alphas_cumprod[-1] == 2**-24  # the scheduler's own is left alone


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_vp_noises_as_diffusers_does(beta_schedule, generator):
    scheduler = DDIMScheduler(beta_schedule=beta_schedule)
    schedule = noise_schedule(scheduler)
    t = torch.tensor([1, 250, 500, 999])
    x_0, eps = torch.randn(2, 4, 3, generator=generator)
    x_t = expand(schedule.alpha(t), x_0) * x_0 + expand(schedule.sigma(t), x_0) * eps
    # diffusers takes 1 - alpha_bar in float32: relative error 6e-8 / 1e-4 near the data.
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, eps, t), rtol=0, atol=1e-4)


def test_vp_is_variance_preserving():
    schedule = noise_schedule(DDIMScheduler())
    total = schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2
    torch.testing.assert_close(total, torch.ones(999), rtol=0, atol=3e-7)


def test_flow_by_hand():
    schedule = FlowSchedule(1000)
    t = torch.tensor([0.0, 250.0, 1000.0])
    assert schedule.alpha(t).tolist() == [1.0, 0.75, 0.0]
    assert schedule.sigma(t).tolist() == [0.0, 0.25, 1.0]


@pytest.mark.parametrize("sub", [False, True], ids=["vp", "sub-vp"])
def test_scales_of_an_sde_are_its_moments(sub):
    """Mean and variance of dx = -beta/2 x dt + g dw, integrated with 20,000 steps of Euler.

    The variance obeys v' = g^2 - beta v (Song et al. 2021, eq. 11 and 12), with a beta that falls
    in one case, as none published does, and ends elsewhere than 20.
    """
    for beta_min, beta_max in ((0.1, 20.0), (6.0, 2.0)):
        mean, variance, integral, dt = 1.0, 0.0, 0.0, 1 / 20_000
        wanted = {}
        for step in range(20_000):
            beta = beta_min + step * dt * (beta_max - beta_min)
            g2 = beta * (1 - math.exp(-2 * integral)) if sub else beta
            mean, variance = mean - beta / 2 * mean * dt, variance + (g2 - beta * variance) * dt
            integral += beta * dt
            if step + 1 in (2000, 8000, 20_000):
                wanted[1000 * (step + 1) * dt] = (mean, math.sqrt(variance))
        schedule = SDESchedule(beta_min, beta_max, sub=sub)
        t = torch.tensor(list(wanted))
        ours = torch.stack([schedule.alpha(t), schedule.sigma(t)], 1)
        # Euler's error, of the order of beta dt: 1e-3.
        torch.testing.assert_close(ours, torch.tensor(list(wanted.values())), rtol=0, atol=1e-3)
        other = SDESchedule(beta_min, beta_max, sub=not sub)
        assert not torch.allclose(other.sigma(t), ours[:, 1], rtol=0, atol=1e-2)


def test_the_linear_betas_of_ddpm_are_the_sde_in_steps():
    """Song et al. 2021, appendix B: beta_i = beta(i / 1000) / 1000; ours has times between."""
    table = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear").alphas_cumprod
    schedule, t = SDESchedule(0.1, 20.0), TIMES + 1
    # The product of 1 - beta_i is exp(-sum of beta_i) up to terms of beta_i^2 / 2.
    torch.testing.assert_close(schedule.alpha(t), table[1:].sqrt(), rtol=0, atol=2e-3)
    assert float(schedule.alpha(torch.tensor([0.5]))) < 1


def test_sigma_of_an_sde_keeps_its_digits_near_the_data():
    schedule = SDESchedule(1e-8, 1e-6)
    t = torch.tensor([10.0])
    integral = 1e-8 * 0.01 + (1e-6 - 1e-8) * 0.01**2 / 2
    assert float(schedule.sigma(t)) == pytest.approx(math.sqrt(integral), rel=1e-5)


@pytest.mark.parametrize("betas", [(0.1, 0.0), (-1.0, 2.0), (0.1, 500.0), (0.1, math.nan)])
def test_betas_of_no_sde(betas):
    with pytest.raises(InvalidArgumentError, match="beta_m"):
        SDESchedule(*betas)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_noises_as_diffusers_does(shift, generator):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    schedule = noise_schedule(scheduler)
    t = scheduler.timesteps[[0, 300, 900]]
    x_0, eps = torch.randn(2, 3, 4, generator=generator)
    x_t = expand(schedule.alpha(t), x_0) * x_0 + expand(schedule.sigma(t), x_0) * eps
    torch.testing.assert_close(x_t, scheduler.scale_noise(x_0, t, eps), rtol=0, atol=1e-6)


def test_ve_by_hand():
    schedule = VESchedule(sigma_min=0.002, sigma_max=80.0, rho=7.0, num_train_timesteps=100)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = [0.0, (low + 0.5 * (high - low)) ** 7, 80.0]
    t = torch.tensor([0.0, 50.0, 100.0])
    assert schedule.sigma(t).tolist() == pytest.approx(wanted, rel=1e-6)  # float32
    assert schedule.alpha(t).tolist() == [1.0, 1.0, 1.0]
    assert schedule.initial_std == 80.0


def test_ve_has_the_sigmas_of_edm():
    scheduler = EDMEulerScheduler(sigma_min=0.01, sigma_max=50.0, rho=5.0)
    scheduler.set_timesteps(11)
    schedule = noise_schedule(scheduler)
    t = torch.linspace(1000, 1e-3, 11)  # diffusers' ramp; its last sigma is sigma_min, not 0
    torch.testing.assert_close(schedule.sigma(t), scheduler.sigmas[:11], rtol=1e-5, atol=1e-5)


SCHEDULES = [
    noise_schedule(DDIMScheduler()),
    VESchedule(),
    FlowSchedule(),
    SDESchedule(),
    SDESchedule(sub=True),
]
SCHEDULE_IDS = ["vp", "ve", "flow", "vp sde", "sub-vp sde"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
def test_time_zero_is_the_data(schedule):
    zero = torch.zeros(2)
    assert schedule.alpha(zero).tolist() == [1.0, 1.0]
    assert schedule.sigma(zero).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
def test_noise_grows_with_time(schedule):
    ratio = schedule.sigma(TIMES) / schedule.alpha(TIMES)
    assert bool((ratio.diff() > 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=SCHEDULE_IDS)
def test_scales_of_a_batch_are_those_of_its_rows(schedule):
    t = torch.tensor([[0.0, 3.0], [500.0, 999.0]])
    for scale in (schedule.alpha, schedule.sigma):
        assert scale(t).dtype == torch.float32
        for index in ((0, 0), (0, 1), (1, 0), (1, 1)):
            assert scale(t)[index] == scale(t[index])


def test_snap_rounds_and_clamps_where_the_schedule_is_a_table():
    t = torch.tensor([-3.0, 0.4, 2.6, 1e9])
    assert SCHEDULES[0].snap(t).tolist() == [0.0, 0.0, 3.0, 999.0]
    assert FlowSchedule(10).snap(t).tolist() == pytest.approx([0.0, 0.4, 2.6, 10.0])


def assert_round_trip(convert, x_0, x_t, alpha, sigma, prediction_type):
    """`convert` undoes `from_x0`. In double, and alpha > 0.04: ten digits survive."""
    prediction = from_x0(x_0, x_t, alpha, sigma, prediction_type)
    back = convert(prediction, x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(back, x_0, rtol=1e-9, atol=1e-9)


def assert_names_the_same_eps(convert, x_0, eps, alpha, sigma, prediction_type):
    """`convert` finds the `x_0` that was noised with `eps`."""
    x_t = alpha * x_0 + sigma * eps
    prediction = {
        "epsilon": eps,
        "sample": x_0,
        "v_prediction": alpha * eps - sigma * x_0,
        "flow_prediction": eps - x_0,
    }[prediction_type]
    found = convert(prediction, x_t, alpha, sigma, prediction_type)
    torch.testing.assert_close(found, x_0, rtol=1e-9, atol=1e-9)


def wrong_sign(prediction, x_t, alpha, sigma, prediction_type):
    return to_x0(-prediction, x_t, alpha, sigma, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@given(x_0=values, x_t=values, angle=angles, size=st.floats(0.1, 10))
def test_round_trip(prediction_type, x_0, x_t, angle, size):
    alpha, sigma = scalar(size * math.cos(angle)), scalar(size * math.sin(angle))
    assert_round_trip(to_x0, scalar(x_0), scalar(x_t), alpha, sigma, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@given(x_0=values, eps=values, angle=angles, size=st.floats(0.1, 10))
def test_definitions(prediction_type, x_0, eps, angle, size):
    alpha, sigma = scalar(size * math.cos(angle)), scalar(size * math.sin(angle))
    assert_names_the_same_eps(to_x0, scalar(x_0), scalar(eps), alpha, sigma, prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("check", [assert_round_trip, assert_names_the_same_eps])
def test_a_wrong_sign_is_noticed(check, prediction_type):
    numbers = map(scalar, (0.7, -0.4, 0.8, 0.6))
    with pytest.raises(AssertionError, match="not close"):
        check(wrong_sign, *numbers, prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_to_x0_against_ddim(beta_schedule, prediction_type, generator):
    make = functools.partial(DDIMScheduler, beta_schedule=beta_schedule, clip_sample=False)
    scheduler = make(prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    schedule = noise_schedule(scheduler)
    prediction, x_t = torch.randn(2, 4, 3, generator=generator)
    for t in (150, 500, 850):
        alpha, sigma = schedule.alpha(torch.tensor(t)), schedule.sigma(torch.tensor(t))
        x0_pred = to_x0(prediction, x_t, alpha, sigma, prediction_type)
        wanted = scheduler.step(prediction, t, x_t).pred_original_sample
        # Relative to the largest: epsilon divides by alpha, 0.05 at t = 850.
        torch.testing.assert_close(x0_pred, wanted, rtol=1e-5, atol=1e-5 * wanted.abs().max())


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_to_x0_against_dpm_solver(prediction_type, generator):
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=prediction_type, use_flow_sigmas=prediction_type == "flow_prediction"
    )
    scheduler.set_timesteps(10)
    prediction, x_t = torch.randn(2, 4, 3, generator=generator)
    for index in (2, 5, 8):
        scheduler._step_index = index
        # The scheduler's own scales, so that only the conversion is compared.
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
        wanted = scheduler.convert_model_output(prediction, sample=x_t)
        x0_pred = to_x0(prediction, x_t, alpha, sigma, prediction_type)
        torch.testing.assert_close(x0_pred, wanted, rtol=1e-5, atol=1e-5)


def test_velocity_against_diffusers(generator):
    scheduler = DDIMScheduler()
    schedule = noise_schedule(scheduler)
    t = torch.tensor([10, 500, 990])
    x_0, eps = torch.randn(2, 3, 4, generator=generator)
    x_t = scheduler.add_noise(x_0, eps, t)
    alpha, sigma = expand(schedule.alpha(t), x_0), expand(schedule.sigma(t), x_0)
    velocity = from_x0(x_0, x_t, alpha, sigma, "v_prediction")
    # eps is recovered as (x_t - alpha x_0) / sigma, sigma = 0.04 at t = 10.
    torch.testing.assert_close(velocity, scheduler.get_velocity(x_0, eps, t), rtol=0, atol=1e-4)


def test_v_needs_no_division_by_alpha():
    """At zero terminal SNR, v is -x_0 and x_t is pure noise."""
    alpha, sigma = scalar(0.0), scalar(1.0)
    x_0 = to_x0(scalar(-0.3), scalar(1.7), alpha, sigma, "v_prediction")
    assert float(x_0) == pytest.approx(0.3, abs=1e-12)


def test_vp_table_is_kept_in_double_until_the_root():
    """1 - alpha_bar in float32 would lose half the digits of sigma near the data."""
    alpha_bar = torch.tensor([1.0, 1 - 1e-9, 0.5], dtype=torch.float64)
    assert float(VPSchedule(alpha_bar).sigma(torch.tensor(1.0))) == pytest.approx(
        math.sqrt(1e-9), rel=1e-4
    )
