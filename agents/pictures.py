"""Pictures of samples for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from redif_env.codec import Codec
from redif_env.files import replacing
from redif_env.rendering import pixels, to_rgb

NUM_COLUMNS = 10


def save_samples(
    path: str | Path,
    rows: Mapping[str, Tensor],
    condition: Tensor | None,
    codec: Codec | None = None,
) -> None:
    """Draw samples of the same noise below each other, one labelled row a method.

    Args:
        path: PNG file to write.
        rows: Images `(N, C, H, W)` in [-1, 1] by label; the same N tasks in each. Nothing is
            written for latents that are not images.
        condition: Classes or prompts, int64 `(N,)`; the first task of each is shown. None shows the
            first ten tasks.
        codec: What decodes the images, where they are latents.
    """
    first = next(iter(rows.values()))
    if first.ndim != 4:
        return
    shown = columns(len(first), condition)
    figure = Figure(figsize=(1.0 * len(shown) + 1.6, 1.05 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    for row, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, to_rgb(pixels(images[shown], codec)), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center")
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, dpi=120)


def columns(num: int, condition: Tensor | None) -> list[int]:
    """The tasks that `save_samples` shows, of `num` with these classes."""
    if condition is None:
        return list(range(min(num, NUM_COLUMNS)))
    classes = condition.unique().tolist()[:NUM_COLUMNS]
    return [int(torch.nonzero(condition == label)[0]) for label in classes]
