"""A student whose weights several processes share out: each holds a part of every tensor.

torch's `fully_shard` (FSDP2) puts a block's weights together from all processes before it computes,
and lets them go afterwards; in the backward pass each process gets its part of the averaged
gradient. Optimiser and moving average then work on parts alone. Each forward is a meeting: all
processes must ask a network equally often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, ModelMixin
from torch import Tensor, nn

from redif_env import parallel

# Networks that use their blocks' layers from outside, where a block's weights are in parts.
REACHES_INTO_BLOCKS = (DiTTransformer2DModel,)


def shard(network: nn.Module) -> None:
    """Keep only this process's part of a network's weights, which become those of rank 0, in place.

    Args:
        network: Called as a module, or nothing puts its weights together. The blocks of diffusers'
            networks are put together one at a time, other networks as a whole.
    """
    from torch.distributed.device_mesh import init_device_mesh  # slow to import, and seldom needed
    from torch.distributed.fsdp import fully_shard

    parallel.broadcast(network.state_dict().values())
    mesh = init_device_mesh(parallel.kind_of_device(), (parallel.world_size(),))
    for module in (*_blocks(network), network):
        # Also for the outermost: weights that stayed whole would miss an update of their parts.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network of diffusers, perhaps within an adapter of ours, one after the other.

    Not those of networks inside of its blocks, such as transformers in a UNet.
    """
    if isinstance(network, REACHES_INTO_BLOCKS):
        return
    if isinstance(network, ModelMixin):
        lists = (child for child in network.children() if isinstance(child, nn.ModuleList))
        yield from (block for blocks in lists for block in blocks)
    else:
        for child in network.children():
            yield from _blocks(child)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is one that processes share out."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def whole(state: Any) -> Any:
    """Nested state with whole tensors, on the CPU, in place of parts; others stay as they are.

    All processes must call it with the same parts, and all get the whole.
    """
    if isinstance(state, Mapping):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(map(whole, state))
    if isinstance(state, Tensor) and is_part(state):
        return put_together(state.detach()).cpu()
    return state


def put_together(tensor: Tensor) -> Tensor:
    """The whole tensor of which this is a part, in all processes, on its device; or itself."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # type: ignore[attr-defined]


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if `like` is a part; else the tensor itself."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.detach(), mesh, placements, src_data_rank=None)


def parts_of(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Whole weights of a module as it holds them, for its `load_state_dict`."""
    own = dict(module.named_parameters(remove_duplicate=False))
    return {name: part_of(t, own[name]) if name in own else t for name, t in state.items()}


def save_whole(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser's `state_dict` and `load_state_dict` give and take whole tensors."""
    optimizer.register_state_dict_post_hook(_whole_moments)
    optimizer.register_load_state_dict_pre_hook(_parts_of_moments)


def _whole_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return whole(state)


def _parts_of_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moments = {
        i: {
            name: part_of(value, weights[i]) if _fits(value, weights[i]) else value
            for name, value in each.items()
        }
        for i, each in state["state"].items()
    }
    return {**state, "state": moments}


def _fits(value: Any, weight: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == weight.shape
