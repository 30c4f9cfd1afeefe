"""Nested state on its way between processes: as plain data and tensors, never as pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save

from redif_env import parallel

from .checkpoints import pack, unpack

PLAIN = "plain"  # names of tensors begin with a slash


def gather_states(state: Mapping[str, Any]) -> list[Any]:
    """The states of all processes, in the order of ranks, in the first one; nothing in the others.

    Args:
        state: What `checkpoints.pack` takes; may differ between processes in every way.

    Raises:
        LostProcessError: if another process has ended.
    """
    plain, tensors = pack(state)
    text = torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)
    return [_read(data) for data in parallel.gather_bytes(save({**tensors, PLAIN: text}))]


def _read(data: bytes) -> Any:
    tensors = load(data)
    plain = json.loads(tensors.pop(PLAIN).numpy().tobytes())
    return unpack(plain, tensors)


def broadcast_state(state: Any) -> Any:
    """The first process's state, in every process; its tensors on the CPU.

    Args:
        state: What `checkpoints.pack` takes, or None; only the first process's counts.

    Raises:
        LostProcessError: if another process has ended.
    """
    if parallel.world_size() == 1:
        return state
    plain, tensors = pack(state)
    kinds = {name: (_name(t.dtype), list(t.shape)) for name, t in tensors.items()}
    text = parallel.broadcast_bytes(json.dumps([plain, kinds]).encode())
    if not parallel.is_main():
        plain, kinds = json.loads(text)
        tensors = {n: torch.empty(s, dtype=getattr(torch, d)) for n, (d, s) in kinds.items()}
    parallel.broadcast(tensors.values())
    return unpack(plain, tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def divided_again(parts: Sequence[Any]) -> Any:
    """This process's share of a state whose rows other processes had divided.

    Args:
        parts: The state of each of them, in the order of ranks: alike but for the rows of tensors
            `(N, ...)`.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {name: divided_again([part[name] for part in parts]) for name in first}
    if isinstance(first, torch.Tensor):
        return torch.cat(list(parts)).chunk(parallel.world_size())[parallel.rank()]
    return first
