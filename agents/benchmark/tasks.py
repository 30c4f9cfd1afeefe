"""What all entrants are given: a teacher, tasks, the start of training, and what judges them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice
from redif_env.loading import build_denoiser, load_teacher, noise_schedule
from redif_env.noise import NoiseSchedule, expand
from redif_env.rewards import MSE, CompressedSize, Reward
from redif_env.teacher import Teacher, TeacherBank, digest_of

from .. import baselines, smaller
from ..comparison import Bench, Features, Yardstick
from ..evaluation import Judge
from ..reporting import REFERENCE_SEED, find_judge

QUARTER = 0.25
REWARD = "reward"  # the first figure where it has no gradient
RANKED = (REWARD, "paired_mse", "frechet", "sliced_wasserstein")  # for verdicts
WITH_JUDGE = ("paired_mse", "frechet", "coverage", "label_agreement", "label_balance")
WITHOUT_JUDGE = ("paired_mse", "sliced_wasserstein", "coverage")
NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How many tasks each bank holds.

    Attributes:
        train: For training.
        validation: For searching grids, and for choosing settings.
        test: For the figures; as many again, on other noise, are what distributions are compared
            with.
    """

    train: int = 6144
    validation: int = 512
    test: int = 2000


@dataclasses.dataclass(frozen=True)
class Task:
    """One comparison.

    Attributes:
        name: Name of the task.
        teacher: The teacher.
        judge: Whose features and labels to judge by; None sees points as they are.
        train, validation, test, reference: Tasks; no noise is in two of them.
        start: What all that is trained starts from; None: the teacher.
        reward: What training is to raise; of what is not differentiable, the figure by which
            methods are ranked.
    """

    name: str
    teacher: Teacher
    judge: Judge | None
    train: TeacherBank
    validation: TeacherBank
    test: TeacherBank
    reference: TeacherBank
    start: Denoiser | None = None
    reward: Reward = dataclasses.field(default_factory=MSE)

    @property
    def blind(self) -> bool:
        """Whether the reward has no gradient."""
        return not self.reward.differentiable

    @functools.cached_property
    def features(self) -> Features:
        """What samples are seen through."""
        return Features(self.judge, reward=self.reward if self.blind else None)

    @functools.cached_property
    def yardstick(self) -> Yardstick:
        """The teacher's answers to the test tasks, and to others."""
        classes = self.test.condition
        return Yardstick(self.test.teacher_x_0, self.reference.teacher_x_0, classes)

    @property
    def figures(self) -> tuple[str, ...]:
        """Those that methods are compared by."""
        own = WITHOUT_JUDGE if self.judge is None else WITH_JUDGE
        return (REWARD, *own) if self.blind else own

    @functools.cached_property
    def bench(self) -> Bench:
        """What draws the figures of samples of the test tasks."""
        return Bench.prepare(self.yardstick, self.features, self.figures, NUM_RESAMPLES)

    @functools.cached_property
    def identity(self) -> str:
        """What figures depend on beside the samples, as a hash: others can not be compared.

        Answers themselves are left out: another processor rounds them in another way.
        """
        judge = "none" if self.judge is None else digest_of(self.judge.state_dict())
        sizes = len(self.test), len(self.reference), NUM_RESAMPLES
        parts = (self.teacher.fingerprint(), judge, self.reward.name, *sizes, *self.figures)
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    def uniform(self, num_steps: int) -> Tensor:
        """The default grid, `(num_steps + 1,)`."""
        return schedules.uniform(self.teacher.denoiser.schedule, num_steps)

    def search(self, solver: str, num_steps: int) -> tuple[Tensor, int]:
        """A solver's best grid on validation tasks, and the network evaluations of finding it."""
        before = self.teacher.denoiser.network_evaluations
        grid = baselines.search(solver, self.teacher, self.validation, num_steps)
        return grid, self.teacher.denoiser.network_evaluations - before

    def judged_on_validation(self) -> Task:
        """The same task for choosing settings: figures are those of the validation tasks."""
        return dataclasses.replace(self, test=self.validation, reference=self.train.subset(2000))


def usual_sizes(name: str) -> Sizes:
    """How many tasks the published figures of a task are of."""
    return SIZES.get(name, Sizes())


def make_task(name: str, sizes: Sizes | None = None, teacher: str | Path | None = None) -> Task:
    """Load or make a task; banks come from the cache where they can.

    Args:
        name: One of `TASKS`.
        sizes: Of the banks; None: those of `usual_sizes`.
        teacher: Folder of the teacher, for `"images"`.

    Raises:
        InvalidArgumentError: for an unknown name; for `"images"` without a teacher, or another task
            with one.
    """
    make = TASKS[check_choice("task", name, tuple(TASKS))]
    if (teacher is None) == (name == IMAGES):
        raise InvalidArgumentError(
            "teacher", teacher, f"name a folder for the task {IMAGES!r}, and for no other."
        )
    found, start = make(teacher)
    sizes = sizes or usual_sizes(name)
    build = functools.partial(TeacherBank.build, found, progress=True)
    return Task(
        name=name,
        teacher=found,
        judge=find_judge(found),
        train=build(sizes.train),
        validation=build(sizes.validation, split="validation"),
        test=build(sizes.test, split="test"),
        reference=build(sizes.test, split="test", seed=REFERENCE_SEED),
        start=start,
        reward=REWARDS.get(name, MSE)(),
    )


def unconditional(teacher: Teacher) -> Teacher:
    """A class-conditional UNet2DModel with its null class built in: the model without classes.

    The embedding of a class is added to that of the time, so the null class's can be added to the
    bias of the layer that makes the latter.

    Args:
        teacher: Its network must be a `UNet2DModel` with classes and a null class.
    """
    network: Any = copy.deepcopy(teacher.denoiser.network)
    null = teacher.denoiser.null_class
    if null is None or getattr(network, "class_embedding", None) is None:
        raise InvalidArgumentError("teacher", teacher.source, "pass one with a null class.")
    with torch.no_grad():
        network.time_embedding.linear_2.bias += network.class_embedding.weight[null]
    network.class_embedding = None
    network.register_to_config(num_class_embeds=None)
    solver = teacher.make_solver()
    denoiser = build_denoiser(network, solver, {})
    return Teacher(denoiser, teacher.make_solver, teacher.num_steps, teacher.source)


class Mixture(nn.Module):
    r"""The exact denoiser of a mixture of K equal Gaussians in two dimensions, and a correction.

    .. math:: E[x_0 | x_t] = \sum_k w_k(x_t) \Big(m_k
        + \frac{\alpha_t v}{\alpha_t^2 v + \sigma_t^2} (x_t - \alpha_t m_k)\Big), \quad
        w_k \propto \exp\frac{-|x_t - \alpha_t m_k|^2}{2 (\alpha_t^2 v + \sigma_t^2)}

    The correction, a small network that starts at 0, is what a student of few steps learns.

    Args:
        schedule: Noise schedule.
        num_modes: K, evenly on a circle of radius 1.
        std: Of each Gaussian, :math:`\sqrt v`.
        width: Hidden units of the correction.
    """

    def __init__(
        self, schedule: NoiseSchedule, num_modes: int = 8, std: float = 0.08, width: int = 96
    ) -> None:
        super().__init__()
        self.schedule = schedule
        angles = torch.arange(num_modes) * (2 * torch.pi / num_modes)
        self.means: Tensor
        self.register_buffer("means", torch.stack([angles.cos(), angles.sin()], 1))
        self.variance = std**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.correction = nn.Sequential(
                nn.Linear(5, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Linear(width, 2),
            )
        for weight in self.correction[-1].parameters():
            nn.init.zeros_(weight)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """`x0_pred`, float32 `(N, 2)`, for points `x_t` `(N, 2)` at times `t` `(N,)`."""
        alpha, sigma = (
            expand(scale(t), x_t) for scale in (self.schedule.alpha, self.schedule.sigma)
        )
        spread = alpha.square() * self.variance + sigma.square()
        away = x_t[:, None] - alpha[:, None] * self.means  # (N, K, 2)
        weights = (-away.square().sum(2) / (2 * spread)).softmax(1)
        gain = alpha * self.variance / spread
        exact = (weights[:, :, None] * (self.means + gain[:, None] * away)).sum(1)
        return exact + self.correction(torch.cat([x_t, exact, expand(t, x_t) / 1000], 1))


def _mixture(folder: object) -> tuple[Teacher, Denoiser | None]:
    make_solver = functools.partial(
        DDIMScheduler,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    schedule = noise_schedule(make_solver())
    denoiser = Denoiser(Mixture(schedule), schedule, "sample", (2,))
    return Teacher(denoiser, make_solver, 50), None


def _digits(folder: object) -> tuple[Teacher, Denoiser | None]:
    return load_teacher("digits"), None


def _unconditional_digits(folder: object) -> tuple[Teacher, Denoiser | None]:
    return unconditional(load_teacher("digits")), None


def _quarter_digits(folder: object) -> tuple[Teacher, Denoiser | None]:
    teacher = load_teacher("digits")
    description = smaller.describe_smaller(teacher, QUARTER)
    return teacher, smaller.make_smaller(teacher, description)


def _images(folder: str | Path) -> tuple[Teacher, Denoiser | None]:
    return load_teacher(folder), None


def _blind_reward() -> Reward:
    # So that at two steps its part is about as large as the error.
    return MSE() + 5e-4 * CompressedSize()


IMAGES = "images"
MIXTURE = "mixture"
DIGITS = "digits"
UNCONDITIONAL = "digits-unconditional"
QUARTERED = "digits-quarter"
BLIND = "digits-blind"
TASKS: dict[str, Callable[..., tuple[Teacher, Denoiser | None]]] = {
    MIXTURE: _mixture,
    DIGITS: _digits,
    UNCONDITIONAL: _unconditional_digits,
    QUARTERED: _quarter_digits,
    BLIND: _digits,
    IMAGES: _images,
}
# A few tasks carry much of the error: with 2,000 the interval of a difference is a tenth of it.
SIZES = {DIGITS: Sizes(test=8000)}
REWARDS: dict[str, Callable[[], Reward]] = {BLIND: _blind_reward}  # of others MSE
