"""Rewards in feature spaces: arithmetic, torchmetrics' LPIPS, and what they refuse."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torchmetrics.functional.image import lpips as reference

from redif_env import MSE, check_reward
from redif_env.errors import InvalidArgumentError, RewardModelError
from redif_env.rewards import LPIPS, Features, ImageInput, evaluate, make_reward, perceptual


class Network(nn.Module):
    """Two convolutions and a head, with a ReLU that works in place, and a layer never used."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(6, 5)
        self.unused = nn.Linear(1, 1)

    def forward(self, images):
        hidden = self.dropout(self.second(self.relu(self.first(images))))
        return self.head(hidden.mean((2, 3)))


class Tokens(nn.Module):
    """Rows of the image as tokens `(N, L, C)`, in a tuple."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(8, 3)

    def forward(self, images):
        return (self.embed(images.flatten(1, 2)), None)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Network()


@pytest.fixture
def pair(generator):
    x_0 = torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1
    return x_0, (x_0 + 0.3 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)


def features(network, x_0):
    """The three layers' outputs, by hand."""
    first = functional.conv2d(x_0, network.first.weight, network.first.bias, padding=1)
    second = network.second(first.relu())
    return {"first": first, "second": second, "": network.head(second.mean((2, 3)))}


def distance(kind, one, two):
    """Distances along axis 1, by numpy."""
    one, two = one.detach().numpy().astype(np.float64), two.detach().numpy().astype(np.float64)
    if kind == "mse":
        return ((one - two) ** 2).mean(1)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return 1 - (one * two).sum(1) / norms


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("layers", ["first", ["second", "first"], ["", "second"]])
def test_features_by_numpy(network, pair, kind, layers):
    names = [layers] if isinstance(layers, str) else layers
    ours, theirs = (features(network, x_0) for x_0 in pair)
    wanted = sum(distance(kind, ours[n], theirs[n]).reshape(4, -1).mean(1) for n in names)
    reward = Features(network, layers, distance=kind, map=False)
    assert reward(*pair, None).tolist() == pytest.approx((-wanted).tolist(), rel=1e-4, abs=1e-6)


def test_the_map_is_the_distance_of_each_place(network, pair):
    reward = Features(network, ["first", "second"])
    ours, theirs = (features(network, x_0) for x_0 in pair)
    fine = distance("mse", ours["first"], theirs["first"])
    coarse = distance("mse", ours["second"], theirs["second"])
    # A place of the second layer, of stride 2, stands for 2x2 of the sample.
    wanted = -(fine + coarse.repeat(2, axis=1).repeat(2, axis=2))
    reward_map = reward.reward_map(*pair, None)
    np.testing.assert_allclose(reward_map[:, 0].numpy(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reward_map.flatten(1).mean(1), reward(*pair, None))


def test_the_map_follows_a_local_change(network, pair):
    """Changing one corner changes the map there, and far from it nothing."""
    changed = pair[1].clone()
    changed[:, :, 0, 0] += 1
    reward_map = Features(network, "first").reward_map(changed, pair[1], None)
    assert bool((reward_map[:, 0, :2, :2] < -1e-4).all())
    assert bool((reward_map[:, 0, 3:, 3:] == 0).all())


def test_tokens_count_by_their_last_axis(pair):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = Tokens()
    reward = Features(network, "", distance="cosine", map=False)
    ours, theirs = (network.embed(x_0.flatten(1, 2)).movedim(2, 1) for x_0 in pair)
    wanted = -distance("cosine", ours, theirs).mean(1)
    assert reward(*pair, None).tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    with pytest.raises(InvalidArgumentError, match="pass map=False"):
        Features(network, "").reward_map(*pair, None)
    with pytest.raises(InvalidArgumentError, match="no map"):
        reward.reward_map(*pair, None)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_features_keep_the_protocol(network, bank, kind):
    reward = Features(network, ["first", "second"], distance=kind)
    check_reward(reward, bank)
    copies = reward(bank.teacher_x_0, bank.teacher_x_0, None)
    assert copies.abs().max() < 1e-6
    assert reward.nfe == 2


def test_preprocessing_comes_first(network, pair):
    reward = Features(network, "first", preprocess=lambda x_0: 3 * x_0)
    tripled = Features(network, "first")(3 * pair[0], 3 * pair[1], None)
    torch.testing.assert_close(reward(*pair, None), tripled)


def test_the_module_is_copied_and_frozen(network, pair):
    network.train()
    reward = Features(network, "second")
    before = reward(*pair, None)
    assert torch.equal(reward(*pair, None), before)  # no dropout
    nn.init.zeros_(network.second.weight)
    assert torch.equal(reward(*pair, None), before)
    assert network.training
    assert not any(p.requires_grad for p in reward.module.parameters())
    assert not reward.module.second._forward_hooks
    assert torch.equal(copy.deepcopy(reward)(*pair, None), before)


def test_a_sum_uses_its_map(network, pair):
    total = MSE() + 0.5 * Features(network, "second", name="style")
    values, reward_map = evaluate(total, *pair, None)
    torch.testing.assert_close(reward_map.flatten(1).mean(1), values)
    assert total.name == "1*mse+0.5*style"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((nn.Conv2d(1, 1, 1), "no such"), "layers='no such'"),
        ((nn.Conv2d(1, 1, 1), []), "layers"),
        ((lambda x_0: x_0, ""), r"pass a torch\.nn\.Module"),
    ],
)
def test_bad_arguments(arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        Features(*arguments)


def test_bad_layers_are_named_when_scoring(network, pair):
    with pytest.raises(InvalidArgumentError, match=r"layers='unused': the network does not reach"):
        Features(network, "unused")(*pair, None)
    with pytest.raises(InvalidArgumentError, match=r"its output is \(64,\)"):
        Features(nn.Flatten(0), "")(pair[0][:1], pair[1][:1], None)
    with pytest.raises(InvalidArgumentError, match="distance"):
        Features(network, "first", distance="l3")


# ImageInput


def test_image_input_by_hand():
    x_0 = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
    images = ImageInput(mean=(0.5, 0.0, 0.25), std=(0.5, 1.0, 0.25))(x_0)
    assert images[0, 0].flatten().tolist() == [-1, 0, 1, 3]
    assert images[0, 1].flatten().tolist() == [0, 0.5, 1, 2]
    assert images[0, 2].flatten().tolist() == [-1, 1, 3, 7]


@pytest.mark.parametrize(("mode", "size"), [("bicubic", 20), ("bilinear", 5), ("bilinear", (6, 9))])
def test_resizing_is_pils(generator, mode, size):
    """PIL's filters on the same floats; it rounds its coefficients, so to 1e-5 of the range."""
    image = pytest.importorskip("PIL.Image")
    x_0 = torch.rand(2, 3, 12, 14, generator=generator) * 2 - 1
    ours = ImageInput((0, 0, 0), (1, 1, 1), size, mode)(x_0)
    width, height = (size, size) if isinstance(size, int) else size[::-1]
    for row in range(2):
        for channel in range(3):
            picture = image.fromarray(((x_0[row, channel] + 1) / 2).numpy())
            wanted = np.asarray(picture.resize((width, height), getattr(image, mode.upper())))
            np.testing.assert_allclose(ours[row, channel].numpy(), wanted, atol=1e-5)


def test_gradients_pass_through_it(pair):
    x_0 = pair[0].clone().requires_grad_()
    ImageInput(size=16)(x_0).sum().backward()
    # Each of 3 channels sums to (16 / 8)^2 pixels, over 2 for the range and 0.5 for std.
    assert float(x_0.grad.mean()) == pytest.approx(3 * 4 / 2 / 0.5, rel=1e-4)


def test_processor_configs_are_read():
    config = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], "resample": 2}
    edge = ImageInput.from_processor({**config, "size": {"shortest_edge": 30}})
    assert (edge.size, edge.mode, edge.mean) == ((30, 30), "bilinear", (0.1, 0.2, 0.3))
    cropped = {"size": 40, "do_center_crop": True, "crop_size": {"height": 28, "width": 26}}
    assert ImageInput.from_processor({**config, **cropped}).size == (28, 26)
    assert ImageInput.from_processor({**config, "size": 40}).size == (40, 40)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "std"),
        ({"std": (0.5, 0.0, 0.5)}, "std"),
        ({"size": 0}, "size"),
        ({"mode": "lanczos"}, "mode"),
    ],
)
def test_bad_settings_of_image_input(arguments, match):
    with pytest.raises(InvalidArgumentError, match=match):
        ImageInput(**arguments)


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (2, 3)])
def test_latents_are_no_images(shape):
    with pytest.raises(InvalidArgumentError, match="latents must be decoded first"):
        ImageInput()(torch.zeros(shape))


# LPIPS


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Random weights of AlexNet and VGG16 as torchvision names them, on disk."""
    folder = tmp_path_factory.mktemp("backbones")
    paths = {}
    for net in ("alex", "vgg"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = perceptual.make_backbone(net)
        state = {f"features.{name}": value for name, value in module.state_dict().items()}
        # The classifier of a whole network is in the file, too.
        state["classifier.1.weight"] = torch.zeros(2, 2)
        paths[net] = folder / f"{net}.pth"
        torch.save(state, paths[net])
        save_file(state, folder / f"{net}.safetensors")
    return paths


@pytest.fixture
def pictures(generator):
    x_0 = torch.rand(3, 3, 40, 36, generator=generator) * 2 - 1
    return x_0, (x_0 + 0.3 * torch.randn(x_0.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_is_torchmetrics(monkeypatch, backbones, pictures, net):
    """torchmetrics's, with its published heads, around the same backbone."""
    reward = LPIPS(backbones[net], net=net)
    newer, older = "_get_tv_model_features", "_get_net"
    loader = newer if hasattr(reference, newer) else older
    monkeypatch.setattr(reference, loader, lambda name, pretrained: copy.deepcopy(reward.module))
    oracle = reference._LPIPS(net=net)
    wanted = -oracle(*pictures).flatten()
    torch.testing.assert_close(reward(*pictures, None), wanted, rtol=1e-4, atol=1e-6)
    # Negative control: not the plain distance of the features.
    plain = Features(reward.module, reward.layers, preprocess=reward.preprocess)
    assert not torch.allclose(plain(*pictures, None), wanted, rtol=0.1)


def test_lpips_keeps_the_protocol(backbones, pictures):
    from redif_env import TeacherBank

    reward = LPIPS(backbones["alex"])
    check_reward(reward, TeacherBank(pictures[0], pictures[1]))
    values, reward_map = evaluate(reward, *pictures, None)
    assert reward_map.shape == pictures[0].shape
    torch.testing.assert_close(reward_map.flatten(1).mean(1), values)
    assert reward(pictures[0], pictures[0], None).tolist() == [0] * 3
    assert bool((values < 0).all())
    assert not LPIPS(backbones["alex"], map=False).has_map


def test_safetensors_will_do(backbones, pictures):
    one = LPIPS(backbones["alex"])(*pictures, None)
    two = LPIPS(backbones["alex"].with_suffix(".safetensors"))(*pictures, None)
    assert torch.equal(one, two)


def test_small_images_need_a_size(backbones, bank):
    pair = bank.teacher_x_0[:2], bank.teacher_x_0[2:4]
    with pytest.raises(InvalidArgumentError, match="pass size=64"):
        LPIPS(backbones["alex"])(*pair, None)
    reward = LPIPS(backbones["alex"], size=64)
    larger = [functional.interpolate(x_0, (64, 64), mode="bilinear") for x_0 in pair]
    plain = LPIPS(backbones["alex"])(*larger, None)
    torch.testing.assert_close(reward(*pair, None), plain, rtol=1e-4, atol=1e-6)


def test_the_smallest_images_pass(backbones):
    for net, size in perceptual.SMALLEST.items():
        reward = LPIPS(backbones[net], net=net)
        black, white = -torch.ones(1, 3, size, size), torch.ones(1, 3, size, size)
        assert float(reward(black, white, None)) < 0


def test_missing_backbones_say_where_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(RewardModelError, match=r"download\.pytorch\.org/models/alexnet"):
        make_reward("lpips")
    with pytest.raises(RewardModelError, match="there is no such file"):
        LPIPS(tmp_path / "no.pth", local_files_only=False)


def test_torchs_own_downloads_are_found(monkeypatch, tmp_path, backbones, pictures):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / perceptual.FILES["alex"]).write_bytes(backbones["alex"].read_bytes())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    found = make_reward("lpips")(*pictures, None)
    assert torch.equal(found, LPIPS(backbones["alex"])(*pictures, None))


def test_wrong_files_are_refused(tmp_path, backbones):
    with pytest.raises(RewardModelError, match="weights of torchvision's vgg"):
        LPIPS(backbones["alex"], net="vgg")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(backbones["alex"].read_bytes()[:1000])
    with pytest.raises(RewardModelError, match="could not be read"):
        LPIPS(damaged)
    with pytest.raises(InvalidArgumentError, match="net"):
        LPIPS(backbones["alex"], net="resnet")
