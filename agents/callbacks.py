"""Callbacks: held-out evaluation, pictures, and a progress bar."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import Any

import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Image
from torch import Tensor
from tqdm.auto import tqdm

from redif_env import mdp, parallel, rewards
from redif_env.errors import check_integer
from redif_env.rendering import pixels, to_rgb
from redif_env.teacher import TeacherBank


class IterationCallback(BaseCallback):
    """Calls `on_iteration` before every `every`-th rollout, and at the end of training.

    An iteration between two calls of `learn` is called once.

    Args:
        every: Iterations between two calls.

    Attributes:
        iteration: Whole rollouts so far.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = check_integer("every", every, 1)
        self.iteration = 0
        self._last_called: tuple[int, int] | None = None

    @abstractmethod
    def on_iteration(self) -> None:
        """What to do."""

    def _on_rollout_start(self) -> None:
        if self.iteration % self.every == 0:
            self._call()

    def _on_rollout_end(self) -> None:
        self.iteration += 1  # here: not for a rollout that a callback stops

    def _on_training_end(self) -> None:
        self._call()

    def _call(self) -> None:
        now = (id(self.model), self.iteration)  # one callback may serve several agents
        if self._last_called != now:
            self._last_called = now
            self.on_iteration()

    def _on_step(self) -> bool:
        return True


class HeldOutEvaluation(IterationCallback):
    """Judge the averaged student at eta = 0 on tasks that training never sees.

    Logs `eval/paired_mse`, the error an element to the teacher's answers, `eval/reward` and
    `eval/num_steps`, the mean number of steps; and
    `eval/reward_exploring`, the reward of the trained student on the same tasks when every step
    explores as it does now. Its noise does not shift that of training.

    Args:
        bank: Held-out tasks, of the validation split.
        every: Iterations between two evaluations.
        num_images: Columns of the picture that is logged as `eval/samples` (teacher above
            student); 0 for none.

    Attributes:
        history: One `{"iteration", "paired_mse", "reward", "reward_exploring", "num_steps"}` an
            evaluation.
    """

    def __init__(self, bank: TeacherBank, every: int = 10, num_images: int = 10) -> None:
        super().__init__(every)
        self.bank = bank
        self.num_images = check_integer("num_images", num_images, 0)
        self.history: list[dict[str, float]] = []

    @torch.no_grad()
    def on_iteration(self) -> None:
        policy: Any = self.model.policy
        bank = self.bank
        num, device = len(bank), bank.x_T.device

        def deployed(rows: Any) -> tuple[Tensor, Tensor]:
            condition = None if bank.condition is None else bank.condition[rows]
            return policy.sample(bank.x_T[rows], condition)

        x_0, num_steps = parallel.in_shares(deployed, num, device)
        exploring = parallel.in_shares(self._explore, num, device)
        record = {
            "paired_mse": float((x_0 - bank.teacher_x_0).square().mean()),
            "reward": self._reward(x_0, num_steps),
            "reward_exploring": self._reward(*exploring),
            "num_steps": float(num_steps.float().mean()),
        }
        self.history.append({"iteration": self.iteration, **record})
        for name, value in record.items():
            self.logger.record(f"eval/{name}", value)
        if self.num_images and x_0.ndim == 4:
            self._log_images(x_0)

    def _reward(self, x_0: Tensor, num_steps: Tensor) -> float:
        bank, process = self.bank, self._process
        values, _ = rewards.evaluate(process.reward, x_0, bank.teacher_x_0, bank.condition)
        return float((values - process.step_cost * process.nfe_per_step * num_steps).mean())

    @property
    def _process(self) -> mdp.Process:
        return self.training_env.get_attr("process", [0])[0]

    def _explore(self, tasks: Any) -> tuple[Tensor, Tensor]:
        """Samples with noise in every step and choice, `(P, *latent_shape)`, and their steps."""
        policy: Any = self.model.policy
        process = self._process
        before, device = policy.denoiser.network_evaluations, self.bank.x_T.device
        space: Any = self.training_env.action_space
        low, high = (torch.as_tensor(bound, device=device) for bound in (space.low, space.high))
        rows = torch.arange(len(self.bank), device=device)[tasks]
        state = mdp.initial(process, self.bank, rows)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if policy.schedule_head is not None:
                head = policy.schedule_head
                before_first = head.before(state.x_T, state.condition)
                first = head(before_first).sample()
                state = dataclasses.replace(state, t=head.next_time(first, before_first))
            for _ in range(process.max_steps):
                actions = policy.explore(mdp.observation(process, state)).actions
                after = mdp.transition(process, state, actions.clamp(low, high))
                state = mdp.stay_ended(process, state, after)
        policy.denoiser.network_evaluations = before  # judging is no cost of training
        return state.x_t, state.step_index

    def _on_training_end(self) -> None:
        super()._on_training_end()
        self.logger.dump(self.num_timesteps)

    def _log_images(self, x_0: Tensor) -> None:
        codec = self.training_env.get_attr("teacher", [0])[0].codec
        rows = (self.bank.teacher_x_0[: self.num_images], x_0[: self.num_images])
        images = [torch.cat(list(pixels(row, codec)), dim=-1) for row in rows]
        picture = torch.cat(images, dim=-2)
        image = Image(to_rgb(picture[None])[0], "HWC")
        self.logger.record("eval/samples", image, exclude=("stdout", "log", "json", "csv"))


class ProgressBar(BaseCallback):
    """A bar over iterations with reward, KL an element, and the time left.

    Args:
        iterations: Length of the bar.
        done: How many of them were done before.
    """

    def __init__(self, iterations: int, done: int = 0) -> None:
        super().__init__()
        self.iterations = check_integer("iterations", iterations, 1)
        self.done = check_integer("done", done, 0)

    def _on_training_start(self) -> None:
        self.bar = tqdm(
            total=self.iterations, initial=self.done, desc="distilling", unit="iteration"
        )

    def _on_rollout_end(self) -> None:
        values = self.logger.name_to_value
        shown = {"reward": f"{self.model.ep_info_buffer[-1]['r']:.4f}"}  # type: ignore[index]
        for key, label in (("train/kl", "kl"), ("eval/paired_mse", "held-out mse")):
            if key in values:
                shown[label] = f"{values[key]:.2g}"
        self.bar.set_postfix(shown)
        self.bar.update()

    def _on_training_end(self) -> None:
        self.bar.close()

    def _on_step(self) -> bool:
        return True
