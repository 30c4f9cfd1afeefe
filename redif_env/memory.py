"""How much memory training a student takes: counted before it starts, and measured."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .denoiser import Denoiser
from .rewards import Reward, WeightedSum
from .teacher import Teacher

FLOAT = 4  # bytes
GB = 1e9


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for; `str` is a table in GB.

    Attributes:
        parts: What training holds all the time, by name.
        activations: The most that one micro-batch adds while its gradient is computed; None where
            it was not measured.
    """

    parts: dict[str, int]
    activations: int | None = None

    @property
    def total(self) -> int:
        """Of all parts, and of the activations where they are known."""
        return sum(self.parts.values()) + (self.activations or 0)

    def __str__(self) -> str:
        known = self.activations is not None
        figures = {name: f"{size / GB:.3f}" for name, size in self.parts.items()}
        figures["activations"] = f"{(self.activations or 0) / GB:.3f}" if known else "unknown"
        figures["in all" if known else "in all, at least"] = f"{self.total / GB:.3f}"
        lines = [f"{name:36}{figure:>10}" for name, figure in figures.items()]
        return "\n".join([f"{'memory':36}{'GB':>10}", *lines])


def estimate(
    teacher: Teacher,
    *,
    num_envs: int,
    num_steps: int,
    bank_size: int,
    num_adapter_weights: int | None = None,
    reference: bool = False,
    has_map: bool = True,
    reward: Reward | None = None,
    offloaded: bool = False,
    activations: int | None = None,
) -> Estimate:
    """What training a student of a teacher holds, counted from shapes.

    Of PPO as in `agents`, with groups, one episode a rollout with one exploring step, a fixed
    schedule and Adam; a critic, and means of further exploring steps, come on top. Nothing is
    allocated.

    Args:
        teacher: Whose network is the student's too.
        num_envs: Trajectories of a rollout.
        num_steps: Steps of the student.
        bank_size: Training tasks.
        num_adapter_weights: Weights of adapters that are trained in the place of the network's
            own; None: the network's own.
        reference: Whether it keeps the student that training starts from, for a divergence.
        has_map: Whether credit is local.
        reward: Whose networks count, if it has any.
        offloaded: Whether the teacher's network is on another device, see `Teacher.offload`.
        activations: What `measure_activations` returned, times the rows of a micro-batch.
    """
    network = teacher.denoiser.network
    own = list(network.parameters())
    if num_adapter_weights is None:
        trained, frozen = sum(weight.numel() for weight in own), 0
        student = FLOAT * trained
        copies = 1 + reference
    else:
        trained, frozen = num_adapter_weights, _size(own)
        student = frozen + FLOAT * trained
        copies = 1  # the reference has no adapters, and shares the rest
    table = teacher.denoiser.conditions
    fixed = [] if teacher.codec is None else list(_tensors(teacher.codec))
    fixed += [] if table is None else list(table.buffers())
    parts = {
        "teacher": 0 if offloaded else _size(_tensors(network)),
        "decoder and conditions": _size(fixed),
        "networks of the reward": _size(_tensors_of(reward)) if reward is not None else 0,
        "student": student + _size(network.buffers()),
        "its average and reference": copies * FLOAT * trained,
        "weights at the start": FLOAT * trained,  # of `train/parameter_drift`
        "gradients": FLOAT * trained,
        "optimiser": 2 * FLOAT * trained,
        "rollout": rollout_size(teacher.denoiser, num_envs, num_steps, has_map),
        "bank": bank_size * _task_size(teacher.denoiser),
    }
    return Estimate(parts, activations)


def rollout_size(denoiser: Denoiser, num_envs: int, num_steps: int, has_map: bool = True) -> int:
    """Bytes of a rollout of one episode a row, of which one step explores, see `estimate`."""
    elements = math.prod(denoiser.latent_shape)
    # The action, which is the next latent; time, steps left, std, reward, value and return; the
    # start's flag.
    row = FLOAT * (elements + 6) + 1
    if denoiser.num_classes is not None:
        row += 8
    # The first latent, the explored step and its mean, the advantage and, with local credit, the
    # map that it comes from.
    episode = 8 + FLOAT * (2 * elements + (2 * elements if has_map else 1))
    return num_envs * (num_steps * row + episode)


def measure_activations(denoiser: Denoiser, num_rows: int = 1) -> int:
    """The most bytes of tensors that the gradient of so many rows adds to what there was.

    By a trial on the denoiser's device, whose weights and gradients stay as they are: run it on
    `policy.denoiser`, of which it depends what is trained and whether blocks are checkpointed. The
    gradients themselves are included. What kernels use within is not, nor what a device's allocator
    keeps in reserve: leave a tenth of the device free.
    """
    generator = torch.Generator().manual_seed(0)
    device = denoiser.device
    x_t = denoiser.initial_noise(num_rows, generator).to(device)
    condition = denoiser.initial_condition(num_rows, generator)
    condition = None if condition is None else condition.to(device)
    t = torch.full((num_rows,), denoiser.schedule.max_timestep / 2, device=device).round()
    trained = [weight for weight in denoiser.network.parameters() if weight.requires_grad]
    counted = denoiser.network_evaluations
    with PeakMemory() as memory, torch.enable_grad():
        torch.autograd.grad(denoiser(x_t, t, condition).square().mean(), trained, allow_unused=True)
    denoiser.network_evaluations = counted
    return memory.peak


def activations_of(teacher: Teacher, num_rows: int, room: float) -> int:
    """The most bytes that a gradient of so many rows of a student like the teacher takes.

    Measured on a copy of the network; but where so many times a single row's would not fit into
    `room` bytes, that is the answer, which counts the gradients with every row.
    """
    denoiser = copy.deepcopy(teacher.denoiser).requires_grad_(True)
    most = num_rows * measure_activations(denoiser, 1)
    return most if most > room else measure_activations(denoiser, num_rows)


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of tensors made within it, on any device.

    Attributes:
        peak: The most that was alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._alive = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(tensor.untyped_storage()) for tensor in args if isinstance(tensor, Tensor)}
        result = func(*args, **(kwargs or {}))
        # Views and results in place have the storage of what was given.
        tree_map_only(Tensor, lambda made: self._add(made.untyped_storage(), given), result)
        return result

    def _add(self, storage: Any, given: set[int]) -> None:
        if id(storage) in given or storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self._alive += size
        self.peak = max(self.peak, self._alive)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._alive -= size


def _task_size(denoiser: Denoiser) -> int:
    """Bytes of a task of the bank: noise, answer, condition."""
    condition = 8 if denoiser.num_classes is not None else 0
    return 2 * FLOAT * math.prod(denoiser.latent_shape) + condition


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _tensors_of(reward: Any) -> Iterator[Tensor]:
    """Weights of a reward's own networks, through sums and wrappers; a codec is the teacher's."""
    if isinstance(reward, WeightedSum):
        for _, term in reward.terms:
            yield from _tensors_of(term)
        return
    for name, value in vars(reward).items():
        if isinstance(value, Reward):
            yield from _tensors_of(value)
        elif isinstance(value, nn.Module) and name != "codec":
            yield from _tensors(value)


def _size(tensors: Iterable[Tensor]) -> int:
    """Bytes, each tensor once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())
