"""Train the bundled teacher: a class-conditional diffusion model of 8x8 digits, and its judge.

`make teacher` runs this and writes `redif_env/assets/digits`. Takes under ten minutes on two cores.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import trange

from agents.evaluation import JUDGE_FOLDER, Judge, frechet_distance, label_agreement
from redif_env.errors import require
from redif_env.loading import METADATA, load_teacher
from redif_env.teacher import split_seed

NUM_CLASSES = 10
NULL_CLASS = NUM_CLASSES


@dataclasses.dataclass
class Args:
    """Train the digits teacher and its judge."""

    out: Path = Path("redif_env/assets/digits")
    """Folder to write."""
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
    num_eval: int = 2_000
    """Samples that the quality gate is measured on."""
    seed: int = 0
    """Seed of weights, batches and evaluation."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where to train."""


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images float32 `(N, 1, 8, 8)` in [-1, 1] and classes int64 `(N,)`, split in two."""

    images: Tensor
    classes: Tensor
    held_out_images: Tensor
    held_out_classes: Tensor

    @classmethod
    def load(cls, device: str) -> Digits:
        """scikit-learn's digits; a stratified third is held out, always the same."""
        data = require("sklearn.datasets", "examples").load_digits()
        split = require("sklearn.model_selection", "examples").train_test_split(
            data.images / 8 - 1, data.target, test_size=0.3, random_state=0, stratify=data.target
        )
        images, held_out_images, classes, held_out_classes = map(torch.as_tensor, split)
        return cls(
            images.float().unsqueeze(1).to(device),
            classes.long().to(device),
            held_out_images.float().unsqueeze(1).to(device),
            held_out_classes.long().to(device),
        )


def make_unet(dropout: float) -> UNet2DModel:
    """The teacher's network: 0.5 M parameters, small enough to live in the repository."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 56),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=NUM_CLASSES + 1,
        dropout=dropout,
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


def train_unet(args: Args, digits: Digits) -> UNet2DModel:
    """Minimise the v-prediction error (Salimans and Ho 2022); returns the averaged weights."""
    unet, scheduler = make_unet(args.dropout).to(args.device), make_scheduler()
    average = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(unet.parameters(), args.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine(i, args.steps))
    bar = trange(args.steps, desc="teacher")
    for i in bar:
        rows = torch.randint(len(digits.images), (args.batch_size,), device=args.device)
        x_0, classes = digits.images[rows], digits.classes[rows]
        dropped = torch.rand(len(rows), device=args.device) < args.class_dropout
        classes = torch.where(dropped, NULL_CLASS, classes)
        noise = torch.randn_like(x_0)
        t = torch.randint(1000, (len(rows),), device=args.device)
        target = scheduler.get_velocity(x_0, noise, t)
        prediction = unet(scheduler.add_noise(x_0, noise, t), t, classes).sample
        loss = F.mse_loss(prediction, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(unet.parameters())
        if i % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    average.copy_to(unet.parameters())
    return unet.eval()


def shifted(images: Tensor) -> Tensor:
    """Each image moved by up to half a pixel: the judge's augmentation."""
    shift = (torch.rand(len(images), 2, device=images.device) - 0.5) * 2 / images.shape[-1]
    scale = 1 + 0.1 * torch.randn(len(images), 2, device=images.device)
    theta = torch.diag_embed(scale)
    theta = torch.cat([theta, shift[..., None]], 2)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_judge(args: Args, digits: Digits) -> Judge:
    """Train the classifier on the same split as the teacher; its whitening on that split too."""
    judge = Judge(num_classes=NUM_CLASSES).to(args.device)
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine(i, args.judge_steps))
    for _ in trange(args.judge_steps, desc="judge"):
        rows = torch.randint(len(digits.images), (128,), device=args.device)
        images = shifted(digits.images[rows])
        images = images + 0.1 * torch.randn_like(images)
        loss = F.cross_entropy(judge.logits(images), digits.classes[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    judge.eval()
    judge.fit_whitening(digits.images)
    return judge


def measure(args: Args, folder: Path, judge: Judge, digits: Digits) -> dict[str, float]:
    """The quality gate's figures, on fresh noise."""
    teacher = load_teacher(folder, device=args.device)
    generator = torch.Generator().manual_seed(split_seed(args.seed, "card"))
    x_T = teacher.denoiser.initial_noise(args.num_eval, generator).to(args.device)
    classes = torch.arange(args.num_eval, device=args.device) % NUM_CLASSES
    samples = teacher.sample(x_T, classes)
    real = digits.held_out_images
    return {
        "judge_accuracy": label_agreement(judge, real, digits.held_out_classes),
        "label_agreement": label_agreement(judge, samples, classes),
        "frechet_to_real": frechet_distance(judge, samples, digits.images),
        "frechet_real_vs_real": frechet_distance(judge, real, digits.images),
    }


CARD = """---
license: mit
library_name: diffusers
tags: [digits, class-conditional, redif]
---
# Digits: the bundled teacher

A class-conditional diffusion model of 8x8 digits (`UNet2DModel`, {parameters:,} parameters,
v-prediction, squared-cosine schedule). Class {null_class} is the null class, for guidance.
Images are float32 `(1, 8, 8)` in [-1, 1]; sample with the folder's `DDIMScheduler` in 50 steps.

It predicts v because its `x_0` is `alpha x_t - sigma v`: an epsilon network's is divided by alpha,
which is 5e-5 at the noisiest time, so that its errors there would be amplified 20,000 times.

| | |
|---|---|
| data | scikit-learn `load_digits`, {num_train} of 1,797 images (70 %, stratified, `random_state=0`) |
| licence | weights MIT; data BSD-3 (UCI, E. Alpaydin and C. Kaynak) |
| command | `{command}` |
| seed, steps, batch | {seed}, {steps:,}, {batch_size} |
| time | {minutes:.1f} minutes on {device}, {threads} threads |

## Quality gate ({num_eval:,} samples of fresh noise, 50 steps, guidance 1)

| figure | value | gate |
|---|---|---|
| judge's accuracy on the {num_held_out} held-out images, which the teacher never saw | {judge_accuracy:.2%} | >= 97.5 % |
| judge agrees with the asked class | {label_agreement:.2%} | >= 97 % |
| Frechet distance to the training images, judge's whitened features | {frechet_to_real:.3f} | |
| the same, held-out real images to the training images (floor) | {frechet_real_vs_real:.3f} | |

`judge/` is that classifier ({judge_parameters:,} parameters, trained on the same images as the
teacher): an evaluation asset. It is never a reward by default.
"""


def write_folder(args: Args, unet: UNet2DModel, judge: Judge, folder: Path) -> None:
    """The diffusers folder and the judge."""
    unet.save_pretrained(folder / "unet")
    make_scheduler().save_pretrained(folder / "scheduler")
    judge.save(folder / JUDGE_FOLDER)
    index = {
        "_class_name": "DDIMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    metadata = {"num_classes": NUM_CLASSES, "null_class": NULL_CLASS}
    (folder / METADATA).write_text(json.dumps(metadata, indent=2) + "\n")


def main(args: Args) -> dict[str, float]:
    """Train, measure, check the gate, and replace the folder."""
    started = time.monotonic()
    torch.manual_seed(args.seed)
    digits = Digits.load(args.device)
    judge, unet = train_judge(args, digits), train_unet(args, digits)
    minutes = (time.monotonic() - started) / 60
    temporary = args.out.with_name(args.out.name + ".new")
    shutil.rmtree(temporary, ignore_errors=True)
    write_folder(args, unet, judge, temporary)
    figures = measure(args, temporary, judge, digits)
    card = CARD.format(
        **figures,
        parameters=unet.num_parameters(),
        judge_parameters=sum(p.numel() for p in judge.parameters()),
        null_class=NULL_CLASS,
        num_train=len(digits.images),
        num_held_out=len(digits.held_out_images),
        command="make teacher",
        seed=args.seed,
        steps=args.steps,
        batch_size=args.batch_size,
        minutes=minutes,
        device=args.device,
        threads=torch.get_num_threads(),
        num_eval=args.num_eval,
    )
    (temporary / "README.md").write_text(card)
    print(card)
    passed = figures["judge_accuracy"] >= 0.975 and figures["label_agreement"] >= 0.97
    print("quality gate passed" if passed else f"quality gate FAILED; left in {temporary}")
    if not passed:
        raise SystemExit(1)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary.rename(args.out)
    return figures


if __name__ == "__main__":
    main(require("tyro", "examples").cli(Args))
