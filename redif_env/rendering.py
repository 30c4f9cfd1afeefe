"""Pictures of a denoising trajectory."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .codec import Codec
from .errors import InvalidArgumentError

MIN_SIDE = 96  # pixels; small images are enlarged without smoothing, so that pixels stay visible
GAP = 4


def pixels(latents: Tensor, codec: Codec | None) -> Tensor:
    """What people see of latents `(N, ...)`: decoded, or themselves without a codec."""
    return latents if codec is None else codec.decode(latents)


def to_rgb(images: Tensor) -> np.ndarray:
    """Images `(N, C, H, W)` in [-1, 1] as uint8 `(N, H, W, 3)`; values outside are clipped.

    One or two channels are shown as grey (the first), more as their first three.
    """
    if images.ndim != 4:
        raise InvalidArgumentError(
            "latent_shape", tuple(images.shape[1:]), "only (C, H, W) latents can be drawn."
        )
    colour = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    pixels = ((colour.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def frames(x_t: Tensor, x0_pred: Tensor, teacher_x_0: Tensor) -> np.ndarray:
    """One picture a row: the latent, the predicted data and the teacher's answer, side by side.

    Args:
        x_t, x0_pred, teacher_x_0: `(N, C, H, W)`, shown in [-1, 1].

    Returns:
        uint8 `(N, height, width, 3)`.
    """
    panels = [to_rgb(images) for images in (x_t, x0_pred, teacher_x_0)]
    scale = -(-MIN_SIDE // min(panels[0].shape[1:3]))
    panels = [panel.repeat(scale, axis=1).repeat(scale, axis=2) for panel in panels]
    gap = np.full((*panels[0].shape[:2], GAP, 3), 255, dtype=np.uint8)
    return np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=2)
