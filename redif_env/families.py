"""What differs between diffusers' model families: how they are called, and their autoencoders."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from torch import Tensor

from .codec import Codec
from .denoiser import Call, Told
from .errors import InvalidArgumentError

Rows: TypeAlias = dict[str, Tensor]
SDXL = ("text_embeds", "time_ids")
ADDED = (*SDXL, "resolution", "aspect_ratio")
GUIDANCE = "guidance"


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
    if network.config.get("time_embedding_type") == "learned":
        t = t.round().long()  # a row of its table
    if GUIDANCE in rows:
        width = network.config.time_cond_proj_dim
        rows["timestep_cond"] = embed_guidance(rows.pop(GUIDANCE), width).to(x_t.dtype)
    prediction = network(x_t, timestep=t, return_dict=False, **rows)[0]
    return prediction[:, : x_t.shape[1]]


def embed_guidance(scale: Tensor, width: int) -> Tensor:
    """What a UNet with distilled guidance is told of its scale `(N,)`: waves, `(N, width)`.

    As diffusers' `get_guidance_scale_embedding` of `scale - 1` (Luo et al. 2023, section 4.2).
    """
    half = width // 2
    rates = torch.exp(torch.arange(half, device=scale.device) * (-math.log(1e4) / (half - 1)))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    return torch.nn.functional.pad(waves, (0, width % 2))


def call_flux(network: Any, x_t: Tensor, t: Tensor, told: Told) -> Tensor:
    """Call a Flux transformer: squares of 2 x 2 latents are its tokens, and time is in [0, 1]."""
    assert isinstance(told, dict)
    num, channels, height, width = x_t.shape
    rows, columns = height // 2, width // 2
    tokens = x_t.reshape(num, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
    places = torch.zeros(rows, columns, 3, device=x_t.device, dtype=x_t.dtype)
    places[..., 1] = torch.arange(rows, device=x_t.device)[:, None]
    places[..., 2] = torch.arange(columns, device=x_t.device)
    prediction = network(
        tokens.reshape(num, rows * columns, 4 * channels),
        timestep=(t / FLUX_TIMESTEPS).to(x_t.dtype),
        img_ids=places.reshape(-1, 3),
        txt_ids=places.new_zeros(told["encoder_hidden_states"].shape[1], 3),
        return_dict=False,
        **told,
    )[0]
    squares = prediction.reshape(num, rows, columns, channels, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(x_t.shape)


# Each family by its network's class, with how it is called.
NETWORKS: dict[type, Call] = {
    UNet2DModel: call_diffusers,
    UNet2DConditionModel: call_diffusers,
    DiTTransformer2DModel: call_diffusers,
    PixArtTransformer2DModel: call_diffusers,
    SD3Transformer2DModel: call_diffusers,
    FluxTransformer2DModel: call_flux,
}
TEXT_TO_IMAGE = (
    UNet2DConditionModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    FluxTransformer2DModel,
)
FLUX_TIMESTEPS = 1000
FLUX_SIZE = 128  # side of the latents of a picture of 1024 x 1024
AUTOENCODERS = (AutoencoderKL, AutoencoderTiny, VQModel)
# Classes of their own now, in published configs one class, by `norm_type`.
LEGACY_CLASS = "Transformer2DModel"
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def class_name(config: Mapping[str, Any]) -> Any:
    """What a model's config says that its class is, by today's name."""
    name, norm = config.get("_class_name"), config.get("norm_type")
    return LEGACY.get(norm) if name == LEGACY_CLASS and isinstance(norm, str) else name


def find_class(name: Any, kinds: Sequence[type]) -> type | None:
    """The class of that name, or None."""
    return next((kind for kind in kinds if kind.__name__ == name), None)


def classes(network: Any) -> tuple[int | None, int | None]:
    """Number of classes of a network, and its null class, as far as its config tells.

    Raises:
        InvalidArgumentError: for a network whose classes are no numbers to count.
    """
    kind = network.config.get("class_embed_type")
    if isinstance(network, UNet2DModel) and kind is not None:
        raise InvalidArgumentError(
            "teacher",
            f"class_embed_type={kind!r}",
            "its classes are no numbers to choose from: pass conditions=Conditions(...) with rows "
            "for class_labels.",
        )
    if isinstance(network, DiTTransformer2DModel):
        number = network.config.num_embeds_ada_norm
        return number, number  # trained with dropout of the class, which has an embedding too
    if isinstance(network, UNet2DModel):
        return network.config.num_class_embeds, None
    return None, None


def needs_table(network: Any) -> bool:
    """Whether a network can not be called without a table of conditions."""
    return isinstance(network, TEXT_TO_IMAGE)


def latent_shape(network: Any) -> tuple[int, Any]:
    """Channels of the latents, and their side or sides as far as the config tells, or None."""
    config = network.config
    if isinstance(network, FluxTransformer2DModel):
        return config.in_channels // 4, FLUX_SIZE
    return config.in_channels, config.sample_size


def check_table(network: Any, tensors: Rows) -> None:
    """Refuse a table whose names or widths the network would stumble over.

    Raises:
        InvalidArgumentError: in that case.
    """
    taken = {*inspect.signature(network.forward).parameters, *ADDED, GUIDANCE}
    unknown = sorted(set(tensors) - taken)
    if unknown:
        raise InvalidArgumentError(
            "conditions", unknown, f"name them as arguments of {type(network).__name__}."
        )
    name = "encoder_hidden_states"
    settings = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
    width = next((network.config[key] for key in settings if network.config.get(key)), None)
    if needs_table(network) and name not in tensors:
        raise InvalidArgumentError("conditions", sorted(tensors), f"it needs {name}.")
    if network.config.get("addition_embed_type") == "text_time" and not set(SDXL) <= set(tensors):
        raise InvalidArgumentError("conditions", sorted(tensors), f"it needs {' and '.join(SDXL)}.")
    if name in tensors and isinstance(width, int) and tensors[name].shape[-1] != width:
        raise InvalidArgumentError(
            "conditions", tuple(tensors[name].shape), f"pass {name} of width {width}."
        )


def side_multiple(network: Any) -> int:
    """What the sides of the latents must be multiples of."""
    if isinstance(network, UNet2DModel):  # the conditional one pads where halves are not whole
        return 2 ** (len(network.config.block_out_channels) - 1)
    return patch_side(network)


def patch_side(network: Any) -> int:
    """Latent elements a side of a transformer's token."""
    if isinstance(network, FluxTransformer2DModel):
        return 2
    return network.config.get("patch_size") or 1


def flow_solver(kind: Any, config: Any, network: Any, tokens: int) -> Any:
    """A flow-matching scheduler, told of the times as pipelines do.

    Esser et al. 2024, section 5.3.2: larger pictures keep more signal at the same sigma, so that
    with `use_dynamic_shifting` times are shifted by an amount that grows with the number of tokens.
    Flux's pipeline, shifted or not, spaces the times in its own way, but for schedulers with
    `use_flow_sigmas`.

    Args:
        kind: The scheduler's class.
        config: Its config.
        network: The transformer.
        tokens: Of a picture.
    """
    solver = kind.from_config(config)
    set_timesteps, few = solver.set_timesteps, config.get("base_image_seq_len") or 256
    many, least = config.get("max_image_seq_len") or 4096, config.get("base_shift") or 0.5
    slope = ((config.get("max_shift") or 1.15) - least) / (many - few)
    shift = {"mu": least + slope * (tokens - few)} if config.get("use_dynamic_shifting") else {}
    spaced = isinstance(network, FluxTransformer2DModel) and not config.get("use_flow_sigmas")

    def set_told(num_steps: int, device: Any = None) -> None:
        if spaced:
            sigmas = torch.linspace(1.0, 1 / num_steps, num_steps, dtype=torch.float64).numpy()
            set_timesteps(sigmas=sigmas, device=device, **shift)
        else:
            set_timesteps(num_steps, device=device, **shift)

    solver.set_timesteps = set_told
    return solver


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


def shared_rows(network: Any, height: int, width: int, distilled_guidance: float) -> Rows:
    """What a network wants to be told beside the text, `(1, ...)` each.

    SDXL: original size, crop and target size of the picture in pixels (Podell et al. 2023, section
    2.2), here one that was neither scaled nor cropped. PixArt-alpha at 1024: resolution and aspect
    ratio. Flux-dev and UNets of latent consistency models: the scale of the guidance that was
    distilled into them.
    """
    rows: Rows = {}
    if isinstance(network, PixArtTransformer2DModel) and network.use_additional_conditions:
        rows["resolution"] = torch.tensor([[float(height), width]])
        rows["aspect_ratio"] = torch.tensor([[height / width]])
    if network.config.get("addition_embed_type") == "text_time":
        rows["time_ids"] = torch.tensor([[float(height), width, 0, 0, height, width]])
    if network.config.get("guidance_embeds") or network.config.get("time_cond_proj_dim"):
        rows[GUIDANCE] = torch.tensor([distilled_guidance])
    return rows
