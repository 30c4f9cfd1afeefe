"""A second device on a machine without one: tensors of the CPU that refuse to meet its others.

`FakeDevice` goes by what the storage of a tensor is tagged with, so that views, parameters and
copies of modules follow. It looks at each call that Python makes, with the rules of CUDA: a tensor
without axes, of the CPU, may meet others in arithmetic, and index tensors may index a tensor of the
device, but not the other way round. What happens inside a call, such as the backward pass, it does
not see.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

CPU = torch.device("cpu")
# A kind that this machine need not have, and that no library takes for another.
DEVICE = torch.device("xpu", 0)

_READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "equal")
_COPIES = ("copy_", "to", "type_as", "set_", "__set__", "__deepcopy__")
_COPIES += ("_has_compatible_shallow_copy_type",)
_NEVER_MIXED = ("cat", "stack", "concatenate", "equal", "gather", "index_select", "scatter_add")


class DeviceMixError(RuntimeError):
    """Tensors, or a tensor and a generator, of different devices met."""


class FakeGenerator(torch.Generator):
    """A generator that says it is of a device."""

    def __new__(cls, device: Any = "cpu") -> FakeGenerator:
        self = super().__new__(cls)
        self.fake_device = _with_index(device)
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.fake_device


class FakeDevice(TorchFunctionMode):
    """While it is entered, `DEVICE` can be used like any other.

    Attributes:
        reads: Times that the host has read a value of the device, for which it would wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self._patch = mock.patch("torch.Generator", FakeGenerator)

    def __enter__(self) -> FakeDevice:
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patch.stop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, owner = func.__name__, getattr(func, "__self__", None)
        if name == "__get__":
            answer = _property(getattr(owner, "__name__", ""), args[0])
            if answer is not None:
                return answer
        wanted, args = _wanted(name, args, kwargs)
        given = args[:1] if name == "__deepcopy__" else (args, kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        found = self._meet(name, args, tensors)
        if name in ("numpy", "__array__", "__dlpack__") and found != CPU:
            raise TypeError(f"can't convert {found} tensor to numpy")
        if name in ("tensor", "as_tensor") and not isinstance(args[0], Tensor):
            found = CPU
        target = CPU if name == "cpu" else wanted or found
        self.reads += found != CPU and (name in _READS or target == CPU)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != target.type:
            raise DeviceMixError(f"{name} on {target} with a generator of {generator.device}")
        return _on(target, func(*args, **kwargs), tensors)

    def _meet(self, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> torch.device:
        """The device of what comes of these tensors."""
        if not tensors:
            return CPU
        if name in _COPIES:
            return device_of(tensors[0])
        if name in ("__getitem__", "__setitem__", "index_put_"):
            home = device_of(args[0])
            where = [t for t in pytree.tree_leaves(args[1]) if isinstance(t, Tensor) and t.ndim]
            if home == CPU and any(device_of(t) != CPU for t in where):
                raise DeviceMixError(f"{name} of a tensor of the CPU with indices of the device")
            values = [t for t in args[2:] if isinstance(t, Tensor) and t.ndim]
            if where and any(device_of(t) != home for t in values):
                raise DeviceMixError(f"{name} of {home} with values of another device")
            return home
        strict = name in _NEVER_MIXED
        devices = {device_of(t) for t in tensors if strict or t.ndim or device_of(t) != CPU}
        if len(devices) > 1:
            shapes = ", ".join(f"{tuple(t.shape)} on {device_of(t)}" for t in tensors)
            raise DeviceMixError(f"{name} of {shapes}")
        return devices.pop() if devices else CPU


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor says it is."""
    return getattr(tensor.untyped_storage(), "fake_device", CPU)


def _with_index(device: Any) -> torch.device:
    device = torch.device(device)
    return DEVICE if device.type == DEVICE.type and device.index is None else device


def _property(name: str, tensor: Tensor) -> Any:
    """What a tensor says of its device; None for other properties."""
    on_cpu = device_of(tensor) == CPU
    return {"device": device_of(tensor), "is_cpu": on_cpu}.get(name)


def _wanted(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.device | None, tuple[Any, ...]]:
    """The device that a call names, and its arguments without it."""
    device = kwargs.get("device")
    if device is not None:
        kwargs["device"] = CPU
        return _with_index(device), args
    if name == "to" and len(args) > 1:
        other = args[1]
        if isinstance(other, Tensor):
            return device_of(other), args
        if isinstance(other, str | torch.device):
            return _with_index(other), (args[0], CPU, *args[2:])
    return None, args


def _on(target: torch.device, result: Any, tensors: list[Tensor]) -> Any:
    """A call's result on `target`; what it shares with tensors of another device is copied."""
    shared = {tensor.untyped_storage()._cdata for tensor in tensors}

    def move(tensor: Tensor) -> Tensor:
        if device_of(tensor) == target:
            return tensor
        if tensor.untyped_storage()._cdata in shared:
            tensor = tensor.clone()
        if target != CPU:
            tensor.untyped_storage().fake_device = target
        return tensor

    return pytree.tree_map_only(Tensor, move, result)
