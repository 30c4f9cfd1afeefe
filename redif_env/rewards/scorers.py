"""Teacher-free scores: CLIP and heads on it, ONNX graphs, and any function of tensors or images.

None has a gradient or a map. Those that look at pictures take samples that are images in [-1, 1],
`(N, C, H, W)` with 1 or 3 channels: a latent-diffusion student's must be decoded first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgumentError, check_choice, check_integer, require
from ..onnx_graph import open_graph
from ..rendering import to_rgb
from .base import Reward
from .pretrained import load_frozen


def as_images(x_0: Tensor) -> Tensor:
    """Samples as RGB `(N, 3, H, W)` in [0, 1], clipped; one channel is repeated.

    Raises:
        InvalidArgumentError: for anything but 1 or 3 channels.
    """
    if x_0.ndim != 4 or x_0.shape[1] not in (1, 3):
        raise InvalidArgumentError(
            "x_0", tuple(x_0.shape), "pass images (N, 1 or 3, H, W); decode latents first."
        )
    # NaN survives clamp, so that the environment can report it.
    return ((x_0.detach().float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)


def as_pil(x_0: Tensor) -> list[Any]:
    """Samples as 8-bit RGB PIL images; NaN shows as black.

    Raises:
        InvalidArgumentError: as for `as_images`.
    """
    from PIL import Image  # matplotlib depends on it

    pixels = to_rgb(2 * as_images(x_0) - 1)
    return [Image.fromarray(image) for image in pixels]


def clip_pixels(images: Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What CLIP's image processor makes of images, without leaving the device.

    The shorter side becomes `side` by antialiased bicubic interpolation, the middle square is cut
    out, and channels are normalised. Differs from the processor, which rounds to 8 bits, by a level
    or two.

    Args:
        images: RGB `(N, 3, H, W)` in [0, 1].
        side: Height and width that the model takes.
        mean, std: Of the three channels.

    Returns:
        float32 `(N, 3, side, side)`.
    """
    height, width = images.shape[2:]
    short = min(height, width)
    size = (side * height // short, side * width // short)
    resized = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = resized[:, :, top : top + side, left : left + side]
    shift, scale = (torch.tensor(v, device=images.device)[:, None, None] for v in (mean, std))
    return (square - shift) / scale


class _CLIP(Reward):
    """A frozen CLIP model from a local folder.

    Args:
        folder: Of a `CLIPModel` with its preprocessor, as `save_pretrained` writes them. Nothing is
            downloaded; the id of a model in the local Hugging Face cache works too.

    Raises:
        InvalidArgumentError: if the folder cannot be read, or lacks weights of the model.
        MissingExtraError: without transformers.
    """

    nfe = 1

    def __init__(self, folder: str | Path) -> None:
        # The tensors are ours; of the processor only the numbers are used.
        self.model = load_frozen("CLIPModel", folder)
        settings = _load(_image_processor(), folder)
        self.mean, self.std = settings.image_mean, settings.image_std
        self.side = self.model.config.vision_config.image_size

    def image_features(self, x_0: Tensor) -> Tensor:
        """Unit vectors, float32 `(N, F)`."""
        pixels = clip_pixels(as_images(x_0), self.side, self.mean, self.std)
        features = self.model.to(x_0.device).get_image_features(pixel_values=pixels)
        return F.normalize(_pooled(features).float(), dim=1)


class CLIPScore(_CLIP):
    """Cosine between the sample's and its prompt's CLIP features, in [-1, 1].

    2.5 times its positive part is CLIPScore (Hessel et al. 2021, eq. 1).

    Args:
        folder: See the class of models above; with the tokenizer.
        prompts: The prompt of each class: the condition is its index. A single prompt serves a
            teacher without classes.

    Raises:
        InvalidArgumentError: if the folder cannot be read, there is no prompt, or (when scoring)
            a class has none.
        MissingExtraError: without transformers.
    """

    name = "clip_score"

    def __init__(self, folder: str | Path, prompts: Sequence[str]) -> None:
        if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
            raise InvalidArgumentError("prompts", prompts, "pass a list with a prompt a class.")
        super().__init__(folder)
        self.text = self._text_features(list(prompts), folder)

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        text = self.text.to(x_0.device)
        if condition is None and len(text) > 1:
            raise InvalidArgumentError(
                "condition", None, f"it chooses among {len(text)} prompts: pass one prompt."
            )
        if condition is not None:
            if bool((condition >= len(text)).any()):
                raise InvalidArgumentError(
                    "prompts", f"{len(text)} prompts", f"pass one up to class {condition.max()}."
                )
            text = text[condition]
        return (self.image_features(x_0) * text).sum(1)

    @torch.no_grad()
    def _text_features(self, prompts: list[str], folder: str | Path) -> Tensor:
        transformers = require("transformers", "transformers")
        tokenizer = _load(transformers.CLIPTokenizer, folder)
        longest = self.model.config.text_config.max_position_embeddings
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        features = self.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        return F.normalize(_pooled(features).float(), dim=1)


class Aesthetic(_CLIP):
    """A head on CLIP image features, such as LAION's aesthetic predictors.

    Args:
        folder: As for `CLIPScore`, without the tokenizer.
        head: Safetensors file with the `weight`, `(out, in)`, and `bias` of each linear layer, from
            the features to one score. The first number in a name orders the layers, as in
            `layers.0.weight`; a single layer needs none.
        activation: Between the layers: `"none"` as in LAION's v2 heads, or `"relu"`.

    Raises:
        InvalidArgumentError: if a file cannot be read, or its layers do not lead from the features
            to one score.
        MissingExtraError: without transformers.
    """

    def __init__(self, folder: str | Path, head: str | Path, activation: str = "none") -> None:
        check_choice("activation", activation, ("none", "relu"))
        super().__init__(folder)
        self.head = load_head(head, self.model.config.projection_dim, activation)

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self.head.to(x_0.device)(self.image_features(x_0)).squeeze(1)


def load_head(path: str | Path, num_features: int, activation: str = "none") -> nn.Sequential:
    """Linear layers from a safetensors file; see `Aesthetic`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not Path(path).is_file():  # opening a pipe would wait for ever
            raise FileNotFoundError("there is no such file")
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidArgumentError(
            "head", str(path), f"it could not be read ({error}); pass a safetensors file."
        ) from error
    layers: list[nn.Module] = []
    width = num_features
    for name in sorted((n for n in tensors if n.endswith("weight")), key=_number):
        weight, bias = tensors[name], tensors.get(name.removesuffix("weight") + "bias")
        if weight.ndim != 2 or weight.shape[1] != width or bias is None:
            raise InvalidArgumentError(
                "head", f"{name} {tuple(weight.shape)}", f"pass layers from {width} with a bias."
            )
        width = len(weight)
        layers += [nn.ReLU()] if layers and activation == "relu" else []
        layers.append(_linear(weight, bias))
    if not layers or width != 1:
        raise InvalidArgumentError("head", str(path), "pass layers that end in one score.")
    return nn.Sequential(*layers).eval().requires_grad_(False)


class Onnx(Reward):
    """The score that an ONNX graph gives, by onnxruntime on the CPU.

    The graph's first input gets the samples, float32 `(N, C, H, W)` as they are; a second one, if
    it has it, the classes, int64 `(N,)`. Its first output is the score, `(N,)` or `(N, 1)`. The
    axis of rows must be free. Samples go to the host and scores back, once a call.

    Args:
        path: File of the graph.

    Raises:
        InvalidArgumentError: if the graph cannot be read or has more inputs; when scoring, if it
            needs classes and there are none, refuses the samples, or does not give a score a row.
        MissingExtraError: without onnxruntime.
    """

    nfe = 1

    def __init__(self, path: str | Path) -> None:
        self.session = open_graph(path)
        self.inputs = [each.name for each in self.session.get_inputs()]
        if len(self.inputs) not in (1, 2):
            raise InvalidArgumentError(
                "path", self.inputs, "pass a graph of the samples, or of samples and classes."
            )

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        values: list[Tensor] = [x_0.detach().float()]
        if len(self.inputs) == 2:
            if condition is None:
                raise InvalidArgumentError("condition", None, "the graph needs classes.")
            values.append(condition)
        feed = {n: v.cpu().numpy() for n, v in zip(self.inputs, values, strict=True)}
        try:
            scores = self.session.run(None, feed)[0]
        except Exception as error:
            raise InvalidArgumentError(
                "x_0", tuple(x_0.shape), f"the graph refuses the samples ({error})."
            ) from error
        return as_scores(scores, x_0, "the graph")


class Function(Reward):
    """Any Python function of the samples: a model of your own, a rule, a library.

    Args:
        function: Gets the samples, and the classes int64 `(N,)` (or None), both without gradients,
            and returns N numbers: a tensor, array or list, `(N,)` or `(N, 1)`.
        inputs: `"tensor"`: samples are float32 `(N, *latent_shape)`, as they are, on their device;
            `"pil"`: a list of N 8-bit RGB PIL images, which hides NaN.
        name: In logs.
        nfe: Forward passes of networks that scoring one sample takes, for the ledger of what
            training costs.

    Raises:
        InvalidArgumentError: if `function` cannot be called; when scoring, if it does not return a
            number a row.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: str = "tensor",
        name: str | None = None,
        nfe: int = 0,
    ) -> None:
        if not callable(function):
            raise InvalidArgumentError("function", function, "pass a function of the samples.")
        _check_takes_two(function)
        self.function = function
        self.inputs = check_choice("inputs", inputs, ("tensor", "pil"))
        self.nfe = check_integer("nfe", nfe, 0)
        self._name = name or getattr(function, "__name__", type(function).__name__).strip("<>")

    @property
    def name(self) -> str:
        return self._name

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        samples = x_0.detach() if self.inputs == "tensor" else as_pil(x_0)
        return as_scores(self.function(samples, condition), x_0, self.name)


def _check_takes_two(function: Callable[..., Any]) -> None:
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called).bind(None, None)
    except TypeError as error:
        raise InvalidArgumentError(
            "function", function, "pass one that takes two arguments, samples and conditions."
        ) from error
    except ValueError:  # a builtin without a signature
        pass


def as_scores(values: Any, x_0: Tensor, source: str) -> Tensor:
    """What a scorer returned as float32 `(N,)` on the device of the samples.

    Raises:
        InvalidArgumentError: if it is not a number for each of the N samples.
    """
    try:
        scores = torch.as_tensor(values, dtype=torch.float32, device=x_0.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidArgumentError(
            f"scores of {source}", values, f"return {len(x_0)} numbers ({error})."
        ) from error
    if scores.shape not in ((len(x_0),), (len(x_0), 1)):
        raise InvalidArgumentError(
            f"scores of {source}", tuple(scores.shape), f"return {len(x_0)} numbers."
        )
    return scores.detach().reshape(-1)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], len(weight))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def _number(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def _image_processor() -> Any:
    """The processor that works without torchvision; older releases have one class alone."""
    transformers = require("transformers", "transformers")
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def _load(kind: Any, folder: str | Path) -> Any:
    """A processor or tokenizer, which is no network."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a damaged folder
        raise InvalidArgumentError(
            "folder", str(folder), f"no {kind.__name__} could be read there ({error})."
        ) from error


def _pooled(features: Any) -> Tensor:
    """CLIP features: a tensor up to transformers 4, an output object since 5."""
    return features if isinstance(features, Tensor) else features.pooler_output
