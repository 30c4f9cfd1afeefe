"""What all few-step techniques share: one training loop, one ledger, one result."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from redif_env import schedules
from redif_env.denoiser import SOLVER_ORDERS, Denoiser, check_order
from redif_env.errors import InvalidArgumentError, check_flag, check_integer, check_number
from redif_env.noise import NoiseSchedule, expand
from redif_env.rewards import Reward
from redif_env.teacher import Teacher, TeacherBank
from redif_env.transition import Past

from ..advantages import LEAST_STD
from ..averaging import update_average
from ..smaller import count_flops

FORWARD = 1
FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass
class Ledger:
    """What a run cost, beside the bank's answers and the search of its grid.

    Attributes:
        evaluations: Network-forward equivalents by purpose: 1 a row sent forward, 3 forward and
            back. Rows of a network of another kind, such as a discriminator's, count by its
            operations, see `Run.share`.
        updates: Optimiser steps by network.
        seconds: Wall-clock time of training, without the time of `on_iteration`.
    """

    evaluations: Counter[str] = dataclasses.field(default_factory=Counter)
    updates: Counter[str] = dataclasses.field(default_factory=Counter)
    seconds: float = 0.0

    @property
    def total(self) -> int:
        """Network-forward equivalents of all purposes."""
        return sum(self.evaluations.values())

    @contextlib.contextmanager
    def count(self, purpose: str, denoiser: Denoiser, factor: int = FORWARD) -> Iterator[None]:
        """Put what the denoiser evaluates meanwhile on the ledger, `factor` times."""
        before = denoiser.network_evaluations
        yield
        self.evaluations[purpose] += factor * (denoiser.network_evaluations - before)


@dataclasses.dataclass(frozen=True)
class Result:
    """A few-step sampler, and what it cost.

    Attributes:
        student: The averaged student, in evaluation mode; the teacher's own denoiser for a solver.
        timesteps: Its grid, float32 `(num_steps + 1,)`.
        ledger: What training cost; empty for a solver.
        history: One `{"iteration", "loss", "network_evaluations"}` an iteration.
        sampler: How the student is sampled along its grid.
        nfe: Network evaluations a sample; their mean where samples differ.
    """

    student: Denoiser
    timesteps: Tensor
    ledger: Ledger
    history: list[dict[str, float]]
    sampler: schedules.Sampler
    nfe: float

    @torch.no_grad()
    def sample(self, x_T: Tensor, condition: Tensor | None = None) -> Tensor:
        """The samples `x_0` that grow from the noise `x_T`, both float32 `(N, ...)`."""
        return self.sampler(self.student, x_T, condition, self.timesteps)


@dataclasses.dataclass
class Run:
    """The state of a training run, which a method reads and may change.

    Attributes:
        teacher: The teacher.
        bank: Training tasks.
        grid: The student's times, `(num_steps + 1,)`.
        student: What is trained; it starts as a copy of the teacher's denoiser, or of another.
        average: Its moving average.
        learning_rate: Initial learning rate, which a method's other networks use too.
        generator: All random numbers come from here; on the CPU, so that devices agree.
        ledger: What was spent so far.
        progress: Share of the run that is done, in [0, 1).
    """

    teacher: Teacher
    bank: TeacherBank
    grid: Tensor
    student: Denoiser
    average: Denoiser
    learning_rate: float
    generator: torch.Generator
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    progress: float = 0.0

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of teacher and student."""
        return self.student.schedule

    @property
    def device(self) -> torch.device:
        """Where the tasks are."""
        return self.bank.x_T.device

    def share(self, network: nn.Module) -> float:
        """Floating-point operations of a network of samples and classes, in those of the student.

        Counted by `torch.utils.flop_counter`: those of products of matrices and of convolutions.
        """
        task = self.bank.take(torch.zeros(1, dtype=torch.long, device=self.device))
        classes = () if task.condition is None else (task.condition,)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(task.teacher_x_0, *classes)
        one = max(count_flops(self.student), 1) / self.student.nfe  # of a guided one, half
        return counter.get_total_flops() / one

    def randint(self, high: int, num: int) -> Tensor:
        """Draw int64 `(num,)` in [0, high)."""
        return torch.randint(high, (num,), generator=self.generator).to(self.device)

    def diffuse(self, x_0: Tensor, t: Tensor) -> Tensor:
        """The forward process: `x_t`, `(N, ...)`, for data `x_0` and times `t`, `(N,)`."""
        noise = torch.randn(x_0.shape, generator=self.generator).to(x_0)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return expand(alpha, x_0) * x_0 + expand(sigma, x_0) * noise

    def of_teacher(self, t: Tensor) -> Tensor:
        """The teacher's times for the student's `t`, `(N,)`: pure noise is at the last time of all.

        A student may call it by another, as searched grids do; the teacher that is asked at that
        time would take noise for a noisy image, and follow another trajectory than its answers'.
        """
        last = torch.full_like(t, self.schedule.max_timestep)
        return torch.where(t == self.grid[0].to(t), last, t)

    def past(self, x0_pred: Tensor, t: Tensor) -> Past | None:
        """What the student's next step makes use of; no gradient flows back to this one."""
        return Past(x0_pred.detach(), t) if self.student.solver_order == 2 else None

    def states(self, tasks: TeacherBank, t: Tensor) -> Tensor:
        """Inputs of a student at the times `t`: the teacher's answers, diffused.

        At the first time of the grid it is `x_T`, which sampling starts from there whatever the
        schedule's alpha is.
        """
        first = expand(t == self.grid[0].to(t), tasks.x_T)
        return torch.where(first, tasks.x_T, self.diffuse(tasks.teacher_x_0, t))


class Method(ABC):
    """One technique of training; an instance belongs to one run.

    Keyword arguments of `__init__` after `run` are the technique's own options. `solver_orders` are
    the orders of the student's steps that it can train for. `is_error` says whether losses are
    mean squared errors.
    """

    name: ClassVar[str]
    is_error: bool = True
    solver_orders: ClassVar[tuple[int, ...]] = SOLVER_ORDERS

    def __init__(self, run: Run) -> None:
        self.run = run

    @abstractmethod
    def loss(self, rows: Tensor) -> Tensor:
        """The losses whose mean trains the student, on these rows of the bank.

        Of errors one for each row and step of the student that has one, `(..., B)`; else one.

        All network evaluations must be put on the ledger.
        """

    def decay(self, progress: float) -> float:
        """Share of the initial learning rate to use: it falls linearly to 0."""
        return 1 - progress

    @classmethod
    def train(
        cls,
        teacher: Teacher,
        bank: TeacherBank,
        grid: Tensor,
        *,
        iterations: int | None = None,
        budget: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 2e-4,
        max_grad_norm: float = 0.5,
        ema_decay: float = 0.95,
        guidance_scale: float | None = None,
        solver_order: int = 1,
        relative: bool = False,
        start: Denoiser | None = None,
        seed: int = 0,
        on_iteration: Callable[[int, Denoiser], None] = lambda iteration, student: None,
        **options: Any,
    ) -> Result:
        """Train a student, and average it.

        Args:
            teacher: The teacher; not changed.
            bank: Training tasks, on the teacher's device.
            grid: The student's times, `(num_steps + 1,)`.
            iterations: Optimiser steps of the student.
            budget: In its place, network-forward equivalents to spend, with everything that
                training asks networks for; the last iteration may exceed it.
            batch_size: Tasks of an iteration.
            learning_rate: Initial learning rate of Adam.
            max_grad_norm: Largest gradient norm.
            ema_decay: Of the student's moving average, an iteration; reached after a warm-up.
            guidance_scale: Of the student; default: that of what it starts from.
            solver_order: Of the student's steps, see `Denoiser`; a method has `solver_orders`.
            relative: Whether each error is divided by its root, so that a hard task counts as much
                as an easy one, as with `ReDiFPPO(advantage_std="group")`. Roots are taken for no
                less than a hundredth of that of the minibatch's mean.
            start: What training starts from, such as another technique's student or a smaller
                network; not changed. Default: the teacher.
            seed: Of the order of tasks and of all noise.
            on_iteration: Called with the iterations done and the averaged student.
            options: Of the method.

        Returns:
            The averaged student, in evaluation mode, and what it cost.

        Raises:
            InvalidArgumentError: for an argument that makes no sense, before anything is computed.
        """
        done = _check_length(iterations, budget)
        batch_size = check_integer("batch_size", batch_size, 1)
        max_grad_norm = check_number("max_grad_norm", max_grad_norm)
        ema_decay = check_number("ema_decay", ema_decay, 0, 1)
        cls.check_options(options)
        cls.check_order(solver_order)
        run = _start(teacher, bank, grid, learning_rate, guidance_scale, solver_order, start, seed)
        method = cls(run, **options)
        if check_flag("relative", relative) and not method.is_error:
            raise InvalidArgumentError(
                "relative", True, f"pass False: this loss of {cls.name} is no squared error."
            )
        trained: list[Tensor] = list(run.student.network.parameters())
        averaged: list[Tensor] = list(run.average.network.parameters())
        optimizer = torch.optim.Adam(trained, run.learning_rate, eps=1e-5)
        history: list[dict[str, float]] = []
        iteration = 0
        on_iteration(0, run.average)
        while run.progress < 1:
            started = time.monotonic()
            losses = method.loss(run.randint(len(bank), batch_size))
            rate = run.learning_rate * method.decay(run.progress)
            loss = (losses / _roots(losses.detach()) if relative else losses).mean()
            _descend(optimizer, loss, rate, max_grad_norm)
            iteration += 1
            update_average(averaged, trained, ema_decay, iteration)
            ledger = run.ledger
            ledger.updates["student"] += 1
            ledger.seconds += time.monotonic() - started
            history.append(
                {
                    "iteration": iteration,
                    "loss": float(losses.detach().mean()),
                    "network_evaluations": ledger.total,
                }
            )
            run.progress = done(iteration, ledger.total)
            on_iteration(iteration, run.average)
        nfe = (len(grid) - 1) * run.average.nfe
        return Result(run.average, run.grid, run.ledger, history, schedules.sample, nfe)

    @classmethod
    def check_order(cls, solver_order: int) -> None:
        """Refuse steps that this method can not train for."""
        if check_order(solver_order) not in cls.solver_orders:
            raise InvalidArgumentError(
                "solver_order", solver_order, f"pass 1: {cls.name} is about DDIM's steps."
            )

    @classmethod
    def check_reward(cls, reward: Reward) -> None:
        """Refuse a reward that this method can not raise; this one has an aim of its own."""
        if reward.name != "mse":
            raise InvalidArgumentError(
                "reward", reward.name, f"leave it out: {cls.name} has no use of it."
            )

    @classmethod
    def check_options(cls, options: dict[str, Any]) -> None:
        """Refuse options that this method does not have."""
        known = list(inspect.signature(cls).parameters)[1:]
        for name, value in options.items():
            if name not in known:
                has = f"has only {', '.join(known)}" if known else "has none of its own"
                raise InvalidArgumentError(name, value, f"leave it out: {cls.name} {has}.")


def row_means(values: Tensor) -> Tensor:
    """Mean over each row's elements: `(N, ...)` to `(N,)`."""
    return values.flatten(1).mean(1)


def snr_weight(schedule: NoiseSchedule, x: Tensor, t: Tensor) -> Tensor:
    """Truncated SNR, `max(alpha^2 / sigma^2, 1)` (Salimans and Ho 2022, eq. 9), as `(N, 1, ...)`.

    Args:
        schedule: Noise schedule.
        x: What the weight broadcasts over, `(N, ...)`.
        t: Times, float `(N,)`, > 0.
    """
    return expand((schedule.alpha(t) / schedule.sigma(t)).square().clamp_min(1), x)


def refinements(grid: Tensor, schedule: NoiseSchedule, num_steps: int) -> list[Tensor]:
    """`grid`, and grids of twice as many steps each, up to `num_steps` or as far as times allow."""
    grids = [grid]
    while len(grids[-1]) - 1 < num_steps:
        try:
            grids.append(schedules.halve(grids[-1], schedule))
        except InvalidArgumentError:
            break
    return grids


def _check_length(iterations: int | None, budget: int | None) -> Callable[[int, int], float]:
    """Tells from the iterations done and the evaluations spent which share of the run is over."""
    if (iterations is None) == (budget is None):
        raise InvalidArgumentError(
            "iterations", iterations, "pass either iterations or budget, and not both."
        )
    if iterations is not None:
        last = check_integer("iterations", iterations, 1)
        return lambda iteration, spent: iteration / last
    limit = check_integer("budget", budget, 1)
    return lambda iteration, spent: spent / limit


def _start(
    teacher: Teacher,
    bank: TeacherBank,
    grid: Tensor,
    learning_rate: float,
    guidance_scale: float | None,
    solver_order: int,
    start: Denoiser | None,
    seed: int,
) -> Run:
    student = copy.deepcopy(start or teacher.denoiser).eval().requires_grad_(True)
    student.set_solver_order(solver_order)
    if guidance_scale is not None:
        student.set_guidance(guidance_scale, student.guidance_rescale)
    return Run(
        teacher=teacher,
        bank=bank,
        grid=schedules.explicit(grid, teacher.denoiser.schedule),
        student=student,
        average=copy.deepcopy(student).requires_grad_(False),
        learning_rate=check_number("learning_rate", learning_rate),
        generator=torch.Generator().manual_seed(check_integer("seed", seed, 0)),
    )


def _roots(errors: Tensor) -> Tensor:
    """Their roots, of none so small that rounding is all there is in it."""
    least = LEAST_STD**2 * errors.mean() + 1e-24
    return errors.clamp_min(least).sqrt()


def _descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, learning_rate: float, max_grad_norm: float
) -> None:
    """One step of gradient descent."""
    (group,) = optimizer.param_groups
    group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(group["params"], max_grad_norm)
    optimizer.step()
