r"""Decision processes small enough to be solved in a second, and students to solve them.

They are made of the real environment, policy and agent; only the network and the tasks are tiny.
Data and noise are mixed linearly, :math:`x_t = (1 - t/T) x_0 + (t/T) \epsilon`. Tasks start from
`x_T = 0` unless a test says otherwise, so that the step from T to T/2 is `x_s = x0_pred / 2`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.utils import LinearSchedule
from torch import Tensor, nn

from agents import ReDiFPPO
from redif_env import Denoiser, KernelSolver, ReDiFVectorEnv, Teacher, TeacherBank, schedules
from redif_env.noise import FlowSchedule

FLOW = FlowSchedule()
ONE_STEP, TWO_STEPS = (1000.0,), (1000.0, 500.0)
MakeStudent = Callable[[], Denoiser]


class Constant(nn.Module):
    """The same answer for all latents and times: only its value can be learned."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        return self.bias.expand(len(x_t), -1).reshape(x_t.shape)


class PerClass(nn.Module):
    """An answer a class."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_classes, dim))

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return self.table[condition].reshape(x_t.shape)


class Handover(nn.Module):
    """Two steps: the second keeps what the first decided, but for its own elements.

    With `x_T = 0` the sample is `first` in the kept elements and `second` in the others.

    Args:
        kept: Which elements the second step keeps.
    """

    def __init__(self, kept: list[bool]) -> None:
        super().__init__()
        self.kept = torch.tensor(kept)
        self.first = nn.Parameter(torch.zeros(len(kept)))
        self.second = nn.Parameter(torch.zeros(len(kept)))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        latents = x_t.flatten(1)
        last = torch.where(self.kept, 2 * latents, self.second)
        x0_pred = torch.where(t[:, None] > 500, self.first.expand_as(latents), last)
        return x0_pred.reshape(x_t.shape)


class Affine(nn.Module):
    """An affine map of the latents for each step of a grid.

    Args:
        grid: Times of the steps, without the final 0.
        dim: D.
        scale: Size of the random matrices and offsets that it starts with; 0 for none.
    """

    def __init__(self, grid: tuple[float, ...], dim: int, scale: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("grid", torch.tensor(grid))
        self.matrix = nn.Parameter(
            scale * torch.randn(len(grid), dim, dim, generator=generator) / dim**0.5
        )
        self.offset = nn.Parameter(scale * torch.randn(len(grid), dim, generator=generator))

    def step(self, t: Tensor) -> Tensor:
        """Index of the step that starts at `t`, int64 `(N,)`."""
        return (self.grid - t[:, None]).abs().argmin(1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        step = self.step(t)
        x0_pred = torch.einsum("nij,nj->ni", self.matrix[step], x_t.flatten(1)) + self.offset[step]
        return x0_pred.reshape(x_t.shape)


def denoiser(network: nn.Module, dim: int, num_classes: int | None = None) -> Denoiser:
    return Denoiser(network, FLOW, "sample", (1, 1, dim), num_classes=num_classes)


def tasks(targets: Tensor, condition: Tensor | None = None) -> TeacherBank:
    """One task a target, `(P, D)`, all from the noise 0."""
    answers = targets[:, None, None, :]
    return TeacherBank(torch.zeros_like(answers), answers, condition)


def make_env(
    make_student: MakeStudent,
    bank: TeacherBank,
    schedule: tuple[float, ...] = ONE_STEP,
    num_envs: int = 32,
    **options: Any,
) -> ReDiFVectorEnv:
    student = make_student()
    teacher = Teacher(student, lambda: KernelSolver(student), num_steps=1)
    options = {"group_size": 2, "seed": 0, **options}
    return ReDiFVectorEnv(num_envs, teacher, bank=bank, schedule=schedule, **options)


def make_agent(
    env: ReDiFVectorEnv,
    make_student: MakeStudent,
    kind: type[ReDiFPPO] = ReDiFPPO,
    policy: dict[str, Any] | None = None,
    **options: Any,
) -> ReDiFPPO:
    exploration = {"eta": 0.0, "min_std": 0.1, "gap_fraction": None}
    defaults = {"batch_size": env.num_envs, "n_epochs": 1, "ema_decay": 0.0, "seed": 0}
    defaults = {**exploration, **defaults}
    policy = {"student": make_student, **(policy or {})}
    model = kind("StudentPolicy", env, policy_kwargs=policy, **{**defaults, **options})
    model.set_logger(configure(None, []))
    return model


def train(model: ReDiFPPO, iterations: int) -> ReDiFPPO:
    return model.learn(iterations * model.n_steps * model.n_envs)


def error(model: ReDiFPPO, bank: TeacherBank) -> float:
    """Paired error of the deployed student: what all of these probes lower."""
    return schedules.paired_mse(model.student(), bank, model.policy.timesteps)


def decayed(learning_rate: float) -> LinearSchedule:
    return LinearSchedule(learning_rate, 0.0, 1.0)


class ShuffledAdvantages(ReDiFPPO):
    """Negative control: every action is judged by the outcome of another one."""

    def _advantages(self, batch: Any) -> Tensor:
        advantages = super()._advantages(batch)
        return advantages[torch.randperm(len(advantages))]
