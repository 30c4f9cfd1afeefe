"""Distribution matching (DMD2: Yin et al. 2024, arXiv 2405.14867): samples like the teacher's.

A second network, the fake score, is trained to denoise what the student makes. Where it and the
teacher disagree about a diffused sample of the student, the sample moves towards the teacher: this
is the gradient of KL(student | teacher) over the diffused distributions. The student's samples need
not agree with the teacher's answers to the same noise.

The paper has every step predict a sample, and one fake score for all steps: it sees their mixture,
which matches when one step is too wide and another too narrow (so a student of two steps did, on
Gaussian data). Here the samples of the whole few-step sampler are matched, through all its steps.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from redif_env import schedules
from redif_env.errors import check_integer, check_number
from redif_env.rewards import Discriminator

from .base import FORWARD_AND_BACKWARD, Method, Run, snr_weight

TAU_RANGE = (0.02, 0.98)  # share of the time axis that samples are diffused to


class DistributionMatching(Method):
    """The DMD gradient, and with a `gan_weight` that of a discriminator.

    Args:
        run: The run.
        fake_updates: Updates of the fake score before each of the student.
        fake_learning_rate: Of the fake score; default: the student's initial one.
        gan_weight: Weight of the discriminator's loss beside the matching loss; 0 trains none. It
            is a small network of its own on samples, not a head on the fake score as in the paper.
    """

    name = "distribution_matching"
    is_error = False

    def __init__(
        self,
        run: Run,
        fake_updates: int = 5,
        fake_learning_rate: float | None = None,
        gan_weight: float = 0.0,
    ) -> None:
        super().__init__(run)
        self.fake_updates = check_integer("fake_updates", fake_updates, 1)
        self.gan_weight = check_number("gan_weight", gan_weight)
        rate = run.learning_rate if fake_learning_rate is None else fake_learning_rate
        rate = check_number("fake_learning_rate", rate)
        self.fake = copy.deepcopy(run.teacher.denoiser).requires_grad_(True)
        self.fake.set_guidance(1.0)
        self.optimizer = torch.optim.Adam(self.fake.network.parameters(), rate, (0.0, 0.999))
        self.discriminator = Discriminator(
            run.student.latent_shape,
            run.student.num_classes,
            batch_size=len(run.bank),
            n_epochs=1,
            seed=run.generator.initial_seed(),
        )
        network = self.discriminator.network.to(run.device)
        self.share = run.share(network) if self.gan_weight else 0.0

    def loss(self, rows: Tensor) -> Tensor:
        run = self.run
        for _ in range(self.fake_updates):
            others = run.randint(len(run.bank), len(rows))
            self._train_critics(self._generate(others, trains=False), others)
        x_0 = self._generate(rows, trains=True)
        condition = run.bank.take(rows).condition
        moved = x_0.detach() - self._gradient(x_0.detach(), condition)
        loss = 0.5 * (x_0 - moved).square().mean()
        if self.gan_weight == 0:
            return loss
        return loss + self.gan_weight * self._adversarial(x_0, condition)

    def _generate(self, rows: Tensor, trains: bool) -> Tensor:
        """Samples `x_0` of the student."""
        run, tasks = self.run, self.run.bank.take(rows)
        purpose, factor = ("update", FORWARD_AND_BACKWARD) if trains else ("rollout", 1)
        with torch.set_grad_enabled(trains), run.ledger.count(purpose, run.student, factor):
            return schedules.sample(run.student, tasks.x_T, tasks.condition, run.grid)

    def _train_critics(self, x_0: Tensor, rows: Tensor) -> None:
        """One update of the fake score, and of the discriminator, on samples of the student."""
        run, tasks = self.run, self.run.bank.take(rows)
        t = self._times(len(rows))
        x_t = run.diffuse(x_0, t)
        with run.ledger.count("fake score", self.fake, FORWARD_AND_BACKWARD):
            x0_pred = self.fake(x_t, t, tasks.condition)
        loss = (snr_weight(run.schedule, x_t, t) * (x0_pred - x_0).square()).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        run.ledger.updates["fake score"] += 1
        if self.gan_weight:
            before = self.discriminator.network_evaluations
            self.discriminator.update(x_0, tasks.teacher_x_0, tasks.condition)
            run.ledger.updates["discriminator"] += 1
            self._count(self.discriminator.network_evaluations - before)

    @torch.no_grad()
    def _gradient(self, x_0: Tensor, condition: Tensor | None) -> Tensor:
        """The matching gradient over the size of the teacher's correction (Yin et al. 2023)."""
        run, teacher = self.run, self.run.teacher.denoiser
        t = self._times(len(x_0))
        x_t = run.diffuse(x_0, t)
        with run.ledger.count("targets", teacher):
            real = teacher(x_t, t, condition)
        with run.ledger.count("fake score", self.fake):
            fake = self.fake(x_t, t, condition)
        axes = tuple(range(1, x_0.ndim))
        return (fake - real) / (x_0 - real).abs().mean(axes, keepdim=True).clamp_min(1e-6)

    def _adversarial(self, x_0: Tensor, condition: Tensor | None) -> Tensor:
        """The non-saturating loss: minus the log probability of being taken for the teacher's."""
        critic = self.discriminator
        inputs = (x_0,) if critic.num_classes is None else (x_0, condition)
        self._count(FORWARD_AND_BACKWARD * len(x_0))
        return F.softplus(-critic.network(*inputs)).mean()

    def _count(self, asked: int) -> None:
        """Put rows of the discriminator on the ledger."""
        self.run.ledger.evaluations["discriminator"] += math.ceil(asked * self.share)

    def _times(self, num: int) -> Tensor:
        """Random times within `TAU_RANGE`, `(num,)`."""
        low, high = (share * self.run.schedule.max_timestep for share in TAU_RANGE)
        uniform = torch.rand(num, generator=self.run.generator).to(self.run.device)
        return self.run.schedule.snap(low + (high - low) * uniform)
