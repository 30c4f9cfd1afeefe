"""Rewards on the pixels of latent diffusion models."""

from __future__ import annotations

from torch import Tensor

from ..codec import Codec
from ..errors import InvalidArgumentError
from .base import Reward, Score, WeightedSum, evaluate_terms, make_reward
from .online import online_terms


class Decoded(Reward):
    """A reward of the decoded samples and answers, which are images about in [-1, 1].

    A map, where the reward has one, is of pixels; it is averaged down to the latents where it is
    used. Each score decodes every sample and every answer, once for all terms of a sum: at few
    steps that may cost more than the student does, and a reward of the latents costs nothing.

    Args:
        reward: Of pixels, or the name of one.
        codec: The teacher's, `teacher.codec`.

    Raises:
        InvalidArgumentError: without a codec; for a reward that is trained; for a sum of terms with
            and without maps, whose map counts the latter once a *pixel*: add decoded terms instead.
    """

    def __init__(self, reward: str | Reward, codec: Codec) -> None:
        if not isinstance(codec, Codec):
            raise InvalidArgumentError(
                "codec", codec, "pass the codec of a latent teacher; others need no Decoded."
            )
        self.inner = make_reward(reward)
        terms = self.inner.terms if isinstance(self.inner, WeightedSum) else []
        if len({term.has_map for _, term in terms}) == 2:
            raise InvalidArgumentError(
                "reward",
                self.inner.name,
                "decode term by term: Decoded(a, codec) + Decoded(b, codec).",
            )
        # A distance within the batch has no memory to update.
        if not all(term.over_batch for term in online_terms(self.inner)):
            raise InvalidArgumentError(
                "reward",
                self.inner.name,
                "it would never be updated: decode in its features= or network= instead.",
            )
        self.codec = codec
        self.has_map = self.inner.has_map
        self.differentiable = self.inner.differentiable
        self.over_batch = self.inner.over_batch
        self.nfe = self.inner.nfe + 2  # the decoder, for sample and answer

    @property
    def name(self) -> str:
        return f"decoded({self.inner.name})"

    @property
    def decoded_by(self) -> Codec:
        return self.codec

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self.inner(*self._decoded(x_0, teacher_x_0), condition)

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self.inner.reward_map(*self._decoded(x_0, teacher_x_0), condition)

    def score(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.inner.score(*self._decoded(x_0, teacher_x_0), condition)

    def detailed(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Score:
        score = evaluate_terms(self.inner, *self._decoded(x_0, teacher_x_0), condition)
        terms = {f"decoded({name})": values for name, values in score.terms.items()}
        return score._replace(terms=terms)

    def _decoded(self, x_0: Tensor, teacher_x_0: Tensor) -> tuple[Tensor, Tensor]:
        return self.codec.decode(x_0), self.codec.decode(teacher_x_0)
