"""Denoiser: guidance by hand, the cost it counts, and what it refuses."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from redif_env import Denoiser, load_denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.noise import FlowSchedule, VESchedule

VP = noise_schedule(DDIMScheduler())
NULL = 2


class ClassNetwork(nn.Module):
    """Predicts `x_t` times 1, 10 or 100, by class; records the rows of each call."""

    def __init__(self, wrap=False):
        super().__init__()
        self.register_buffer("gains", torch.tensor([1.0, 10.0, 100.0]))
        self.wrap = wrap
        self.calls = []

    def forward(self, x_t, t, condition=None):
        self.calls.append(len(x_t))
        gain = 1.0 if condition is None else self.gains[condition][:, None]
        return SimpleNamespace(sample=gain * x_t) if self.wrap else gain * x_t


def make(guidance_scale=1.0, **options):
    options = {"num_classes": 2, "null_class": NULL, **options}
    wrap = options.pop("wrap", False)
    return Denoiser(
        ClassNetwork(wrap), VP, "sample", (3,), guidance_scale=guidance_scale, **options
    )


X_T = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
T = torch.tensor([500.0, 20.0])
CLASSES = torch.tensor([0, 1])


@pytest.mark.parametrize("wrap", [False, True], ids=["tensor", "object with .sample"])
@pytest.mark.parametrize("w", [0.0, 0.5, 3.0])
def test_guidance_by_hand(w, wrap):
    """Uncond + w (cond - uncond), with uncond 100 x and cond 1 x or 10 x."""
    wanted = torch.stack([(100 + w * (1 - 100)) * X_T[0], (100 + w * (10 - 100)) * X_T[1]])
    denoiser = make(w, wrap=wrap)
    torch.testing.assert_close(denoiser.predict(X_T, T, CLASSES), wanted)
    swapped = torch.stack([(1 + w * (100 - 1)) * X_T[0], (10 + w * (100 - 10)) * X_T[1]])
    if w != 0.5:  # where the two forms are the same
        assert not torch.allclose(denoiser.predict(X_T, T, CLASSES), swapped)


@pytest.mark.parametrize("wrap", [False, True])
def test_without_guidance_the_condition_goes_straight_through(wrap):
    wanted = torch.stack([X_T[0], 10 * X_T[1]])
    assert torch.equal(make(wrap=wrap).predict(X_T, T, CLASSES), wanted)
    assert torch.equal(make(wrap=wrap, num_classes=None).predict(X_T, T), X_T)


@pytest.mark.parametrize(("w", "nfe", "calls"), [(1.0, 1, [2, 2]), (3.0, 2, [4, 4])])
def test_cost(w, nfe, calls):
    denoiser = make(w)
    assert denoiser.nfe == nfe
    denoiser.predict(X_T, T, CLASSES)
    denoiser(X_T, T, CLASSES)
    assert denoiser.network.calls == calls
    assert denoiser.network_evaluations == 2 * 2 * nfe


def test_guidance_equals_two_plain_calls_of_the_real_network(bank):
    plain, guided = load_denoiser("digits"), load_denoiser("digits", guidance_scale=2.5)
    x_t, t, condition = bank.x_T[:4], torch.full((4,), 700.0), bank.condition[:4]
    with torch.no_grad():
        cond = plain.predict(x_t, t, condition)
        uncond = plain.predict(x_t, t, torch.full((4,), plain.null_class))
        wanted = uncond + 2.5 * (cond - uncond)
        # Batches of 8 and of 4 add up in another order.
        torch.testing.assert_close(guided.predict(x_t, t, condition), wanted, rtol=0, atol=1e-5)
    assert guided.network_evaluations == plain.network_evaluations == 8


def test_forward_is_diffusers_pred_original_sample(teacher, bank):
    scheduler = teacher.make_solver()
    scheduler.set_timesteps(5)
    x_t, condition = bank.x_T[:4], bank.condition[:4]
    with torch.no_grad():
        prediction = teacher.denoiser.network(x_t, 599, condition).sample
        x0_pred = teacher.denoiser(x_t, torch.full((4,), 599.0), condition)
    wanted = scheduler.step(prediction, 599, x_t).pred_original_sample
    torch.testing.assert_close(x0_pred, wanted, rtol=1e-5, atol=1e-5)


def test_rows_with_their_own_times_equal_single_rows(teacher, bank):
    t = torch.tensor([999.0, 500.0, 3.0])
    with torch.no_grad():
        together = teacher.denoiser(bank.x_T[:3], t, bank.condition[:3])
        for row in range(3):
            one = slice(row, row + 1)
            alone = teacher.denoiser(bank.x_T[one], t[one], bank.condition[one])
            # Convolutions of other batch sizes add up in another order.
            torch.testing.assert_close(together[one], alone, rtol=0, atol=1e-5)


def test_epsilon_without_signal_is_refused():
    zero_snr = noise_schedule(DDIMScheduler(rescale_betas_zero_snr=True))
    for schedule in (zero_snr, FlowSchedule()):
        with pytest.raises(InvalidArgumentError, match=r"prediction_type='epsilon'.*alpha is 0"):
            Denoiser(nn.Identity(), schedule, "epsilon", (3,))
    # The other predictions still hold x_0 there, and these schedules never lose the signal.
    assert Denoiser(nn.Identity(), zero_snr, "v_prediction", (3,)).nfe == 1
    assert Denoiser(nn.Identity(), FlowSchedule(), "flow_prediction", (3,)).nfe == 1
    assert Denoiser(nn.Identity(), VP, "epsilon", (3,)).nfe == 1
    assert Denoiser(nn.Identity(), VESchedule(), "epsilon", (3,)).nfe == 1


def test_guidance_needs_a_null_class_and_a_condition():
    with pytest.raises(InvalidArgumentError, match=r"guidance_scale=2\.0.*null_class"):
        make(2.0, null_class=None)
    with pytest.raises(InvalidArgumentError, match=r"condition=None"):
        make(2.0).predict(X_T, T)


@pytest.mark.parametrize("schedule", [VP, FlowSchedule(), VESchedule(sigma_max=20.0)])
def test_initial_noise_has_the_schedules_std(schedule):
    denoiser = Denoiser(nn.Identity(), schedule, "sample", (5, 4))
    draws = [
        denoiser.initial_noise(1000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert draws[0].shape == (1000, 5, 4)
    assert draws[0].dtype == torch.float32
    # The standard error of a std from 20,000 numbers is 0.5 %.
    assert float(draws[0].std()) == pytest.approx(schedule.initial_std, rel=0.02)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_initial_condition_is_uniform_over_the_classes(generator):
    denoiser = make(num_classes=2)
    drawn = denoiser.initial_condition(4000, generator)
    assert drawn.dtype == torch.int64
    counts = torch.bincount(drawn, minlength=3)
    assert counts[NULL] == 0
    assert abs(int(counts[0]) - 2000) < 130  # four standard errors
    assert make(num_classes=None).initial_condition(3, generator) is None
