"""Students smaller than their teacher: their architecture, their first weights, and a warm-up.

A narrower or shallower network starts from the teacher's weights where the two correspond, and is
then regressed on the teacher's answers until it is good enough for reinforcement learning to refine
(`docs/decisions.md` has the measurements).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from redif_env.code_key import settings
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_number
from redif_env.loading import build_from_description, describe
from redif_env.teacher import Teacher

# What a student shares with its teacher: the latents, the condition, and how both enter.
INTERFACE = (
    *("sample_size", "in_channels", "out_channels", "center_input_sample"),
    *("num_class_embeds", "class_embed_type", "prediction_type"),
)
WARM_UP_ITERATIONS = 1000  # of a smaller student
WARM_UP_ROWS = 256  # predictions of an iteration
WARM_UP = {"learning_rate": 1e-3, "max_grad_norm": 1.0, "ema_decay": 0.0}


class _Part(NamedTuple):
    """Channels of a tensor that belong together: where they start, how many, and which are kept."""

    start: int
    size: int
    spread: bool = False


def describe_smaller(teacher: Teacher, student: float | Mapping[str, Any]) -> dict[str, Any]:
    """The description of a student that differs from its teacher in size only.

    Args:
        teacher: Its network must be a diffusers UNet2DModel.
        student: Share of the teacher's parameters in (0, 1], see `narrower`, or settings of the
            network in place of the teacher's, such as `{"layers_per_block": 1}`.

    Returns:
        What `StudentPolicy` takes as `student`.

    Raises:
        InvalidArgumentError: for a share out of range, a setting that the network does not have, or
            that changes what goes in or comes out of it, or settings that make no network.
    """
    description = describe(teacher.denoiser, teacher.make_solver())
    network = teacher.denoiser.network
    if isinstance(student, Mapping):
        changes = dict(student)
    else:
        changes = narrower(network, check_number("student", student, 0, 1))
    _check_changes(description["network"], changes)
    description["network"] = {**description["network"], **changes}
    _check_works(description, changes)
    return description


def narrower(network: Any, fraction: float) -> dict[str, Any]:
    """Settings of the narrower network whose number of parameters is nearest to a share of all.

    Of the G groups that normalisation divides each layer's channels into, the first g are kept: the
    groups stay as large as they were, and so does what each is normalised by.

    Args:
        network: A UNet2DModel.
        fraction: Share of its parameters, in (0, 1].

    Returns:
        `block_out_channels` and `norm_num_groups`.

    Raises:
        InvalidArgumentError: for a share that is nearer to no parameters than to the narrowest, and
            for another kind of network.
    """
    if not isinstance(network, UNet2DModel):
        raise InvalidArgumentError(
            "student",
            fraction,
            f"pass None, or settings: only UNet2DModel is narrowed, not {type(network).__name__}.",
        )
    config = network.config
    groups = config.norm_num_groups
    wanted = fraction * count_parameters(network)
    sizes: dict[int, int] = {}
    for kept in range(1, groups + 1):
        changes = _first_groups(config, kept)
        if _heads_fit(config, changes["block_out_channels"]):
            with torch.device("meta"):  # counts without memory
                sizes[kept] = count_parameters(type(network)(**{**settings(network), **changes}))
    best = min(sizes, key=lambda kept: abs(sizes[kept] - wanted))
    if wanted < min(sizes.values()) / 2:
        share = min(sizes.values()) / count_parameters(network)
        raise InvalidArgumentError(
            "student",
            fraction,
            f"pass at least {share:.3g}, the share of the narrowest network, and at most 1.",
        )
    return _first_groups(config, best)


def make_smaller(teacher: Teacher, description: Mapping[str, Any]) -> Denoiser:
    """A student of `describe_smaller`'s architecture with the teacher's corresponding weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the layers that have no counterpart
        student = build_from_description(description).to(teacher.device)
    copy_weights(teacher.denoiser.network, student.network)
    return student.eval()


def count_parameters(network: nn.Module) -> int:
    """Number of weights of a network."""
    return sum(weight.numel() for weight in network.parameters())


def count_flops(denoiser: Denoiser) -> int:
    """Floating-point operations of one prediction of one row, guidance included."""
    before = denoiser.network_evaluations
    with FlopCounterMode(display=False) as counter:
        _predict_one(denoiser)
    denoiser.network_evaluations = before  # counting is no cost
    return int(counter.get_total_flops())


@torch.no_grad()
def copy_weights(source: Any, target: Any) -> None:
    """Give a smaller UNet2DModel the weights of a larger one that play the same part.

    Of blocks with fewer layers, those are taken that are evenly spread from the first to the last.
    Of each tensor the leading channels are taken; where channels of two kinds stand behind each
    other (the hidden ones and a skip connection's; sines and cosines) the leading ones of each. Of
    the sinusoids of time, those of nearest frequency are taken. A tensor without a counterpart at
    least as large keeps its weights.

    Args:
        source: The larger network; not changed.
        target: The smaller network; changed in place.
    """
    weights = source.state_dict()
    for name, weight in target.state_dict().items():
        origin = _counterpart(name, source, target)
        found = weights.get(origin)
        if found is None or found.ndim != weight.ndim:
            continue
        if any(n < m for n, m in zip(found.shape, weight.shape, strict=True)):
            continue
        for dim in range(weight.ndim):
            parts = (
                _parts(origin, source, dim, found.shape[dim]),
                _parts(name, target, dim, weight.shape[dim]),
            )
            index = torch.cat([_leading(*pair) for pair in zip(*parts, strict=True)])
            found = found.index_select(dim, index.to(found.device))
        weight.copy_(found)


def warm_up_options(num_steps: int) -> dict[str, Any]:
    """Of `OutputRegression.train` before reinforcement learning: `WARM_UP` on `num_steps` steps."""
    return {**WARM_UP, "batch_size": max(WARM_UP_ROWS // num_steps, 1)}


def _first_groups(config: Any, kept: int) -> dict[str, Any]:
    channels = [width // config.norm_num_groups * kept for width in config.block_out_channels]
    return {"block_out_channels": channels, "norm_num_groups": kept}


def _heads_fit(config: Any, channels: list[int]) -> bool:
    """Whether attention, where there is any, can divide these channels into its heads."""
    types = [*config.down_block_types, *config.up_block_types]
    attends = config.add_attention or any("Attn" in name for name in types)
    size = config.attention_head_dim
    return not attends or size is None or all(width % size == 0 for width in channels)


def _check_changes(network: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if name in INTERFACE and value != network.get(name, object()):
            raise InvalidArgumentError(
                "student",
                {name: value},
                f"leave {name} out: latents, classes and prediction are the teacher's.",
            )
        if name not in network:
            raise InvalidArgumentError(
                "student", {name: value}, f"{name} is no setting of the teacher's network."
            )


def _check_works(description: Mapping[str, Any], changes: Mapping[str, Any]) -> None:
    """Some impossible settings are met by diffusers at construction, others in use."""
    try:
        _predict_one(build_from_description(description).eval())
    except Exception as error:  # diffusers and torch raise many kinds
        raise InvalidArgumentError(
            "student", dict(changes), f"no network can be made with that ({error})."
        ) from error


@torch.no_grad()
def _predict_one(denoiser: Denoiser) -> None:
    generator = torch.Generator().manual_seed(0)
    x_t = denoiser.initial_noise(1, generator).to(denoiser.device)
    condition = denoiser.initial_condition(1, generator)
    condition = None if condition is None else condition.to(denoiser.device)
    denoiser(x_t, torch.ones(1, device=denoiser.device), condition)


def _counterpart(name: str, source: nn.Module, target: nn.Module) -> str:
    """Name of the tensor in `source` that plays the part of `name` in `target`."""
    found = re.fullmatch(r"(.+\.(?:resnets|attentions))\.(\d+)\.(.+)", name)
    if found is None:
        return name
    layers, index, rest = found.groups()
    available, wanted = _length(source, layers), _length(target, layers)
    spread = round(int(index) * (available - 1) / max(wanted - 1, 1))
    return f"{layers}.{spread}.{rest}"


def _length(network: nn.Module, layers: str) -> int:
    try:
        return len(network.get_submodule(layers))  # type: ignore[arg-type]
    except AttributeError:
        return 0


def _parts(name: str, network: Any, dim: int, size: int) -> list[_Part]:
    """How the `size` channels of a tensor's dimension fall into parts, in order."""
    layer, _, kind = name.rpartition(".")
    block, _, role = layer.rpartition(".")
    if name == "time_embedding.linear_1.weight" and dim == 1:
        return _halves(size, spread=network.config.time_embedding_type == "positional")
    if role == "time_emb_proj" and dim == 0:
        scales = network.config.resnet_time_scale_shift == "scale_shift"
        return _halves(size) if scales else [_Part(0, size)]
    takes_all = role == "norm1" or (role in ("conv1", "conv_shortcut") and kind == "weight")
    if takes_all and dim == (0 if role == "norm1" else 1):
        hidden = _hidden_channels(network).get(block, size)
        return [_Part(0, hidden), _Part(hidden, size - hidden)]
    return [_Part(0, size)]


def _halves(size: int, spread: bool = False) -> list[_Part]:
    return [_Part(0, size // 2, spread), _Part(size // 2, size - size // 2, spread)]


def _hidden_channels(network: Any) -> dict[str, int]:
    """Of the blocks that are also given a skip connection: the channels in front of its own."""
    hidden, channels = network.config.block_out_channels[-1], {}
    for i, block in enumerate(network.up_blocks):
        for j, resnet in enumerate(block.resnets):
            channels[f"up_blocks.{i}.resnets.{j}"] = hidden
            hidden = resnet.out_channels
    return channels


def _leading(source: _Part, target: _Part) -> Tensor:
    """Which channels of `source` become those of `target`, int64 `(target.size,)`."""
    index = torch.arange(target.size)
    if source.spread:  # frequency i of n is 10000^(-i/n)
        index = (index * source.size / max(target.size, 1)).round().long()
    return source.start + index
