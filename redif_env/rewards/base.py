"""The reward protocol, sums of rewards, and rewards by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import schedules
from ..codec import Codec, decoding_once
from ..denoiser import Denoiser
from ..errors import InvalidArgumentError, InvalidRewardError, check_number
from ..noise import expand
from ..teacher import TeacherBank
from .maps import fit_map, with_mean

ARGUMENTS = ("x_0", "teacher_x_0", "condition")


class Score(NamedTuple):
    """What a reward says of N samples.

    Attributes:
        values: The reward of each row, float32 `(N,)`.
        map: Its map, float32 `(N, ...)`, or None.
        terms: What each term says, before its weight, by name: float32 `(N,)` each. A reward that
            is no sum is its own only term.
    """

    values: Tensor
    map: Tensor | None
    terms: dict[str, Tensor]


class Reward(ABC):
    """Scores final samples against the teacher's; larger is better.

    `docs/rewards.md` shows how to write one; `check_reward` checks that it keeps what is said here.

    Samples come as float32 `(N, *latent_shape)`. Images `(N, C, H, W)` are in [-1, 1], but a
    student may leave that range, and must be scored there too. Everything is on one device, and
    nothing may wait for it: no `float(tensor)`, `.item()` or `.cpu()`, where that can be avoided.

    The reward of a row is a function of that row: the same whatever else is in the batch (unless
    `over_batch`), and the same at every call, with no random numbers. Arguments are not changed.

    Rewards add, subtract and scale: `0.5 * MSE() + SSIM() - PSNR() / 100` is a reward, and so is
    `sum` of several. A reward that is a mean over places
    may return its map, which local credit needs: see `MapReward`.

    Attributes:
        name: Name in logs.
        has_map: Whether `reward_map` is available.
        differentiable: Whether gradients reach `x_0`, which back-propagation needs and PPO does
            not.
        over_batch: Whether a row is scored against the other rows of the call. Such a reward needs
            a fixed schedule, where all rows end together: rows under way would count as samples.
        nfe: Forward passes of networks that scoring one sample takes, the teacher's sample
            included.
    """

    has_map: bool = False
    differentiable: bool = False
    over_batch: bool = False
    nfe: int = 0

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    @property
    def decoded_by(self) -> Codec | None:
        """The codec that `nfe` counts twice, whose pixels the terms of a sum share; or None."""
        return None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

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
        _check_map(self, reward_map, x_0)
        return reward_map.flatten(1).mean(1), reward_map

    def detailed(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Score:
        """`score`, and what each term says; a reward that wraps another passes its terms on."""
        values, reward_map = self.score(x_0, teacher_x_0, condition)
        return Score(values, reward_map, {self.name: values})

    @torch.no_grad()
    def normalised(
        self,
        bank: TeacherBank,
        denoiser: Denoiser,
        timesteps: Sequence[float] | Tensor,
        batch_size: int = 256,
    ) -> WeightedSum:
        """The same terms, each divided by its own scale, so that weights compare like with like.

        A term's scale is its standard deviation over the bank's tasks between plain DDIM along
        `timesteps` and the teacher. Advantages are returns without their mean over their standard
        deviation, so a term of weight 1 then moves them about as much as any other of weight 1. Not
        the distance from a perfect score: a copy has no finite PSNR and not the best compressed
        size.

        Args:
            bank: Tasks; a few hundred.
            denoiser: Takes the DDIM steps; the student's start, usually the teacher's.
            timesteps: The student's grid, with or without the final 0.
            batch_size: Tasks that are sampled at once.

        Raises:
            InvalidArgumentError: if a term scores all tasks alike, so that it has no scale here.
            InvalidRewardError: if a term is not finite on these samples.
        """
        grid = schedules.explicit(timesteps, denoiser.schedule)
        terms = weighted_terms(self)
        scores = []
        parts = -(-len(bank) // batch_size)  # of like size: a distribution needs more than a rest
        for rows in torch.arange(len(bank), device=bank.x_T.device).tensor_split(parts):
            condition = None if bank.condition is None else bank.condition[rows]
            x_0 = schedules.sample(denoiser, bank.x_T[rows], condition, grid)
            pair = x_0, bank.teacher_x_0[rows], condition
            scores.append(torch.stack([evaluate(term, *pair)[0] for _, term in terms]))
        values = torch.cat(scores, dim=1)
        weighted = zip(terms, values, strict=True)
        return WeightedSum([(weight / _scale(term, row), term) for (weight, term), row in weighted])

    def __add__(self, other: Reward) -> Reward:
        if not isinstance(other, Reward):
            raise InvalidArgumentError("reward", other, "add rewards to rewards only.")
        return WeightedSum([*weighted_terms(self), *weighted_terms(other)])

    def __radd__(self, other: object) -> Reward:
        if isinstance(other, int) and other == 0:  # where `sum` starts
            return self
        raise InvalidArgumentError("reward", other, "add rewards to rewards only.")

    def __sub__(self, other: Reward) -> Reward:
        return self + (-other if isinstance(other, Reward) else other)

    def __neg__(self) -> Reward:
        return -1 * self

    def __mul__(self, weight: float) -> Reward:
        weight = _check_weight(weight)
        return WeightedSum([(weight * inner, term) for inner, term in weighted_terms(self)])

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Reward:
        divisor = _check_weight(divisor)
        if divisor == 0:
            raise InvalidArgumentError("weight", divisor, "divide by another number than 0.")
        return self * (1 / divisor)


class MapReward(Reward):
    """A reward that is the mean of its map: only `reward_map` is left to write."""

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
        if not terms:
            raise InvalidArgumentError("terms", terms, "pass a pair of weight and reward at least.")
        self.terms = terms
        self.has_map = any(term.has_map for _, term in terms)
        self.differentiable = all(term.differentiable for _, term in terms)
        self.over_batch = any(term.over_batch for _, term in terms)
        codecs = [id(term.decoded_by) for _, term in terms if term.decoded_by is not None]
        self.nfe = sum(term.nfe for _, term in terms) - 2 * (len(codecs) - len(set(codecs)))

    @property
    def name(self) -> str:
        return "+".join(f"{weight:g}*{term.name}" for weight, term in self.terms)

    @decoding_once()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        parts = [weight * term(x_0, teacher_x_0, condition) for weight, term in self.terms]
        return sum(parts[1:], start=parts[0])

    def reward_map(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        _, total = self.score(x_0, teacher_x_0, condition)
        return super().reward_map(x_0, teacher_x_0, condition) if total is None else total

    def score(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return self.detailed(x_0, teacher_x_0, condition)[:2]

    @decoding_once()
    def detailed(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Score:
        total, total_map = x_0.new_zeros(len(x_0)), torch.zeros_like(x_0)
        terms: dict[str, Tensor] = {}
        for weight, term in self.terms:
            values, term_map, inner = evaluate_terms(term, x_0, teacher_x_0, condition)
            total = total + weight * values
            if term_map is None:
                part = expand(x_0[0].numel() * values, x_0)
            else:
                # Resizing may change the mean, which is the reward.
                part = with_mean(fit_map(term_map, x_0.shape[1:]), values)
            total_map = total_map + weight * part
            for name, value in inner.items():
                terms[_unused(name, terms)] = value
        return Score(total, total_map if self.has_map else None, terms)


def weighted_terms(reward: Reward) -> list[tuple[float, Reward]]:
    """Weights and terms of a sum; a reward that is no sum is its own only term."""
    return reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]


def _check_weight(weight: object) -> float:
    """A weight may be negative; the same by hand and by name."""
    return check_number("weight", weight, minimum=-1e30)


def _unused(name: str, names: Mapping[str, Tensor]) -> str:
    """`name`, or `name_2`, `name_3`, ... where a term has it already."""
    number, unused = 1, name
    while unused in names:
        number += 1
        unused = f"{name}_{number}"
    return unused


def _scale(reward: Reward, values: Tensor) -> float:
    """Standard deviation of the values `(P,)` of a term."""
    if not bool(values.isfinite().all()):
        raise InvalidRewardError(
            f"reward {reward.name!r} returned",
            "NaN or infinity",
            "return finite values for any sample.",
        )
    scale = float(values.double().std(correction=0))
    if scale <= 1e-6 * float(values.abs().max()):  # rounding of float32 is no scale
        raise InvalidArgumentError(
            "reward",
            reward.name,
            "it scores all tasks alike, so it has no scale: pass more tasks, or weigh it by hand.",
        )
    return scale


def evaluate(
    reward: Reward, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """A reward and, where it has one, its map, checked for shape without touching the values.

    Returns:
        float32 `(N,)`, and the map, float32 `(N, ...)`, or None.

    Raises:
        InvalidRewardError: if the reward's or the map's shape, dtype or device is wrong, or it
            changed its arguments in place.
    """
    return evaluate_terms(reward, x_0, teacher_x_0, condition)[:2]


def evaluate_terms(
    reward: Reward, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
) -> Score:
    """As `evaluate`, with what each term says."""
    samples = x_0, teacher_x_0, condition
    before = [_version(part) for part in samples]
    values, reward_map, terms = reward.detailed(*samples)
    for name, part, version in zip(ARGUMENTS, samples, before, strict=True):
        # Other terms, the next observation and the student's own log-ratios would see the change.
        if _version(part) != version:
            raise InvalidRewardError(
                f"reward {reward.name!r} changed", name, "leave arguments alone: work on copies."
            )
    _check_tensor(reward, values, (len(x_0),), x_0.device)
    for term in terms.values():
        _check_tensor(reward, term, (len(x_0),), x_0.device)
    if reward_map is not None:
        _check_map(reward, reward_map, x_0)
        reward_map = reward_map.float()
    return Score(values.float(), reward_map, {name: term.float() for name, term in terms.items()})


def _version(part: Tensor | None) -> int:
    """How often a tensor was changed in place; 0 where torch does not count."""
    return 0 if part is None or part.is_inference() else part._version


def _check_tensor(
    reward: Reward, values: object, shape: tuple[int, ...], device: torch.device
) -> None:
    def refuse(got: object, remedy: str) -> None:
        raise InvalidRewardError(f"reward {reward.name!r} returned", got, remedy)

    if not isinstance(values, Tensor):
        refuse(values, f"return a tensor of shape {shape}.")
    elif tuple(values.shape) != shape:
        refuse(tuple(values.shape), f"return a tensor of shape {shape}.")
    elif not values.is_floating_point():
        refuse(values.dtype, "return a tensor of floats: call .float().")
    elif values.device != device:
        refuse(values.device, f"return a tensor on the device of the samples, {device}.")


def _check_map(reward: Reward, reward_map: object, x_0: Tensor) -> None:
    """Rows and number of axes must be those of the samples; the resolution may differ."""
    shape = tuple(x_0.shape)
    if isinstance(reward_map, Tensor) and len(reward_map.shape) == len(shape):
        if 0 in reward_map.shape[1:]:  # its mean would be NaN
            raise InvalidRewardError(
                f"reward {reward.name!r} returned", tuple(reward_map.shape), "map a place at least."
            )
        shape = (shape[0], *reward_map.shape[1:])
    _check_tensor(reward, reward_map, shape, x_0.device)


def nan_where_nan(values: Tensor, source: Tensor) -> Tensor:
    """NaN in the rows where `source` has one: a cast or an argmax would hide it."""
    return values.masked_fill(source.isnan().flatten(1).any(1), torch.nan)


_REGISTRY: dict[str, Callable[[], Reward]] = {}


def register_reward(name: str, make: Callable[[], Reward]) -> None:
    """Make `name` usable wherever a reward is given as a string.

    Args:
        name: A name that is taken already is given to the new reward.
        make: Such as the reward's class: makes one when it is asked for.

    Raises:
        InvalidArgumentError: for a name that a sum by name could not hold, or what makes nothing.
    """
    if not callable(make) or isinstance(make, Reward):
        raise InvalidArgumentError("make", make, "pass a class or function that makes the reward.")
    if not isinstance(name, str) or not name or name != name.strip() or {"+", "*"} & {*name}:
        raise InvalidArgumentError(
            "name", name, "pass a name without + and *, and without spaces around it."
        )
    _REGISTRY[name] = make


def make_reward(reward: str | Reward) -> Reward:
    """A reward from its name or from a sum such as `"mse + 0.5*ssim"`; a reward is returned as is.

    To subtract, add with a negative weight: `"mse + -0.5*ssim"`.

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
    weight, _, name = (part.strip() for part in term.rpartition("*"))
    known = name in _REGISTRY
    before_minus = (weight if known else name).partition("-")[0].rpartition("*")[2].strip()
    if before_minus in _REGISTRY:
        remedy = "to subtract, add with a negative weight: 'mse + -0.5*ssim'."
    elif known:
        return _weight_of(weight), _made(name)
    elif weight in _REGISTRY:
        remedy = f"write the weight first: '{name}*{weight}'."
    else:
        remedy = f"the rewards are {', '.join(map(repr, sorted(_REGISTRY)))}."
    raise InvalidArgumentError("reward", term.strip(), remedy)


def _weight_of(text: str) -> float:
    try:
        number: object = float(text or 1.0)
    except ValueError:
        number = text
    return _check_weight(number)


def _made(name: str) -> Reward:
    reward = _REGISTRY[name]()
    if not isinstance(reward, Reward):
        raise InvalidArgumentError("reward", reward, f"{name!r} is to make a Reward.")
    return reward
