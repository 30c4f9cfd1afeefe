r"""Distances between the student's and the teacher's *distributions*, shared out over the samples.

For student samples X, teacher answers Y and a kernel k, the unbiased estimate of the squared
maximum mean discrepancy is (Gretton et al. 2012, eq. 3)

.. math:: D^2 = B + C - 2A, \quad A = \overline{k(x_i, y_j)}, \quad
    B = \overline{k(x_i, x_j)}_{i \ne j}, \quad C = \overline{k(y_i, y_j)}_{i \ne j}.

With :math:`k(x, y) = -|x - y|` it is the energy distance
:math:`2 E|x - y| - E|x - x'| - E|y - y'|` (Sejdinovic et al. 2013, theorem 22).

A sample's reward is minus its jackknife pseudo-value
:math:`p_i = n D^2(X) - (n - 1) D^2(X \setminus i)` (Tukey 1958). Their mean is exactly
:math:`D^2`; and since :math:`D^2(X \setminus i)` does not depend on sample i, taking it away is a
baseline: the policy gradient stays that of the distance, with less variance. With
:math:`a_i = \overline{k(x_i, y_j)}` and :math:`b_i = \overline{k(x_i, x_j)}_{j \ne i}`,

.. math:: p_i = 2 b_i - B(X \setminus i) + C - 2 a_i,

which asks of the other samples R only :math:`b_i` and :math:`B(R)`: a memory serves as well.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError, check_integer, check_number
from .base import register_reward
from .online import OnlineReward, frozen

Kernel = Callable[[Tensor, Tensor], Tensor]


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances `(n, m)` of rows `(n, F)` from rows `(m, F)`.

    Not by the matrix product, which torch takes for more than 25 rows: its rounding error of about
    1e-3 times the norm is a large part of the distance between samples of the same task.
    """
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def energy_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Minus the distance, `(n, m)`."""
    return -distances(x, y)


def gaussian_kernel(x: Tensor, y: Tensor, bandwidth: float | Tensor) -> Tensor:
    """`exp(-|x - y|^2 / (2 h^2))`, `(n, m)`."""
    return (-0.5 * (distances(x, y) / bandwidth) ** 2).exp()


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`(x y / F + 1)^3`, `(n, m)`: the kernel inception distance's (Binkowski et al. 2018)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def mean_between_others(kernel_matrix: Tensor) -> Tensor:
    """Mean of a symmetric matrix `(n, n)` over its places off the diagonal, a scalar."""
    n = len(kernel_matrix)
    return (kernel_matrix.sum() - kernel_matrix.diagonal().sum()) / (n * (n - 1))


def discrepancy(kernel: Kernel, x: Tensor, y: Tensor) -> Tensor:
    """The unbiased `D^2` of samples `(n, F)` and `(m, F)`, a scalar, which may be negative."""
    among_x, among_y = mean_between_others(kernel(x, x)), mean_between_others(kernel(y, y))
    return among_x + among_y - 2 * kernel(x, y).mean()


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
        kernel: The kernel, with its bandwidth.
        features: Of teacher answers, float32 `(m, F)`.
        within: C, the mean kernel between different answers, scalar.
    """

    kernel: Kernel
    features: Tensor
    within: Tensor


def pseudo_values(reference: Reference, x: Tensor) -> Tensor:
    """p_i of each of the samples `(n, F)`, against the others, float32 `(n,)`; n is at least 3."""
    n = len(x)
    among = reference.kernel(x, x)
    sums = among.sum(1) - among.diagonal()
    rest = (sums.sum() - 2 * sums) / ((n - 1) * (n - 2))
    return _pseudo_values(reference, x, sums / (n - 1), rest)


def pseudo_values_beside(reference: Reference, x: Tensor, others: Tensor) -> Tensor:
    """p_i of each of the samples `(n, F)`, alone, when added to `others` `(r, F)`; r >= 2."""
    kernel = reference.kernel
    rest = mean_between_others(kernel(others, others))
    return _pseudo_values(reference, x, kernel(x, others).mean(1), rest)


def _pseudo_values(reference: Reference, x: Tensor, to_others: Tensor, rest: Tensor) -> Tensor:
    to_teacher = reference.kernel(x, reference.features).mean(1)
    return 2 * to_others - rest + reference.within - 2 * to_teacher


class Discrepancy(OnlineReward):
    """Minus each sample's share of the distance between the student's and teacher's distributions.

    The mean over a batch is minus the unbiased `D^2`. Without a memory, rows are scored against
    the batch: at least 3 rows, all ended (a fixed schedule). Groups repeat a task, which biases
    the estimate a little towards small distances between students; and answers of the batch repeat
    too, which only shifts all rewards. A `reference` of other noise has neither defect.

    Args:
        features: Function or module from samples to `(N, ...)`, flattened to `(N, F)`; a module is
            copied and frozen. None: the samples themselves.
        reference: Teacher answers to compare with, float `(M, *latent_shape)`, M at least 2, such
            as another bank's `teacher_x_0`; None takes those of the batch or of the memory.
        memory: Most recent student samples to score against, as `update` was given them with the
            teacher's answers, in place of the batch: rows then do not influence each other. Until
            it holds two samples all rewards are 0, as if the student had been the teacher.

    Attributes:
        memory, answers: Features of student samples, and without a reference of the teacher's
            answers to the same noise, float32 `(n, F)` each; None until `update`.

    Raises:
        InvalidArgumentError: for features that are not a row a sample, or too few rows.
    """

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reference: Tensor | None = None,
        memory: int = 0,
    ) -> None:
        if features is not None and not callable(features):
            raise InvalidArgumentError(
                "features", features, "pass a function or module from samples to features."
            )
        if reference is not None and (not isinstance(reference, Tensor) or len(reference) < 2):
            raise InvalidArgumentError(
                "reference", reference, "pass two teacher answers or more, (M, *latent_shape)."
            )
        self.features = frozen(features) if isinstance(features, nn.Module) else features
        self.size = check_integer("memory", memory, 0)
        if self.size == 1:
            raise InvalidArgumentError("memory", memory, "pass 2 or more: one has no distribution.")
        self.over_batch = self.size == 0
        if isinstance(self.features, nn.Module):  # of a sample, its answer, and both in `update`
            self.nfe = 1 + (reference is None) + (not self.over_batch)
        self.memory: Tensor | None = None
        self.answers: Tensor | None = None
        self._given = reference
        self._kept: Reference | None = None

    @abstractmethod
    def fit_kernel(self, y: Tensor) -> Kernel:
        """The kernel to compare with reference features `(m, F)`."""

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        x = self._features(x_0)
        if self.over_batch:
            _check_rows("x_0", x, 3)
            return -pseudo_values(self._reference(teacher_x_0), x)
        if self.memory is None or len(self.memory) < 2:
            return torch.zeros_like(x[:, 0])
        return -pseudo_values_beside(self._reference(teacher_x_0), x, self.memory.to(x.device))

    @torch.no_grad()
    def update(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> dict[str, float]:
        if self.over_batch:
            return {}
        self.memory = self._remember(self.memory, x_0)
        if self._given is None:
            self.answers, self._kept = self._remember(self.answers, teacher_x_0), None
        if len(self.memory) < 2:
            return {"memory": float(len(self.memory))}
        reference = self._reference(teacher_x_0)
        distance = discrepancy(reference.kernel, self.memory, reference.features)
        return {"estimate": float(distance), "memory": float(len(self.memory))}

    def state_dict(self) -> dict[str, Any]:
        kept = {"memory": self.memory, "answers": self.answers}
        return {name: None if value is None else value.cpu() for name, value in kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.memory, self.answers, self._kept = state["memory"], state["answers"], None

    def _remember(self, memory: Tensor | None, samples: Tensor) -> Tensor:
        """The memory with the features of samples added; its own, not part of something larger."""
        new = self._features(samples)
        kept = new if memory is None else torch.cat([memory.to(new.device), new])
        return kept[-self.size :].clone()

    def _reference(self, teacher_x_0: Tensor) -> Reference:
        """Made of the batch's answers at each call; of given or remembered ones, once."""
        device = teacher_x_0.device
        if self.over_batch and self._given is None:
            return self._make_reference(self._features(teacher_x_0))
        if self._kept is None or self._kept.features.device != device:
            if self._given is not None:
                y = self._features(self._given.to(device))
            else:
                assert self.answers is not None  # remembered with the samples
                y = self.answers.to(device)
            self._kept = self._make_reference(y)
        return self._kept

    def _make_reference(self, y: Tensor) -> Reference:
        _check_rows("teacher_x_0", y, 2)
        kernel = self.fit_kernel(y)
        return Reference(kernel, y, mean_between_others(kernel(y, y)))

    def _features(self, x_0: Tensor) -> Tensor:
        if isinstance(self.features, nn.Module):
            self.features.to(x_0.device)
        found = x_0 if self.features is None else self.features(x_0)
        if not isinstance(found, Tensor) or found.ndim < 2 or len(found) != len(x_0):
            got = tuple(found.shape) if isinstance(found, Tensor) else found
            raise InvalidArgumentError(
                "features(x_0)", got, f"return features of shape ({len(x_0)}, number of features)."
            )
        return found.flatten(1).float()


class EnergyDistance(Discrepancy):
    """The energy distance (Szekely and Rizzo 2013): no bandwidth, and it pulls from any distance.

    Rewards have the unit of the features. See `Discrepancy` for arguments.
    """

    name = "energy_distance"

    def fit_kernel(self, y: Tensor) -> Kernel:
        return energy_kernel


class MMD(Discrepancy):
    """Squared maximum mean discrepancy with a Gaussian kernel, at most 2.

    Samples many bandwidths away from everything all score alike: prefer `EnergyDistance` until
    student and teacher overlap.

    Args:
        features, reference, memory: See `Discrepancy`.
        bandwidth: h, in the unit of the features; None takes the median distance between different
            reference answers (Gretton et al. 2012, section 8).
    """

    name = "mmd"

    def __init__(
        self,
        features: Callable[[Tensor], Tensor] | None = None,
        reference: Tensor | None = None,
        memory: int = 0,
        bandwidth: float | None = None,
    ) -> None:
        super().__init__(features, reference, memory)
        if bandwidth is not None:
            bandwidth = check_number("bandwidth", bandwidth, minimum=1e-12)
        self.bandwidth = bandwidth

    def fit_kernel(self, y: Tensor) -> Kernel:
        if self.bandwidth is not None:
            return functools.partial(gaussian_kernel, bandwidth=self.bandwidth)
        pairs = torch.triu_indices(len(y), len(y), 1, device=y.device)
        median = distances(y, y)[pairs[0], pairs[1]].median()
        # Equal answers have no scale; any bandwidth then gives the same order.
        return functools.partial(gaussian_kernel, bandwidth=median.clamp_min(1e-12))


def _check_rows(argument: str, rows: Tensor, minimum: int) -> None:
    if len(rows) < minimum:
        raise InvalidArgumentError(
            argument,
            f"{len(rows)} rows",
            f"a distribution needs {minimum} at least: use more environments, or a memory.",
        )


for _kind in (EnergyDistance, MMD):
    register_reward(_kind.name, _kind)
