"""Students as ordinary diffusers folders, usable where this project is not installed."""

from __future__ import annotations

import contextlib
import inspect
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from redif_env import families
from redif_env.adapters import EDMNetwork
from redif_env.code_key import changes
from redif_env.denoiser import Denoiser, call_network
from redif_env.errors import InvalidArgumentError, TeacherFolderError, check_number
from redif_env.files import replacing
from redif_env.loading import (
    AUTOENCODER_NAMES,
    METADATA,
    find_folder,
    load_denoiser,
    load_scheduler,
    network_name,
    noise_schedule,
)
from redif_env.noise import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule
from redif_env.prompts import INDEX, read_index
from redif_env.schedules import explicit, min_gap
from redif_env.untrusted import read_json

from . import portable
from .choices import CategoricalHead, ScheduleHead
from .lora import merge
from .portable.head import ScheduleHead as PortableHead
from .portable.pipeline import AdaptivePipeline

SNIPPET = """\
import json, torch
from diffusers import {scheduler}, {classes}
info = json.load(open("redif.json"))
{name} = {network}.from_pretrained("{name}")
scheduler = {scheduler}.from_pretrained("scheduler")
scheduler.set_timesteps({times})
x = {scale}torch.randn(10, {shape}, generator=torch.Generator().manual_seed(0))
{labels}
for t in scheduler.timesteps:
{prediction}
    x = scheduler.step(prediction, t, x).prev_sample
"""
DECODE = """\
{name} = {autoencoder}.from_pretrained("{name}")
with torch.no_grad(): x = {name}.decode(x / {name}.config.scaling_factor).sample
"""

LABELS = "labels = torch.arange(10) % info['num_classes']"
LABELS_GUIDED = (
    LABELS + "; w = info['guidance_scale']; null = torch.full((10,), info['null_class'])"
)
LABELS_RESCALED = """
r = info["guidance_rescale"]; std = lambda p: p.std(tuple(range(1, p.ndim)), keepdim=True)"""
PLAIN = "    with torch.no_grad(): prediction = {cond}"
GUIDED = """\
    with torch.no_grad(): uncond, cond = {uncond}, {cond}
    prediction = (1 - w) * uncond + w * cond"""
RESCALED = """
    prediction *= r * std(cond) / std(prediction) + (1 - r)"""

PIPELINE_SNIPPET = """\
import json, torch
from diffusers import DiffusionPipeline
info = json.load(open("redif.json"))
pipe = DiffusionPipeline.from_pretrained(".", local_files_only=True{absent})
x = pipe("{prompt}", {options}, output_type="pt").images
"""
# A pipeline's arguments, and what they are called in redif.json.
PIPELINE_OPTIONS = {
    name: name for name in ("guidance_scale", "guidance_rescale", "negative_prompt")
}
# Distilled guidance goes by the name that others have for guidance, which Flux has too.
DISTILLED_OPTIONS = {
    "guidance_scale": "distilled_guidance",
    "true_cfg_scale": "guidance_scale",
    "negative_prompt": "negative_prompt",
}
# For latents of another size than the network's own.
PICTURE_SIZE = {
    "height": 'info["latent_size"][0] * pipe.vae_scale_factor',
    "width": 'info["latent_size"][1] * pipe.vae_scale_factor',
    "use_resolution_binning": "False",
}
# The student's times count, not sigmas of the teacher's sampler.
NO_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
# Of a VP student: also what clips the data or takes no list of times.
PLAIN_VP = {**NO_SIGMAS, "use_lu_lambdas": False, "use_flow_sigmas": False, "thresholding": False}
MIN_ALPHA_BAR = 2**-24  # where diffusers stops too, to keep sigma / alpha finite
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
    timesteps: Tensor,
    scheduler_config: Any,
    folder: str | Path,
    base: str | Path | None = None,
) -> Path:
    """Write a student as a diffusers folder: the network, `scheduler/`, `redif.json`, `README.md`.

    The scheduler is diffusers' DPMSolverMultistep of the student's order; of order 1 it equals DDIM
    at eta = 0 and, unlike diffusers' DDIMScheduler, steps through any list of timesteps. For flow
    matching it is FlowMatchEulerDiscrete, for EDM EDMEuler, of order 1 alone. Its noise schedule is
    the student's, whatever the config says.

    Args:
        student: The denoiser, of a kind that `can_export` accepts. Adapters are merged.
        timesteps: Its grid, with or without the final 0.
        scheduler_config: Config of the scheduler that the teacher was trained with; not used for
            EDM, where the student knows all of it.
        folder: Where to write; must not exist. Appears complete or not at all.
        base: Folder of the teacher's pipeline, whose other parts (autoencoder, tokenizers, text
            encoders) are copied, so that the student is a whole pipeline.

    Raises:
        InvalidArgumentError: if the folder exists, the network is not a diffusers model, diffusers
            has no scheduler for its noise schedule, `scheduler_config` is no config, `base` is no
            pipeline's folder, or its pipeline has no argument for the student's guidance.
    """
    student = _exportable(student)
    if base is not None and not (Path(base) / INDEX).is_file():
        raise InvalidArgumentError("base", str(base), f"pass a folder with a {INDEX}.")
    grid = explicit(timesteps, student.schedule)
    scheduler = make_scheduler(scheduler_config, student)
    with _appearing(Path(folder)) as temporary:
        _write_folder(temporary, student, grid, scheduler, base)
    return Path(folder)


def export_adaptive(
    student: Denoiser, head: ScheduleHead, scheduler_config: Any, folder: str | Path
) -> Path:
    """Write a student that chooses its own times as a diffusers folder with code of its own.

    The folder has a `pipeline.py` and a `schedule_head/` beside `unet/` and `scheduler/`.
    `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` loads it where this project
    is not installed, `load_adaptive` with this project's copy of the code. A schedule that all
    samples share needs none of this: `export_student(student, head.grid(), ...)`.

    Args:
        student: The denoiser; its network must be a `UNet2DModel`. Adapters are merged.
        head: Its adaptive schedule head.
        scheduler_config, folder: As for `export_student`.

    Raises:
        InvalidArgumentError: if the folder exists, or the student is of another kind.
    """
    student = _exportable(student)
    kind = type(student.network).__name__
    if not isinstance(student.schedule, VPSchedule) or kind != "UNet2DModel":
        raise InvalidArgumentError(
            "student", kind, "only a UNet2DModel with alphas_cumprod can have an adaptive schedule."
        )
    if head.features is None:
        raise InvalidArgumentError(
            "head", "a schedule of all samples", "use export_student with head.grid()."
        )
    scheduler = make_scheduler(scheduler_config, student)
    with _appearing(Path(folder)) as temporary:
        _write_adaptive(temporary, student, head, scheduler)
    return Path(folder)


def load_adaptive(folder: str | Path) -> AdaptivePipeline:
    """Load what `export_adaptive` wrote, with this project's copy of its code.

    Raises:
        TeacherFolderError: if the folder is missing, incomplete or corrupt.
    """
    folder = find_folder(folder)
    index = read_json(folder / INDEX)
    network, scheduler = load_denoiser(folder).network, load_scheduler(folder)
    try:
        return AdaptivePipeline(
            unet=network,
            scheduler=scheduler,
            # use_safetensors: never unpickle a file from outside.
            schedule_head=PortableHead.from_pretrained(
                folder / "schedule_head", local_files_only=True, use_safetensors=True
            ),
            guidance_scale=check_number("guidance_scale", index.get("guidance_scale")),
            guidance_rescale=check_number("guidance_rescale", index.get("guidance_rescale", 0)),
            null_class=index.get("null_class"),
        )
    except InvalidArgumentError:
        raise
    except Exception as error:  # diffusers raises many kinds for a damaged folder
        raise TeacherFolderError(
            "folder", str(folder), f"its schedule head could not be read ({error}); restore it."
        ) from error


def can_export(student: Denoiser) -> bool:
    """Whether diffusers has classes for a student's network and for its steps.

    The network must be a diffusers model, called as diffusers calls it and but for adapters as it
    was made; on a `VPSchedule`, predicting eps, x_0 or v; or, with steps of first order, on a
    `FlowSchedule`, predicting flow, or in an `EDMNetwork` on a `VESchedule`.
    """
    return _has_diffusers_network(student) and _scheduler_class(student) is not None


def _has_diffusers_network(student: Denoiser) -> bool:
    """Whether diffusers alone can load the network, and calls it as the student does."""
    network = _diffusers_network(student)
    kind = type(network)
    plain = call_network, families.NETWORKS.get(kind)
    called = student.call in plain and (not _is_edm(student) or student.network.call in plain)
    known = called and getattr(diffusers, kind.__name__, None) is kind
    return known and not changes(merge(student).network)


def _exportable(student: Denoiser) -> Denoiser:
    if not _has_diffusers_network(student):
        raise InvalidArgumentError(
            "student",
            type(student.network).__name__,
            "only diffusers models, without a call=, attention or FreeU of one's own, can be "
            "exported: save student.network.state_dict() instead.",
        )
    _find_scheduler_class(student)
    return merge(student)


def _is_edm(student: Denoiser) -> bool:
    return isinstance(student.network, EDMNetwork) and isinstance(student.schedule, VESchedule)


def _diffusers_network(student: Denoiser) -> Any:
    """The network that is saved: EDM's preconditioning is the scheduler's affair in diffusers."""
    network: Any = student.network
    return network.network if _is_edm(student) else network


@contextlib.contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its name once it is complete."""
    if folder.exists():
        raise InvalidArgumentError("folder", str(folder), "it exists; choose another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        yield temporary


def _write_adaptive(temporary: Path, student: Denoiser, head: ScheduleHead, scheduler: Any) -> None:
    network: Any = student.network
    network.save_pretrained(temporary / "unet")
    scheduler.save_pretrained(temporary / "scheduler")
    portable_head(head, student).save_pretrained(temporary / "schedule_head")
    code = Path(portable.__file__).parent
    shutil.copy(code / "head.py", temporary / "schedule_head")
    shutil.copy(code / "pipeline.py", temporary)
    index = {
        "_class_name": ["pipeline", "AdaptivePipeline"],
        "unet": ["diffusers", type(network).__name__],
        "scheduler": ["diffusers", _scheduler_name(student)],
        "schedule_head": ["head", "ScheduleHead"],
        "guidance_scale": student.guidance_scale,
        "guidance_rescale": student.guidance_rescale,
        "null_class": student.null_class,
    }
    _write_json(temporary / INDEX, index)
    conditional = student.num_classes is not None
    labels = f"class_labels=torch.arange(10) % {student.num_classes}, " if conditional else ""
    card = ADAPTIVE_CARD.format(
        min_steps=head.min_steps,
        max_steps=head.max_steps,
        snippet=ADAPTIVE_SNIPPET.format(labels=labels),
    )
    (temporary / "README.md").write_text(card)


def _write_folder(
    temporary: Path,
    student: Denoiser,
    grid: Tensor,
    scheduler: Any,
    base: str | Path | None,
) -> None:
    network = _diffusers_network(student)
    name = network_name(network)
    network.save_pretrained(temporary / name)
    scheduler.save_pretrained(temporary / "scheduler")
    _write_json(temporary / METADATA, describe_student(student, grid))
    index: dict[str, Any] = {}
    if base is not None:
        index = read_index(Path(base))
        _copy_parts(Path(base), index, temporary)
    elif type(network).__name__ == "UNet2DModel":
        # The stock pipeline that keeps this scheduler; DDIMPipeline would replace it.
        index = {"_class_name": "DDPMPipeline"}
    if index:
        index[name] = ["diffusers", type(network).__name__]
        index["scheduler"] = ["diffusers", _scheduler_name(student)]
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


def make_scheduler(
    scheduler_config: Any, student: Denoiser
) -> DPMSolverMultistepScheduler | FlowMatchEulerDiscreteScheduler | EDMEulerScheduler:
    """The stock scheduler that samples the student.

    Raises:
        InvalidArgumentError: if diffusers has none, or for what is no config of a scheduler.
    """
    kind = _find_scheduler_class(student)
    if kind is EDMEulerScheduler:
        return _make_edm_scheduler(student)
    if not isinstance(scheduler_config, Mapping):
        raise InvalidArgumentError(
            "scheduler_config",
            scheduler_config,
            "pass the config of the teacher's scheduler, teacher.make_solver().config.",
        )
    try:
        if kind is FlowMatchEulerDiscreteScheduler:
            return _make_flow_scheduler(scheduler_config, student.schedule)
        return _make_vp_scheduler(scheduler_config, student)
    except Exception as error:  # diffusers raises many kinds for impossible settings
        raise InvalidArgumentError(
            "scheduler_config",
            dict(scheduler_config),
            f"{kind.__name__} can not be made of it ({error}).",
        ) from error


def _make_flow_scheduler(
    scheduler_config: Mapping[str, Any], schedule: NoiseSchedule
) -> FlowMatchEulerDiscreteScheduler:
    """Euler's method, which is the kernel; the student's times are not to be shifted again."""
    return FlowMatchEulerDiscreteScheduler.from_config(
        scheduler_config,
        num_train_timesteps=schedule.num_train_timesteps,
        shift=1.0,
        use_dynamic_shifting=False,
        shift_terminal=None,
        **NO_SIGMAS,
    )


def _make_vp_scheduler(
    scheduler_config: Mapping[str, Any], student: Denoiser
) -> DPMSolverMultistepScheduler:
    """DPM-Solver++, with the student's own table where the config means another."""
    options = {
        "algorithm_type": "dpmsolver++",
        "solver_order": student.solver_order,
        "solver_type": "midpoint",
        "final_sigmas_type": "zero",
        "prediction_type": student.prediction_type,
        "variance_type": None,  # what networks predict of it is left out
        **PLAIN_VP,
    }
    solver = DPMSolverMultistepScheduler.from_config(scheduler_config, **options)
    if _same_table(noise_schedule(solver), student.schedule):
        return solver
    table = {
        "trained_betas": betas_of(student.schedule),
        "num_train_timesteps": student.schedule.num_train_timesteps,
        "rescale_betas_zero_snr": False,
    }
    return DPMSolverMultistepScheduler.from_config(scheduler_config, **options, **table)


def _same_table(ours: NoiseSchedule, theirs: NoiseSchedule) -> bool:
    if ours.num_train_timesteps != theirs.num_train_timesteps:
        return False
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=0)
        for a, b in zip(_scales(ours), _scales(theirs), strict=True)
    )


def _scales(schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Alpha and sigma at the whole times from 1 on, on the host."""
    t = torch.arange(1.0, schedule.num_train_timesteps)
    weight = next(schedule.buffers(), t)  # where its table is
    return schedule.alpha(t.to(weight.device)).cpu(), schedule.sigma(t.to(weight.device)).cpu()


def betas_of(schedule: NoiseSchedule) -> list[float]:
    r"""Diffusers' betas of a VP schedule, :math:`1 - \bar\alpha_t / \bar\alpha_{t-1}`.

    Time 0 is the data here, but a beta like any other there: half of the first step's is taken.
    """
    alpha, sigma = (scale.double() for scale in _scales(schedule))
    # Whichever scale is small has all of its digits.
    alpha_bar = torch.where(sigma < alpha, 1 - sigma**2, alpha**2).clamp_min(MIN_ALPHA_BAR)
    alpha_bar = torch.cat([alpha_bar[:1].sqrt(), alpha_bar])
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    return (1 - alpha_bar / before).tolist()


def _make_edm_scheduler(student: Denoiser) -> EDMEulerScheduler:
    """Euler's method, which is the kernel, with the student's preconditioning and sigmas."""
    schedule, network = student.schedule, student.network
    assert isinstance(schedule, VESchedule)
    assert isinstance(network, EDMNetwork)
    return EDMEulerScheduler(
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        sigma_data=network.sigma_data,
        rho=schedule.rho,
        num_train_timesteps=schedule.num_train_timesteps,
        prediction_type="v_prediction" if network.sign < 0 else "epsilon",
    )


def describe_student(student: Denoiser, grid: Tensor) -> dict[str, Any]:
    """What a sampler must know beside the weights."""
    times = [float(t) for t in grid[:-1]]
    known: dict[str, Any] = {"num_steps": len(times), "solver_order": student.solver_order}
    if _is_flow(student):
        known["sigmas"] = [t / student.schedule.num_train_timesteps for t in times]
    elif _is_edm(student):
        # What EDMEulerScheduler calls sigmas: shares of the way from sigma_max to sigma_min.
        known["ramp"] = [1 - t / student.schedule.num_train_timesteps for t in times]
    else:
        known["timesteps"] = [int(t) for t in times]
    known["guidance_scale"] = student.guidance_scale
    known["guidance_rescale"] = student.guidance_rescale
    if student.conditions is None:
        return {**known, "num_classes": student.num_classes, "null_class": student.null_class}
    distilled = student.conditions.tensors().get("guidance")
    if distilled is not None:
        known["distilled_guidance"] = float(distilled[0])
    known["latent_size"] = list(student.latent_shape[1:])
    return {**known, "negative_prompt": student.conditions.null_text}


def snippet(student: Denoiser, index: Mapping[str, Any]) -> str:
    """The ten lines that sample the student with diffusers alone.

    Args:
        student: The student.
        index: What its folder's `model_index.json` holds.

    Raises:
        InvalidArgumentError: for guidance that its pipeline has no argument for.
    """
    if _is_text_pipeline(student, index):
        return _pipeline_snippet(student, index)
    if student.conditions is not None:
        return TABLE_SNIPPET
    network = _diffusers_network(student)
    name, kind, channels = network_name(network), type(network).__name__, student.latent_shape[0]
    scale, x = "", "x"
    if _is_edm(student):
        scale, x = "scheduler.config.sigma_max * ", "scheduler.scale_model_input(x, t)"
    decoder = next((part for part in AUTOENCODER_NAMES if part in index), None)
    t = "t" if name == "unet" else "t.expand(10)"
    call = f"{name}({x}, {t}{{}}).sample"
    if network.config.get("out_channels", channels) != channels:
        call += f"[:, :{channels}]"  # without the variances
    cond = call.format(", class_labels=labels" if student.num_classes is not None else "")
    uncond = call.format(", class_labels=null")
    labels, prediction = LABELS, PLAIN
    if student.nfe == 2:
        labels, prediction = LABELS_GUIDED, GUIDED
        if student.guidance_rescale:
            labels, prediction = labels + LABELS_RESCALED, prediction + RESCALED
    lines = SNIPPET.format(
        scheduler=_scheduler_name(student),
        times="=".join(_times(student)),
        scale=scale,
        classes=kind if decoder is None else f"{kind}, {index[decoder][1]}",
        name=name,
        network=kind,
        shape=", ".join(map(str, student.latent_shape)),
        labels=labels if student.num_classes is not None else "labels = None",
        prediction=prediction.format(uncond=uncond, cond=cond),
    )
    if decoder is None:
        return lines
    return lines + DECODE.format(name=decoder, autoencoder=index[decoder][1])


def _is_text_pipeline(student: Denoiser, index: Mapping[str, Any]) -> bool:
    known = hasattr(diffusers, str(index.get("_class_name")))
    return student.conditions is not None and "tokenizer" in index and known


def _pipeline_snippet(student: Denoiser, index: Mapping[str, Any]) -> str:
    """Lines that let the student's whole pipeline sample a prompt."""
    assert student.conditions is not None
    call = getattr(diffusers, index["_class_name"]).__call__
    taken, known = inspect.signature(call).parameters, describe_student(student, torch.ones(2))
    options = DISTILLED_OPTIONS if "distilled_guidance" in known else PIPELINE_OPTIONS
    used = {name: key for name, key in options.items() if name in taken and known[key] is not None}
    _check_guidance(student, known, set(used.values()), index["_class_name"])
    prompt = json.dumps((student.conditions.texts or ["a prompt"])[0])[1:-1]
    given = dict([_times(student)]) | {name: f'info["{key}"]' for name, key in used.items()}
    if known["latent_size"] != _own_size(_diffusers_network(student)):
        given |= {name: size for name, size in PICTURE_SIZE.items() if name in taken}
    text = ", ".join(map("=".join, given.items()))
    # diffusers wants to be told of encoders that are left out on purpose.
    absent = "".join(f", {name}=None" for name in index if _is_absent_text(name, index[name]))
    return PIPELINE_SNIPPET.format(prompt=prompt, options=text, absent=absent)


def _check_guidance(
    student: Denoiser, known: Mapping[str, Any], told: set[str], pipeline: str
) -> None:
    """Refuse guidance that a pipeline is not `told` of, or that it takes for none."""
    if student.nfe == 1:
        return
    lacking = [key for key in PIPELINE_OPTIONS.values() if known[key] and key not in told]
    if student.guidance_scale < 1:
        lacking.append("guidance_scale")
    if lacking:
        raise InvalidArgumentError(
            "student",
            {key: known[key] for key in lacking},
            f"{pipeline} can not be told of it: distil with guidance_scale=1, or with more and "
            "what the pipeline takes.",
        )


def _own_size(network: Any) -> list[int]:
    """Height and width of the latents of pictures that a pipeline makes unasked."""
    size = families.latent_shape(network)[1]
    return [size, size] if isinstance(size, int) else list(size or ())


def _is_absent_text(name: str, value: Any) -> bool:
    return name.startswith(("text_encoder", "tokenizer")) and value == [None, None]


def _is_flow(student: Denoiser) -> bool:
    return isinstance(student.schedule, FlowSchedule)


def _times(student: Denoiser) -> tuple[str, str]:
    """What pipelines and schedulers call the times, and how to read them from `redif.json`."""
    if _is_edm(student):
        return "sigmas", 'torch.tensor(info["ramp"])'
    name = "sigmas" if _is_flow(student) else "timesteps"
    return name, f'info["{name}"]'


def _scheduler_class(student: Denoiser) -> type | None:
    """The stock scheduler whose steps are the kernel's, if there is one."""
    predicts = student.prediction_type
    if isinstance(student.schedule, VPSchedule) and predicts != "flow_prediction":
        return DPMSolverMultistepScheduler
    if student.solver_order > 1:
        return None
    if _is_edm(student):
        return EDMEulerScheduler if predicts == "sample" else None
    if _is_flow(student):
        return FlowMatchEulerDiscreteScheduler if predicts == "flow_prediction" else None
    return None


def _find_scheduler_class(student: Denoiser) -> type:
    kind = _scheduler_class(student)
    if kind is None:
        raise InvalidArgumentError(
            "student",
            f"{student.prediction_type} on {type(student.schedule).__name__}, solver_order "
            f"{student.solver_order}",
            "diffusers has no scheduler for it, only for a VPSchedule and, of order 1, for "
            "flow_prediction on a FlowSchedule and for an EDMNetwork on a VESchedule: save "
            "student.network.state_dict() instead.",
        )
    return kind


def _scheduler_name(student: Denoiser) -> str:
    return _find_scheduler_class(student).__name__


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
