"""From diffusers folders to denoisers and teachers: the only module that imports diffusers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .denoiser import Denoiser
from .errors import InvalidArgumentError, TeacherFolderError
from .noise import FlowSchedule, NoiseSchedule, VESchedule, VPSchedule
from .teacher import Teacher

BUNDLED = {"digits": Path(__file__).parent / "assets" / "digits"}
METADATA = "redif.json"


def noise_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule that a diffusers scheduler steps through.

    Args:
        scheduler: Any scheduler with `alphas_cumprod` (VP), a flow-matching one, or an EDM one.

    Raises:
        InvalidArgumentError: for a scheduler of another kind.
    """
    config = scheduler.config
    name = type(scheduler).__name__
    if name.startswith("FlowMatch"):
        return FlowSchedule(config.num_train_timesteps)
    if name.startswith("EDM"):
        return VESchedule(
            config.sigma_min, config.sigma_max, config.rho, config.num_train_timesteps
        )
    if hasattr(scheduler, "alphas_cumprod"):
        return VPSchedule(scheduler.alphas_cumprod)
    raise InvalidArgumentError(
        "scheduler", name, "pass a scheduler with alphas_cumprod, a FlowMatch* or an EDM* one."
    )


def prediction_type(scheduler: SchedulerMixin) -> str:
    """What the network of `scheduler` predicts, as diffusers names it."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def load_denoiser(source: str | Path, *, guidance_scale: float = 1.0) -> Denoiser:
    """Load a diffusers folder (`unet/` and `scheduler/`) as a denoiser. Never downloads.

    Args:
        source: A folder, or the name of a bundled teacher (`"digits"`).
        guidance_scale: Scale of classifier-free guidance; 1 is none.

    Raises:
        TeacherFolderError: if the folder is missing, incomplete or corrupt.
    """
    folder = find_folder(source)
    network = _load_network(folder)
    return build_denoiser(
        network, load_scheduler(folder), _read_metadata(folder), guidance_scale=guidance_scale
    )


def build_denoiser(
    network: UNet2DModel,
    scheduler: SchedulerMixin,
    metadata: Mapping[str, Any],
    *,
    guidance_scale: float = 1.0,
) -> Denoiser:
    """A denoiser from a diffusers network and scheduler.

    Args:
        network: The UNet.
        scheduler: Any diffusers scheduler of the same noise schedule.
        metadata: `num_classes` and `null_class`, where the network has classes.
        guidance_scale: Scale of classifier-free guidance; 1 is none.
    """
    config = network.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return Denoiser(
        network,
        noise_schedule(scheduler),
        prediction_type(scheduler),
        (config.in_channels, height, width),
        num_classes=metadata.get("num_classes", config.num_class_embeds),
        null_class=metadata.get("null_class"),
        guidance_scale=guidance_scale,
    )


def load_teacher(
    source: str | Path = "digits",
    *,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    device: str | torch.device = "cpu",
) -> Teacher:
    """Load a diffusers folder as a teacher that samples with the folder's own scheduler.

    A DDPM scheduler, which is stochastic, is replaced by DDIM with the same noise schedule.

    Args:
        source: A folder with `unet/` and `scheduler/`, or the name of a bundled teacher.
        num_steps: Steps of the teacher's sampler.
        guidance_scale: Scale of classifier-free guidance; 1 is none.
        device: Where the network goes.

    Raises:
        TeacherFolderError: if the folder is missing, incomplete or corrupt.
    """
    denoiser = load_denoiser(source, guidance_scale=guidance_scale)
    scheduler = load_scheduler(find_folder(source))
    kind = DDIMScheduler if isinstance(scheduler, DDPMScheduler) else type(scheduler)
    make_solver = functools.partial(kind.from_config, scheduler.config)
    return Teacher(denoiser, make_solver, num_steps, source=str(source)).to(device)


def describe(denoiser: Denoiser, scheduler: SchedulerMixin) -> dict[str, Any]:
    """Plain data from which `build_from_description` makes the same architecture again.

    Raises:
        InvalidArgumentError: if the network is not a diffusers UNet2DModel.
    """
    network = denoiser.network
    if not isinstance(network, UNet2DModel):
        raise InvalidArgumentError(
            "student",
            type(network).__name__,
            "pass policy_kwargs={'student': function} with a function that makes the denoiser.",
        )
    return {
        "network": {key: value for key, value in network.config.items() if key[0] != "_"},
        "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
        "num_classes": denoiser.num_classes,
        "null_class": denoiser.null_class,
        "guidance_scale": denoiser.guidance_scale,
    }


def build_from_description(description: Mapping[str, Any]) -> Denoiser:
    """A denoiser with random weights of the architecture that `describe` described."""
    name, config = description["scheduler"]
    return build_denoiser(
        UNet2DModel(**description["network"]),
        getattr(diffusers, name).from_config(config),
        description,
        guidance_scale=description["guidance_scale"],
    )


def find_folder(source: str | Path) -> Path:
    """The folder of a bundled teacher's name or of a path.

    Raises:
        TeacherFolderError: if there is none.
    """
    folder = BUNDLED.get(str(source), Path(source))
    if not folder.is_dir():
        names = ", ".join(map(repr, BUNDLED))
        raise TeacherFolderError(
            "teacher", str(source), f"pass an existing diffusers folder or one of {names}."
        )
    return folder


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The scheduler of a diffusers folder, of the class that its config names."""
    path = folder / "scheduler" / "scheduler_config.json"
    name = str(_read_json(path).get("_class_name"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if kind is None:
        raise TeacherFolderError("teacher", str(path), "name a diffusers scheduler as _class_name.")
    try:
        return kind.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as error:  # diffusers raises many kinds for impossible settings
        raise TeacherFolderError(
            "teacher", str(path), f"the scheduler could not be made ({error}); restore the folder."
        ) from error


def _load_network(folder: Path) -> UNet2DModel:
    path = folder / "unet"
    name = _read_json(path / "config.json").get("_class_name")
    if name != "UNet2DModel":
        raise TeacherFolderError(
            "teacher", str(path), f"the network is a {name}; UNet2DModel is supported so far."
        )
    try:
        # use_safetensors: never unpickle a file from outside.
        network, report = UNet2DModel.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers raises many kinds for a damaged folder
        raise TeacherFolderError(
            "teacher", str(path), f"the weights could not be read ({error}); restore the folder."
        ) from error
    wrong = [*report["missing_keys"], *report["unexpected_keys"]]
    if wrong:  # diffusers would go on with random ones
        raise TeacherFolderError(
            "teacher", str(path), f"weights are missing or of another network: {wrong[:3]}."
        )
    if network.config.sample_size is None:
        raise TeacherFolderError("teacher", str(path), "give its config a sample_size.")
    return network


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TeacherFolderError(
            "teacher", str(path), f"the file is missing or not JSON ({error}); restore the folder."
        ) from error
    if not isinstance(content, dict):
        raise TeacherFolderError("teacher", str(path), "the file must hold a JSON object.")
    return content
