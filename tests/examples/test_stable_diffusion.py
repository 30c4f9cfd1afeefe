"""The Stable Diffusion example on a tiny random pipeline, with rewards of tiny random networks."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny_models import FAMILIES, PROMPTS

from examples import stable_diffusion
from redif_env.errors import InvalidArgumentError
from redif_env.rewards.perceptual import make_backbone

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

PROCESSOR = {
    "size": {"height": 16, "width": 16},
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def save_clip(folder) -> None:
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Everything on disk, as a user would have it, but tiny."""
    root = tmp_path_factory.mktemp("stable_diffusion")
    FAMILIES["Stable Diffusion 1"].make().save_pretrained(root / "pipeline")
    save_clip(root / "clip")
    torch.manual_seed(0)
    backbone = make_backbone("alex").state_dict()
    save_file({f"features.{name}": w for name, w in backbone.items()}, root / "alex.safetensors")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return stable_diffusion.Args(
        teacher=str(root / "pipeline"),
        prompts=root / "prompts.txt",
        clip=str(root / "clip"),
        lpips_weights=root / "alex.safetensors",
        lpips_size=32,
        teacher_steps=2,
        num_steps=2,
        iterations=1,
        num_envs=4,
        batch_size=4,
        micro_batch_size=2,
        lora_rank=2,
        bank_size=4,
        num_held_out=4,
        device="cpu",
        out=root / "run",
    )


def test_it_prints_what_it_needs_trains_and_exports(args, capsys):
    terms = stable_diffusion.main(args)
    assert {"decoded(mse)", "decoded(lpips)", "decoded(clip)"} == set(terms)
    assert all(before != after for before, after in terms.values())
    first, second = capsys.readouterr().out.split("memory")[1:]
    assert "unknown" in first
    assert "unknown" not in second
    assert second.index("in all") > second.index("activations") > 0
    pipeline = DiffusionPipeline.from_pretrained(args.out / "student", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    info = json.loads((args.out / "student" / "redif.json").read_text())
    images = pipeline(
        PROMPTS[0],
        guidance_scale=1.0,
        timesteps=info["timesteps"],
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert images.isfinite().all()
    assert float(images.std()) > 0.01
    assert (args.out / "samples.png").is_file()
    # Nothing is overwritten.
    with pytest.raises(InvalidArgumentError, match="out"):
        stable_diffusion.main(args)
