"""TorchRolloutBuffer: a rollout that stays on the device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import torch
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor

from redif_env import mdp, parallel
from redif_env.noise import expand
from redif_env.rewards import fit_map
from redif_env.transition import Gaussian

from .advantages import TaskMeans, batch_relative, gae, group_relative

LATENTS = "observation/latents"
# What only the steps that are trained on need; where one of an episode is, it is stored once.
EXPLORED = ("mean", f"observation/{mdp.PAST}")


class RolloutBatch(NamedTuple):
    """A minibatch of B transitions; the first six fields are Stable-Baselines3's.

    Attributes:
        observations: Tensors `(B, ...)` by name, or one where the space is a Box.
        actions: float32 `(B, A)`; int64 `(B, 1)` where they are discrete.
        old_values: float32 `(B,)`, or maps `(B, D)` from a critic with local credit.
        old_log_prob: float32 `(B,)`; zeros when `old` is given.
        advantages: float32 `(B,)`, or `(B, D)` with local credit.
        returns: Like `old_values`.
        old: The Gaussian that the actions were drawn from, `(B, *latent_shape)`, or None.
        step_index: Steps of the episode before each transition, int64 `(B,)`.
        same: How many neighbouring transitions started in one state; it divides B.
        kept: `x0_pred` of each state with the graph of its gradient, `(B / same, *latent_shape)`,
            from the rollout; None: ask the network.
    """

    observations: Any
    actions: Tensor
    old_values: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    returns: Tensor
    old: Gaussian | None
    step_index: Tensor
    same: int = 1
    kept: Tensor | None = None


class TorchRolloutBuffer(RolloutBuffer):
    """T steps of N rows as device tensors, allocated once.

    Args:
        buffer_size, observation_space, action_space, device, gae_lambda, gamma, n_envs: as in
            Stable-Baselines3.
        advantage: `"gae"`, from the critic's values; `"group"`, relative to the group's mean,
            `"batch"`, to the rollout's, or `"task"`, to the task's own running mean.
        credit: `"global"`, one advantage a row, or `"local"`, one an element, from reward maps.
        local_weight: Share of local credit; the rest is global.
        local_radius: Elements around its place whose reward an element is credited with; or one
            such number a step, of which the one that explored counts, where one does.
        advantage_std: Whose standard deviation groups are divided by: `"rollout"` or `"group"`.
        advantage_clip: Largest size of a normalised advantage, or None.
        group_size: Neighbouring rows that share tasks.
        episode_length: Steps of every episode; T must be a multiple of it.
        stochastic_steps: How many neighbouring steps of each episode explored, from the one that
            `add_explored_step` names on, cyclically; None: all. Only those are trained on.
        num_tasks: Tasks of the bank, for `"task"`.
        shares_states: Whether rows of a group are in one state when they explore: their
            transitions then stay together.
        action_bound: Where the latents that are observed are the action before, clipped to this:
            they are then stored once, as actions, and the first of each episode. None: as given.
        normalize_advantage: Whether advantages from a value map are whitened, over the rollout;
            those of the other kinds always are, those of scalar values are for the caller to.
        seed: Of the minibatch order. An own generator, so that the order does not shift the noise
            of the policy.

    Attributes:
        student_rows: How many rows, the first ones, explored the student's steps; the transitions
            of the others are stored, but not trained on.
    """

    def __init__(
        self,
        *args: Any,
        advantage: str = "gae",
        credit: str = "global",
        local_weight: float = 1.0,
        local_radius: int | Sequence[int] = 0,
        advantage_std: str = "rollout",
        advantage_clip: float | None = None,
        group_size: int = 1,
        episode_length: int = 1,
        stochastic_steps: int | None = None,
        num_tasks: int = 1,
        shares_states: bool = False,
        action_bound: float | None = None,
        normalize_advantage: bool = True,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.advantage = advantage
        self.credit = credit
        self.local_weight = local_weight
        self.local_radius = local_radius
        self.advantage_std = advantage_std
        self.advantage_clip = advantage_clip
        self.advantage_scale = torch.zeros(())
        self.group_size = group_size
        self.episode_length = episode_length
        self.stochastic_steps = stochastic_steps
        self.normalize_advantage = normalize_advantage
        self.shares_states = shares_states
        self.action_bound = action_bound
        self.forget_tasks(num_tasks)
        self._store: dict[str, Tensor] = {}
        super().__init__(*args, **kwargs)
        self.student_rows = self.n_envs
        self.order = torch.Generator(self.device).manual_seed(seed)

    def reset(self) -> None:
        """Forget the rollout; the memory is kept."""
        self.pos = 0
        self.full = False
        self.generator_ready = False
        self.forget_graphs()

    def forget_graphs(self) -> None:
        """Let go of the rollout's activations."""
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self, groups: Tensor, x0_pred: Tensor) -> None:
        """Store what the student said of the states of groups that explore, with its graph.

        Args:
            groups: int64 `(M,)`; each group once a rollout.
            x0_pred: `(M, *latent_shape)`.
        """
        self._kept.append((groups, x0_pred))

    def forget_tasks(self, num_tasks: int) -> None:
        """Begin anew with the means of tasks, of which there are `num_tasks`."""
        # of rows, and of maps
        self.task_means = TaskMeans(num_tasks), TaskMeans(num_tasks)

    @property
    def same(self) -> int:
        """How many neighbouring rows are in one state when they explore."""
        return self.group_size if self.shares_states else 1

    @property
    def has_value_map(self) -> bool:
        """Whether the critic's values are maps."""
        return self.advantage == "gae" and self.credit == "local"

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Critic's values, `(T, N)`, or maps of them, `(T, N, D)`."""
        return self._store["values"]

    @property
    def returns(self) -> Tensor:  # type: ignore[override]
        """What followed, like `values`."""
        return self._store["returns"]

    def add(  # type: ignore[override]
        self,
        observation: dict[str, Tensor] | Tensor,
        actions: Tensor,
        rewards: Tensor,
        episode_starts: Tensor,
        values: Tensor,
        log_prob: Tensor | None = None,
        gaussian: Gaussian | None = None,
        running: Tensor | None = None,
    ) -> None:
        """Store one step of N rows: tensors `(N, ...)` on the device.

        `running` says in which rows the episode that is to be trained on has not ended yet, where
        lengths differ.
        """
        if isinstance(observation, Tensor):
            self._put("observation", observation)
        else:
            for name, value in observation.items():
                self._put_observation(f"observation/{name}", value)
        self._put("actions", actions.reshape(len(actions), -1))
        self._put("rewards", rewards if running is None else torch.where(running, rewards, 0.0))
        if running is not None:
            self._put("running", running)
        self._put("episode_starts", episode_starts)
        self._put("values", values if self.has_value_map else values.flatten())
        if log_prob is not None:
            self._put("log_prob", log_prob)
        if gaussian is not None:
            self._put_explored("mean", gaussian.mean)
            self._put("std", gaussian.std)
        self.pos += 1
        self.full = self.pos == self.buffer_size

    def add_reward_map(self, reward_map: Tensor, rows: Tensor | None = None) -> None:
        """Store the reward map, `(N, *latent_shape)`, of the episode that the last step ended.

        Args:
            reward_map: The map.
            rows: Which rows' episodes it ended, bool `(N,)`; None: all.
        """
        latent_shape = self._store["mean"].shape[2:]
        if isinstance(self.local_radius, int):
            fitted = fit_map(reward_map, latent_shape, self.local_radius)
        else:
            fitted = self._fitted_by_step(fit_map(reward_map, latent_shape), self.local_radius)
        self._put_outcome("reward_map", fitted, rows)

    def _fitted_by_step(self, reward_map: Tensor, radii: Sequence[int]) -> Tensor:
        """The map with the radius of the step that each row explored.

        A mean of n elements has a smaller spread than one: times the root of n the credit of all
        steps has noise of one size, so that none drowns the others in a minibatch.
        """
        explored = self._store["explored_step"][(self.pos - 1) // self.episode_length]
        latent_shape, fitted = reward_map.shape[1:], reward_map
        for radius in {*radii} - {0}:
            steps = torch.tensor([each == radius for each in radii], device=reward_map.device)
            wide = (2 * radius + 1) * fit_map(reward_map, latent_shape, radius)
            fitted = torch.where(expand(steps[explored], fitted), wide, fitted)
        return fitted

    def add_tasks(self, tasks: Tensor, rows: Tensor | None = None) -> None:
        """Store the tasks, int64 `(N,)`, of the episodes that the last step ended, as above."""
        self._put_outcome("tasks", tasks, rows)

    def add_explored_step(self, step_index: Tensor) -> None:
        """Store the first step that explores of the episode that starts now, int64 `(N,)`."""
        self._put_episode("explored_step", step_index, self.pos // self.episode_length)

    def compute_returns_and_advantage(self, last_values: Tensor, dones: Tensor) -> None:  # type: ignore[override]
        """Fill in advantages and returns; `last_values` is `(N,)` or `(N, D)`, `dones` `(N,)`."""
        if self.advantage == "gae":
            self._estimate_with_critic(last_values, dones)
            return
        returns = self.episode_returns()
        advantages = self._episode_advantages(returns[:, : self.student_rows])
        if self.advantage_clip is not None:
            advantages = advantages.clamp(-self.advantage_clip, self.advantage_clip)
        self._store["advantages"] = advantages
        self._store["returns"] = returns.repeat_interleave(self.episode_length, 0)

    def episode_returns(self) -> Tensor:
        """Undiscounted returns of whole episodes, `(E, N)`."""
        return self._store["rewards"].unflatten(0, (-1, self.episode_length)).sum(1)

    def _estimate_with_critic(self, last_values: Tensor, dones: Tensor) -> None:
        """GAE: of rewards and values, or element by element of their maps."""
        rewards, values = self._store["rewards"], self._store["values"]
        if self.has_value_map:
            rewards = self._reward_maps()
        else:
            last_values = last_values.flatten()
        starts = self._store["episode_starts"]
        advantages = gae(rewards, values, starts, last_values, dones, self.gamma, self.gae_lambda)
        self.advantage_scale = parallel.std(advantages)
        self._store["returns"] = advantages + values
        if self.has_value_map:
            advantages = self._mixed(advantages, advantages.mean(2))
        self._store["advantages"] = advantages

    def _reward_maps(self) -> Tensor:
        """What each element was rewarded with in each step, `(T, N, D)`."""
        final = self._store["reward_map"].flatten(2)
        maps = final.new_zeros(self.buffer_size, *final.shape[1:])
        maps[self.episode_length - 1 :: self.episode_length] = final
        return maps

    def _mixed(self, local: Tensor, whole: Tensor) -> Tensor:
        """Local credit `(T, N, D)` and global credit `(T, N)` by weight, each whitened."""
        if self.normalize_advantage:
            local, whole = batch_relative(local), batch_relative(whole)
        return self.local_weight * local + (1 - self.local_weight) * whole.unsqueeze(2)

    def _episode_advantages(self, returns: Tensor) -> Tensor:
        """Advantages of whole episodes, `(E, N)`, or `(E, N, D)` with local credit."""
        if not self.student_rows:
            return returns
        self.advantage_scale = parallel.std(returns)
        if self.credit == "global":
            return self._relative(returns)
        local = self._relative(self._store["reward_map"][:, : self.student_rows].flatten(2))
        if self.local_weight == 1:
            return local
        rest = self._relative(returns).unsqueeze(2)
        return self.local_weight * local + (1 - self.local_weight) * rest

    def _relative(self, outcome: Tensor) -> Tensor:
        if self.advantage == "task":
            tasks = self._store["tasks"][:, : self.student_rows]
            return self.task_means[outcome.ndim == 3].relative(outcome, tasks)
        if self.advantage == "batch":
            return batch_relative(outcome)
        return group_relative(outcome, self.group_size, self.advantage_std == "group")

    def get(self, batch_size: int | None = None) -> Generator[RolloutBatch, None, None]:  # type: ignore[override]
        """Minibatches that together hold every stochastic transition once, in random order.

        Where transitions of a group stay together, `batch_size` is rounded down to whole groups.
        """
        rows = self._stochastic_rows()
        if not len(rows):  # all episodes ended before the step that was to explore
            return
        rows = rows.reshape(-1, self.same)
        order = torch.randperm(len(rows), generator=self.order, device=self.device)
        for part in order.split(max((batch_size or rows.numel()) // self.same, 1)):
            yield self._batch(rows[part].flatten())

    def __getitem__(self, name: str) -> Tensor:
        """A stored tensor, `(T, N, ...)`: `actions`, `rewards`, `values`, `advantages`, ...

        Where one step of an episode explores, those of `EXPLORED` are of that one, `(E, N, ...)`.
        """
        if name == LATENTS and self.action_bound is not None:
            rows = torch.arange(self.buffer_size * self.n_envs, device=self.device)
            return self._latents(rows).unflatten(0, (self.buffer_size, self.n_envs))
        return self._store[name]

    def _stochastic_rows(self) -> Tensor:
        """Indices into the flattened `(T, N)` of the transitions that explored."""
        rows = torch.arange(self.buffer_size * self.n_envs, device=self.device)
        if self.stochastic_steps is not None:
            rows = self._window_rows()
        elif self.student_rows < self.n_envs:
            rows = rows[rows % self.n_envs < self.student_rows]
        if "running" in self._store:
            rows = rows[self._store["running"].flatten()[rows]]
        return rows

    def _window_rows(self) -> Tensor:
        """Those within the window of stochastic steps of each episode."""
        first = self._store["explored_step"][:, : self.student_rows].unsqueeze(1)  # (E, 1, N)
        window = torch.arange(self.stochastic_steps or 0, device=self.device)[:, None]
        step = (first + window) % self.episode_length  # (E, W, N)
        starts = torch.arange(len(first), device=self.device)[:, None, None] * self.episode_length
        columns = torch.arange(self.student_rows, device=self.device)
        return ((starts + step) * self.n_envs + columns).flatten()

    def _put_observation(self, name: str, value: Tensor) -> None:
        """Store an observation; latents only where no action tells them."""
        if name in EXPLORED:
            self._put_explored(name, value)
        elif name != LATENTS or self.action_bound is None:
            self._put(name, value)
        elif self.pos % self.episode_length == 0:
            self._put_episode("start", value, self.pos // self.episode_length)

    def _put_explored(self, name: str, value: Tensor) -> None:
        """Store what the step has; where one step of an episode explores, what that one has."""
        if self.stochastic_steps != 1:
            self._put(name, value)
            return
        episode, step = divmod(self.pos, self.episode_length)
        if name in self._store:
            explored = self._store["explored_step"][episode] == step
            value = torch.where(expand(explored, value), value, self._store[name][episode])
        self._put_episode(name, value, episode)

    def _put_outcome(self, name: str, value: Tensor, rows: Tensor | None) -> None:
        """Store what the last step's episode left behind, in some rows where only they ended."""
        episode = (self.pos - 1) // self.episode_length
        if rows is not None and name in self._store:
            value = torch.where(expand(rows, value), value, self._store[name][episode])
        self._put_episode(name, value, episode)

    def _put_episode(self, name: str, value: Tensor, episode: int) -> None:
        self._put(name, value, episode, self.buffer_size // self.episode_length)

    def _put(
        self, name: str, value: Tensor, position: int | None = None, length: int | None = None
    ) -> None:
        if name not in self._store:
            shape = (length or self.buffer_size, *value.shape)
            self._store[name] = value.new_empty(shape)
        self._store[name][self.pos if position is None else position] = value

    def _batch(self, rows: Tensor) -> RolloutBatch:
        def take(name: str) -> Tensor:
            if self.stochastic_steps == 1 and name in EXPLORED:
                return self._of_episode(name, rows)
            return self._store[name].flatten(0, 1)[rows]

        gaussian = Gaussian(take("mean"), take("std")) if "mean" in self._store else None
        return RolloutBatch(
            observations=self._observations(take, rows),
            actions=take("actions"),
            old_values=take("values"),
            old_log_prob=take("log_prob") if "log_prob" in self._store else torch.zeros(()),
            advantages=self._advantages_of(rows),
            returns=take("returns"),
            old=gaussian,
            step_index=rows // self.n_envs % self.episode_length,
            same=self.same,
            kept=self._kept_of(rows),
        )

    def _kept_of(self, rows: Tensor) -> Tensor | None:
        """What `keep` stored of the states of transitions; None if it has not all of them."""
        if sum(len(groups) for groups, _ in self._kept) < self.n_envs // self.group_size:
            return None
        groups, x0_pred = (torch.cat(parts) for parts in zip(*self._kept, strict=True))
        return x0_pred[groups.argsort()][rows[:: self.same] % self.n_envs // self.group_size]

    def _observations(
        self, take: Callable[[str], Tensor], rows: Tensor
    ) -> dict[str, Tensor] | Tensor:
        """What was observed, as it was given: by name, or as one tensor."""
        if "observation" in self._store:
            return take("observation")
        prefix = "observation/"
        names = [name for name in self._store if name.startswith(prefix)]
        seen = {name.removeprefix(prefix): take(name) for name in names}
        return seen if self.action_bound is None else {**seen, "latents": self._latents(rows)}

    def _latents(self, rows: Tensor) -> Tensor:
        """The latents observed in rows, `(B, *latent_shape)`: a start, or the action before."""
        start = self._of_episode("start", rows)
        before = self._store["actions"].flatten(0, 1)[(rows - self.n_envs).clamp_min(0)]
        before = before.clamp(-self.action_bound, self.action_bound).reshape(start.shape)  # type: ignore[operator]
        first = rows // self.n_envs % self.episode_length == 0
        return torch.where(expand(first, start), start, before)

    def _of_episode(self, name: str, rows: Tensor) -> Tensor:
        """What is stored once an episode, `(E, N, ...)`, of transitions."""
        step, env = rows // self.n_envs, rows % self.n_envs
        return self._store[name][step // self.episode_length, env]

    def _advantages_of(self, rows: Tensor) -> Tensor:
        """Advantages of transitions; those of a group hold for its whole episode."""
        if self.advantage == "gae":
            return self._store["advantages"].flatten(0, 1)[rows]
        return self._of_episode("advantages", rows)
