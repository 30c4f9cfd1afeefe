"""What the report of a run says: figures on held-out tasks, costs by purpose, and versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redif_env import parallel, schedules
from redif_env.denoiser import Denoiser
from redif_env.loading import BUNDLED
from redif_env.teacher import Teacher, TeacherBank

from . import smaller
from .evaluation import JUDGE_FOLDER, Judge, compare

PACKAGES = ("redif", "torch", "diffusers", "gymnasium", "stable_baselines3", "numpy")
# The seed of reference banks: reports must not depend on the run's seed.
REFERENCE_SEED = 1


@dataclasses.dataclass(frozen=True)
class Banks:
    """Tasks by purpose; no noise is in two of them."""

    train: TeacherBank
    validation: TeacherBank
    test: TeacherBank
    reference: TeacherBank


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def find_judge(teacher: Teacher) -> Judge | None:
    """The judge in the teacher's folder, on the teacher's device, or None if there is none."""
    if teacher.source is None:
        return None
    folder = BUNDLED.get(teacher.source, Path(teacher.source)) / JUDGE_FOLDER
    return Judge.load(folder).to(teacher.device) if folder.is_dir() else None


@torch.no_grad()
def sample(denoiser: Denoiser, grid: Tensor, bank: TeacherBank) -> Tensor:
    """A denoiser's answers to all tasks of a bank, `(N, *latent_shape)`; processes share them."""

    def some(rows: Any) -> tuple[Tensor]:
        condition = None if bank.condition is None else bank.condition[rows]
        return (schedules.sample(denoiser, bank.x_T[rows], condition, grid),)

    return parallel.in_shares(some, len(bank), bank.x_T.device)[0]


def held_out(
    teacher: Teacher, banks: Banks, samples: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """The figures of each method, and of the teacher itself: paired with itself it has no error."""
    judge = find_judge(teacher)
    rows = {**samples, "teacher_floor": banks.test.teacher_x_0}
    figures = {name: compare(x_0, banks.test, banks.reference, judge) for name, x_0 in rows.items()}
    figures["teacher_floor"]["paired_mse"] = None
    return figures


def ledger(
    teacher: Teacher, banks: Banks, searched: int, spent: Mapping[str, int]
) -> dict[str, int]:
    """Network-forward equivalents by purpose: 1 a row sent forward, 3 forward and back.

    With gradient checkpointing 4: a row is sent forward twice.

    Counts, whatever the size of the network: a smaller student's rollout, update and warm-up are
    cheaper than the teacher's answers, see the report's `flops`. Of the reward: forward passes of
    its own networks, whatever their size.

    The teacher's answers count in full, also when they came from the cache.

    Args:
        teacher: Who was asked.
        banks: What for.
        searched: What the search of the grid took; 0 if there was none, and then the validation
            tasks that it is done on do not count either.
        spent: What training took, by purpose.
    """
    asked = len(banks.train) + (len(banks.validation) if searched else 0)
    return {
        "teacher": asked * teacher.num_steps * teacher.denoiser.nfe,
        "search": searched,
        **spent,
    }


def sizes(teacher: Denoiser, student: Denoiser) -> dict[str, dict[str, int]]:
    """Parameters of both, and the floating-point operations of one prediction."""
    return {
        "parameters": {
            "teacher": smaller.count_parameters(teacher.network),
            "student": smaller.count_parameters(student.network),
        },
        "flops": {
            "teacher": smaller.count_flops(teacher),
            "student": smaller.count_flops(student),
        },
    }
