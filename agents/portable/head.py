"""ScheduleHead: which time a few-step student steps to next, as a diffusers model."""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class Features(nn.Module):
    """What is known of a state in one vector.

    Args:
        latent_shape: Of a sample.
        num_classes: Number of classes, or 0.
        width: Length of the vector.
    """

    POOLED_SIDE = 8

    def __init__(self, latent_shape: list[int], num_classes: int, width: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        image = len(latent_shape) == 3
        self.pool = nn.AdaptiveAvgPool2d(self.POOLED_SIDE) if image else nn.Identity()
        size = latent_shape[0] * self.POOLED_SIDE**2 if image else torch.Size(latent_shape).numel()
        self.body = nn.Sequential(
            nn.Linear(size + 2 + num_classes, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        )

    def forward(self, x_t: Tensor, known: Tensor, labels: Tensor | None) -> Tensor:
        """Features `(N, width)` of latents, what is known of their times `(N, 2)`, and classes."""
        parts = [self.pool(x_t).flatten(1), known]
        if labels is not None and self.num_classes:
            parts.append(nn.functional.one_hot(labels, self.num_classes).to(x_t))
        return self.body(torch.cat(parts, 1))


class ScheduleHead(ModelMixin, ConfigMixin):
    """The most likely time that comes next.

    Args:
        kind: `"beta"`: the share of the time that is kept; `"categorical"`: one of `candidates`.
        max_steps, min_steps: Most and fewest steps of a sample.
        latent_shape: Of a sample.
        num_classes: Number of classes, or 0.
        width: Hidden units of the network that tells samples apart.
        num_train_timesteps: Length of the time axis.
        max_timestep: Largest time.
        gap: Smallest step in time.
        num_parameters: Columns of the table.
        whole: Whether times are whole numbers.
    """

    @register_to_config
    def __init__(
        self,
        kind: str,
        max_steps: int,
        min_steps: int,
        latent_shape: list[int],
        num_classes: int,
        width: int,
        num_train_timesteps: int,
        max_timestep: float,
        gap: float,
        num_parameters: int,
        whole: bool = True,
    ) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(max_steps, num_parameters))
        self.features = Features(latent_shape, num_classes, width)
        self.change = nn.Linear(width, num_parameters)
        if kind == "categorical":
            self.register_buffer("candidates", torch.zeros(num_parameters))

    def first(self, x_T: Tensor, labels: Tensor | None = None) -> Tensor:
        """The time that samples of noise `(N, *latent_shape)` start at, `(N,)`."""
        t = self.table.new_full((len(x_T),), self.config.max_timestep + self.config.gap)
        return self(x_T, t, torch.full_like(t, -1).long(), labels)

    def forward(
        self, x_t: Tensor, t: Tensor, step_index: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """The next time, `(N,)`; 0 is the data.

        Args:
            x_t: Latents, `(N, *latent_shape)`.
            t: Their times, `(N,)`.
            step_index: Steps made, int64 `(N,)`.
            labels: Classes, int64 `(N,)`, where there are any.
        """
        config = self.config
        known = torch.stack([t / config.num_train_timesteps, 1 - step_index / config.max_steps], 1)
        row = (step_index + 1).clamp_max(config.max_steps - 1)
        raw = self.table[row] + self.change(self.features(x_t, known, labels))
        return self._next(raw, t, step_index)

    def _next(self, raw: Tensor, t: Tensor, step_index: Tensor) -> Tensor:
        config = self.config
        steps_after = (config.min_steps - 1 - step_index).clamp_min(0)
        choose = self._categorical if config.kind == "categorical" else self._beta
        s = torch.maximum(choose(raw, t, steps_after), config.gap * steps_after)
        return torch.where(step_index + 1 >= config.max_steps, 0.0, s)

    def _beta(self, raw: Tensor, t: Tensor, steps_after: Tensor) -> Tensor:
        stops = (raw[:, 2] > 0) & (steps_after == 0)
        s = (torch.where(stops, 0.0, raw[:, 0].sigmoid()) * t).clamp_max(self.config.max_timestep)
        s = s.round() if self.config.whole else s
        return torch.minimum(s, (t - self.config.gap).clamp_min(0))

    def _categorical(self, raw: Tensor, t: Tensor, steps_after: Tensor) -> Tensor:
        times = self.candidates
        below = len(times) - 1 - torch.arange(len(times), device=t.device)
        valid = times <= (t - self.config.gap).clamp_min(0).unsqueeze(1)
        valid &= below >= steps_after.unsqueeze(1)
        valid[:, -1] |= ~valid.any(1)
        logits = raw.masked_fill(~valid, torch.finfo(raw.dtype).min).log_softmax(1)
        stops = (logits[:, -1] > math.log(0.5)) | ~valid[:, :-1].any(1)
        return times[torch.where(stops, len(times) - 1, logits[:, :-1].argmax(1))]
