"""LPIPS without torchvision: the published heads on a backbone from a file."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import InvalidArgumentError, RewardModelError, check_choice
from .base import register_reward
from .features import Features
from .images import ImageInput

# torchvision's `features`: convolutions as (channels, kernel, stride, padding), each with its ReLU,
# and pools "M"; then the kernel of the pools.
_VGG = (64, 64, "M", 128, 128, "M", *[256] * 3, "M", *[512] * 3, "M", *[512] * 3)
BACKBONES: dict[str, tuple[list[Any], int]] = {
    "alex": (
        [(64, 11, 4, 2), "M", (192, 5, 1, 2), "M", *((c, 3, 1, 1) for c in (384, 256, 256))],
        3,
    ),
    "vgg": (["M" if c == "M" else (c, 3, 1, 1) for c in _VGG], 2),
}
# The ReLUs whose outputs are compared (Zhang et al. 2018): of every convolution, of every block.
LAYERS = {"alex": ("1", "4", "7", "9", "11"), "vgg": ("3", "8", "15", "22", "29")}
SMALLEST = {"alex": 31, "vgg": 16}
FILES = {"alex": "alexnet-owt-7be5be79.pth", "vgg": "vgg16-397923af.pth"}
DOWNLOADS = "https://download.pytorch.org/models/"
# The published scaling of inputs in [-1, 1], in terms of [0, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
INPUT = {"mean": [(s + 1) / 2 for s in SHIFT], "std": [s / 2 for s in SCALE]}


class LPIPS(Features):
    """Minus the learned perceptual distance (Zhang et al. 2018, version 0.1); 0 for a copy.

    The heads are the published ones, which torchmetrics carries. The backbone is a file with the
    weights of torchvision's AlexNet or VGG16, in torchvision's names; torchvision is not needed.
    The map is the distance of each place, every layer's on the grid of the samples.

    Args:
        weights: The backbone's file, `.pth` or `.safetensors`; default: where torch keeps what it
            downloaded, `torch.hub.get_dir()/checkpoints`.
        net: `"alex"` or `"vgg"`.
        map: Whether to have a map.
        size: What images are resized to first: a must for images below 31 pixels (16 for VGG), for
            which LPIPS is not defined. None compares them as they are, as published.
        local_files_only: Whether a missing backbone is an error; False downloads it (233 or
            528 MB).

    Raises:
        RewardModelError: if the file is missing or of another network.
        InvalidArgumentError: when scoring, for images that are too small.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        net: str = "alex",
        map: bool = True,
        size: int | None = None,
        local_files_only: bool = True,
    ) -> None:
        self.net = check_choice("net", net, tuple(BACKBONES))
        state = _load_backbone(weights, net, local_files_only)
        preprocess = ImageInput(**INPUT, size=size, mode="bilinear")
        super().__init__(
            _backbone(net, state), LAYERS[net], map=map, preprocess=preprocess, name="lpips"
        )
        self.heads = _load_heads(net)

    def features(self, x_0: Tensor) -> list[Tensor]:
        size = self.preprocess.size or x_0.shape[2:]  # type: ignore[attr-defined]
        if x_0.ndim == 4 and min(size) < SMALLEST[self.net]:
            raise InvalidArgumentError(
                "size",
                tuple(size),
                f"LPIPS is not defined below {SMALLEST[self.net]} pixels: pass size=64.",
            )
        return super().features(x_0)

    def _distance(self, index: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """The head's weights times the squared difference of unit vectors, `(N, 1, H, W)`."""
        self.heads[index] = self.heads[index].to(ours)  # moved once
        return (self.heads[index] * (_unit(ours) - _unit(theirs)).square()).sum(1, keepdim=True)


def _unit(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def make_backbone(net: str) -> nn.Sequential:
    """The convolutions of `net` with random weights, numbered as torchvision's `features`."""
    convolutions, pool = BACKBONES[net]
    modules: list[nn.Module] = []
    channels = 3
    for item in convolutions:
        if item == "M":
            modules.append(nn.MaxPool2d(pool, 2))
            continue
        out, kernel, stride, padding = item
        modules += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU()]
        channels = out
    return nn.Sequential(*modules)


def _backbone(net: str, state: dict[str, Tensor]) -> nn.Sequential:
    backbone, prefix = make_backbone(net), "features."
    own = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    try:
        backbone.load_state_dict(own)
    except RuntimeError as error:
        raise RewardModelError(
            "weights", net, f"pass the weights of torchvision's {net} network ({error})."
        ) from error
    return backbone


def _load_backbone(
    weights: str | Path | None, net: str, local_files_only: bool
) -> dict[str, Tensor]:
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILES[net] if weights is None else weights
    path = Path(path)
    if weights is None and not path.is_file() and not local_files_only:
        return torch.hub.load_state_dict_from_url(
            DOWNLOADS + FILES[net], map_location="cpu", check_hash=True, weights_only=True
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RewardModelError(
            "weights",
            str(path),
            f"there is no such file: get {DOWNLOADS}{FILES[net]}, or pass local_files_only=False.",
        ) from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise RewardModelError(
            "weights", str(path), f"it could not be read ({error}); get it again."
        ) from error


def _load_heads(net: str) -> list[Tensor]:
    """The heads' weights, `(1, C, 1, 1)` each, from the files that torchmetrics carries."""
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"] for index in range(len(LAYERS[net]))]


register_reward("lpips", LPIPS)
