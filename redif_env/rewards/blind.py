"""Blind rewards: a score of the final sample, with neither gradient nor map."""

from __future__ import annotations

import zlib
from abc import abstractmethod

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from .base import Reward, nan_where_nan, register_reward
from .online import frozen


class CompressedSize(Reward):
    """Minus the size in bytes of each sample, losslessly compressed by zlib at level 9.

    Samples are taken as images in [-1, 1]: clipped, rounded to uint8, and compressed row after row,
    channel after channel, each image alone. An image of B incompressible bytes scores about
    -(B + 11). The teacher's answer does not count, and an empty picture scores best: use it in a
    sum. The pixels of a batch go to the host in one transfer, which waits for the device.
    """

    name = "compressed_size"

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        if x_0.ndim != 4:
            raise InvalidArgumentError(
                "x_0", tuple(x_0.shape), "only images, (N, C, H, W), have a compressed size."
            )
        pixels = ((x_0.detach().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        sizes = [len(zlib.compress(image.tobytes(), 9)) for image in pixels.cpu().numpy()]
        return nan_where_nan(-torch.tensor(sizes, dtype=torch.float32, device=x_0.device), x_0)


class Classifier(Reward):
    """What a classifier makes of the sample's condition.

    Args:
        classifier: Network from images `(N, C, H, W)` to logits `(N, K)`, with a logit for every
            class of the teacher. A copy is kept, frozen, in evaluation mode, and moved to the
            device of the samples: training the original on does not move the reward.

    Raises:
        InvalidArgumentError: if `classifier` is not a module; when scoring, if there is no
            condition, or the logits are not one row a sample or lack a class.
    """

    nfe = 1

    def __init__(self, classifier: nn.Module) -> None:
        if not isinstance(classifier, nn.Module):
            raise InvalidArgumentError(
                "classifier", classifier, "pass a torch.nn.Module from images to logits."
            )
        self.classifier = frozen(classifier)

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        if condition is None:
            name = type(self).__name__
            raise InvalidArgumentError(
                "condition", None, f"{name} needs classes: use a class-conditional teacher."
            )
        logits = self.classifier.to(x_0.device)(x_0)
        _check_logits(logits, condition)
        return self.verdict(logits.float(), condition)

    @abstractmethod
    def verdict(self, logits: Tensor, condition: Tensor) -> Tensor:
        """Float32 `(N,)` of logits `(N, K)` and classes `(N,)`."""


class Label(Classifier):
    """1 where a classifier's most likely class is the condition, else 0; see `Classifier`."""

    def verdict(self, logits: Tensor, condition: Tensor) -> Tensor:
        return nan_where_nan((logits.argmax(1) == condition).float(), logits)


class LogProbability(Classifier):
    """Log-probability of the condition, `log p_c <= 0`: flat once the classifier is sure.

    See `Classifier`.
    """

    def verdict(self, logits: Tensor, condition: Tensor) -> Tensor:
        return _of_class(logits.log_softmax(1), condition)


class Logit(Classifier):
    """Log-odds of the condition, `log p_c - log(1 - p_c)`; it never saturates.

    Unlike the raw logit it does not change when all logits shift. The easiest of the three to
    climb, and to hack: no sample is ever sure enough. See `Classifier`; at least two classes.
    """

    def verdict(self, logits: Tensor, condition: Tensor) -> Tensor:
        own = torch.zeros_like(logits, dtype=torch.bool)
        own[torch.arange(len(logits), device=logits.device), condition] = True
        # From the logits: 1 - p_c loses all its digits where p_c is near 1.
        return _of_class(logits, condition) - logits.masked_fill(own, -torch.inf).logsumexp(1)


def _of_class(values: Tensor, condition: Tensor) -> Tensor:
    return values.gather(1, condition[:, None]).squeeze(1)


def _check_logits(logits: object, condition: Tensor) -> None:
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(condition):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else logits
        raise InvalidArgumentError(
            "classifier(x_0)", got, f"return logits of shape ({len(condition)}, number of classes)."
        )
    # Otherwise such a row would score 0 for ever, whatever the student does.
    if bool((condition >= logits.shape[1]).any()):
        raise InvalidArgumentError(
            "classifier(x_0)",
            tuple(logits.shape),
            f"return a logit for every class up to {int(condition.max())}.",
        )


register_reward(CompressedSize.name, CompressedSize)
