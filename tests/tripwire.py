"""Tripwire: a tensor that refuses to leave the device, for tests that code stays on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CONVERSIONS = {
    Tensor.numpy: "numpy()",
    Tensor.__array__: "__array__()",
    Tensor.cpu: "cpu()",
    Tensor.__dlpack__: "__dlpack__()",
}
# Reading a few values is no conversion, but on CUDA the host would wait for them.
READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
    Tensor.nonzero,
    torch.nonzero,
    torch.equal,
    Tensor.equal,
    torch.allclose,
    Tensor.allclose,
}


class TripwireError(AssertionError):
    """A tensor was converted to numpy or copied to the host."""


class Tripwire(Tensor):
    """A tensor that raises `TripwireError` on conversion and counts the times values are read.

    Whatever is computed from it is a `Tripwire` too.

    Attributes:
        reads: Times that the host has read values of any tripwire; see `count_reads`.
    """

    reads: int = 0

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CONVERSIONS:
            raise TripwireError(f"{CONVERSIONS[func]} was called on a tensor of {args[0].shape}")
        if func in READS:
            Tripwire.reads += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def arm(value: Any) -> Any:
    """`value` with every tensor in it, also inside dicts and tuples, as a `Tripwire`."""
    if isinstance(value, Tensor):
        return value.as_subclass(Tripwire)
    if isinstance(value, dict):
        return {key: arm(part) for key, part in value.items()}
    return tuple(map(arm, value)) if isinstance(value, tuple) else value


def disarm(value: Tensor) -> Tensor:
    """The plain tensor behind a `Tripwire`, so that a test can look at it."""
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)


@contextlib.contextmanager
def count_reads() -> Iterator[list[int]]:
    """Count reads in the block: the list that it yields holds the number when the block ends."""
    before, count = Tripwire.reads, [0]
    try:
        yield count
    finally:
        count[0] = Tripwire.reads - before
