"""ReDiFPPO: Stable-Baselines3's PPO for actions of thousands of dimensions, on tensors."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from redif_env import parallel
from redif_env.env import ReDiFEnv
from redif_env.errors import InvalidArgumentError, check_number
from redif_env.rewards import online_terms
from redif_env.vector_env import ReDiFVectorEnv

from . import (
    compatibility,
    diagnostics,
    exploration,
    minibatch,
    schedule_learning,
    sharding,
    wiring,
)
from .advantages import batch_relative
from .buffers import TorchRolloutBuffer
from .choices import ScheduleHead
from .divergences import AdaptiveCoefficient, adapting
from .exploration import GAP_FRACTION, at
from .guards import RatioError, TrainingDivergedError, check_ratio, check_skipped, within_memory
from .lora import merge
from .minibatch import Evaluation
from .objective import Objective
from .options import NUMBERS, check, check_again, check_numbers
from .policies import Exploration, StudentPolicy, copy_of_teacher
from .saving import TrainingState
from .schedule_learning import ChoiceRollout
from .sharing import Exploring, Shared, Turns, draw_turns, exploring, in_rollout
from .statistics import EpisodeStatistics, HostView
from .vec_env import TorchVecEnv

__all__ = ["GAP_FRACTION", "RatioError", "ReDiFPPO", "TrainingDivergedError"]

CHECKS = (OrderEnforcing, PassiveEnvChecker)  # what `gymnasium.make` adds: they change nothing


# None as an argument: worked out from others at construction, and kept as it is by `load`.
DEFAULTED = ("credit", "stochastic_steps", "antithetic", "n_steps", "rollout_buffer_kwargs")


class ReDiFPPO(PPO):
    """PPO for denoising.

    On a `TorchVecEnv` rollouts and updates stay on the device. On any other environment, and with
    any other policy than `StudentPolicy`, this is Stable-Baselines3's PPO, with `ratio="sum"` and
    `advantage="gae"`.

    Args:
        policy: `"StudentPolicy"` or `StudentPolicy`, or any other Stable-Baselines3 policy.
        env: A `TorchVecEnv`, a Gymnasium vector environment or a `ReDiFEnv` (made one), or anything
            that Stable-Baselines3 takes. A `ReDiFEnv` in wrappers of one's own is one of the last
            kind: they see numpy.
        learning_rate: Number, or function of the progress that remains (1 to 0).
        n_steps: Steps of a rollout; default: one whole episode.
        batch_size: Transitions of a minibatch.
        micro_batch_size: Transitions that are sent through the network at once, in rollouts and
            updates alike; None: all. The gradients of a minibatch's parts add up to its own, so
            that only memory and time depend on it. A student that runs out of the device's memory
            warns, halves it, and goes on from where it was.
        reuse_forward: Whether an update goes back through the rollout's own forward pass in place
            of sending the states forward again: the same gradient for one evaluation a state less,
            and the memory of its activations until then. For rollouts of one episode that are used
            once, as one minibatch: `n_epochs=1`, and `batch_size` the rows of the environment.
            Needs one exploring step and groups; not with `micro_batch_size`, a free schedule, and
            students that processes share out. A student that was changed between the two is asked
            again.
        n_epochs: Passes over a rollout.
        gamma: Discount factor of `advantage="gae"`; groups do not discount.
        gae_lambda, clip_range, clip_range_vf, normalize_advantage, ent_coef, vf_coef: as in
            Stable-Baselines3. Group advantages always are normalised, see `advantage_std`.
        max_grad_norm: Largest gradient norm; with a critic, of actor and critic each.
        ratio: `"element"`, `"mean"` or `"sum"`; see `losses.reduce_log_ratio`.
        advantage: `"group"`: relative to the other rollouts of the same task (the environment's
            `group_size` must be at least 2); `"batch"`: to all of the rollout (DDPO); `"task"`: to
            a running mean of the task; `"gae"`: to a critic, which predicts a map of values with
            local credit (element-wise GAE).
        credit: `"local"`: each element is credited with the reward of its own place, from the
            reward's map; `"global"`: all with the whole reward. Default: `"local"` with
            `ratio="element"`, else `"global"`. Wrappers that change rewards need `"global"`, or
            change the map too.
        local_weight: Share of local credit in the mixture with global credit, in [0, 1].
        local_radius: Elements around its own place whose reward an element is credited with; or one
            such number for each step, where one step explores.
        advantage_std: What the advantages of groups are divided by: `"rollout"`: one standard
            deviation of all; `"group"`: that of each group, over its elements too, so that an easy
            task counts as much as a hard one (GRPO). With small rollouts and local credit the
            latter is better (docs/decisions.md).
        advantage_clip: Largest size of a normalised advantage; None does not clip.
        stochastic_steps: `"all"`, `"one"`, or a number of neighbouring steps (cyclically, so that
            each step explores equally often): only these explore, at random and the same ones in
            a group, so that all of the return's variance belongs to them; only they are trained
            on. Default: `"one"` with groups, else `"all"`.
        step_weights: Weight of each step's loss; default: 1 each. Where one step explores, one of
            weight 0 does not: all trajectories go into steps that are trained.
        antithetic: Whether neighbours in a group explore with opposite noise, which cancels the
            even orders of the reward's change. Needs groups of even size. Default: with groups.
        eta: Noise factor while exploring, in [0, 1]; number or function of the remaining progress.
        min_std: Smallest exploration std, above 0; likewise. In units of the policy's
            `exploration_unit`.
        gap_fraction: Explore with at least this share of the gap, the root-mean-square distance of
            the last rollout's samples (of their group's mean) from the teacher's: exploration
            shrinks as the student learns. `min_std` stays the floor. None: no such rule;
            `"auto"`: 0.5 with a `StudentPolicy`.
        ema_decay: Of the student's moving average, an update; reached after a warm-up.
        trained: With a free schedule: `"student"` alone, at the most likely times; `"schedule"`
            alone, of a frozen student; `"both"` at once; or `"alternating"`, a rollout each.
            Default: `"both"`; without a free schedule `"student"`.
        schedule_clip_range: Of the ratio of a choice of time.
        schedule_ent_coef: Coefficient of its entropy bonus.
        target_kl: Stop the epochs of an iteration beyond 1.5 times this KL; an *element* of the
            action with a `StudentPolicy`, of the whole action with other policies (as in
            Stable-Baselines3).
        adaptive_lr: Whether to divide or multiply the learning rate by 1.5 after an iteration whose
            KL was more than 1.5 times, or less than two thirds of, `target_kl`.
        divergence: Penalise this divergence of the student's steps from those of the student that
            training started from: one of `divergences.DIVERGENCES`; None for none. It is their
            means that are held: both explore with the std of the moment, so that a learned std may
            drift (only its change within an iteration is penalised).
        divergence_coef: The penalty's coefficient; its initial value with a target.
        divergence_alpha: Order of `"renyi"` and `"power"`.
        divergence_target: Adapt the coefficient so that the divergence an element stays near this.
        policy_kwargs: For the policy. With `StudentPolicy`, `student` and `timesteps` default to
            the environment's teacher and grid.
        rollout_buffer_class: On a `TorchVecEnv` `TorchRolloutBuffer` or a class of it; no other
            holds tensors.
        rollout_buffer_kwargs, stats_window_size, tensorboard_log, verbose, seed, device: as in
            Stable-Baselines3; the device defaults to the environment's. On a
            `TorchVecEnv` means of episodes are those of the last rollout that ended some, whatever
            `stats_window_size` is.

    `load` takes other values of all but `policy` and `policy_kwargs`, unless they need a critic or
    a reference that the saved policy lacks.

    Attributes:
        rows_trained: States that the student's gradients were computed for since construction;
            transitions of a group that start in one state count once.
        rollouts: Whole rollouts since construction; one that a callback stops does not count.
        gap: What `gap_fraction` is a share of, in latent units; 0 until it is first needed, when
            it is measured on a few tasks without noise.

    Raises:
        InvalidArgumentError: for options that do not go together, at construction; from `learn`,
            for a function of the progress that leaves its range, and for a wrapper that changes
            rewards under local credit.
        RatioError: from `learn`, if the first update does not start at ratio 1.
        TrainingDivergedError: from `learn`, after three updates in a row without a finite loss.
    """

    policy_aliases = {**PPO.policy_aliases, "StudentPolicy": StudentPolicy}  # noqa: RUF012

    def __init__(
        self,
        policy: str | type[ActorCriticPolicy],
        env: GymEnv | VectorEnv | str | None,
        learning_rate: float | Schedule = 1e-4,
        n_steps: int | None = None,
        batch_size: int = 256,
        n_epochs: int = 3,
        gamma: float = 1.0,
        gae_lambda: float = 0.95,
        clip_range: float | Schedule = 0.2,
        clip_range_vf: float | Schedule | None = None,
        normalize_advantage: bool = True,
        ent_coef: float = 0.0,
        vf_coef: float = 0.5,
        max_grad_norm: float = 0.5,
        *,
        ratio: str = "element",
        advantage: str = "group",
        credit: str | None = None,
        local_weight: float = 1.0,
        local_radius: int | Sequence[int] = 0,
        advantage_std: str = "rollout",
        advantage_clip: float | None = None,
        stochastic_steps: str | int | None = None,
        step_weights: Sequence[float] | None = None,
        micro_batch_size: int | None = None,
        reuse_forward: bool = False,
        antithetic: bool | None = None,
        eta: float | Schedule = 0.0,
        min_std: float | Schedule = 0.005,
        gap_fraction: float | str | None = "auto",
        ema_decay: float = 0.95,
        trained: str | None = None,
        schedule_clip_range: float = 0.2,
        schedule_ent_coef: float = 0.0,
        target_kl: float | None = None,
        adaptive_lr: bool = False,
        divergence: str | None = None,
        divergence_coef: float = 1.0,
        divergence_alpha: float = 0.5,
        divergence_target: float | None = None,
        rollout_buffer_class: type[RolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        given = dict(locals())
        grouped = advantage == "group"
        if stochastic_steps is None:
            stochastic_steps = "one" if grouped else "all"
        self.ratio: str = check("ratio", ratio)
        self.advantage: str = check("advantage", advantage)
        default = "local" if ratio == "element" else "global"
        self.credit: str = check("credit", default if credit is None else credit)
        self.local_weight: float = check("local_weight", local_weight)
        self.local_radius: int | list[int] = check("local_radius", local_radius)
        self.advantage_std: str = check("advantage_std", advantage_std)
        self.advantage_clip: float | None = check("advantage_clip", advantage_clip)
        self.divergence: str | None = check("divergence", divergence)
        self.divergence_coef: float = check("divergence_coef", divergence_coef)
        self.divergence_alpha = divergence_alpha
        self.divergence_target = divergence_target
        self.adaptive_lr: bool = check("adaptive_lr", adaptive_lr)
        self.target_kl = target_kl
        self.stochastic_steps: str | int = check("stochastic_steps", stochastic_steps)
        self.step_weights: list[float] | None = check("step_weights", step_weights)
        self.micro_batch_size: int | None = check("micro_batch_size", micro_batch_size)
        self.reuse_forward: bool = check("reuse_forward", reuse_forward)
        self.antithetic: bool = grouped if antithetic is None else check("antithetic", antithetic)
        self.eta = eta
        self.min_std = min_std
        self.gap_fraction: Any = check("gap_fraction", gap_fraction)
        self.ema_decay: float = check("ema_decay", ema_decay)
        self.trained: Any = check("trained", trained)
        self.schedule_clip_range: float = check("schedule_clip_range", schedule_clip_range)
        self.schedule_ent_coef: float = check("schedule_ent_coef", schedule_ent_coef)
        compatibility.check_options(self)
        self._start_counting()
        n_steps = check("n_steps", n_steps)
        batch_size = check("batch_size", batch_size)
        n_epochs = check("n_epochs", n_epochs)
        check_numbers({name: given[name] for name in NUMBERS}, seed)
        if not parallel.is_main():
            verbose, tensorboard_log = 0, None
        if env is not None and not isinstance(env, str):
            env = self._wrap_env(env, verbose)
        native = env if isinstance(env, TorchVecEnv) else None
        if native is not None and device == "auto":
            device = native.device
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps or int(getattr(native and native.env.unwrapped, "max_steps", 2048)),
            batch_size=batch_size,
            n_epochs=n_epochs,
            gamma=gamma,
            gae_lambda=gae_lambda,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            normalize_advantage=normalize_advantage,
            ent_coef=ent_coef,
            vf_coef=vf_coef,
            max_grad_norm=max_grad_norm,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            target_kl=target_kl,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=dict(policy_kwargs or {}),  # SB3 changes it in place
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
        )
        if native is not None:
            compatibility.check_buffer_kwargs(self, rollout_buffer_kwargs or {})
        if _init_setup_model:
            self._setup_model()

    def _start_counting(self) -> None:
        """What changes while training, as it is before."""
        self.adaptive_coef: AdaptiveCoefficient | None = None
        # The learning rate is divided by a coefficient that grows while the KL is too large.
        self.lr_divisor: AdaptiveCoefficient | None = None
        self.training_state = TrainingState()
        self.rollouts = 0
        self.rows_trained = 0
        self.updates = 0
        self.updates_skipped = 0
        self._skipped_in_a_row = 0
        self.gap = 0.0
        self._gap: Tensor | None = None
        self._error: Tensor | None = None
        self._explored_step: Tensor
        self._turns: Turns
        self._choices = ChoiceRollout(0)
        self._checked_env: Any = None
        self._row: Tensor
        self._start: list[Tensor] = []
        self._kept_with: list[int] = []

    @classmethod
    def load(cls, path: Any, env: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in Stable-Baselines3; None for an option that has a default stands for what was saved.

        Raises:
            InvalidArgumentError: for options that do not go together, or with the saved policy.
        """
        given = {k: v for k, v in kwargs.items() if not (v is None and k in DEFAULTED)}
        if given.get("rollout_buffer_kwargs"):
            raise InvalidArgumentError(
                "rollout_buffer_kwargs",
                given["rollout_buffer_kwargs"],
                "pass its options to load by themselves.",
            )
        return super().load(path, env, *args, **given)

    @property
    def window(self) -> int | None:
        """How many steps of an episode explore; None: all."""
        named = {"all": None, "one": 1}
        return named.get(self.stochastic_steps, self.stochastic_steps)  # type: ignore[arg-type]

    @property
    def trains_student(self) -> bool:
        """Whether the policy is a `StudentPolicy`."""
        return issubclass(self.policy_class, StudentPolicy)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As Stable-Baselines3, and Gymnasium vector environments and `ReDiFEnv` as tensors."""
        bare = env
        while type(bare) in CHECKS:
            bare = bare.env
        if isinstance(bare, ReDiFEnv):
            env = bare.vector_env
        if isinstance(env, VectorEnv):
            return TorchVecEnv(env)
        return PPO._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        """As in Stable-Baselines3; at construction and in `load`."""
        check_again(self)
        compatibility.check_options(self)
        coef, rate_target = self.divergence_coef, self.target_kl if self.adaptive_lr else None
        if self.adaptive_coef is not None and self.adaptive_coef.coefficient != coef:
            self.adaptive_coef = None  # `load` was given another
        self.adaptive_coef = adapting(self.adaptive_coef, self.divergence_target, coef)
        self.lr_divisor = adapting(self.lr_divisor, rate_target)
        self._copies_teacher = False
        buffer = self.rollout_buffer_class or RolloutBuffer
        if self.env is not None:
            self._configure()
        elif issubclass(buffer, TorchRolloutBuffer):  # loaded; `set_env` knows the rest
            self.rollout_buffer_kwargs.update(wiring.buffer_options(self))
        super()._setup_model()
        self._check_student()
        if isinstance(self.policy, StudentPolicy) and self.micro_batch_size is not None:
            self.policy.set_batch_size(self.micro_batch_size)
        self._load_teacher_weights()
        self._attach_state()

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As in Stable-Baselines3; the environment must have the student's schedule."""
        before = self.env
        super().set_env(env, force_reset)
        try:
            self._configure()
            self._attach_state()
        except InvalidArgumentError:
            self.env = before
            raise
        if isinstance(self.rollout_buffer, TorchRolloutBuffer) and self.trains_student:
            for name in ("group_size", "action_bound", "shares_states"):
                setattr(self.rollout_buffer, name, self.rollout_buffer_kwargs[name])
            self.rollout_buffer.forget_tasks(self.rollout_buffer_kwargs["num_tasks"])

    def _configure(self) -> None:
        """Settle what depends on the environment, and refuse what does not go together."""
        env = self.env if isinstance(self.env, TorchVecEnv) else None
        has_teacher = env is not None and isinstance(env.env.unwrapped, ReDiFVectorEnv)
        if self.gap_fraction == "auto":
            self.gap_fraction = GAP_FRACTION if self.trains_student and has_teacher else None
        elif self.gap_fraction is not None and not has_teacher:
            raise InvalidArgumentError(
                "gap_fraction", self.gap_fraction, "only a ReDiFVectorEnv knows the gap: pass None."
            )
        if not self.trains_student:
            compatibility.check_generic_policy(self)
        elif env is None:
            raise InvalidArgumentError(
                "env",
                type(self.env).__name__,
                "StudentPolicy needs a ReDiF vector environment or TorchVecEnv, without wrappers.",
            )
        compatibility.check_parallel(None if env is None else env.env.unwrapped)
        if env is None:
            return
        own = self.rollout_buffer_class
        if own is None or not issubclass(own, TorchRolloutBuffer):
            self.rollout_buffer_class = TorchRolloutBuffer  # no other holds tensors
        self.rollout_buffer_kwargs = {**self.rollout_buffer_kwargs, **wiring.buffer_options(self)}
        if self.trains_student:
            self._configure_student(env.env)

    def _configure_student(self, env: VectorEnv) -> None:
        base = env.unwrapped
        self._copies_teacher = False
        if not isinstance(base, ReDiFVectorEnv):
            self.trained = self.trained or "student"
            self.policy_kwargs = {**wiring.policy_options(self), **self.policy_kwargs}
            compatibility.check_policy(self)
            return
        free = base.timesteps is None
        self.trained = self.trained or ("both" if free else "student")
        compatibility.check_process(base)
        compatibility.check_trained(self, free)
        compatibility.check_episodes(self, base.group_size, base.max_steps, base.process.reward)
        grid = wiring.grid(base)
        self._copies_teacher = "student" not in self.policy_kwargs
        defaults = {**wiring.policy_options(self), "timesteps": grid}
        if self._copies_teacher:
            defaults["student"] = copy_of_teacher(base.teacher, base.guidance_scale)
        self.policy_kwargs = {**defaults, **self.policy_kwargs}
        compatibility.check_policy(self)
        if free:
            self.policy_kwargs["schedule_head"] = wiring.head_options(self, base)
        self.rollout_buffer_kwargs.update(wiring.episode_options(self, env))
        compatibility.check_timesteps(self.policy_kwargs["timesteps"], grid, free)

    def _attach_state(self) -> None:
        base = self.env.env.unwrapped if isinstance(self.env, TorchVecEnv) else None
        terms = online_terms(base.process.reward) if isinstance(base, ReDiFVectorEnv) else []
        self.training_state.attach(terms, getattr(self.rollout_buffer, "order", None))

    def _check_student(self) -> None:
        base = self.env.env.unwrapped if isinstance(self.env, TorchVecEnv) else None
        if isinstance(base, ReDiFVectorEnv) and isinstance(self.policy, StudentPolicy):
            compatibility.check_student(
                self.policy.denoiser, base.teacher.denoiser, base.guidance_scale
            )

    def _load_teacher_weights(self) -> None:
        if self._copies_teacher:
            teacher = self.env.env.unwrapped.teacher  # type: ignore[union-attr]
            self.policy.load_student(teacher.denoiser.network.state_dict())  # type: ignore[operator]

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """As in Stable-Baselines3; on a `TorchVecEnv` without leaving the device."""
        if not isinstance(env, TorchVecEnv):
            return super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        assert isinstance(rollout_buffer, TorchRolloutBuffer)
        self.policy.set_training_mode(False)
        self._set_exploration()
        rollout_buffer.reset()
        callback.on_rollout_start()  # first: what it saves holds nothing of this rollout
        self._divide_rows(rollout_buffer)
        self._kept_with = self._weights_version() if self.reuse_forward else []
        statistics = EpisodeStatistics()
        bounds = self._action_bounds(env.device)
        running: Tensor | None = None
        observation, starts = self._last_obs, self._last_episode_starts
        # Until the rollout is whole: after a stop or an exception inside an episode the next one
        # must not start there, its steps would be taken for those of others. learn() resets.
        self._last_obs = self._last_episode_starts = None
        for step in range(n_rollout_steps):
            if self._schedule_head is not None and step % rollout_buffer.episode_length == 0:
                episode = step // rollout_buffer.episode_length
                observation, running = schedule_learning.begin_episodes(  # type: ignore[assignment]
                    self._schedule_head, env.env, self._choices, episode
                )
                starts = running  # type: ignore[assignment]
            with torch.no_grad():
                actions, record = self._act(observation, rollout_buffer, running)  # type: ignore[arg-type]
                clipped = actions if bounds is None else actions.clamp(*bounds)
                following, rewards, ended, infos = env.step_tensor(clipped)
                if not self.trains_student and "final_obs" in infos:
                    # Out of time is not the end: what would have followed counts, as in SB3.
                    beyond = self.policy.predict_values(infos["final_obs"]).flatten()
                    rewards = rewards + self.gamma * torch.where(env.truncated, beyond, 0.0)
            if self.trains_student and self.credit == "local" and self._checked_env is not env:
                compatibility.check_wrapped_rewards(env.env, rewards, infos)
            dones = HostView(ended)
            self.num_timesteps += env.num_envs * parallel.world_size()
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            if running is not None and "episode" in infos:
                infos = {**infos, "_episode": infos["_episode"] & running}
            statistics.add(infos)
            rollout_buffer.add(
                observation,  # type: ignore[arg-type]
                actions,
                rewards,
                starts,  # type: ignore[arg-type]
                running=running,
                **record,
            )
            self._add_outcome(rollout_buffer, infos)
            running = None if running is None else running & ~ended
            observation, starts = following, ended  # type: ignore[assignment]
        self._last_obs, self._last_episode_starts = observation, starts
        self.rollouts += 1
        self._checked_env = env  # one rollout says it, and later ones wait for no device
        with torch.no_grad():
            last_values = self._values(self._last_obs)
        rollout_buffer.compute_returns_and_advantage(last_values, ended)
        statistics.record(self.ep_info_buffer, self.logger)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    @property
    def _schedule_head(self) -> ScheduleHead | None:
        return getattr(self.policy, "schedule_head", None)

    def _divide_rows(self, buffer: TorchRolloutBuffer) -> None:
        """Settle which rows of this rollout explore their steps, and which their times."""
        choosing = 0
        if self._schedule_head is not None:
            choosing = schedule_learning.choosing_rows(
                self.trained, self.rollouts, self.n_envs, buffer.group_size
            )
        buffer.student_rows = self.n_envs - choosing
        self._choices = ChoiceRollout(choosing)
        self._row = torch.arange(self.n_envs, device=buffer.device)

    def _add_outcome(self, buffer: TorchRolloutBuffer, infos: Mapping[str, Any]) -> None:
        """Store what episodes that ended leave behind, beside the reward."""
        if not self.trains_student or "episode" not in infos:
            return
        if not buffer.student_rows:
            return
        ended = None if self._schedule_head is None else infos["_episode"]
        if self.credit == "local":
            buffer.add_reward_map(infos["reward_map"], ended)
        if self.advantage == "task":
            buffer.add_tasks(infos["task"], ended)
        if self.gap_fraction is not None:
            self._add_gap(buffer, ended)

    def _add_gap(self, buffer: TorchRolloutBuffer, ended: Tensor | None) -> None:
        state = self.env.env.unwrapped.last_state  # type: ignore[union-attr]
        self._error = exploration.final_error(state, ended, self._error)
        student = self._error[: buffer.student_rows]
        self._gap = exploration.gap_of_groups(student, buffer.group_size)

    def _values(self, observation: Any) -> Tensor:
        if isinstance(self.policy, StudentPolicy):
            return self.policy.values(observation)
        return self.policy.predict_values(observation)

    def train(self) -> None:
        """Update the policy with the rollout that was collected."""
        self.policy.set_training_mode(True)
        if not self._start:  # not at construction: `load` brings the weights after it
            self._start = diagnostics.copies(self._actor_parameters())
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self._now("clip_range", self.clip_range)
        clip_range_vf = self.clip_range_vf and self._now("clip_range_vf", self.clip_range_vf)
        history: list[dict[str, Tensor]] = []
        for _ in range(self.n_epochs if self._trains_steps else 0):
            completed = self._train_epoch(clip_range, clip_range_vf, history)
            self._n_updates += 1
            if not completed:
                break
        if history:
            self._adapt(history)
            diagnostics.record(self, history, clip_range)
        if self._choices.num_rows:
            self._train_choices(self._choices)
        if isinstance(self.rollout_buffer, TorchRolloutBuffer):
            self.rollout_buffer.forget_graphs()

    @property
    def _trains_steps(self) -> bool:
        """Whether the rollout has transitions to train the student, or another policy, on."""
        buffer = self.rollout_buffer
        return not isinstance(buffer, TorchRolloutBuffer) or buffer.student_rows > 0

    def _train_choices(self, choices: ChoiceRollout) -> None:
        """Update the schedule head with the choices of time that the rollout drew."""
        buffer, head = self.rollout_buffer, self._schedule_head
        assert isinstance(buffer, TorchRolloutBuffer)
        assert head is not None
        returns = buffer.episode_returns()
        history: list[dict[str, Tensor]] = []
        for _ in range(self.n_epochs):
            batches = choices.batches(
                returns,
                buffer.group_size,
                self.advantage_clip,
                parallel.share(self.batch_size),
                buffer.order,
            )
            for batch in batches:
                loss, statistics = schedule_learning.loss(
                    head, batch, self.schedule_clip_range, self.schedule_ent_coef
                )
                self.policy.optimizer.zero_grad()
                loss.backward()
                statistics = self._average({**statistics, "loss": loss})
                loss, error = (statistics.pop(name) for name in ("loss", "ratio_error"))
                if not history:
                    self._check_ratio(error)
                norms = self._take_step(loss)
                history.append({**statistics, **norms})
        diagnostics.record_means(self.logger, history)
        if head.features is None:
            for step, t in enumerate(head.grid().tolist()[:-1]):
                self.logger.record(f"schedule/time_{step}", t)

    def _adapt(self, history: list[dict[str, Tensor]]) -> None:
        """Move the penalty's coefficient and the learning rate towards their targets."""
        for name, adaptive in (("divergence", self.adaptive_coef), ("kl", self.lr_divisor)):
            if adaptive is not None:
                adaptive.update(float(torch.stack([entry[name] for entry in history]).mean()))
        if self.adaptive_coef is not None:
            self.divergence_coef = self.adaptive_coef.coefficient

    def student(self) -> Any:
        """The averaged student: a `Denoiser`, in evaluation mode, its adapters merged if any.

        Without adapters it may be the agent's own, which training on changes: copy what is to stay.
        """
        return merge(self.policy.averaged())  # type: ignore[operator]

    def _train_epoch(
        self, clip_range: float, clip_range_vf: float | None, history: list[dict[str, Tensor]]
    ) -> bool:
        """One pass over the rollout; False if the KL grew too large."""
        for batch in self.rollout_buffer.get(parallel.share(self.batch_size)):
            states = len(batch.actions) // getattr(batch, "same", 1)
            work = functools.partial(self._add_gradients, batch, clip_range, clip_range_vf)
            statistics = within_memory(self, work, states)
            if not history:
                self._check_ratio(statistics["ratio_error"])
            history.append(statistics)
            self.rows_trained += states
            if self.target_kl is not None and float(statistics["kl"]) > 1.5 * self.target_kl:
                return False
            skipped = self.updates_skipped
            statistics.update(self._take_step(statistics["loss"]))
            if self.updates_skipped == skipped:
                self.updates += 1
                if isinstance(self.policy, StudentPolicy):
                    self.policy.update_ema(self.ema_decay, self.updates)
        return True

    def _add_gradients(
        self, batch: Any, clip_range: float, clip_range_vf: float | None
    ) -> dict[str, Tensor]:
        """The gradient of a minibatch's loss, summed over its parts; returns what to log."""
        batch = batch._replace(advantages=self._advantages(batch))  # relative to all of its rows
        if getattr(batch, "kept", None) is not None and not self._take_graphs():
            batch = batch._replace(kept=None)
        self.policy.optimizer.zero_grad()
        evaluations = []
        for part in minibatch.split(batch, self.micro_batch_size):
            new = self._evaluate(part)
            loss, statistics = self._loss(part, clip_range, clip_range_vf, new)
            share = len(part.actions) / len(batch.actions)  # losses are means over rows
            (share * loss).backward()
            evaluations.append(minibatch.join([new]))
        if len(evaluations) > 1:
            whole = minibatch.join(evaluations)
            with torch.no_grad():
                statistics = self._loss(batch, clip_range, clip_range_vf, whole)[1]
        return self._average(statistics)

    def _average(self, statistics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average gradients and statistics of a minibatch over processes: once an update."""
        groups = self.policy.optimizer.param_groups
        weights = (weight for group in groups for weight in group["params"])
        weights = (weight for weight in weights if not sharding.is_part(weight))  # averaged before
        statistics = parallel.average_gradients(weights, statistics)
        return {**statistics, "ratio_error": statistics["ratio_error"].sqrt()}

    def _take_step(self, loss: Tensor) -> dict[str, Tensor]:
        """Go down the gradient, if it is finite; returns the norms before clipping, by name."""
        norms = self._clip_gradients()
        if self._is_finite(loss, *norms.values()):
            self.policy.optimizer.step()
        return norms

    def _is_finite(self, loss: Tensor, *grad_norms: Tensor) -> bool:
        """Whether to take this update; counts those not taken, and gives up after a few."""
        if bool(torch.stack([loss.detach(), *grad_norms]).isfinite().all()):
            self._skipped_in_a_row = 0
            return True
        self.updates_skipped += 1
        self._skipped_in_a_row += 1
        check_skipped(self._skipped_in_a_row)
        return False

    def _evaluate(self, batch: Any) -> Evaluation:
        if isinstance(self.policy, StudentPolicy):
            penalised = self.divergence is not None
            return minibatch.evaluate_student(self.policy, batch, self.ratio, penalised)
        return minibatch.evaluate_generic(self.policy, batch)

    def _loss(
        self,
        batch: Any,
        clip_range: float,
        clip_range_vf: float | None,
        new: Evaluation | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss on a minibatch or a part of it, and what to log; evaluates it if needed."""
        new = self._evaluate(batch) if new is None else new
        objective = self._objective(clip_range, clip_range_vf)
        loss, statistics = objective.loss(batch, self._advantages(batch), new)
        if isinstance(self.policy, StudentPolicy):
            statistics["per_step"] = diagnostics.per_step(
                batch, new, clip_range, self.policy.num_steps
            )
        return loss, statistics

    def _objective(self, clip_range: float, clip_range_vf: float | None) -> Objective:
        return Objective(
            ratio=self.ratio,
            clip_range=clip_range,
            clip_range_vf=clip_range_vf,
            divergence=self.divergence,
            divergence_coef=self.divergence_coef,
            divergence_alpha=self.divergence_alpha,
            step_weights=self.step_weights,
            ent_coef=self.ent_coef,
            vf_coef=self.vf_coef,
        )

    def _advantages(self, batch: Any) -> Tensor:
        """Advantages of a minibatch, `(B, D)` or `(B, 1)`."""
        advantages: Tensor = batch.advantages
        if advantages.ndim == 2:
            return advantages
        if self.advantage == "gae" and self.normalize_advantage and len(advantages) > 1:
            advantages = batch_relative(advantages)
        return advantages.unsqueeze(1)

    def _check_ratio(self, error: Tensor) -> None:
        check_ratio(error)

    def _clip_gradients(self) -> dict[str, Tensor]:
        """Clip each parameter group by itself; returns the norms before clipping, by name."""
        return {
            group.get("norm_name", "grad_norm"): sharding.put_together(
                torch.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
            )
            for group in self.policy.optimizer.param_groups
            if any(parameter.grad is not None for parameter in group["params"])
        }

    def _actor_parameters(self) -> list[Tensor]:
        """What the actor trains: the first group of the optimiser."""
        return self.policy.optimizer.param_groups[0]["params"]

    def _update_learning_rate(self, optimizers: Any) -> None:
        """As in Stable-Baselines3; a group's `lr_scale` multiplies its learning rate."""
        self._now("learning_rate", self.lr_schedule)
        super()._update_learning_rate(optimizers)
        for group in self.policy.optimizer.param_groups:
            divisor = 1.0 if self.lr_divisor is None else self.lr_divisor.coefficient
            group["lr"] *= group.get("lr_scale", 1.0) / divisor

    def _now(self, name: str, value: Any) -> float:
        """A function of the remaining progress as it is now; errors name it."""
        return check_number(name, at(value, self._current_progress_remaining))

    def _set_exploration(self) -> None:
        if isinstance(self.policy, StudentPolicy):
            eta = at(self.eta, self._current_progress_remaining)
            self.policy.set_exploration(eta, at(self.min_std, self._current_progress_remaining))
            if self.gap_fraction is not None:
                if self._gap is None and not self.gap:
                    state = self.env.env.unwrapped.state  # type: ignore[union-attr]
                    self._gap = exploration.gap_without_noise(self.policy, state)
                if self._gap is not None:
                    self.gap = float(self._gap)
                least = self.policy.min_std
                self.policy.min_std = max(least, self.gap_fraction * self.gap)

    def _act(
        self,
        observation: Mapping[str, Tensor],
        buffer: TorchRolloutBuffer,
        running: Tensor | None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Actions `(N, A)`, and what the buffer keeps beside them."""
        if isinstance(self.policy, StudentPolicy):
            rows = self._exploring_rows(buffer)
            shared = self._shared_rows(buffer)
            choosing = None if running is None else self._row >= buffer.student_rows
            keeping = self._keeping(buffer, shared)

            def explore() -> Exploration:
                kept = keeping if self.micro_batch_size is None else None
                return self.policy.explore(  # type: ignore[operator]
                    observation, rows, self.antithetic, choosing, shared, kept
                )

            asked = self.n_envs if shared is None else len(shared.asked)
            explored = within_memory(self, explore, asked)
            if keeping is not None and explored.kept is not None:
                buffer.keep(keeping.groups, explored.kept)
            if explored.choice is not None and running is not None:
                drawn = explored.actions[:, -1]
                episode = buffer.pos // buffer.episode_length
                self._choices.add(observation, drawn, explored.choice, running, episode)
            return explored.actions, {"values": explored.values, "gaussian": explored.gaussian}
        actions, values, log_prob = self.policy(observation)
        return actions, {"values": values, "log_prob": log_prob}

    def _exploring_rows(self, buffer: TorchRolloutBuffer) -> Tensor | None:
        """The rows that explore in the current step, bool `(N,)`; None: all."""
        window = self.window
        exploring = None if window is None else self._rows_in_window(buffer, window)
        if buffer.student_rows == self.n_envs:
            return exploring
        student = self._row < buffer.student_rows
        return student if exploring is None else student & exploring

    def _rows_in_window(self, buffer: TorchRolloutBuffer, window: int) -> Tensor:
        """The rows whose window of stochastic steps holds the current one, bool `(N,)`."""
        length = buffer.episode_length
        step = buffer.pos % length
        if step == 0:
            groups = self.n_envs // buffer.group_size
            first = self.rollouts + 1 + buffer.pos // length
            explored = exploration.explored_steps(self.step_weights, window)
            self._turns = draw_turns(groups, length, first, buffer.device, explored)
            self._explored_step = self._turns.steps.repeat_interleave(buffer.group_size)
            buffer.add_explored_step(self._explored_step)
        return exploration.in_window(step, self._explored_step, length, window)

    def _keeping(self, buffer: TorchRolloutBuffer, shared: Shared | None) -> Exploring | None:
        """Which states' activations the update is going to use; None: none."""
        if shared is None or not self.reuse_forward:
            return None
        step = buffer.pos % buffer.episode_length
        return exploring(self._turns, step, shared, buffer.group_size)

    def _take_graphs(self) -> bool:
        """Whether to go back through the rollout's forward pass now, which is possible once.

        Not if somebody changed the student since, or the device has no room for all rows at once.
        """
        kept_with, self._kept_with = self._kept_with, []
        return self.micro_batch_size is None and kept_with == self._weights_version()

    def _weights_version(self) -> list[int]:
        """Changes with every change of the student's weights in place."""
        policy: Any = self.policy
        return [weights._version for weights in policy.denoiser.network.parameters()]

    def _shared_rows(self, buffer: TorchRolloutBuffer) -> Shared | None:
        """Which rows are in one state in the current step, see `sharing`."""
        if buffer.same == 1:
            return None
        return in_rollout(self._turns, buffer.pos % buffer.episode_length, buffer.same)

    def _action_bounds(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        space: Any = self.action_space
        if not isinstance(space, spaces.Box):
            return None
        return torch.as_tensor(space.low, device=device), torch.as_tensor(space.high, device=device)

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        arguments = (total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if not isinstance(self.env, TorchVecEnv):
            return super()._setup_learn(*arguments)
        with self.env.returning_tensors():
            result = super()._setup_learn(*arguments)
        if not isinstance(self._last_episode_starts, Tensor):
            self._last_episode_starts = torch.ones(  # type: ignore[assignment]
                self.env.num_envs, dtype=torch.bool, device=self.env.device
            )
        self._meet()
        return result

    def _meet(self) -> None:
        """Start all processes from one student, and let each explore with noise of its own."""
        if parallel.world_size() == 1:
            return
        parallel.broadcast(self.policy.state_dict().values())
        torch.manual_seed(parallel.own_seed(self.seed or 0, self.num_timesteps))

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        modules, tensors = super()._get_torch_save_params()
        return [*modules, "training_state"], tensors

    def save(self, *args: Any, **kwargs: Any) -> None:
        """As in Stable-Baselines3; with the state of the reward, where it is trained too.

        Without the running means of `advantage="task"`, which belong to the tasks of one bank: they
        begin anew, as after `set_env`. The checkpoints of a run have them.

        Of several processes, which all have the same, the first one writes.
        """
        if not parallel.is_main():
            self.get_parameters()  # whole weights need all processes
            return
        if self._gap is not None:
            self.gap = float(self._gap)
        super().save(*args, **kwargs)

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """As in Stable-Baselines3; the state of the reward may be missing."""
        given = load_path_or_dict
        if not isinstance(given, dict):
            given = load_from_zip_file(given, device=device, load_data=False)[1]
        own: dict[str, Any] = {"training_state": self.training_state.state_dict()}
        super().set_parameters({**own, **given}, exact_match, device)

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_last_obs",
            "_last_episode_starts",
            "_explored_step",
            "_turns",
            "_start",
            "_gap",
            "_error",
            "_choices",
            "_checked_env",
            "_row",
            "_kept_with",
        ]
