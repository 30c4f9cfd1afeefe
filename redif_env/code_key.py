"""What a network runs, for keys of caches: weights can be read by more than one `forward`."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
from torch import nn

# Of these, classes are told apart by name and settings: their code changes with no one's model.
LIBRARIES = frozenset({"builtins", "diffusers", "peft", "redif_env", "torch", "transformers"})
PLAIN = (bool, int, float, complex, str, bytes, type(None))
OF_MODULES = frozenset(vars(nn.Module()))
# What diffusers and peft set in modules of a network that is made: attention, FreeU, adapters.
RUN_TIME = (
    *("processor", "b1", "b2", "s1", "s2"),
    *("scaling", "merged_adapters", "_active_adapter", "_disable_adapters"),
)


def own_code(network: nn.Module, call: Any) -> list[Any]:
    """Code and constants of a network's classes, and of `call`; empty where libraries wrote all.

    By bytecode, which there always is, with the constants and the functions of its package that it
    refers to. Another release of Python has another bytecode. Tensors that are neither parameters
    nor buffers, and objects that are neither plain nor modules, count by their type.
    """
    seen: dict[int, Any] = {}
    parts: list[Any] = []
    for name, module in network.named_modules():
        if not _of_library(type(module)):
            kinds = [kind for kind in type(module).__mro__ if not _of_library(kind)]
            values = {key: vars(module)[key] for key in vars(module).keys() - OF_MODULES}
            parts.append([name, _described(kinds, seen), _described(values, seen)])
        elif isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            parts.append([name, module.code])
    return parts if _of_library(call) else [*parts, _described(call, seen)]


def settings(network: Any) -> dict[str, Any]:
    """What a diffusers network's class takes to make it again; configs may hold more."""
    taken = inspect.signature(type(network).__init__).parameters
    return {name: value for name, value in network.config.items() if name in taken}


def changes(network: nn.Module) -> list[Any]:
    """What was done to diffusers' models since they were made, which their configs do not tell.

    Adapters and their scales, FreeU, one's own processors of attention, and layers of another kind;
    empty for nothing, and for networks of others, whose code counts.
    """
    if _package(type(network)) != "diffusers" or not hasattr(network, "config"):
        return [change for child in network.children() for change in changes(child)]
    with torch.device("meta"):  # takes no memory, and draws no random numbers
        made = _run_time(type(network)(**settings(network)))
    now = _run_time(network)
    names = sorted(made.keys() | now.keys())
    return [[name, now.get(name)] for name in names if now.get(name) != made.get(name)]


def _run_time(network: nn.Module) -> dict[str, Any]:
    """Each module's class, and what it holds of `RUN_TIME`."""
    seen: dict[int, Any] = {}
    return {
        name: [_described(type(module), seen), _described(_held(module), seen)]
        for name, module in network.named_modules()
    }


def _held(module: nn.Module) -> dict[str, Any]:
    held = {name: vars(module)[name] for name in RUN_TIME if name in vars(module)}
    # Processors of diffusers differ in speed and memory, not in what they compute.
    own = {name: value for name, value in held.items() if _package(type(value)) != "diffusers"}
    return {name: value for name, value in own.items() if value is not None}


def _package(thing: Any) -> str:
    return (getattr(thing, "__module__", None) or "").partition(".")[0]


def _of_library(thing: Any) -> bool:
    return _package(thing) in LIBRARIES


def _described(value: Any, seen: dict[int, Any]) -> Any:
    """A value as JSON can hold it, the same in every process."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return [_described(item, seen) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_described(item, seen)) for item in value)
    if isinstance(value, dict):
        return {repr(key): _described(item, seen) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return _described([value.func, value.args, value.keywords], seen)
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), value.co_names, _described(value.co_consts, seen)]
    if isinstance(value, types.MethodType | staticmethod | classmethod):
        return _described(value.__func__, seen)
    if isinstance(value, property):
        return _described(value.fget, seen)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in seen or _of_library(value) or isinstance(value, types.ModuleType):
        return name
    seen[id(value)] = value  # kept, so that no other value gets its id
    if isinstance(value, types.FunctionType):
        return [name, _function(value, seen)]
    if isinstance(value, type):
        functions = {key: item for key, item in vars(value).items() if _is_code(item)}
        return [name, _described(functions, seen)]
    kind = type(value)
    return name if _of_library(kind) or isinstance(value, nn.Module) else _described(kind, seen)


def _function(function: types.FunctionType, seen: dict[int, Any]) -> Any:
    closure = inspect.getclosurevars(function)
    # Of its own package: what it calls of others is found through no end of modules.
    around = {
        name: value
        for name, value in closure.globals.items()
        if isinstance(value, PLAIN) or _package(value) == _package(function)
    }
    values = function.__defaults__, function.__kwdefaults__, closure.nonlocals, around
    return [_described(part, seen) for part in (function.__code__, *values)]


def _is_code(value: Any) -> bool:
    kinds = types.FunctionType, staticmethod, classmethod, property, *PLAIN
    return isinstance(value, kinds)
