"""LoRA students: small trainable adapters on a network whose own weights stay frozen and shared.

Hu et al. 2022: a layer's weight W is frozen and `W + (alpha / rank) B A` takes its place, with A
`(rank, in)` random and B `(out, rank)` zero at the start. The layers are those of peft, which is
imported only where adapters are made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_integer, check_number, require

# The layers of LCM-LoRA (Luo et al. 2023, arXiv 2311.05556; diffusers' train_lcm_distill_lora_*),
# which also turns a many-step network into a few-step one: attention projections as in fine-tuning,
# and the convolutions and time projections of residual blocks.
DEFAULT_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
# Adapters start at zero: on the digits they need ten times the learning rate of whole weights to
# come as far in as many iterations (docs/guide.md has the figures).
LEARNING_RATE_SCALE = 10.0
ADAPTABLE = (nn.Linear, nn.Conv2d)
NUM_EXAMPLES = 12


def make_trainable(
    base: Denoiser, lora_rank: int | None, lora_targets: Sequence[str] | None = None
) -> Denoiser:
    """What the optimiser trains: `base` itself, or adapters on a copy that shares its weights.

    Args:
        base: The student that training starts from. Without adapters all of its weights become
            trainable, and float32: bfloat16 has 8 bits, in which steps of the optimiser below 0.4 %
            of a weight are lost. With adapters none become trainable, and all stay as they are.
        lora_rank, lora_targets: As in `add_adapters`; a rank of None means no adapters.

    Returns:
        A denoiser that equals `base`; the trained weights are those that require gradients.

    Raises:
        InvalidArgumentError: as in `add_adapters`, and for targets without a rank.
    """
    if lora_rank is not None:
        return add_adapters(copy_trained(base.requires_grad_(False)), lora_rank, lora_targets)
    if lora_targets is not None:
        raise InvalidArgumentError("lora_targets", lora_targets, "pass a lora_rank with it.")
    # Not the denoiser: copies share its table of conditions.
    nn.Module.to(base.network, torch.float32)
    return base.requires_grad_(True)


def add_adapters(
    denoiser: Denoiser,
    lora_rank: int,
    lora_targets: Sequence[str] | None = None,
    lora_alpha: float | None = None,
) -> Denoiser:
    """Put adapters on a denoiser's network, in place; what it predicts stays exactly the same.

    Args:
        denoiser: Its weights are frozen, in whatever dtype; only the adapters, which are float32,
            require gradients afterwards.
        lora_rank: Rank of the change of each layer; a layer's adapter has
            `rank * (in + out)` weights, and `rank * (in * kernel + out)` for a convolution.
        lora_targets: Linear and convolutional layers to adapt, by the last parts of their names
            (`"to_q"` is every query, `"mid_block.attentions.0.to_q"` one of them). Default: those
            of `DEFAULT_TARGETS` that the network has.
        lora_alpha: The change is scaled by `alpha / rank`; default: the rank, so by 1.

    Returns:
        `denoiser`, in the mode (training or evaluation) that it was in.

    Raises:
        InvalidArgumentError: for a rank below 1, or a target that no layer's name ends in.
        MissingExtraError: without peft.
    """
    rank = check_integer("lora_rank", lora_rank, 1)
    alpha = rank if lora_alpha is None else check_number("lora_alpha", lora_alpha)
    names = find_targets(denoiser.network, lora_targets)
    peft = require("peft", "lora")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names)
    peft.inject_adapter_in_model(config, denoiser.network)
    for weight in denoiser.network.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return denoiser.train(denoiser.training)


def find_targets(network: nn.Module, lora_targets: Sequence[str] | None) -> list[str]:
    """Full names of the layers to adapt; see `add_adapters`."""
    if lora_targets is not None and not _is_list_of_names(lora_targets):
        raise InvalidArgumentError("lora_targets", lora_targets, "pass a list of layers' names.")
    layers = [name for name, layer in network.named_modules() if isinstance(layer, ADAPTABLE)]
    targets = DEFAULT_TARGETS if lora_targets is None else lora_targets
    names = [name for name in layers if any(_ends_in(name, target) for target in targets)]
    unmatched = [target for target in targets if not any(_ends_in(n, target) for n in names)]
    if not names or (unmatched and lora_targets is not None):
        wrong = None if lora_targets is None else unmatched
        remedy = f"pass what names of layers end in; here, for example, {_examples(layers)}."
        raise InvalidArgumentError("lora_targets", wrong, remedy)
    return names


def copy_trained(denoiser: Denoiser) -> Denoiser:
    """A copy that has weights of its own only where they require gradients, and shares the rest."""
    frozen = [weight for weight in denoiser.parameters() if not weight.requires_grad]
    return copy.deepcopy(denoiser, {id(weight): weight for weight in frozen})


def merge(denoiser: Denoiser) -> Denoiser:
    """The same denoiser without adapters: `W + (alpha / rank) B A` as each layer's weight.

    Args:
        denoiser: With or without adapters; not changed.

    Returns:
        A copy whose network is an ordinary one, in float32, and shares nothing; `denoiser` itself
        if there was nothing to merge.
    """
    if not _adapted_layers(denoiser.network):
        return denoiser
    plain = copy.deepcopy(denoiser)
    nn.Module.to(plain.network, torch.float32)  # 8 bits would lose what was learned in 24
    for name, layer in _adapted_layers(plain.network):
        layer.merge()
        plain.network.set_submodule(name, layer.get_base_layer())
    return plain


def load_base(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make a network, with adapters or without, the one that `state` belongs to.

    Args:
        network: Adapters stay, and change nothing until they are trained.
        state: Weights of the network without adapters.
    """
    own = network.state_dict()
    adapters = {
        name: torch.zeros_like(weight) if ".lora_B." in name else weight
        for name, weight in own.items()
        if ".lora_" in name
    }
    names = {name.replace(".base_layer.", "."): name for name in own}
    base = {names.get(name, name): weight for name, weight in state.items()}
    network.load_state_dict({**adapters, **base})


def _adapted_layers(network: nn.Module) -> list[tuple[str, Any]]:
    """Layers with adapters, by name; recognised without importing peft."""
    return [(name, layer) for name, layer in network.named_modules() if hasattr(layer, "lora_A")]


def _is_list_of_names(value: Any) -> bool:
    """A single name would be read as a list of letters."""
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    return is_list and all(isinstance(name, str) for name in value)


def _ends_in(name: str, target: str) -> bool:
    """Whether a dotted name ends in `target`, in whole parts."""
    return f".{name}".endswith(f".{target}")


def _examples(layers: list[str]) -> str:
    """Some of the last parts of layers' names, in which a number does not stand alone."""
    parts = [name.split(".") for name in layers]
    ends = [".".join(part[-2:] if part[-1].isdigit() else part[-1:]) for part in parts]
    return ", ".join(map(repr, list(dict.fromkeys(ends))[:NUM_EXAMPLES]))
