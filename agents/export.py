"""Students as ordinary diffusers folders, usable where this project is not installed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import METADATA, find_folder, load_denoiser, load_scheduler
from redif_env.noise import VPSchedule
from redif_env.schedules import explicit, min_gap

from . import portable
from .choices import CategoricalHead, ScheduleHead
from .lora import merge
from .portable.head import ScheduleHead as PortableHead
from .portable.pipeline import AdaptivePipeline

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


ADAPTIVE_SNIPPET = """\
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(".", trust_remote_code=True)
noise = torch.Generator().manual_seed(0)
x, num_steps = pipeline(10, {labels}generator=noise)
"""

ADAPTIVE_CARD = """\
---
library_name: diffusers
tags: [redif, few-step]
---
# A student of {min_steps} to {max_steps} steps

Distilled with ReDiF. It chooses for each sample when to step, and how often. Sample it in this
folder, with diffusers and the code of this folder (`pipeline.py`, `schedule_head/head.py`: read it
first):

```python
{snippet}```

`x` then holds ten samples in [-1, 1], and `num_steps` the steps that each one took.
"""


def export_student(
    student: Denoiser,
    timesteps: Sequence[float] | Tensor | ScheduleHead,
    scheduler_config: Any,
    folder: str | Path,
) -> Path:
    """Write a student as a diffusers folder: `unet/`, `scheduler/`, `redif.json`, `README.md`.

    The scheduler is diffusers' DPMSolverMultistep of order 1, which equals DDIM at eta = 0 and,
    unlike diffusers' DDIMScheduler, steps through any list of timesteps. A student with an adaptive
    schedule comes with code of its own, a pipeline and a `schedule_head/`, and is loaded with
    `trust_remote_code=True`, or without by `load_adaptive`.

    Args:
        student: The denoiser; its network must be a diffusers model. Adapters are merged.
        timesteps: Its grid, with or without the final 0, or its schedule head.
        scheduler_config: Config of the scheduler that the teacher was trained with.
        folder: Where to write; must not exist. Appears complete or not at all.

    Raises:
        InvalidArgumentError: if the folder exists, the network is not a diffusers model, or an
            adaptive schedule is of another kind than VP.
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
    adaptive: ScheduleHead | None = None
    if isinstance(timesteps, ScheduleHead):
        adaptive = timesteps if timesteps.features is not None else None
        timesteps = timesteps.grid() if adaptive is None else []
    if adaptive is not None and not isinstance(student.schedule, VPSchedule):
        raise InvalidArgumentError(
            "timesteps",
            type(student.schedule).__name__,
            "only students with alphas_cumprod can be exported with an adaptive schedule.",
        )
    grid = None if adaptive is not None else explicit(timesteps, student.schedule)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        network.save_pretrained(temporary / "unet")
        make_scheduler(scheduler_config, student).save_pretrained(temporary / "scheduler")
        if adaptive is not None:
            _write_adaptive(temporary, student, adaptive)
        elif grid is not None:
            _write_fixed(temporary, student, grid)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def load_adaptive(folder: str | Path) -> AdaptivePipeline:
    """Load a student with an adaptive schedule that `export_student` wrote, with our own code.

    Raises:
        TeacherFolderError: if the folder is missing, incomplete or corrupt.
    """
    folder = find_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    return AdaptivePipeline(
        unet=load_denoiser(folder).network,
        scheduler=load_scheduler(folder),
        schedule_head=PortableHead.from_pretrained(folder / "schedule_head"),
        guidance_scale=index["guidance_scale"],
        null_class=index["null_class"],
    )


def _write_fixed(temporary: Path, student: Denoiser, grid: Tensor) -> None:
    _write_json(temporary / METADATA, describe_student(student, grid))
    _write_json(
        temporary / "model_index.json",
        {
            # The stock pipeline that keeps this scheduler; DDIMPipeline would replace it.
            "_class_name": "DDPMPipeline",
            "unet": ["diffusers", type(student.network).__name__],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        },
    )
    num_steps = len(grid) - 1
    card = CARD.format(num_steps=num_steps, nfe=num_steps * student.nfe, snippet=snippet(student))
    (temporary / "README.md").write_text(card)


def _write_adaptive(temporary: Path, student: Denoiser, head: ScheduleHead) -> None:
    portable_head(head, student).save_pretrained(temporary / "schedule_head")
    code = Path(portable.__file__).parent
    shutil.copy(code / "head.py", temporary / "schedule_head")
    shutil.copy(code / "pipeline.py", temporary)
    _write_json(
        temporary / "model_index.json",
        {
            "_class_name": ["pipeline", "AdaptivePipeline"],
            "unet": ["diffusers", type(student.network).__name__],
            "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
            "schedule_head": ["head", "ScheduleHead"],
            "guidance_scale": student.guidance_scale,
            "null_class": student.null_class,
        },
    )
    conditional = student.num_classes is not None
    labels = f"class_labels=torch.arange(10) % {student.num_classes}, " if conditional else ""
    card = ADAPTIVE_CARD.format(
        min_steps=head.min_steps,
        max_steps=head.max_steps,
        snippet=ADAPTIVE_SNIPPET.format(labels=labels),
    )
    (temporary / "README.md").write_text(card)


def portable_head(head: ScheduleHead, student: Denoiser) -> PortableHead:
    """The same adaptive head in code that needs diffusers alone."""
    assert head.features is not None
    probe = torch.zeros(1)
    made = PortableHead(
        kind="categorical" if isinstance(head, CategoricalHead) else "beta",
        max_steps=head.max_steps,
        min_steps=head.min_steps,
        latent_shape=list(student.latent_shape),
        num_classes=head.features.num_classes,
        width=head.change.in_features,
        num_train_timesteps=head.noise.num_train_timesteps,
        max_timestep=head.noise.max_timestep,
        gap=min_gap(head.noise),
        num_parameters=head.table.shape[1],
        whole=bool(head.noise.snap(probe + 0.5) != probe + 0.5),
    )
    made.load_state_dict(head.state_dict())
    return made


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
