"""StudentPolicy: a denoiser as a Stable-Baselines3 actor, with an optional critic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice, check_number
from redif_env.loading import build_from_description, can_describe, describe, load_denoiser
from redif_env.schedules import explicit
from redif_env.teacher import Teacher
from redif_env.transition import EXPLORATION_MEANS, Gaussian

from .averaging import update_average
from .critics import Critic, MapCritic
from .distributions import KernelDistribution, StepScale
from .lora import copy_trained, load_base, make_trainable

StudentSource = str | Path | Mapping[str, Any] | Denoiser | Callable[[], Denoiser]


class Exploration(NamedTuple):
    """What a rollout keeps of the policy's decision for N observations.

    Attributes:
        actions: float32 `(N, A)`.
        values: float32 `(N,)`, or maps `(N, A)`; zeros without a critic.
        gaussian: What the actions were drawn from, `(N, *latent_shape)`.
    """

    actions: Tensor
    values: Tensor
    gaussian: Gaussian


class NoFeatures(BaseFeaturesExtractor):
    """The student reads the observation itself; Stable-Baselines3 insists on an extractor."""

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: Any) -> Any:
        return observations


class StudentPolicy(ActorCriticPolicy):
    """The student of a fixed schedule as a policy over next latents.

    Args:
        observation_space: `Dict` of `ReDiF-v0`.
        action_space: Box of `D` next-latent elements (a fixed schedule, `action_type="latent"`).
        lr_schedule: Learning rate as a function of the remaining progress.
        student: Where the actor comes from: a diffusers folder or bundled name, a description from
            `loading.describe` (random weights), a function without arguments that returns a
            `Denoiser`, or a `Denoiser`, which is copied. With the last a saved model holds the
            module whole; plain data or an importable function are smaller.
        timesteps: The grid, with or without the final 0.
        eta: Noise factor of the kernel while exploring, in [0, 1].
        min_std: Smallest standard deviation while exploring, in latent units; > 0.
        exploration_mean: `"ode"` or `"sde"`, see `redif_env.transition.exploration`.
        reference: Whether to keep a frozen copy of the student that training starts from.
        lora_rank: Rank of adapters that are trained in place of the weights, which the student, its
            average and the reference then share; None trains all weights. See `lora`.
        lora_targets: Names of the layers with adapters; default: see `lora.DEFAULT_TARGETS`.
        critic: Whether to build a value network.
        critic_map: Whether it predicts a map of values, for local credit.
        critic_width: Hidden units of the value network; a sixteenth as many channels in a map's.
        critic_lr_scale: Its learning rate, as a multiple of the actor's.
        learn_std: Whether to learn a factor of each step's std.
        std_range: The factor stays between `1 / std_range` and `std_range`, which bounds the
            entropy from below too; > 1.
        std_lr_scale: Its learning rate, as a multiple of the actor's.
        optimizer_class, optimizer_kwargs: as in Stable-Baselines3.
        use_sde: Must be False.

    Attributes:
        denoiser: The student that is trained; always in evaluation mode, so that dropout can not
            make rollout and update disagree.
        ema_denoiser: Moving average of its weights: what is evaluated and exported.
        step_scale: The learned factors of the std, or None.
        reference_denoiser: The student that training started from, or None.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        student: StudentSource = "digits",
        timesteps: Sequence[float],
        eta: float = 0.1,
        min_std: float = 0.02,
        exploration_mean: str = "ode",
        reference: bool = False,
        lora_rank: int | None = None,
        lora_targets: Sequence[str] | None = None,
        critic: bool = False,
        critic_map: bool = False,
        critic_width: int = 256,
        critic_lr_scale: float = 10.0,
        learn_std: bool = False,
        std_range: float = 4.0,
        std_lr_scale: float = 50.0,
        use_sde: bool = False,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise InvalidArgumentError("use_sde", use_sde, "pass False: the kernel explores.")
        self.eta = check_number("eta", eta, 0, 1)
        self.min_std = check_number("min_std", min_std, 1e-6)
        self.exploration_mean = check_choice(
            "exploration_mean", exploration_mean, EXPLORATION_MEANS
        )
        self.settings: dict[str, Any] = {
            "student": student,
            "timesteps": [float(t) for t in timesteps],
            "reference": reference,
            "lora_rank": lora_rank,
            "lora_targets": lora_targets,
            "critic": critic,
            "critic_map": critic_map,
            "critic_width": critic_width,
            "critic_lr_scale": check_number("critic_lr_scale", critic_lr_scale),
            "learn_std": learn_std,
            "std_range": check_number("std_range", std_range, 1 + 1e-6),
            "std_lr_scale": check_number("std_lr_scale", std_lr_scale),
        }
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            ortho_init=False,
            features_extractor_class=NoFeatures,
            normalize_images=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        settings = self.settings
        base = make_student(settings["student"]).eval()
        self.denoiser = make_trainable(base, settings["lora_rank"], settings["lora_targets"])
        self.ema_denoiser = copy_trained(self.denoiser).requires_grad_(False)
        self.reference_denoiser = (
            copy_trained(base).requires_grad_(False) if settings["reference"] else None
        )
        _check_spaces(self.observation_space, self.action_space, self.denoiser)
        grid = explicit(settings["timesteps"], self.denoiser.schedule)
        self.timesteps: Tensor
        self.register_buffer("timesteps", grid)
        groups = [{"params": [w for w in self.denoiser.network.parameters() if w.requires_grad]}]
        self.value_critic: nn.Module | None = None
        if settings["critic"]:
            kind = MapCritic if settings["critic_map"] else Critic
            self.value_critic = kind(self.observation_space, settings["critic_width"])  # type: ignore[arg-type]
            groups.append(_group("critic", self.value_critic, settings["critic_lr_scale"]))
        self.step_scale: StepScale | None = None
        if settings["learn_std"]:
            self.step_scale = StepScale(len(grid) - 1, settings["std_range"])
            groups.append(_group("std", self.step_scale, settings["std_lr_scale"]))
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    @property
    def num_steps(self) -> int:
        """Steps of the grid."""
        return len(self.timesteps) - 1

    def explore(
        self,
        obs: Mapping[str, Tensor],
        rows: Tensor | None = None,
        antithetic: bool = False,
    ) -> Exploration:
        """Draw actions for a rollout.

        Args:
            obs: Observations of N rows.
            rows: Which rows explore, bool `(N,)`; the others take the deployed step. None: all.
            antithetic: Whether neighbours explore with opposite noise.
        """
        distribution = self.get_distribution(obs)
        actions = distribution.sample_antithetic() if antithetic else distribution.sample()
        if rows is not None:
            actions = torch.where(rows.unsqueeze(1), actions, distribution.mode())
        return Exploration(actions, self.values(obs), distribution.gaussian)

    def gaussian(self, obs: Mapping[str, Tensor]) -> Gaussian:
        """What the policy explores with, `(N, *latent_shape)`, with gradients."""
        return self.get_distribution(obs).gaussian

    def reference_means(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Means that the reference would explore around, `(N, *latent_shape)`."""
        if self.reference_denoiser is None:
            raise InvalidArgumentError("reference", False, "make the policy with reference=True.")
        return self._distribution(self.reference_denoiser, obs).gaussian.mean

    def get_distribution(self, obs: Mapping[str, Tensor]) -> KernelDistribution:  # type: ignore[override]
        return self._distribution(self.denoiser, obs)

    def _distribution(self, denoiser: Denoiser, obs: Mapping[str, Tensor]) -> KernelDistribution:
        index = self._step_index(obs)
        x_t, t, s = obs["latents"], self.timesteps[index], self.timesteps[index + 1]
        condition = obs["condition"].long().flatten() if "condition" in obs else None
        distribution = KernelDistribution(
            denoiser.schedule, self.eta, self.min_std, self.exploration_mean
        )
        scale = None if self.step_scale is None else self.step_scale(index)
        return distribution.proba_distribution(x_t, denoiser(x_t, t, condition), t, s, scale)

    def forward(  # type: ignore[override]
        self, obs: Mapping[str, Tensor], deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.get_distribution(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, self.predict_values(obs), distribution.log_prob(actions)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Mapping[str, Tensor], actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        distribution = self.get_distribution(obs)
        log_prob = distribution.log_prob(actions)
        return self.predict_values(obs), log_prob, distribution.entropy()

    def predict_values(self, obs: Mapping[str, Tensor]) -> Tensor:  # type: ignore[override]
        values = self.values(obs)
        return (values if values.ndim == 1 else values.mean(1)).unsqueeze(1)

    def set_training_mode(self, mode: bool) -> None:
        """Only the critic follows: the student stays in evaluation mode."""
        self.training = mode
        if self.value_critic is not None:
            self.value_critic.train(mode)

    def update_ema(self, decay: float, updates: int) -> None:
        """Let the averaged weights follow the trained ones; see `averaging.update_average`.

        Of adapters each factor is averaged, not their product.
        """
        networks = self.ema_denoiser.network, self.denoiser.network
        pairs = zip(*(network.parameters() for network in networks), strict=True)
        averaged, trained = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        update_average(averaged, trained, decay, updates)

    def load_student(self, state: Mapping[str, Tensor]) -> None:
        """Start from these weights of the network, the average and the reference too."""
        for denoiser in (self.denoiser, self.ema_denoiser, self.reference_denoiser):
            if denoiser is not None:
                load_base(denoiser.network, state)

    def values(self, obs: Mapping[str, Tensor]) -> Tensor:
        """The critic's values, float32 `(N,)`, or maps of them `(N, A)`; zeros without one."""
        if self.value_critic is None:
            return obs["latents"].new_zeros(len(obs["latents"]))
        return self.value_critic(obs)

    def _step_index(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Steps taken, int64 `(N,)`; an episode that has ended is given its last step."""
        left = (obs["steps_left"].flatten() * self.num_steps).round().long().clamp_min(1)
        return self.num_steps - left

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "eta": self.eta,
            "min_std": self.min_std,
            "exploration_mean": self.exploration_mean,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
            **self.settings,
        }


def make_student(source: StudentSource) -> Denoiser:
    """The denoiser that `source` stands for; see `StudentPolicy`.

    Raises:
        InvalidArgumentError: for a source of another kind.
    """
    if isinstance(source, str | Path):
        return load_denoiser(source)
    if isinstance(source, Mapping):
        return build_from_description(source)
    if isinstance(source, Denoiser):
        return copy.deepcopy(source)
    made = source() if callable(source) and not isinstance(source, nn.Module) else None
    if not isinstance(made, Denoiser):
        raise InvalidArgumentError(
            "student",
            source,
            "pass a folder, a description, a Denoiser, or a function returning one.",
        )
    return made


def copy_of_teacher(teacher: Teacher, guidance_scale: float) -> StudentSource:
    """The student that has a teacher's network, as a source that can be saved."""
    solver = teacher.make_solver()
    if can_describe(teacher.denoiser, solver):
        description = describe(teacher.denoiser, solver)
        return {**description, "guidance_scale": guidance_scale}
    student = copy.deepcopy(teacher.denoiser)
    student.network.to("cpu")  # not the table of conditions, which copies share
    student.schedule.to("cpu")
    student.set_guidance(guidance_scale, teacher.denoiser.guidance_rescale)
    return student


def _group(name: str, module: nn.Module, lr_scale: float) -> dict[str, Any]:
    """A parameter group of the optimiser, with its own gradient clip and learning rate."""
    return {
        "params": list(module.parameters()),
        "lr_scale": lr_scale,
        "norm_name": f"{name}_grad_norm",
    }


def _check_spaces(observation_space: Any, action_space: Any, denoiser: Denoiser) -> None:
    keys = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    if not {"latents", "timestep", "steps_left"} <= set(keys):
        raise InvalidArgumentError(
            "observation_space", observation_space, "use StudentPolicy with a ReDiF environment."
        )
    if keys["latents"].shape != denoiser.latent_shape:
        raise InvalidArgumentError(
            "student",
            f"latents of {denoiser.latent_shape}",
            f"pass a student for the environment's {keys['latents'].shape}.",
        )
    told = keys.get("condition")
    if denoiser.conditions is not None and getattr(told, "n", None) != len(denoiser.conditions):
        raise InvalidArgumentError(
            "student",
            f"a table of {len(denoiser.conditions)} conditions",
            f"pass a student with the environment's conditions, {told}.",
        )
    if action_space.shape != (int(torch.Size(denoiser.latent_shape).numel()),):
        raise InvalidArgumentError(
            "action_space",
            action_space,
            "StudentPolicy needs a fixed schedule: make the environment with schedule='uniform' or "
            "a list of times.",
        )
