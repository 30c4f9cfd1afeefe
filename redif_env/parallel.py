"""Several processes that train one student: who does which share, and what they agree on.

Each process has a copy of the student and its share of the environments. Whatever is decided from
numbers (statistics of advantages, KL, whether a loss is finite) is decided from those of all, so
that all copies take the same step. Of a single process every function returns what it was given and
computes nothing.

Processes are started by `torchrun` or `accelerate launch`, and meet in `start`.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from .errors import InvalidArgumentError, LostProcessError, require

# How long a process waits for another. Far more than any of them works alone between two meetings
# (rank 0 writes the student and judges it), and an end to waiting for a node that is gone. A
# process that dies beside us is noticed at once, by its closed connection or by torchrun.
TIMEOUT = datetime.timedelta(minutes=30)
# Gradients are sent in parts of at most so many elements: one for most students, and no second copy
# of the weights for large ones.
BUCKET = 2**26


def launched() -> bool:
    """Whether this process is one of several, by what its launcher left in the environment."""
    return world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: str | torch.device = "cpu") -> torch.device:
    """Meet the other processes that the launcher started, if there are any.

    Args:
        device: Kind of device to train on: `"cpu"` talks through gloo, `"cuda"` through NCCL.

    Returns:
        The device of this process: of several on CUDA the one of its local rank.

    Raises:
        MissingExtraError: for several processes without accelerate.
        LostProcessError: if the others do not come within `TIMEOUT`.
    """
    device = torch.device(device)
    if not launched():
        return device
    accelerate = require("accelerate", "accelerate")
    if not distributed.is_initialized():
        atexit.register(_stop)
    with _together("start"):
        state = accelerate.PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
    if state.num_processes == 1 or state.device.type != device.type:
        raise InvalidArgumentError(
            "device", str(device), f"accelerate gives this process {state.device}: pass that kind."
        )
    return device if device.type == "cpu" else state.device


def world_size() -> int:
    """Number of processes."""
    met = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if met else 1


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes, logs and prints for all."""
    return rank() == 0


def shard() -> tuple[int, int]:
    """This process and how many there are: `ReDiFVectorEnv`'s `shard`."""
    return rank(), world_size()


def share(number: int) -> int:
    """A process's part of a number that is meant for all, at least 1."""
    return max(number // world_size(), 1)


def own_seed(seed: int, *more: int) -> int:
    """A seed that no other process has, for what must differ between them; a hash."""
    text = " ".join(map(str, (seed, rank(), *more)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def mean(value: Tensor) -> Tensor:
    """The mean over processes; of means over equally many rows, that of all rows."""
    return value if world_size() == 1 else total(value) / world_size()


def total(value: Tensor) -> Tensor:
    """The sum over processes, a new tensor."""
    if world_size() == 1:
        return value
    value = value.clone()
    with _together("add numbers"):
        distributed.all_reduce(value)
    return value


def std(values: Tensor) -> Tensor:
    r"""The standard deviation of all processes' values, as many each, with Bessel's correction.

    From each process's mean and variance (Chan et al. 1983), since sums of squares lose digits:

    .. math:: (WN - 1)\,s^2 = N \sum_w s_w^2 + N \sum_w (m_w - m)^2

    with :math:`s_w^2` without it, which a single value has too.
    """
    if world_size() == 1:
        return values.std()
    count = values.numel()
    variance, centre = torch.var_mean(values, correction=0)
    variances, centres = gather(torch.stack([variance, centre])[None]).unbind(1)
    spread = variances.sum() + (centres - centres.mean()).square().sum()
    return (count * spread / (count * world_size() - 1)).sqrt()


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes, as many each, in the order of ranks, `(W * N, ...)`."""
    if world_size() == 1:
        return rows
    sent = rows.contiguous()
    if distributed.get_backend() == "nccl":
        sent = sent.cuda()
    received = [torch.empty_like(sent) for _ in range(world_size())]
    with _together("gather rows"):
        distributed.all_gather(received, sent)
    return torch.cat(received).to(rows.device)


def in_shares(
    compute: Callable[[Any], Sequence[Tensor]], num: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """What `compute` makes of `num` rows, each process of its share, put together for all.

    Args:
        compute: Takes an index of rows, and returns tensors of so many rows.
        num: Rows in all. Shares have the same size: some rows are computed twice where it does not
            divide.
        device: Of the index.
    """
    if world_size() == 1:
        return tuple(compute(slice(None)))
    size = -(-num // world_size())
    rows = (torch.arange(size, device=device) + rank() * size) % num
    return tuple(gather(part)[:num] for part in compute(rows))


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes rank 0's values of these tensors, in place."""
    if world_size() == 1:
        return
    for tensor in tensors:
        sent = tensor.detach().contiguous()
        if distributed.get_backend() == "nccl":
            sent = sent.cuda()
        with _together("send weights"):
            distributed.broadcast(sent, 0)
        tensor.copy_(sent)


@torch.no_grad()
def average_gradients(
    parameters: Iterable[Tensor], statistics: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Replace each gradient by its mean over processes, and return the means of the statistics.

    All in one message an update (of `BUCKET` elements at most, then in more). Losses are means over
    as many rows in each process, so that the mean of the gradients is that of all rows together.

    Args:
        parameters: Those without a gradient are left out; the same ones in every process.
        statistics: Float tensors by name, the same names and shapes in every process.
    """
    if world_size() == 1:
        return dict(statistics)
    means = {name: value.detach().clone() for name, value in statistics.items()}
    gradients = [weight.grad for weight in parameters if weight.grad is not None]
    for bucket in _buckets([*gradients, *means.values()]):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        with _together("average gradients"):
            distributed.all_reduce(flat)
        flat /= world_size()
        parts = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
    return means


def gather_bytes(data: bytes) -> list[bytes]:
    """What each process passes, in the order of ranks, in the first one; nothing in the others."""
    if world_size() == 1:
        return [data]
    device = kind_of_device()
    sizes = gather(torch.tensor([len(data)], device=device)).tolist()
    sent = torch.zeros(max(sizes), dtype=torch.uint8)
    sent[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sent = sent.to(device)
    received = [torch.empty_like(sent) for _ in sizes] if is_main() else None
    with _together("gather what each has"):
        distributed.gather(sent, received)
    parts = zip(received or [], sizes, strict=False)
    return [part[:size].cpu().numpy().tobytes() for part, size in parts]


def broadcast_bytes(data: bytes) -> bytes:
    """What the first process passes."""
    if world_size() == 1:
        return data
    size = torch.tensor([len(data)])
    broadcast([size])
    sent = torch.zeros(int(size), dtype=torch.uint8)
    if is_main():
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    broadcast([sent])
    return sent.numpy().tobytes()


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if world_size() == 1:
        return number
    return int(gather(torch.tensor([number], device=kind_of_device())).max())


def check_same(argument: str, value: str) -> None:
    """Refuse a value that processes disagree on.

    Raises:
        InvalidArgumentError: in every process, if it is not the same in all.
    """
    if world_size() == 1:
        return
    digest = torch.tensor([own_hash(value)], device=kind_of_device())
    if len(gather(digest).unique()) > 1:
        raise InvalidArgumentError(
            argument, value, "processes differ in it: start all with the same arguments and files."
        )


def all_true(value: bool) -> bool:
    """Whether it is true in every process."""
    if world_size() == 1:
        return value
    return bool(gather(torch.tensor([value], device=kind_of_device())).all())


def own_hash(text: str) -> int:
    """56 bits of a text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def kind_of_device() -> str:
    """Where tensors must be that processes exchange, `"cpu"` or `"cuda"`."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, of at most `BUCKET` elements unless there is only one."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        bucket: list[Tensor] = []
        size = 0
        for tensor in (tensor for tensor in tensors if tensor.dtype == dtype):
            if bucket and size + tensor.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(tensor)
            size += tensor.numel()
        yield bucket


@contextlib.contextmanager
def _together(task: str) -> Iterator[None]:
    """Turn what torch raises when another process is gone into a `LostProcessError`."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are, and gloo raises plain ones
        raise LostProcessError(task, rank_of_launcher(), str(error)) from error


def rank_of_launcher() -> int:
    """This process's number by its launcher, known before processes have met."""
    return int(os.environ.get("RANK", "0"))


def _stop() -> None:
    """Close connections: torch aborts a process that exits with threads of gloo running."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
