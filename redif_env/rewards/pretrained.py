"""Agreement of pretrained image encoders: CLIP, DINO, Perception Encoder."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import MissingExtraError, RewardModelError, require
from .base import Reward, register_reward
from .images import ImageInput

EXTRA = "transformers"
WANTED = ("*.json", "*.safetensors", "pytorch_model*.bin")


class Encoder(Reward):
    """Base of rewards that compare embeddings of an encoder from a folder or the Hugging Face hub.

    Args:
        source: A folder, or the id of a repository of the hub.
        preprocess: From samples in [-1, 1] to what the encoder takes; default: an `ImageInput` of
            the source's own mean, std and size.
        local_files_only: Whether to look in the folder or the local cache only; False downloads.

    Raises:
        MissingExtraError: without transformers, the extra `transformers`.
        RewardModelError: if the source is missing, damaged, or of another kind.
        InvalidArgumentError: when scoring, for samples that are not images of 1 or 3 channels.
    """

    differentiable = True
    nfe = 2
    source: str
    kind: str

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        local_files_only: bool = True,
    ) -> None:
        folder = _find_folder(str(source or self.source), local_files_only)
        self.network = load_frozen(self.kind, folder)
        self.preprocess = preprocess or _image_input(self.network, folder)

    @abstractmethod
    def embed(self, x_0: Tensor) -> Tensor:
        """Embeddings `(N, C)` or `(N, C, H', W')` of samples `(N, 1 or 3, H, W)`."""

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self._cosine(x_0, teacher_x_0).flatten(1).mean(1)

    def _cosine(self, x_0: Tensor, teacher_x_0: Tensor) -> Tensor:
        """Cosine along the channels, `(N, 1)` or `(N, 1, H', W')`."""
        ours = self.embed(x_0)
        with torch.no_grad():
            theirs = self.embed(teacher_x_0)
        return functional.cosine_similarity(ours, theirs, dim=1).unsqueeze(1)

    def _output(self, x_0: Tensor) -> tuple[Any, tuple[int, ...]]:
        """What the network returns, and the height and width that it saw."""
        images = self.preprocess(x_0)
        return self.network.to(x_0.device)(pixel_values=images), tuple(images.shape[2:])


class CLIPCosine(Encoder):
    """Cosine between CLIP's image embeddings (Radford et al. 2021), in [-1, 1]; 1 for a copy.

    By default of `openai/clip-vit-base-patch32`; any folder with a CLIP vision tower will do.
    """

    name = "clip"
    source = "openai/clip-vit-base-patch32"
    kind = "CLIPVisionModelWithProjection"

    def embed(self, x_0: Tensor) -> Tensor:
        return self._output(x_0)[0].image_embeds


class PerceptionEncoderCosine(Encoder):
    """Cosine between image embeddings of the Perception Encoder (Bolya et al. 2025); 1 for a copy.

    transformers runs these models through timm (the extra `timm`, which brings torchvision): the
    embedding is the output of the projection head, which its class calls logits. By default of
    `timm/vit_pe_core_small_patch16_384.fb`; any folder of image classification will do, and then
    compares logits.
    """

    name = "perception_encoder"
    source = "timm/vit_pe_core_small_patch16_384.fb"
    kind = "AutoModelForImageClassification"

    def embed(self, x_0: Tensor) -> Tensor:
        return self._output(x_0)[0].logits


class DINOPatches(Encoder):
    """Mean cosine between DINO's patch embeddings (Oquab et al. 2024), in [-1, 1]; 1 for a copy.

    Map: the cosine of each patch. By default of `facebook/dinov2-small`; DINO, DINOv2 with and
    without registers, DINOv3 and other plain vision transformers of transformers will do.
    """

    name = "dino"
    has_map = True
    source = "facebook/dinov2-small"
    kind = "AutoModel"

    def embed(self, x_0: Tensor) -> Tensor:
        output, (height, width) = self._output(x_0)
        patch = self.network.config.patch_size
        grid = height // patch, width // patch
        # Class and register tokens come first.
        patches = output.last_hidden_state[:, -grid[0] * grid[1] :]
        return patches.movedim(-1, 1).unflatten(2, grid)

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self._cosine(x_0, teacher_x_0)


def _find_folder(source: str, local_files_only: bool) -> str:
    """The folder, or where the hub's repository lies in the local cache.

    Everything is then loaded from a folder: transformers' Auto classes ask the hub for adapters
    even when told to use local files only, and wait for an answer.
    """
    if Path(source).is_dir():
        return source
    require("transformers", EXTRA)
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            source, local_files_only=local_files_only, allow_patterns=list(WANTED)
        )
    except Exception as error:  # of the hub, the network or the name
        raise RewardModelError(
            "source",
            source,
            f"it is neither a folder nor in the local cache: pass a folder, run `hf download "
            f"{source}`, or pass local_files_only=False ({type(error).__name__}).",
        ) from error


def load_frozen(kind: str, folder: str | Path) -> Any:
    """A frozen network of transformers' class `kind`, float32, all of whose weights were in files.

    Raises:
        RewardModelError: if there is none in the folder, or it lacks weights of that class.
        MissingExtraError: without transformers, or without timm where the network is one of its.
    """
    transformers = require("transformers", EXTRA)
    try:
        network, info = getattr(transformers, kind).from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,  # never unpickle a file from outside
            trust_remote_code=False,  # nor run code, nor ask whether to
        )
    except ImportError as error:
        raise MissingExtraError("timm", "timm") from error
    except Exception as error:  # transformers raises many kinds
        raise RewardModelError(
            "source",
            str(folder),
            f"no {kind} could be loaded: pass a model of that kind ({error}).",
        ) from error
    # transformers would leave such weights random, and only warn.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler"))
    if missing:
        raise RewardModelError(
            "source", str(folder), f"it lacks {missing[0]!r} of {kind}: pass a model of that kind."
        )
    return network.eval().requires_grad_(False)


def _image_input(network: Any, folder: str) -> ImageInput:
    """The model's own: from timm's part of its config, or from the processor's file."""
    timm = getattr(network.config, "pretrained_cfg", None)
    if timm:
        size = tuple(timm["input_size"][1:])
        return ImageInput(timm["mean"], timm["std"], size, timm["interpolation"])
    try:
        config = json.loads((Path(folder) / "preprocessor_config.json").read_text())
        return ImageInput.from_processor(config)
    except (OSError, ValueError, KeyError) as error:
        raise RewardModelError(
            "source",
            folder,
            f"its preprocessor_config.json could not be used ({error}): pass preprocess=ImageInput("
            "mean, std, size).",
        ) from error


register_reward(CLIPCosine.name, CLIPCosine)
register_reward(DINOPatches.name, DINOPatches)
register_reward(PerceptionEncoderCosine.name, PerceptionEncoderCosine)
