"""Denoiser: a network, what it predicts and how it is guided, as one function x_t -> x0_pred."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .conditions import Conditions
from .errors import InvalidArgumentError, check_choice, check_integer, check_number
from .noise import PREDICTION_TYPES, NoiseSchedule, expand, to_x0

# What a network is told of the condition: nothing, classes (N,), or rows of a table by name.
Told: TypeAlias = Tensor | dict[str, Tensor] | None
SOLVER_ORDERS = (1, 2)
Call: TypeAlias = Callable[[Any, Tensor, Tensor, Told], Tensor]


def call_network(network: nn.Module, x_t: Tensor, t: Tensor, told: Told) -> Tensor:
    """`network(x_t, t)`, with classes as a third argument, and a table's rows by name."""
    if isinstance(told, dict):
        output = network(x_t, t, **told)
    else:
        output = network(x_t, t) if told is None else network(x_t, t, told)
    return output if isinstance(output, Tensor) else getattr(output, "sample", output)


class Denoiser(nn.Module):
    """Any network with a noise schedule and a prediction type.

    Args:
        network: Called as `network(x_t, t)` with `x_t` float `(N, ...)` and `t` float `(N,)` on the
            training-timestep axis; with classes as `network(x_t, t, classes)`, int64 `(N,)`; with a
            table as `network(x_t, t, **rows)`. Returns a tensor like `x_t`, or an object with that
            tensor as `.sample`. It may be of another dtype than the latents: these are cast.
        schedule: The noise schedule that the network was trained on; moved to its device.
        prediction_type: One of diffusers' strings, see `noise.PREDICTION_TYPES`.
        latent_shape: Shape of one row of `x_t`, such as `(C, H, W)`, `(C, L)` or `(D,)`.
        num_classes: Number of classes to choose from; None when there is no condition.
        null_class: The class that stands for "no condition"; needed for guidance.
        conditions: A table of conditions in the place of classes.
        guidance_scale: w of classifier-free guidance (Ho and Salimans 2022, in diffusers' form),
            `uncond + w (cond - uncond)`; 1 is plain conditional prediction at half the cost.
        guidance_rescale: Share of the guided prediction that is rescaled to the std of the
            conditional one, in [0, 1] (Lin et al. 2023, section 3.4); 0 is none.
        call: For networks that are called otherwise: `call(network, x_t, t, told)` returns the
            prediction. An importable function, so that what holds a denoiser can be saved.
        batch_size: Most rows that are sent through the network at once, however many are asked
            for; with guidance twice as many. None: all.
        solver_order: Of the deterministic steps that samples of it take along a fixed grid, see
            `transition`: 1 is DDIM, 2 is DPM-Solver++ 2M, untrained closer from 3 steps on; its
            first and last step are DDIM's, so that it changes nothing for one or two.

    Attributes:
        num_classes: Number of conditions: of classes, or of the table's rows.
        null_class: The class, or the table's row, that stands for "no condition".
        autocast: The dtype that the network computes in where torch's autocast finds that safe,
            such as `torch.bfloat16`; weights, latents and predictions stay as they are. None: off.
        network_evaluations: Rows sent through the network since construction, guidance included.

    Raises:
        InvalidArgumentError: for an `"epsilon"` network whose schedule reaches alpha = 0 (its
            prediction carries no `x_0` there), an unknown prediction type, guidance without a
            null class, a table with names that the network does not take, or a network or schedule
            of another kind; and, once it is asked,
            for a network that returns anything else than a tensor like `x_t`.
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
        conditions: Conditions | None = None,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        call: Call = call_network,
        batch_size: int | None = None,
        solver_order: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InvalidArgumentError(
                "network", network, "pass a torch.nn.Module: wrap a function in one."
            )
        if not isinstance(schedule, NoiseSchedule):
            raise InvalidArgumentError(
                "schedule",
                type(schedule).__name__,
                "pass a NoiseSchedule, such as loading.noise_schedule(scheduler) of diffusers'.",
            )
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
        self.conditions = conditions
        if conditions is not None:
            if num_classes is not None or null_class is not None:
                raise InvalidArgumentError(
                    "conditions", "with classes", "pass a table or num_classes, not both."
                )
            num_classes, null_class = len(conditions), conditions.null_row
            if call is call_network:
                _check_names(network, list(conditions.tensors()))
        if null_class is not None:
            null_class = check_integer("null_class", null_class, 0)
        self.num_classes = num_classes
        self.null_class = null_class
        self.call = call
        self.batch_size = None
        if batch_size is not None:
            self.batch_size = check_integer("batch_size", batch_size, 1)
        self.autocast: torch.dtype | None = None
        self.network_evaluations = 0
        self.set_guidance(guidance_scale, guidance_rescale)
        self.set_solver_order(solver_order)
        if device := self._device():  # else every step would copy the schedule's tables there
            schedule.to(device)
        if prediction_type == "epsilon" and schedule.ends_in_noise:
            raise InvalidArgumentError(
                "prediction_type",
                prediction_type,
                "alpha is 0 at the noisiest time, where an epsilon prediction carries no x_0: use "
                "a schedule without zero terminal SNR, or a v_prediction or sample network.",
            )

    def set_guidance(self, scale: float, rescale: float = 0.0) -> None:
        """Change `guidance_scale` and `guidance_rescale`, and with them the cost of a prediction.

        Raises:
            InvalidArgumentError: for a scale other than 1 without a null class.
        """
        scale = check_number("guidance_scale", scale)
        rescale = check_number("guidance_rescale", rescale, 0, 1)
        if scale != 1 and (self.num_classes is None or self.null_class is None):
            raise InvalidArgumentError(
                "guidance_scale",
                scale,
                "pass 1, or a conditional network together with its null_class, or a table of "
                "conditions with a null.",
            )
        self.guidance_scale, self.guidance_rescale = scale, rescale

    def set_solver_order(self, order: int) -> None:
        """Change `solver_order`.

        Raises:
            InvalidArgumentError: for another order than 1 and 2.
        """
        self.solver_order = check_order(order)

    @property
    def device(self) -> torch.device:
        """Device of the network's parameters or, where it has none, buffers."""
        return self._device() or torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the network's first floating-point parameter; None without any."""
        dtypes = (p.dtype for p in self.network.parameters() if p.is_floating_point())
        return next(dtypes, None)

    @property
    def nfe(self) -> int:
        """Network forwards that one prediction costs: 2 with guidance, else 1."""
        return 1 if self.guidance_scale == 1 else 2

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        """The network's guided prediction, `(N, ...)`, of type `prediction_type`.

        Args:
            x_t: Noisy latents, `(N, ...)`.
            t: Times, float `(N,)`.
            condition: Classes, or rows of the table, int64 `(N,)`; None for an unconditional
                network.
        """
        self.network_evaluations += self.nfe * len(x_t)
        if self.batch_size is None or len(x_t) <= self.batch_size:
            return self._predict(x_t, t, condition)
        rows = torch.arange(len(x_t), device=x_t.device).split(self.batch_size)
        parts = [
            self._predict(x_t[r], t[r], None if condition is None else condition[r]) for r in rows
        ]
        return torch.cat(parts)

    def _predict(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        if self.nfe == 1:
            return self._call(x_t, t, condition)
        if condition is None or self.null_class is None:
            raise InvalidArgumentError(
                "condition", None, "guidance needs a condition for each row."
            )
        null = torch.full_like(condition, self.null_class)
        both = self._call(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([null, condition]))
        uncond, cond = both.chunk(2)
        guided = uncond + self.guidance_scale * (cond - uncond)
        return rescale_guided(guided, cond, self.guidance_rescale)

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
        """Draw `num` conditions uniformly, int64 `(num,)`; None for an unconditional network."""
        if self.num_classes is None:
            return None
        return torch.randint(self.num_classes, (num,), generator=generator, device=generator.device)

    def _device(self) -> torch.device | None:
        tensors = itertools.chain(self.network.parameters(), self.network.buffers())
        return next((tensor.device for tensor in tensors), None)

    def _precision(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, self.autocast)

    def _call(self, x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        """The network's prediction in its own dtype and on its own device, returned as `x_t`'s."""
        device, dtype = self._device() or x_t.device, self.dtype or x_t.dtype
        told: Told = None if condition is None else condition.to(device)
        if self.conditions is not None and condition is not None:
            rows = self.conditions(condition)
            told = {
                name: row.to(device, dtype if row.is_floating_point() else row.dtype)
                for name, row in rows.items()
            }
        try:
            with self._precision(device):
                prediction = self.call(self.network, x_t.to(device, dtype), t.to(device), told)
        except RuntimeError as error:
            if dtype == t.dtype or "dtype" not in str(error):
                raise
            # Times stay in float32: bfloat16 has no 257.
            raise InvalidArgumentError(
                "network",
                f"{type(self.network).__name__} of {dtype}",
                f"cast the times, {t.dtype}, where it joins them with its own ({error}).",
            ) from error
        # One of another shape may broadcast, and train something else in silence.
        shape = getattr(prediction, "shape", type(prediction).__name__)
        if shape != x_t.shape:
            raise InvalidArgumentError(
                "network",
                type(self.network).__name__,
                f"it returned {shape} for {x_t.shape}: return a tensor like x_t, or pass call=.",
            )
        return prediction.to(x_t)


def check_order(order: int) -> int:
    """One of `SOLVER_ORDERS`."""
    if (order := check_integer("solver_order", order, 1)) not in SOLVER_ORDERS:
        raise InvalidArgumentError(
            "solver_order", order, "pass 1 for DDIM's steps or 2 for DPM-Solver++ 2M's."
        )
    return order


def _check_names(network: nn.Module, names: list[str]) -> None:
    """Refuse a table that `call_network` could not pass on."""
    try:
        signature = inspect.signature(network.forward)
    except ValueError:  # TorchScript does not say
        return
    try:
        signature.bind(None, None, **dict.fromkeys(names))
    except TypeError as error:
        raise InvalidArgumentError(
            "conditions",
            names,
            f"name them as arguments of {type(network).__name__} after x_t and t ({error}).",
        ) from error


def rescale_guided(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """Bring a guided prediction's std back towards the conditional one's (Lin et al. 2023, eq. 16).

    Args:
        guided, cond: Predictions, `(N, ...)`.
        rescale: Share of the rescaled prediction in the result, in [0, 1].
    """
    if rescale == 0:
        return guided
    axes = tuple(range(1, guided.ndim))
    factor = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (rescale * factor + (1 - rescale))
