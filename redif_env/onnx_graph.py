"""Networks that were published as ONNX graphs: frozen teachers, run by onnxruntime."""

from __future__ import annotations

import hashlib
import mmap
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, require

# onnxruntime's names of the kinds of numbers that a network of latents may take.
DTYPES = {
    "tensor(float16)": np.float16,
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
}


def open_graph(path: str | Path) -> Any:
    """An onnxruntime session of the graph, on the CPU.

    Raises:
        InvalidArgumentError: if the file is none or cannot be read.
        MissingExtraError: without onnxruntime.
    """
    runtime = require("onnxruntime", "onnx")
    try:
        return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # onnxruntime's errors derive from Exception itself, some of them from RuntimeError.
    except Exception as error:
        raise InvalidArgumentError(
            "path", str(path), f"onnxruntime cannot load it ({error})."
        ) from error


class OnnxNetwork(nn.Module):
    """An ONNX graph as a frozen network of `x_t` and a time, for a teacher's `Denoiser`.

    It has no gradients and no weights to train: the student is another network. Every call takes
    its rows to the host and back, which only the teacher's bank pays for. The first output is the
    prediction. Values are cast to the kind of number that the graph declares; a time, or a class,
    is `(N,)`, or `(N, 1)` where the graph says so.

    Args:
        path: File of the graph. It is read again where a copy is made.
        inputs: Names of the graph's inputs that get `x_t`, the time and, if there are some, the
            classes; default: the graph's own order. Rows of a table of conditions go by name.

    Raises:
        InvalidArgumentError: for a file that cannot be read, names that the graph does not have,
            inputs of text or of a fixed number of rows; when called, for other values than the
            graph needs, values that it refuses, gradients, or a prediction unlike `x_t`.
        MissingExtraError: without onnxruntime.
    """

    def __init__(self, path: str | Path, inputs: Sequence[str] | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self._open()
        self.inputs = list(self._declared) if inputs is None else list(inputs)
        unknown = [name for name in self.inputs if name not in self._declared]
        if unknown or not 2 <= len(self.inputs) <= len(self._declared):
            raise InvalidArgumentError(
                "inputs",
                self.inputs,
                f"name those that get x_t and the time, of the graph's {list(self._declared)}.",
            )
        for each in self._declared.values():
            _check_input(each)

    def forward(self, x_t: Tensor, t: Tensor, told: Tensor | None = None, **rows: Tensor) -> Tensor:
        """The graph's prediction, like `x_t`. Arguments as `Denoiser` passes them."""
        if x_t.requires_grad and torch.is_grad_enabled():
            raise InvalidArgumentError(
                "x_t", "with gradients", "an ONNX graph has none: use it for the teacher alone."
            )
        given = [x_t, t, *([] if told is None else [told])]
        values = dict(zip(self.inputs, given, strict=False)) | rows
        if set(values) != set(self._declared) or len(given) > len(self.inputs):
            raise InvalidArgumentError(
                "condition", sorted(values), f"the graph needs {sorted(self._declared)}."
            )
        feed = {name: _as_array(value, self._declared[name]) for name, value in values.items()}
        try:
            output = self._session.run(None, feed)[0]
        except Exception as error:
            raise InvalidArgumentError(
                "x_t", tuple(x_t.shape), f"the graph refuses the values ({error})."
            ) from error
        if output.shape != tuple(x_t.shape):
            raise InvalidArgumentError(
                "path", str(self.path), f"it makes {output.shape} of {tuple(x_t.shape)}."
            )
        return torch.from_numpy(output).to(x_t)

    def extra_repr(self) -> str:
        """The graph's hash, by which a bank of answers knows it, and what its inputs get."""
        return f"sha256={self.sha256}, inputs={self.inputs}"

    def __getstate__(self) -> dict[str, Any]:
        # A session can be neither copied nor pickled.
        kept = self.__dict__.keys() - {"_session", "_declared"}
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def _open(self) -> None:
        self._session = open_graph(self.path)
        self._declared = {each.name: each for each in self._session.get_inputs()}
        self.sha256 = _hash(self.path)


def _check_input(declared: Any) -> None:
    """Refuse what could only fail when called."""
    if declared.type not in DTYPES:
        raise InvalidArgumentError(
            "path", f"{declared.name}: {declared.type}", f"pass a graph of {', '.join(DTYPES)}."
        )
    if not declared.shape or isinstance(declared.shape[0], int):
        raise InvalidArgumentError(
            "path",
            f"{declared.name}: {declared.shape}",
            "export the graph again with a free first axis, of rows, in every input.",
        )


def _as_array(value: Tensor, declared: Any) -> np.ndarray[Any, Any]:
    """Values for an input, in the declared kind of number; a number a row in the declared shape."""
    value = value.float() if value.is_floating_point() else value  # numpy has no bfloat16
    if value.ndim == 1:
        value = value.reshape(-1, *[1] * (len(declared.shape) - 1))
    return value.detach().cpu().numpy().astype(DTYPES[declared.type])


def _hash(path: Path) -> str:
    """Hex digest of the graph and of the files beside it that it keeps weights in."""
    digest = hashlib.sha256()
    with (
        open(path, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as graph,
    ):
        digest.update(graph)
        files = sorted({path.parent / name for name in _locations(graph)})
    for file in filter(Path.is_file, files):
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _locations(graph: mmap.mmap) -> Iterator[str]:
    """Names of files with weights, which a graph has as protobuf's key "location" and its value."""
    for key in re.finditer(rb"\n\x08location\x12([\x80-\xff]?)([\x00-\x7f])", graph):
        low, high = key.groups()  # the value's length, seven bits a byte, the low ones first
        length = (low[0] & 127) + 128 * high[0] if low else high[0]
        yield graph[key.end() : key.end() + length].decode(errors="replace")
