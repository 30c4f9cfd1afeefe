"""Checkpoints on disk: nested state as safetensors and JSON, whole or not there at all.

A checkpoint is a folder: `tensors.safetensors`, `state.json`, and `manifest.json` with the SHA-256
of both. Reading one runs no code.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_integer
from redif_env.files import remove_temporaries, replacing, sha256, write_json

TENSORS, PLAIN, MANIFEST, BEST = "tensors.safetensors", "state.json", "manifest.json", "best.json"
FORMAT = 1
PREFIX = "iteration-"
# Marks of what JSON has no notion of: `{"tensor": name}`, `{"tuple": [...]}`, `{"items": [...]}`.
TENSOR, TUPLE, ITEMS = "tensor", "tuple", "items"


class DamagedCheckpointError(InvalidArgumentError):
    """A checkpoint is incomplete, or not what was written."""


class Checkpoints:
    """The checkpoints of a run: the last few, and the best.

    One process at a time may write here.

    Args:
        folder: Where they are; made when the first is written.
        keep: How many of the last to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = check_integer("keep", keep, 1)

    def path(self, iteration: int) -> Path:
        """Where the checkpoint after so many iterations is."""
        return self.folder / f"{PREFIX}{iteration:07d}"

    def iterations(self) -> list[int]:
        """Of all checkpoints, damaged ones too, from the first to the last."""
        found = self.folder.glob(f"{PREFIX}*")
        numbers = (path.name.removeprefix(PREFIX) for path in found)
        return sorted(int(number) for number in numbers if number.isdecimal())

    def write(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Write one; those that are there stay as they are.

        Raises:
            OSError: if it cannot be written, such as on a full disk. Nothing partial is left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.folder)
        write(self.path(iteration), state)

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The last one that is whole; warns of later ones that are not."""
        for iteration in reversed(self.iterations()):
            try:
                return iteration, read(self.path(iteration))
            except DamagedCheckpointError as error:
                warnings.warn(f"{error} It is passed over.", RuntimeWarning, stacklevel=2)
        return None

    def prune(self, errors: Mapping[int, float]) -> None:
        """Remove all but the last ones and the best, which `best.json` then names.

        Args:
            errors: Held-out errors by iteration, where they were measured.
        """
        iterations = self.iterations()
        best = min((i for i in iterations if i in errors), key=errors.__getitem__, default=None)
        for iteration in iterations[: -self.keep]:
            if iteration != best:
                shutil.rmtree(self.path(iteration), ignore_errors=True)
        if best is not None:
            figures = {"checkpoint": self.path(best).name, "paired_mse": errors[best]}
            write_json(self.folder / BEST, figures)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers and text as a folder.

    A damaged checkpoint of that name is replaced; a whole one is left, as runs repeat themselves.

    Raises:
        OSError: if it cannot be written. Nothing partial is left.
        TypeError: for state of another kind.
    """
    if path.exists():
        if _problem(path) is None:
            return
        shutil.rmtree(path)
    plain, tensors = pack(state)
    with replacing(path) as temporary:
        temporary.mkdir()
        try:
            save_file(tensors, temporary / TENSORS)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error
        (temporary / PLAIN).write_text(json.dumps(plain) + "\n")
        digests = {name: sha256(temporary / name) for name in (TENSORS, PLAIN)}
        manifest = {"format": FORMAT, "sha256": digests}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote, its tensors on the CPU.

    Raises:
        DamagedCheckpointError: if anything is missing or differs from what was written.
    """
    problem = _problem(path)
    if problem is not None:
        raise DamagedCheckpointError("checkpoint", str(path), f"it is damaged ({problem}).")
    return unpack(json.loads((path / PLAIN).read_text()), load_file(path / TENSORS))


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']!r}, not {FORMAT}"
        for name in (TENSORS, PLAIN):
            if manifest["sha256"][name] != sha256(path / name):
                return f"{name} is not what was written"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return str(error) or type(error).__name__
    return None


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Plain data for JSON, and the tensors it names, on the CPU.

    A tensor that occurs several times, as weights that adapters share do, is kept once.

    Raises:
        TypeError: for what is neither a tensor nor plain.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[Any, str] = {}

    def visit(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            key = _memory(value)
            if key not in names or not value.numel():
                names[key] = place
                tensors[place] = value.detach().cpu().contiguous()
            return {TENSOR: names[key]}
        if isinstance(value, Mapping):
            entries = [[key, visit(item, f"{place}/{key}")] for key, item in value.items()]
            plain = all(isinstance(key, str) for key in value)
            marked = list(value) in ([TENSOR], [TUPLE], [ITEMS])
            return dict(entries) if plain and not marked else {ITEMS: entries}
        if isinstance(value, list | tuple):
            entries = [visit(item, f"{place}/{i}") for i, item in enumerate(value)]
            return entries if isinstance(value, list) else {TUPLE: entries}
        if value is None or type(value) in (bool, int, float, str):
            return value
        raise TypeError(f"{place}: a checkpoint holds no {type(value).__name__}")

    return visit(state, ""), tensors


def _memory(tensor: Tensor) -> Any:
    """What two tensors have in common that are one."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def unpack(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(plain, list):
        return [unpack(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if list(plain) == [TENSOR]:
        return tensors[plain[TENSOR]]
    if list(plain) == [TUPLE]:
        return tuple(unpack(item, tensors) for item in plain[TUPLE])
    entries = plain[ITEMS] if list(plain) == [ITEMS] else plain.items()
    return {key: unpack(item, tensors) for key, item in entries}
