"""Whole runs of `distill` that take a second, and the processes that are killed in them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from stable_baselines3.common.callbacks import BaseCallback
from tiny_models import pixel_unet

from agents import distill, distillation, run_folder
from agents.distillation import Distillation
from redif_env import load_teacher

OPTIONS: dict[str, Any] = {
    "num_steps": 2,
    "schedule": [850.0, 300.0],
    "iterations": 6,
    "num_envs": 8,
    "batch_size": 4,
    "n_epochs": 2,
    "bank_size": 16,
    "num_held_out": 100,
    "eval_every": 2,
    "checkpoint_every": 2,
    "learning_rate": 1e-3,
}


class At(BaseCallback):
    """Does something at the end of a rollout.

    Args:
        rollout: Which one, from 1.
        action: What.
    """

    def __init__(self, rollout: int, action: Callable[[], Any]) -> None:
        super().__init__()
        self.rollout, self.action = rollout, action

    def _on_rollout_end(self) -> None:
        model: Any = self.model
        if model.rollouts == self.rollout:
            self.action()

    def _on_step(self) -> bool:
        return True


class Killed(BaseException):
    """Stands for sudden death: nothing catches it."""


def die() -> None:
    raise Killed


def write_teacher(folder: Path, seed: int = 0) -> Path:
    """A teacher's folder: a network of a few thousand random weights."""
    unet = pixel_unet(sample_size=8, block_out_channels=(4, 8))
    torch.manual_seed(seed)
    for weight in unet.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    DDPMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def run(teacher: Path, out: Path | None, **changes: Any) -> Distillation:
    """Distil it; any argument can be replaced. With few tasks, and without the slow picture."""
    given = load_teacher(teacher, num_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "NUM_VALIDATION", 16)
        patch.setattr(run_folder, "save_samples", lambda *_: None)
        return distill(given, **{**OPTIONS, "out": out, **changes})


def go_on(teacher: Path, out: Path, kill_at_flush: int | None, changes: dict[str, Any]) -> None:
    """For a process of its own: start a run or go on with it, and perhaps die while it writes."""
    torch.set_num_threads(1)
    if kill_at_flush is not None:
        count, flush = [0], os.fsync

        def fsync(handle: int) -> None:
            count[0] += 1
            if count[0] == kill_at_flush:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(handle)

        os.fsync = fsync  # type: ignore[assignment]
    run(teacher, out, resume=out.exists(), **changes)
