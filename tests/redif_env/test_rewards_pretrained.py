"""CLIP, DINO and Perception Encoder: tiny models of the same classes, saved and loaded again."""

from __future__ import annotations

import json
import socket
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from redif_env import TeacherBank, check_reward
from redif_env.errors import InvalidArgumentError, MissingExtraError, RewardModelError
from redif_env.rewards import (
    CLIPCosine,
    DINOPatches,
    ImageInput,
    PerceptionEncoderCosine,
    evaluate,
    make_reward,
)

transformers = pytest.importorskip("transformers")

SIZE, PATCH = 16, 8
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "size": {"shortest_edge": SIZE},
    "crop_size": {"height": SIZE, "width": SIZE},
    "resample": 3,
    "image_mean": [0.48, 0.46, 0.41],
    "image_std": [0.27, 0.26, 0.28],
}


def make_network(name):
    if name == "clip":
        config = transformers.CLIPVisionConfig(projection_dim=12, **TINY)
        return transformers.CLIPVisionModelWithProjection(config)
    if name == "clip-with-text":
        text = {"vocab_size": 9, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
        text = {**text, "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
        config = transformers.CLIPConfig(
            text_config=text, vision_config={**TINY, "projection_dim": 12}, projection_dim=12
        )
        return transformers.CLIPModel(config)
    if name == "dinov2":
        return transformers.Dinov2Model(transformers.Dinov2Config(mlp_ratio=2, **TINY))
    if name == "dinov2-registers":
        config = transformers.Dinov2WithRegistersConfig(mlp_ratio=2, num_register_tokens=3, **TINY)
        return transformers.Dinov2WithRegistersModel(config)
    if name == "dinov3":
        config = transformers.DINOv3ViTConfig(num_register_tokens=2, **TINY)
        return transformers.DINOv3ViTModel(config)
    if name == "dino":
        return transformers.ViTModel(transformers.ViTConfig(**TINY), add_pooling_layer=False)
    config = transformers.ViTConfig(num_labels=12, **TINY)
    return transformers.ViTForImageClassification(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of tiny models with random weights, by name."""
    root = tmp_path_factory.mktemp("models")

    def save(name):
        path = root / name
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                network = make_network(name)
                for parameter in network.parameters():  # some are initialised to nothing
                    torch.nn.init.normal_(parameter, std=0.3)
            network.save_pretrained(path)
            (path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        return path

    return save


@pytest.fixture
def pair(generator):
    x_0 = torch.rand(3, 1, 8, 8, generator=generator) * 2 - 1
    return x_0, (x_0 + 0.5 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)


DINOS = ["dinov2", "dinov2-registers", "dinov3", "dino"]
REWARDS = [
    (CLIPCosine, "clip"),
    (CLIPCosine, "clip-with-text"),
    (PerceptionEncoderCosine, "classifier"),
    *((DINOPatches, name) for name in DINOS),
]


def network_input(x_0):
    """What the processor's file says, by hand."""
    images = functional.interpolate((x_0 + 1) / 2, SIZE, mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(PROCESSOR[name]).reshape(3, 1, 1) for name in ("image_mean", "image_std")
    )
    return (images.expand(-1, 3, -1, -1) - mean) / std


def cosine(one, two):
    """Along the last axis, by numpy."""
    one, two = one.detach().numpy().astype(np.float64), two.detach().numpy().astype(np.float64)
    return (one * two).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(two, axis=-1)


@pytest.mark.parametrize("name", ["clip", "clip-with-text"])
def test_clip_by_numpy(folder, pair, name):
    network = transformers.CLIPVisionModelWithProjection.from_pretrained(folder(name))
    with torch.no_grad():
        ours, theirs = (network(pixel_values=network_input(x_0)).image_embeds for x_0 in pair)
    values = CLIPCosine(folder(name))(*pair, None)
    # Random networks tell images apart by 1e-3 of the cosine only; float32 is good for 1e-7.
    assert values.tolist() == pytest.approx(cosine(ours, theirs).tolist(), abs=2e-6)
    # Negative control: without the preprocessing it is another number.
    plain = CLIPCosine(folder(name), preprocess=ImageInput(size=SIZE))(*pair, None)
    assert not torch.allclose(1 - values, 1 - plain, rtol=0.03)


@pytest.mark.parametrize(("name", "others"), [("dinov2", 1), ("dinov2-registers", 4), ("dino", 1)])
def test_dino_compares_patch_by_patch(folder, pair, name, others):
    network = transformers.AutoModel.from_pretrained(folder(name))
    with torch.no_grad():
        tokens = [network(pixel_values=network_input(x_0)).last_hidden_state for x_0 in pair]
    assert tokens[0].shape[1] == others + (SIZE // PATCH) ** 2
    wanted = cosine(*(part[:, others:] for part in tokens)).reshape(3, 1, 2, 2)
    reward = DINOPatches(folder(name))
    np.testing.assert_allclose(reward.reward_map(*pair, None).numpy(), wanted, atol=1e-5)
    assert reward(*pair, None).tolist() == pytest.approx(wanted.mean((1, 2, 3)).tolist(), abs=1e-5)


def test_patches_lie_where_the_image_has_them(folder, pair):
    """Registers and the order of patches: the patch that changed scores lowest."""
    for name in DINOS:
        reward = DINOPatches(folder(name))
        for row, column in ((0, 1), (1, 0)):
            changed = pair[0].clone()
            changed[..., 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
            reward_map = reward.reward_map(changed, pair[0], None)[:, 0].flatten(1)
            assert (reward_map.argmin(1) == 2 * row + column).float().mean() > 0.5, name


def test_perception_encoders_compare_the_output_of_the_head(folder, pair):
    network = transformers.ViTForImageClassification.from_pretrained(folder("classifier"))
    with torch.no_grad():
        ours, theirs = (network(pixel_values=network_input(x_0)).logits for x_0 in pair)
    values = PerceptionEncoderCosine(folder("classifier"))(*pair, None)
    assert values.tolist() == pytest.approx(cosine(ours, theirs).tolist(), abs=1e-5)


@pytest.mark.parametrize(("kind", "name"), REWARDS, ids=lambda part: getattr(part, "name", part))
def test_encoders_keep_the_protocol(folder, bank, kind, name):
    reward = kind(folder(name))
    check_reward(reward, TeacherBank(bank.x_T, bank.teacher_x_0), num=3)
    copies = reward(bank.teacher_x_0[:3], bank.teacher_x_0[:3], None)
    assert copies.tolist() == pytest.approx([1] * 3, abs=1e-5)
    assert (reward.nfe, reward.differentiable, reward.has_map) == (2, True, kind is DINOPatches)


def test_a_patch_map_meets_the_samples_grid(folder, pair):
    values, reward_map = evaluate(DINOPatches(folder("dinov2")) * 2.0, *pair, None)
    assert reward_map.shape == pair[0].shape
    torch.testing.assert_close(reward_map.flatten(1).mean(1), values)


def test_networks_are_frozen_and_in_float32(folder):
    reward = CLIPCosine(folder("clip"))
    assert not reward.network.training
    for parameter in reward.network.parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == torch.float32


def test_preprocessing_comes_from_the_source(folder):
    preprocess = DINOPatches(folder("dinov2")).preprocess
    assert preprocess.size == (SIZE, SIZE)
    assert preprocess.mean == tuple(PROCESSOR["image_mean"])
    assert preprocess.std == tuple(PROCESSOR["image_std"])
    assert preprocess.mode == "bicubic"


def test_a_source_without_preprocessing_asks_for_it(folder, tmp_path, pair):
    make_network("clip").save_pretrained(tmp_path / "bare")
    with pytest.raises(RewardModelError, match="pass preprocess=ImageInput"):
        CLIPCosine(tmp_path / "bare")
    reward = CLIPCosine(tmp_path / "bare", preprocess=ImageInput(size=SIZE))
    assert bool(reward(*pair, None).isfinite().all())


def test_another_models_folder_is_refused(folder):
    """Transformers would draw the missing weights at random, and only warn."""
    with pytest.raises(RewardModelError, match=r"it lacks|could be loaded"):
        CLIPCosine(folder("dinov2"))
    with pytest.raises(RewardModelError, match="it lacks"):
        PerceptionEncoderCosine(folder("dino"))


@pytest.mark.parametrize("name", ["clip", "dino", "perception_encoder"])
def test_nothing_downloads_by_default(name, monkeypatch):
    def connect(*arguments):
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(RewardModelError, match=r"run `hf download .*local_files_only=False"):
        make_reward(name)


def test_without_transformers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install redif\[transformers\]"):
        CLIPCosine(folder("clip"))


def timm_folder(path):
    """A Perception Encoder's config as timm's repositories have it, and no weights."""
    path.mkdir()
    config = {
        "architecture": "vit_pe_core_tiny_patch16_384",
        "num_classes": 512,
        "model_args": {},
        "pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "input_size": [3, 384, 384],
            "interpolation": "bicubic",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.skipif(transformers.utils.is_timm_available(), reason="timm is installed")
def test_without_timm_the_extra_is_named(tmp_path):
    with pytest.raises(MissingExtraError, match=r"pip install redif\[timm\]"):
        PerceptionEncoderCosine(timm_folder(tmp_path / "pe"))


def test_a_tiny_perception_encoder(tmp_path, pair):
    timm = pytest.importorskip("timm")
    folder = timm_folder(tmp_path / "pe")
    config = transformers.AutoConfig.from_pretrained(folder)
    network = transformers.AutoModelForImageClassification.from_config(config)
    network.save_pretrained(folder)
    assert "pe_core" in timm.list_models("vit_pe_core_tiny*")[0]
    reward = PerceptionEncoderCosine(folder)
    assert reward.preprocess.size == (384, 384)
    copies = reward(pair[0], pair[0], None)
    assert copies.tolist() == pytest.approx([1] * 3, abs=1e-4)
    assert bool((reward(*pair, None) < copies).all())


def test_latents_are_refused(folder):
    with pytest.raises(InvalidArgumentError, match="latents must be decoded first"):
        CLIPCosine(folder("clip"))(torch.zeros(2, 4, 8, 8), torch.zeros(2, 4, 8, 8), None)
