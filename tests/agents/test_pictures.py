"""Pictures: the right samples, in the right places."""

from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import torch

from agents import pictures


@pytest.fixture
def drawn(monkeypatch) -> list[np.ndarray]:
    """The images that `imshow` was asked for, in order."""
    from matplotlib.axes import Axes

    seen: list[np.ndarray] = []
    original = Axes.imshow

    def imshow(self, image, *args, **kwargs):
        seen.append(np.asarray(image))
        return original(self, image, *args, **kwargs)

    monkeypatch.setattr(Axes, "imshow", imshow)
    return seen


def levels(num: int) -> torch.Tensor:
    """Image i is of one grey, (i + 1) / 32 of white."""
    grey = 2 * (torch.arange(num) + 1) / 32 - 1
    return grey.reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def tasks_of(images: list[np.ndarray]) -> list[int]:
    return [round(float(image[0, 0, 0]) / 255 * 32) - 1 for image in images]


def test_one_column_a_class_the_first_task_of_each(tmp_path, drawn):
    condition = torch.tensor([3, 3, 0, 1, 0, 3])
    rows = {"teacher": levels(6), "student": levels(6).flip(0)}
    pictures.save_samples(tmp_path / "samples.png", rows, condition)
    # classes 0, 1 and 3 first occur at tasks 2, 3 and 0; the second row is in reverse
    assert tasks_of(drawn) == [2, 3, 0, 3, 2, 5]
    written = matplotlib.image.imread(tmp_path / "samples.png")
    assert written.ndim == 3
    assert min(written.shape[:2]) > 100
    assert written[..., :3].std() > 0.05  # something was drawn
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]  # nothing temporary


def test_without_classes_the_first_ten_are_shown(tmp_path, drawn):
    pictures.save_samples(tmp_path / "samples.png", {"student": levels(13)}, None)
    assert tasks_of(drawn) == list(range(10))


def test_a_few_samples_are_enough(tmp_path, drawn):
    pictures.save_samples(tmp_path / "samples.png", {"student": levels(2)}, None)
    assert tasks_of(drawn) == [0, 1]


def test_latents_that_are_no_images_are_passed_over(tmp_path):
    pictures.save_samples(tmp_path / "samples.png", {"student": torch.zeros(5, 7)}, None)
    assert not list(tmp_path.iterdir())
