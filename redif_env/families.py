"""What differs between diffusers' model families: how they are called, and their autoencoders."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor

from .codec import Codec
from .denoiser import Call, Told
from .errors import InvalidArgumentError

Rows: TypeAlias = dict[str, Tensor]
ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")


def call_diffusers(network: Any, x_t: Tensor, t: Tensor, told: Told) -> Tensor:
    """Call a diffusers network: the names of a table are those of its own arguments.

    Some networks predict variances too, in further channels: these are left out.
    """
    rows: dict[str, Any] = dict(told) if isinstance(told, dict) else {"class_labels": told}
    added = {name: rows.pop(name) for name in ADDED if name in rows}
    if added:
        rows["added_cond_kwargs"] = added
    if rows.get("class_labels", 0) is None:
        del rows["class_labels"]
    prediction = network(x_t, timestep=t, return_dict=False, **rows)[0]
    return prediction[:, : x_t.shape[1]]


# Each family by its network's class, with how it is called.
NETWORKS: dict[type, Call] = {
    UNet2DModel: call_diffusers,
    UNet2DConditionModel: call_diffusers,
    DiTTransformer2DModel: call_diffusers,
    PixArtTransformer2DModel: call_diffusers,
}
AUTOENCODERS = (AutoencoderKL, AutoencoderTiny, VQModel)


def find_class(name: Any, kinds: Sequence[type]) -> type | None:
    """The class of that name, or None."""
    return next((kind for kind in kinds if kind.__name__ == name), None)


def classes(network: Any) -> tuple[int | None, int | None]:
    """Number of classes of a network, and its null class, as far as its config tells."""
    if isinstance(network, DiTTransformer2DModel):
        number = network.config.num_embeds_ada_norm
        return number, number  # trained with dropout of the class, which has an embedding too
    if isinstance(network, UNet2DModel):
        return network.config.num_class_embeds, None
    return None, None


def needs_table(network: Any) -> bool:
    """Whether a network can not be called without a table of conditions."""
    return isinstance(network, UNet2DConditionModel | PixArtTransformer2DModel)


def check_table(network: Any, tensors: Rows) -> None:
    """Refuse a table whose names or widths the network would stumble over.

    Raises:
        InvalidArgumentError: in that case.
    """
    taken = {*inspect.signature(network.forward).parameters, *ADDED}
    unknown = sorted(set(tensors) - taken)
    if unknown:
        raise InvalidArgumentError(
            "conditions", unknown, f"name them as arguments of {type(network).__name__}."
        )
    name = "encoder_hidden_states"
    width = network.config.get("caption_channels") or network.config.get("cross_attention_dim")
    if needs_table(network) and name not in tensors:
        raise InvalidArgumentError("conditions", sorted(tensors), f"it needs {name}.")
    if name in tensors and isinstance(width, int) and tensors[name].shape[-1] != width:
        raise InvalidArgumentError(
            "conditions", tuple(tensors[name].shape), f"pass {name} of width {width}."
        )


def make_codec(autoencoder: Any) -> Codec:
    """The codec of a diffusers autoencoder.

    A pipeline decodes `latents / scaling_factor + shift_factor` or, where the config has them,
    `latents * latents_std / scaling_factor + latents_mean`.
    """
    config = autoencoder.config
    scale = torch.tensor(1.0 / (config.get("scaling_factor") or 1.0))
    shift = torch.tensor(float(config.get("shift_factor") or 0.0))
    if config.get("latents_std") and config.get("latents_mean"):
        scale = scale * torch.tensor(config.latents_std).reshape(1, -1, 1, 1)
        shift = torch.tensor(config.latents_mean).reshape(1, -1, 1, 1)
    return Codec(autoencoder, scale, shift)


def pixel_factor(autoencoder: Any) -> int:
    """Pixels a side of one latent element."""
    if autoencoder is None:
        return 8  # as pipelines assume
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def size_rows(network: Any, height: int, width: int) -> Rows:
    """What a network wants to be told of the picture's size in pixels, `(1, ...)` each.

    SDXL: original size, crop and target size (Podell et al. 2023, section 2.2), here a picture
    that was neither scaled nor cropped. PixArt-alpha at 1024: resolution and aspect ratio.
    """
    if isinstance(network, PixArtTransformer2DModel) and network.use_additional_conditions:
        return {
            "resolution": torch.tensor([[float(height), width]]),
            "aspect_ratio": torch.tensor([[height / width]]),
        }
    if network.config.get("addition_embed_type") == "text_time":
        return {"time_ids": torch.tensor([[float(height), width, 0, 0, height, width]])}
    return {}
