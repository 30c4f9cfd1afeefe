r"""A discriminator trained beside the policy: the log density ratio of teacher and student.

The logistic discriminator D = sigmoid(f) that tells teacher answers from student samples, at its
optimum, is :math:`f(x) = \log p_T(x) - \log p_S(x)` (Goodfellow et al. 2014, proposition 1), and
:math:`\log D - \log(1 - D)` is f itself. Its mean over student samples is then minus
:math:`KL(S \| T)`: the student is paid for samples that the teacher would make more often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InvalidArgumentError, check_integer, check_number
from .online import OnlineReward

# Momentum makes a discriminator chase samples that the student no longer makes (DCGAN's 0.5, and
# 0 beside a gradient penalty: Mescheder et al. 2018, appendix C).
BETAS = (0.0, 0.99)


class ProjectionNetwork(nn.Module):
    r"""A small critic of samples and classes, :math:`f(x, c) = (w + e_c) \cdot \phi(x) + b`.

    The class enters by projection (Miyato and Koyama 2018, eq. 3). Images, `(C, H, W)`, go through
    convolutions that halve them down to 4 pixels or fewer; anything else through an MLP.

    Args:
        latent_shape: Shape of a sample.
        num_classes: Number of classes; None without.
        width: Channels of the first layer; each halving doubles them, up to 8 times.
    """

    def __init__(
        self, latent_shape: tuple[int, ...], num_classes: int | None = None, width: int = 32
    ) -> None:
        super().__init__()
        self.body = _body(latent_shape, width)
        with torch.no_grad():
            num_features = self.body(torch.zeros(1, *latent_shape)).shape[1]
        self.head = nn.Linear(num_features, 1)
        self.embedding = None if num_classes is None else nn.Embedding(num_classes, num_features)
        if self.embedding is not None:
            nn.init.zeros_(self.embedding.weight)  # all classes start alike

    def forward(self, x_0: Tensor, condition: Tensor | None = None) -> Tensor:
        """Logits, `(N,)`."""
        features = self.body(x_0)
        logits = self.head(features).squeeze(1)
        if self.embedding is None:
            return logits
        return logits + (self.embedding(condition) * features).sum(1)


def _body(latent_shape: tuple[int, ...], width: int) -> nn.Sequential:
    if len(latent_shape) != 3:
        first = nn.Linear(int(torch.Size(latent_shape).numel()), 4 * width)
        return nn.Sequential(
            nn.Flatten(), first, nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU()
        )
    channels, side = latent_shape[0], min(latent_shape[1:])
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.SiLU()]
    now = width
    while side > 4:
        after = min(2 * now, 8 * width)
        layers += [nn.Conv2d(now, after, 3, stride=2, padding=1), nn.SiLU()]
        now, side = after, (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten())


def logistic_loss(teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
    """`-mean log D(teacher) - mean log(1 - D(student))`: 2 log 2 where it cannot tell."""
    return F.softplus(-teacher_logits).mean() + F.softplus(student_logits).mean()


def gradient_penalty(logits: Tensor, samples: Tensor) -> Tensor:
    """R1: mean squared norm of the gradient by the samples (Mescheder et al. 2018, eq. 9).

    Args:
        logits: `(N,)`, computed from `samples`.
        samples: `(N, ...)`, which require gradients.
    """
    (gradient,) = torch.autograd.grad(logits.sum(), samples, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


class Discriminator(OnlineReward):
    """The logit of a discriminator between teacher and student, trained by `update`.

    Blind by choice: no gradient leads to the student, and the reward has no map. It moves with
    every update, so that rewards of different iterations cannot be compared: watch a judge. Beside
    `MSE` it pays for what the mean of squares blurs.

    Args:
        latent_shape: Shape of a sample, such as `teacher.denoiser.latent_shape`.
        num_classes: Number of classes, to judge samples for their class; None looks at samples
            alone.
        network: Module of your own, called as `network(x_0)`, or `network(x_0, condition)` with
            classes, giving logits `(N,)`. It is trained in place. Default: `ProjectionNetwork`.
        learning_rate: Of Adam.
        penalty: Coefficient gamma of the penalty, gamma / 2 times R1. Without one the logits grow
            without bound as soon as the two can be told apart.
        batch_size: Rows of a minibatch, as many of each side.
        n_epochs: Passes over the samples of an update.
        seed: Of the default network's weights and of the minibatches; global generators are left
            alone.

    Attributes:
        updates: Gradient steps so far.
        network_evaluations: Rows that its own network was asked for: 1 forward, 3 forward and back.

    Raises:
        InvalidArgumentError: for classes without a condition, or logits that are not `(N,)`.
    """

    def __init__(
        self,
        latent_shape: tuple[int, ...],
        num_classes: int | None = None,
        network: nn.Module | None = None,
        *,
        learning_rate: float = 1e-3,
        penalty: float = 1.0,
        batch_size: int = 128,
        n_epochs: int = 2,
        seed: int = 0,
    ) -> None:
        if network is not None and not isinstance(network, nn.Module):
            raise InvalidArgumentError("network", network, "pass a module from samples to logits.")
        if num_classes is not None:
            num_classes = check_integer("num_classes", num_classes, 1)
        self.num_classes = num_classes
        self.penalty = check_number("penalty", penalty)
        self.batch_size = check_integer("batch_size", batch_size, 1)
        self.n_epochs = check_integer("n_epochs", n_epochs, 1)
        self.generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
        self.network = network or _seeded_network(tuple(latent_shape), num_classes, seed)
        self.network.eval()
        rate = check_number("learning_rate", learning_rate)
        self.optimizer = torch.optim.Adam(self.network.parameters(), rate, BETAS)
        self.updates = 0
        self.network_evaluations = 0

    @torch.no_grad()
    def __call__(self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None) -> Tensor:
        self._to(x_0.device)
        self.network_evaluations += len(x_0)
        return self._logits(x_0, condition)

    def update(
        self, x_0: Tensor, teacher_x_0: Tensor, condition: Tensor | None
    ) -> dict[str, float]:
        if not len(x_0):  # the loss of no rows is NaN, and so would all weights be
            return {}
        self._to(x_0.device)
        history = []
        with torch.enable_grad():
            for rows in self._minibatches(len(x_0)):
                rows = rows.to(x_0.device)
                classes = None if condition is None else condition[rows]
                history.append(self._step(x_0[rows].detach(), teacher_x_0[rows], classes))
        means = torch.stack(history).mean(0).tolist()
        return dict(zip(("loss", "accuracy", "penalty"), means, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": _host(self.network.state_dict()),
            "optimizer": _host(self.optimizer.state_dict()),
            "generator": self.generator.get_state(),
            "updates": self.updates,
            "network_evaluations": self.network_evaluations,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"].cpu())
        self.updates = state["updates"]
        self.network_evaluations = state.get("network_evaluations", 0)  # older states have none

    def _step(self, student: Tensor, teacher: Tensor, condition: Tensor | None) -> Tensor:
        """One gradient step; loss, accuracy and R1 before it, `(3,)`."""
        real = teacher.detach().clone().requires_grad_()
        teacher_logits = self._logits(real, condition)
        student_logits = self._logits(student, condition)
        loss = logistic_loss(teacher_logits, student_logits)
        r1 = gradient_penalty(teacher_logits, real)
        self.optimizer.zero_grad()
        (loss + 0.5 * self.penalty * r1).backward()
        self.optimizer.step()
        self.updates += 1
        self.network_evaluations += 3 * (len(real) + len(student))
        right = torch.cat([teacher_logits > 0, student_logits < 0]).float().mean()
        return torch.stack([loss.detach(), right, r1.detach()])

    def _minibatches(self, num: int) -> Iterator[Tensor]:
        for _ in range(self.n_epochs):
            yield from torch.randperm(num, generator=self.generator).split(self.batch_size)

    def _logits(self, x_0: Tensor, condition: Tensor | None) -> Tensor:
        if self.num_classes is not None and condition is None:
            raise InvalidArgumentError(
                "condition", None, "leave num_classes out for a teacher without classes."
            )
        inputs = (x_0,) if self.num_classes is None else (x_0, condition)
        logits = self.network(*inputs)
        if not isinstance(logits, Tensor) or logits.shape != (len(x_0),):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else logits
            raise InvalidArgumentError("network(x_0)", got, f"return shape ({len(x_0)},).")
        return logits

    def _to(self, device: torch.device) -> None:
        parameter = next(self.network.parameters())
        if parameter.device != device:
            self.network.to(device)
            # Loading casts the moments to where the parameters now are.
            self.optimizer.load_state_dict(self.optimizer.state_dict())


def _seeded_network(
    latent_shape: tuple[int, ...], num_classes: int | None, seed: int
) -> ProjectionNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ProjectionNetwork(latent_shape, num_classes)


def _host(state: Any) -> Any:
    """A copy on the CPU of every tensor in nested dicts and lists."""
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _host(value) for key, value in state.items()}
    return [_host(value) for value in state] if isinstance(state, list | tuple) else state
