"""Solvers without training, against diffusers' own pipelines and by hand."""

from __future__ import annotations

import diffusers
import pytest
import torch
from gaussian import MEAN, STD, exact_factor, gaussian_denoiser, gaussian_teacher
from tiny_models import BETAS, PROMPTS, STEPS, call_pipeline, stable_diffusion

from agents import baselines
from agents.baselines import SOLVERS
from redif_env import Teacher, TeacherBank, load_teacher, schedules, transition
from redif_env.errors import InvalidArgumentError
from redif_env.noise import FlowSchedule, expand, from_x0
from redif_env.solvers import KernelSolver

TIMES = [900, 500, 120]
LISTS = [name for name, solver in SOLVERS.items() if solver.any_grid]


@pytest.fixture(scope="module")
def pipeline():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, **BETAS, **STEPS)
    return stable_diffusion(scheduler)


@pytest.fixture(scope="module")
def tasks(pipeline):
    """A teacher of the pipeline, noise and prompts."""
    teacher = load_teacher(pipeline, prompts=PROMPTS, guidance_scale=3.0, num_steps=5)
    x_T = teacher.denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    return teacher, x_T, torch.arange(3)


def own(pipeline, name, x_T, condition, **times):
    """What diffusers' pipeline makes with the scheduler of this name."""
    spacing = "leading" if times else "trailing"  # of a list it says how large the noise is
    options = {"timestep_spacing": spacing, "steps_offset": 0, **SOLVERS[name].options}
    scheduler = getattr(diffusers, SOLVERS[name].kind)
    stock, pipeline.scheduler = (
        pipeline.scheduler,
        scheduler.from_config(pipeline.scheduler.config, **options),
    )
    x_0 = call_pipeline(guidance_scale=3.0, **times)(pipeline, x_T, condition, 3)
    pipeline.scheduler = stock
    return x_0


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"ipndm"}))
def test_a_solver_is_diffusers_own_pipeline(pipeline, tasks, name):
    teacher, x_T, condition = tasks
    grid = schedules.uniform(teacher.denoiser.schedule, 3)
    x_0 = baselines.solve(name, teacher, grid).sample(x_T, condition)
    # The same operations but for the batching of the guided network.
    torch.testing.assert_close(x_0, own(pipeline, name, x_T, condition), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpmpp2m", "dpmpp3m", "heun"])
def test_a_list_of_times_is_diffusers_own_too(pipeline, tasks, name):
    teacher, x_T, condition = tasks
    x_0 = baselines.solve(name, teacher, torch.tensor(TIMES)).sample(x_T, condition)
    wanted = own(pipeline, name, x_T, condition, timesteps=TIMES)
    torch.testing.assert_close(x_0, wanted, rtol=1e-4, atol=1e-4)
    # negative control
    assert (x_0 - own(pipeline, name, x_T, condition)).abs().max() > 0.01


@pytest.mark.parametrize("name", ["dpmpp2m", "heun", "ipndm"])
def test_one_step_from_an_early_time_is_plain_ddims(tasks, name):
    """All see the noise as it is: a solver that shrank it would answer something else."""
    teacher, x_T, condition = tasks
    grid = torch.tensor([600.0, 0.0])
    x_0, wanted = (
        baselines.solve(solver, teacher, grid).sample(x_T, condition) for solver in (name, "ddim")
    )
    torch.testing.assert_close(x_0, wanted, rtol=1e-3, atol=1e-3)


def test_ddim_on_a_list_is_the_students_sampler(tasks):
    teacher, x_T, condition = tasks
    result = baselines.solve("ddim", teacher, torch.tensor(TIMES))
    wanted = schedules.sample(teacher.denoiser, x_T, condition, result.timesteps)
    torch.testing.assert_close(result.sample(x_T, condition), wanted)


@torch.no_grad()
def test_ipndm_is_adams_bashforth_of_epsilon(tasks):
    """Liu et al. 2022, eq. 12, on DDIM's step; five steps, so that all orders occur."""
    teacher, x_T, condition = tasks
    denoiser, noise = teacher.denoiser, teacher.denoiser.schedule
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
    weights += 2 * [[55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    grid = torch.tensor([900.0, 700, 500, 300, 100, 0])
    x_t, slopes = x_T, []
    for index, row in enumerate(weights):
        t, s = (grid[index + k].expand(3) for k in (0, 1))
        alpha, sigma = expand(noise.alpha(t), x_t), expand(noise.sigma(t), x_t)
        slopes.insert(0, from_x0(denoiser(x_t, t, condition), x_t, alpha, sigma, "epsilon"))
        eps = sum(w * e for w, e in zip(row, slopes, strict=False))
        x_t = transition.step(noise, x_t, (x_t - sigma * eps) / alpha, t, s).mean
    x_0 = baselines.solve("ipndm", teacher, grid).sample(x_T, condition)
    torch.testing.assert_close(x_0, x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [900, 999])
@torch.no_grad()
def test_ipndm_of_one_step_is_ddim(start):
    """Also from the last time, whose alpha (5e-5) is lost next to float32's sigma, 1."""
    teacher, grid = load_teacher("digits"), torch.tensor([float(start), 0])
    x_T = teacher.denoiser.initial_noise(3, torch.Generator().manual_seed(0))
    own, wanted = (
        baselines.solve(name, teacher, grid).sample(x_T, torch.arange(3))
        for name in ("ipndm", "ddim")
    )
    torch.testing.assert_close(own, wanted, rtol=0, atol=1e-2)  # v is rounded at sigma = 1


@pytest.mark.parametrize("name", list(SOLVERS))
def test_nfe_is_what_the_network_is_asked(tasks, name):
    teacher, x_T, condition = tasks
    result = baselines.solve(name, teacher, schedules.uniform(teacher.denoiser.schedule, 3))
    before = teacher.denoiser.network_evaluations
    result.sample(x_T, condition)
    # Guidance counts 2; Heun's last step, to the data, is Euler's.
    assert result.nfe == 2 * (5 if name == "heun" else 3)
    assert teacher.denoiser.network_evaluations - before == result.nfe * len(x_T)
    assert result.ledger.total == 0


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - {"heun"}))
def test_more_steps_approach_the_exact_answer(name):
    """Of Gaussian data, from a time where x_T's distribution is right: a first-order bound."""
    teacher = gaussian_teacher()
    noise = teacher.denoiser.schedule
    x_T = torch.randn(16, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    alpha = noise.alpha(torch.tensor([999.0]))
    exact = MEAN + exact_factor(noise, 999.0) * (x_T - alpha * MEAN)
    errors = []
    for num_steps in (10, 40):
        x_0 = baselines.solve(name, teacher, schedules.uniform(noise, num_steps)).sample(x_T)
        errors.append(float((x_0 - exact).square().mean().sqrt()))
    assert errors[1] < errors[0] / 2
    assert errors[1] < 0.1 * STD


@pytest.mark.parametrize("name", sorted(set(SOLVERS) - set(LISTS)))
def test_a_scheduler_that_takes_no_list_says_so(tasks, name):
    teacher, x_T, _ = tasks
    bank = TeacherBank(x_T, x_T)
    for call in (
        lambda: baselines.solve(name, teacher, torch.tensor(TIMES)),
        lambda: baselines.search(name, teacher, bank, 2),
    ):
        with pytest.raises(InvalidArgumentError, match="takes none") as caught:
            call()
        assert caught.value.argument == "grid"


def test_a_solver_has_a_grid_of_its_own():
    """The search asks the solver itself, so that its grid is better for it than DDIM's."""
    teacher = gaussian_teacher()
    bank = TeacherBank(x := torch.randn(8, 1, 2, 3), teacher.sample(x))
    noise = teacher.denoiser.schedule
    errors = {}
    for name in ("ddim", "ipndm"):
        grid = baselines.search(name, teacher, bank, 2)
        x_0 = baselines.solve("ipndm", teacher, grid).sample(bank.x_T)
        errors[name] = float((x_0 - bank.teacher_x_0).square().mean())
    x_0 = baselines.solve("ipndm", teacher, schedules.uniform(noise, 2)).sample(bank.x_T)
    assert errors["ipndm"] < errors["ddim"]
    assert errors["ipndm"] < 0.5 * float((x_0 - bank.teacher_x_0).square().mean())


def test_teachers_that_a_solver_cannot_step_are_refused():
    sample = gaussian_teacher()
    grid = schedules.uniform(sample.denoiser.schedule, 2)
    with pytest.raises(InvalidArgumentError, match="predicts the sample"):
        baselines.solve("heun", sample, grid)
    with pytest.raises(InvalidArgumentError, match="pass one of"):
        baselines.solve("rk45", sample, grid)
    denoiser = gaussian_denoiser(FlowSchedule())
    flow = Teacher(denoiser, lambda: KernelSolver(denoiser), 4)
    grid = torch.tensor([1000.0, 500.0])
    with pytest.raises(InvalidArgumentError, match="use ddim"):
        baselines.solve("dpmpp2m", flow, grid)
    x_T = torch.randn(4, 1, 2, 3)
    wanted = schedules.sample(denoiser, x_T, None, schedules.explicit(grid, denoiser.schedule))
    torch.testing.assert_close(baselines.solve("ddim", flow, grid).sample(x_T), wanted)
