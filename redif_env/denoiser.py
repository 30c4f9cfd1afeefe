"""Denoiser: a network, what it predicts and how it is guided, as one function x_t -> x0_pred."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, check_choice, check_integer, check_number
from .noise import PREDICTION_TYPES, NoiseSchedule, expand, to_x0


class Denoiser(nn.Module):
    """Any network with a noise schedule and a prediction type.

    Args:
        network: Called as `network(x_t, t)` or `network(x_t, t, condition)` with `x_t` float
            `(N, ...)`, `t` float `(N,)` on the training-timestep axis and `condition` `(N,)` or
            `(N, ...)`; returns a tensor like `x_t`, or an object with that tensor as `.sample`.
        schedule: The noise schedule that the network was trained on.
        prediction_type: One of diffusers' strings, see `noise.PREDICTION_TYPES`.
        latent_shape: Shape of one row of `x_t`, such as `(C, H, W)`.
        num_classes: Number of classes to choose from; None when there is no condition.
        null_class: The class that stands for "no condition"; needed for guidance.
        guidance_scale: w of classifier-free guidance (Ho and Salimans 2022, in diffusers' form),
            `uncond + w (cond - uncond)`; 1 is plain conditional prediction at half the cost.

    Attributes:
        network_evaluations: Rows sent through the network since construction, guidance included.

    Raises:
        InvalidArgumentError: for an `"epsilon"` network whose schedule reaches alpha = 0 (its
            prediction carries no `x_0` there), an unknown prediction type, or guidance without a
            null class.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction_type: str,
        latent_shape: tuple[int, ...],
        *,
        num_classes: int | None = None,
        null_class: int | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.prediction_type = check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if not isinstance(latent_shape, Sequence):
            raise InvalidArgumentError(
                "latent_shape", latent_shape, "pass a shape such as (1, 8, 8)."
            )
        self.latent_shape = tuple(check_integer("latent_shape", n, 1) for n in latent_shape)
        if num_classes is not None:
            num_classes = check_integer("num_classes", num_classes, 1)
        self.num_classes = num_classes
        self.null_class = null_class
        self.guidance_scale = check_number("guidance_scale", guidance_scale)
        self.network_evaluations = 0
        if self.guidance_scale != 1 and (num_classes is None or null_class is None):
            raise InvalidArgumentError(
                "guidance_scale",
                guidance_scale,
                "pass 1, or a conditional network together with its null_class.",
            )
        end = torch.tensor([schedule.max_timestep], device=self.device)
        if prediction_type == "epsilon" and bool(schedule.alpha(end) == 0):
            raise InvalidArgumentError(
                "prediction_type",
                prediction_type,
                "alpha is 0 at the noisiest time, where an epsilon prediction carries no x_0: use "
                "a schedule without zero terminal SNR, or a v_prediction or sample network.",
            )

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters."""
        return next((p.device for p in self.network.parameters()), torch.device("cpu"))

    @property
    def nfe(self) -> int:
        """Network forwards that one prediction costs: 2 with guidance, else 1."""
        return 1 if self.guidance_scale == 1 else 2

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The network's guided prediction, `(N, ...)`, of type `prediction_type`.

        Args:
            x_t: Noisy latents, `(N, ...)`.
            t: Times, float `(N,)`.
            condition: Classes, int64 `(N,)`; None for an unconditional network.
        """
        self.network_evaluations += self.nfe * len(x_t)
        if self.nfe == 1:
            return self._call(x_t, t, condition)
        if condition is None or self.null_class is None:
            raise InvalidArgumentError(
                "condition", None, "guidance needs a condition for each row."
            )
        null = torch.full_like(condition, self.null_class)
        both = self._call(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, condition]))
        uncond, cond = both.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The estimate of the data, `x0_pred` `(N, ...)`. Arguments as for `predict`."""
        prediction = self.predict(x_t, t, condition)
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        return to_x0(prediction, x_t, alpha, sigma, self.prediction_type)

    def initial_noise(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw `num` rows of `x_T`, float32 `(num, *latent_shape)`, on the generator's device."""
        noise = torch.randn((num, *self.latent_shape), generator=generator, device=generator.device)
        return self.schedule.initial_std * noise

    def initial_condition(self, num: int, generator: torch.Generator) -> Tensor | None:
        """Draw `num` classes uniformly, int64 `(num,)`; None for an unconditional network."""
        if self.num_classes is None:
            return None
        return torch.randint(self.num_classes, (num,), generator=generator, device=generator.device)

    def _call(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        output = self.network(x_t, t) if condition is None else self.network(x_t, t, condition)
        return output if isinstance(output, Tensor) else output.sample
