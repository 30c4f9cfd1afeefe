"""From samples to what pretrained image networks take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InvalidArgumentError, check_choice, check_integer, check_number

MODES = ("bicubic", "bilinear", "nearest")
# Numbers of PIL's filters, as processors' files name them.
PIL_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}


class ImageInput:
    """Range, size and normalisation, differentiable: `(resize((x + 1) / 2) - mean) / std`.

    The whole image is resized, without cropping, so that every place counts; images that are not
    square are stretched. Values beyond [-1, 1] are kept, so that leaving the range is seen.

    Args:
        mean, std: Of the network's training images in [0, 1], a number a channel. One channel of
            the samples is repeated for all.
        size: Height and width that the network takes, or one number for both; None keeps the
            samples' own.
        mode: Interpolation, `"bicubic"`, `"bilinear"` (both with antialiasing, as PIL does it) or
            `"nearest"`.

    Raises:
        InvalidArgumentError: for settings that make no sense; when called, for samples that are not
            images, or have other channels.
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        size: int | tuple[int, int] | None = None,
        mode: str = "bicubic",
    ) -> None:
        self.mean = tuple(check_number("mean", m, minimum=-1e6) for m in mean)
        self.std = tuple(check_number("std", s, minimum=1e-6) for s in std)
        if not self.mean or len(self.mean) != len(self.std):
            raise InvalidArgumentError("std", std, f"pass {len(self.mean)} numbers, as for mean.")
        self._constants = torch.tensor([self.mean, self.std]).reshape(2, -1, 1, 1)
        self.mode = check_choice("mode", mode, MODES)
        self.size = None
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            self.size = check_integer("size", height, 1), check_integer("size", width, 1)

    @classmethod
    def from_processor(cls, config: Mapping[str, Any]) -> ImageInput:
        """What a `preprocessor_config.json` of transformers says."""
        size = config.get("crop_size") if config.get("do_center_crop") else None
        size = size or config["size"]
        if isinstance(size, Mapping):
            edge = size.get("shortest_edge")
            size = (size.get("height", edge), size.get("width", edge))
        mode = PIL_FILTERS.get(config.get("resample", 3), "bicubic")
        return cls(config["image_mean"], config["image_std"], size, mode)

    def __call__(self, x_0: Tensor) -> Tensor:
        """Images `(N, C', H', W')` for the network, from samples `(N, C, H, W)` in [-1, 1]."""
        if x_0.ndim != 4 or x_0.shape[1] not in (1, len(self.mean)):
            raise InvalidArgumentError(
                "x_0",
                tuple(x_0.shape),
                f"pass images of 1 or {len(self.mean)} channels; latents must be decoded first.",
            )
        images = (x_0 + 1) / 2
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = functional.interpolate(
                images, self.size, mode=self.mode, antialias=self.mode != "nearest"
            )
        # Moved once: a copy to the device at every call would make the host wait.
        self._constants = self._constants.to(images)
        mean, std = self._constants
        return (images - mean) / std
