r"""How likely the teacher finds a sample, by how well it denoises it.

For a diffusion model in continuous time the variational bound is an integral over the log
signal-to-noise ratio :math:`\lambda = \log(\alpha^2 / \sigma^2)` (Kingma et al. 2021, eq. 14 and
appendix; with equality for the exact denoiser, by the I-MMSE relation of Guo et al. 2005),

.. math:: \log p(x_0) = c - \tfrac12 \int E_\epsilon |\epsilon - \hat\epsilon(x_t, t)|^2 d\lambda.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, check_integer, check_number
from ..noise import NoiseSchedule, expand
from ..teacher import Teacher
from .base import Reward


def log_snr_levels(
    schedule: NoiseSchedule, log_snr: tuple[float, float], num: int
) -> tuple[Tensor, float]:
    """The midpoints of equal intervals of log-SNR, as whole times.

    Args:
        schedule: Noise schedule.
        log_snr: Range of log-SNR in nats, cut to what the whole times of the schedule reach.
        num: Number of intervals.

    Returns:
        Times, float32 `(num,)`, the noisiest first, and the width of the range that is left.

    Raises:
        InvalidArgumentError: if nothing is left of the range.
    """
    device = next((buffer.device for buffer in schedule.buffers()), torch.device("cpu"))
    times = torch.arange(1, int(schedule.max_timestep) + 1, dtype=torch.float32, device=device)
    alpha, sigma = schedule.alpha(times).double(), schedule.sigma(times).double()
    reached = 2 * (alpha.log() - sigma.log())
    usable = reached.isfinite()  # not so with zero terminal SNR
    times, reached = times[usable], reached[usable]
    low, high = max(log_snr[0], float(reached.min())), min(log_snr[1], float(reached.max()))
    if not low < high:
        ends = f"[{float(reached.min()):.1f}, {float(reached.max()):.1f}]"
        raise InvalidArgumentError("log_snr", log_snr, f"pass a range that overlaps {ends}.")
    wanted = low + (torch.arange(num, device=device) + 0.5) / num * (high - low)
    return times[(reached - wanted[:, None]).abs().argmin(1)], high - low


class TeacherLikelihood(Reward):
    """The teacher's log-likelihood of a sample in nats an element, up to a constant: a proxy.

    The bound above over a range of log-SNR, by the midpoint rule, with a few draws of noise that
    are fixed at construction and shared by all rows: a function of the row alone, the same in
    every call, so that samples are compared under common random numbers. It does not look at the
    teacher's answer. With guidance it is that of the guided denoiser, which is no density.

    Likely is not good: the likeliest images are smooth (Nalisnick et al. 2019), and a student paid
    for nothing else loses its variety. Use it in a sum, and watch coverage.

    Args:
        teacher: Whose denoiser to ask; it is shared, not copied.
        num_levels: Noise levels.
        num_noises: Draws of noise a level; even ones are the negatives of those before them, which
            cancels the odd part of the error.
        log_snr: Range of log-SNR, cut to the schedule's. The default leaves out levels where the
            sample is all noise, or the noise below what networks resolve.
        seed: Of the noise. A student that climbs this reward with one seed and not with another has
            learned the noise.

    Attributes:
        nfe: What scoring a sample costs, guidance included.
        timesteps: Times of the levels, float32 `(num_levels,)`.
    """

    name = "teacher_likelihood"

    def __init__(
        self,
        teacher: Teacher,
        num_levels: int = 4,
        num_noises: int = 2,
        log_snr: tuple[float, float] = (-4.0, 4.0),
        seed: int = 0,
    ) -> None:
        if not isinstance(teacher, Teacher):
            raise InvalidArgumentError("teacher", teacher, "pass a Teacher, as load_teacher gives.")
        self.denoiser = teacher.denoiser
        num_levels = check_integer("num_levels", num_levels, 1)
        num_noises = check_integer("num_noises", num_noises, 1)
        low, high = (check_number("log_snr", end, minimum=-1e3) for end in log_snr)
        schedule = self.denoiser.schedule
        self.timesteps, self.width = log_snr_levels(schedule, (low, high), num_levels)
        self.noise = _antithetic(num_levels, num_noises, self.denoiser.latent_shape, seed)
        self.nfe = num_levels * num_noises * self.denoiser.nfe

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        if tuple(x_0.shape[1:]) != self.denoiser.latent_shape:
            raise InvalidArgumentError(
                "x_0", tuple(x_0.shape), f"pass latents of shape {self.denoiser.latent_shape}."
            )
        # Moved once: a copy to the device at every call would make the host wait.
        self.noise, self.timesteps = self.noise.to(x_0.device), self.timesteps.to(x_0.device)
        errors = [
            self._error(x_0, eps.expand_as(x_0), t.expand(len(x_0)), condition)
            for t, level in zip(self.timesteps, self.noise, strict=True)
            for eps in level
        ]
        return -0.5 * self.width * torch.stack(errors).mean(0)

    def _error(self, x_0: Tensor, eps: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """Squared error an element of the predicted noise, `(N,)`."""
        schedule = self.denoiser.schedule
        alpha, sigma = expand(schedule.alpha(t), x_0), expand(schedule.sigma(t), x_0)
        x_t = alpha * x_0 + sigma * eps
        # eps - eps_pred = alpha (x0_pred - x_0) / sigma, whatever the network predicts.
        error = alpha / sigma * (self.denoiser(x_t, t, condition) - x_0)
        return error.square().flatten(1).mean(1)


def _antithetic(levels: int, noises: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Standard normal `(levels, noises, *shape)` whose pairs are opposite."""
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
    half = torch.randn((levels, (noises + 1) // 2, *shape), generator=generator)
    return torch.stack([half, -half], 2).flatten(1, 2)[:, :noises]
