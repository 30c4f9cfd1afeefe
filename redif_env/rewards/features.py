"""Rewards in the feature space of a network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InvalidArgumentError, check_choice
from .base import Reward
from .maps import fit_map, with_mean

DISTANCES = ("mse", "cosine")


class Features(Reward):
    """Minus the distance between features of a network, summed over layers; 0 for a copy.

    A layer's distance is taken at each place, along the channels, and averaged over places: places
    of `(N, C, H, W)`, tokens of `(N, L, C)`, or the whole of `(N, C)`. The map adds up the layers'
    distances on the grid of the samples.

    Args:
        module: Network of the samples. A copy is kept, frozen, in evaluation mode, and moved to the
            device of the samples.
        layers: Names of the layers, as in `module.named_modules()`; `""` is the module itself. An
            output that is no tensor counts by its first tensor.
        distance: `"mse"`, the mean squared difference, or `"cosine"`, one minus the cosine.
        map: Whether to have a map; all layers must then be `(N, C, H, W)`.
        preprocess: From samples to what the module takes, such as `ImageInput`; default: as is.
        name: Name in logs.

    Raises:
        InvalidArgumentError: for names that are not the module's; when scoring, for a layer that is
            not reached, or whose output has another form.
    """

    differentiable = True
    nfe = 2

    def __init__(
        self,
        module: nn.Module,
        layers: str | Sequence[str],
        *,
        distance: str = "mse",
        map: bool = True,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        name: str = "features",
    ) -> None:
        if not isinstance(module, nn.Module):
            raise InvalidArgumentError("module", module, "pass a torch.nn.Module.")
        self.layers = [layers] if isinstance(layers, str) else list(layers)
        known = [layer for layer, _ in module.named_modules()]
        if not self.layers or not set(self.layers) <= set(known):
            raise InvalidArgumentError(
                "layers", layers, f"pass names among {known[1:]}, or '' for the output."
            )
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.distance = check_choice("distance", distance, DISTANCES)
        self.has_map = bool(map)
        self.preprocess = preprocess or (lambda x_0: x_0)
        self._name = name

    @property
    def name(self) -> str:
        return self._name

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return -_total(self._distances(x_0, teacher_x_0))

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        if not self.has_map:
            return super().reward_map(x_0, teacher_x_0, condition)
        distances = self._distances(x_0, teacher_x_0)
        for layer, distance in zip(self.layers, distances, strict=True):
            if distance.ndim != 4 or x_0.ndim != 4:
                raise InvalidArgumentError(
                    "layers", layer, "its output is no map (N, C, H, W): pass map=False."
                )
        fitted = torch.stack([fit_map(distance, x_0.shape[1:]) for distance in distances])
        return -with_mean(fitted.sum(0), _total(distances))

    def features(self, x_0: Tensor) -> list[Tensor]:
        """The layers' outputs for samples `(N, ...)`, each with channels in axis 1."""
        caught: dict[str, Tensor] = {}
        hooks = [
            self.module.get_submodule(layer).register_forward_hook(_catch(caught, layer))
            for layer in self.layers
        ]
        try:
            self.module.to(x_0.device)(self.preprocess(x_0))
        finally:
            for hook in hooks:
                hook.remove()
        return [_channels_first(caught, layer, len(x_0)) for layer in self.layers]

    def _distances(self, x_0: Tensor, teacher_x_0: Tensor) -> list[Tensor]:
        """Each layer's distance at each place, `(N, 1, ...)`."""
        ours = self.features(x_0)
        with torch.no_grad():
            theirs = self.features(teacher_x_0)
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [self._distance(index, *pair) for index, pair in pairs]

    def _distance(self, index: int, ours: Tensor, theirs: Tensor) -> Tensor:
        """Distance of features `(N, C, ...)` of layer number `index`, `(N, 1, ...)`."""
        if self.distance == "mse":
            return (ours - theirs).square().mean(1, keepdim=True)
        return 1 - functional.cosine_similarity(ours, theirs, dim=1).unsqueeze(1)


def _total(distances: list[Tensor]) -> Tensor:
    """Sum over layers of the mean over places, `(N,)`."""
    return torch.stack([distance.flatten(1).mean(1) for distance in distances]).sum(0)


def _catch(caught: dict[str, Tensor], layer: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        while not isinstance(output, Tensor):
            output = output[0]
        # A copy: what follows may work in place, as ReLUs often do.
        caught[layer] = output.clone()

    return hook


def _channels_first(caught: dict[str, Tensor], layer: str, num: int) -> Tensor:
    output = caught.get(layer)
    if output is None:
        raise InvalidArgumentError("layers", layer, "the network does not reach it: leave it out.")
    if output.ndim not in (2, 3, 4) or len(output) != num:
        raise InvalidArgumentError(
            "layers", layer, f"its output is {tuple(output.shape)}: pass one with a row a sample."
        )
    return output.movedim(-1, 1) if output.ndim == 3 else output
