"""Files and folders from strangers: nothing in them is executed, and nothing beyond them is read.

Weights are safetensors, never pickles, and classes come from lists of ours: those rules stand where
the files are read. Here is what all of them share.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import InvalidArgumentError, TeacherFolderError

MAX_ENTRIES = 10_000  # of a model's folder; whole pipelines have less than a hundred
# Of weights in several files; `diffusion_pytorch_model.safetensors.index.fp16.json`, say.
INDEX = re.compile(r"\.safetensors\.index(\..+)?\.json$")
MAX_JSON = 100_000_000  # bytes; a large tokenizer has ten million


def read_json(
    path: Path,
    argument: str = "teacher",
    kind: type[InvalidArgumentError] = TeacherFolderError,
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: The file.
        argument: What the error names.
        kind: The error's class.

    Raises:
        InvalidArgumentError: of `kind`, if the file is missing, no regular one, too large, or holds
            something else.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ValueError("it is no regular file")
        if status.st_size > MAX_JSON:
            raise ValueError(f"it has {status.st_size} bytes")
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise kind(
            argument, str(path), f"the file is missing or not JSON ({error}); restore the folder."
        ) from error
    if not isinstance(content, dict):
        raise kind(argument, str(path), "the file must hold a JSON object; restore the folder.")
    return content


def check_folder(folder: Path, argument: str = "teacher") -> Path:
    """Refuse a folder that leads out of itself, and return it.

    Links may point to files of the folder; in the hub's cache, whose snapshots are links, to those
    of the repository. Indices of weights in several files may only name files beside them.

    Raises:
        TeacherFolderError: for other links, names with a path in them, pipes and devices, and
            more entries than any model's folder has.
    """
    found = 0
    root = _root(folder)
    for place, folders, files in os.walk(folder, onerror=None):
        folders[:] = [name for name in folders if name[0] != "."]  # such as .git
        for name in [*folders, *files]:
            found += 1
            if found > MAX_ENTRIES:
                raise TeacherFolderError(
                    argument, str(folder), f"pass a model's folder: it has {MAX_ENTRIES} files."
                )
            path = Path(place, name)
            _check_entry(path, root, argument)
            if INDEX.search(name):
                _check_weight_map(path, argument)
    return folder


def _root(folder: Path) -> Path:
    """What links may point into: the folder, or the repository in the hub's cache."""
    root = folder.resolve()
    return root.parents[1] if root.parent.name == "snapshots" else root


def _check_entry(path: Path, root: Path, argument: str) -> None:
    try:
        real = path.resolve()
        mode = path.stat().st_mode
    except (OSError, RuntimeError) as error:  # links that lead nowhere, or in a circle
        raise TeacherFolderError(
            argument, str(path), f"it can not be read ({error}); restore the folder."
        ) from error
    if not real.is_relative_to(root):
        raise TeacherFolderError(
            argument, str(path), "the link leads out of the folder: put the file itself there."
        )
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise TeacherFolderError(argument, str(path), "remove it: it is no regular file.")


def _check_weight_map(path: Path, argument: str) -> None:
    names = read_json(path, argument).get("weight_map")
    values = list(names.values()) if isinstance(names, dict) else [None]
    for name in values:
        if not is_plain(name) or not str(name).endswith(".safetensors"):
            raise TeacherFolderError(
                argument,
                f"{path}: {name!r}",
                "its weight_map must name .safetensors files beside it.",
            )


def check_room(make: Callable[[], Any], folder: Path) -> None:
    """Refuse a network with more weights than the files of its folder hold.

    It is made without memory, and no further than that: a config alone could ask for any amount of
    memory and time. Draws no random numbers.

    Args:
        make: Makes the network.
        folder: Where its `.safetensors` lie.

    Raises:
        ValueError: if it has more.
        SafetensorError: if a file is damaged.
    """
    room = sum(map(_num_weights, folder.glob("*.safetensors")))
    thread, left = threading.get_ident(), [room]

    def count(module: Any, name: str, parameter: Any) -> None:
        if threading.get_ident() == thread and parameter is not None:
            left[0] -= parameter.numel()
            if left[0] < 0:
                raise ValueError(f"its config asks for more than the {room} weights that it has")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            make()
    finally:
        hook.remove()


def _num_weights(path: Path) -> int:
    with safe_open(path, "pt") as file:
        names = file.keys()
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def is_plain(name: object) -> bool:
    """Whether something is the name of a file, or of a folder, in a folder: without any path."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return not set(name) & {"/", "\\", "\0"} and os.path.basename(name) == name
