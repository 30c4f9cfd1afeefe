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

from agents.choices import STOP, BetaChoice, CategoricalChoice, make_head
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


def beta(mode, k, stop, may_stop=True):
    mode, k, stop = (torch.as_tensor(v, dtype=torch.float32) for v in (mode, k, stop))
    return BetaChoice(mode, k, stop.logit(), everyone(len(mode)) & may_stop, everyone(len(mode)))


def test_beta_log_prob_and_entropy_are_those_of_scipy():
    mode, k, stop = ([0.3, 0.5, 0.9], [5.0, 40.0, 2.0], [0.1, 0.5, 0.8])
    choice = beta(mode, k, stop)
    mode, k, stop = map(np.array, (mode, k, stop))
    oracle = stats.beta(1 + k * mode, 1 + k * (1 - mode), loc=-1, scale=2)
    coordinate = 2 * np.array([0.2, 0.45, 0.99]) - 1
    log_prob = choice.log_prob(torch.tensor(coordinate).float()).numpy()
    np.testing.assert_allclose(
        log_prob, np.log(1 - stop) + oracle.logpdf(coordinate), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(choice.log_prob(torch.full((3,), STOP)), np.log(stop), rtol=1e-5)
    whether = stats.bernoulli(stop).entropy()
    expected = whether + (1 - stop) * oracle.entropy()
    np.testing.assert_allclose(choice.entropy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [0.5, 100.0])
def test_what_a_beta_draws_has_total_probability_one(k):
    """The stop's probability, and the density's integral by the trapezoid rule."""
    line = torch.linspace(-1, 1, 20001)[1:-1]
    choice = beta([0.3] * len(line), [k] * len(line), [0.25] * len(line))
    density = torch.trapezoid(choice.log_prob(line).exp(), line)
    torch.testing.assert_close(density, torch.tensor(0.75), rtol=1e-3, atol=0)


def test_a_beta_that_may_not_stop_does_not():
    torch.manual_seed(0)
    choice = beta([0.3] * 1000, [5.0] * 1000, [0.9] * 1000, may_stop=False)
    free = beta([0.3] * 1000, [5.0] * 1000, [0.9] * 1000)
    assert (choice.sample() > STOP).all()
    assert (choice.mode() > STOP).all()
    assert (free.mode() == STOP).all()
    # 4 standard errors of 1,000 draws
    assert abs(float((free.sample() == STOP).float().mean()) - 0.9) < 4 * math.sqrt(0.09 / 1000)
    torch.testing.assert_close(
        choice.log_prob(torch.zeros(1000)), free.log_prob(torch.zeros(1000)) - math.log(0.1)
    )


def test_the_mode_of_a_beta_is_where_it_is_densest():
    line = torch.linspace(-1, 1, 20001)[1:]
    for mode, k in ((0.2, 3.0), (0.7, 50.0)):
        choice = beta([mode] * len(line), [k] * len(line), [0.1] * len(line))
        densest = line[choice.log_prob(line).argmax()]
        # float32 cannot tell densities apart near the top, where they are flat
        torch.testing.assert_close(choice.mode()[0], densest, atol=3e-3, rtol=0)


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
    before = head.before(torch.randn(num, 1, 8, 8), torch.zeros(num).long())
    t = head.next_time(head(before).sample(), before)
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


def test_where_no_candidate_leaves_enough_steps_the_data_is_the_only_choice():
    """As from a start below them all; the environment then keeps the steps apart."""
    head = make_head(SPACE, NOISES["vp"], GRID, kind="categorical", candidates=[600.0, 300.0])
    head.min_steps = 3
    torch.manual_seed(0)
    obs = observe(NOISES["vp"], [50.0] * 20 + [850.0], [0] * 21)
    choice = head(obs)
    drawn = choice.sample()
    assert (drawn[:20] == -1).all()
    assert (choice.mode()[:20] == -1).all()
    assert (choice.log_prob(drawn)[:20] == 0).all()
    assert (choice.entropy()[:20] == 0).all()
    s = head.next_time(drawn, obs)
    assert s[:20].tolist() == [2.0] * 20  # room for two more steps
    assert s[20] == 600  # where one candidate does, it is taken


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
        ("stop_prob", {"stop_prob": 1.0}),
        ("candidates", {"kind": "categorical", "candidates": 1}),
        ("candidates", {"kind": "categorical", "candidates": [500.0, 499.5]}),
        ("width", {"width": 0}),
    ],
)
def test_bad_options_are_refused(argument, options):
    with pytest.raises(InvalidArgumentError) as caught:
        make_head(SPACE, NOISES["flow"], GRID, **options)
    assert caught.value.argument == argument
