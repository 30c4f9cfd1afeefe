"""Distributions over the next time, and the heads that give them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agents.choices import OVERSHOOT, BetaChoice, CategoricalChoice, make_head
from redif_env import mdp, schedules
from redif_env.errors import InvalidArgumentError
from redif_env.noise import FlowSchedule, VESchedule, VPSchedule

T = 1000
NOISES = {
    "vp": VPSchedule(torch.cos(torch.linspace(0, 1.5, T)) ** 2),
    "vp, 1500 steps": VPSchedule(torch.linspace(0.99, 0.01, 1500)),
    "ve": VESchedule(),
    "flow": FlowSchedule(T),
}
SPACE = spaces.Dict(
    {
        "latents": spaces.Box(-np.inf, np.inf, (1, 8, 8), np.float32),
        "timestep": spaces.Box(0, 1, (1,), np.float32),
        "steps_left": spaces.Box(0, 1, (1,), np.float32),
        "condition": spaces.Discrete(10),
    }
)
GRID = torch.tensor([850.0, 533.0, 289.0, 120.0, 0.0])
KINDS = ({"kind": "beta"}, {"kind": "categorical"})


def observe(noise, t, step_index, max_steps=4):
    generator = torch.Generator().manual_seed(0)
    t = torch.as_tensor(t, dtype=torch.float32)
    latents = torch.randn(len(t), 1, 8, 8, generator=generator)
    classes = torch.arange(len(t)) % 10
    return mdp.observe(latents, t, torch.as_tensor(step_index), classes, noise, max_steps)


def everyone(num):
    return torch.ones(num, dtype=torch.bool)


def test_beta_log_prob_and_entropy_are_those_of_scipy():
    mode, k = torch.tensor([0.3, 0.5, 0.9]), torch.tensor([5.0, 40.0, 2.0])
    choice = BetaChoice(mode, k, everyone(3))
    kept = torch.tensor([0.2, 0.45, 0.99])
    scale = 2 * (1 + OVERSHOOT)
    oracle = stats.beta(1 + k * mode, 1 + k * (1 - mode), loc=-1 - 2 * OVERSHOOT, scale=scale)
    coordinate = 2 * kept - 1
    expected = torch.from_numpy(oracle.logpdf(coordinate.numpy())).float()
    torch.testing.assert_close(choice.log_prob(coordinate), expected, rtol=1e-4, atol=1e-4)
    entropy = torch.from_numpy(oracle.entropy()).float()
    torch.testing.assert_close(choice.entropy(), entropy, rtol=1e-4, atol=1e-4)


def test_the_mode_of_a_beta_is_where_it_is_densest():
    line = torch.linspace(-1 - 2 * OVERSHOOT, 1, 20001)
    for mode, k in ((0.2, 3.0), (0.7, 50.0)):
        same = torch.full_like(line, mode), torch.full_like(line, k)
        choice = BetaChoice(*same, everyone(len(line)))
        densest = line[choice.log_prob(line).argmax()].clamp(-1, 1)
        # float32 cannot tell densities apart near the top, where they are flat
        torch.testing.assert_close(choice.mode()[0], densest, atol=3e-3, rtol=0)


def test_a_beta_goes_straight_to_the_data_as_often_as_its_distribution_says():
    """The share of draws below kept = 0; 4 standard errors of 20,000 draws."""
    torch.manual_seed(0)
    num, mode, k = 20_000, 0.12, 10.0
    choice = BetaChoice(torch.full((num,), mode), torch.full((num,), k), everyone(num))
    s = schedules.decode_choice(choice.sample(), torch.full((num,), 1e6), FlowSchedule(10**6))
    expected = stats.beta.cdf(OVERSHOOT / (1 + OVERSHOOT), 1 + k * mode, 1 + k * (1 - mode))
    assert abs(float((s <= 0).float().mean()) - expected) < 4 * math.sqrt(expected / num)
    assert 0.2 < expected < 0.6  # neither never nor always


def test_a_categorical_by_hand():
    times = torch.tensor([800.0, 400.0, 100.0, 0.0])
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]])).repeat(2, 1)
    valid = torch.tensor([[False, True, True, True], [False, False, True, True]])
    t = torch.tensor([800.0, 400.0])
    choice = CategoricalChoice(logits, valid, times, t, NOISES["vp"], everyone(2))
    at_100 = schedules.encode_choice(torch.tensor([100.0, 100.0]), t)
    expected = torch.log(torch.tensor([0.2 / 0.5, 0.2 / 0.3]))
    torch.testing.assert_close(choice.log_prob(at_100), expected)
    odds = torch.tensor([2 / 3, 1 / 3])
    torch.testing.assert_close(choice.entropy()[1], -(odds * odds.log()).sum())
    modes = schedules.decode_choice(choice.mode(), t, NOISES["vp"])
    assert modes.tolist() in ([400.0, 100.0], [100.0, 100.0])  # a tie in the first row


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES)
@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("min_steps", [1, 3, 4])
def test_episodes_fall_and_keep_to_the_numbers_of_steps(noise, options, adaptive, min_steps):
    """Whatever is drawn; the decoded times are the environment's."""
    torch.manual_seed(0)
    grid = schedules.uniform(noise, 4)
    options = {"concentration": 1.0} if options["kind"] == "beta" else {"spread": 5.0, **options}
    head = make_head(SPACE, noise, grid, adaptive=adaptive, min_steps=min_steps, **options)
    num = 256
    t = head.first_time(head.first(num).sample())
    assert (t > 0).all()
    assert (t <= noise.max_timestep).all()
    lengths = torch.zeros(num)
    for index in range(4):
        obs = observe(noise, t, [index] * num)
        choice = head(obs).sample()
        s = head.next_time(choice, obs)
        running = t > 0
        assert (s[running] < t[running]).all()
        assert (noise.snap(s) == s).all()
        lengths += running
        t = torch.where(running, s, t)
    assert (t == 0).all()
    assert lengths.min() >= min_steps
    if min_steps == 1:
        assert lengths.unique().tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_a_head_starts_at_its_grid(options):
    head = make_head(SPACE, NOISES["vp"], GRID, **options)
    spacing = 1 if options["kind"] == "beta" else T / 32
    assert (head.grid() - GRID).abs().max() <= spacing + 3
    adaptive = make_head(SPACE, NOISES["vp"], GRID, adaptive=True, **options)
    obs = observe(NOISES["vp"], [850.0] * 5, [0] * 5)
    torch.testing.assert_close(adaptive(obs).mode(), head(obs).mode())


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_only_an_adaptive_head_tells_samples_apart(options):
    obs = observe(NOISES["vp"], [850.0] * 5, [0] * 5)
    for adaptive in (False, True):
        torch.manual_seed(0)
        head = make_head(SPACE, NOISES["vp"], GRID, adaptive=adaptive, **options)
        if adaptive:
            torch.nn.init.normal_(head.change.weight)
        assert (len(head(obs).entropy().unique()) > 1) == adaptive
    with pytest.raises(InvalidArgumentError, match="differ in their times"):
        head.grid()


@pytest.mark.parametrize("options", KINDS, ids=lambda options: options["kind"])
def test_the_forced_last_step_is_no_choice(options):
    head = make_head(SPACE, NOISES["vp"], GRID, **options)
    obs = observe(NOISES["vp"], [120.0, 120.0], [3, 2])
    choice = head(obs)
    drawn = choice.sample()
    assert drawn[0] == -1
    assert choice.log_prob(drawn)[0] == 0
    assert choice.entropy()[0] == 0
    assert choice.log_prob(drawn)[1] != 0
    choice.log_prob(drawn).sum().backward()
    assert head.table.grad.isfinite().all()
    assert head.table.grad[:3].abs().max() == 0  # rows of other steps


@settings(deadline=None, max_examples=60)
@given(
    t=st.integers(2, 999),
    start=st.integers(0, 2),
    logits=st.lists(st.floats(-5, 5), min_size=33, max_size=33),
)
def test_what_is_drawn_is_found_again(t, start, logits):
    """Encode, decode, look up: the probabilities of what can be drawn add up to one."""
    noise = NOISES["vp"]
    head = make_head(SPACE, noise, GRID, kind="categorical")
    with torch.no_grad():
        head.table += torch.tensor(logits)
    obs = observe(noise, [float(t)], [start])
    choice = head(obs)
    valid = head.candidates[head.candidates < t]
    coordinates = schedules.encode_choice(valid, torch.tensor(float(t)))
    assert torch.equal(
        schedules.decode_choice(coordinates, torch.full_like(valid, t), noise), valid
    )
    log_probs = torch.stack([choice.log_prob(c[None]) for c in coordinates])
    torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0), rtol=1e-4, atol=1e-4)
    drawn = schedules.decode_choice(choice.sample(), torch.tensor([float(t)]), noise)
    assert drawn in valid


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("schedule_head['kind']", {"kind": "normal"}),
        ("option of schedule_head 'beta'", {"candidates": 8}),
        ("option of schedule_head 'categorical'", {"kind": "categorical", "concentration": 1.0}),
        ("concentration", {"concentration": 0.0}),
        ("candidates", {"kind": "categorical", "candidates": 1}),
        ("candidates", {"kind": "categorical", "candidates": [500.0, 499.5]}),
        ("width", {"width": 0}),
    ],
)
def test_bad_options_are_refused(argument, options):
    with pytest.raises(InvalidArgumentError) as caught:
        make_head(SPACE, NOISES["flow"], GRID, **options)
    assert caught.value.argument == argument
