"""ReDiFVectorEnv: N denoising trajectories as one batch of tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from . import mdp, rendering, schedules
from .denoiser import Denoiser
from .errors import (
    InvalidActionError,
    InvalidArgumentError,
    InvalidRewardError,
    check_choice,
    check_device,
    check_flag,
    check_integer,
    check_number,
)
from .loading import load_teacher
from .noise import NoiseSchedule, expand
from .rewards import Reward, make_reward
from .teacher import SPLITS, Teacher, TeacherBank

FREE = "free"
DEFAULT_NUM_STEPS = 4
DEFAULT_BANK_SIZE = 256
LATENT_BOUND = 10.0  # ten standard deviations: real latents stay well inside
RESIDUAL_BOUND = 1.0
RESET_OPTIONS = ("tasks", "start")


class ReDiFVectorEnv(VectorEnv):
    """Denoise in few steps so that the result agrees with the teacher's.

    ## Description
    Each of the N rows holds a noisy latent `x_t`. An action moves it to a smaller time; at time 0
    the sample is scored against what the teacher makes, in many steps, of the same noise. The
    transition is deterministic given the action: all exploration is the policy's.

    ## Action Space
    One finite `Box`, float32 `(D + S,)`: the flattened step output (`D` elements), then, when the
    schedule is free, one schedule choice (`S = 1`). With `action_type="latent"` the step output is
    the next latent `x_s`; with a prediction type it is the network output from which the
    environment takes the deterministic DDIM step. The choice in [-1, 1] is the part of the time
    that is kept: -1 goes straight to the data, 0 halves the time. With `residual=True` the step
    output is added, times `residual_scale`, to that of a frozen copy of the teacher's network, so
    that the zero action is the few-step baseline.

    ## Observation Space
    `Dict` of tensors on `device`:

    | key | dtype, shape of a row | meaning |
    |---|---|---|
    | `latents` | float32 `latent_shape` | `x_t` |
    | `timestep` | float32 `(1,)` | `t / T` |
    | `steps_left` | float32 `(1,)` | share of `max_steps` that is left |
    | `condition` | int64 `()` | class, or number of the prompt; only with a conditional teacher |
    | `past_prediction` | float32 `latent_shape` | of the step before; only with `solver_order=2` |

    ## Rewards
    0 until the data is reached; then `reward(x_0, teacher_x_0, condition) - step_cost * nfe`.

    ## Starting State
    A task of the teacher bank: noise `x_T` at the first time of the schedule, and a class. Tasks
    are drawn with replacement, by a hash of the seed, the group and its episode count; the
    `group_size` neighbours of a group always get the same ones.

    ## Episode End
    Reaching time 0 terminates; the last of `num_steps` steps always does. Nothing truncates.
    Autoreset is `SAME_STEP`. `infos` of a step where episodes may have ended holds `final_obs`,
    `_final_obs` (bool mask), `episode` (`r` return, `l` length, `nfe`), `_episode`, `task` (the
    row of the bank that the episode was about), `reward_terms` (what each term of the reward says
    before its weight, by name), and `reward_map` when the reward has a map.

    Args:
        num_envs: N.
        teacher: Bundled name, diffusers folder, or `Teacher`.
        num_steps: Most steps of an episode; default 4, or the length of a listed schedule.
        schedule: `"free"`, a grid name (`"uniform"`, `"karras"`) or a list of times.
        start: Where a free schedule starts; default: at the largest time. Few steps do better when
            they start a little later. `reset(options={"start": times})` overrides it.
        min_steps: Fewest steps of an episode of a free schedule.
        reward: A `Reward` or the name of one, such as `"mse + 0.5*ssim"`.
        action_type: `"latent"` or a diffusers prediction type; `"epsilon"` only where alpha is
            not 0 at the first time.
        step_cost: Reward taken for each network evaluation.
        guidance_scale: Of the student, which decides the cost of a step; default: the teacher's. 1
            against a guided teacher distils guidance away.
        solver_order: Of the steps: 1 for DDIM's, 2 for DPM-Solver++ 2M's, which make use of the
            step before, see `transition`; 2 only along a fixed schedule. With
            `action_type="latent"` an action says itself where it leads: then the order decides
            what is observed, so that a policy can step so.
        group_size: K neighbouring rows that share tasks; must divide `num_envs`.
        residual: Whether actions correct a frozen student.
        residual_scale: What a residual action is multiplied by.
        action_bound: Bound of the step output; default 10 times the schedule's `initial_std`,
            or 1 when `residual`.
        bank: Tasks to use; default: `TeacherBank.build` with the next three.
        bank_size, split, bank_seed: Of the bank that is built, at the first reset.
        seed: Seed until `reset(seed=...)` gives another; drawn when None.
        shard: `(index, count)`, such as `parallel.shard()`: build only this one of `count` equal
            parts of the `num_envs` rows. With one seed the parts play the tasks of the whole, row
            for row.
        device: Where everything lives; default: the teacher's device when it is a `Teacher`.
        render_mode: `"rgb_array"` or None.

    Raises:
        InvalidArgumentError: for any of these that makes no sense, before anything is computed.
        InvalidActionError: from `step`, see there.

    ## Version History
    * v0: initial version.
    """

    metadata = {  # noqa: RUF012 (Gymnasium's own declaration)
        "render_modes": ["rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        teacher: str | Path | Teacher = "digits",
        *,
        num_steps: int | None = None,
        schedule: str | Sequence[float] | Tensor = FREE,
        start: float | None = None,
        min_steps: int | None = None,
        reward: str | Reward = "mse",
        action_type: str = "latent",
        step_cost: float = 0.0,
        guidance_scale: float | None = None,
        solver_order: int = 1,
        group_size: int = 1,
        residual: bool = False,
        residual_scale: float = 0.1,
        action_bound: float | None = None,
        bank: TeacherBank | None = None,
        bank_size: int = DEFAULT_BANK_SIZE,
        split: str = "train",
        bank_seed: int = 0,
        seed: int | None = None,
        shard: tuple[int, int] = (0, 1),
        device: str | torch.device | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.num_envs = check_integer("num_envs", num_envs, 1)
        self.group_size = check_integer("group_size", group_size, 1)
        if self.num_envs % self.group_size:
            raise InvalidArgumentError(
                "group_size",
                group_size,
                f"pass a divisor of {num_envs=}, so that groups are whole.",
            )
        self.shard = _check_shard(shard, self.num_envs, self.group_size)
        self.num_envs //= self.shard[1]
        if render_mode is not None:
            check_choice("render_mode", render_mode, ("rgb_array",))
        self.render_mode = render_mode
        check_choice("action_type", action_type, mdp.ACTION_TYPES)
        check_choice("split", split, SPLITS)
        self._bank_options: dict[str, Any] = {
            "size": check_integer("bank_size", bank_size, 1),
            "split": split,
            "seed": check_integer("bank_seed", bank_seed, 0),
        }
        residual = check_flag("residual", residual)
        step_cost = check_number("step_cost", step_cost)
        residual_scale = check_number("residual_scale", residual_scale)
        if action_bound is not None:
            action_bound = check_number("action_bound", action_bound, minimum=1e-6)
        reward = make_reward(reward)
        self.teacher = as_teacher(teacher, device)
        self.device = self.teacher.device
        denoiser = self.teacher.denoiser
        default = RESIDUAL_BOUND if residual else LATENT_BOUND * denoiser.schedule.initial_std
        self.action_bound = default if action_bound is None else action_bound
        student = copy.copy(denoiser)
        if guidance_scale is not None:
            student.set_guidance(guidance_scale, denoiser.guidance_rescale)
        student.set_solver_order(solver_order)
        self.guidance_scale, self.solver_order = student.guidance_scale, student.solver_order
        timesteps, max_steps = _resolve_schedule(schedule, denoiser.schedule, num_steps)
        _check_action_type(action_type, denoiser.schedule, timesteps)
        if timesteps is None and self.solver_order != 1:
            raise InvalidArgumentError(
                "solver_order",
                solver_order,
                "pass 1 with a free schedule: steps of any length may follow each other, and to "
                "extrapolate far beyond the step before has no bound.",
            )
        self.process = mdp.Process(
            schedule=denoiser.schedule,
            max_steps=max_steps,
            reward=reward,
            timesteps=None if timesteps is None else timesteps.to(self.device),
            action_type=action_type,
            step_cost=step_cost,
            nfe_per_step=student.nfe,
            student=copy.deepcopy(student) if residual else None,
            residual_scale=residual_scale,
            solver_order=self.solver_order,
            **_check_free(start, min_steps, timesteps, max_steps, denoiser.schedule),
        )
        if reward.over_batch and not self.process.lock_step:
            raise InvalidArgumentError(
                "reward",
                reward.name,
                "it scores a row against the others of the batch, so all must end together: use a "
                "fixed schedule, or min_steps as large as the most steps.",
            )
        self._bank = None if bank is None else _check_bank(bank, denoiser).to(self.device)
        self._make_spaces()
        drawn = int(self.np_random.integers(2**62)) if seed is None else seed
        self._seed = check_integer("seed", drawn, 0)
        self._state: mdp.EnvState | None = None
        self.last_state: mdp.EnvState | None = None

    @property
    def bank(self) -> TeacherBank:
        """The tasks; built, or read from the cache, when first needed."""
        if self._bank is None:
            self._bank = TeacherBank.build(self.teacher, **self._bank_options).to(self.device)
        return self._bank

    @property
    def num_tasks(self) -> int:
        """Tasks of the bank, without building it."""
        return self._bank_options["size"] if self._bank is None else len(self._bank)

    @property
    def max_steps(self) -> int:
        """Most steps of an episode."""
        return self.process.max_steps

    @property
    def timesteps(self) -> Tensor | None:
        """The fixed grid, float32 `(max_steps + 1,)`; None when the schedule is free."""
        return self.process.timesteps

    @property
    def state(self) -> mdp.EnvState:
        """The current state, for inspection.

        Raises:
            gymnasium.error.ResetNeeded: before the first `reset`.
        """
        if self._state is None:
            raise gym.error.ResetNeeded("call reset() before using the environment.")
        return self._state

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Start a new episode in every row.

        Args:
            seed: Makes the tasks from here on reproducible. Without one, new tasks follow.
            options: `{"tasks": rows}` starts the episodes from those rows of the bank, integers
                `(num_envs,)`, the same for the neighbours of a group. `{"start": times}` starts the
                episodes of a free schedule there, times of the model, float `(num_envs,)`; those
                that follow start as usual.

        Returns:
            Observations, and `{"task": rows}`, the rows of the bank that the episodes are about.
        """
        options = {} if options is None else options
        if not isinstance(options, dict):
            raise InvalidArgumentError("options", options, "pass a dict, or None.")
        for name in options:
            check_choice("options", name, RESET_OPTIONS)
        if seed is not None:
            seed = check_integer("seed", seed, 0)
        tasks = self._chosen_tasks(options) if "tasks" in options else None
        start = self._chosen_start(options) if "start" in options else None
        if seed is not None:  # all is checked by now: what is refused leaves no trace
            super().reset(seed=seed)
            self._seed = seed
        if seed is not None or self._state is None:
            self._episodes = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        else:  # rows that ended more often than their neighbours must not leave their group
            self._episodes = self._episodes.amax().expand(self.num_envs)
        self._tasks = self._draw() if tasks is None else tasks
        state = mdp.initial(self.process, self.bank, self._tasks)
        self._state = state if start is None else dataclasses.replace(state, t=start)
        self._step_count = 0
        self._clear_flags()
        return mdp.observation(self.process, self._state), {"task": self._tasks.clone()}

    def step(
        self, actions: Tensor | np.ndarray
    ) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """Take one step in every row; rows that end start their next episode at once.

        Args:
            actions: float `(N, D + S)`, inside the action space.

        Raises:
            InvalidActionError: for a wrong shape or dtype, and for values that are not finite or
                outside the Box. On the CPU at once; on another device, where looking at values
                would make the host wait at every step, by the end of an episode.
            InvalidRewardError: for a reward of the wrong shape, or (with the same delay) one that
                is not finite.

        Whatever is raised, by the reward too, the environment stays where it was, and the step can
        be tried again.
        """
        state = self._advance(self.state, self._check_action(actions))
        step_count = self._step_count + 1
        of_all = step_count % self.max_steps == 0
        infos: dict[str, Any] = {}
        if of_all or not self.process.lock_step:  # the host knows where an episode can have ended
            with torch.no_grad():  # a reward's own weights may ask for gradients
                rewards, reward_map, terms = mdp.score(self.process, state)
            self._bad_reward |= ~rewards.isfinite().all()
            if of_all or self.device.type == "cpu":
                self._raise_flags()
            terminations = mdp.terminal(self.process, state)
            infos = self._final_infos(state, rewards, reward_map, terminations)
            infos["reward_terms"] = terms
            self.last_state = state
            state = self._restart(state, terminations)
        else:
            rewards = torch.zeros(self.num_envs, device=self.device)
            terminations = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)
        self._state, self._step_count = state, step_count
        truncations = torch.zeros_like(terminations)
        observations = mdp.observation(self.process, self._state)
        return observations, rewards, terminations, truncations, infos

    def state_dict(self) -> dict[str, Any]:
        """Where every episode is and which tasks follow, for `load_state_dict`.

        Tensors are the environment's own, not copies. The reward's state is not among them.

        Raises:
            gymnasium.error.ResetNeeded: before the first `reset`.
        """
        fields = dataclasses.fields(self.state)
        return {
            "state": {field.name: getattr(self.state, field.name) for field in fields},
            "tasks": self._tasks,
            "episodes": self._episodes,
            "seed": self._seed,
            "step_count": self._step_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, in an environment made with the same arguments.

        In place of `reset`; the bank must hold the same tasks.

        Raises:
            InvalidArgumentError: for the state of an environment of another kind or size.
        """
        self._check_state_dict(state)
        tensors: dict[str, Any] = {
            name: None if value is None else value.to(self.device)
            for name, value in state["state"].items()
        }
        self._state = mdp.EnvState(**tensors)
        self._tasks = state["tasks"].to(self.device)
        self._episodes = state["episodes"].to(self.device)
        self._seed, self._step_count = state["seed"], state["step_count"]
        self._clear_flags()

    def _check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare names and shapes with those of a fresh state; values are not looked at."""
        rows = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        fresh = dataclasses.asdict(mdp.initial(self.process, self.bank, rows))
        wanted = {"state": fresh, "tasks": rows, "episodes": rows, "seed": 0, "step_count": 0}
        if (found := _shapes(state)) != (wanted := _shapes(wanted)):
            raise InvalidArgumentError(
                "state", found, f"pass what state_dict of such an environment returned: {wanted}."
            )

    def render(self) -> tuple[np.ndarray, ...] | None:
        """A picture a row: latent, predicted data, teacher's answer; uint8 `(height, width, 3)`."""
        if self.render_mode is None:
            gym.logger.warn("render() needs render_mode='rgb_array'.")
            return None
        return tuple(self.draw(self.state))

    @torch.no_grad()
    def draw(self, state: mdp.EnvState) -> np.ndarray:
        """Pictures of a state, uint8 `(N, height, width, 3)`."""
        x0_pred = self.teacher.denoiser(state.x_t, state.t.clamp_min(1), state.condition)
        x0_pred = torch.where(expand(state.t <= 0, state.x_t), state.x_t, x0_pred)
        panels = state.x_t, x0_pred, state.teacher_x_0
        return rendering.frames(*(rendering.pixels(x, self.teacher.codec) for x in panels))

    def _clear_flags(self) -> None:
        self._bad_action = torch.zeros(2, dtype=torch.bool, device=self.device)
        self._bad_reward = torch.zeros((), dtype=torch.bool, device=self.device)

    def _advance(self, state: mdp.EnvState, action: Tensor) -> mdp.EnvState:
        """The state after one step; what a checked action means is decided here alone."""
        return mdp.transition(self.process, state, action)

    def _make_spaces(self) -> None:
        denoiser, process = self.teacher.denoiser, self.process
        seen: dict[str, spaces.Space[Any]] = {
            "latents": spaces.Box(-np.inf, np.inf, denoiser.latent_shape, np.float32),
            "timestep": spaces.Box(0, 1, (1,), np.float32),
            "steps_left": spaces.Box(0, 1, (1,), np.float32),
        }
        if denoiser.num_classes is not None:
            seen["condition"] = spaces.Discrete(denoiser.num_classes)
        if process.solver_order == 2:
            seen[mdp.PAST] = spaces.Box(-np.inf, np.inf, denoiser.latent_shape, np.float32)
        dim = int(np.prod(denoiser.latent_shape))
        high = np.full(dim + process.choice_dim, self.action_bound, np.float32)
        high[dim:] = 1
        self.single_observation_space = spaces.Dict(seen)
        self.single_action_space = spaces.Box(-high, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._high = torch.from_numpy(high).to(self.device)
        self._outside_remedy = (
            f"clip the step output to +-{self.action_bound:g} and the choice to +-1, or pass a "
            "larger action_bound."
        )

    def _draw(self) -> Tensor:
        """Rows of the bank for each slot's next episode, int64 `(N,)`; counts the episode."""
        index, count = self.shard
        own = self.num_envs // self.group_size
        groups = torch.arange(self.num_envs, device=self.device) // self.group_size + index * own
        number = self._episodes * (own * count) + groups
        self._episodes = self._episodes + 1
        return task_hash(number, self._seed) % len(self.bank)

    def _chosen_tasks(self, options: dict[str, Any]) -> Tensor:
        try:
            tasks = torch.as_tensor(options["tasks"])
        except (TypeError, ValueError, RuntimeError):
            tasks = torch.empty(0)
        size = len(self.bank)
        whole = tasks.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
        fits = tasks.shape == (self.num_envs,) and whole
        if fits:
            groups = tasks.reshape(-1, self.group_size)
            fits = bool(((groups >= 0) & (groups < size) & (groups == groups[:, :1])).all())
        if not fits:
            each = f"each in [0, {size}), the same for the {self.group_size} neighbours of a group"
            raise InvalidArgumentError(
                "options['tasks']", options["tasks"], f"pass {self.num_envs} integers, {each}."
            )
        return tasks.to(self.device, torch.int64)

    def _chosen_start(self, options: dict[str, Any]) -> Tensor:
        """Checked on the CPU; elsewhere snapped to the model's times, as looking makes it wait."""
        given, noise = options["start"], self.process.schedule
        try:
            start = torch.as_tensor(given, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            start = torch.empty(0)
        fixed = self.process.timesteps is not None or self.process.candidates is not None
        least = self.process.min_steps * schedules.min_gap(noise)
        fits = start.shape == (self.num_envs,) and not fixed
        if fits and start.device.type == "cpu":
            fits = bool(((start >= least) & (noise.snap(start) == start)).all())
        if not fits:
            raise InvalidArgumentError(
                "options['start']",
                given,
                f"pass {self.num_envs} times of the model of at least {least:g}, with a free "
                "schedule.",
            )
        return noise.snap(start.to(self.device)).clamp_min(least)

    def _check_action(self, actions: Tensor | np.ndarray) -> Tensor:
        """The actions as a tensor of our own; bad values are flagged and made harmless."""
        action = self._as_tensor(actions)
        if not action.is_floating_point():
            raise InvalidActionError("actions.dtype", action.dtype, "pass float32.")
        action = action.detach().to(self._high)
        finite = action.isfinite()
        outside = (action.abs() > self._high) & finite
        self._flag(~finite.all(), outside.any())
        # A tensor of our own; and no table is indexed with NaN before the flag is looked at.
        return torch.where(finite, action, 0.0)

    def _as_tensor(self, actions: Tensor | np.ndarray) -> Tensor:
        try:
            # A copy of arrays: torch takes none that are read-only or run backwards.
            array = not isinstance(actions, Tensor)
            action = torch.as_tensor(np.array(actions) if array else actions)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidActionError("actions", actions, "pass a tensor or array.") from error
        if action.shape != self.action_space.shape:
            raise InvalidActionError(
                "actions.shape", tuple(action.shape), f"pass {self.action_space.shape}."
            )
        return action

    def _flag(self, not_finite: Tensor, outside: Tensor) -> None:
        """Remember bad actions; on the CPU, raise at once, before the state changes."""
        self._bad_action |= torch.stack([not_finite, outside])
        if self.device.type == "cpu":
            self._raise_flags()

    def _raise_flags(self) -> None:
        bad, outside, reward = (bool(flag) for flag in (*self._bad_action, self._bad_reward))
        if bad or outside or reward:
            self._clear_flags()
        if bad:
            raise InvalidActionError(
                "actions", "NaN or infinity", "pass finite values; lower the learning rate."
            )
        if outside:
            raise InvalidActionError(
                "actions",
                "outside the action space",
                self._outside_remedy,
            )
        if reward:
            raise InvalidRewardError(
                f"reward {self.process.reward.name!r} returned",
                "NaN or infinity",
                "return finite values for any sample.",
            )

    def _final_infos(
        self, state: mdp.EnvState, rewards: Tensor, reward_map: Tensor | None, ended: Tensor
    ) -> dict[str, Any]:
        length = torch.where(ended, state.step_index, 0)
        infos = {
            "final_obs": mdp.observation(self.process, state),
            "_final_obs": ended.clone(),
            "episode": {
                "r": rewards.clone(),
                "l": length,
                "nfe": length * self.process.nfe_per_step,
            },
            "_episode": ended.clone(),
            "task": self._tasks.clone(),
        }
        if reward_map is not None:
            infos["reward_map"] = reward_map
        return infos

    def _restart(self, state: mdp.EnvState, ended: Tensor) -> mdp.EnvState:
        """The state with a fresh episode in every row that has ended, without asking which."""
        before = self._episodes
        tasks = self._draw()
        fresh = mdp.initial(self.process, self.bank, tasks)
        self._tasks = torch.where(ended, tasks, self._tasks)
        self._episodes = torch.where(ended, self._episodes, before)
        if self.process.lock_step:
            return fresh

        changed = {
            field.name: torch.where(expand(ended, new), new, getattr(state, field.name))
            for field in dataclasses.fields(state)
            if (new := getattr(fresh, field.name)) is not None
        }
        return dataclasses.replace(state, **changed)


def _shapes(state: Any) -> Any:
    """Shapes of the tensors of a nested mapping; types of what else is in it."""
    if isinstance(state, Mapping):
        return {name: _shapes(value) for name, value in state.items()}
    return tuple(state.shape) if isinstance(state, Tensor) else type(state).__name__


def task_hash(number: Tensor, seed: int) -> Tensor:
    """Pseudo-random int64 in [0, 2^62) for each number: splitmix64 (Steele et al. 2014).

    Drawing by hash instead of a generator makes an episode's task a function of the seed and its
    number alone, so rows can end at different times without the host knowing.
    """
    x = number + _signed((seed + 1) * 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)


def _signed(value: int) -> int:
    """The int64 with the lowest 64 bits of `value`."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def as_teacher(teacher: str | Path | Teacher, device: str | torch.device | None) -> Teacher:
    """A teacher from its name or folder, on a device; one that is given must be there already.

    Raises:
        InvalidArgumentError: for anything else, and for a teacher on another device.
    """
    if isinstance(teacher, str | Path):
        return load_teacher(teacher, device=device or "cpu")
    if not isinstance(teacher, Teacher):
        raise InvalidArgumentError(
            "teacher", teacher, "pass a bundled name, a diffusers folder or a Teacher."
        )
    if device is not None and not _same_device(check_device(device), teacher.device):
        raise InvalidArgumentError(
            "device",
            device,
            f"the teacher is on {teacher.device}; move it with teacher.to(device).",
        )
    return teacher


def _same_device(wanted: torch.device, found: torch.device) -> bool:
    """Whether `found` is what was asked for; without a number, any of its kind will do."""
    same_index = None in (wanted.index, found.index) or wanted.index == found.index
    return wanted.type == found.type and same_index


def _resolve_schedule(
    spec: str | Sequence[float] | Tensor, noise: NoiseSchedule, num_steps: int | None
) -> tuple[Tensor | None, int]:
    """The grid (None when free) and the number of steps."""
    if num_steps is not None:
        num_steps = check_integer("num_steps", num_steps, 1)
    if not isinstance(spec, str):
        grid = schedules.explicit(spec, noise)
        return schedules.make_grid(grid, noise, num_steps or len(grid) - 1), len(grid) - 1
    steps = num_steps or DEFAULT_NUM_STEPS
    return (None if spec == FREE else schedules.make_grid(spec, noise, steps)), steps


def _check_shard(shard: tuple[int, int], num_envs: int, group_size: int) -> tuple[int, int]:
    """The part of the rows that is built; parts are equal, and groups are whole."""
    try:
        index, count = (check_integer("shard", part, 0) for part in shard)
    except (TypeError, ValueError):
        index, count = 0, 0
    if not index < count:
        raise InvalidArgumentError("shard", shard, "pass (index, count), with index < count.")
    if num_envs % (group_size * count):
        raise InvalidArgumentError(
            "num_envs",
            num_envs,
            f"pass a multiple of {group_size * count}, so that each of {count} processes has as "
            f"many groups of {group_size}.",
        )
    return index, count


def _check_free(
    start: float | None,
    min_steps: int | None,
    timesteps: Tensor | None,
    max_steps: int,
    noise: NoiseSchedule,
) -> dict[str, Any]:
    """`start` and `min_steps` of a free schedule; a fixed one has its own."""
    for name, value in (("start", start), ("min_steps", min_steps)):
        if value is not None and timesteps is not None:
            raise InvalidArgumentError(name, value, "leave it out, or pass schedule='free'.")
    if start is not None:
        start = check_number("start", start)
        time = torch.tensor(start)
        if start <= 0 or noise.snap(time) != time:  # both as rounded to float32
            raise InvalidArgumentError(
                "start", start, f"pass a time of the model, at most {noise.max_timestep:g}."
            )
    min_steps = 1 if min_steps is None else check_integer("min_steps", min_steps, 1)
    room = (noise.max_timestep if start is None else start) / schedules.min_gap(noise)
    if min_steps > min(max_steps, room):
        raise InvalidArgumentError(
            "min_steps", min_steps, f"pass at most {min(max_steps, room):g}."
        )
    return {"start": start, "min_steps": min_steps}


def _check_action_type(action_type: str, noise: NoiseSchedule, timesteps: Tensor | None) -> None:
    """Refuse noise where there is nothing else; free schedules can be told to start anywhere."""
    if action_type != "epsilon":
        return
    if noise.ends_in_noise if timesteps is None else bool(noise.alpha(timesteps[:1]) == 0):
        raise InvalidArgumentError(
            "action_type",
            action_type,
            "alpha is 0 at the noisiest time, where an epsilon carries no x_0: pass 'latent', "
            "'sample' or 'v_prediction', or a list of times that starts later.",
        )


def _check_bank(bank: TeacherBank, denoiser: Denoiser) -> TeacherBank:
    if not isinstance(bank, TeacherBank):
        raise InvalidArgumentError("bank", bank, "pass a TeacherBank, such as TeacherBank.build's.")
    for name in ("x_T", "teacher_x_0", "condition"):
        part = getattr(bank, name)
        if not isinstance(part, Tensor) and (name != "condition" or part is not None):
            raise InvalidArgumentError("bank", f"{name} of {type(part).__name__}", "hold tensors.")
    if not bank.x_T.ndim:
        raise InvalidArgumentError("bank", "x_T without rows", "pass a bank of TeacherBank.build.")
    shape = tuple(bank.x_T.shape[1:])
    if not len(bank) or shape != denoiser.latent_shape or bank.teacher_x_0.shape != bank.x_T.shape:
        raise InvalidArgumentError(
            "bank", f"latents of shape {shape}", f"pass latents of shape {denoiser.latent_shape}."
        )
    if (bank.condition is None) != (denoiser.num_classes is None):
        raise InvalidArgumentError(
            "bank",
            "without conditions" if bank.condition is None else "with conditions",
            "pass a bank that was built with this teacher.",
        )
    if bank.condition is not None and bank.condition.shape != (len(bank),):
        raise InvalidArgumentError(
            "bank", f"conditions {tuple(bank.condition.shape)}", "pass a class for each task."
        )
    known = denoiser.num_classes
    if bank.condition is not None and known is not None:
        if bank.condition.dtype != torch.int64:
            raise InvalidArgumentError(
                "bank", f"conditions of {bank.condition.dtype}", "pass classes in int64."
            )
        outside = bank.condition[(bank.condition < 0) | (bank.condition >= known)]
        if len(outside):
            raise InvalidArgumentError(
                "bank",
                f"condition {int(outside[0])}",
                f"pass a bank that was built with this teacher, which has {known}.",
            )
    for name in ("x_T", "teacher_x_0"):
        latents = getattr(bank, name)
        if latents.dtype != torch.float32 or not bool(latents.isfinite().all()):
            raise InvalidArgumentError(
                "bank", f"{name} of {latents.dtype}", "pass finite latents in float32."
            )
    return bank
