"""Time grids against diffusers, the search, and the coding of schedule choices."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from redif_env import schedules
from redif_env.errors import InvalidArgumentError
from redif_env.loading import noise_schedule
from redif_env.noise import FlowSchedule, VESchedule

VP = noise_schedule(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))
FLOW = FlowSchedule(1000)
VE = VESchedule()
every_schedule = pytest.mark.parametrize("schedule", [VP, FLOW, VE], ids=["vp", "flow", "ve"])


def assert_is_a_grid(grid, schedule, num_steps):
    assert grid.dtype == torch.float32
    assert grid.shape == (num_steps + 1,)
    assert bool((grid.diff() < 0).all())
    assert float(grid[-1]) == 0
    assert float(grid[0]) <= schedule.max_timestep
    assert torch.equal(schedule.snap(grid), grid)


# Beyond 47 diffusers adds up 1000/n in floating point, and rounds some ties the other way.
@pytest.mark.parametrize("num_steps", range(1, 48))
def test_uniform_is_diffusers_trailing(num_steps):
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    grid = schedules.uniform(VP, num_steps)
    assert grid.tolist() == [*scheduler.timesteps.tolist(), 0]


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_uniform_is_no_other_spacing(spacing):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(4)
    assert schedules.uniform(VP, 4).tolist() != [*scheduler.timesteps.tolist(), 0]


def test_uniform_on_a_continuous_schedule():
    assert schedules.uniform(FLOW, 4).tolist() == [1000, 750, 500, 250, 0]
    assert schedules.uniform(FlowSchedule(1), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]


@every_schedule
@pytest.mark.parametrize("num_steps", [1, 2, 5, 18])
def test_grids_are_grids(schedule, num_steps):
    for name in schedules.GRID_NAMES:
        assert_is_a_grid(
            schedules.make_grid(name, schedule, num_steps), schedule, num_steps=num_steps
        )


@pytest.mark.parametrize("schedule", [VP, VE], ids=["vp", "ve"])
def test_karras_has_the_noise_levels_of_the_paper(schedule):
    """Karras et al. 2022, eq. 5, of the noise-to-signal ratios; on the nearest whole time."""
    grid = schedules.karras(schedule, 6)[:-1]
    ratio = (schedule.sigma(grid) / schedule.alpha(grid)).tolist()
    low = float(schedule.sigma(torch.ones(1)) / schedule.alpha(torch.ones(1)))
    low, high = low ** (1 / 7), 80 ** (1 / 7)
    wanted = [(high + i / 5 * (low - high)) ** 7 for i in range(6)]
    # Neighbouring times differ by up to a third in noise near the data, by less elsewhere.
    assert [math.log(r) for r in ratio] == pytest.approx([math.log(w) for w in wanted], abs=0.2)


@pytest.mark.parametrize("length", [1, 10, 250])
def test_the_unit_of_continuous_time_does_not_matter(length):
    """Times of [0, T] in other units than thousandths are as fine."""
    fine, usual = FlowSchedule(length), FlowSchedule(1000)
    for choice in (-1.0, 0.0, 0.4, 1.0):
        s = [
            schedules.next_time(
                torch.tensor([choice]),
                axis.max_timestep * torch.ones(1),
                torch.zeros(1),
                axis,
                max_steps=4,
                min_steps=2,
            )
            for axis in (fine, usual)
        ]
        torch.testing.assert_close(s[0] * 1000 / length, s[1])
    karras = [schedules.karras(VESchedule(num_train_timesteps=n), 8) for n in (length, 1000)]
    torch.testing.assert_close(karras[0] * 1000 / length, karras[1])


def test_karras_spends_more_steps_near_the_data_than_uniform():
    assert schedules.karras(VP, 6)[4] < schedules.uniform(VP, 6)[4]


@pytest.mark.parametrize("times", [[850, 533, 289, 120], (850, 533, 289, 120, 0)])
def test_explicit_times(times):
    for given_times in (times, torch.tensor(times), torch.tensor(times, dtype=torch.float64)):
        grid = schedules.make_grid(given_times, VP, 4)
        assert grid.tolist() == [850, 533, 289, 120, 0]
        assert_is_a_grid(grid, VP, 4)


def test_explicit_is_a_copy():
    times = torch.tensor([500.0, 0.0])
    grid = schedules.explicit(times, VP)
    times[0] = 1
    assert grid.tolist() == [500, 0]


@pytest.mark.parametrize(
    "times",
    [
        [],
        [0],
        [120, 289],
        [500, 500],
        [500, 0, 0],
        [500, -1],
        [1000],
        [float("nan")],
        [float("inf"), 3],
        [[500, 100]],
        ["a", "b"],
        None,
        500,
        [500.5],
    ],
    ids=str,
)
def test_what_is_no_grid(times):
    with pytest.raises(InvalidArgumentError, match=r"schedule=.*: pass .*\.$"):
        schedules.explicit(times, VP)


def test_a_fraction_of_a_timestep_is_fine_on_a_continuous_schedule():
    assert schedules.explicit([500.5, 0.25], FLOW).tolist() == [500.5, 0.25, 0]


@pytest.mark.parametrize(
    ("spec", "num_steps", "match"),
    [
        ("no such", 4, "schedule='no such': pass one of 'free', 'uniform', 'karras', or times"),
        ([500, 100], 3, "num_steps=3: the schedule has 2 steps"),
        ("uniform", 0, "num_steps=0"),
        ("uniform", 1000, "num_steps=1000.*pass fewer"),
        ("karras", 1000, "num_steps=1000.*pass fewer"),
    ],
)
def test_what_is_no_spec(spec, num_steps, match):
    with pytest.raises(InvalidArgumentError, match=match):
        schedules.make_grid(spec, VP, num_steps)


def test_sample_ends_where_single_steps_do(teacher, bank):
    """DDIM along the grid of the scheduler is the scheduler's own sampling."""
    grid = schedules.uniform(teacher.denoiser.schedule, teacher.num_steps)
    x_0 = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)
    torch.testing.assert_close(x_0, bank.teacher_x_0, rtol=0, atol=1e-4)  # five steps of float32


def test_paired_mse_does_not_depend_on_the_batches(teacher, bank):
    grid = schedules.uniform(teacher.denoiser.schedule, 2)
    x_0 = schedules.sample(teacher.denoiser, bank.x_T, bank.condition, grid)
    wanted = float((x_0 - bank.teacher_x_0).square().mean())
    for batch_size in (5, 32, 100):
        error = schedules.paired_mse(teacher.denoiser, bank, grid, batch_size)
        assert error == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("times", [[850.0, 300.0], (850, 300, 0)])
def test_times_in_a_list_are_a_grid(teacher, bank, times):
    tasks = teacher.denoiser, bank.x_T, bank.condition
    grid = torch.tensor([850.0, 300.0, 0.0])
    assert torch.equal(schedules.sample(*tasks, times), schedules.sample(*tasks, grid))
    wanted = schedules.paired_mse(teacher.denoiser, bank, grid)
    assert schedules.paired_mse(teacher.denoiser, bank, times) == wanted
    with pytest.raises(InvalidArgumentError, match="schedule="):
        schedules.paired_mse(teacher.denoiser, bank, [300.0, 850.0])


@pytest.mark.parametrize("num_steps", [1, 2])
def test_search(teacher, bank, num_steps):
    """Never worse than its starts, better than the uniform grid, and the same again."""
    denoiser = teacher.denoiser
    grid = schedules.search(denoiser, bank, num_steps)
    assert_is_a_grid(grid, denoiser.schedule, num_steps)
    found = schedules.paired_mse(denoiser, bank, grid)
    for name in schedules.GRID_NAMES:
        start = schedules.make_grid(name, denoiser.schedule, num_steps)
        assert found <= schedules.paired_mse(denoiser, bank, start)
    assert found < 0.9 * schedules.paired_mse(denoiser, bank, schedules.uniform(VP, num_steps))
    assert torch.equal(schedules.search(denoiser, bank, num_steps), grid)


choices = st.floats(-1, 1)


@every_schedule
@given(choice=choices, t=st.integers(1, 999))
def test_a_choice_always_moves_towards_the_data(schedule, choice, t):
    t = torch.tensor([float(t)])
    s = schedules.decode_choice(torch.tensor([choice]), t, schedule)
    assert 0 <= float(s) < float(t)
    assert torch.equal(schedule.snap(s), s)


@every_schedule
@given(pair=st.tuples(st.integers(0, 998), st.integers(1, 999)).filter(lambda p: p[0] < p[1]))
def test_decoding_undoes_encoding(schedule, pair):
    s, t = (torch.tensor([float(time)]) for time in pair)
    choice = schedules.encode_choice(s, t)
    assert -1 <= float(choice) <= 1
    # Exact on a table of whole times; elsewhere float32 of times up to 1,000.
    atol = 0 if schedule is VP else 1e-3
    found = schedules.decode_choice(choice, t, schedule)
    torch.testing.assert_close(found, s, rtol=0, atol=atol)


def test_choices_by_hand():
    t = torch.tensor([800.0, 800.0, 800.0, 1.0, 800.0])
    choice = torch.tensor([-1.0, 0.0, 1.0, 1.0, 7.0])
    assert schedules.decode_choice(choice, t, VP).tolist() == [0, 400, 799, 0, 799]


@pytest.mark.parametrize("spec", ["uniform", "karras", "search"])
def test_no_steps_at_all_are_refused(teacher, bank, spec):
    make = {
        "uniform": lambda: schedules.uniform(VP, 0),
        "karras": lambda: schedules.karras(VP, 0),
        "search": lambda: schedules.search(teacher.denoiser, bank, 0),
    }[spec]
    with pytest.raises(InvalidArgumentError, match="num_steps=0"):
        make()


@every_schedule
def test_halving_keeps_the_times_and_puts_others_between(schedule):
    grid = schedules.uniform(schedule, 3)
    finer = schedules.halve(grid, schedule)
    assert_is_a_grid(finer, schedule, 6)
    assert torch.equal(finer[::2], grid)
    middles = (grid[:-1] + grid[1:]) / 2
    torch.testing.assert_close(finer[1::2], middles, rtol=0, atol=0.5)


def test_neighbours_cannot_be_halved():
    with pytest.raises(InvalidArgumentError, match="between them"):
        schedules.halve(torch.tensor([2.0, 1.0, 0.0]), VP)
    assert schedules.halve(torch.tensor([2.0, 1.0, 0.0]), FLOW).tolist() == [2, 1.5, 1, 0.5, 0]
