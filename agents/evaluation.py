"""Judging samples: a classifier whose features and labels no reward ever sees, and distances."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from redif_env.errors import TeacherFolderError, check_integer, check_number
from redif_env.teacher import TeacherBank
from redif_env.untrusted import check_folder, check_room, read_json

from . import frechet

JUDGE_FOLDER = "judge"
CHUNK = 2048  # images at once: a whole data set would not fit into memory


class Judge(nn.Module):
    """A small image classifier, and whitened features for the Frechet distance.

    Args:
        in_channels: Channels of the images.
        sample_size: Height and width of the images.
        num_classes: Number of classes.
        num_features: Length of the feature vector.
        num_halvings: Times that height and width are halved: two bring 28 to 7.
    """

    def __init__(
        self,
        in_channels: int = 1,
        sample_size: int = 8,
        num_classes: int = 10,
        num_features: int = 32,
        num_halvings: int = 1,
    ) -> None:
        super().__init__()
        for name in ("in_channels", "sample_size", "num_classes", "num_features", "num_halvings"):
            check_integer(name, locals()[name], 1)
        check_number("num_halvings", num_halvings, 1, 16)
        self.config = {
            "in_channels": in_channels,
            "sample_size": sample_size,
            "num_classes": num_classes,
            "num_features": num_features,
            "num_halvings": num_halvings,
        }
        widths, side = [in_channels, 32, 32, *(num_halvings - 1) * [64]], sample_size
        layers: list[nn.Module] = []
        for i, (width, wider) in enumerate(itertools.pairwise(widths)):
            stride = 2 if i else 1
            layers += [nn.Conv2d(width, wider, 3, stride=stride, padding=1), nn.SiLU()]
            side = math.ceil(side / stride)
        self.body = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(widths[-1] * side**2, num_features),
        )
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes))
        self.feature_mean: Tensor
        self.whitening: Tensor
        self.register_buffer("feature_mean", torch.zeros(num_features))
        self.register_buffer("whitening", torch.eye(num_features))

    @property
    def num_features(self) -> int:
        """Length of the feature vector, as torchmetrics asks for it."""
        return self.config["num_features"]

    def forward(self, images: Tensor) -> Tensor:
        """Whitened features, float32 `(N, num_features)`, of images `(N, C, H, W)` in [-1, 1]."""
        return (self.body(images) - self.feature_mean) @ self.whitening

    def logits(self, images: Tensor) -> Tensor:
        """Class scores, float32 `(N, num_classes)`."""
        return self.head(self.body(images))

    @torch.no_grad()
    def fit_whitening(self, images: Tensor) -> None:
        """Set the whitening so that the features of `images` have mean 0 and covariance I."""
        features = _in_chunks(self.body, images).double()
        values, vectors = torch.linalg.eigh(features.T.cov())
        self.feature_mean.copy_(features.mean(0))
        self.whitening.copy_(vectors / values.clamp_min(1e-6).sqrt())

    def save(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` to `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: str | Path) -> Judge:
        """Load a judge that `save` wrote, in evaluation mode.

        Raises:
            TeacherFolderError: if the folder is missing or damaged.
        """
        folder = Path(folder)
        try:
            if not folder.is_dir():
                raise ValueError("there is no such folder")
            check_folder(folder, "judge")
            config = read_json(folder / "config.json", "judge")
            state = load_file(folder / "model.safetensors")
            check_room(lambda: cls(**config), folder)
            judge = cls(**config)
            judge.load_state_dict(state)
        except TeacherFolderError:
            raise
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise TeacherFolderError(
                "judge", str(folder), f"the judge could not be read ({error}); restore the folder."
            ) from error
        return judge.eval().requires_grad_(False)


def _in_chunks(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in images.split(CHUNK)])


@torch.no_grad()
def frechet_distance(judge: Judge, samples: Tensor, reference: Tensor) -> float:
    """Frechet distance (Heusel et al. 2017, eq. 6) between whitened judge features.

    Args:
        judge: Whose features to use.
        samples: Images `(N, C, H, W)` in [-1, 1].
        reference: Images `(M, C, H, W)` in [-1, 1].
    """
    sides = (frechet.moments(_in_chunks(judge, images)) for images in (samples, reference))
    return float(frechet.distance(*sides))


@torch.no_grad()
def label_agreement(judge: Judge, samples: Tensor, condition: Tensor) -> float:
    """Fraction of `samples` `(N, C, H, W)` that the judge gives the class in `condition` `(N,)`."""
    return float((_in_chunks(judge.logits, samples).argmax(1) == condition).float().mean())


def compare(
    samples: Tensor, bank: TeacherBank, reference: TeacherBank, judge: Judge | None
) -> dict[str, float | None]:
    """The figures of a report.

    Args:
        samples: `x_0` for the bank's tasks, `(N, *latent_shape)`.
        bank: Held-out tasks.
        reference: Other tasks of the same teacher. The Frechet distance is to its answers to
            *other* noise, so that sharing noise with the teacher gives no advantage.
        judge: None leaves `frechet` and `label_agreement` empty.

    Returns:
        `paired_mse`, `frechet` and `label_agreement`.
    """
    agreement = distance = None
    if judge is not None:
        distance = frechet_distance(judge, samples, reference.teacher_x_0)
        if bank.condition is not None:
            agreement = label_agreement(judge, samples, bank.condition)
    return {
        "paired_mse": float((samples - bank.teacher_x_0).square().mean()),
        "frechet": distance,
        "label_agreement": agreement,
    }
