r"""Noise schedules, and the conversions between what networks predict.

A schedule gives the scales of the forward process at time `t`,

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \epsilon \sim N(0, I).

Time is diffusers' training-timestep axis with one addition: `t = 0` is the data itself (alpha 1,
sigma 0), so that a sampler's last step ends there exactly. See docs/decisions.md, "Time zero".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, check_choice, check_integer, check_number

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


class NoiseSchedule(nn.Module, ABC):
    """The scales alpha(t) and sigma(t) of a forward process.

    Args:
        num_train_timesteps: T, the length of the time axis.

    Attributes:
        num_train_timesteps: T.
        max_timestep: The noisiest time, where sampling may start.
        initial_std: Standard deviation of `x_T`, the noise that sampling starts from.
    """

    max_timestep: float
    initial_std: float = 1.0

    def __init__(self, num_train_timesteps: int) -> None:
        super().__init__()
        self.num_train_timesteps = check_integer("num_train_timesteps", num_train_timesteps, 1)

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale at `t`: float32 of the shape and on the device of `t`."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale at `t`: float32 of the shape and on the device of `t`."""

    @property
    def ends_in_noise(self) -> bool:
        """Whether alpha is 0 at the noisiest time, as with zero terminal SNR or flow matching."""
        return bool(self.alpha(torch.tensor([self.max_timestep])) == 0)

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time at which this schedule is defined, in [0, max_timestep]."""
        return t.clamp(0.0, self.max_timestep)


class VPSchedule(NoiseSchedule):
    r"""Variance preserving (DDPM, DDIM, Stable Diffusion): alpha^2 + sigma^2 = 1.

    Defined at whole timesteps, :math:`\alpha_t = \sqrt{\bar\alpha_t}` (Ho et al. 2020, eq. 4).

    Args:
        alpha_bar: Cumulative products, float `(T,)`: a diffusers scheduler's `alphas_cumprod`.
    """

    def __init__(self, alpha_bar: Tensor) -> None:
        if not isinstance(alpha_bar, Tensor) or not alpha_bar.numel():
            raise InvalidArgumentError(
                "alpha_bar", alpha_bar, "pass a tensor, one entry a timestep."
            )
        if alpha_bar.ndim != 1:
            raise InvalidArgumentError(
                "alpha_bar", tuple(alpha_bar.shape), "pass a 1-D tensor, one entry a timestep."
            )
        # Written so that NaN fails too.
        inside = ((alpha_bar >= 0) & (alpha_bar <= 1)).all()
        if not bool(inside) or not bool((alpha_bar.diff() <= 0).all()):
            raise InvalidArgumentError(
                "alpha_bar", alpha_bar, "pass values in [0, 1] that fall as the timestep grows."
            )
        super().__init__(len(alpha_bar))
        self.max_timestep = float(len(alpha_bar) - 1)
        # In double: 1 - alpha_bar loses half its digits in float32 near the data.
        table = alpha_bar.detach().double().clone()
        table[0] = 1.0
        self.alpha_table: Tensor
        self.sigma_table: Tensor
        self.register_buffer("alpha_table", table.sqrt().float(), persistent=False)
        self.register_buffer("sigma_table", (1 - table).sqrt().float(), persistent=False)

    def alpha(self, t: Tensor) -> Tensor:
        return self._look_up(self.alpha_table, t)

    def sigma(self, t: Tensor) -> Tensor:
        return self._look_up(self.sigma_table, t)

    def snap(self, t: Tensor) -> Tensor:
        return super().snap(t).round()

    def _look_up(self, table: Tensor, t: Tensor) -> Tensor:
        # Grids are made of times on the CPU, wherever the table is; else this copies nothing.
        return table.to(t.device)[self.snap(t).long()]


class SDESchedule(NoiseSchedule):
    r"""The VP or sub-VP SDE of continuous time (arXiv 2011.13456, eq. 11, 12 and 29).

    With :math:`B(u) = \beta_{min} u + \tfrac12 (\beta_{max} - \beta_{min}) u^2` at
    :math:`u = t / T` in [0, 1]:

    .. math:: \alpha = e^{-B/2}, \qquad
        \sigma = \sqrt{1 - e^{-B}} \text{ (VP)}, \quad \sigma = 1 - e^{-B} \text{ (sub-VP)}

    Args:
        beta_min: beta at the data, a unit of u. An SDE that runs to t_1 has t_1 times its betas.
        beta_max: beta at the noise, likewise; not 0.
        sub: Whether it is the sub-VP SDE.
        num_train_timesteps: T.

    Raises:
        InvalidArgumentError: for betas that are negative, or that leave alpha at 0 in float32.
    """

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_max: float = 20.0,
        *,
        sub: bool = False,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__(num_train_timesteps)
        self.beta_min = check_number("beta_min", beta_min)
        # alpha at the end is exp(-(beta_min + beta_max) / 4): 2e-38, float32's smallest, at 346.
        self.beta_max = check_number("beta_max", beta_max, 1e-6, 340 - self.beta_min)
        self.sub = bool(sub)
        self.max_timestep = float(num_train_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        return (-self._integral(t) / 2).exp().float()

    def sigma(self, t: Tensor) -> Tensor:
        # 1 - exp(-B) loses its digits near the data.
        variance = -(-self._integral(t)).expm1()
        return (variance if self.sub else variance.sqrt()).float()

    def _integral(self, t: Tensor) -> Tensor:
        """The integral B of beta, in double."""
        u = self.snap(t).double() / self.num_train_timesteps
        return self.beta_min * u + (self.beta_max - self.beta_min) * u**2 / 2


class VESchedule(NoiseSchedule):
    r"""Variance exploding (EDM): alpha = 1, and sigma follows Karras et al. 2022, eq. 5.

    .. math:: \sigma(t) = \left(\sigma_{min}^{1/\rho}
        + \tfrac{t}{T} (\sigma_{max}^{1/\rho} - \sigma_{min}^{1/\rho})\right)^\rho,
        \quad \sigma(0) = 0.
    """

    def __init__(
        self,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        num_train_timesteps: int = 1000,
    ) -> None:
        super().__init__(num_train_timesteps)
        self.sigma_min = check_number("sigma_min", sigma_min)
        self.sigma_max = check_number("sigma_max", sigma_max)
        self.rho = check_number("rho", rho, minimum=1e-6)
        if not self.sigma_min < self.sigma_max:
            raise InvalidArgumentError("sigma_max", sigma_max, f"pass more than {sigma_min=}.")
        self.max_timestep = float(num_train_timesteps)
        self.initial_std = self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t, dtype=torch.float32)

    def sigma(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        ramp = self.snap(t).double() / self.num_train_timesteps
        sigma = (low + ramp * (high - low)) ** self.rho
        return torch.where(t > 0, sigma, 0.0).float()


class FlowSchedule(NoiseSchedule):
    """Flow matching: alpha = 1 - t/T, sigma = t/T (Lipman et al. 2023, eq. 20)."""

    def __init__(self, num_train_timesteps: int = 1000) -> None:
        super().__init__(num_train_timesteps)
        self.max_timestep = float(num_train_timesteps)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - self.sigma(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.snap(t).float() / self.num_train_timesteps


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler steps through.

    Args:
        scheduler: Any scheduler with `alphas_cumprod` (VP), a flow-matching one (or another with
            `use_flow_sigmas`), or an EDM one.

    Raises:
        InvalidArgumentError: for a scheduler of another kind.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return FlowSchedule(config.num_train_timesteps)
    if name.startswith("EDM"):
        return VESchedule(
            config.sigma_min, config.sigma_max, config.rho, config.num_train_timesteps
        )
    if hasattr(scheduler, "alphas_cumprod"):
        alpha_bar = scheduler.alphas_cumprod.clone()
        if config.get("rescale_betas_zero_snr"):
            alpha_bar[-1] = 0.0  # some write 2^-24, which can be more than the entry before it
        return VPSchedule(alpha_bar)
    raise InvalidArgumentError(
        "scheduler", name, "pass a scheduler with alphas_cumprod, a FlowMatch* or an EDM* one."
    )


def prediction_type(scheduler: Any) -> str:
    """What the network of `scheduler` predicts, as diffusers names it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def expand(scale: Tensor, x: Tensor) -> Tensor:
    """Reshape per-row scales `(N,)` to `(N, 1, ..., 1)` so that they broadcast over `x`."""
    return scale.reshape(-1, *[1] * (x.ndim - 1))


def to_x0(
    prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    r"""The `x_0` that a network's prediction stands for.

    With :math:`v = \alpha\epsilon - \sigma x_0` (Salimans and Ho 2022, appendix D) and
    :math:`\mathrm{flow} = \epsilon - x_0` (Liu et al. 2023). Holds for any (alpha, sigma).

    Args:
        prediction: Network output, `(N, ...)`.
        x_t: Noisy latents, `(N, ...)`.
        alpha: Signal scale, broadcastable over `x_t`; not 0 for `"epsilon"`.
        sigma: Noise scale, broadcastable over `x_t`.
        prediction_type: One of `PREDICTION_TYPES`.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return (alpha * x_t - sigma * prediction) / (alpha**2 + sigma**2)
    if prediction_type == "flow_prediction":
        return (x_t - sigma * prediction) / (alpha + sigma)
    return prediction


def from_x0(
    x0_pred: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> Tensor:
    """The prediction of type `prediction_type` that stands for `x0_pred`: the inverse of `to_x0`.

    Args: as for `to_x0`; `sigma` must not be 0 except for `"sample"`.
    """
    check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if prediction_type == "sample":
        return x0_pred
    eps_pred = (x_t - alpha * x0_pred) / sigma
    if prediction_type == "v_prediction":
        return alpha * eps_pred - sigma * x0_pred
    if prediction_type == "flow_prediction":
        return eps_pred - x0_pred
    return eps_pred
