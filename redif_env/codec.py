"""Codec: between the latents that are denoised and the pixels that people see."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .errors import check_integer

BATCH_SIZE = 16  # decoding a megapixel image takes gigabytes

# By codec, latents and whether gradients are wanted: the latents, so that no others get their id,
# and their pixels.
_Kept = dict[tuple[int, int, bool], tuple[Tensor, Tensor]]
_kept: contextvars.ContextVar[_Kept | None] = contextvars.ContextVar("pixels", default=None)


@contextlib.contextmanager
def decoding_once() -> Iterator[None]:
    """Inside, codecs keep what they decode, and give it out again for the same tensor."""
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


class Codec(nn.Module):
    """An autoencoder, and how the latents that are denoised relate to its own.

    The network's latents are `z = scale * x + shift`, where `x` are those that are denoised.

    Args:
        network: Has `decode(z)` and `encode(pixels)`, which return a tensor, or an object that
            holds it as diffusers' autoencoders do.
        scale, shift: Numbers, or tensors that broadcast over `(N, C, H, W)`: in diffusers' terms
            `1 / scaling_factor` and `shift_factor`.
        batch_size: Rows that are sent through the network at once.
    """

    def __init__(
        self,
        network: nn.Module,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float32))
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float32))
        self.batch_size = check_integer("batch_size", batch_size, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of latents `(N, C, H, W)`, float32 `(N, C', H', W')`, about in [-1, 1]."""
        kept, key = _kept.get(), (id(self), id(latents), torch.is_grad_enabled())
        if kept is not None and key in kept:
            return kept[key][1]
        network: Any = self.network
        rows = (self.scale * latents + self.shift).split(self.batch_size)
        pixels = torch.cat([_decoded(network.decode(z)).float() for z in rows])
        if kept is not None:
            kept[key] = latents, pixels
        return pixels

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents of pixels in [-1, 1], the inverse of `decode` as far as the network is one."""
        network: Any = self.network
        rows = pixels.split(self.batch_size)
        z = torch.cat([_encoded(network.encode(images)).float() for images in rows])
        return (z - self.shift) / self.scale


def _decoded(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.sample


def _encoded(output: Any) -> Tensor:
    """The most likely latents: an encoder that draws would be no function of the pixels."""
    if isinstance(output, Tensor):
        return output
    return output.latents if hasattr(output, "latents") else output.latent_dist.mode()
