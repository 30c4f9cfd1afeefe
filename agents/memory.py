"""How much memory training a student takes, with adapters too: `redif_env.memory` for agents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from redif_env import memory
from redif_env.errors import check_integer
from redif_env.memory import Estimate, PeakMemory, measure_activations, rollout_size
from redif_env.teacher import Teacher

from .lora import find_targets

__all__ = [
    "Estimate",
    "PeakMemory",
    "estimate",
    "measure_activations",
    "num_adapter_weights",
    "rollout_size",
]


def estimate(
    teacher: Teacher,
    *,
    lora_rank: int | None = None,
    lora_targets: Sequence[str] | None = None,
    **options: Any,
) -> Estimate:
    """What training a student of a teacher holds, counted from shapes.

    Args:
        teacher: Whose network is the student's too.
        lora_rank, lora_targets: As of `StudentPolicy`.
        options: Of `redif_env.memory.estimate`.

    Raises:
        InvalidArgumentError: for targets of adapters that the network lacks.
    """
    adapters = None
    if lora_rank is not None:
        adapters = num_adapter_weights(teacher.denoiser.network, lora_rank, lora_targets)
    return memory.estimate(teacher, num_adapter_weights=adapters, **options)


def num_adapter_weights(
    network: nn.Module, lora_rank: int, lora_targets: Sequence[str] | None = None
) -> int:
    """Weights of the adapters that `lora.add_adapters` makes, without making them."""
    rank = check_integer("lora_rank", lora_rank, 1)
    layers: list[Any] = list(map(network.get_submodule, find_targets(network, lora_targets)))
    # A is (rank, in), or (rank, in, kernel); B is (out, rank), or (out, rank, 1, 1).
    shapes = [layer.weight.shape for layer in layers]
    return sum(rank * (math.prod(shape[1:]) + shape[0]) for shape in shapes)
