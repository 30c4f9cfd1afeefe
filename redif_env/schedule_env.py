"""ReDiFSchedule-v0: a frozen student denoises; the agent only chooses when to step."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from torch import Tensor

from . import mdp, schedules
from .denoiser import Denoiser
from .env import ReDiFEnv
from .errors import InvalidActionError, InvalidArgumentError, check_choice, check_integer
from .noise import NoiseSchedule
from .rewards import Reward
from .teacher import Teacher, TeacherBank
from .vector_env import DEFAULT_BANK_SIZE, DEFAULT_NUM_STEPS, ReDiFVectorEnv, as_teacher

DEFAULT_NUM_CANDIDATES = 16


class ReDiFScheduleVectorEnv(ReDiFVectorEnv):
    """Choose the times at which a frozen student steps, so that it agrees with the teacher.

    ## Description
    The process of `ReDiFVectorEnv` with a frozen student inside. Each step takes the student's
    deterministic DDIM step from `t` to the time that the action picks from a grid. A fixed
    sequence of choices is therefore plain DDIM on those times.

    ## Action Space
    `Discrete(M)`: which of the M candidate times, in falling order, is next; the last is 0. Only
    times below `t` are valid. The last of `max_steps` steps goes to 0 whatever the action, and no
    choice may leave fewer than `min_steps` steps: `action_masks()` tells the valid choices of each
    row, always at least one. Any other action below M takes the nearest valid candidate instead,
    so that algorithms without masks work; it is counted in `infos["episode"]["invalid_actions"]`.

    ## Observation Space
    That of `ReDiFVectorEnv`: `latents`, `timestep`, `steps_left`, and `condition` with classes.

    ## Rewards
    0 until the data is reached; then `reward(x_0, teacher_x_0, condition) - step_cost * nfe`.

    ## Starting State
    A task of the teacher bank, at the first time of `schedule`; see `ReDiFVectorEnv`.

    ## Episode End
    As for `ReDiFVectorEnv`. `infos["episode"]` also holds `invalid_actions`, int64 `(N,)`.

    Args:
        num_envs: N.
        teacher: Bundled name, diffusers folder, or `Teacher`.
        schedule: A grid name (`"uniform"`, `"karras"`) or a list of times. Episodes start at its
            first time; the M times after it are the candidates.
        num_candidates: M of a named grid, 16 by default.
        min_steps: Fewest steps of an episode.
        max_steps: Most steps of an episode; default 4, or M where that is less.
        student: The denoiser that steps; a copy of it is frozen. Default: the teacher's.
        reward, step_cost, group_size, bank, bank_size, split, bank_seed, seed, device,
            render_mode: as for `ReDiFVectorEnv`.

    Raises:
        InvalidArgumentError: for any of these that makes no sense, or step counts that the
            candidates do not allow.
        InvalidActionError: from `step`, for actions that are not N integers in [0, M); on other
            devices than the CPU values are looked at by the end of an episode.

    ## Version History
    * v0: initial version.
    """

    def __init__(
        self,
        num_envs: int = 1,
        teacher: str | Path | Teacher = "digits",
        *,
        schedule: str | Sequence[float] | Tensor = "uniform",
        num_candidates: int | None = None,
        min_steps: int = 1,
        max_steps: int | None = None,
        student: Denoiser | None = None,
        reward: str | Reward = "mse",
        step_cost: float = 0.0,
        group_size: int = 1,
        bank: TeacherBank | None = None,
        bank_size: int = DEFAULT_BANK_SIZE,
        split: str = "train",
        bank_seed: int = 0,
        seed: int | None = None,
        device: str | torch.device | None = None,
        render_mode: str | None = None,
    ) -> None:
        teacher = as_teacher(teacher, device)
        frozen = _frozen(student, teacher)
        grid = _grid(schedule, frozen.schedule, num_candidates)
        least, most = _step_range(min_steps, max_steps, len(grid) - 1)
        super().__init__(
            num_envs,
            teacher,
            num_steps=most,
            min_steps=least,
            reward=reward,
            step_cost=step_cost,
            group_size=group_size,
            bank=bank,
            bank_size=bank_size,
            split=split,
            bank_seed=bank_seed,
            seed=seed,
            device=device,
            render_mode=render_mode,
        )
        self.process = dataclasses.replace(
            self.process,
            schedule=frozen.schedule,
            candidates=grid.to(self.device),
            student=frozen,
            nfe_per_step=frozen.nfe,
        )
        self.single_action_space = spaces.Discrete(len(grid) - 1)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._outside_remedy = f"pass integers from 0 to {len(grid) - 2}."

    @property
    def candidates(self) -> Tensor:
        """The times to choose from, float32 `(M,)`, falling to 0."""
        assert self.process.candidates is not None
        return self.process.candidates[1:]

    def action_masks(self) -> Tensor:
        """Which choices are valid now, bool `(N, M)` on `device`; at least one in each row.

        Raises:
            gymnasium.error.ResetNeeded: before the first `reset`.
        """
        first, last = mdp.choice_range(self.process, self.state)
        index = torch.arange(len(self.candidates), device=self.device)
        return (index >= first.unsqueeze(1)) & (index <= last.unsqueeze(1))

    def _check_action(self, actions: Tensor | np.ndarray) -> Tensor:
        action = self._as_tensor(actions)
        if action.is_floating_point() or action.is_complex() or action.dtype == torch.bool:
            raise InvalidActionError("actions.dtype", action.dtype, "pass int64.")
        action = action.to(self.device, torch.int64)
        outside = ((action < 0) | (action >= len(self.candidates))).any()
        self._flag(torch.zeros_like(outside), outside)
        return action

    def _advance(self, state: mdp.EnvState, action: Tensor) -> mdp.EnvState:
        return mdp.follow(self.process, state, action)

    def _final_infos(
        self, state: mdp.EnvState, rewards: Tensor, reward_map: Tensor | None, ended: Tensor
    ) -> dict[str, Any]:
        infos = super()._final_infos(state, rewards, reward_map, ended)
        assert state.invalid_choices is not None
        infos["episode"]["invalid_actions"] = torch.where(ended, state.invalid_choices, 0)
        return infos


class ReDiFScheduleEnv(ReDiFEnv):
    """`ReDiFSchedule-v0` for one trajectory at a time, with numpy observations.

    Spaces, rewards, episodes and arguments are those of `ReDiFScheduleVectorEnv`, which see;
    `num_envs` and `group_size` are 1. `info` of the last step holds `nfe`, `invalid_actions`,
    `reward_terms` and, when the reward has one, `reward_map`.
    """

    _kind = ReDiFScheduleVectorEnv
    _env: ReDiFScheduleVectorEnv

    def action_masks(self) -> np.ndarray:
        """Which choices are valid now, bool `(M,)`: what sb3-contrib's `MaskablePPO` asks for.

        Raises:
            gymnasium.error.ResetNeeded: after the end of an episode, where there is no choice.
        """
        self._check_running()
        return self._env.action_masks()[0].cpu().numpy()


def _frozen(student: Denoiser | None, teacher: Teacher) -> Denoiser:
    """A frozen copy of the student, on the teacher's device."""
    wanted = teacher.denoiser
    student = wanted if student is None else student
    if not isinstance(student, Denoiser):
        raise InvalidArgumentError("student", student, "pass a Denoiser or None.")
    for name in ("latent_shape", "num_classes", "schedule.initial_std"):
        theirs, ours = map(operator.attrgetter(name), (student, wanted))
        if theirs != ours:
            raise InvalidArgumentError(
                "student", f"{name}={theirs}", f"pass a denoiser with the teacher's, {ours}."
            )
    return copy.deepcopy(student).eval().requires_grad_(False).to(teacher.device)


def _grid(
    spec: str | Sequence[float] | Tensor, noise: NoiseSchedule, num_candidates: int | None
) -> Tensor:
    """The start and the M candidates, float32 `(M + 1,)`."""
    if not isinstance(spec, str):
        if num_candidates is not None:
            raise InvalidArgumentError(
                "num_candidates", num_candidates, "leave it out: the listed times say how many."
            )
        return schedules.explicit(spec, noise)
    check_choice("schedule", spec, schedules.GRID_NAMES)
    num = DEFAULT_NUM_CANDIDATES
    if num_candidates is not None:
        num = check_integer("num_candidates", num_candidates, 1)
    try:
        return schedules.make_grid(spec, noise, num)
    except InvalidArgumentError as error:
        raise InvalidArgumentError("num_candidates", num, error.remedy) from error


def _step_range(min_steps: int, max_steps: int | None, candidates: int) -> tuple[int, int]:
    """The fewest and the most steps, such that every episode can keep to both."""
    least = check_integer("min_steps", min_steps, 1)
    most = min(DEFAULT_NUM_STEPS, candidates)
    if max_steps is not None:
        most = check_integer("max_steps", max_steps, 1)
    if most > candidates:
        raise InvalidArgumentError(
            "max_steps", most, f"pass at most {candidates}: no more candidates can be visited."
        )
    if least > most:
        raise InvalidArgumentError(
            "min_steps", least, f"pass at most {most}, or a larger max_steps and more candidates."
        )
    return least, most
