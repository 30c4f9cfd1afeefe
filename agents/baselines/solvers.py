"""What needs no training: diffusers' solvers, on their default grid or on a searched one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor

from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice
from redif_env.noise import VPSchedule, expand, from_x0, to_x0
from redif_env.solvers import KernelSolver
from redif_env.teacher import Teacher, TeacherBank

from .base import Ledger, Result

# The student's sampler does none of these.
PLAIN = {
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "thresholding": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "variance_type": None,
}
# On a list of times the spacing has no other meaning than this: with "trailing" Heun starts from
# noise that it makes smaller, by a fifth where a list starts at a sigma of 1.4.
LISTED = {"timestep_spacing": "leading"}


class Solver(NamedTuple):
    """A solver of diffusers.

    Attributes:
        kind: Name of the scheduler.
        options: What differs from the teacher's config.
        any_grid: Whether it steps through any list of times.
    """

    kind: str
    options: dict[str, Any]
    any_grid: bool


_DPM = {"algorithm_type": "dpmsolver++", "final_sigmas_type": "zero"}
SOLVERS: dict[str, Solver] = {
    "ddim": Solver("DDIMScheduler", {"set_alpha_to_one": True, "steps_offset": 0}, True),
    "dpmpp2m": Solver("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 2}, True),
    "dpmpp3m": Solver("DPMSolverMultistepScheduler", {**_DPM, "solver_order": 3}, True),
    "heun": Solver("HeunDiscreteScheduler", {}, True),
    "ipndm": Solver("IPNDMScheduler", {}, True),
    "unipc": Solver("UniPCMultistepScheduler", {"final_sigmas_type": "zero"}, False),
    "deis": Solver("DEISMultistepScheduler", {}, False),
}
# What an untrained student is, by the order of its steps.
UNTRAINED = {1: "ddim", 2: "dpmpp2m"}


class OnTimes:
    """A diffusers scheduler that steps through a list of times.

    Args:
        solver: One whose `set_timesteps` takes `timesteps`.
        times: Times at which the network is asked, falling, without the final 0.
    """

    def __init__(self, solver: Any, times: list[int]) -> None:
        self.solver = solver
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self.solver, name)

    def set_timesteps(self, num_steps: int, device: str | torch.device = "cpu") -> None:
        """Choose the times, of which there are `num_steps`."""
        self.solver.set_timesteps(timesteps=self.times, device=device)


class IPNDM(KernelSolver):
    """diffusers' IPNDMScheduler (Liu et al. 2022), on the denoiser's own noise schedule.

    On its own it has a fixed schedule of its own, but it takes another one as `trained_betas`: the
    sigmas of any grid, with alpha^2 + sigma^2 = 1. What it wants of a network is v. It computes
    alphas from sigmas; near the last time float32's sigma is 1 and all of alpha is lost, and with
    it `x_0`, which is divided by it: so it is given the schedule's own.
    """

    def set_timesteps(self, num_steps: int, device: str | torch.device = "cpu") -> None:
        super().set_timesteps(num_steps, device)
        grid = torch.cat([self.timesteps.cpu(), torch.zeros(1)]).to(device)
        sigmas = self.schedule.sigma(grid).tolist()
        self.inner = diffusers.IPNDMScheduler(trained_betas=sigmas)
        self.inner.set_timesteps(num_steps, device)
        self.inner.alphas = self.schedule.alpha(grid)
        self.inner.set_begin_index(0)

    def step(self, prediction: Tensor, t: Tensor, x_t: Tensor) -> SimpleNamespace:
        now = torch.ones(len(x_t), device=x_t.device) * float(t)
        alpha = expand(self.schedule.alpha(now), x_t)
        sigma = expand(self.schedule.sigma(now), x_t)
        x0_pred = to_x0(prediction, x_t, alpha, sigma, self.prediction_type)
        velocity = from_x0(x0_pred, x_t, alpha, sigma, "v_prediction")
        return self.inner.step(velocity, t, x_t)


def solve(name: str, teacher: Teacher, grid: Tensor) -> Result:
    """Sample a teacher with a solver along `grid`.

    Args:
        name: One of `SOLVERS`.
        teacher: The teacher.
        grid: Times, `(num_steps + 1,)`; `schedules.uniform` is every solver's default.

    Raises:
        InvalidArgumentError: for an unknown solver; for a solver that takes no list of times and
            another grid than the uniform one; for a teacher that it cannot step.
    """
    grid = schedules.explicit(grid, teacher.denoiser.schedule)
    solver = make_solver(name, teacher, grid)()
    solver.set_timesteps(len(grid) - 1)
    return Result(
        student=teacher.denoiser,
        timesteps=grid,
        ledger=Ledger(),
        history=[],
        sampler=functools.partial(_sample, name, teacher),
        nfe=len(solver.timesteps) * teacher.denoiser.nfe,
    )


def search(name: str, teacher: Teacher, bank: TeacherBank, num_steps: int) -> Tensor:
    """The best grid of a solver on the bank's tasks, see `schedules.search`.

    Raises:
        InvalidArgumentError: for a solver that takes no list of times.
    """
    if not SOLVERS[check_choice("name", name, tuple(SOLVERS))].any_grid:
        raise _no_list(name)
    sampler = functools.partial(_sample, name, teacher)
    return schedules.search(teacher.denoiser, bank, num_steps, sampler=sampler)


def make_solver(name: str, teacher: Teacher, grid: Tensor) -> Callable[[], Any]:
    """A function that makes fresh solvers along `grid`. Arguments and errors as for `solve`."""
    solver = SOLVERS[check_choice("name", name, tuple(SOLVERS))]
    denoiser = teacher.denoiser
    times = [int(t) for t in grid[:-1]]
    uniform = torch.equal(grid, schedules.uniform(denoiser.schedule, len(times)))
    if not uniform and not solver.any_grid:
        raise _no_list(name)
    if name == "ddim" and not (uniform and isinstance(denoiser.schedule, VPSchedule)):
        # diffusers' DDIMScheduler hard-codes its stride.
        return functools.partial(KernelSolver, denoiser, grid[:-1].tolist())
    _check_teacher(name, teacher)
    if name == "ipndm":
        return functools.partial(IPNDM, denoiser, grid[:-1].tolist())
    kind = getattr(diffusers, solver.kind)
    config = {**teacher.make_solver().config, "prediction_type": denoiser.prediction_type}

    def make() -> Any:
        options = {**config, **PLAIN, **solver.options}
        if uniform:
            return kind.from_config(options)
        return OnTimes(kind.from_config({**options, **LISTED}), times)

    return make


def fits(name: str, teacher: Teacher) -> bool:
    """Whether a solver can step this teacher."""
    try:
        make_solver(name, teacher, schedules.uniform(teacher.denoiser.schedule, 1))
    except InvalidArgumentError:
        return False
    return True


def _sample(
    name: str,
    teacher: Teacher,
    denoiser: Denoiser,
    x_T: Tensor,
    condition: Tensor | None,
    grid: Tensor,
) -> Tensor:
    """A `schedules.Sampler` once name and teacher are given."""
    return Teacher(denoiser, make_solver(name, teacher, grid), len(grid) - 1).sample(x_T, condition)


def _check_teacher(name: str, teacher: Teacher) -> None:
    denoiser = teacher.denoiser
    if not isinstance(denoiser.schedule, VPSchedule):
        raise InvalidArgumentError(
            "name",
            name,
            "this solver needs a teacher with alphas_cumprod: use ddim, which steps any other.",
        )
    if name == "heun" and denoiser.prediction_type == "sample":
        raise InvalidArgumentError(
            "name", name, "diffusers' Heun takes no network that predicts the sample."
        )


def _no_list(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        "grid",
        f"a list of times for {name}",
        f"diffusers' {SOLVERS[name].kind} takes none: pass schedules.uniform, or use dpmpp3m.",
    )
