"""Conditions: what a network is told beside noise and time, as a table that a number points into.

Environments, banks, policies and buffers keep one int64 a row. What it stands for is the denoiser's
affair: a class, or a row of this table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import InvalidArgumentError

PREFIX = "rows_"  # of the buffers, so that no tensor's name can hide a module's attribute


class Conditions(nn.Module):
    """P conditions as named tensors, such as text embeddings, and the one that means "none".

    The names are those of the network's arguments. The table follows its denoiser from device to
    device; copies of a denoiser share it, and nothing changes it. It is no part of a state dict.

    Args:
        tensors: `(P, ...)` each.
        null: The condition of the unguided half of guidance, such as a negative prompt: `(...)` or
            `(1, ...)` each, with the same names. None: no guidance.
        texts: What the rows were made of, for people; P strings, or None.
        null_text: What `null` was made of, such as the negative prompt.

    Attributes:
        null_row: Row of `null`, which is P; None without one.
        texts, null_text: As given.

    Raises:
        InvalidArgumentError: for no tensors, tensors of unequal length, or a `null` that does not
            fit them.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        null: Mapping[str, Tensor] | None = None,
        texts: Sequence[str] | None = None,
        null_text: str | None = None,
    ) -> None:
        super().__init__()
        self._num = _length(tensors)
        self.null_row = None if null is None else self._num
        if texts is not None and len(texts) != self._num:
            raise InvalidArgumentError("texts", len(texts), f"pass one for each of {self._num}.")
        self.texts = None if texts is None else [str(text) for text in texts]
        self.null_text = null_text
        for name, tensor in _with_null(tensors, null).items():
            self.register_buffer(PREFIX + name, tensor.detach(), persistent=False)

    def __len__(self) -> int:
        return self._num

    def __deepcopy__(self, memo: dict[int, Any]) -> Conditions:
        """Itself: a student, its average and its reference would each keep a copy otherwise."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled on the CPU, so that what holds a table can be loaded without the device."""
        tensors = {name: tensor.cpu() for name, tensor in self.tensors().items()}
        return _restore, (tensors, self._record())

    def _record(self) -> dict[str, Any]:
        has_null = self.null_row is not None
        return {"has_null": has_null, "texts": self.texts, "null_text": self.null_text}

    def tensors(self) -> dict[str, Tensor]:
        """The table: `(P, ...)` each, or `(P + 1, ...)` with `null` as the last row."""
        return {name.removeprefix(PREFIX): tensor for name, tensor in self.named_buffers()}

    def forward(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors of `rows`, int64 `(N,)`: `(N, ...)` each."""
        return {name: tensor[rows.to(tensor.device)] for name, tensor in self.tensors().items()}

    def with_shared(self, rows: Mapping[str, Tensor]) -> Conditions:
        """This table with further tensors, `(1, ...)` each, that are the same for every row."""
        if not rows:
            return self
        shared = {name: row.expand(len(self), *row.shape[1:]) for name, row in rows.items()}
        own = {name: tensor[: len(self)] for name, tensor in self.tensors().items()}
        null = None
        if self.null_row is not None:
            null = {name: tensor[-1:] for name, tensor in self.tensors().items()} | dict(rows)
        return Conditions(own | shared, null=null, texts=self.texts, null_text=self.null_text)

    def save(self, path: str | Path) -> None:
        """Write the table as safetensors."""
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors().items()}
        save_file(tensors, path, {"conditions": json.dumps(self._record())})

    @classmethod
    def load(cls, path: str | Path) -> Conditions:
        """Read what `save` wrote.

        Raises:
            InvalidArgumentError: if the file is missing or not such a table.
        """
        try:
            if not Path(path).is_file():  # opening a pipe would wait for ever
                raise ValueError("there is no such file")
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
            return _restore(tensors, json.loads(metadata["conditions"]))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise InvalidArgumentError(
                "path", str(path), f"pass a file that Conditions.save wrote ({error})."
            ) from error


def _restore(tensors: dict[str, Tensor], record: Mapping[str, Any]) -> Conditions:
    """The table whose `tensors()` and `_record()` these are."""
    texts = {"texts": record["texts"], "null_text": record["null_text"]}
    if not record["has_null"]:
        return Conditions(tensors, **texts)
    rows = {name: tensor[:-1] for name, tensor in tensors.items()}
    null = {name: tensor[-1:] for name, tensor in tensors.items()}
    return Conditions(rows, null=null, **texts)


def _length(tensors: Mapping[str, Tensor]) -> int:
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    lengths = {shape[0] if shape else 0 for shape in shapes.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise InvalidArgumentError(
            "tensors", shapes, "pass tensors by name, each with one row a condition."
        )
    return lengths.pop()


def _with_null(
    tensors: Mapping[str, Tensor], null: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The tensors with `null` as a further row of each."""
    if null is None:
        return dict(tensors)
    wanted = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
    given = {name: tuple(tensor.shape) for name, tensor in null.items()}
    fits = all(given.get(name) in (shape, (1, *shape)) for name, shape in wanted.items())
    if not fits or given.keys() != wanted.keys():
        raise InvalidArgumentError("null", given, f"pass tensors of shapes {wanted}.")
    return {
        name: torch.cat([tensor, null[name].to(tensor).reshape(1, *tensor.shape[1:])])
        for name, tensor in tensors.items()
    }
