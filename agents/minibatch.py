"""What a policy says of a minibatch now, and how one is cut up and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from torch import Tensor

from redif_env import transition
from redif_env.transition import Gaussian

from . import divergences, losses
from .buffers import RolloutBatch
from .policies import StudentPolicy
from .sharing import neighbours


class Evaluation(NamedTuple):
    """What the policy as it is now says of a minibatch of B transitions.

    Attributes:
        log_ratio: float32 `(B, E)`, see `losses.reduce_log_ratio`.
        kl: KL(old, new) of each row, `(B,)`: an element with `StudentPolicy`, the whole action
            with others.
        error: Mean square log-ratio of each row, `(B,)`.
        values: The critic's, `(B,)` or `(B, D)`, or None.
        entropy: `(B,)`, or None where nothing can change it.
        gaussian: What a student explores with now, or None for other policies.
        reference: What the student that training started from would explore with, given the std of
            the rollout, or None: of the start's own a learned std may differ by so much that the
            chi-square divergence is infinite.
    """

    log_ratio: Tensor
    kl: Tensor
    error: Tensor
    values: Tensor | None
    entropy: Tensor | None
    gaussian: Gaussian | None
    reference: Gaussian | None


def evaluate_student(
    policy: StudentPolicy, batch: RolloutBatch, ratio: str, with_reference: bool
) -> Evaluation:
    """Of a student: element by element, from the stored means."""
    assert batch.old is not None
    shared = neighbours(len(batch.actions), batch.same, batch.actions.device)
    kept = {} if batch.kept is None else {"x0_pred": batch.kept.repeat_interleave(batch.same, 0)}
    distribution = policy.step_distribution(batch.observations, batch.actions, shared, **kept)
    mean, std = distribution.gaussian
    new_std = None if policy.step_scale is None else std
    x_s = batch.actions[:, : mean[0].numel()].reshape(mean.shape)
    log_ratio_map = transition.log_ratio_map(x_s, mean, batch.old, new_std).flatten(1)
    with torch.no_grad():
        moved = Gaussian(mean, batch.old.std if new_std is None else new_std)
        kl_map = divergences.kl(batch.old, moved)
    reference = None
    if with_reference:
        with torch.no_grad():
            means = policy.reference_means(batch.observations, batch.actions, shared)
        reference = Gaussian(means, batch.old.std)
    return Evaluation(
        log_ratio=losses.reduce_log_ratio(log_ratio_map, ratio),
        kl=kl_map.flatten(1).mean(1),
        error=log_ratio_map.detach().square().mean(1),
        values=None if policy.value_critic is None else policy.values(batch.observations),
        entropy=None if new_std is None else distribution.entropy(),
        gaussian=distribution.gaussian,
        reference=reference,
    )


def evaluate_generic(policy: Any, batch: Any) -> Evaluation:
    """The same of any policy: whole actions instead of elements."""
    actions = batch.actions
    if isinstance(policy.action_space, spaces.Discrete):
        actions = actions.long().flatten()
    values, log_prob, entropy = policy.evaluate_actions(batch.observations, actions)
    log_ratio = (log_prob - batch.old_log_prob).unsqueeze(1)
    if entropy is None:  # no closed form
        entropy = -log_prob
    kl = losses.approximate_kl(log_ratio).expand(len(log_ratio))
    error = log_ratio.detach().square().squeeze(1)
    return Evaluation(log_ratio, kl, error, values.flatten(), entropy, None, None)


def split(batch: Any, num_rows: int | None) -> Iterator[Any]:
    """Parts of a `RolloutBatch` of at most so many states each; None: the batch as it is."""
    if num_rows is not None:
        num_rows *= getattr(batch, "same", 1)
    if num_rows is None or len(batch.actions) <= num_rows:
        yield batch
        return
    for rows in torch.arange(len(batch.actions), device=batch.actions.device).split(num_rows):
        yield RolloutBatch(*(_taken(value, rows) for value in batch))


def _taken(value: Any, rows: Tensor) -> Any:
    """Some rows of a tensor, of tensors by name, or of a Gaussian; what has no rows as it is."""
    if isinstance(value, dict):
        return {name: tensor[rows] for name, tensor in value.items()}
    if isinstance(value, Gaussian):
        return Gaussian(*(tensor[rows] for tensor in value))
    return value[rows] if isinstance(value, Tensor) and value.ndim else value


def join(parts: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of a whole minibatch from those of its parts, without gradients."""
    return Evaluation(*(_joined(values) for values in zip(*parts, strict=True)))


def _joined(values: Sequence[Any]) -> Any:
    if values[0] is None:
        return None
    if isinstance(values[0], Gaussian):
        return Gaussian(*map(_joined, zip(*values, strict=True)))
    return torch.cat([value.detach() for value in values])
