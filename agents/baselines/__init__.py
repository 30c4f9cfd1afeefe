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
from .consistency import Consistency
from .distribution_matching import DistributionMatching
from .output_regression import OutputRegression
from .progressive import Progressive
from .solvers import SOLVERS, UNTRAINED, fits, search, solve
from .surrogate import Surrogate
from .trajectory_regression import TrajectoryRegression

_KINDS: tuple[type[Method], ...] = (
    OutputRegression,
    TrajectoryRegression,
    Progressive,
    Consistency,
    DistributionMatching,
    Backprop,
    Surrogate,
)
METHODS = {kind.name: kind for kind in _KINDS}
ENTRANTS = (*SOLVERS, *METHODS)

__all__ = [
    "ENTRANTS",
    "METHODS",
    "SOLVERS",
    "UNTRAINED",
    "Backprop",
    "Consistency",
    "DistributionMatching",
    "Ledger",
    "Method",
    "OutputRegression",
    "Progressive",
    "Result",
    "Surrogate",
    "TrajectoryRegression",
    "fits",
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
