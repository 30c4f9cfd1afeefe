"""Students as ordinary diffusers folders, usable where this project is not installed."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError
from redif_env.loading import AUTOENCODER_NAMES, INDEX, METADATA, network_name
from redif_env.schedules import explicit

from .lora import merge

SNIPPET = """\
import json, torch
from diffusers import DPMSolverMultistepScheduler, {classes}
info = json.load(open("redif.json"))
{name} = {network}.from_pretrained("{name}")
scheduler = DPMSolverMultistepScheduler.from_pretrained("scheduler")
scheduler.set_timesteps(timesteps=info["timesteps"])
x = torch.randn(10, {shape}, generator=torch.Generator().manual_seed(0))
{labels}
for t in scheduler.timesteps:
    with torch.no_grad(): x = scheduler.step({prediction}, t, x).prev_sample
"""
DECODE = """\
{name} = {autoencoder}.from_pretrained("{name}")
with torch.no_grad(): x = {name}.decode(x / {name}.config.scaling_factor).sample
"""

LABELS = "labels = torch.arange(10) % info['num_classes']"
LABELS_GUIDED = (
    LABELS + "; w = info['guidance_scale']; null = torch.full((10,), info['null_class'])"
)
GUIDED = "(1 - w) * {uncond} + w * {cond}"

PIPELINE_SNIPPET = """\
import json
from diffusers import DiffusionPipeline
info = json.load(open("redif.json"))
pipe = DiffusionPipeline.from_pretrained(".", local_files_only=True)
x = pipe("{prompt}", {options}, output_type="pt").images
"""
# A pipeline's arguments, and what they are called in redif.json.
PIPELINE_OPTIONS = ("timesteps", "guidance_scale", "guidance_rescale", "negative_prompt")
TABLE_SNIPPET = """\
# The network is called with embeddings, as by redif_env.load_teacher(..., conditions=...).
"""

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

`x` then holds samples, in {range}. The times in `redif.json` belong to the student: other times
or another number of steps give worse samples.
"""


def export_student(
    student: Denoiser,
    timesteps: Tensor,
    scheduler_config: Any,
    folder: str | Path,
    base: str | Path | None = None,
) -> Path:
    """Write a student as a diffusers folder: the network, `scheduler/`, `redif.json`, `README.md`.

    The scheduler is diffusers' DPMSolverMultistep of order 1, which equals DDIM at eta = 0 and,
    unlike diffusers' DDIMScheduler, steps through any list of timesteps.

    Args:
        student: The denoiser; its network must be a diffusers model. Adapters are merged.
        timesteps: Its grid, with or without the final 0.
        scheduler_config: Config of the scheduler that the teacher was trained with.
        folder: Where to write; must not exist. Appears complete or not at all.
        base: Folder of the teacher's pipeline, whose other parts (autoencoder, tokenizers, text
            encoders) are copied, so that the student is a whole pipeline.

    Raises:
        InvalidArgumentError: if the folder exists, the network is not a diffusers model, or `base`
            is no pipeline's folder.
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
    if base is not None and not (Path(base) / INDEX).is_file():
        raise InvalidArgumentError("base", str(base), f"pass a folder with a {INDEX}.")
    grid = explicit(timesteps, student.schedule)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write_folder(temporary, student, grid, scheduler_config, base)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _write_folder(
    temporary: Path,
    student: Denoiser,
    grid: Tensor,
    scheduler_config: Any,
    base: str | Path | None,
) -> None:
    network: Any = student.network
    name = network_name(network)
    network.save_pretrained(temporary / name)
    make_scheduler(scheduler_config, student).save_pretrained(temporary / "scheduler")
    _write_json(temporary / METADATA, describe_student(student, grid))
    index: dict[str, Any] = {}
    if base is not None:
        index = json.loads((Path(base) / INDEX).read_text())
        _copy_parts(Path(base), index, temporary)
    elif type(network).__name__ == "UNet2DModel":
        # The stock pipeline that keeps this scheduler; DDIMPipeline would replace it.
        index = {"_class_name": "DDPMPipeline"}
    if index:
        index[name] = ["diffusers", type(network).__name__]
        index["scheduler"] = ["diffusers", "DPMSolverMultistepScheduler"]
        _write_json(temporary / INDEX, index)
    num_steps = len(grid) - 1
    card = CARD.format(
        num_steps=num_steps,
        nfe=num_steps * student.nfe,
        snippet=snippet(student, index),
        range="[0, 1]" if _is_text_pipeline(student, index) else "[-1, 1]",
    )
    (temporary / "README.md").write_text(card)


def _copy_parts(base: Path, index: Mapping[str, Any], folder: Path) -> None:
    """Copy the folders of a pipeline's parts, but for those that are the student's own."""
    for name in index:
        if (base / name).is_dir() and not (folder / name).exists():
            shutil.copytree(base / name, folder / name)


def make_scheduler(scheduler_config: Any, student: Denoiser) -> DPMSolverMultistepScheduler:
    """The stock scheduler that samples the student."""
    return DPMSolverMultistepScheduler.from_config(
        scheduler_config,
        algorithm_type="dpmsolver++",
        solver_order=1,
        final_sigmas_type="zero",
        prediction_type=student.prediction_type,
        # The student's times count, not sigmas of the teacher's sampler; and predicted variances
        # are left out.
        use_karras_sigmas=False,
        use_exponential_sigmas=False,
        use_beta_sigmas=False,
        variance_type=None,
    )


def describe_student(student: Denoiser, grid: Tensor) -> dict[str, Any]:
    """What a sampler must know beside the weights."""
    known = {
        "num_steps": len(grid) - 1,
        "timesteps": [int(t) for t in grid[:-1]],
        "guidance_scale": student.guidance_scale,
    }
    if student.conditions is None:
        return {**known, "num_classes": student.num_classes, "null_class": student.null_class}
    return {
        **known,
        "guidance_rescale": student.guidance_rescale,
        "negative_prompt": student.conditions.null_text,
    }


def snippet(student: Denoiser, index: Mapping[str, Any]) -> str:
    """The ten lines that sample the student with diffusers alone.

    Args:
        student: The student.
        index: What its folder's `model_index.json` holds.
    """
    if _is_text_pipeline(student, index):
        return _pipeline_snippet(student, index)
    if student.conditions is not None:
        return TABLE_SNIPPET
    network: Any = student.network
    name, kind, channels = network_name(network), type(network).__name__, student.latent_shape[0]
    decoder = next((part for part in AUTOENCODER_NAMES if part in index), None)
    call = f"{name}(x, t{{}}).sample" if name == "unet" else f"{name}(x, t.expand(10){{}}).sample"
    if network.config.out_channels != channels:
        call += f"[:, :{channels}]"  # without the variances
    cond = call.format(", class_labels=labels" if student.num_classes is not None else "")
    uncond = call.format(", class_labels=null")
    guided = student.nfe == 2
    labels = LABELS_GUIDED if guided else LABELS
    lines = SNIPPET.format(
        classes=kind if decoder is None else f"{kind}, {index[decoder][1]}",
        name=name,
        network=kind,
        shape=", ".join(map(str, student.latent_shape)),
        labels=labels if student.num_classes is not None else "labels = None",
        prediction=GUIDED.format(uncond=uncond, cond=cond) if guided else cond,
    )
    if decoder is None:
        return lines
    return lines + DECODE.format(name=decoder, autoencoder=index[decoder][1])


def _is_text_pipeline(student: Denoiser, index: Mapping[str, Any]) -> bool:
    return student.conditions is not None and "tokenizer" in index


def _pipeline_snippet(student: Denoiser, index: Mapping[str, Any]) -> str:
    """Lines that let the student's whole pipeline sample a prompt."""
    assert student.conditions is not None
    call = getattr(diffusers, index["_class_name"]).__call__
    taken = [name for name in PIPELINE_OPTIONS if name in inspect.signature(call).parameters]
    if student.conditions.null_text is None:
        taken.remove("negative_prompt")
    prompt = json.dumps((student.conditions.texts or ["a prompt"])[0])[1:-1]
    options = ", ".join(f'{name}=info["{name}"]' for name in taken)
    return PIPELINE_SNIPPET.format(prompt=prompt, options=options)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
