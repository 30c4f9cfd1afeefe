"""Features of the standard Inception network, for the FID that papers report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from redif_env.errors import RewardModelError, require
from redif_env.rendering import to_rgb

BATCH_SIZE = 64


def load_inception(
    path: str | Path, device: str | torch.device = "cpu"
) -> Callable[[Tensor], Tensor]:
    """The 2048 features of torchmetrics' Inception v3, from images `(N, C, H, W)` in [-1, 1].

    Images are rounded to 8 bits and resized as the original code does it (Heusel et al. 2017),
    without antialiasing; one channel is repeated. Nothing is downloaded.

    Args:
        path: Weights of torch-fidelity, `weights-inception-2015-12-05-6726825d.pth`.
        device: Where the network goes.

    Returns:
        A function to features, float32 `(N, 2048)`.

    Raises:
        RewardModelError: if the file is missing, or does not hold these weights.
        MissingExtraError: without torch-fidelity, extra `fid`.
    """
    path = Path(path)
    remedy = "pass the weights of torch-fidelity's Inception; nothing is downloaded."
    if not path.is_file():
        raise RewardModelError("inception", str(path), f"there is no such file: {remedy}")
    require("torch_fidelity", "fid")
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        # The library itself would unpickle anything: look first.
        torch.load(path, map_location="cpu", weights_only=True)
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(path))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RewardModelError("inception", str(path), f"{remedy} ({error})") from error
    network.use_antialias = False
    return _extractor(network.to(device).requires_grad_(False))


def _extractor(network: nn.Module) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        pixels = torch.from_numpy(to_rgb(images)).permute(0, 3, 1, 2)
        batches = pixels.split(BATCH_SIZE)
        return torch.cat([network(batch.to(images.device)).float() for batch in batches])

    return features
