"""What an update did, in numbers: per step of the episode, and to the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from stable_baselines3.common.logger import Logger
from torch import Tensor

from . import sharding
from .buffers import TorchRolloutBuffer
from .losses import clip_fraction
from .policies import StudentPolicy

PER_STEP = ("kl", "clip_fraction", "exploration_std")


def per_step(batch: Any, new: Any, clip_range: float, num_steps: int) -> Tensor:
    """Sums over a minibatch's transitions of each step of the episode.

    Args:
        batch: A `RolloutBatch` of B transitions.
        new: The `Evaluation` of the policy on it.
        clip_range: Of the update.
        num_steps: Steps of an episode.

    Returns:
        float32 `(4, num_steps)`: the rows, then the sums of `PER_STEP`.
    """
    clipped = clip_fraction(new.log_ratio, clip_range)
    std = batch.old.std.flatten(1).mean(1)
    parts = torch.stack([torch.ones_like(new.kl), new.kl, clipped, std])
    return parts.new_zeros(len(parts), num_steps).index_add_(1, batch.step_index, parts)


def step_means(history: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The means of `PER_STEP` over an iteration, by name and step, of the steps that explored."""
    rows, *sums = torch.stack([entry["per_step"] for entry in history]).sum(0).tolist()
    return {
        f"{name}_step_{step}": total / count
        for name, totals in zip(PER_STEP, sums, strict=True)
        for step, (total, count) in enumerate(zip(totals, rows, strict=True))
        if count
    }


def means(history: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The means over minibatches of what most of them have, by name."""
    entries = list(history)
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {
        name: float(torch.stack([entry[name] for entry in entries if name in entry]).mean())
        for name in names
        if name not in ("ratio_error", "per_step")
    }


def record(agent: Any, history: Sequence[Mapping[str, Tensor]], clip_range: float) -> None:
    """Log what an iteration of `ReDiFPPO` did, over its minibatches: one transfer to the host.

    Args:
        agent: The agent, which is only read.
        history: What `objective.Objective.loss` gave of each minibatch.
        clip_range: Of the iteration.
    """
    log, buffer = agent.logger.record, agent.rollout_buffer
    record_means(agent.logger, history)
    log("train/ratio_error", float(history[0]["ratio_error"]))
    if "value_loss" in history[0]:
        log("train/explained_variance", explained_variance(buffer.values, buffer.returns))
    if agent.divergence is not None:
        log("train/divergence_coef", agent.divergence_coef)
    if isinstance(buffer, TorchRolloutBuffer):
        log("train/advantage_scale", float(buffer.advantage_scale))
    if "per_step" in history[0]:
        for name, value in step_means(history).items():
            log(f"train/{name}", value)
    moved = drift(agent._actor_parameters(), agent._start)
    log("train/parameter_drift", float(sharding.put_together(moved)))
    log("train/updates_skipped", agent.updates_skipped)
    log("train/clip_range", clip_range)
    agent.logger.record("train/n_updates", agent._n_updates, exclude="tensorboard")
    if isinstance(agent.policy, StudentPolicy):
        log("train/eta", agent.policy.eta)
        log("train/min_std", agent.policy.min_std)
    if agent.gap_fraction is not None:
        log("train/gap", agent.gap)


def record_means(logger: Logger, history: Iterable[Mapping[str, Tensor]]) -> None:
    """Log the means over minibatches."""
    for name, value in means(history).items():
        logger.record(f"train/{name}", value)


def explained_variance(values: Any, returns: Any) -> float:
    """Share of the returns' variance that the critic explains: 1 is all, 0 none."""
    values, returns = torch.as_tensor(values), torch.as_tensor(returns)
    return float(1 - (returns - values).var() / returns.var())


def copies(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Detached copies."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def drift(parameters: Iterable[Tensor], start: Iterable[Tensor]) -> Tensor:
    """Distance of parameters from where they started, over the norm of the start."""
    first = list(start)
    moved = torch._foreach_sub([p.detach() for p in parameters], first)
    norms = [torch.stack(torch._foreach_norm(group)).norm() for group in (moved, first)]
    return norms[0] / norms[1].clamp_min(1e-12)
