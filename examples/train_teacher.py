"""Train a teacher, a class-conditional diffusion model of small images, and its judge.

`make teacher` runs this and writes `redif_env/assets/digits`, the bundled teacher of 8x8 digits, in
under ten minutes on two cores. `--data FOLDER` trains one on your own images. Stopped, it goes on
where it was when the same command runs again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import pickle
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from agents.evaluation import JUDGE_FOLDER, Judge, frechet_distance, label_agreement
from examples.image_data import ImageData, load_images
from redif_env.errors import (
    InvalidArgumentError,
    TeacherFolderError,
    check_integer,
    check_number,
    plain_errors,
    require,
)
from redif_env.files import replacing
from redif_env.loading import BUNDLED, METADATA, load_teacher
from redif_env.prompts import INDEX
from redif_env.teacher import split_seed

NORM_GROUPS = 8
SAMPLES_AT_ONCE = 512


@dataclasses.dataclass
class Args:
    """Train a teacher and its judge."""

    data: str = "digits"
    """Images: "digits", "mnist-subset", or a folder of idx files, of a saved `datasets` object, or with a sub-folder of pictures a class."""
    image_size: int | None = None
    """Height and width that pictures are scaled and cropped to; default: their own."""
    out: Path | None = None
    """Folder to write; default: the bundled teacher's for digits, else runs/teachers/NAME."""
    channels: tuple[int, ...] | None = None
    """Channels of the network, finest resolution first, multiples of 8; default: by the image size."""
    layers_per_block: int = 1
    """Residual layers at each resolution."""
    steps: int = 4_000
    """Optimiser steps of the teacher."""
    batch_size: int = 96
    """Images a step."""
    learning_rate: float = 1e-3
    """Peak learning rate; a cosine brings it to zero."""
    dropout: float = 0.1
    """Dropout of the network while it trains: without it, 1,257 images are memorised."""
    class_dropout: float = 0.1
    """Fraction of labels replaced by the null class, which makes guidance possible."""
    judge_steps: int = 3_000
    """Optimiser steps of the judge."""
    checkpoint_every: int = 250
    """Steps between checkpoints of the teacher."""
    num_eval: int = 2_000
    """Samples that the quality gate is measured on."""
    min_judge_accuracy: float = 0.975
    """Gate: the judge's accuracy on held-out images. A good 28x28 judge has 0.97 on MNIST, 0.88 on Fashion-MNIST."""
    min_label_agreement: float = 0.97
    """Gate: fraction of samples that the judge gives the class that was asked for."""
    seed: int = 0
    """Seed of weights, batches and evaluation."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


# What decides the weights, beside the images: a checkpoint is only of use to the same.
RECIPE = (
    "layers_per_block",
    "steps",
    "batch_size",
    "learning_rate",
    "dropout",
    "class_dropout",
    "judge_steps",
    "seed",
)


def out_folder(args: Args) -> Path:
    """Where the teacher goes.

    Raises:
        TeacherFolderError: if something else than a teacher is there; it would be deleted.
    """
    default = BUNDLED.get(args.data, Path("runs/teachers") / Path(args.data).resolve().name)
    folder = default if args.out is None else args.out
    if folder.exists() and not (folder / METADATA).is_file():
        raise TeacherFolderError(
            "out", str(folder), "this is no teacher that could be replaced; pass another path."
        )
    return folder


def check_args(args: Args) -> None:
    """Raise `InvalidArgumentError` for numbers that make no sense."""
    for name in ("layers_per_block", "steps", "batch_size", "judge_steps", "checkpoint_every"):
        check_integer(name, getattr(args, name), 1)
    check_integer("num_eval", args.num_eval, 2)
    check_number("learning_rate", args.learning_rate)
    for name in ("dropout", "class_dropout", "min_judge_accuracy", "min_label_agreement"):
        check_number(name, getattr(args, name), 0, 1)


def num_halvings(side: int) -> int:
    """Times that `side` is halved until it is at most 7: once from 8, twice from 28."""
    return max(1, math.ceil(math.log2(side / 7)))


def choose_channels(side: int, channels: tuple[int, ...] | None) -> tuple[int, ...]:
    """The network's channels for images of this height and width.

    Raises:
        InvalidArgumentError: if the channels do not go with the size.
    """
    if channels is None:
        levels = num_halvings(side) + 1
        channels = (32, 56) if levels == 2 else tuple(min(16 * 2**i, 128) for i in range(levels))
    if not channels or any(width < 1 or width % NORM_GROUPS for width in channels):
        raise InvalidArgumentError("channels", channels, f"pass multiples of {NORM_GROUPS}.")
    step = 2 ** (len(channels) - 1)
    if side % step:
        raise InvalidArgumentError(
            "channels",
            channels,
            f"{len(channels)} resolutions need a size that {step} divides, not {side}: pass "
            f"--image-size {max(1, round(side / step)) * step}, or fewer channels.",
        )
    return channels


def make_unet(args: Args, data: ImageData) -> UNet2DModel:
    """The teacher's network; 0.5 M parameters for digits, which can live in the repository."""
    colours, side = data.images.shape[1:3]
    channels = choose_channels(side, args.channels)
    return UNet2DModel(
        sample_size=side,
        in_channels=colours,
        out_channels=colours,
        block_out_channels=channels,
        layers_per_block=args.layers_per_block,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=NORM_GROUPS,
        add_attention=False,
        num_class_embeds=data.num_classes + 1,
        dropout=args.dropout,
    )


def make_scheduler() -> DDIMScheduler:
    """v-prediction: its x_0 is alpha x_t - sigma v, so no error is divided by a tiny alpha."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def cosine(step: int, steps: int, warmup: int = 200) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    progress = torch.tensor(step / steps)
    return min(1.0, (step + 1) / warmup) * float(0.5 * (1 + torch.cos(torch.pi * progress)))


class Training:
    """The teacher's training: minimise the v-prediction error (Salimans and Ho 2022).

    Attributes:
        step_index: Steps done.
    """

    def __init__(self, args: Args, data: ImageData) -> None:
        self.args, self.data, self.step_index = args, data, 0
        self.unet, self.scheduler = make_unet(args, data).to(args.device), make_scheduler()
        self.average = EMAModel(self.unet.parameters(), decay=0.999, use_ema_warmup=True)
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), args.learning_rate, weight_decay=1e-4
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda i: cosine(i, args.steps)
        )

    def loss(self) -> Tensor:
        """The error on a random batch, float32 `()`."""
        args, data = self.args, self.data
        rows = torch.randint(len(data.images), (args.batch_size,), device=args.device)
        x_0, classes = data.images[rows], data.classes[rows]
        dropped = torch.rand(len(rows), device=args.device) < args.class_dropout
        classes = torch.where(dropped, data.num_classes, classes)
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(rows),), device=args.device)
        target = self.scheduler.get_velocity(x_0, noise, t)
        prediction = self.unet(self.scheduler.add_noise(x_0, noise, t), t, classes).sample
        return F.mse_loss(prediction, target)

    def step(self) -> Tensor:
        """One optimiser step; returns the loss before it."""
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.step(self.unet.parameters())
        self.step_index += 1
        return loss.detach()

    def averaged(self) -> UNet2DModel:
        """The network with its averaged weights, in evaluation mode; ends the training."""
        self.average.copy_to(self.unet.parameters())
        return self.unet.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on, the state of the random generators too."""
        cuda = torch.device(self.args.device).type == "cuda"
        return {
            "step_index": self.step_index,
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.args.device) if cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step_index = state["step_index"]
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.average.to(self.args.device)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.args.device)


def make_recipe(args: Args, data: ImageData) -> dict[str, Any]:
    """What decides the weights: options, sizes, kind of device, and a hash of the images."""
    digest = hashlib.sha256(data.images.cpu().numpy())
    digest.update(data.classes.cpu().numpy())
    return {
        **{name: getattr(args, name) for name in RECIPE},
        "channels": choose_channels(data.images.shape[-1], args.channels),
        "device": torch.device(args.device).type,
        "num_classes": data.num_classes,
        "shape": tuple(data.images.shape),
        "images": digest.hexdigest(),
    }


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint; a run that is killed while it writes leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: Path, recipe: dict[str, Any]) -> dict[str, Any] | None:
    """The checkpoint that `save_checkpoint` wrote, or None if there is none. Runs no code in it.

    Raises:
        TeacherFolderError: if it is damaged, or of other options or images.
    """
    if not path.exists():
        return None
    remedy = "delete it to train anew"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        saved = dict(checkpoint["recipe"])
    except (OSError, RuntimeError, EOFError, LookupError, TypeError, ValueError) as error:
        raise _bad_checkpoint(path, f"could not be read ({error}); {remedy}.") from error
    except pickle.UnpicklingError as error:
        raise _bad_checkpoint(
            path, f"is damaged, or holds more than tensors and numbers; {remedy}."
        ) from error
    changed = [name for name, value in recipe.items() if saved.get(name) != value]
    if changed:
        raise _bad_checkpoint(
            path, f"was made with other {', '.join(changed)}; pass the same, or {remedy}."
        )
    return checkpoint


def _bad_checkpoint(path: Path, remedy: str) -> TeacherFolderError:
    return TeacherFolderError("checkpoint", str(path), remedy)


def train(args: Args, data: ImageData, path: Path) -> tuple[Judge, UNet2DModel, float]:
    """Train both, from the checkpoint at `path` if there is one.

    Returns:
        The judge, the teacher's network, and the seconds that it took in all.
    """
    recipe = make_recipe(args, data)
    checkpoint = load_checkpoint(path, recipe)
    started = time.monotonic()
    if checkpoint is None:
        judge = train_judge(args, data)
        training, before = Training(args, data), 0.0
    else:
        judge = make_judge(args, data)
        training, before = Training(args, data), checkpoint["seconds"]
        judge.load_state_dict(checkpoint["judge"])
        training.load_state_dict(checkpoint["training"])

    def save() -> float:
        seconds = before + time.monotonic() - started
        state = {"judge": judge.state_dict(), "training": training.state_dict()}
        save_checkpoint(path, {"recipe": recipe, "seconds": seconds, **state})
        return seconds

    seconds = save()
    bar = trange(
        training.step_index,
        args.steps,
        desc="teacher",
        initial=training.step_index,
        total=args.steps,
    )
    for i in bar:
        loss = training.step()
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if training.step_index % args.checkpoint_every == 0 or training.step_index == args.steps:
            seconds = save()
    return judge.eval(), training.averaged(), seconds


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to half a pixel: the judge's augmentation."""
    shift = (torch.rand(len(images), 2, device=images.device) - 0.5) * 2 / images.shape[-1]
    scale = 1 + 0.1 * torch.randn(len(images), 2, device=images.device)
    theta = torch.diag_embed(scale)
    theta = torch.cat([theta, shift[..., None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def make_judge(args: Args, data: ImageData) -> Judge:
    """An untrained classifier of these images."""
    colours, side = data.images.shape[1:3]
    judge = Judge(colours, side, data.num_classes, num_halvings=num_halvings(side))
    return judge.to(args.device)


def train_judge(args: Args, data: ImageData) -> Judge:
    """Train the classifier on the same split as the teacher; its whitening on that split too."""
    judge = make_judge(args, data)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine(i, args.judge_steps))
    for _ in trange(args.judge_steps, desc="judge"):
        rows = torch.randint(len(data.images), (128,), device=args.device)
        images = shifted(data.images[rows])
        images = images + 0.1 * torch.randn_like(images)
        loss = F.cross_entropy(judge.logits(images), data.classes[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    judge.fit_whitening(data.images)
    return judge


def measure(args: Args, folder: Path, judge: Judge, data: ImageData) -> dict[str, float]:
    """The quality gate's figures, on fresh noise."""
    teacher = load_teacher(folder, device=args.device, batch_size=SAMPLES_AT_ONCE)
    generator = torch.Generator().manual_seed(split_seed(args.seed, "card"))
    x_T = teacher.denoiser.initial_noise(args.num_eval, generator).to(args.device)
    classes = torch.arange(args.num_eval, device=args.device) % data.num_classes
    samples = teacher.sample(x_T, classes)
    real = data.held_out_images
    return {
        "judge_accuracy": label_agreement(judge, real, data.held_out_classes),
        "label_agreement": label_agreement(judge, samples, classes),
        "frechet_to_real": frechet_distance(judge, samples, data.images),
        "frechet_real_vs_real": frechet_distance(judge, real[: args.num_eval], data.images),
    }


CARD = """---
license: {tag}
library_name: diffusers
tags: [class-conditional, redif]
---
# {title}

A class-conditional diffusion model of {side}x{side} images (`UNet2DModel`, {parameters:,} parameters,
v-prediction, squared-cosine schedule). Class {num_classes} is the null class, for guidance.
Images are float32 `({colours}, {side}, {side})` in [-1, 1]; sample with the folder's `DDIMScheduler` in 50 steps.

It predicts v because its `x_0` is `alpha x_t - sigma v`: an epsilon network's is divided by alpha,
which is 5e-5 at the noisiest time, so that its errors there would be amplified 20,000 times.

| | |
|---|---|
| data | {origin}; trained on {num_train:,} of {num_images:,} images |
| classes | {class_names} |
| licence | {licence} |
| command | `{command}` |
| seed, steps, batch | {seed}, {steps:,}, {batch_size} |
| time | {minutes:.1f} minutes on {device}, {threads} threads |

## Quality gate ({num_eval:,} samples of fresh noise, 50 steps, guidance 1)

| figure | value | gate |
|---|---|---|
| judge's accuracy on the {num_held_out:,} held-out images, which the teacher never saw | {judge_accuracy:.2%} | >= {min_judge_accuracy:.1%} |
| judge agrees with the asked class | {label_agreement:.2%} | >= {min_label_agreement:.1%} |
| Frechet distance to the training images, judge's whitened features | {frechet_to_real:.3f} | |
| the same, {num_floor:,} held-out real images to the training images (floor) | {frechet_real_vs_real:.3f} | |

`judge/` is that classifier ({judge_parameters:,} parameters, trained on the same images as the
teacher): an evaluation asset. It is never a reward by default.
"""


def make_command(args: Args) -> str:
    """The command line that these options are, without those that have their default."""
    words = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        if value != field.default:
            values = value if isinstance(value, tuple) else (value,)
            words += ["--" + field.name.replace("_", "-"), *map(str, values)]
    if not words:
        return "make teacher"
    return shlex.join(["python", "examples/train_teacher.py", *words])


def make_card(
    args: Args,
    data: ImageData,
    unet: UNet2DModel,
    judge: Judge,
    seconds: float,
    figures: dict[str, float],
) -> str:
    """The model card, Markdown."""
    bundled = args.data in BUNDLED
    num_train, num_held_out = len(data.images), len(data.held_out_images)
    return CARD.format(
        **figures,
        tag="mit" if bundled else "other",
        title="Digits: the bundled teacher" if bundled else f"Teacher of {Path(args.data).name}",
        licence=f"weights MIT; data {data.licence}" if bundled else data.licence,
        colours=data.images.shape[1],
        side=data.images.shape[2],
        parameters=unet.num_parameters(),
        judge_parameters=sum(p.numel() for p in judge.parameters()),
        num_classes=data.num_classes,
        class_names=", ".join(f"{i}: {name}" for i, name in enumerate(data.class_names)),
        origin=data.origin,
        num_train=num_train,
        num_held_out=num_held_out,
        num_images=num_train + num_held_out,
        num_floor=min(num_held_out, args.num_eval),
        command=make_command(args),
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        minutes=seconds / 60,
        device=args.device,
        threads=torch.get_num_threads(),
        num_eval=args.num_eval,
        min_judge_accuracy=args.min_judge_accuracy,
        min_label_agreement=args.min_label_agreement,
    )


def write_folder(data: ImageData, unet: UNet2DModel, judge: Judge, folder: Path) -> None:
    """The diffusers folder and the judge."""
    unet.save_pretrained(folder / "unet")
    make_scheduler().save_pretrained(folder / "scheduler")
    judge.save(folder / JUDGE_FOLDER)
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    metadata = {"num_classes": data.num_classes, "null_class": data.num_classes}
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")


def passes(args: Args, figures: dict[str, float]) -> bool:
    """Whether the figures pass the quality gate."""
    return (
        figures["judge_accuracy"] >= args.min_judge_accuracy
        and figures["label_agreement"] >= args.min_label_agreement
    )


def main(args: Args) -> dict[str, float]:
    """Train, measure, check the gate, and replace the folder."""
    check_args(args)
    out = out_folder(args)
    data = load_images(args.data, args.image_size)
    choose_channels(data.images.shape[-1], args.channels)
    data = data.to(args.device)
    torch.manual_seed(args.seed)
    path = out.with_name(out.name + ".checkpoint.pt")
    judge, unet, seconds = train(args, data, path)
    temporary = out.with_name(out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    write_folder(data, unet, judge, temporary)
    figures = measure(args, temporary, judge, data)
    card = make_card(args, data, unet, judge, seconds, figures)
    (temporary / "README.md").write_text(card)
    print(card)
    if not passes(args, figures):
        print(f"quality gate FAILED; left in {temporary}, and {path} to measure it again")
        raise SystemExit(1)
    print("quality gate passed")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)
    path.unlink()
    return figures


if __name__ == "__main__":
    with plain_errors():
        main(require("tyro", "examples").cli(Args))
