"""Students as ordinary diffusers folders, usable where this project is not installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import METADATA
from redif_env.schedules import explicit

from .lora import merge

SNIPPET = """\
import json, torch
from diffusers import DPMSolverMultistepScheduler, UNet2DModel
info = json.load(open("redif.json"))
unet = UNet2DModel.from_pretrained("unet")
scheduler = DPMSolverMultistepScheduler.from_pretrained("scheduler")
scheduler.set_timesteps(timesteps=info["timesteps"])
x = torch.randn(10, {shape}, generator=torch.Generator().manual_seed(0))
{labels}
for t in scheduler.timesteps:
    with torch.no_grad(): x = scheduler.step({prediction}, t, x).prev_sample
"""

LABELS = "labels = torch.arange(10) % info['num_classes']"
LABELS_GUIDED = (
    LABELS + "; w = info['guidance_scale']; null = torch.full((10,), info['null_class'])"
)
PLAIN = "unet(x, t{labels}).sample"
GUIDED = (
    "(1 - w) * unet(x, t, class_labels=null).sample + w * unet(x, t, class_labels=labels).sample"
)

CARD = """\
---
library_name: diffusers
tags: [redif, few-step]
---
# A {num_steps}-step student

Distilled with ReDiF. Network evaluations a sample: {nfe}. Sample it in this folder, with diffusers
alone:

```python
{snippet}```

`x` then holds ten samples in [-1, 1]. The times in `redif.json` belong to the student: other times
or another number of steps give worse samples.
"""


def export_student(
    student: Denoiser, timesteps: Tensor, scheduler_config: Any, folder: str | Path
) -> Path:
    """Write a student as a diffusers folder: `unet/`, `scheduler/`, `redif.json`, `README.md`.

    The scheduler is diffusers' DPMSolverMultistep of order 1, which equals DDIM at eta = 0 and,
    unlike diffusers' DDIMScheduler, steps through any list of timesteps.

    Args:
        student: The denoiser; its network must be a diffusers model. Adapters are merged.
        timesteps: Its grid, with or without the final 0.
        scheduler_config: Config of the scheduler that the teacher was trained with.
        folder: Where to write; must not exist. Appears complete or not at all.

    Raises:
        InvalidArgumentError: if the folder exists or the network is not a diffusers model.
    """
    folder = Path(folder)
    if folder.exists():
        raise InvalidArgumentError("folder", str(folder), "it exists; choose another name.")
    student = merge(student)
    network: Any = student.network
    if not hasattr(network, "save_pretrained"):
        raise InvalidArgumentError(
            "student", type(network).__name__, "only diffusers models can be exported."
        )
    grid = explicit(timesteps, student.schedule)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_folder(temporary, student, grid, scheduler_config)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_folder(temporary: Path, student: Denoiser, grid: Tensor, scheduler_config: Any) -> None:
    network: Any = student.network
    network.save_pretrained(temporary / "unet")
    make_scheduler(scheduler_config, student).save_pretrained(temporary / "scheduler")
    _write_json(temporary / METADATA, describe_student(student, grid))
    _write_json(
        temporary / "model_index.json",
        {
            # The stock pipeline that keeps this scheduler; DDIMPipeline would replace it.
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", type(network).__name__],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        },
    )
    num_steps = len(grid) - 1
    card = CARD.format(num_steps=num_steps, nfe=num_steps * student.nfe, snippet=snippet(student))
    (temporary / "README.md").write_text(card)


def make_scheduler(scheduler_config: Any, student: Denoiser) -> DPMSolverMultistepScheduler:
    """The stock scheduler that samples the student."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler_config,
        algorithm_type="dpmsolver++",
        solver_order=1,
        final_sigmas_type="zero",
        prediction_type=student.prediction_type,
    )


def describe_student(student: Denoiser, grid: Tensor) -> dict[str, Any]:
    """What a sampler must know beside the weights."""
    return {
        "num_steps": len(grid) - 1,
        "timesteps": [int(t) for t in grid[:-1]],
        "guidance_scale": student.guidance_scale,
        "num_classes": student.num_classes,
        "null_class": student.null_class,
    }


def snippet(student: Denoiser) -> str:
    """The ten lines that sample the student with diffusers alone."""
    shape = ", ".join(map(str, student.latent_shape))
    if student.nfe == 2:
        return SNIPPET.format(shape=shape, labels=LABELS_GUIDED, prediction=GUIDED)
    conditional = student.num_classes is not None
    prediction = PLAIN.format(labels=", class_labels=labels" if conditional else "")
    return SNIPPET.format(
        shape=shape, labels=LABELS if conditional else "labels = None", prediction=prediction
    )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
