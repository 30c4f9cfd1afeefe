"""The standard Inception features: what is refused, and what the network is given."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torchmetrics.image import fid

from agents.inception import load_inception
from redif_env.errors import MissingExtraError, RewardModelError


class Recorder(nn.Module):
    """In the network's place: pixels as features; it wants weights named `scale`."""

    def __init__(self, name, features, path):
        super().__init__()
        assert features == ["2048"]
        self.scale = nn.Parameter(torch.ones(1))
        self.load_state_dict(torch.load(path))
        self.use_antialias = True

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert not self.use_antialias  # as in the original code
        assert images.shape[1] == 3
        return self.scale * images.flatten(1)


@pytest.fixture
def with_fidelity(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setattr(fid, "NoTrainInceptionV3", Recorder)


def test_images_become_bytes_of_three_channels(tmp_path, with_fidelity):
    torch.save({"scale": torch.tensor([2.0])}, tmp_path / "weights.pth")
    features = load_inception(tmp_path / "weights.pth")
    images = torch.tensor([-1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 2, 2)
    assert features(images).tolist() == [[0, 256, 510, 510] * 3]
    many = torch.rand(150, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(features(many)[149:], features(many[149:]))
    assert not features(many).requires_grad


def test_what_is_missing_is_a_typed_error(tmp_path, monkeypatch):
    with pytest.raises(RewardModelError, match="no such file"):
        load_inception(tmp_path / "weights.pth")
    torch.save({"scale": torch.ones(1)}, tmp_path / "weights.pth")
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(MissingExtraError, match=r"redif\[fid\]"):
        load_inception(tmp_path / "weights.pth")


def test_other_weights_and_pickles_are_refused(tmp_path, with_fidelity):
    torch.save({"colour": torch.ones(1)}, tmp_path / "other.pth")
    torch.save({"scale": Recorder}, tmp_path / "pickle.pth")
    (tmp_path / "broken.pth").write_bytes(b"PK")
    for name in ("other", "pickle", "broken"):
        with pytest.raises(RewardModelError, match="nothing is downloaded"):
            load_inception(tmp_path / f"{name}.pth")
