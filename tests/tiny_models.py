"""Tiny random diffusers pipelines, one of each family: made in a moment, saved, and sampled."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor

PROMPTS = ["a red cat", "dog", "two birds in a tree"]
SIDE = 8  # of the latents
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = {"steps_offset": 1, "timestep_spacing": "leading"}


@dataclasses.dataclass(frozen=True)
class Family:
    """A pipeline, how a teacher is loaded from it, and how diffusers itself samples it.

    Attributes:
        make: Returns the pipeline, with random weights.
        options: Of `load_teacher`.
        sample: `(pipeline, x_T, condition, num_steps) -> x_0`, with nothing of this project.
        num_conditions: How many there are to choose from; None without any.
        num_steps: Steps of the teacher.
    """

    make: Callable[[], Any]
    options: dict[str, Any]
    sample: Callable[[Any, Tensor, Tensor | None, int], Tensor]
    num_conditions: int | None = None
    num_steps: int = 4


def seeded(kind: type, **config: Any) -> Any:
    """A model with the same random weights each time, in evaluation mode."""
    torch.manual_seed(0)
    return kind(**config).eval()


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)


def clip_encoder(kind: str = "CLIPTextModel", **config: Any) -> Any:
    import transformers

    settings = {
        "vocab_size": 54,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "projection_dim": 16,
        **config,
    }
    return seeded(getattr(transformers, kind), config=transformers.CLIPTextConfig(**settings))


def kl_autoencoder(**config: Any) -> AutoencoderKL:
    settings = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 4,
        **config,
    }
    return seeded(AutoencoderKL, **settings)


def conditional_unet(**config: Any) -> UNet2DConditionModel:
    settings = {
        "sample_size": SIDE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
        **config,
    }
    return seeded(UNet2DConditionModel, **settings)


def pixel_unet(**config: Any) -> UNet2DModel:
    settings = {
        "sample_size": SIDE,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
        "add_attention": False,
        "norm_num_groups": 4,
        **config,
    }
    return seeded(UNet2DModel, **settings)


def prompts_of(condition: Tensor) -> list[str]:
    return [PROMPTS[row] for row in condition.tolist()]


def call_pipeline(**options: Any) -> Callable[..., Tensor]:
    """Sampling by a text pipeline's own `__call__`."""

    def sample(pipeline: Any, x_T: Tensor, condition: Tensor, num_steps: int) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        texts = prompts_of(condition)
        given = {
            name: [value] * len(texts) if name == "negative_prompt" else value
            for name, value in options.items()
        }
        return pipeline(
            texts, latents=x_T, num_inference_steps=num_steps, output_type="latent", **given
        ).images

    return sample


@torch.no_grad()
def plain_loop(pipeline: Any, x_T: Tensor, condition: Tensor | None, num_steps: int) -> Tensor:
    """Sampling of a network that is told nothing or a class, as diffusers' pipelines do it."""
    solver = DDIMScheduler.from_config(pipeline.scheduler.config)
    solver.set_timesteps(num_steps)
    x_t, told = x_T, {} if condition is None else {"class_labels": condition}
    for t in solver.timesteps:
        x_t = solver.step(pipeline.unet(x_t, t, **told).sample, t, x_t).prev_sample
    return x_t


def stable_diffusion(scheduler: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=kl_autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


FAMILIES = {
    "pixels": Family(
        lambda: DDPMPipeline(pixel_unet(), DDIMScheduler(clip_sample=False)), {}, plain_loop
    ),
    "classes": Family(
        lambda: DDPMPipeline(
            pixel_unet(num_class_embeds=3), DDIMScheduler(prediction_type="sample")
        ),
        {},
        plain_loop,
        num_conditions=3,
    ),
    "Stable Diffusion 1": Family(
        lambda: stable_diffusion(PNDMScheduler(skip_prk_steps=True, **BETAS, **STEPS)),
        {"prompts": PROMPTS, "guidance_scale": 3.0},
        call_pipeline(guidance_scale=3.0),
        num_conditions=3,
    ),
    "Stable Diffusion 2": Family(
        lambda: stable_diffusion(
            DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **BETAS, **STEPS)
        ),
        {
            "prompts": PROMPTS,
            "negative_prompt": "ugly",
            "guidance_scale": 5.0,
            "guidance_rescale": 0.7,
        },
        call_pipeline(guidance_scale=5.0, guidance_rescale=0.7, negative_prompt="ugly"),
        num_conditions=3,
    ),
    "without guidance": Family(
        lambda: stable_diffusion(DDIMScheduler(clip_sample=False, **BETAS, **STEPS)),
        {"prompts": PROMPTS},
        call_pipeline(guidance_scale=1.0),
        num_conditions=3,
    ),
}
