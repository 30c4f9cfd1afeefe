"""Trained students, kept so that other test tasks or figures need no training again."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from redif_env import schedules
from redif_env.denoiser import Denoiser
from redif_env.files import write_tensors

from ..baselines import Ledger, Result

TRAINED = "trained"  # what the training was
RESULT = "result"


def save(path: Path, result: Result, trained: dict[str, Any]) -> None:
    """Keep a student that a network and a grid describe; nothing of what else chooses its times.

    Args:
        path: The file, safetensors.
        result: The student, and what it cost.
        trained: What the training was, as JSON can hold it: `load` asks for the same.
    """
    if result.sampler is not schedules.sample:
        return
    about = {
        "timesteps": result.timesteps.tolist(),
        "nfe": result.nfe,
        "solver_order": result.student.solver_order,
        "history": result.history,
        "evaluations": result.ledger.evaluations,
        "updates": result.ledger.updates,
        "seconds": result.ledger.seconds,
    }
    # Clones, since tied weights may not share their storage in such a file.
    weights = {name: each.clone() for name, each in result.student.network.state_dict().items()}
    write_tensors(path, weights, {TRAINED: _plain(trained), RESULT: _plain(about)})


def load(path: Path, like: Denoiser, trained: dict[str, Any]) -> Result | None:
    """The kept result of the same training, or None.

    Args:
        path: Where `save` wrote.
        like: A denoiser of the student's architecture; not changed.
        trained: What the training was to be.
    """
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        kept = file.metadata() or {}
    if kept.get(TRAINED) != _plain(trained):
        return None
    about = json.loads(kept[RESULT])
    student = copy.deepcopy(like).eval().requires_grad_(False)
    student.network.load_state_dict(load_file(path))
    student.set_solver_order(about.get("solver_order", 1))
    ledger = Ledger(Counter(about["evaluations"]), Counter(about["updates"]), about["seconds"])
    times = torch.tensor(about["timesteps"])
    return Result(student, times, ledger, about["history"], schedules.sample, about["nfe"])


def _plain(content: Any) -> str:
    return json.dumps(content, sort_keys=True)
