"""Prompts: texts through a pipeline's own encoders, once; the result is cached like banks are."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from .conditions import Conditions
from .errors import InvalidArgumentError, TeacherFolderError, require
from .files import replacing
from .teacher import cache_errors, cache_folder
from .untrusted import is_plain, read_json

Rows: TypeAlias = dict[str, Tensor]
Encode: TypeAlias = Callable[[Any, list[str], str | None], tuple[Rows, Rows]]
TEXT_KEYS = ("prompt", "text", "caption")  # columns of data sets that hold prompts
INDEX = "model_index.json"
# What an index may name: a safety checker is of "stable_diffusion", and never loaded.
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
TEXT_CLASSES = ("CLIP", "T5")
TEXT_NAMES = ("text_encoder", "tokenizer")  # of a pipeline's parts; further ones end in _2, _3
TEXT_BATCH = 16  # prompts that are encoded at once


def read_texts(source: Any) -> list[str]:
    """Prompts from a text file (one a line), a list of strings, or a data set of records.

    Args:
        source: A path; or anything that yields strings, or mappings that hold one under one of
            `TEXT_KEYS`, as the rows of a `datasets.Dataset` do.

    Raises:
        InvalidArgumentError: for anything else, an empty file or an empty list.
    """
    remedy = "pass a text file with a prompt a line, a list of strings, or records with a "
    remedy += f"{' or '.join(map(repr, TEXT_KEYS))}."
    try:
        if isinstance(source, str | Path):
            texts = [line.strip() for line in Path(source).read_text("utf-8-sig").splitlines()]
            texts = [text for text in texts if text]
        else:
            texts = [_text(row) for row in source]
    except (OSError, TypeError, ValueError) as error:
        raise InvalidArgumentError("prompts", source, f"{remedy} ({error})") from error
    if not texts:
        raise InvalidArgumentError("prompts", source, remedy)
    return texts


def _text(row: Any) -> str:
    if isinstance(row, str):
        return row
    found = [row[key] for key in TEXT_KEYS if key in row]
    if not found or not isinstance(found[0], str):
        raise ValueError(f"{row!r} holds no text")
    return found[0]


def load_prompts(
    folder: Path,
    texts: Sequence[str],
    negative: str | None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
) -> Conditions:
    """Encode prompts with the encoders of a diffusers folder, or read what was encoded before.

    The encoders are loaded only where the cache does not know the prompts, and dropped again.

    Args:
        folder: The pipeline's folder.
        texts, negative: As for `encode_prompts`.
        dtype: Of the encoders, and of the table; None: float32.
        device: Where to encode.
        variant: Of the encoders' files.

    Raises:
        MissingExtraError: without transformers.
        TeacherFolderError: if the folder holds no encoders, or damaged ones.
        CacheError: if the cache cannot be written.
    """
    key = _key(folder, [list(texts), negative, str(dtype), variant])
    path = cache_folder() / f"conditions-{key}.safetensors"
    with contextlib.suppress(InvalidArgumentError):  # missing or damaged
        return Conditions.load(path)
    pipeline = _load_encoders(folder, dtype, variant).to(device)
    conditions = encode_prompts(pipeline, texts, negative).to("cpu")
    with cache_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            conditions.save(temporary)
    return conditions


def _load_encoders(folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    """The pipeline of a folder with nothing but its tokenizers and text encoders."""
    require("transformers", "transformers")
    left_out = {
        name: None
        for name, value in read_index(folder).items()
        if isinstance(value, list) and not _is_text(name, value)
    }
    options = {} if dtype in (None, torch.float32) else {"torch_dtype": dtype}
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=variant,
            **options,
            **left_out,
        )
    except Exception as error:  # diffusers and transformers raise many kinds for a damaged folder
        raise TeacherFolderError(
            "teacher", str(folder), f"its text encoders could not be loaded ({error})."
        ) from error
    config = folder / "transformer" / "config.json"
    if config.is_file():
        # Stable Diffusion 3 without its T5 encoder reads the width of the zeros in its place here.
        settings = SimpleNamespace(**read_json(config))
        pipeline.transformer = SimpleNamespace(config=settings)
    return pipeline


def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder says it is made of: `[library, class]` by name, and settings.

    diffusers imports the libraries that it names: only its own and transformers' are let through.

    Raises:
        TeacherFolderError: if the file is missing or damaged, or names something else.
    """
    index = read_json(folder / INDEX)
    for name, value in index.items():
        parts = value if isinstance(value, list) and value else [None]
        known = parts[0] in LIBRARIES and all(p is None or is_name(p) for p in parts)
        if _is_text(name, value):
            known = parts[0] == "transformers" and str(parts[1]).startswith(TEXT_CLASSES)
        if not known or not is_plain(name) or len(parts) > 2:
            raise TeacherFolderError(
                "teacher",
                f"{folder / INDEX}: {name!r}: {value!r}",
                "its parts must be classes of diffusers, or encoders of transformers; code of the "
                "folder's own is not run.",
            )
    if isinstance(index.get("_class_name"), str) and not is_name(index["_class_name"]):
        raise TeacherFolderError("teacher", str(folder / INDEX), "name a class as _class_name.")
    return index


def is_name(value: object) -> bool:
    """Whether something can be the name of a class."""
    return isinstance(value, str) and value.isidentifier()


def _is_text(name: str, value: Any) -> bool:
    """Whether an entry of the index is a text encoder or tokenizer that the pipeline has."""
    return name.startswith(TEXT_NAMES) and isinstance(value, list) and None not in value


def _key(folder: Path, settings: list[Any]) -> str:
    """Hex digest of the pipeline's settings, its encoders' and tokenizers' files, and `settings`.

    Raises:
        TeacherFolderError: if the folder holds no text encoder.
    """
    parts = [folder / name for name, value in read_index(folder).items() if _is_text(name, value)]
    missing = [part.name for part in parts if not part.is_dir()]
    if not parts or missing:
        needed = missing[0] if missing else "text encoders"
        remedy = f"prompts need its {needed}: restore them, or pass conditions=Conditions(...)."
        raise TeacherFolderError("teacher", str(folder), remedy)
    files = [path for part in parts for path in sorted(part.rglob("*")) if path.is_file()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in [folder / INDEX, *files]:
        digest.update(str(path.relative_to(folder)).encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:32]


def encode_prompts(pipeline: Any, texts: Sequence[str], negative: str | None) -> Conditions:
    """The texts through a pipeline's own encoders, with the negative prompt as null.

    Args:
        pipeline: A diffusers pipeline, of which only tokenizers and text encoders are used.
        texts: The prompts.
        negative: None stands for what the pipeline takes without a negative prompt.

    Raises:
        InvalidArgumentError: for a pipeline of another family.
    """
    names = [kind.__name__ for kind in type(pipeline).__mro__]
    encode = next((ENCODERS[name] for name in names if name in ENCODERS), None)
    if encode is None:
        raise InvalidArgumentError(
            "source",
            names[0],
            "its prompts can not be encoded yet: pass conditions=Conditions(...).",
        )
    with torch.no_grad():
        parts = [
            encode(pipeline, list(texts[start : start + TEXT_BATCH]), negative)
            for start in range(0, len(texts), TEXT_BATCH)
        ]
    tensors = {key: torch.cat([rows[key] for rows, _ in parts]) for key in parts[0][0]}
    null = {key: rows[:1] for key, rows in parts[0][1].items()}
    return Conditions(tensors, null=null, texts=texts, null_text=negative)


def _encode_stable_diffusion(
    pipeline: Any, texts: list[str], negative: str | None
) -> tuple[Rows, Rows]:
    negatives = [negative or ""] * len(texts)
    device = pipeline._execution_device
    rows, null = pipeline.encode_prompt(texts, device, 1, True, negatives)
    return {"encoder_hidden_states": rows}, {"encoder_hidden_states": null}


def _encode_sdxl(pipeline: Any, texts: list[str], negative: str | None) -> tuple[Rows, Rows]:
    embeddings = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=True, negative_prompt=negative
    )
    rows, null, pooled, null_pooled = embeddings
    return (
        {"encoder_hidden_states": rows, "text_embeds": pooled},
        {"encoder_hidden_states": null, "text_embeds": null_pooled},
    )


def _encode_pixart(pipeline: Any, texts: list[str], negative: str | None) -> tuple[Rows, Rows]:
    embeddings = pipeline.encode_prompt(
        texts, do_classifier_free_guidance=True, negative_prompt=negative or ""
    )
    rows, mask, null, null_mask = embeddings
    return (
        {"encoder_hidden_states": rows, "encoder_attention_mask": mask},
        {"encoder_hidden_states": null, "encoder_attention_mask": null_mask},
    )


def _encode_sd3(pipeline: Any, texts: list[str], negative: str | None) -> tuple[Rows, Rows]:
    rows, null, pooled, null_pooled = pipeline.encode_prompt(
        texts, None, None, negative_prompt=negative or ""
    )
    return (
        {"encoder_hidden_states": rows, "pooled_projections": pooled},
        {"encoder_hidden_states": null, "pooled_projections": null_pooled},
    )


def _encode_flux(pipeline: Any, texts: list[str], negative: str | None) -> tuple[Rows, Rows]:
    rows, pooled, _ = pipeline.encode_prompt(texts, None)
    null, null_pooled, _ = pipeline.encode_prompt(negative or "", None)
    return (
        {"encoder_hidden_states": rows, "pooled_projections": pooled},
        {"encoder_hidden_states": null, "pooled_projections": null_pooled},
    )


# By pipeline, or what it derives from.
ENCODERS: dict[str, Encode] = {
    "StableDiffusionXLPipeline": _encode_sdxl,
    "StableDiffusionPipeline": _encode_stable_diffusion,
    "PixArtAlphaPipeline": _encode_pixart,
    "PixArtSigmaPipeline": _encode_pixart,
    "StableDiffusion3Pipeline": _encode_sd3,
    "FluxPipeline": _encode_flux,
}
