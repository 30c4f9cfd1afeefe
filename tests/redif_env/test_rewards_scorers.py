"""Teacher-free scores: tiny models of the real classes, saved and loaded; graphs and functions."""

from __future__ import annotations

import importlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from redif_env import MSE
from redif_env.errors import InvalidArgumentError, MissingExtraError
from redif_env.rewards import (
    Aesthetic,
    CLIPScore,
    Function,
    Label,
    Logit,
    LogProbability,
    Onnx,
    evaluate,
)
from redif_env.rewards.scorers import as_images, as_pil, clip_pixels

PROMPTS = ["a one", "an odd two", "three"]
FEATURES = 12


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def clip_folder(transformers, tmp_path_factory):
    """A random CLIP model of a few thousand weights, with tokenizer and preprocessor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    width = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**width, **ends, "num_hidden_layers": 1, "vocab_size": len(tokens)}
    config = transformers.CLIPConfig(
        text_config={**text, "max_position_embeddings": 12, "pad_token_id": ends["eos_token_id"]},
        vision_config={**width, "num_hidden_layers": 1, "image_size": 16, "patch_size": 8},
        projection_dim=FEATURES,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config)
        for parameter in model.parameters():  # the usual start of 0.02 makes all images alike
            nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = pil_processor(transformers)(size={"shortest_edge": 16}, crop_size=16)
    processor.save_pretrained(folder)
    return folder


def pil_processor(transformers):
    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


@pytest.fixture
def images(generator):
    """Six smooth grey images in [-1, 1], 24 x 20."""
    coarse = torch.rand(6, 1, 6, 5, generator=generator) * 2 - 1
    return nn.functional.interpolate(coarse, (24, 20), mode="bilinear")


def score(reward, x_0, condition=None):
    return reward(x_0, torch.zeros_like(x_0), condition)


def processed(transformers, folder, x_0):
    processor = pil_processor(transformers).from_pretrained(folder)
    return processor(images=as_pil(x_0), return_tensors="pt").pixel_values


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_processors(transformers, clip_folder, images, channels):
    x_0 = images if channels == 1 else torch.cat([images, -images, 0.5 * images], 1)
    wanted = processed(transformers, clip_folder, x_0)
    settings = pil_processor(transformers).from_pretrained(clip_folder)
    ours = clip_pixels(as_images(x_0), 16, settings.image_mean, settings.image_std)
    # The processor rounds to 1/255 before and after resizing; a std of 0.26 makes 0.015 of it.
    torch.testing.assert_close(ours, wanted, atol=0.04, rtol=0)
    wrong = clip_pixels(x_0.expand(-1, 3, -1, -1), 16, settings.image_mean, settings.image_std)
    assert float((wrong - wanted).abs().max()) > 0.5  # images squeezed or not in [0, 1]


def test_the_score_is_transformers_cosine(transformers, clip_folder, images):
    condition = torch.tensor([0, 1, 2, 0, 1, 2])
    scores = score(CLIPScore(clip_folder, PROMPTS), images, condition)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(pixel_values=processed(transformers, clip_folder, images), **tokens)
    cosines = output.logits_per_image / model.logit_scale.detach().exp()
    wanted = cosines[torch.arange(6), condition]
    torch.testing.assert_close(scores, wanted, atol=0.02, rtol=0)  # 8-bit rounding, see above
    assert float(cosines.std()) > 0.05
    rotated = score(CLIPScore(clip_folder, [*PROMPTS[1:], PROMPTS[0]]), images, condition)
    assert not torch.allclose(rotated, wanted, atol=0.05)


def test_prompts_are_chosen_by_class(clip_folder, images):
    reward = CLIPScore(clip_folder, PROMPTS)
    by_class = [score(reward, images, torch.full((6,), c)) for c in range(3)]
    for index, prompt in enumerate(PROMPTS):
        alone = score(CLIPScore(clip_folder, [prompt]), images)
        torch.testing.assert_close(alone, by_class[index])
    for row in range(6):
        one = score(reward, images[row : row + 1], torch.tensor([1]))
        torch.testing.assert_close(one[0], by_class[1][row])
    assert not score(reward, images.requires_grad_(), torch.zeros(6).long()).requires_grad


def test_padding_does_not_change_a_prompt(clip_folder, images):
    """A long neighbour pads the short prompt."""
    alone = score(CLIPScore(clip_folder, ["a"]), images)
    padded = CLIPScore(clip_folder, ["a", "abcdefghij"])
    torch.testing.assert_close(score(padded, images, torch.zeros(6).long()), alone)


def test_long_prompts_are_cut(clip_folder, images):
    assert score(CLIPScore(clip_folder, ["abc " * 30]), images).shape == (6,)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_the_head_by_hand(clip_folder, images, tmp_path, generator, activation):
    """Names as in LAION's files, where dropout takes every other number."""
    # Of 32 hidden units some are alive whatever the random encoder gives.
    w, b = torch.randn(32, FEATURES, generator=generator), torch.randn(32, generator=generator)
    w2, b2 = torch.randn(1, 32, generator=generator), torch.randn(1, generator=generator)
    names = ("layers.10.weight", "layers.10.bias", "layers.2.weight", "layers.2.bias")
    save_file(dict(zip(names, (w2, b2, w, b), strict=True)), tmp_path / "head.safetensors")
    reward = Aesthetic(clip_folder, tmp_path / "head.safetensors", activation)
    with torch.no_grad():
        features = reward.image_features(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    hidden = features @ w.T + b
    hidden = hidden.relu() if activation == "relu" else hidden
    wanted = (hidden @ w2.T + b2)[:, 0]
    torch.testing.assert_close(score(reward, images), wanted)
    assert float(wanted.std()) > 0


def test_a_linear_head(clip_folder, images, tmp_path, generator):
    w, b = torch.randn(1, FEATURES, generator=generator), torch.tensor([5.0])
    save_file({"weight": w, "bias": b}, tmp_path / "head.safetensors")
    reward = Aesthetic(clip_folder, tmp_path / "head.safetensors")
    with torch.no_grad():
        wanted = reward.image_features(images) @ w[0] + 5
    torch.testing.assert_close(score(reward, images), wanted)


@pytest.mark.parametrize(
    "tensors",
    [
        {"weight": torch.zeros(1, FEATURES)},
        {"weight": torch.zeros(1, FEATURES + 1), "bias": torch.zeros(1)},
        {"weight": torch.zeros(2, FEATURES), "bias": torch.zeros(2)},
        {"scale": torch.zeros(3)},
    ],
)
def test_heads_that_do_not_fit(clip_folder, tmp_path, tensors):
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(InvalidArgumentError, match="head="):
        Aesthetic(clip_folder, tmp_path / "head.safetensors")


def test_files_that_are_not_there(clip_folder, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"source=.*CLIPModel"):
        CLIPScore(tmp_path / "nothing", PROMPTS)
    with pytest.raises(InvalidArgumentError, match=r"head=.*could not be read"):
        Aesthetic(clip_folder, tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_text("no tensors")
    with pytest.raises(InvalidArgumentError, match=r"head=.*could not be read"):
        Aesthetic(clip_folder, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidArgumentError, match="activation='gelu'"):
        Aesthetic(clip_folder, tmp_path / "bad.safetensors", "gelu")


def test_a_model_without_all_its_weights_is_refused(clip_folder, tmp_path):
    """Transformers would fill in random ones, others at every start, and only warn."""
    shutil.copytree(clip_folder, folder := tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "vision" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    for make in (lambda: CLIPScore(folder, PROMPTS), lambda: Aesthetic(folder, tmp_path / "head")):
        with pytest.raises(InvalidArgumentError, match=r"source=.*lacks 'vi"):
            make()


@pytest.mark.parametrize("prompts", ["a one", [], [1, 2], None])
def test_prompts_are_a_list(tmp_path, prompts):
    with pytest.raises(InvalidArgumentError, match="prompts="):
        CLIPScore(tmp_path, prompts)


def test_every_class_has_a_prompt(clip_folder, images):
    reward = CLIPScore(clip_folder, PROMPTS)
    with pytest.raises(InvalidArgumentError, match=r"prompts='3 prompts'.*class 3"):
        score(reward, images, torch.tensor([0, 1, 2, 3, 0, 0]))
    with pytest.raises(InvalidArgumentError, match=r"condition=None.*one prompt"):
        score(reward, images)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 64), (2, 2, 8, 8)])
def test_only_images_have_features(clip_folder, shape):
    with pytest.raises(InvalidArgumentError, match=r"x_0=.*decode latents first"):
        score(CLIPScore(clip_folder, ["a"]), torch.zeros(shape))


def test_nan_reaches_the_score(clip_folder, images):
    images[1, 0, 3, 3] = torch.nan
    scores = score(CLIPScore(clip_folder, ["a"]), images)
    assert scores.isnan().tolist() == [False, True, False, False, False, False]


# --- classifiers ---


class Pixels(nn.Module):
    """Logits that are the first three pixels."""

    def forward(self, images):
        return images.flatten(1)[:, :3]


def test_log_probability_and_log_odds_by_hand():
    logits = torch.tensor([[0.0, 0.0, math.log(2)], [1.0, 2.0, 3.0]]).reshape(2, 1, 1, 3)
    condition = torch.tensor([2, 0])
    rest = math.exp(2) + math.exp(3)
    assert score(LogProbability(Pixels()), logits, condition).tolist() == pytest.approx(
        [math.log(0.5), 1 - math.log(math.e + rest)]
    )
    assert score(Logit(Pixels()), logits, condition).tolist() == pytest.approx(
        [0.0, 1 - math.log(rest)], abs=1e-6
    )


def test_log_odds_follow_from_the_probability(generator):
    x_0 = torch.randn(20, 1, 1, 3, generator=generator)
    condition = torch.arange(20) % 3
    log_p = score(LogProbability(Pixels()), x_0, condition)
    odds = score(Logit(Pixels()), x_0, condition)
    torch.testing.assert_close(odds, log_p - torch.log1p(-log_p.exp()), rtol=1e-4, atol=1e-5)
    shifted = score(Logit(Pixels()), x_0 + 5, condition)
    torch.testing.assert_close(shifted, odds, rtol=1e-4, atol=1e-5)
    label = score(Label(Pixels()), x_0, condition)
    assert bool((log_p[label == 1] > -math.log(3)).all())


def test_only_the_probability_saturates():
    sure, surer = (torch.tensor([[s, 0.0, 0.0]]).reshape(1, 1, 1, 3) for s in (50.0, 100.0))
    first = torch.zeros(1).long()
    assert score(LogProbability(Pixels()), surer, first) == 0
    gain = score(Logit(Pixels()), surer, first) - score(Logit(Pixels()), sure, first)
    assert float(gain) == pytest.approx(50)


@pytest.mark.parametrize("kind", [Logit, LogProbability])
def test_classifier_scores_report_nan_and_missing_classes(kind):
    x_0 = torch.full((2, 1, 1, 3), torch.nan)
    assert score(kind(Pixels()), x_0, torch.zeros(2).long()).isnan().all()
    with pytest.raises(InvalidArgumentError, match=f"condition=None.*{kind.__name__} needs"):
        score(kind(Pixels()), x_0)


# --- ONNX ---


@pytest.fixture(scope="module")
def make_graph(tmp_path_factory):
    """Writes a graph of the mean of each sample, plus the class if it takes one."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper

    folder = tmp_path_factory.mktemp("onnx")

    def make(classes=False, keepdims=0, rows="N", inputs=1):
        image = ("x_0", TensorProto.FLOAT, [rows, 1, 8, 8])
        given = [image] + [("condition", TensorProto.INT64, [rows])] * classes
        given += [(f"extra{i}", TensorProto.FLOAT, [rows]) for i in range(inputs - len(given))]
        axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
        nodes = [
            helper.make_node("ReduceMean", ["x_0", "axes"], ["mean"], keepdims=0),
            helper.make_node("Cast", ["condition"], ["float"], to=TensorProto.FLOAT),
            helper.make_node("Add", ["mean", "float"], ["score"]),
        ]
        if not classes:
            nodes = [helper.make_node("ReduceMean", ["x_0", "axes"], ["score"], keepdims=keepdims)]
        shape = [rows, 1, 1, 1] if keepdims else [rows]
        graph = helper.make_graph(
            nodes,
            "mean",
            [helper.make_tensor_value_info(*each) for each in given],
            [helper.make_tensor_value_info("score", TensorProto.FLOAT, shape)],
            [axes],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 10
        path = folder / f"{classes}-{keepdims}-{rows}-{inputs}.onnx"
        onnx.save(model, path)
        return path

    return make


def test_a_graph_scores(make_graph, bank):
    x_0, condition = bank.teacher_x_0, bank.condition
    torch.testing.assert_close(score(Onnx(make_graph()), x_0, condition), x_0.mean((1, 2, 3)))
    torch.testing.assert_close(score(Onnx(make_graph()), x_0), x_0.mean((1, 2, 3)))
    scores = score(Onnx(make_graph(classes=True)), x_0, condition)
    torch.testing.assert_close(scores, x_0.mean((1, 2, 3)) + condition)
    assert not score(Onnx(make_graph()), x_0.clone().requires_grad_()).requires_grad


def test_graphs_that_do_not_fit(make_graph, bank, tmp_path):
    x_0 = bank.teacher_x_0
    with pytest.raises(InvalidArgumentError, match=r"path=.*cannot load"):
        Onnx(tmp_path / "nothing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(InvalidArgumentError, match=r"path=.*cannot load"):
        Onnx(tmp_path / "bad.onnx")
    with pytest.raises(InvalidArgumentError, match=r"path=\['x_0', 'extra0', 'extra1'\]"):
        Onnx(make_graph(inputs=3))
    with pytest.raises(InvalidArgumentError, match="condition=None"):
        score(Onnx(make_graph(classes=True)), x_0)
    with pytest.raises(InvalidArgumentError, match=r"x_0=\(32, 1, 8, 8\).*refuses"):
        score(Onnx(make_graph(rows=4)), x_0)
    with pytest.raises(InvalidArgumentError, match=r"\(32, 1, 1, 1\).*32 numbers"):
        score(Onnx(make_graph(keepdims=1)), x_0)


# --- functions ---


def test_a_function_of_tensors(bank):
    x_0, condition = bank.teacher_x_0, bank.condition

    def brightness(samples, classes):
        return samples.mean((1, 2, 3)) + classes

    reward = Function(brightness)
    torch.testing.assert_close(score(reward, x_0, condition), x_0.mean((1, 2, 3)) + condition)
    assert reward.name == "brightness"
    assert Function(lambda x, c: x, name="mine").name == "mine"
    values, _ = evaluate(MSE() + 0.5 * reward, x_0, x_0, condition)
    torch.testing.assert_close(values, 0.5 * (x_0.mean((1, 2, 3)) + condition))


@pytest.mark.parametrize("convert", [list, np.asarray, lambda v: np.asarray(v)[:, None]])
def test_what_a_function_may_return(bank, convert):
    reward = Function(lambda x, c: convert([float(i) for i in range(len(x))]))
    assert score(reward, bank.x_T).tolist() == list(range(32))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_function_of_pictures(generator, channels):
    x_0 = torch.rand(4, channels, 5, 7, generator=generator) * 2.4 - 1.2

    def first(pictures, condition):
        assert all(picture.mode == "RGB" and picture.size == (7, 5) for picture in pictures)
        return [picture.getpixel((6, 2))[-1] for picture in pictures]

    scores = score(Function(first, "pil"), x_0)
    wanted = ((x_0[:, -1, 2, 6].clamp(-1, 1) + 1) * 127.5).round()
    assert scores.tolist() == wanted.tolist()


@pytest.mark.parametrize("value", [None, 3.0, "many", [1.0] * 31, torch.zeros(32, 2), [None] * 32])
def test_what_a_function_may_not_return(bank, value):
    with pytest.raises(InvalidArgumentError, match=r"scores of f=.*32 numbers"):
        score(Function(lambda x, c: value, name="f"), bank.x_T)


def test_bad_functions():
    with pytest.raises(InvalidArgumentError, match="function=3"):
        Function(3)
    with pytest.raises(InvalidArgumentError, match="inputs='numpy'"):
        Function(lambda samples, classes: [], "numpy")
    for takes_one in (len, nn.Identity(), lambda samples: samples):
        with pytest.raises(InvalidArgumentError, match="two arguments"):
            Function(takes_one)


@pytest.mark.parametrize(
    ("package", "extra", "make"),
    [
        ("transformers", "transformers", lambda: CLIPScore("folder", ["a"])),
        ("onnxruntime", "onnx", lambda: Onnx("graph.onnx")),
    ],
)
def test_extras_are_named(monkeypatch, package, extra, make):
    real = importlib.import_module

    def without(name, *rest):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=rf"{package}.*redif\[{extra}\]"):
        make()
