"""Tiny random diffusers pipelines, one of each family: made in a moment, saved, and sampled."""

from __future__ import annotations

import dataclasses
import itertools
import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
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
    # Files, by position: transformers 4 takes nothing else, 5 has other names for them.
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocabulary))
        files[1].write_text("#version: 0.2\n")
        return CLIPTokenizer(*map(str, files), model_max_length=12)


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
    kind = type(pipeline.scheduler)
    kind = DDIMScheduler if kind is DDPMScheduler else kind
    solver = kind.from_config(pipeline.scheduler.config)
    solver.set_timesteps(num_steps)
    x_t, told = x_T, {} if condition is None else {"class_labels": condition}
    for t in solver.timesteps:
        prediction = pipeline.unet(x_t, t, **told).sample[:, : x_t.shape[1]]
        x_t = solver.step(prediction, t, x_t).prev_sample
    return x_t


def stable_diffusion(scheduler: Any, **config: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=kl_autoencoder(),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        unet=conditional_unet(**config),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(**options: Any) -> StableDiffusionXLPipeline:
    """Both encoders, pooled text and sizes, as in SDXL's base model and with its scheduler."""
    return StableDiffusionXLPipeline(
        vae=kl_autoencoder(),
        text_encoder=clip_encoder(),
        text_encoder_2=clip_encoder("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=conditional_unet(
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=16 + 6 * 4,
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, **STEPS),
        add_watermarker=False,
        **options,
    )


def dit() -> DiTPipeline:
    """With learned variances, like the published ones, whose null class is 1000 too."""
    transformer = seeded(
        DiTTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        activation_fn="gelu-approximate",
    )
    # Made of zeros, as training starts: nothing would depend on anything.
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.1)
    return DiTPipeline(transformer, kl_autoencoder(), DDIMScheduler(clip_sample=False))


def sample_dit(pipeline: Any, x_T: Tensor, condition: Tensor, num_steps: int) -> Tensor:
    """The pipeline draws its own noise, and decodes: give it the noise, and take the latents."""
    taken = []

    def decode(z: Tensor) -> Any:
        taken.append(z * pipeline.vae.config.scaling_factor)
        return SimpleNamespace(sample=torch.zeros(len(z), 3, 16, 16))

    pipeline.set_progress_bar_config(disable=True)
    with (
        mock.patch("diffusers.pipelines.dit.pipeline_dit.randn_tensor", return_value=x_T),
        mock.patch.object(pipeline.vae, "decode", decode),
    ):
        pipeline(condition.tolist(), guidance_scale=3.0, num_inference_steps=num_steps)
    return taken[0]


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -1.0)]
    pieces += [(letter, -2.0) for letter in string.ascii_lowercase]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)  # in transformers 4 too


def t5_encoder(d_model: int = 16) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=30, d_model=d_model, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    return seeded(T5EncoderModel, config=config)


def pixart(
    use_additional_conditions: bool, kind: type = PixArtAlphaPipeline
) -> PixArtAlphaPipeline | PixArtSigmaPipeline:
    transformer = seeded(
        PixArtTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        cross_attention_dim=24,
        sample_size=SIDE,
        patch_size=2,
        caption_channels=16,
        use_additional_conditions=use_additional_conditions,
    )
    return kind(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(),
        vae=kl_autoencoder(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(solver_order=2, variance_type="learned_range"),
    )


def sample_pixart(pipeline: Any, x_T: Tensor, condition: Tensor, num_steps: int) -> Tensor:
    # The pipeline leaves the variances out itself, and this scheduler would cut off a channel.
    config = {**pipeline.scheduler.config, "variance_type": None}
    stock, pipeline.scheduler = pipeline.scheduler, DPMSolverMultistepScheduler.from_config(config)
    options = {"use_resolution_binning": False, "height": 2 * SIDE, "width": 2 * SIDE}
    sample = call_pipeline(guidance_scale=3.0, negative_prompt="ugly", **options)
    size = 128 if pipeline.transformer.use_additional_conditions else SIDE  # else it tells no sizes
    with mock.patch.object(pipeline.transformer, "_internal_dict", {**pipeline.transformer.config}):
        pipeline.transformer.register_to_config(sample_size=size)
        x_0 = sample(pipeline, x_T, condition, num_steps)
    pipeline.scheduler = stock
    return x_0


def tiny_autoencoder() -> AutoencoderTiny:
    return seeded(
        AutoencoderTiny,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )


def vq_autoencoder() -> VQModel:
    return seeded(
        VQModel,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
    )


def stable_diffusion_with_tiny_autoencoder() -> StableDiffusionPipeline:
    pipeline = stable_diffusion(DDIMScheduler(clip_sample=False, **BETAS, **STEPS))
    pipeline.vae = tiny_autoencoder()
    return pipeline


def stable_diffusion_3(has_t5: bool = True) -> StableDiffusion3Pipeline:
    """With two or three encoders, and times that are shifted by the picture's size, as in 3.5."""
    transformer = seeded(
        SD3Transformer2DModel,
        sample_size=SIDE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=SIDE,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl_autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_encoder("CLIPTextModelWithProjection"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(d_model=32) if has_t5 else None,
        tokenizer_3=t5_tokenizer() if has_t5 else None,
    )


def flux() -> FluxPipeline:
    """With distilled guidance, as the dev model."""
    transformer = seeded(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=kl_autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer,
    )


def sample_flux(pipeline: Any, x_T: Tensor, condition: Tensor, num_steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    height, width = (2 * side for side in x_T.shape[2:])
    packed = pipeline._pack_latents(x_T, *x_T.shape)
    texts = prompts_of(condition)
    x_0 = pipeline(
        texts,
        negative_prompt=["ugly"] * len(texts),
        true_cfg_scale=3.0,
        height=height,
        width=width,
        latents=packed,
        num_inference_steps=num_steps,
        output_type="latent",
    ).images
    return pipeline._unpack_latents(x_0, height, width, pipeline.vae_scale_factor)


@torch.no_grad()
def sample_edm(pipeline: Any, x_T: Tensor, condition: None, num_steps: int) -> Tensor:
    """Euler's method on Karras' sigmas, with the scheduler's own preconditioning."""
    scheduler = pipeline.scheduler
    x, sigmas = x_T, scheduler._compute_karras_sigmas(torch.linspace(0, 1, num_steps + 1))
    for sigma, following in itertools.pairwise([*sigmas[:-1], torch.zeros(())]):
        told = scheduler.precondition_noise(sigma).reshape(1)
        raw = pipeline.unet(scheduler.precondition_inputs(x, sigma), told).sample
        x_0 = scheduler.precondition_outputs(x, raw, sigma)
        x = x + (following - sigma) * (x - x_0) / sigma
    return x


FAMILIES = {
    "pixels": Family(
        lambda: DDPMPipeline(pixel_unet(), DDIMScheduler(clip_sample=False)), {}, plain_loop
    ),
    "classes": Family(
        lambda: DDPMPipeline(
            pixel_unet(num_class_embeds=3),
            DDIMScheduler(prediction_type="sample", clip_sample=False),
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
    "AutoencoderTiny": Family(
        stable_diffusion_with_tiny_autoencoder,
        {"prompts": PROMPTS},
        call_pipeline(guidance_scale=1.0),
        num_conditions=3,
    ),
    "SDXL": Family(
        sdxl,
        {"prompts": PROMPTS, "negative_prompt": "ugly", "guidance_scale": 3.0},
        call_pipeline(guidance_scale=3.0, negative_prompt="ugly"),
        num_conditions=3,
    ),
    "SDXL with zeros as null": Family(
        sdxl,
        {"prompts": PROMPTS, "guidance_scale": 3.0},
        call_pipeline(guidance_scale=3.0),
        num_conditions=3,
    ),
    "DiT": Family(dit, {"guidance_scale": 3.0}, sample_dit, num_conditions=1000),
    "PixArt": Family(
        lambda: pixart(False),
        {"prompts": PROMPTS, "negative_prompt": "ugly", "guidance_scale": 3.0},
        sample_pixart,
        num_conditions=3,
    ),
    "PixArt with sizes": Family(
        lambda: pixart(True),
        {"prompts": PROMPTS, "negative_prompt": "ugly", "guidance_scale": 3.0},
        sample_pixart,
        num_conditions=3,
    ),
    "PixArt-Sigma": Family(
        lambda: pixart(False, PixArtSigmaPipeline),
        {"prompts": PROMPTS, "negative_prompt": "ugly", "guidance_scale": 3.0},
        sample_pixart,
        num_conditions=3,
    ),
    "latent diffusion with AutoencoderKL": Family(
        lambda: LDMPipeline(
            kl_autoencoder(),
            pixel_unet(in_channels=4, out_channels=4),
            DDIMScheduler(clip_sample=False, **BETAS),
        ),
        {},
        plain_loop,
    ),
    "latent diffusion": Family(
        lambda: LDMPipeline(
            vq_autoencoder(),
            pixel_unet(in_channels=3, out_channels=3),
            DDIMScheduler(clip_sample=False, **BETAS),
        ),
        {},
        plain_loop,
    ),
    "learned variances in pixels": Family(
        lambda: DDPMPipeline(
            pixel_unet(out_channels=6),
            DDPMScheduler(variance_type="learned_range", clip_sample=False),
        ),
        {},
        plain_loop,
    ),
    "flow matching": Family(
        lambda: DDPMPipeline(pixel_unet(), FlowMatchEulerDiscreteScheduler(shift=2.0)),
        {},
        plain_loop,
    ),
    "flow matching of second order": Family(
        lambda: DDPMPipeline(
            pixel_unet(),
            DPMSolverMultistepScheduler(
                use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0
            ),
        ),
        {},
        plain_loop,
    ),
    "Stable Diffusion 3": Family(
        stable_diffusion_3,
        {"prompts": PROMPTS, "negative_prompt": "ugly", "guidance_scale": 3.0},
        call_pipeline(guidance_scale=3.0, negative_prompt="ugly"),
        num_conditions=3,
    ),
    "Stable Diffusion 3 without T5": Family(
        lambda: stable_diffusion_3(has_t5=False),
        {"prompts": PROMPTS, "guidance_scale": 3.0},
        call_pipeline(guidance_scale=3.0),
        num_conditions=3,
    ),
    "distilled guidance": Family(
        lambda: stable_diffusion(
            DDIMScheduler(clip_sample=False, **BETAS, **STEPS), time_cond_proj_dim=6
        ),
        {"prompts": PROMPTS, "distilled_guidance": 2.5},
        call_pipeline(guidance_scale=2.5),
        num_conditions=3,
    ),
    "Flux": Family(
        flux,
        {
            "prompts": PROMPTS,
            "negative_prompt": "ugly",
            "guidance_scale": 3.0,
            "latent_size": SIDE,
        },
        sample_flux,
        num_conditions=3,
    ),
    "EDM": Family(
        lambda: DDPMPipeline(pixel_unet(), EDMEulerScheduler(sigma_max=10.0)),
        {},
        sample_edm,
    ),
}
