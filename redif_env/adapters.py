r"""Networks of other conventions as networks of `x_t` and `t`, for `Denoiser`.

Many papers write a network for :math:`x = x_0 + \sigma\epsilon` and tell it sigma. Any schedule is
that after division: :math:`x_t / \alpha_t = x_0 + (\sigma_t / \alpha_t)\,\epsilon`. Others take
`x_t` as it is, with a time of another unit.
"""

from __future__ import annotations

from torch import Tensor, nn

from .denoiser import Call, Told, call_network
from .errors import InvalidArgumentError, check_number
from .noise import NoiseSchedule, expand


class SigmaNetwork(nn.Module):
    """A denoiser D(x, sigma) as a network that predicts `"sample"`.

    Args:
        network: `network(x, sigma)` with sigma `(N,)`, and the condition after it, returns `x_0`.
        schedule: The schedule that the denoiser will have.

    Raises:
        InvalidArgumentError: for a schedule that reaches alpha = 0, where sigma is infinite.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule) -> None:
        super().__init__()
        if schedule.ends_in_noise:
            raise InvalidArgumentError(
                "schedule", type(schedule).__name__, "alpha is 0 at its end: sigma is infinite."
            )
        self.network = network
        self.schedule = schedule

    def forward(self, x_t: Tensor, t: Tensor, told: Tensor | None = None, **rows: Tensor) -> Tensor:
        """The estimate of the data, like `x_t`."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = x_t / expand(alpha, x_t).to(x_t.dtype)
        return self.estimate(x, sigma / alpha, rows or told)

    def estimate(self, x: Tensor, sigma: Tensor, told: Told) -> Tensor:
        """`x_0` from `x = x_0 + sigma eps`."""
        return call_network(self.network, x, sigma, told)


class ScoreNetwork(SigmaNetwork):
    r"""A score network as one that predicts `"sample"`, by Tweedie's formula.

    :math:`E[x_0 | x] = x + \sigma^2 \nabla_x \log p_\sigma(x)` (Efron 2011, eq. 1.4). Arguments as
    for `SigmaNetwork`; the network returns the score.
    """

    def estimate(self, x: Tensor, sigma: Tensor, told: Told) -> Tensor:
        return x + expand(sigma, x) ** 2 * call_network(self.network, x, sigma, told)


class EDMNetwork(SigmaNetwork):
    r"""A raw network F with EDM's preconditioning (Karras et al. 2022, table 1 and eq. 7).

    .. math:: D(x; \sigma) = c_{skip}\,x + c_{out}\,F(c_{in}\,x;\ \tfrac14 \ln\sigma)

    Args:
        network, schedule: As for `SigmaNetwork`.
        sigma_data: Standard deviation of the data.
        sign: -1 for diffusers' `"v_prediction"`, whose c_out has the opposite sign.
        call: How F is called, as for `Denoiser`.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        sigma_data: float = 0.5,
        sign: float = 1.0,
        call: Call = call_network,
    ) -> None:
        super().__init__(network, schedule)
        self.call = call
        self.sigma_data = check_number("sigma_data", sigma_data, 1e-12)
        self.sign = sign

    def estimate(self, x: Tensor, sigma: Tensor, told: Told) -> Tensor:
        scale, data = expand(sigma, x), self.sigma_data
        total = (scale**2 + data**2).sqrt()
        raw = self.call(self.network, (x / total).to(x.dtype), sigma.log() / 4, told)
        return (data / total) ** 2 * x + self.sign * scale * data / total * raw

    def extra_repr(self) -> str:
        """What a bank of answers must know beside the weights."""
        return f"sigma_data={self.sigma_data}, sign={self.sign}"


class TimeNetwork(nn.Module):
    """A network of `x_t` and a time of its own, as one of our times; it predicts what it did.

    Args:
        network: `network(x_t, time)` with time `(N,)`, and the condition after it.
        schedule: The schedule that the denoiser will have.
        end_time: What the network calls our time T, and in proportion below: 1 for networks of
            [0, 1], t_1 for an SDE that runs to t_1, 999 where [0, 1] is scaled by 999 (as in the
            published code of Song et al. 2021).
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, end_time: float = 1.0) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.end_time = check_number("end_time", end_time, 1e-12)

    def forward(self, x_t: Tensor, t: Tensor, told: Tensor | None = None, **rows: Tensor) -> Tensor:
        """The network's prediction, like `x_t`."""
        time = t * (self.end_time / self.schedule.num_train_timesteps)
        return call_network(self.network, x_t, time, rows or told)

    def extra_repr(self) -> str:
        """What a bank of answers must know beside the weights."""
        return f"end_time={self.end_time}"


class TimeScoreNetwork(TimeNetwork):
    r"""A score :math:`\nabla_{x_t} \log p_t(x_t)` as a network that predicts `"epsilon"`.

    Given `x_0` the score is :math:`-\epsilon / \sigma_t`, and the network's is its mean (Vincent
    2011), for any schedule: :math:`E[\epsilon | x_t] = -\sigma_t \nabla_{x_t} \log p_t(x_t)`.
    Arguments as for `TimeNetwork`; the network returns the score.
    """

    def forward(self, x_t: Tensor, t: Tensor, told: Tensor | None = None, **rows: Tensor) -> Tensor:
        """The estimate of the noise, like `x_t`."""
        sigma = expand(self.schedule.sigma(t), x_t).to(x_t.dtype)
        return -sigma * super().forward(x_t, t, told, **rows)
