"""Writing files so that nobody ever sees half of one, and a power cut leaves the one before."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

TEMPORARY = ".tmp"  # ends the names of folders that a killed process may leave
CHUNK = 1 << 20


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path for a file or folder, which takes its place once it is complete.

    It has the same name in a folder of its own beside `path`, so that several writers do not meet.
    What is written there is flushed to the disk, and only then renamed: the name stands for the old
    content or the new one, whatever happens in between. A folder does not replace another.

    Args:
        path: The file or folder to write.

    Yields:
        Where to write it; what is missing there afterwards is an error.

    Raises:
        OSError: if it cannot be written. Nothing partial is left.
    """
    place = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent))
    try:
        yield place / path.name
        _flush(place / path.name)
        os.replace(place / path.name, path)
        _flush_one(path.parent)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file as a whole, see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as a whole, see `replacing`; what JSON does not know as text."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
) -> None:
    """Write tensors of any device, and texts, as one safetensors file, see `replacing`."""
    kept = {name: each.detach().cpu().contiguous() for name, each in tensors.items()}
    with replacing(path) as temporary:
        save_file(kept, temporary, about)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers of this folder have left; nobody may be writing there."""
    for left in folder.glob(f".*{TEMPORARY}"):
        shutil.rmtree(left, ignore_errors=True)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    for each in (*path.rglob("*"), path):
        _flush_one(each)


def _flush_one(path: Path) -> None:
    """Have the disk hold what was written: without it a rename may survive what it names."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
