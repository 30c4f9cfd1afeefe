"""Denoising as a Markov decision process: a frozen state and pure functions.

Every function works on N independent rows at once; nothing here draws random numbers, keeps
state, or waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import rewards, schedules
from . import transition as kernel
from .denoiser import Denoiser
from .noise import NoiseSchedule, expand, from_x0, to_x0
from .teacher import TeacherBank

PAST = "past_prediction"  # the name of `past_x0` in observations
ACTION_TYPES = ("latent", "sample", "epsilon", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class EnvState:
    """N denoising trajectories under way.

    Attributes:
        x_t: Noisy latents, float32 `(N, *latent_shape)`.
        t: Times, float32 `(N,)`; 0 once the trajectory has ended.
        step_index: Steps taken, int64 `(N,)`.
        x_T: The noise that the trajectory started from, like `x_t`.
        teacher_x_0: The teacher's answer to that noise, like `x_t`; hidden from the agent.
        condition: Classes, int64 `(N,)`, or None.
        past_x0: What the step before predicted, like `x_t`, zeros in the first; None with steps of
            first order, which do not ask.
        invalid_choices: How often a choice among candidates was not allowed, int64 `(N,)`; None
            without candidates.
    """

    x_t: Tensor
    t: Tensor
    step_index: Tensor
    x_T: Tensor
    teacher_x_0: Tensor
    condition: Tensor | None
    past_x0: Tensor | None = None
    invalid_choices: Tensor | None = None


@dataclass(frozen=True)
class Process:
    """The constants of the decision process.

    Attributes:
        schedule: The noise schedule.
        max_steps: Most steps of an episode; the last allowed one always ends at time 0.
        reward: Scores final samples.
        timesteps: The fixed grid, float32 `(max_steps + 1,)`; None for a free schedule.
        candidates: The grid that discrete choices pick from, float32 `(M + 1,)`: the start, then
            the M times to choose from, the last of them 0. None without discrete choices.
        min_steps: Fewest steps of an episode that chooses its times.
        start: Where trajectories of a free schedule start; None: at the largest time.
        action_type: What the step output is: `"latent"` for `x_s` itself, or a prediction type
            from which the deterministic DDIM step is taken.
        step_cost: Taken from the final reward for each network evaluation.
        nfe_per_step: Network evaluations of a student's step (2 with guidance).
        student: Frozen student of residual actions and of `follow`; None for plain actions.
        residual_scale: What a residual action is multiplied by.
        solver_order: Of the deterministic step that an action is, see `transition`; 2 only with
            `timesteps`.
    """

    schedule: NoiseSchedule
    max_steps: int
    reward: rewards.Reward
    timesteps: Tensor | None = None
    candidates: Tensor | None = None
    min_steps: int = 1
    start: float | None = None
    action_type: str = "latent"
    step_cost: float = 0.0
    nfe_per_step: int = 1
    student: Denoiser | None = None
    residual_scale: float = 1.0
    solver_order: int = 1

    @property
    def choice_dim(self) -> int:
        """Number of schedule coordinates in an action: 1 when the schedule is free, else 0."""
        return 1 if self.timesteps is None else 0

    @property
    def lock_step(self) -> bool:
        """Whether all trajectories that start together end together, after `max_steps`."""
        return self.timesteps is not None or self.min_steps == self.max_steps

    @property
    def first_time(self) -> Tensor | float:
        """The time that trajectories start at."""
        grid = self.candidates if self.timesteps is None else self.timesteps
        if grid is not None:
            return grid[0]
        return self.schedule.max_timestep if self.start is None else self.start


def initial(process: Process, bank: TeacherBank, rows: Tensor) -> EnvState:
    """The states that the bank's tasks `rows`, int64 `(N,)`, start in."""
    x_T = bank.x_T[rows]
    none_yet = torch.zeros(len(rows), dtype=torch.int64, device=x_T.device)
    return EnvState(
        x_t=x_T,
        t=torch.zeros(len(rows), device=x_T.device) + process.first_time,
        step_index=none_yet,
        x_T=x_T,
        teacher_x_0=bank.teacher_x_0[rows],
        condition=None if bank.condition is None else bank.condition[rows],
        past_x0=torch.zeros_like(x_T) if process.solver_order == 2 else None,
        invalid_choices=None if process.candidates is None else none_yet,
    )


def transition(process: Process, state: EnvState, action: Tensor) -> EnvState:
    """The state after one step; deterministic.

    Args:
        process: The process.
        state: N trajectories, none of them ended.
        action: float32 `(N, D + choice_dim)`: the flattened step output, then the schedule choice.
    """
    shape = state.x_t.shape
    dim = state.x_t[0].numel()
    s = next_time(process, state, action[:, dim:])
    past = past_of(state.past_x0, process.timesteps, state.step_index)
    x_s = _step_output(process, state, action[:, :dim].reshape(shape), s, past)
    after = replace(state, x_t=x_s, t=s, step_index=state.step_index + 1)
    if past is None:
        return after
    # Of the action, not of a network: what explored has its own share in the next step.
    predicted = kernel.x0_of_step(process.schedule, state.x_t, x_s, state.t, s, past)
    return replace(after, past_x0=predicted)


def past_of(
    past_x0: Tensor | None, timesteps: Tensor | None, step_index: Tensor
) -> kernel.Past | None:
    """The step before of N rows on a fixed grid; None with steps of first order.

    Args:
        past_x0: What was predicted in it, `(N, ...)`, or None.
        timesteps: The grid, `(max_steps + 1,)`.
        step_index: Steps made, int64 `(N,)`.
    """
    if past_x0 is None or timesteps is None:
        return None
    return kernel.Past(past_x0, timesteps[(step_index - 1).clamp_min(0)])


def follow(process: Process, state: EnvState, choice: Tensor) -> EnvState:
    """The state after the frozen student's own deterministic DDIM step to a chosen time.

    Args:
        process: A process with `candidates` and a `student`.
        state: N trajectories, none of them ended.
        choice: int64 `(N,)`, which of the M candidates; one that is not allowed, see
            `choice_range`, is counted and takes the nearest that is.
    """
    assert process.student is not None
    assert process.candidates is not None
    assert state.invalid_choices is not None
    allowed = choice.clamp(*choice_range(process, state))
    s = process.candidates[allowed + 1]
    x0_pred = process.student(state.x_t, state.t, state.condition)
    x_s = kernel.step(process.schedule, state.x_t, x0_pred, state.t, s).mean
    return replace(
        state,
        x_t=x_s,
        t=s,
        step_index=state.step_index + 1,
        invalid_choices=state.invalid_choices + (allowed != choice),
    )


def choice_range(process: Process, state: EnvState) -> tuple[Tensor, Tensor]:
    """The first and the last candidate that the next step may go to; all between are allowed too.

    The first is the largest time below `t`, or 0 where the step is the last of `max_steps`. The
    last leaves as many candidates below it as there must be steps after it to make `min_steps`;
    once `min_steps - 1` are made, it is 0. With `min_steps <= max_steps` and at least `min_steps`
    candidates, the range is never empty for trajectories whose choices were all in range.

    Returns:
        Two int64 `(N,)`, indices in [0, M).
    """
    assert process.candidates is not None
    times = process.candidates[1:]
    zero = len(times) - 1
    first = (times >= state.t.unsqueeze(1)).sum(1)
    first = torch.where(state.step_index + 1 >= process.max_steps, zero, first)
    last = (zero + 1 - process.min_steps + state.step_index).clamp_max(zero)
    return first, last


def next_time(process: Process, state: EnvState, choice: Tensor) -> Tensor:
    """The time that the step ends at, float32 `(N,)`, smaller than `state.t`.

    Args:
        process: The process.
        state: N trajectories, none of them ended.
        choice: Schedule coordinates, `(N, choice_dim)`; ignored for a fixed schedule.
    """
    if process.timesteps is not None:
        return process.timesteps[state.step_index + 1]
    return schedules.next_time(
        choice[:, 0],
        state.t,
        state.step_index,
        process.schedule,
        max_steps=process.max_steps,
        min_steps=process.min_steps,
    )


def observation(process: Process, state: EnvState) -> dict[str, Tensor]:
    """What the agent sees; tensors that share no memory with the state."""
    condition = None if state.condition is None else state.condition.clone()
    seen = observe(
        state.x_t.clone(),
        state.t,
        state.step_index,
        condition,
        process.schedule,
        process.max_steps,
    )
    if state.past_x0 is not None:
        seen[PAST] = state.past_x0.clone()
    return seen


def observe(
    x_t: Tensor,
    t: Tensor,
    step_index: Tensor,
    condition: Tensor | None,
    schedule: NoiseSchedule,
    max_steps: int,
) -> dict[str, Tensor]:
    """What an agent sees of N latents at times `t` after `step_index` of `max_steps` steps."""
    seen = {
        "latents": x_t,
        "timestep": (t / schedule.num_train_timesteps).unsqueeze(1),
        "steps_left": (1 - step_index / max_steps).unsqueeze(1),
    }
    if condition is not None:
        seen["condition"] = condition
    return seen


def reward(process: Process, state: EnvState) -> tuple[Tensor, Tensor | None]:
    """The reward of each row and its map: `score` without its terms."""
    return score(process, state)[:2]


def score(process: Process, state: EnvState) -> rewards.Score:
    """The reward of each row, 0 for those under way, and its map where the reward has one.

    At `t = 0`: `reward(x_0, teacher_x_0, condition) - step_cost * nfe`.

    Returns:
        Values, float32 `(N,)`; the map, float32 `(N, ...)`, or None: no place is cheaper than
        another, so the cost counts in it as a term without a map, see `rewards.WeightedSum`; and
        what each term says, without weights or cost.
    """
    values, reward_map, terms = rewards.evaluate_terms(
        process.reward, state.x_t, state.teacher_x_0, state.condition
    )
    cost = process.step_cost * process.nfe_per_step * state.step_index
    ended = terminal(process, state)
    if reward_map is not None:
        shared = state.x_t[0].numel() * cost
        reward_map = torch.where(
            expand(ended, reward_map), reward_map - expand(shared, reward_map), 0.0
        )
    terms = {name: torch.where(ended, term, 0.0) for name, term in terms.items()}
    return rewards.Score(torch.where(ended, values - cost, 0.0), reward_map, terms)


def terminal(process: Process, state: EnvState) -> Tensor:
    """Which trajectories have reached the data, bool `(N,)`."""
    return state.t <= 0


def stay_ended(process: Process, before: EnvState, after: EnvState) -> EnvState:
    """`after`, but `before` in the rows that had ended: for going on until all have."""
    ended = terminal(process, before)
    return replace(
        after,
        x_t=torch.where(expand(ended, before.x_t), before.x_t, after.x_t),
        t=torch.where(ended, before.t, after.t),
        step_index=torch.where(ended, before.step_index, after.step_index),
    )


def _step_output(
    process: Process, state: EnvState, output: Tensor, s: Tensor, past: kernel.Past | None
) -> Tensor:
    """`x_s` from the step output of an action, both `(N, *latent_shape)`."""
    schedule, x_t, t = process.schedule, state.x_t, state.t
    if process.student is not None:
        x0_pred = process.student(x_t, t, state.condition)
        output = process.residual_scale * output + _as_output(process, state, x0_pred, s, past)
    if process.action_type == "latent":
        return output
    alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    x0_pred = to_x0(output, x_t, alpha, sigma, process.action_type)
    return kernel.step(schedule, x_t, x0_pred, t, s, past=past).mean


def _as_output(
    process: Process, state: EnvState, x0_pred: Tensor, s: Tensor, past: kernel.Past | None
) -> Tensor:
    """The step output that stands for the deterministic step with `x0_pred`."""
    schedule, x_t, t = process.schedule, state.x_t, state.t
    if process.action_type == "latent":
        return kernel.step(schedule, x_t, x0_pred, t, s, past=past).mean
    alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    return from_x0(x0_pred, x_t, alpha, sigma, process.action_type)
