"""From diffusers pipelines, in folders or in memory, to denoisers and teachers."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from . import families
from .adapters import EDMNetwork
from .code_key import changes, settings
from .conditions import Conditions
from .denoiser import Denoiser, call_network
from .errors import (
    InvalidArgumentError,
    TeacherFolderError,
    check_choice,
    check_device,
    check_integer,
    check_number,
)
from .noise import VESchedule, prediction_type
from .noise import noise_schedule as noise_schedule  # where others look for it
from .prompts import encode_prompts, load_prompts, read_texts
from .solvers import KernelSolver
from .teacher import Teacher
from .untrusted import check_folder, check_room, read_json

BUNDLED = {"digits": Path(__file__).parent / "assets" / "digits"}
METADATA = "redif.json"
BETAS_OF_DDPM = ("sigmoid", "laplace")  # by names that DDIM does not know
DISTILLED_GUIDANCE = 3.5  # of Flux-dev's pipeline
# What pipelines call the part that denoises, and the one that decodes.
NETWORK_NAMES = ("unet", "transformer")
AUTOENCODER_NAMES = ("vae", "vqvae")


class Parts(NamedTuple):
    """What a pipeline is made of.

    Attributes:
        network: What denoises.
        scheduler: The pipeline's own.
        autoencoder: Of latent diffusion; None where pixels are denoised.
        metadata: `num_classes` and `null_class`, where the folder says them.
        folder: Where the pipeline lies; None for one in memory.
        pipeline: The one in memory, or None.
        variant: Of the folder's files.
    """

    network: Any
    scheduler: SchedulerMixin
    autoencoder: Any = None
    metadata: Mapping[str, Any] = {}
    folder: Path | None = None
    pipeline: Any = None
    variant: str | None = None


def load_denoiser(
    source: str | Path | DiffusionPipeline,
    *,
    prompts: str | Path | Iterable[Any] | None = None,
    negative_prompt: str | None = None,
    conditions: Conditions | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
) -> Denoiser:
    """Load the denoiser of a diffusers pipeline. Arguments and errors as for `load_teacher`."""
    parts = take_apart(source)
    table = make_table(parts, prompts, negative_prompt, conditions)
    return build_denoiser(
        parts.network,
        parts.scheduler,
        parts.metadata,
        conditions=table,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
    )


def build_denoiser(
    network: Any,
    scheduler: SchedulerMixin,
    metadata: Mapping[str, Any],
    *,
    conditions: Conditions | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    latent_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
) -> Denoiser:
    """A denoiser from a diffusers network and scheduler.

    Args:
        network: Of one of the classes in `families.NETWORKS`.
        scheduler: Any diffusers scheduler of the same noise schedule.
        metadata: `num_classes` and `null_class`, where the network has classes, and `solver_order`
            of a student that has one.
        conditions: A table, for networks that are conditioned on more than a class.
        guidance_scale: Scale of classifier-free guidance; 1 is none.
        guidance_rescale: See `Denoiser`.
        latent_size: Height and width of the latents; default: the network's own.
        batch_size: See `Denoiser`.
    """
    classes = (None, None) if conditions is not None else _classes(network, metadata)
    schedule, predicts = noise_schedule(scheduler), prediction_type(scheduler)
    call, module = families.NETWORKS[type(network)], network
    if isinstance(schedule, VESchedule):
        check_choice("prediction_type", predicts, ("epsilon", "v_prediction"))
        sign = -1.0 if predicts == "v_prediction" else 1.0
        module = EDMNetwork(network, schedule, scheduler.config.sigma_data, sign, call)
        call, predicts = call_network, "sample"
    return Denoiser(
        module,
        schedule,
        predicts,
        (families.latent_shape(network)[0], *_size(network, latent_size)),
        num_classes=classes[0],
        null_class=classes[1],
        conditions=conditions,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        call=call,
        batch_size=batch_size,
        solver_order=metadata.get("solver_order", 1),
    )


def _classes(network: Any, metadata: Mapping[str, Any]) -> tuple[Any, Any]:
    """Number of classes and the null class, which the metadata knows better than the config.

    Raises:
        TeacherFolderError: for more of them than the network has embeddings.
    """
    number, null = families.classes(network)
    room = None if number is None else number + (null is not None)
    told = metadata.get("num_classes", number), metadata.get("null_class", null)
    most = [value + n for n, value in enumerate(told) if isinstance(value, int)]  # embeddings
    if room is not None and max(most, default=0) > room:
        raise TeacherFolderError(
            "teacher", dict(metadata), f"{METADATA} must name classes of the network, below {room}."
        )
    return told


def load_teacher(
    source: str | Path | DiffusionPipeline = "digits",
    *,
    num_steps: int = 50,
    prompts: str | Path | Iterable[Any] | None = None,
    negative_prompt: str | None = None,
    conditions: Conditions | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
    distilled_guidance: float = DISTILLED_GUIDANCE,
    latent_size: int | tuple[int, int] | None = None,
    batch_size: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    local_files_only: bool = True,
) -> Teacher:
    """Load a diffusers pipeline as a teacher that samples with the pipeline's own scheduler.

    A DDPM scheduler, which is stochastic, is replaced by DDIM with the same noise schedule. Text
    encoders are only used to encode the prompts, and are not kept.

    Args:
        source: A folder with a network (`unet/` or `transformer/`), `scheduler/` and, for latent
            diffusion, an autoencoder (`vae/` or `vqvae/`); the name of a bundled teacher; a
            pipeline in memory, whose network and autoencoder are used and frozen, and copied only
            where they need another dtype; or, with `local_files_only=False`, a repository of the
            Hugging Face hub.
        num_steps: Steps of the teacher's sampler.
        prompts: What a text-to-image model is conditioned on: a text file with a prompt a line, a
            list, or records with a `"prompt"`, `"text"` or `"caption"`. A task draws one of them.
        negative_prompt: What guidance leads away from; default: as the pipeline does.
        conditions: A table in the place of prompts, with the names of the network's arguments.
        guidance_scale: Scale of classifier-free guidance; 1 is none.
        guidance_rescale: See `Denoiser`.
        distilled_guidance: What networks that have guidance distilled into them (Flux-dev, latent
            consistency models) are told of its scale; it costs nothing.
        latent_size: Height and width of the latents, or one number; default: the network's own.
        batch_size: Most rows that are sent through the network at once, see `Denoiser`.
        device: Where the network goes.
        dtype: Of the network and the text encoders; default: as saved in memory, else float32. The
            autoencoder stays in float32: some overflow in half precision.
        variant: Of the weights' files, such as `"fp16"`.
        local_files_only: Never download.

    Raises:
        TeacherFolderError: if the folder is missing, incomplete, corrupt, or of a family that is
            not supported.
        InvalidArgumentError: for prompts or conditions that are missing or do not go with the
            network, a device that torch does not have here, and other arguments that make no sense.
        MissingExtraError: for prompts without transformers, extra `transformers`.
    """
    check_device(device)
    parts = take_apart(source, dtype, variant, local_files_only)
    table = make_table(
        parts,
        prompts,
        negative_prompt,
        conditions,
        distilled_guidance=distilled_guidance,
        latent_size=latent_size,
        device=device,
    )
    denoiser = build_denoiser(
        parts.network,
        parts.scheduler,
        parts.metadata,
        conditions=table,
        guidance_scale=guidance_scale,
        guidance_rescale=guidance_rescale,
        latent_size=latent_size,
        batch_size=batch_size,
    )
    denoiser.set_solver_order(1)  # a teacher is sampled with its own solver
    codec = None if parts.autoencoder is None else families.make_codec(parts.autoencoder)
    name = str(source) if str(source) in BUNDLED else str(parts.folder)
    teacher = Teacher(
        denoiser,
        solver_maker(parts.scheduler, denoiser),
        num_steps,
        source=name if parts.folder is not None else None,
        codec=codec,
    )
    return teacher.to(device)


def solver_maker(scheduler: SchedulerMixin, denoiser: Denoiser) -> Callable[[], Any]:
    """A function that makes fresh, deterministic solvers like `scheduler`."""
    if isinstance(denoiser.schedule, VESchedule):
        # Times of an EDM scheduler are log(sigma) / 4, and it wants the raw network's output. The
        # kernel is Euler's method, and evenly spaced times are Karras' sigmas.
        return functools.partial(KernelSolver, denoiser)
    network: Any = denoiser.network
    flux = isinstance(network, FluxTransformer2DModel)
    if flux or scheduler.config.get("use_dynamic_shifting"):
        side = families.patch_side(network)
        tokens = math.prod(length // side for length in denoiser.latent_shape[1:])
        return functools.partial(
            families.flow_solver, type(scheduler), scheduler.config, network, tokens
        )
    kind = DDIMScheduler if isinstance(scheduler, DDPMScheduler) else type(scheduler)
    changed: dict[str, Any] = {}
    if kind is type(scheduler):
        # Variances that the network predicts are left out, see families.call_diffusers.
        changed = {"variance_type": None} if scheduler.config.get("variance_type") else {}
    elif scheduler.config.beta_schedule in BETAS_OF_DDPM:
        changed = {"trained_betas": scheduler.betas.tolist()}
    return functools.partial(kind.from_config, scheduler.config, **changed)


def take_apart(
    source: str | Path | DiffusionPipeline,
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    local_files_only: bool = True,
) -> Parts:
    """The parts of a pipeline. Arguments and errors as for `load_teacher`."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InvalidArgumentError("dtype", dtype, "pass one such as torch.float16, or None.")
    if isinstance(source, DiffusionPipeline):
        return _parts_in_memory(source, dtype)
    folder = find_folder(source, local_files_only, variant)
    name = next((n for n in NETWORK_NAMES if (folder / n).is_dir()), NETWORK_NAMES[0])
    network = _load_model(folder / name, tuple(families.NETWORKS), dtype, variant)
    autoencoder = None
    for name in AUTOENCODER_NAMES:
        if (folder / name).is_dir():
            autoencoder = _load_model(folder / name, families.AUTOENCODERS, None, variant)
    return Parts(
        network,
        load_scheduler(folder),
        autoencoder,
        _read_metadata(folder),
        folder,
        variant=variant,
    )


def _parts_in_memory(pipeline: Any, dtype: torch.dtype | None) -> Parts:
    found = pipeline.components
    network: Any = next(
        (found[name] for name in NETWORK_NAMES if found.get(name) is not None), None
    )
    decoder = next((found[name] for name in AUTOENCODER_NAMES if found.get(name) is not None), None)
    if type(network) not in families.NETWORKS:
        raise InvalidArgumentError("source", type(pipeline).__name__, _supported())
    return Parts(
        network if dtype is None else _cast(network, dtype),
        found["scheduler"],
        None if decoder is None else _cast(decoder, torch.float32),
        pipeline=pipeline,
    )


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model, or a copy if it has another dtype: the pipeline goes on with its own."""
    weights = (weight for weight in model.state_dict().values() if weight.is_floating_point())
    same = all(weight.dtype == dtype for weight in weights)
    return model if same else copy.deepcopy(model).to(dtype)


def make_table(
    parts: Parts,
    prompts: str | Path | Iterable[Any] | None = None,
    negative_prompt: str | None = None,
    conditions: Conditions | None = None,
    *,
    distilled_guidance: float = DISTILLED_GUIDANCE,
    latent_size: int | tuple[int, int] | None = None,
    device: str | torch.device = "cpu",
) -> Conditions | None:
    """The table of conditions that a pipeline's network is called with; None: it needs none.

    Arguments and errors as for `load_teacher`.
    """
    if conditions is not None:
        if prompts is not None or negative_prompt is not None:
            raise InvalidArgumentError("conditions", "with prompts", "pass one or the other.")
        families.check_table(parts.network, conditions.tensors())
        return conditions
    needed = families.needs_table(parts.network)
    if prompts is None and negative_prompt is None and not needed:
        return None
    name = type(parts.network).__name__
    if not needed:
        raise InvalidArgumentError("prompts", prompts, f"{name} takes none: leave them out.")
    if prompts is None:
        raise InvalidArgumentError(
            "prompts",
            None,
            f"{name} needs conditions: load it with load_teacher(..., prompts=...) or with "
            "conditions=Conditions(...).",
        )
    texts = read_texts(prompts)
    if parts.pipeline is not None:
        table = encode_prompts(parts.pipeline, texts, negative_prompt)
    else:
        assert parts.folder is not None
        dtype, variant = parts.network.dtype, parts.variant
        table = load_prompts(parts.folder, texts, negative_prompt, dtype, device, variant)
    factor = families.pixel_factor(parts.autoencoder)
    height, width = _size(parts.network, latent_size)
    distilled_guidance = check_number("distilled_guidance", distilled_guidance)
    rows = families.shared_rows(parts.network, factor * height, factor * width, distilled_guidance)
    return table.with_shared(rows)


def describe(denoiser: Denoiser, scheduler: SchedulerMixin) -> dict[str, Any]:
    """Data from which `build_from_description` makes the same architecture again.

    Plain data, but for a table of conditions, which is the denoiser's own.

    Raises:
        InvalidArgumentError: if that would not be all, see `can_describe`.
    """
    network: Any = denoiser.network
    if not can_describe(denoiser, scheduler):
        raise InvalidArgumentError(
            "student",
            type(network).__name__,
            "only diffusers' known families, without adapters and changes at run time, can be "
            "described: pass the denoiser itself.",
        )
    return {
        "class": type(network).__name__,
        "network": settings(network),
        "dtype": str(denoiser.dtype).removeprefix("torch."),
        "scheduler": [type(scheduler).__name__, dict(scheduler.config)],
        "latent_size": denoiser.latent_shape[1:],
        "num_classes": denoiser.num_classes,
        "null_class": denoiser.null_class,
        "conditions": denoiser.conditions,
        "guidance_scale": denoiser.guidance_scale,
        "guidance_rescale": denoiser.guidance_rescale,
        "solver_order": denoiser.solver_order,
    }


def can_describe(denoiser: Denoiser, scheduler: Any) -> bool:
    """Whether a description says all of network and scheduler.

    They must be diffusers', of a known family, called as that is, and the network as it was made:
    without adapters, FreeU, or attention of one's own.
    """
    known = families.NETWORKS.get(type(denoiser.network)) is denoiser.call
    kind = type(scheduler)
    known = known and getattr(diffusers, kind.__name__, None) is kind
    return known and not changes(denoiser.network)


def build_from_description(description: Mapping[str, Any]) -> Denoiser:
    """A denoiser with random weights of the architecture that `describe` described."""
    name, config = description["scheduler"]
    kind: Any = families.find_class(description["class"], tuple(families.NETWORKS))
    # Not the network's own `to`, which warns of every cast.
    network = torch.nn.Module.to(
        kind(**description["network"]), getattr(torch, description["dtype"])
    )
    return build_denoiser(
        network,
        getattr(diffusers, name).from_config(config),
        description,
        conditions=description["conditions"],
        guidance_scale=description["guidance_scale"],
        guidance_rescale=description["guidance_rescale"],
        latent_size=description["latent_size"],
    )


def find_folder(
    source: str | Path, local_files_only: bool = True, variant: str | None = None
) -> Path:
    """The folder of a bundled teacher's name, of a path, or of a repository of the hub.

    Args:
        source: What to find.
        local_files_only: Whether the hub may not be asked.
        variant: Of the files to download.

    Raises:
        TeacherFolderError: if there is none, or it leads out of itself, see `files.check_folder`.
    """
    folder = BUNDLED.get(str(source), Path(source))
    if folder.is_dir():
        return check_folder(folder)
    names = ", ".join(map(repr, BUNDLED))
    remedy = f"pass an existing diffusers folder or one of {names}"
    if local_files_only:
        remedy += ", or a name of the hub with local_files_only=False."
        raise TeacherFolderError("teacher", str(source), remedy)
    try:
        options = {"use_safetensors": True, "variant": variant}
        folder = Path(DiffusionPipeline.download(str(source), **options))
    except Exception as error:  # huggingface_hub raises many kinds
        raise TeacherFolderError("teacher", str(source), f"{remedy} ({error}).") from error
    return check_folder(folder)


def load_scheduler(folder: Path) -> SchedulerMixin:
    """The scheduler of a diffusers folder, of the class that its config names."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path)
    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    known = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not known:
        raise TeacherFolderError("teacher", str(path), "name a diffusers scheduler as _class_name.")
    try:
        return kind.from_pretrained(folder / "scheduler", local_files_only=True)
    except Exception as error:  # diffusers raises many kinds for impossible settings
        raise TeacherFolderError(
            "teacher", str(path), f"the scheduler could not be made ({error}); restore the folder."
        ) from error


def _load_model(
    path: Path, kinds: tuple[type, ...], dtype: torch.dtype | None, variant: str | None
) -> Any:
    """A diffusers model of one of `kinds`, with all of its weights and no others."""
    config = read_json(path / "config.json")
    kind: Any = families.find_class(families.class_name(config), kinds)
    if kind is None:
        raise TeacherFolderError("teacher", str(path), _supported())
    try:
        check_room(lambda: kind.from_config(config), path)
        # use_safetensors: never unpickle a file from outside.
        model, report = kind.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            variant=variant,
            **({} if dtype is None else {"torch_dtype": dtype}),
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
    return model


def network_name(network: Any) -> str:
    """What diffusers' pipelines, and their folders, call a network."""
    return "unet" if type(network).__name__.startswith("UNet") else "transformer"


def _supported() -> str:
    networks = ", ".join(kind.__name__ for kind in families.NETWORKS)
    decoders = ", ".join(kind.__name__ for kind in families.AUTOENCODERS)
    return (
        f"networks can be {networks}, and autoencoders {decoders}; for others make "
        "Denoiser(network, schedule, ...) and Teacher(denoiser, ...) yourself."
    )


def _size(network: Any, latent_size: int | tuple[int, ...] | None) -> tuple[int, int]:
    """Height and width of the latents.

    Raises:
        TeacherFolderError: if neither the caller nor the network says.
        InvalidArgumentError: for a size that the network can not divide.
    """
    size: Any = families.latent_shape(network)[1] if latent_size is None else latent_size
    if size is None:
        name = network.config.get("_name_or_path") or type(network).__name__
        raise TeacherFolderError(
            "teacher", name, "its config has no sample_size: add one, or pass latent_size."
        )
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(sides, Sequence) or len(sides) != 2:
        raise InvalidArgumentError("latent_size", size, "pass a height and width, or one integer.")
    height, width = sides
    side = families.side_multiple(network)
    for length in (height, width):
        if check_integer("latent_size", length, 1) % side:
            raise InvalidArgumentError("latent_size", size, f"pass multiples of {side}.")
    if height != width and isinstance(network, DiTTransformer2DModel):
        raise InvalidArgumentError("latent_size", size, "pass one number: DiT's are squares.")
    return height, width


def _read_metadata(folder: Path) -> dict[str, Any]:
    path = folder / METADATA
    return read_json(path) if path.exists() else {}
