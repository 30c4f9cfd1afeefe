"""Blind rewards: sizes by the standard of Deflate, labels by hand, and the algebra of sums."""

from __future__ import annotations

import zlib

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from tripwire import arm, count_reads, disarm

from redif_env import MSE, CompressedSize, Label, ReDiFVectorEnv
from redif_env.errors import InvalidArgumentError, InvalidRewardError
from redif_env.rendering import to_rgb
from redif_env.rewards import evaluate, make_reward


def size(x_0):
    return CompressedSize()(x_0, x_0, None)


class Pixels(nn.Module):
    """Logits that are the first `num` pixels: the label is the brightest of them."""

    def __init__(self, num=3):
        super().__init__()
        self.num = num
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.flatten(1)[:, : self.num]


class Constant(nn.Module):
    """Returns what it is told to."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, images):
        return self.value


@pytest.fixture
def images(generator):
    """Five images in [-1, 1] of 2 channels: noise, of ever more equal pixels."""
    x_0 = torch.rand(5, 2, 8, 12, generator=generator) * 2 - 1
    for row in range(5):
        x_0[row].flatten()[: 48 * row] = -1
    return x_0


def test_incompressible_bytes_are_stored(images):
    """RFC 1950 and 1951: 2 bytes of header, 5 of a stored block, the bytes, 4 of check sum."""
    assert size(images)[0] == -(2 * 8 * 12 + 11)


def test_a_uniform_image_is_a_few_bytes():
    """Two literals (8 bits each), one match (at most 8 + 5 + 5) and the block's ends (3 + 7)."""
    sizes = size(torch.full((1, 1, 8, 8), 0.3))
    assert -12 <= float(sizes) <= -11


def test_pixels_by_hand(monkeypatch):
    """-1, 0, 1 are 0, 127.5 (to even: 128) and 255; what lies beyond is clipped."""
    seen = []
    monkeypatch.setattr(zlib, "compress", lambda data, level: seen.append(data) or data)
    rows = [[-1.0, -7.0, 0.0], [1.0, 7.0, 2 / 255]], [[-0.5, 0.5, 0.999], [-0.999, 0.002, -0.002]]
    assert size(torch.tensor(rows).reshape(2, 1, 2, 3)).tolist() == [-6, -6]
    assert seen == [bytes([0, 0, 128, 255, 255, 128]), bytes([64, 191, 255, 0, 128, 127])]


def test_channels_follow_each_other(images):
    pixels = [to_rgb(images[:, [channel]])[..., 0] for channel in (0, 1)]
    for row in range(5):
        planes = b"".join(plane[row].tobytes() for plane in pixels)
        assert float(size(images)[row]) == -len(zlib.compress(planes, 9))


def test_emptier_images_score_higher(images):
    assert bool((size(images).diff() > 0).all())
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    noisy = images + 0.1 * noise
    assert bool((size(noisy)[1:] < size(images)[1:]).all())


def test_it_is_blind(images):
    """Less than half a level of grey changes nothing, and no gradient arrives."""
    levels = torch.arange(192).reshape(1, 2, 8, 12) / 127.5 - 1
    assert size(levels + 0.4 / 127.5) == size(levels)
    free = images.clone().requires_grad_()
    assert not size(free).requires_grad


@pytest.mark.parametrize("reward", [CompressedSize(), Label(Pixels())], ids=["size", "label"])
def test_rows_do_not_influence_each_other(images, reward):
    condition = torch.tensor([0, 1, 2, 0, 1])
    together = reward(images, images, condition)
    for row in range(5):
        alone = slice(row, row + 1)
        assert reward(images[alone], images[alone], condition[alone]) == together[row]
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.equal(reward(images[order], images[order], condition[order]), together[order])


class CountTransfers(TorchFunctionMode):
    """Counts copies to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.Tensor.cpu
        return func(*args, **(kwargs or {}))


def test_a_batch_goes_to_the_host_once(images):
    with CountTransfers() as transfers:
        size(images)
    assert transfers.count == 1


def test_labels_stay_on_the_device(images):
    with count_reads() as reads:
        scores = Label(Pixels())(arm(images), arm(images), arm(torch.zeros(5, dtype=torch.int64)))
    assert disarm(scores).shape == (5,)
    assert reads[0] == 1  # whether there is a logit for every class


def test_labels_by_hand():
    x_0 = torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.9, 0.1, 0.0], [0, 0.1, 0.2]])
    scores = Label(Pixels())(x_0.reshape(4, 1, 1, 3), x_0, torch.tensor([0, 1, 1, 2]))
    assert scores.tolist() == [1, 1, 0, 1]
    assert scores.dtype == torch.float32


def test_the_classifier_is_a_frozen_copy_in_evaluation_mode(generator):
    x_0 = torch.randn(20, 1, 1, 3, generator=generator)
    condition = x_0.flatten(1).argmax(1)
    classifier = nn.Sequential(nn.Dropout(0.5), Pixels()).train()
    reward = Label(classifier)
    assert reward(x_0, x_0, condition).tolist() == [1] * 20  # with dropout some would be 0
    assert classifier.training
    assert bool((classifier(x_0).argmax(1) != condition).any())
    with torch.no_grad():
        classifier[1].scale.fill_(-1)  # the original is trained on
    assert reward(x_0, x_0, condition).tolist() == [1] * 20
    assert Label(classifier)(x_0, x_0, condition).tolist() == [0] * 20
    assert classifier[1].scale.requires_grad
    assert not any(p.requires_grad for p in reward.classifier.parameters())
    assert not reward(x_0.requires_grad_(), x_0, condition).requires_grad


@pytest.mark.parametrize("reward", [CompressedSize(), Label(Pixels())], ids=["size", "label"])
def test_nan_is_not_hidden(images, reward):
    """An argmax of NaN is a class, and NaN has a byte."""
    images[2, 0, 0, 1] = torch.nan
    scores = reward(images, images, torch.ones(5, dtype=torch.int64))
    assert scores.isnan().tolist() == [False, False, True, False, False]


def test_the_environment_reports_nan(teacher, bank):
    broken = Label(Constant(torch.full((3, 10), torch.nan)))
    env = ReDiFVectorEnv(3, teacher, reward=broken, schedule=[500], bank=bank)
    env.reset(seed=0)
    with pytest.raises(InvalidRewardError, match="label"):
        env.step(torch.zeros(3, 64))


@pytest.mark.parametrize("blind", [CompressedSize(), Label(Pixels())], ids=["size", "label"])
def test_sums_count_them_the_same_everywhere(images, blind):
    condition = torch.tensor([0, 1, 2, 0, 1])
    answer = images.flip(0)
    values, reward_map = evaluate(MSE() + 0.1 * blind, images, answer, condition)
    scores = blind(images, answer, condition)
    torch.testing.assert_close(values, MSE()(images, answer, condition) + 0.1 * scores)
    rest = reward_map - MSE().reward_map(images, answer, condition)
    dim = images[0].numel()  # every element answers for all of it
    torch.testing.assert_close(rest, 0.1 * dim * scores[:, None, None, None].expand_as(rest))
    assert float(scores.std()) > 0
    assert not blind.has_map
    assert not (blind + CompressedSize()).has_map


def test_by_name(images):
    reward = make_reward("mse + 0.1*compressed_size")
    assert reward.name == (MSE() + 0.1 * CompressedSize()).name == "1*mse+0.1*compressed_size"
    expected = (MSE() + 0.1 * CompressedSize())(images, 0 * images, None)
    assert torch.equal(reward(images, 0 * images, None), expected)


def test_an_environment_pays_for_bytes(teacher, bank):
    """Noise is taken to an empty picture in row 0 and left as noise in row 1."""
    env = ReDiFVectorEnv(2, teacher, reward="compressed_size", schedule=[500], bank=bank)
    observation, _ = env.reset(seed=0)
    action = observation["latents"].flatten(1).clone()
    action[0] = -1
    _, rewards, _, _, _ = env.step(action)
    assert -12 <= rewards[0] <= -11
    assert rewards[1] < -50


@pytest.mark.parametrize("shape", [(4,), (4, 64), (4, 8, 8), (4, 1, 1, 8, 8)])
def test_only_images_have_a_size(shape):
    with pytest.raises(InvalidArgumentError, match=r"x_0=.*only images"):
        size(torch.zeros(shape))


@pytest.mark.parametrize("classifier", ["net", None, torch.argmax, Pixels])
def test_classifiers_are_modules(classifier):
    with pytest.raises(InvalidArgumentError, match=r"classifier=.*torch\.nn\.Module"):
        Label(classifier)


def test_labels_need_classes(images):
    with pytest.raises(InvalidArgumentError, match=r"condition=None.*class-conditional"):
        Label(Pixels())(images, images, None)


@pytest.mark.parametrize(
    "logits", [torch.zeros(5), torch.zeros(4, 3), torch.zeros(5, 3, 1), {"logits": 0}, None]
)
def test_logits_are_one_row_a_sample(images, logits):
    with pytest.raises(InvalidArgumentError, match=r"classifier\(x_0\)=.*\(5, number of classes\)"):
        Label(Constant(logits))(images, images, torch.zeros(5, dtype=torch.int64))


def test_every_class_has_a_logit(images):
    condition = torch.tensor([0, 1, 3, 0, 1])
    with pytest.raises(InvalidArgumentError, match=r"\(5, 3\).*every class up to 3"):
        Label(Pixels(3))(images, images, condition)
    assert Label(Pixels(4))(images, images, condition).shape == (5,)
