"""AdaptivePipeline: a few-step student that chooses its times, and how many, for each sample."""

from typing import Any, Optional

import torch
from diffusers import DiffusionPipeline
from torch import Tensor


class AdaptivePipeline(DiffusionPipeline):
    """Deterministic DDIM to the times that a schedule head chooses.

    Args:
        unet: A `UNet2DModel`.
        scheduler: Any with `alphas_cumprod`: where the noise schedule comes from.
        schedule_head: A `ScheduleHead`.
        guidance_scale: Of classifier-free guidance; 1 is none.
        null_class: The class that stands for none.
        guidance_rescale: Share of the guided prediction that is rescaled to the std of the
            conditional one.
    """

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        schedule_head: Any,
        guidance_scale: float = 1.0,
        null_class: Optional[int] = None,  # noqa: UP045 (diffusers 0.35 reads no other)
        guidance_rescale: float = 0.0,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, schedule_head=schedule_head)
        self.register_to_config(
            guidance_scale=guidance_scale, null_class=null_class, guidance_rescale=guidance_rescale
        )

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: Tensor | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sample.

        Args:
            batch_size: N, unless latents are given.
            class_labels: Classes, int64 `(N,)`, where the student has any.
            generator: Of the noise.
            latents: The noise itself, float32 `(N, *latent_shape)`.

        Returns:
            Samples, float32 `(N, *latent_shape)`, usually in [-1, 1]; and the steps that each one
            took, int64 `(N,)`.
        """
        head = self.schedule_head
        if latents is None:
            shape = (batch_size, *head.config.latent_shape)
            place = "cpu" if generator is None else generator.device
            latents = torch.randn(shape, generator=generator, device=place)
        samples = latents.to(self.device, torch.float32).clone()
        num_steps = torch.zeros(len(samples), dtype=torch.int64, device=samples.device)
        rows = torch.arange(len(samples), device=samples.device)
        labels = None if class_labels is None else class_labels.to(samples.device)
        t = head.first(samples, labels)
        while len(rows):  # samples that have arrived cost nothing more
            x_t, index = samples[rows], num_steps[rows]
            own = None if labels is None else labels[rows]
            s = head(x_t, t, index, own)
            samples[rows] = self._step(x_t, self._predict(x_t, t, own), t, s)
            num_steps[rows] += 1
            rows, t = rows[s > 0], s[s > 0]
        return samples, num_steps

    def _predict(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        scale, null = self.config.guidance_scale, self.config.null_class
        cond = self._ask(x_t, t, labels)
        if scale == 1 or labels is None:
            return cond
        uncond = self._ask(x_t, t, torch.full_like(labels, null))
        guided = uncond + scale * (cond - uncond)
        rescale, axes = self.config.guidance_rescale, tuple(range(1, x_t.ndim))
        if not rescale:
            return guided
        factor = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        return guided * (rescale * factor + (1 - rescale))

    def _ask(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        prediction = self.unet(x_t, t, class_labels=labels).sample
        return prediction[:, : x_t.shape[1]]  # without the variances

    def _step(self, x_t: Tensor, prediction: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The deterministic DDIM step from t to s, times `(N,)`."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self._scales(t, x_t), self._scales(s, x_t)
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            x_0 = (x_t - sigma_t * prediction) / alpha_t
        elif kind == "v_prediction":
            x_0 = alpha_t * x_t - sigma_t * prediction
        else:
            x_0 = prediction
        return alpha_s * x_0 + sigma_s * (x_t - alpha_t * x_0) / sigma_t

    def _scales(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scales of signal and noise at times `(N,)`; time 0 is the data itself."""
        alpha_bar = self.scheduler.alphas_cumprod.double().to(t.device)[t.round().long()]
        alpha_bar = torch.where(t > 0, alpha_bar, 1.0).reshape(-1, *[1] * (x.ndim - 1))
        return alpha_bar.sqrt().to(x), (1 - alpha_bar).sqrt().to(x)
