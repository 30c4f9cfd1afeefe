"""When to step: distributions over the next time, and the heads that give them.

A choice is one action coordinate in [-1, 1], `redif_env.schedules.decode_choice`'s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Beta, Categorical

from redif_env import mdp, schedules
from redif_env.errors import InvalidArgumentError, check_choice, check_integer, check_number
from redif_env.noise import NoiseSchedule

from .critics import Features

KINDS = ("beta", "categorical")
STOP = -1.0  # the choice that goes straight to the data
# Beta's density does not exist at the ends, where float32 can round to.
MARGIN = 1e-4
STOP_RANGE = 50.0  # log-odds that float32 takes for certainty


class Choice(ABC):
    """A distribution over the next time of N rows.

    Args:
        decides: Which rows have a choice, bool `(N,)`; the others go to 0 whatever theirs is, and
            count with log-density 0 and entropy 0.
    """

    def __init__(self, decides: Tensor) -> None:
        self.decides = decides

    def sample(self) -> Tensor:
        """Draw choices, float32 `(N,)`."""
        return torch.where(self.decides, self._sample(), STOP)

    def mode(self) -> Tensor:
        """The most likely choices, float32 `(N,)`, in [-1, 1]."""
        return torch.where(self.decides, self._mode(), STOP)

    def log_prob(self, choice: Tensor) -> Tensor:
        """Log-density (of a discrete choice, log-probability) of choices `(N,)`, `(N,)`."""
        return torch.where(self.decides, self._log_prob(choice), 0.0)

    def entropy(self) -> Tensor:
        """Entropy, `(N,)`; differential for a continuous choice."""
        return torch.where(self.decides, self._entropy(), 0.0)

    @abstractmethod
    def _sample(self) -> Tensor: ...

    @abstractmethod
    def _mode(self) -> Tensor: ...

    @abstractmethod
    def _log_prob(self, choice: Tensor) -> Tensor: ...

    @abstractmethod
    def _entropy(self) -> Tensor: ...


class BetaChoice(Choice):
    """Stop with some probability; else the share of the time that is kept is Beta's (2412.01243).

    To stop is to go straight to the data. `kept ~ Beta(1 + k m, 1 + k (1 - m))`, given by its mode
    m and concentration k, is never bimodal, and its mode can be learned without its width.

    Args:
        mode: m in (0, 1), `(N,)`.
        concentration: k > 0, `(N,)`.
        stop: Log-odds of stopping, `(N,)`.
        may_stop: Where stopping is allowed, bool `(N,)`.
        decides: As for `Choice`.
    """

    def __init__(
        self, mode: Tensor, concentration: Tensor, stop: Tensor, may_stop: Tensor, decides: Tensor
    ) -> None:
        super().__init__(decides)
        self.most_likely = mode
        self.stop = stop.masked_fill(~may_stop, -STOP_RANGE)
        first, second = 1 + concentration * mode, 1 + concentration * (1 - mode)
        self.beta = Beta(first, second, validate_args=False)

    def _sample(self) -> Tensor:
        kept = self.beta.sample().clamp(MARGIN, 1 - MARGIN)
        stops = torch.rand_like(kept) < self.stop.sigmoid()
        return torch.where(stops, STOP, 2 * kept - 1)

    def _mode(self) -> Tensor:
        """Stopping counts as more likely from one half on; densities are no probabilities."""
        return torch.where(self.stop > 0, STOP, 2 * self.most_likely - 1)

    def _log_prob(self, choice: Tensor) -> Tensor:
        kept = ((choice + 1) / 2).clamp(MARGIN, 1 - MARGIN)
        goes_on = nn.functional.logsigmoid(-self.stop) + self.beta.log_prob(kept) - math.log(2)
        return torch.where(choice <= STOP, nn.functional.logsigmoid(self.stop), goes_on)

    def _entropy(self) -> Tensor:
        """Of whether to stop, and of the time if not."""
        odds = self.stop.sigmoid()
        whether = nn.functional.softplus(self.stop) - odds * self.stop
        return whether + (1 - odds) * (self.beta.entropy() + math.log(2))


class CategoricalChoice(Choice):
    """One of a list of times.

    Args:
        logits: `(N, M)`, of every candidate.
        valid: Which can be chosen, bool `(N, M)`, at least one in each row.
        candidates: Times, float32 `(M,)`, falling to 0.
        t: Current times, `(N,)`.
        noise: Noise schedule that the times belong to.
        decides: As for `Choice`.
    """

    def __init__(
        self,
        logits: Tensor,
        valid: Tensor,
        candidates: Tensor,
        t: Tensor,
        noise: NoiseSchedule,
        decides: Tensor,
    ) -> None:
        super().__init__(decides)
        lowest = torch.finfo(logits.dtype).min
        masked = logits.masked_fill(~valid, lowest)
        self.categorical = Categorical(logits=masked, validate_args=False)
        self.valid = valid
        self.candidates = candidates
        self.t = t
        self.noise = noise

    def _sample(self) -> Tensor:
        return self._encode(self.categorical.sample())

    def _mode(self) -> Tensor:
        """As for `BetaChoice`: to stop takes one half."""
        logits = self.categorical.logits
        stops = (logits[:, -1] > math.log(0.5)) | ~self.valid[:, :-1].any(1)
        return self._encode(torch.where(stops, logits.shape[1] - 1, logits[:, :-1].argmax(1)))

    def _log_prob(self, choice: Tensor) -> Tensor:
        s = schedules.decode_choice(choice, self.t, self.noise)
        index = (self.candidates - s.unsqueeze(1)).abs().argmin(1)
        return self.categorical.log_prob(index)

    def _entropy(self) -> Tensor:
        return self.categorical.entropy()

    def _encode(self, index: Tensor) -> Tensor:
        t = self.t.clamp_min(schedules.min_gap(self.noise))  # rows that have ended are at 0
        return schedules.encode_choice(self.candidates[index], t)


class ScheduleHead(nn.Module, ABC):
    """Gives the distribution over the next time; global, or adaptive to latents, time and class.

    A table has a row of parameters for each time of an episode, the first included. It is all
    there is of a global schedule; an adaptive one adds what a small network makes of the
    observation, nothing at first.

    Args:
        observation_space: Of the environment.
        noise: Noise schedule.
        grid: Times to start learning from, `(max_steps + 1,)`.
        adaptive: Whether samples differ in their times, and so in their number of steps.
        min_steps: Fewest steps.
        width: Hidden units of the adaptive network.
        stop_prob: Probability of going straight to the data, at first, where a step may.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        noise: NoiseSchedule,
        grid: Tensor,
        adaptive: bool,
        min_steps: int,
        width: int,
        stop_prob: float = 0.1,
    ) -> None:
        super().__init__()
        self.noise = noise
        self.stop_prob = check_number("stop_prob", stop_prob, 1e-6, 1 - 1e-6)
        self.max_steps = len(grid) - 1
        self.min_steps = min_steps
        first = torch.tensor([schedules.before_first(noise)])
        table = self.initial(torch.cat([first, grid[:-2]]), grid[:-1])
        self.table = nn.Parameter(table)
        self.features: Features | None = None
        if adaptive:
            self.features = Features(observation_space, width)
            self.change = nn.Linear(width, table.shape[1])
            nn.init.zeros_(self.change.weight)
            nn.init.zeros_(self.change.bias)

    @abstractmethod
    def initial(self, t: Tensor, s: Tensor) -> Tensor:
        """Rows of the table, `(K, P)`, whose mode is to go from `t` to `s`."""

    @abstractmethod
    def distribution(self, raw: Tensor, t: Tensor, step_index: Tensor) -> Choice:
        """The distribution with these parameters, `(N, P)`."""

    def forward(self, obs: Mapping[str, Tensor]) -> Choice:
        """The distribution over the next time of N rows."""
        step_index = self.step_index(obs)
        raw = self.table[(step_index + 1).clamp_max(self.max_steps - 1)]
        if self.features is not None:
            raw = raw + self.change(self.features(obs))
        return self.distribution(raw, self.time(obs), step_index)

    def network_parameters(self) -> list[nn.Parameter]:
        """What an adaptive schedule has beside its table."""
        return [weight for weight in self.parameters() if weight is not self.table]

    def before(self, x_T: Tensor, condition: Tensor | None) -> dict[str, Tensor]:
        """What is seen of N tasks when their first time is chosen: the noise and the class."""
        index = torch.full((len(x_T),), -1, device=x_T.device)
        t = torch.full_like(index, schedules.before_first(self.noise), dtype=torch.float32)
        return mdp.observe(x_T, t, index, condition, self.noise, self.max_steps)

    def next_time(self, choice: Tensor, obs: Mapping[str, Tensor]) -> Tensor:
        """The times that choices `(N,)` stand for."""
        return self._decode(choice, self.time(obs), self.step_index(obs))

    def time(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Current times, float32 `(N,)`, on the noise schedule, or one gap before it."""
        t = obs["timestep"].flatten() * self.noise.num_train_timesteps
        before = schedules.before_first(self.noise)
        return torch.where(self.step_index(obs) < 0, before, self.noise.snap(t))

    def step_index(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Steps made, int64 `(N,)`; -1 before the first time is chosen."""
        return self.max_steps - (obs["steps_left"].flatten() * self.max_steps).round().long()

    @torch.no_grad()
    def grid(self) -> Tensor:
        """The most likely times of a global schedule, float32 `(num_steps + 1,)`, ending at 0.

        Raises:
            InvalidArgumentError: for an adaptive schedule.
        """
        if self.features is not None:
            raise InvalidArgumentError("adaptive", True, "samples differ in their times.")
        t = self.table.new_full((1,), schedules.before_first(self.noise))
        times = []
        for row in range(self.max_steps):
            index = torch.full((1,), row - 1, device=t.device)
            t = self._decode(self.distribution(self.table[row][None], t, index).mode(), t, index)
            times.append(t)
        grid = torch.cat([*times, torch.zeros_like(times[0])])
        return grid[: int((grid > 0).sum()) + 1]

    def _decode(self, choice: Tensor, t: Tensor, step_index: Tensor) -> Tensor:
        return schedules.next_time(
            choice,
            t,
            step_index,
            self.noise,
            max_steps=self.max_steps,
            min_steps=self.min_steps,
        )

    def _decides(self, step_index: Tensor) -> Tensor:
        return step_index + 1 < self.max_steps

    def _steps_after(self, step_index: Tensor) -> Tensor:
        """How many steps must follow the next one at least, `(N,)`."""
        return (self.min_steps - 1 - step_index).clamp_min(0)

    @property
    def _stop_log_odds(self) -> float:
        return math.log(self.stop_prob / (1 - self.stop_prob))


class BetaHead(ScheduleHead):
    """Any time: see `BetaChoice`.

    Args:
        args, kwargs: For `ScheduleHead`.
        concentration: k at the start; the std of the share that is kept is then at most
            `0.5 / sqrt(k)`.
    """

    def __init__(self, *args: Any, concentration: float = 100.0, **kwargs: Any) -> None:
        self.concentration = check_number("concentration", concentration, 1e-3)
        super().__init__(*args, **kwargs)

    def initial(self, t: Tensor, s: Tensor) -> Tensor:
        mode = (s / t).clamp(0.01, 0.99)
        width = torch.full_like(mode, math.log(math.expm1(self.concentration)))
        return torch.stack([mode.logit(), width, torch.full_like(mode, self._stop_log_odds)], 1)

    def distribution(self, raw: Tensor, t: Tensor, step_index: Tensor) -> Choice:
        return BetaChoice(
            mode=raw[:, 0].sigmoid(),
            concentration=nn.functional.softplus(raw[:, 1]),
            stop=raw[:, 2],
            may_stop=self._steps_after(step_index) == 0,
            decides=self._decides(step_index),
        )


class CategoricalHead(ScheduleHead):
    """One of a list of times: see `CategoricalChoice`.

    Args:
        args, kwargs: For `ScheduleHead`.
        noise: Noise schedule.
        candidates: The times, or how many evenly spaced ones.
        spread: Std of the first choices, as a share of the time axis. What is much farther from the
            grid than this is never tried.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        noise: NoiseSchedule,
        *args: Any,
        candidates: int | Sequence[float] = 32,
        spread: float = 0.15,
        **kwargs: Any,
    ) -> None:
        times = (
            schedules.uniform(noise, check_integer("candidates", candidates, 2))
            if isinstance(candidates, int)
            else schedules.explicit(candidates, noise)
        )
        if float(-times.diff().max()) < schedules.min_gap(noise):
            raise InvalidArgumentError(
                "candidates", candidates, f"keep them {schedules.min_gap(noise):g} apart."
            )
        self._times = times
        self.spread = check_number("spread", spread, 1e-3)
        super().__init__(observation_space, noise, *args, **kwargs)
        self.candidates: Tensor
        self.register_buffer("candidates", times)

    def initial(self, t: Tensor, s: Tensor) -> Tensor:
        distance = (self._times - s[:, None]) / self.noise.num_train_timesteps
        logits = -(distance**2) / (2 * self.spread**2)
        logits[:, -1] = logits[:, :-1].logsumexp(1) + self._stop_log_odds
        return logits

    def distribution(self, raw: Tensor, t: Tensor, step_index: Tensor) -> Choice:
        noise, candidates = self.noise, self.candidates
        below = len(candidates) - 1 - torch.arange(len(candidates), device=t.device)
        valid = candidates <= (t - schedules.min_gap(noise)).clamp_min(0).unsqueeze(1)
        valid &= below >= self._steps_after(step_index).unsqueeze(1)
        valid[:, -1] |= ~valid.any(1)
        decides = self._decides(step_index)
        return CategoricalChoice(raw, valid, candidates, t, noise, decides)


def make_head(
    observation_space: spaces.Dict,
    noise: NoiseSchedule,
    grid: Tensor,
    *,
    kind: str = "beta",
    adaptive: bool = False,
    min_steps: int = 1,
    width: int = 64,
    **options: Any,
) -> ScheduleHead:
    """A schedule head.

    Args:
        observation_space: Of the environment.
        noise: Noise schedule.
        grid: Times to start learning from, `(max_steps + 1,)`.
        kind: `"beta"` for any time, `"categorical"` for one of a list.
        adaptive: Whether samples differ in their times; else all share one grid.
        min_steps: Fewest steps; the environment's.
        width: Hidden units of the network of an adaptive schedule.
        options: `stop_prob`; `concentration` of `BetaHead`; `candidates` and `spread` of
            `CategoricalHead`.

    Raises:
        InvalidArgumentError: for a kind or option that does not exist.
    """
    check_choice("schedule_head['kind']", kind, KINDS)
    known = {"beta": ("concentration",), "categorical": ("candidates", "spread")}[kind]
    for name in options:
        check_choice(f"option of schedule_head {kind!r}", name, ("stop_prob", *known))
    make = BetaHead if kind == "beta" else CategoricalHead
    width = check_integer("width", width, 1)
    return make(
        observation_space,
        noise,
        grid,
        adaptive=adaptive,
        min_steps=min_steps,
        width=width,
        **options,
    )
