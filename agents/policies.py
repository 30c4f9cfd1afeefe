"""StudentPolicy: a denoiser as a Stable-Baselines3 actor, with an optional critic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.type_aliases import Schedule
from torch import Tensor, nn

from redif_env import mdp, parallel
from redif_env.denoiser import Denoiser
from redif_env.errors import InvalidArgumentError, check_choice, check_number
from redif_env.loading import build_from_description, can_describe, describe, load_denoiser
from redif_env.schedules import explicit
from redif_env.teacher import Teacher
from redif_env.transition import (
    EXPLORATION_MEANS,
    EXPLORATION_UNITS,
    GAUSSIAN,
    LATENT,
    NOISES,
    RADEMACHER,
    Gaussian,
)

from . import sharding
from .averaging import update_average
from .choices import Choice, ScheduleHead, make_head
from .critics import Critic, MapCritic
from .distributions import JointDistribution, KernelDistribution, StepScale, joined
from .lora import copy_trained, load_base, make_trainable
from .sampling import sample
from .sharing import Exploring, Shared

CHECKPOINTING = "enable_gradient_checkpointing"
# What autocast is told. Not float16: gradients would need a scaled loss.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
StudentSource = str | Path | Mapping[str, Any] | Denoiser | Callable[[], Denoiser]


class Exploration(NamedTuple):
    """What a rollout keeps of the policy's decision for N observations.

    Attributes:
        actions: float32 `(N, A)`.
        values: float32 `(N,)`, or maps `(N, A)`; zeros without a critic.
        gaussian: What the actions were drawn from, `(N, *latent_shape)`; with a free schedule,
            given the time that was chosen.
        choice: Distribution of the time, with a free schedule.
        kept: `x0_pred` of the states that explore, with the graph of its gradient, if asked for,
            `(num, *latent_shape)`.
    """

    actions: Tensor
    values: Tensor
    gaussian: Gaussian
    choice: Choice | None = None
    kept: Tensor | None = None


class NoFeatures(BaseFeaturesExtractor):
    """The student reads the observation itself; Stable-Baselines3 insists on an extractor."""

    def __init__(self, observation_space: gym.Space[Any]) -> None:
        super().__init__(observation_space, features_dim=1)

    def forward(self, observations: Any) -> Any:
        return observations


class StudentPolicy(ActorCriticPolicy):
    """The student as a policy over next latents and, with a free schedule, over next times.

    Args:
        observation_space: `Dict` of `ReDiF-v0`.
        action_space: Box of `D` next-latent elements (`action_type="latent"`), and one more for
            the choice of the next time with a free schedule.
        lr_schedule: Learning rate as a function of the remaining progress.
        student: Where the actor comes from: a diffusers folder or bundled name, a description from
            `loading.describe` (random weights), a function without arguments that returns a
            `Denoiser`, or a `Denoiser`, which is copied. With the last a saved model holds the
            module whole; plain data or an importable function are smaller.
        timesteps: The grid, with or without the final 0; of a free schedule, where its learning
            starts, and its length is the most steps of an episode.
        schedule_head: Options of `choices.make_head` for a free schedule; None without one.
        schedule_lr_scale: Learning rate of its table, as a multiple of the actor's; the network of
            an adaptive schedule learns at that of the critic.
        eta: Noise factor of the kernel while exploring, in [0, 1].
        min_std: Smallest standard deviation while exploring, in units of `exploration_unit`; > 0.
        exploration_mean: `"ode"` or `"sde"`, see `redif_env.transition.exploration`.
        exploration_noise: `"gaussian"`, or `"rademacher"` for noise of one size, see
            `redif_env.transition.unit_noise`: gradients of less variance at no cost.
        exploration_unit: `"latent"`, or `"prediction"` for narrower noise in early steps, whose
            noise the rest of a trajectory enlarges, see `redif_env.transition.exploration`: for
            many steps.
        reference: Whether to keep a frozen copy of the student that training starts from.
        lora_rank: Rank of adapters that are trained in place of the weights, which the student, its
            average and the reference then share; None trains all weights. See `lora`.
        lora_targets: Names of the layers with adapters; default: see `lora.DEFAULT_TARGETS`.
        gradient_checkpointing: Whether to keep only the inputs of the network's blocks for the
            backward pass, and compute the rest again: a fraction of the memory for activations, for
            about a third more computation. For diffusers' networks, and others that have its
            `enable_gradient_checkpointing`.
        precision: `"float32"`, or `"bfloat16"` to let the network compute in it where torch's
            autocast finds that safe, in rollouts and updates alike. Weights, gradients, moments,
            log-ratios and losses stay float32, and so does the average that is deployed.
        shard_student: Whether several processes share out the student's weights, those of its
            average and the reference, and the optimiser's moments, each holding a part, see
            `sharding`. Not with adapters. Changes nothing in a single process.
        critic: Whether to build a value network.
        critic_map: Whether it predicts a map of values, for local credit.
        critic_width: Hidden units of the value network; a sixteenth as many channels in a map's.
        critic_lr_scale: Its learning rate, as a multiple of the actor's; that of the network of an
            adaptive schedule, too.
        learn_std: Whether to learn a factor of each step's std.
        std_range: The factor stays between `1 / std_range` and `std_range`, which bounds the
            entropy from below too; > 1.
        std_lr_scale: Its learning rate, as a multiple of the actor's.
        optimizer_class, optimizer_kwargs: as in Stable-Baselines3.
        use_sde: Must be False.

    The three `..._lr_scale` are for `ReDiFPPO`: algorithms of Stable-Baselines3 give all parameters
    one learning rate.

    Attributes:
        denoiser: The student that is trained; always in evaluation mode, so that dropout can not
            make rollout and update disagree.
        ema_denoiser: Moving average of its weights: what is evaluated and exported.
        step_scale: The learned factors of the std, or None.
        schedule_head: Chooses the times of a free schedule, or None.
        reference_denoiser: The student that training started from, or None.
        sharded: Whether this process holds parts of the weights alone. All processes must then call
            together: what asks the student, `state_dict`, and `averaged`.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Schedule,
        *,
        student: StudentSource = "digits",
        timesteps: Sequence[float],
        schedule_head: Mapping[str, Any] | None = None,
        schedule_lr_scale: float = 50.0,
        eta: float = 0.1,
        min_std: float = 0.02,
        exploration_mean: str = "ode",
        exploration_noise: str = GAUSSIAN,
        exploration_unit: str = LATENT,
        reference: bool = False,
        lora_rank: int | None = None,
        lora_targets: Sequence[str] | None = None,
        gradient_checkpointing: bool = False,
        precision: str = "float32",
        shard_student: bool = False,
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
        self.set_exploration(eta, min_std)
        self.exploration_mean = check_choice(
            "exploration_mean", exploration_mean, EXPLORATION_MEANS
        )
        self.exploration_noise = check_choice("exploration_noise", exploration_noise, NOISES)
        self.exploration_unit = check_choice(
            "exploration_unit", exploration_unit, EXPLORATION_UNITS
        )
        if learn_std and exploration_noise == RADEMACHER:
            raise InvalidArgumentError(
                "exploration_noise",
                exploration_noise,
                "pass 'gaussian' with learn_std: noise of one size says nothing about the std.",
            )
        self.settings: dict[str, Any] = {
            "student": student,
            "timesteps": [float(t) for t in timesteps],
            "schedule_head": schedule_head,
            "schedule_lr_scale": check_number("schedule_lr_scale", schedule_lr_scale),
            "reference": reference,
            "lora_rank": lora_rank,
            "lora_targets": lora_targets,
            "gradient_checkpointing": gradient_checkpointing,
            "precision": check_choice("precision", precision, tuple(PRECISIONS)),
            "shard_student": shard_student,
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
        if settings["shard_student"] and settings["lora_rank"] is not None:
            raise InvalidArgumentError(
                "shard_student", True, "pass False with adapters, whose networks share weights."
            )
        base = make_student(settings["student"]).eval()
        base.network_evaluations = 0  # a copy of the teacher brings its count along
        base.set_solver_order(2 if _sees_past(self.observation_space) else 1)
        self.denoiser = make_trainable(base, settings["lora_rank"], settings["lora_targets"])
        self.ema_denoiser = copy_trained(self.denoiser).requires_grad_(False)
        if settings["gradient_checkpointing"]:
            enable_gradient_checkpointing(self.denoiser.network)
        self.reference_denoiser = (
            copy_trained(base).requires_grad_(False) if settings["reference"] else None
        )
        for denoiser in self._acting():  # but not the average, which is deployed
            denoiser.autocast = PRECISIONS[settings["precision"]]
        self.sharded = settings["shard_student"] and parallel.world_size() > 1
        if self.sharded:
            for denoiser in self._denoisers():
                sharding.shard(denoiser.network)
        free = settings["schedule_head"] is not None
        _check_spaces(self.observation_space, self.action_space, self.denoiser, free)
        grid = explicit(settings["timesteps"], self.denoiser.schedule)
        self.timesteps: Tensor
        self.register_buffer("timesteps", grid)
        weights = [w for w in self.denoiser.network.parameters() if w.requires_grad]
        if not weights and not free:
            raise InvalidArgumentError(
                "student",
                type(self.denoiser.network).__name__,
                "it has no weights to train (an ONNX graph has none): pass another network, with "
                "policy_kwargs={'student': ...}.",
            )
        groups = [{"params": weights}]
        self.value_critic: nn.Module | None = None
        if settings["critic"]:
            kind = MapCritic if settings["critic_map"] else Critic
            self.value_critic = kind(self.observation_space, settings["critic_width"])  # type: ignore[arg-type]
            critic = self.value_critic.parameters()
            groups.append(_group("critic", critic, settings["critic_lr_scale"]))
        self.step_scale: StepScale | None = None
        if settings["learn_std"]:
            self.step_scale = StepScale(len(grid) - 1, settings["std_range"])
            groups.append(_group("std", self.step_scale.parameters(), settings["std_lr_scale"]))
        self.schedule_head: ScheduleHead | None = None
        if free:
            self.schedule_head = make_head(
                self.observation_space,  # type: ignore[arg-type]
                self.denoiser.schedule,
                grid,
                **settings["schedule_head"],
            )
            groups.append(
                _group("schedule", [self.schedule_head.table], settings["schedule_lr_scale"])
            )
            network = self.schedule_head.network_parameters()
            if network:
                groups.append(_group("schedule_network", network, settings["critic_lr_scale"]))
        self.optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]
        if self.sharded:
            sharding.save_whole(self.optimizer)

    @property
    def num_steps(self) -> int:
        """Steps of the grid; the most of a free schedule."""
        return len(self.timesteps) - 1

    def explore(
        self,
        obs: Mapping[str, Tensor],
        rows: Tensor | None = None,
        antithetic: bool = False,
        choosing: Tensor | None = None,
        shared: Shared | None = None,
        keeping: Exploring | None = None,
    ) -> Exploration:
        """Draw actions for a rollout.

        Args:
            obs: Observations of N rows.
            rows: Which rows explore, bool `(N,)`; the others take the deployed step. None: all.
            antithetic: Whether neighbours explore with opposite noise.
            choosing: Which rows draw their next time, bool `(N,)`; the others take the most likely
                one. None: all. Only with a free schedule.
            shared: Which rows are in one state; None: none.
            keeping: Which of those states keep the graph of their prediction's gradient.
        """
        x0_pred = kept = None
        if shared is not None and keeping is not None and keeping.num:
            x0_pred, kept = self._predict_keeping(obs, shared, keeping)
        joint = self._distribution(self.denoiser, obs, shared, x0_pred)
        choice = drawn = None
        kernel = joint
        if isinstance(joint, JointDistribution):
            choice, drawn = joint.choice, joint.choice.sample()
            if choosing is not None:
                drawn = torch.where(choosing, drawn, choice.mode())
            kernel = joint.step(drawn)
        assert isinstance(kernel, KernelDistribution)
        actions = kernel.sample_antithetic() if antithetic else kernel.sample()
        if rows is not None:
            actions = torch.where(rows.unsqueeze(1), actions, kernel.mode())
        if drawn is not None:
            actions = joined(actions, drawn)
        return Exploration(actions, self.values(obs), kernel.gaussian, choice, kept)

    def step_distribution(
        self,
        obs: Mapping[str, Tensor],
        actions: Tensor,
        shared: Shared | None = None,
        x0_pred: Tensor | None = None,
    ) -> KernelDistribution:
        """What the step outputs of actions `(N, A)` are drawn from, given their choices of time.

        `x0_pred` is what the network says of the states, `(N, *latent_shape)`, where it was asked
        before.
        """
        return self._step_distribution(self.denoiser, obs, actions, shared, x0_pred)

    def reference_means(
        self, obs: Mapping[str, Tensor], actions: Tensor, shared: Shared | None = None
    ) -> Tensor:
        """Means that the reference would explore around, `(N, *latent_shape)`."""
        if self.reference_denoiser is None:
            raise InvalidArgumentError("reference", False, "make the policy with reference=True.")
        return self._step_distribution(self.reference_denoiser, obs, actions, shared).gaussian.mean

    def get_distribution(  # type: ignore[override]
        self, obs: Mapping[str, Tensor]
    ) -> KernelDistribution | JointDistribution:
        return self._distribution(self.denoiser, obs)

    def _step_distribution(
        self,
        denoiser: Denoiser,
        obs: Mapping[str, Tensor],
        actions: Tensor,
        shared: Shared | None = None,
        x0_pred: Tensor | None = None,
    ) -> KernelDistribution:
        joint = self._distribution(denoiser, obs, shared, x0_pred)
        return joint.step(actions[:, -1]) if isinstance(joint, JointDistribution) else joint

    def _times(self, obs: Mapping[str, Tensor]) -> Tensor:
        """Where each row is, `(N,)`."""
        head = self.schedule_head
        return self.timesteps[self._step_index(obs)] if head is None else head.time(obs)

    def _predict_keeping(
        self, obs: Mapping[str, Tensor], shared: Shared, keeping: Exploring
    ) -> tuple[Tensor, Tensor]:
        """`x0_pred` of N observations, and that of the states that are to keep their graph."""
        x_t, t, condition = obs["latents"], self._times(obs), _condition(obs)
        own, others = keeping.first[: keeping.num], keeping.first[keeping.num :]
        with torch.enable_grad():
            kept = _ask_some(self.denoiser, x_t, t, condition, shared.asked[own])
        parts = [kept.detach()]
        if len(others):
            parts += [_ask_some(self.denoiser, x_t, t, condition, shared.asked[others])]
        return torch.cat(parts)[keeping.first.argsort()][shared.answer], kept

    def _distribution(
        self,
        denoiser: Denoiser,
        obs: Mapping[str, Tensor],
        shared: Shared | None = None,
        x0_pred: Tensor | None = None,
    ) -> KernelDistribution | JointDistribution:
        index, head, t = self._step_index(obs), self.schedule_head, self._times(obs)
        x_t = obs["latents"]
        past = mdp.past_of(obs.get(mdp.PAST), self.timesteps, index)
        if x0_pred is None:
            x0_pred = _ask(denoiser, x_t, t, _condition(obs), shared)
        scale = None if self.step_scale is None else self.step_scale(index)

        def step(s: Tensor) -> KernelDistribution:
            kernel = KernelDistribution(
                denoiser.schedule,
                self.eta,
                self.min_std,
                self.exploration_mean,
                self.exploration_noise,
                self.exploration_unit,
            )
            return kernel.proba_distribution(x_t, x0_pred, t, s, scale, past)

        if head is None:
            return step(self.timesteps[index + 1])
        return JointDistribution(head(obs), lambda choice: step(head.next_time(choice, obs)))

    @torch.no_grad()
    def sample(self, x_T: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the averaged student makes of noise `(N, *latent_shape)` when deployed.

        Returns:
            `x_0`, and the steps that each row took, int64 `(N,)`.
        """
        return sample(self.ema_denoiser, self.schedule_head or self.timesteps, x_T, condition)

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
        for denoiser in self._denoisers():
            load_base(denoiser.network, sharding.parts_of(state, denoiser.network))

    def averaged(self) -> Denoiser:
        """The averaged student; of one whose weights are shared out, a whole copy."""
        if not self.sharded:
            return self.ema_denoiser
        with torch.random.fork_rng(devices=[]):  # random weights must not shift training's noise
            copied = make_student(self.settings["student"]).eval().requires_grad_(False)
        nn.Module.to(copied.network, torch.float32)
        copied.network.load_state_dict(sharding.whole(self.ema_denoiser.network.state_dict()))
        copied.batch_size = self.ema_denoiser.batch_size
        copied.set_solver_order(self.ema_denoiser.solver_order)
        return copied.to(self.device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of any module, with whole weights where processes share them out."""
        state = super().state_dict(*args, **kwargs)
        return sharding.whole(state) if self.sharded else state

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """As of any module, from whole weights where processes share them out."""
        parts = sharding.parts_of(state_dict, self) if self.sharded else state_dict
        return super().load_state_dict(parts, *args, **kwargs)

    def set_exploration(self, eta: float, min_std: float) -> None:
        """Explore with this noise factor and smallest std from now on; errors name them."""
        self.eta = check_number("eta", eta, 0, 1)
        self.min_std = check_number("min_std", min_std, 1e-6)

    def set_batch_size(self, batch_size: int | None) -> None:
        """Send at most so many rows through a network at once, see `Denoiser`; None: all."""
        for denoiser in self._denoisers():
            denoiser.batch_size = batch_size

    @property
    def network_evaluations(self) -> tuple[int, ...]:
        """Of the student and, if there is one, of the reference; see `Denoiser`."""
        return tuple(denoiser.network_evaluations for denoiser in self._acting())

    @network_evaluations.setter
    def network_evaluations(self, counts: tuple[int, ...]) -> None:
        for denoiser, count in zip(self._acting(), counts, strict=True):
            denoiser.network_evaluations = count

    def _denoisers(self) -> list[Denoiser]:
        return [self.denoiser, self.ema_denoiser, *self._acting()[1:]]

    def _acting(self) -> list[Denoiser]:
        """The denoisers that rollouts and updates ask."""
        reference = self.reference_denoiser
        return [self.denoiser] if reference is None else [self.denoiser, reference]

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
            "exploration_noise": self.exploration_noise,
            "exploration_unit": self.exploration_unit,
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


def enable_gradient_checkpointing(network: nn.Module) -> None:
    """Let a network compute its activations again in the backward pass, in place of keeping them.

    diffusers' networks do so whenever gradients are enabled, in evaluation mode too.

    Raises:
        InvalidArgumentError: for a network without it.
    """
    # The first may be within an adapter of ours, such as EDMNetwork.
    able = (module for module in network.modules() if hasattr(module, CHECKPOINTING))
    found = next(able, None)
    try:
        getattr(found, CHECKPOINTING)()
    except (AttributeError, ValueError) as error:  # as diffusers raises it
        raise InvalidArgumentError(
            "gradient_checkpointing",
            True,
            f"{type(found or network).__name__} has none: pass False, and a smaller "
            "micro_batch_size.",
        ) from error


def _ask(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Tensor | None, shared: Shared | None
) -> Tensor:
    """`x0_pred` of each row, computed once for rows in one state."""
    if shared is None:
        return denoiser(x_t, t, condition)
    return _ask_some(denoiser, x_t, t, condition, shared.asked)[shared.answer]


def _ask_some(
    denoiser: Denoiser, x_t: Tensor, t: Tensor, condition: Tensor | None, rows: Tensor
) -> Tensor:
    """`x0_pred` of some rows."""
    return denoiser(x_t[rows], t[rows], None if condition is None else condition[rows])


def _condition(obs: Mapping[str, Tensor]) -> Tensor | None:
    return obs["condition"].long().flatten() if "condition" in obs else None


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


def _group(name: str, parameters: Iterable[Tensor], lr_scale: float) -> dict[str, Any]:
    """A parameter group of the optimiser, with its own gradient clip and learning rate."""
    return {
        "params": list(parameters),
        "lr_scale": lr_scale,
        "norm_name": f"{name}_grad_norm",
    }


def _sees_past(observation_space: Any) -> bool:
    """Whether the environment's steps are of second order, and so the student's."""
    return isinstance(observation_space, spaces.Dict) and mdp.PAST in observation_space.spaces


def _check_spaces(
    observation_space: Any, action_space: Any, denoiser: Denoiser, free: bool
) -> None:
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
    if action_space.shape != (int(torch.Size(denoiser.latent_shape).numel()) + free,):
        raise InvalidArgumentError(
            "action_space",
            action_space,
            "StudentPolicy acts in next latents of its denoiser, action_type='latent', and with a "
            "schedule_head in one choice of time more, schedule='free'.",
        )
