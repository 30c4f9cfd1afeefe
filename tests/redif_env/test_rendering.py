"""Pictures: values, colours and layout."""

import numpy as np
import pytest
import torch

from redif_env.errors import InvalidArgumentError
from redif_env.rendering import GAP, MIN_SIDE, frames, to_rgb


def test_values():
    images = torch.tensor([[[[-1.0, 1.0, 0.0, -7.0, 7.0, 0.5]]]])
    assert to_rgb(images)[0, 0, :, 0].tolist() == [0, 255, 128, 0, 255, 191]


def test_one_or_two_channels_are_grey():
    for channels in (1, 2):
        images = torch.rand(2, channels, 3, 4)
        pixels = to_rgb(images)
        assert pixels.shape == (2, 3, 4, 3)
        assert pixels.dtype == np.uint8
        assert (pixels == pixels[..., :1]).all()
        assert np.array_equal(pixels, to_rgb(images[:, :1]))


@pytest.mark.parametrize("channels", [3, 4])
def test_more_channels_are_red_green_and_blue(channels):
    images = -torch.ones(1, channels, 1, 2)
    images[0, 0, 0, 0] = images[0, 2, 0, 1] = 1
    assert to_rgb(images).tolist() == [[[[255, 0, 0], [0, 0, 255]]]]


@pytest.mark.parametrize(("side", "scale"), [(8, 12), (32, 3), (96, 1), (100, 1), (50, 2)])
def test_small_images_are_enlarged_by_whole_factors(side, scale):
    assert side * scale >= MIN_SIDE
    (picture,) = frames(*[torch.zeros(1, 1, side, side)] * 3)
    assert picture.shape == (side * scale, 3 * side * scale + 2 * GAP, 3)


def test_panels_are_side_by_side():
    panels = [torch.full((2, 1, 96, 96), value) for value in (-1.0, 0.0, 1.0)]
    pictures = frames(*panels)
    assert pictures.shape == (2, 96, 3 * 96 + 2 * GAP, 3)
    row = pictures[1, 40, :, 1]
    assert row[[0, 95]].tolist() == [0, 0]
    assert row[96 : 96 + GAP].tolist() == [255] * GAP
    assert row[[96 + GAP, 96 + GAP + 95]].tolist() == [128, 128]
    assert row[-1] == 255


def test_enlarged_pixels_stay_square():
    image = torch.tensor([[-1.0, 1.0], [0.0, -1.0]])[None, None]
    (picture,) = frames(image, image, image)
    blocks = picture[:96, :96, 0].reshape(2, 48, 2, 48)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert blocks[:, 0, :, 0].tolist() == [[0, 255], [128, 0]]


@pytest.mark.parametrize("shape", [(2, 6), (2, 1, 2, 3, 4)])
def test_what_is_no_image_cannot_be_drawn(shape):
    with pytest.raises(InvalidArgumentError, match=r"latent_shape=\(.*can be drawn\."):
        to_rgb(torch.zeros(shape))
