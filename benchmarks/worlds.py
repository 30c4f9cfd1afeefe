"""Teachers of several sizes to measure on: what they answer does not matter, what it costs does."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn

from redif_env import Denoiser, Teacher, TeacherBank, load_teacher
from redif_env.errors import check_choice
from redif_env.loading import noise_schedule

NUM_CLASSES = 10
# Latents and channels of UNets of random weights: about 36 M parameters at full width.
UNETS = {"pixels": (3, 32, 32), "latents": (4, 64, 64)}
WIDTH = 128
NETWORKS = ("digits", *UNETS)
MAKE_SOLVER = functools.partial(DDIMScheduler, prediction_type="v_prediction", clip_sample=False)


class Trivial(nn.Module):
    """Two parameters, so that what is around a network is all there is to measure."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.scale * x_t + self.shift


def make_teacher(name: str, width: int = WIDTH, device: str = "cpu") -> Teacher:
    """The bundled teacher, or a UNet of random weights, which has two solver steps.

    Args:
        name: One of `NETWORKS`.
        width: Channels of a UNet's first block; 8 is small enough for any machine.
        device: Where to.
    """
    if check_choice("network", name, NETWORKS) == "digits":
        return load_teacher(device=device)
    shape = UNETS[name]
    network = UNet2DModel(
        sample_size=shape[1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=min(width, 32),
        attention_head_dim=min(width, 64),
        num_class_embeds=NUM_CLASSES,
    )
    return _teacher(network, shape, num_classes=NUM_CLASSES).to(device)


def make_trivial(elements: int, device: str = "cpu") -> Teacher:
    """A teacher of square latents of so many elements, around the trivial network."""
    side = math.isqrt(elements)
    return _teacher(Trivial(), (1, side, side)).to(device)


def make_bank(teacher: Teacher, size: int) -> TeacherBank:
    """Tasks with noise for answers, which cost nothing."""
    generator = torch.Generator().manual_seed(0)
    x_T, x_0 = (teacher.denoiser.initial_noise(size, generator) for _ in range(2))
    condition = teacher.denoiser.initial_condition(size, generator)
    return TeacherBank(x_T, x_0, condition).to(teacher.device)


def _teacher(network: nn.Module, shape: tuple[int, ...], **options: Any) -> Teacher:
    make: Callable[[], Any] = MAKE_SOLVER
    denoiser = Denoiser(network, noise_schedule(make()), "v_prediction", shape, **options)
    return Teacher(denoiser, make, num_steps=2)
