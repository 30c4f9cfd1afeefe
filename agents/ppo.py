"""ReDiFPPO: Stable-Baselines3's PPO for actions of thousands of dimensions, on tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from gymnasium.vector import VectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from redif_env import transition
from redif_env.env import ReDiFEnv
from redif_env.errors import (
    InvalidArgumentError,
    ReDiFError,
    check_choice,
    check_integer,
    check_number,
)
from redif_env.loading import describe
from redif_env.transition import Gaussian
from redif_env.vector_env import ReDiFVectorEnv

from . import losses
from .buffers import RolloutBatch, TorchRolloutBuffer
from .divergences import DIVERGENCES, AdaptiveCoefficient, check_divergence, divergence_map
from .lora import merge
from .policies import StudentPolicy
from .statistics import EpisodeStatistics, HostView
from .vec_env import TorchVecEnv

ADVANTAGES = ("group", "batch", "gae")
CREDITS = ("local", "global")
STOCHASTIC_STEPS = ("all", "one")
# Root-mean-square log-ratio an element before the first update. float32 on different batch sizes
# gives about 1e-5; active dropout, another guidance scale or mixed dtypes give 0.1 and more.
RATIO_TOLERANCE = 1e-2
MAX_SKIPPED = 3  # updates in a row that may have no finite loss or gradient


class RatioError(ReDiFError, RuntimeError):
    """The policy no longer gives the probabilities it acted with, before any update was made."""


class TrainingDivergedError(ReDiFError, RuntimeError):
    """Several updates in a row had a loss or gradient that is not finite."""


class ReDiFPPO(PPO):
    """PPO for denoising.

    On a `TorchVecEnv` rollouts and updates stay on the device. On any other environment this is
    Stable-Baselines3's PPO, with `ratio="sum"` and `advantage="gae"`.

    Args:
        policy: `"StudentPolicy"` or `StudentPolicy`, or any other Stable-Baselines3 policy.
        env: A `TorchVecEnv`, a Gymnasium vector environment (it is wrapped), or anything that
            Stable-Baselines3 takes.
        learning_rate: Number, or function of the progress that remains (1 to 0).
        n_steps: Steps of a rollout; default: one whole episode.
        batch_size: Transitions of a minibatch.
        n_epochs: Passes over a rollout.
        gamma: Discount factor of `advantage="gae"`; groups do not discount.
        gae_lambda, clip_range, clip_range_vf, normalize_advantage, ent_coef, vf_coef: as in
            Stable-Baselines3. Group advantages are normalised once, over the rollout.
        max_grad_norm: Largest gradient norm; with a critic, of actor and critic each.
        ratio: `"element"`, `"mean"` or `"sum"`; see `losses.reduce_log_ratio`.
        advantage: `"group"`: relative to the other rollouts of the same task (the environment's
            `group_size` must be at least 2); `"batch"`: to all of the rollout (DDPO); `"gae"`:
            relative to a critic.
        credit: `"local"`: each element is credited with the reward of its own place, from the
            reward's map; `"global"`: all with the whole reward.
        local_weight: Share of local credit in the mixture with global credit, in [0, 1].
        local_radius: Elements around its own place whose reward an element is credited with.
        advantage_clip: Largest size of a normalised advantage; None does not clip.
        stochastic_steps: `"all"`, or `"one"`: a single random step of each trajectory explores (the
            same one in a group), so that all of the return's variance belongs to it; only that
            step is trained on. Default: `"one"` with groups, else `"all"`.
        antithetic: Whether neighbours in a group explore with opposite noise, which cancels the
            even orders of the reward's change. Needs groups of even size. Default: with groups.
        eta: Noise factor while exploring; number or function of the remaining progress.
        min_std: Smallest exploration std, in latent units; likewise.
        ema_decay: Of the student's moving average, an iteration.
        target_kl: Stop the epochs of an iteration beyond 1.5 times this KL; an *element* of the
            action with a `StudentPolicy`, of the whole action with other policies (as in
            Stable-Baselines3).
        adaptive_lr: Whether to divide or multiply the learning rate by 1.5 after an iteration whose
            KL was more than 1.5 times, or less than two thirds of, `target_kl`.
        divergence: Penalise this divergence of the student's steps from those of the student that
            training started from: one of `divergences.DIVERGENCES`; None for none.
        divergence_coef: The penalty's coefficient; its initial value with a target.
        divergence_alpha: Order of `"renyi"` and `"power"`.
        divergence_target: Adapt the coefficient so that the divergence an element stays near this.
        policy_kwargs: For the policy. With `StudentPolicy`, `student` and `timesteps` default to
            the environment's teacher and grid.
        rollout_buffer_class, rollout_buffer_kwargs, stats_window_size, tensorboard_log, verbose,
        seed, device: as in Stable-Baselines3; the device defaults to the environment's.

    Attributes:
        rows_trained: Transitions that gradients were computed for since construction.

    Raises:
        InvalidArgumentError: for options that do not go together, at construction.
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
        n_epochs: int = 1,
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
        credit: str = "local",
        local_weight: float = 1.0,
        local_radius: int = 0,
        advantage_clip: float | None = None,
        stochastic_steps: str | None = None,
        antithetic: bool | None = None,
        eta: float | Schedule = 0.1,
        min_std: float | Schedule = 0.02,
        ema_decay: float = 0.95,
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
        self.ratio = check_choice("ratio", ratio, losses.RATIOS)
        self.advantage = check_choice("advantage", advantage, ADVANTAGES)
        self.credit = check_choice("credit", credit, CREDITS)
        self.local_weight = check_number("local_weight", local_weight, 0, 1)
        self.local_radius = check_integer("local_radius", local_radius, 0)
        if advantage_clip is not None:
            advantage_clip = check_number("advantage_clip", advantage_clip, 1e-6)
            if advantage == "gae":
                raise InvalidArgumentError(
                    "advantage_clip", advantage_clip, "pass None with advantage='gae'."
                )
        self.advantage_clip = advantage_clip
        self._configure_penalty(divergence, divergence_coef, divergence_alpha, divergence_target)
        self._configure_trust_region(target_kl, adaptive_lr)
        grouped = advantage == "group"
        if stochastic_steps is None:
            stochastic_steps = "one" if grouped else "all"
        self.stochastic_steps = check_choice("stochastic_steps", stochastic_steps, STOCHASTIC_STEPS)
        self.antithetic = grouped if antithetic is None else antithetic
        self.eta = eta
        self.min_std = min_std
        self.rows_trained = 0
        self._explored_step: Tensor
        self.ema_decay = check_number("ema_decay", ema_decay, 0, 1)
        if n_steps is not None:
            n_steps = check_integer("n_steps", n_steps, 1)
        batch_size = check_integer("batch_size", batch_size, 2)
        n_epochs = check_integer("n_epochs", n_epochs, 1)
        if credit == "local" and ratio != "element":
            raise InvalidArgumentError("ratio", ratio, "credit='local' needs ratio='element'.")
        if credit == "local" and advantage == "gae":
            raise InvalidArgumentError(
                "credit", credit, "the critic has no map: pass 'global', or advantage='group'."
            )
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
        if _init_setup_model:
            self._setup_model()

    @property
    def trains_student(self) -> bool:
        """Whether the policy is a `StudentPolicy`."""
        return issubclass(self.policy_class, StudentPolicy)

    @staticmethod
    def _wrap_env(env: Any, verbose: int = 0, monitor_wrapper: bool = True) -> VecEnv:
        """As Stable-Baselines3, and Gymnasium vector environments and `ReDiFEnv` as tensors."""
        if isinstance(getattr(env, "unwrapped", None), ReDiFEnv):
            env = env.unwrapped.vector_env
        if isinstance(env, VectorEnv):
            return TorchVecEnv(env)
        return PPO._wrap_env(env, verbose, monitor_wrapper)

    def _setup_model(self) -> None:
        """As in Stable-Baselines3; at construction and in `load`."""
        self._copies_teacher = False
        if self.env is not None:
            self._configure()
        super()._setup_model()
        self._load_teacher_weights()

    def set_env(self, env: Any, force_reset: bool = True) -> None:
        """As in Stable-Baselines3; the environment must have the student's schedule."""
        before = self.env
        super().set_env(env, force_reset)
        try:
            self._configure()
        except InvalidArgumentError:
            self.env = before
            raise
        if isinstance(self.rollout_buffer, TorchRolloutBuffer) and self.advantage != "gae":
            self.rollout_buffer.group_size = self.rollout_buffer_kwargs["group_size"]

    def _configure(self) -> None:
        """Settle what depends on the environment, and refuse what does not go together."""
        env = self.env if isinstance(self.env, TorchVecEnv) else None
        if not self.trains_student:
            self._check_generic_policy()
        elif env is None:
            raise InvalidArgumentError(
                "env",
                type(self.env).__name__,
                "StudentPolicy needs a ReDiF vector environment or TorchVecEnv, without wrappers.",
            )
        if env is None:
            return
        self.rollout_buffer_class = TorchRolloutBuffer
        self.rollout_buffer_kwargs = {
            "advantage": self.advantage,
            "credit": self.credit,
            "local_weight": self.local_weight,
            "local_radius": self.local_radius,
            "advantage_clip": self.advantage_clip,
            "stochastic_steps": self.stochastic_steps,
            "seed": self.seed or 0,
            **self.rollout_buffer_kwargs,
        }
        base = env.env.unwrapped
        if self.trains_student:
            self._configure_student(base)
        if self.advantage != "gae":
            self._configure_groups(base)

    def _configure_penalty(
        self, name: str | None, coef: float, alpha: float, target: float | None
    ) -> None:
        if name is not None:
            check_choice("divergence", name, DIVERGENCES)
            check_divergence(name, alpha)
        elif target is not None:
            raise InvalidArgumentError("divergence_target", target, "pass a divergence with it.")
        self.divergence = name
        self.divergence_coef = check_number("divergence_coef", coef)
        self.divergence_alpha = alpha
        self.adaptive_coef = None if target is None else AdaptiveCoefficient(target, coef)

    def _configure_trust_region(self, target_kl: float | None, adaptive_lr: bool) -> None:
        if adaptive_lr and target_kl is None:
            raise InvalidArgumentError("adaptive_lr", True, "pass a target_kl for it to hold.")
        # The learning rate is divided by a coefficient that grows while the KL is too large.
        self.lr_divisor = AdaptiveCoefficient(target_kl or 1.0) if adaptive_lr else None
        self.updates_skipped = 0
        self._skipped_in_a_row = 0

    def _check_generic_policy(self) -> None:
        if self.divergence is not None:
            raise InvalidArgumentError("divergence", self.divergence, "pass StudentPolicy with it.")
        for name, wanted in (("ratio", "sum"), ("advantage", "gae"), ("credit", "global")):
            if getattr(self, name) != wanted:
                raise InvalidArgumentError(
                    name, getattr(self, name), f"pass {wanted!r}: only StudentPolicy takes others."
                )

    def _configure_student(self, base: Any) -> None:
        defaults: dict[str, Any] = {
            "critic": self.advantage == "gae",
            "reference": self.divergence is not None,
        }
        if isinstance(base, ReDiFVectorEnv):
            if base.timesteps is None:
                raise InvalidArgumentError(
                    "schedule", "free", "StudentPolicy needs a fixed one: 'uniform' or a list."
                )
            if base.process.action_type != "latent" or base.process.student is not None:
                raise InvalidArgumentError(
                    "action_type",
                    base.process.action_type,
                    "StudentPolicy acts in next latents: pass 'latent' and residual=False.",
                )
            defaults["timesteps"] = base.timesteps.tolist()
            if "student" not in self.policy_kwargs:
                defaults["student"] = describe(base.teacher.denoiser, base.teacher.make_solver())
        for name, plain in (("stochastic_steps", "all"), ("antithetic", False)):
            if self.advantage == "gae" and getattr(self, name) != plain:
                raise InvalidArgumentError(
                    name, getattr(self, name), f"pass {plain!r} with advantage='gae'."
                )
        defaults["eta"], defaults["min_std"] = _at(self.eta, 1.0), _at(self.min_std, 1.0)
        self._copies_teacher = "student" in defaults
        self.policy_kwargs = {**defaults, **self.policy_kwargs}
        self._check_timesteps(defaults.get("timesteps"))

    def _check_timesteps(self, grid: list[float] | None) -> None:
        """The student's own times must be the environment's: it is not told them otherwise."""
        given = self.policy_kwargs.get("timesteps", [])
        own = [float(t) for t in given]
        if grid is not None and [*own, 0.0][: len(grid)] != grid:
            raise InvalidArgumentError(
                "timesteps", own, f"the environment's schedule is {grid}: make them the same."
            )

    def _configure_groups(self, base: Any) -> None:
        group_size = getattr(base, "group_size", 1)
        length = getattr(base, "max_steps", 0)
        if group_size < 2 and self.advantage == "group":
            raise InvalidArgumentError(
                "group_size", group_size, "advantage='group' needs an environment with at least 2."
            )
        if getattr(base, "timesteps", None) is None:
            raise InvalidArgumentError(
                "schedule", "free", f"advantage={self.advantage!r} needs episodes of one length."
            )
        if self.n_steps % length:
            raise InvalidArgumentError(
                "n_steps", self.n_steps, f"pass a multiple of the episode length {length}."
            )
        if self.credit == "local" and not base.process.reward.has_map:
            raise InvalidArgumentError(
                "credit", "local", f"reward {base.process.reward.name!r} has no map: pass 'global'."
            )
        if self.antithetic and group_size % 2:
            raise InvalidArgumentError(
                "group_size", group_size, "antithetic=True needs groups of even size."
            )
        self.rollout_buffer_kwargs.update(group_size=group_size, episode_length=length)

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
        callback.on_rollout_start()
        statistics = EpisodeStatistics(env.device)
        low, high = self._action_bounds(env.device)
        for _ in range(n_rollout_steps):
            observation, starts = self._last_obs, self._last_episode_starts
            with torch.no_grad():
                actions, record = self._act(observation, rollout_buffer)  # type: ignore[arg-type]
                clipped = actions.clamp(low, high)
                self._last_obs, rewards, ended, infos = env.step_tensor(clipped)  # type: ignore[assignment]
            dones = HostView(ended)
            self.num_timesteps += env.num_envs
            callback.update_locals(locals())
            if not callback.on_step():
                # The next rollout must not start inside an episode: its steps would be taken for
                # those of others. Without an observation, learn() resets.
                self._last_obs = None
                self._last_episode_starts = None
                return False
            statistics.add(infos)
            rollout_buffer.add(observation, actions, rewards, starts, **record)  # type: ignore[arg-type]
            if "reward_map" in infos and self.credit == "local":
                rollout_buffer.add_reward_map(infos["reward_map"])
            self._last_episode_starts = ended  # type: ignore[assignment]
        with torch.no_grad():
            last_values = self.policy.predict_values(self._last_obs)  # type: ignore[arg-type]
        rollout_buffer.compute_returns_and_advantage(last_values, ended)
        statistics.record(self.ep_info_buffer)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def train(self) -> None:
        """Update the policy with the rollout that was collected."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip_range = self.clip_range(self._current_progress_remaining)  # type: ignore[operator]
        clip_range_vf = self.clip_range_vf and self.clip_range_vf(self._current_progress_remaining)  # type: ignore[operator]
        history: list[dict[str, Tensor]] = []
        for _ in range(self.n_epochs):
            completed = self._train_epoch(clip_range, clip_range_vf, history)
            self._n_updates += 1
            if not completed:
                break
        if self.trains_student:
            self.policy.update_ema(self.ema_decay)  # type: ignore[operator]
        self._adapt(history)
        self._record(history, clip_range)

    def _adapt(self, history: list[dict[str, Tensor]]) -> None:
        """Move the penalty's coefficient and the learning rate towards their targets."""
        for name, adaptive in (("divergence", self.adaptive_coef), ("kl", self.lr_divisor)):
            if adaptive is not None:
                adaptive.update(float(torch.stack([entry[name] for entry in history]).mean()))
        if self.adaptive_coef is not None:
            self.divergence_coef = self.adaptive_coef.coefficient

    def student(self) -> Any:
        """The averaged student: a `Denoiser`, in evaluation mode, its adapters merged if any."""
        return merge(self.policy.ema_denoiser)  # type: ignore[arg-type]

    def _train_epoch(
        self, clip_range: float, clip_range_vf: float | None, history: list[dict[str, Tensor]]
    ) -> bool:
        """One pass over the rollout; False if the KL grew too large."""
        for batch in self.rollout_buffer.get(self.batch_size):
            loss, statistics = self._loss(batch, clip_range, clip_range_vf)
            if not history:
                self._check_ratio(statistics["ratio_error"])
            history.append(statistics)
            if self.target_kl is not None and float(statistics["kl"]) > 1.5 * self.target_kl:
                return False
            self.policy.optimizer.zero_grad()
            loss.backward()
            grad_norm = self._clip_gradients()
            self.rows_trained += len(batch.actions)
            if self._is_finite(loss, grad_norm):
                statistics["grad_norm"] = grad_norm
                self.policy.optimizer.step()
        return True

    def _is_finite(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether to take this update; counts those not taken, and gives up after a few."""
        if bool((loss.detach() + grad_norm).isfinite()):
            self._skipped_in_a_row = 0
            return True
        self.updates_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= MAX_SKIPPED:
            raise TrainingDivergedError(
                f"{MAX_SKIPPED} updates in a row had a loss or gradient that is not finite. Lower "
                "learning_rate, raise min_std (log-ratios grow with its inverse), set "
                "advantage_clip=5, or check that the reward is finite."
            )
        return False

    def _loss(
        self, batch: Any, clip_range: float, clip_range_vf: float | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """PPO's loss on a minibatch, and what to log of it."""
        if self.trains_student:
            log_ratio, kl, error, values, entropy, mean = self._evaluate_student(batch)
        else:
            log_ratio, kl, error, values, entropy = self._evaluate_generic(batch)
        policy_loss = losses.surrogate(log_ratio, self._advantages(batch), clip_range)
        loss = policy_loss
        statistics = {
            "policy_gradient_loss": policy_loss.detach(),
            "kl": kl,
            "clip_fraction": losses.clip_fraction(log_ratio, clip_range),
            "ratio_error": error,
        }
        if self.divergence is not None:
            penalty = self._penalty(batch, mean)
            joint = losses.reduce_log_ratio(penalty, self.ratio).sum(1).mean()
            loss = loss + self.divergence_coef * joint
            statistics["divergence"] = penalty.detach().mean()
        if values is not None:
            value_loss = losses.value_loss(values, batch.old_values, batch.returns, clip_range_vf)
            loss = loss + self.vf_coef * value_loss
            statistics["value_loss"] = value_loss.detach()
        if entropy is not None:
            loss = loss - self.ent_coef * entropy.mean()
            statistics["entropy_loss"] = -entropy.detach().mean()
        statistics["loss"] = loss.detach()
        return loss, statistics

    def _evaluate_student(
        self, batch: RolloutBatch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """Log-ratios, KL an element, ratio error an element, values, entropy, means."""
        policy = self.policy
        assert batch.old is not None
        assert isinstance(policy, StudentPolicy)
        mean = policy.means(batch.observations)
        x_s = batch.actions.reshape(mean.shape)
        log_ratio_map = transition.log_ratio_map(x_s, mean, batch.old).flatten(1)
        values = None
        if policy.value_critic is not None:
            values = policy.value_critic(batch.observations)
        log_ratio = losses.reduce_log_ratio(log_ratio_map, self.ratio)
        error = _root_mean_square(log_ratio_map)
        return log_ratio, losses.kl_per_element(mean, batch.old), error, values, None, mean

    def _penalty(self, batch: RolloutBatch, mean: Tensor) -> Tensor:
        """Divergence from the reference of each element, `(B, D)`, with gradients to `mean`."""
        assert batch.old is not None
        assert self.divergence is not None
        assert isinstance(self.policy, StudentPolicy)
        with torch.no_grad():
            reference = self.policy.reference_means(batch.observations)
        new, ref = Gaussian(mean, batch.old.std), Gaussian(reference, batch.old.std)
        return divergence_map(self.divergence, new, ref, self.divergence_alpha).flatten(1)

    def _evaluate_generic(self, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The same of any policy: whole actions instead of elements."""
        actions = batch.actions
        if self.action_space.__class__.__name__ == "Discrete":
            actions = actions.long().flatten()
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, actions)
        log_ratio = (log_prob - batch.old_log_prob).unsqueeze(1)
        if entropy is None:  # no closed form
            entropy = -log_prob
        error = _root_mean_square(log_ratio)
        return log_ratio, losses.approximate_kl(log_ratio), error, values.flatten(), entropy

    def _advantages(self, batch: Any) -> Tensor:
        """Advantages of a minibatch, `(B, D)` or `(B, 1)`."""
        advantages: Tensor = batch.advantages
        if advantages.ndim == 2:
            return advantages
        if self.advantage == "gae" and self.normalize_advantage and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        return advantages.unsqueeze(1)

    def _check_ratio(self, error: Tensor) -> None:
        """Before the first update of an iteration the ratio is 1, or the gradient is biased."""
        value = float(error)
        if not value <= RATIO_TOLERANCE:
            raise RatioError(
                f"before the first update the root-mean-square log-ratio is {value:.3g}, not 0: "
                "the update does not see the policy that acted. Usual causes: dropout or batch "
                "normalisation in training mode, another dtype or autocast in the update than in "
                "the rollout, another guidance scale, or weights changed by a callback."
            )

    def _clip_gradients(self) -> Tensor:
        """Clip actor and critic each; returns the actor's norm before clipping."""
        norms = [
            torch.nn.utils.clip_grad_norm_(group["params"], self.max_grad_norm)
            for group in self.policy.optimizer.param_groups
        ]
        return norms[0]

    def _update_learning_rate(self, optimizers: Any) -> None:
        """As in Stable-Baselines3; a group's `lr_scale` multiplies its learning rate."""
        super()._update_learning_rate(optimizers)
        for group in self.policy.optimizer.param_groups:
            divisor = 1.0 if self.lr_divisor is None else self.lr_divisor.coefficient
            group["lr"] *= group.get("lr_scale", 1.0) / divisor

    def _set_exploration(self) -> None:
        if isinstance(self.policy, StudentPolicy):
            self.policy.eta = _at(self.eta, self._current_progress_remaining)
            self.policy.min_std = _at(self.min_std, self._current_progress_remaining)

    def _act(
        self, observation: Mapping[str, Tensor], buffer: TorchRolloutBuffer
    ) -> tuple[Tensor, dict[str, Any]]:
        """Actions `(N, A)`, and what the buffer keeps beside them."""
        if isinstance(self.policy, StudentPolicy):
            rows = self._exploring_rows(buffer) if self.stochastic_steps == "one" else None
            actions, values, gaussian = self.policy.explore(observation, rows, self.antithetic)
            return actions, {"values": values, "gaussian": gaussian}
        actions, values, log_prob = self.policy(observation)
        return actions, {"values": values, "log_prob": log_prob}

    def _exploring_rows(self, buffer: TorchRolloutBuffer) -> Tensor:
        """The rows whose one stochastic step is the current one, bool `(N,)`."""
        step = buffer.pos % buffer.episode_length
        if step == 0:
            groups = self.n_envs // buffer.group_size
            drawn = torch.randint(buffer.episode_length, (groups,), device=buffer.device)
            self._explored_step = drawn.repeat_interleave(buffer.group_size)
            buffer.add_explored_step(self._explored_step)
        return self._explored_step == step

    def _action_bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        space: Any = self.action_space
        return torch.as_tensor(space.low, device=device), torch.as_tensor(space.high, device=device)

    def _record(self, history: list[dict[str, Tensor]], clip_range: float) -> None:
        """Log means over the iteration's minibatches: one transfer to the host."""
        for name in history[0]:
            values = [entry[name] for entry in history if name in entry]
            if values and name != "ratio_error":
                self.logger.record(f"train/{name}", float(torch.stack(values).mean()))
        self.logger.record("train/ratio_error", float(history[0]["ratio_error"]))
        if "value_loss" in history[0]:
            self.logger.record("train/explained_variance", self._explained_variance())
        if self.divergence is not None:
            self.logger.record("train/divergence_coef", self.divergence_coef)
        if isinstance(self.rollout_buffer, TorchRolloutBuffer):
            self.logger.record("train/advantage_scale", float(self.rollout_buffer.advantage_scale))
        self.logger.record("train/updates_skipped", self.updates_skipped)
        self.logger.record("train/clip_range", clip_range)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        if isinstance(self.policy, StudentPolicy):
            self.logger.record("train/eta", self.policy.eta)
            self.logger.record("train/min_std", self.policy.min_std)

    def _explained_variance(self) -> float:
        """Share of the returns' variance that the critic explains: 1 is all, 0 none."""
        values, returns = (
            torch.as_tensor(getattr(self.rollout_buffer, name)) for name in ("values", "returns")
        )
        return float(1 - (returns - values).var() / returns.var())

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
        return result

    def _excluded_save_params(self) -> list[str]:
        return [
            *super()._excluded_save_params(),
            "_last_obs",
            "_last_episode_starts",
            "_explored_step",
        ]


def _root_mean_square(log_ratio: Tensor) -> Tensor:
    return log_ratio.detach().square().mean().sqrt()


def _at(value: float | Schedule, progress_remaining: float) -> float:
    """A number, or a function of the remaining progress at that progress."""
    return float(value(progress_remaining)) if callable(value) else float(value)
