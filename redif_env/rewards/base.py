"""The reward protocol, sums of rewards, and rewards by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InvalidArgumentError, InvalidRewardError, check_number
from ..noise import expand
from .maps import fit_map


class Reward(ABC):
    """Scores final samples against the teacher's; larger is better.

    Rewards add and scale: `0.5 * MSE() + SSIM()` is a reward. A reward that is a mean over the
    elements of the sample may return its map, which local credit needs: set `has_map` and return
    the map from `reward_map`; `__call__` is then its mean.

    Attributes:
        has_map: Whether `reward_map` is available.
        name: Name in logs.
    """

    has_map: bool = False

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        """The reward of each row.

        Args:
            x_0: The student's final samples, float32 `(N, *latent_shape)`, usually in [-1, 1].
            teacher_x_0: The teacher's answers to the same noise, like `x_0`, on the same device.
            condition: Classes, int64 `(N,)`, or None.

        Returns:
            float `(N,)`, finite, on the device of `x_0`.
        """

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        """The reward of each place, float `(N, C', H', W')`; its mean over a row is the reward.

        Usually of the latents' shape; patches or decoded pixels make coarser or finer maps. In a
        sum the terms without a map break the rule about the mean, see `WeightedSum`.
        """
        raise InvalidArgumentError("reward", self.name, "it has no map: use credit='global'.")

    def score(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The reward of each row, `(N,)`, and its map or None, in one go; see `evaluate`."""
        if not self.has_map:
            return self(x_0, teacher_x_0, condition), None
        reward_map = self.reward_map(x_0, teacher_x_0, condition)
        _check_map(self, reward_map, tuple(x_0.shape))
        return reward_map.flatten(1).mean(1), reward_map

    def __add__(self, other: Reward) -> Reward:
        if not isinstance(other, Reward):
            raise InvalidArgumentError("reward", other, "add rewards to rewards only.")
        return WeightedSum([*_terms(self), *_terms(other)])

    def __mul__(self, weight: float) -> Reward:
        weight = check_number("weight", weight, minimum=float("-1e30"))
        return WeightedSum([(weight * inner, term) for inner, term in _terms(self)])

    __rmul__ = __mul__


class MapReward(Reward):
    """A reward that is the mean of its map."""

    has_map = True

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        return self.reward_map(x_0, teacher_x_0, condition).flatten(1).mean(1)


class WeightedSum(Reward):
    """A weighted sum of rewards; has a map when any term has one.

    An element's place in the map of a mean over D elements holds D times what the element adds to
    the reward. Every element answers for all of a term without a map, so in the map such a term
    counts D times, the same everywhere: local credit then climbs the sum as it is weighted. Maps of
    different resolutions meet on the grid of the samples.

    Args:
        terms: Pairs of weight and reward.
    """

    def __init__(self, terms: list[tuple[float, Reward]]) -> None:
        self.terms = terms
        self.has_map = any(term.has_map for _, term in terms)

    @property
    def name(self) -> str:
        return "+".join(f"{weight:g}*{term.name}" for weight, term in self.terms)

    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        parts = [weight * term(x_0, teacher_x_0, condition) for weight, term in self.terms]
        return sum(parts[1:], start=parts[0])

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        _, total = self.score(x_0, teacher_x_0, condition)
        return super().reward_map(x_0, teacher_x_0, condition) if total is None else total

    def score(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        total, total_map = x_0.new_zeros(len(x_0)), torch.zeros_like(x_0)
        for weight, term in self.terms:
            values, term_map = evaluate(term, x_0, teacher_x_0, condition)
            total = total + weight * values
            if term_map is None:
                part = expand(x_0[0].numel() * values, x_0)
            else:
                part = fit_map(term_map, x_0.shape[1:])
                # Resizing may change the mean, which is the reward.
                part = part + expand(values - part.flatten(1).mean(1), part)
            total_map = total_map + weight * part
        return total, total_map if self.has_map else None


def _terms(reward: Reward) -> list[tuple[float, Reward]]:
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


def evaluate(
    reward: Reward, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A reward and, where it has one, its map, checked for shape without touching the values.

    Returns:
        float32 `(N,)`, and the map, float32 `(N, ...)`, or None.

    Raises:
        InvalidRewardError: if the reward's or the map's shape is wrong.
    """
    values, reward_map = reward.score(x_0, teacher_x_0, condition)
    _check_shape(reward, values, (len(x_0),))
    return values.float(), None if reward_map is None else reward_map.float()


def _check_shape(reward: Reward, values: object, shape: tuple[int, ...]) -> None:
    if not isinstance(values, Tensor) or tuple(values.shape) != shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else values
        raise InvalidRewardError(
            f"reward {reward.name!r} returned", got, f"return a tensor of shape {shape}."
        )


def _check_map(reward: Reward, reward_map: object, shape: tuple[int, ...]) -> None:
    """Rows and number of axes must be those of the samples; the resolution may differ."""
    if isinstance(reward_map, Tensor) and len(reward_map.shape) == len(shape):
        shape = (shape[0], *reward_map.shape[1:])
    _check_shape(reward, reward_map, shape)


_REGISTRY: dict[str, Callable[[], Reward]] = {}


def register_reward(name: str, make: Callable[[], Reward]) -> None:
    """Make `name` usable wherever a reward is given as a string."""
    _REGISTRY[name] = make


def make_reward(reward: str | Reward) -> Reward:
    """A reward from its name or from a sum such as `"mse + 0.5*ssim"`; a reward is returned as is.

    Raises:
        InvalidArgumentError: for a name that is not registered or a weight that is not a number.
    """
    if isinstance(reward, Reward):
        return reward
    if not isinstance(reward, str):
        raise InvalidArgumentError("reward", reward, "pass a Reward or the name of one.")
    terms = [_parse_term(term) for term in reward.split("+")]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else WeightedSum(terms)


def _parse_term(term: str) -> tuple[float, Reward]:
    weight, _, name = term.rpartition("*")
    if name.strip() not in _REGISTRY:
        names = ", ".join(map(repr, sorted(_REGISTRY)))
        raise InvalidArgumentError("reward", term.strip(), f"the rewards are {names}.")
    return check_number("weight", weight or 1.0), _REGISTRY[name.strip()]()
