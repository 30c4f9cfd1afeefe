"""Other few-step techniques, for honest comparison: one file each, one interface.

`run(name, teacher, bank, grid, ...)` gives a `Result` for every entrant; docs/baselines.md
describes them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from redif_env.errors import check_choice
from redif_env.teacher import Teacher, TeacherBank

from .backprop import Backprop
from .base import Ledger, Method, Result
from .solvers import SOLVERS, search, solve

METHODS: dict[str, type[Method]] = {kind.name: kind for kind in (Backprop,)}
ENTRANTS = (*SOLVERS, *METHODS)

__all__ = [
    "ENTRANTS",
    "METHODS",
    "SOLVERS",
    "Backprop",
    "Ledger",
    "Method",
    "Result",
    "run",
    "search",
    "solve",
]


def run(name: str, teacher: Teacher, bank: TeacherBank, grid: Tensor, **options: Any) -> Result:
    """Let an entrant make a few-step sampler.

    Args:
        name: One of `ENTRANTS`.
        teacher: The teacher; not changed.
        bank: Training tasks, which solvers do not need.
        grid: Times, `(num_steps + 1,)`.
        options: Of training, see `Method.train`; ignored by solvers, which are not trained.

    Raises:
        InvalidArgumentError: for an unknown name, or an argument that makes no sense.
    """
    if check_choice("name", name, ENTRANTS) in SOLVERS:
        return solve(name, teacher, grid)
    return METHODS[name].train(teacher, bank, grid, **options)
