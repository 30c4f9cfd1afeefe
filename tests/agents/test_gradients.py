"""Gradients of the whole agent against formulas written out by hand, and their expectations.

From the rollout of a real environment through the loss that `ReDiFPPO` minimises to the weights of
an affine student, whose derivatives are short enough to write down.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from probes import Affine, denoiser, make_agent, make_env
from small_world import OnRolloutEnd
from torch import Tensor

from agents import ReDiFPPO
from redif_env import TeacherBank, schedules, transition
from redif_env.transition import Gaussian, Past

DIM, GRID = 3, (900.0, 500.0, 200.0)
ETA, MIN_STD = 0.3, 0.1
PLAIN = {"stochastic_steps": "all", "antithetic": False}


def make_bank(num: int = 16) -> TeacherBank:
    noise, answers = torch.randn(2, num, 1, 1, DIM, generator=torch.Generator().manual_seed(1))
    return TeacherBank(noise, 0.5 * answers)


def agent(
    grid=GRID, num_envs: int = 8, group_size: int = 4, policy=None, solver_order=1, **options
) -> ReDiFPPO:
    """An agent with an affine student of random weights, which explores in every step."""

    def make_student():
        return denoiser(Affine(grid, DIM, scale=0.5), DIM)

    fixed = {"group_size": group_size, "solver_order": solver_order}
    env = make_env(make_student, make_bank(), grid, num_envs, **fixed)
    options = {"learning_rate": 0.0, "eta": ETA, "min_std": MIN_STD, **PLAIN, **options}
    return make_agent(env, make_student, policy=policy, **options)


def rollout(model: ReDiFPPO) -> Any:
    """The agent after one iteration: its minibatch of all transitions, in a known order."""
    model.learn(model.n_steps * model.n_envs)
    return next(model.rollout_buffer.get())


def parameters(model: ReDiFPPO) -> list[Tensor]:
    network = model.policy.denoiser.network
    return [network.matrix, network.offset]


def gradient(model: ReDiFPPO, batch: Any) -> Tensor:
    """Of the agent's loss with respect to matrices and offsets, in one vector."""
    loss, _ = model._loss(batch, clip_range=0.2, clip_range_vf=None)
    return flat(torch.autograd.grad(loss, parameters(model)))


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@dataclasses.dataclass
class ByHand:
    """The same gradients from the formulas, in double: no autograd, no kernel.

    With data and noise mixed linearly a step from t to s has the mean
    `alpha_s x0_pred + c (x_t - alpha_t x0_pred) / sigma_t`, where c is sigma_s for the deployed
    mean; `slope` is its derivative with respect to `x0_pred`.
    """

    model: ReDiFPPO
    batch: Any
    sde: bool = False

    def __post_init__(self) -> None:
        time = self.batch.observations["timestep"].double().flatten() * 1000
        times = torch.tensor([*GRID, 0.0], dtype=torch.float64)
        self.step = (times - time[:, None]).abs().argmin(1)
        sigma_t, sigma_s = (times[self.step + i, None] / 1000 for i in (0, 1))
        alpha_t, alpha_s = 1 - sigma_t, 1 - sigma_s
        kernel = ETA * sigma_s / sigma_t * (sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2).sqrt()
        self.std = kernel.clamp_min(MIN_STD)
        coefficient = (sigma_s**2 - kernel**2).sqrt() if self.sde else sigma_s
        self.x_t = self.batch.observations["latents"].double().flatten(1)
        self.slope = alpha_s - coefficient * alpha_t / sigma_t
        self.rest = coefficient * self.x_t / sigma_t

    def means(self, student: Any = None) -> Tensor:
        network = (student or self.model.policy.denoiser).network
        matrix, offset = (p.detach().double()[self.step] for p in network.parameters())
        x0_pred = torch.einsum("nij,nj->ni", matrix, self.x_t) + offset
        return self.slope * x0_pred + self.rest

    def chain(self, by_mean: Tensor) -> Tensor:
        """Gradient with respect to the weights of a loss whose gradient by the means is given."""
        by_x0 = self.slope * by_mean
        matrix = torch.zeros(len(GRID), DIM, DIM, dtype=torch.float64)
        offset = torch.zeros(len(GRID), DIM, dtype=torch.float64)
        for row, step in enumerate(self.step.tolist()):
            matrix[step] += by_x0[row, :, None] * self.x_t[row]
            offset[step] += by_x0[row]
        return flat([matrix, offset])

    def score(self) -> Tensor:
        """Derivative of log pi(a) with respect to each mean: (a - mean) / std^2."""
        return (self.batch.actions.double() - self.means()) / self.std**2

    def policy_gradient(self, factor: float = 1.0) -> Tensor:
        """-(1/B) sum_b A_b grad log pi(a_b), the advantage an element where it is local."""
        advantages = self.batch.advantages.double().reshape(len(self.x_t), -1)
        return self.chain(-factor * advantages * self.score() / len(self.x_t))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Within a share of the vector's length; float32 through a chain of products gives 1e-6."""
    return bool((actual - expected).norm() <= tolerance * expected.norm())


LOSSES = [
    pytest.param({"ratio": "element", "credit": "local"}, 1.0, id="element-local"),
    pytest.param({"ratio": "element", "credit": "global"}, 1.0, id="element"),
    pytest.param({"ratio": "sum", "credit": "global"}, 1.0, id="sum"),
    pytest.param({"ratio": "mean", "credit": "global"}, 1 / DIM, id="mean"),
]


@pytest.mark.parametrize(("options", "factor"), LOSSES)
@pytest.mark.parametrize("mean", ["ode", "sde"])
def test_at_ratio_one_the_agents_gradient_is_the_score_function(options, factor, mean):
    model = agent(policy={"exploration_mean": mean}, **options)
    batch = rollout(model)
    hand = ByHand(model, batch, sde=mean == "sde")
    expected = hand.policy_gradient(factor)
    assert close(gradient(model, batch), expected)
    # negative controls: the sign, the factor, the kernel's slope, the other mean, mixed-up credit
    assert not close(gradient(model, batch), -expected)
    assert not close(gradient(model, batch), expected / DIM)
    assert not close(
        gradient(model, batch), ByHand(model, batch, mean == "ode").policy_gradient(factor)
    )
    hand.slope = torch.ones_like(hand.slope)
    assert not close(gradient(model, batch), hand.policy_gradient(factor))
    other = batch._replace(advantages=batch.advantages.roll(1, -1))
    assert not close(gradient(model, other), expected)


def test_local_credit_is_not_the_mean_of_local_credit():
    """Negative control: an element's own advantage matters, not only their mean."""
    model = agent()
    batch = rollout(model)
    mean = batch._replace(advantages=batch.advantages.mean(1))
    assert not close(gradient(model, mean), gradient(model, batch), 0.1)


def rows_of(batch, rows):
    """Some transitions of a minibatch of a student."""

    def take(value):
        if isinstance(value, dict):
            return {name: part[rows] for name, part in value.items()}
        return type(value)(*(part[rows] for part in value)) if value is batch.old else value[rows]

    names = [name for name in batch._fields if name not in ("old_log_prob", "same", "kept")]
    return batch._replace(**{name: take(getattr(batch, name)) for name in names})


WEIGHTS = [0.5, 2.0, 0.0]  # of the steps
GRADIENT_SIZE = len(GRID) * (DIM * DIM + DIM)


@pytest.mark.parametrize("options", [{}, {"credit": "global", "ratio": "sum"}])
def test_the_weighted_loss_is_that_of_each_step_by_its_weight(options):
    """Away from ratio 1, where clipping acts: the student moves after the rollout."""
    model, plain = agent(step_weights=WEIGHTS, **options), agent(**options)
    batch = rollout(model)
    for one in (model, plain):
        for parameter in parameters(one):
            parameter.data.mul_(1.05)

    def loss_of(one, rows):
        return float(one._loss(rows, 0.2, None)[0].detach())

    loss, gradients = 0.0, torch.zeros(GRADIENT_SIZE, dtype=torch.float64)
    for step, weight in enumerate(WEIGHTS):
        rows = batch.step_index == step
        part = rows_of(batch, rows)
        share = weight * float(rows.float().mean())
        loss += share * loss_of(plain, part)
        gradients += share * gradient(plain, part)
    assert loss_of(model, batch) == pytest.approx(loss, rel=1e-4)
    assert close(gradient(model, batch), gradients)
    # negative control: without weights it is another loss
    assert not close(gradient(plain, batch), gradients, 0.1)


def test_weighted_steps_have_the_weighted_score_function_as_gradient():
    model = agent(step_weights=WEIGHTS)
    batch = rollout(model)
    hand = ByHand(model, batch)
    by_mean = -batch.advantages.double() * hand.score() / len(batch.actions)
    weights = torch.tensor(WEIGHTS, dtype=torch.float64)[hand.step, None]
    assert close(gradient(model, batch), hand.chain(weights * by_mean))
    matrix, offset = parameters(model)
    model._loss(batch, 0.2, None)[0].backward()
    # the last step's weight is 0: none of its own numbers are trained
    assert not matrix.grad[2].any()
    assert not offset.grad[2].any()
    assert matrix.grad[:2].abs().min() > 0


def test_a_step_of_weight_zero_is_not_trained():
    policy = {"optimizer_class": torch.optim.SGD}
    model = agent(step_weights=WEIGHTS, policy=policy, learning_rate=0.1, batch_size=8)
    before = [parameter.detach().clone() for parameter in parameters(model)]
    rollout(model)
    for now, then in zip(parameters(model), before, strict=True):
        assert torch.equal(now[2], then[2])
        assert (now[:2] != then[:2]).all()


def change_means(model, change):
    """Let the agent see other means of its own Gaussians."""
    step_distribution = model.policy.step_distribution

    def changed(observations, actions, shared):
        distribution = step_distribution(observations, actions, shared)
        mean, std = distribution.gaussian
        distribution.gaussian = Gaussian(change(mean), std)
        return distribution

    model.policy.step_distribution = changed


def test_a_detached_mean_has_no_gradient():
    """Negative control: what is compared is a gradient through the student."""
    model = agent()
    batch = rollout(model)
    change_means(model, Tensor.detach)
    loss, _ = model._loss(batch, 0.2, None)
    assert not loss.requires_grad


def test_an_update_is_a_step_down_that_gradient():
    """Of plain gradient descent, whose step is the gradient times the learning rate."""
    policy = {"optimizer_class": torch.optim.SGD}
    model = agent(policy=policy, learning_rate=0.01, batch_size=24, max_grad_norm=1e9)
    before = [parameter.detach().clone() for parameter in parameters(model)]
    batch = rollout(model)
    moved = flat(parameters(model)) - flat(before)
    for parameter, value in zip(parameters(model), before, strict=True):
        parameter.data.copy_(value)
    # weights near 1 in float32 keep 1e-7, steps are about 1e-3
    assert close(moved, -0.01 * ByHand(model, batch).policy_gradient(), 1e-3)


ONE, TWO = (800.0,), (800.0, 300.0)
PAIRS = {"group_size": 2, "antithetic": True, "stochastic_steps": "one"}
FOURS = {"group_size": 4, "antithetic": False, "stochastic_steps": "one"}
GLOBAL = {"credit": "global"}
ONE_SIZE = {"policy": {"exploration_noise": "rademacher"}}
NARROW = {"policy": {"exploration_unit": "prediction"}}
SECOND = {"solver_order": 2}


class Estimates:
    """Gradients of many rollouts beside the exact ones of the same tasks, both `(R, P)`.

    The advantages' common scale, which a learning rate would absorb, is multiplied back.
    """

    NUM_ENVS, ROLLOUTS = 2048, 32

    def __init__(self, grid: tuple[float, ...], smoothed: bool = False, **options: Any) -> None:
        self.smoothed = smoothed
        self.model = agent(grid, self.NUM_ENVS, **options)
        self.estimates: list[Tensor] = []
        self.exact: list[Tensor] = []
        transitions = self.ROLLOUTS * self.NUM_ENVS * len(grid)
        self.model.learn(transitions, callback=OnRolloutEnd(self._add))
        self.of_policy, self.of_sampler = torch.stack(self.estimates), torch.stack(self.exact)

    def _add(self, model: ReDiFPPO) -> None:
        batch = next(model.rollout_buffer.get())
        self.estimates.append(self._scale(model) * gradient(model, batch))
        self.exact.append(self._by_back_propagation(model))

    def _scale(self, model: ReDiFPPO) -> Tensor:
        buffer = model.rollout_buffer
        outcome = buffer["rewards"].sum(0)
        if model.credit == "local":
            outcome = buffer["reward_map"][0].flatten(1)
        if model.advantage == "batch":
            return outcome.std()
        groups = outcome.unflatten(0, (-1, buffer.group_size))
        return (groups - groups.mean(1, keepdim=True)).std()

    def _by_back_propagation(self, model: ReDiFPPO) -> Tensor:
        """Of the expected squared error; noise that later steps see adds its share to it."""
        state = model.env.env.last_state
        policy = model.policy
        x_0 = schedules.sample(policy.denoiser, state.x_T, None, policy.timesteps)
        loss = (x_0 - state.teacher_x_0).square().mean()
        if self.smoothed:
            std = model.rollout_buffer["std"][0, 0]
            loss = loss + std.square().squeeze() * parameters(model)[0][1].square().sum() / DIM
        return flat(torch.autograd.grad(loss, parameters(model)))

    def factor(self) -> tuple[float, float]:
        """How long the estimate is along the exact gradient, and its standard error."""
        along = (self.of_policy * self.of_sampler).sum(1) / self.of_sampler.square().sum(1)
        return float(along.mean()), float(along.std() / len(along) ** 0.5)

    def deviation(self, factor: float) -> float:
        """Largest deviation from `factor` times the exact gradient, in standard errors."""
        difference = self.of_policy - factor * self.of_sampler
        error = difference.std(0) / len(difference) ** 0.5
        return float((difference.mean(0).abs() / (error + 1e-9)).max())


EXPECTATIONS = [
    # A pair of opposite noise is a baseline that does not contain the pair's own odd part, ...
    pytest.param(ONE, {**PAIRS, **GLOBAL}, 1.0, id="pairs"),
    # ... the mean of K independent members contains a K-th of each.
    pytest.param(ONE, {**FOURS, **GLOBAL}, 3 / 4, id="fours"),
    pytest.param(ONE, {**FOURS, **GLOBAL, "advantage": "batch"}, 1.0, id="batch"),
    # The reward is the mean of its map.
    pytest.param(ONE, PAIRS, DIM, id="pairs-local"),
    pytest.param(ONE, FOURS, DIM * 3 / 4, id="fours-local"),
    # One of two steps explores.
    pytest.param(TWO, {**PAIRS, **GLOBAL}, 1 / 2, id="two steps-pairs"),
    # The width of the noise cancels, step by step.
    pytest.param(TWO, {**PAIRS, **GLOBAL, **NARROW}, 1 / 2, id="two steps-pairs-narrow first"),
    pytest.param(TWO, {**FOURS, **GLOBAL}, 3 / 8, id="two steps-fours"),
    # A quadratic reward sees no more of the noise than its covariance.
    pytest.param(ONE, {**PAIRS, **GLOBAL, **ONE_SIZE}, 1.0, id="pairs-one size"),
    pytest.param(TWO, {**FOURS, **GLOBAL, **ONE_SIZE}, 3 / 8, id="two steps-fours-one size"),
    # What a step leaves to the next one's extrapolation is part of what its action did.
    pytest.param(GRID, {**PAIRS, **GLOBAL, **SECOND}, 1 / 3, id="three steps-pairs-second order"),
]


@pytest.mark.parametrize(("grid", "options", "factor"), EXPECTATIONS)
def test_the_expected_gradient_is_that_of_back_propagation(grid, options, factor):
    """Through the deterministic sampler that is deployed.

    Standard errors are measured beside the means; with seeds fixed, 4.5 of them leave room for
    another platform's random numbers, and 5 for the largest of 12 or 24 weights.
    """
    estimates = Estimates(grid, **options)
    measured, error = estimates.factor()
    assert abs(measured - factor) < 4.5 * error
    assert estimates.deviation(factor) < 5
    # negative controls: a missing factor, and the wrong sign
    assert abs(measured - factor * 4 / 3) > 4.5 * error
    assert estimates.deviation(-factor) > 10


def test_a_past_that_no_gradient_flows_to_is_noticed(monkeypatch):
    """Negative control: an action's share in the next step's extrapolation is not small."""
    monkeypatch.setattr(transition, "Past", lambda x0_pred, t: Past(x0_pred.detach(), t))
    assert Estimates(GRID, **PAIRS, **GLOBAL, **SECOND).deviation(1 / 3) > 10


def test_where_every_step_explores_the_gradient_is_that_of_the_noisy_sampler():
    """The later step is trained on states that the earlier one's noise has moved."""
    options = {**FOURS, **GLOBAL, "stochastic_steps": "all", "min_std": 0.4}
    assert Estimates(TWO, smoothed=True, **options).deviation(3 / 8) < 5
    # negative control: it is not the gradient of the sampler that is deployed
    assert Estimates(TWO, **options).deviation(3 / 8) > 10


def test_local_credit_is_another_direction_where_a_later_step_mixes_elements():
    """Negative control: local credit is exact for the last step only."""
    estimates = Estimates(TWO, **PAIRS)
    measured, _ = estimates.factor()
    assert estimates.deviation(measured) > 20


def test_opposite_noise_of_one_size_gives_the_last_steps_gradient_without_error():
    """Of a paired error, by local credit: rounding is left. Gaussian noise has a spread."""
    estimates = Estimates(ONE, **PAIRS, **ONE_SIZE)
    difference = estimates.of_policy - DIM * estimates.of_sampler
    assert float(difference.abs().max() / (DIM * estimates.of_sampler).abs().max()) < 1e-3
    gaussian = Estimates(ONE, **PAIRS)
    difference = gaussian.of_policy - DIM * gaussian.of_sampler
    assert float(difference.abs().max() / (DIM * gaussian.of_sampler).abs().max()) > 0.02


def test_the_error_falls_with_the_root_of_the_trajectories():
    estimates = Estimates(ONE, **PAIRS, **GLOBAL)
    difference = estimates.of_policy - estimates.of_sampler
    single, mean_of_16 = (
        float(difference.unflatten(0, (-1, num)).mean(1).square().mean().sqrt()) for num in (1, 16)
    )
    # The latter is known from 2 means of 12 weights only: give or take a fifth.
    assert single / mean_of_16 == pytest.approx(4, rel=0.5)


PENALTIES = [
    ("kl", 0.5),
    ("js", 0.5),
    ("chi_square", 0.5),
    ("renyi", 0.3),
    ("renyi", 3.0),
    ("power", 0.3),
    ("power", 3.0),
]
COEFFICIENT = 0.7


def penalised(name: str, alpha: float = 0.5, **options: Any) -> tuple[ReDiFPPO, Any]:
    """A double-precision agent that has moved from its reference, and a batch without advantages.

    So the surrogate is 0 wherever the student is, and what is left of the loss is the penalty.
    """
    penalty = {"divergence": name, "divergence_alpha": alpha, "divergence_coef": COEFFICIENT}
    model = agent(**penalty, **options)
    batch = rollout(model)
    model.policy.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in parameters(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.02 * noise)
    observations = {key: value.double() for key, value in batch.observations.items()}
    old = type(batch.old)(*(part.double() for part in batch.old))
    zero = torch.zeros_like(batch.advantages)
    return model, batch._replace(observations=observations, old=old, advantages=zero)


def finite_differences(model: ReDiFPPO, batch: Any, step: float = 1e-5) -> Tensor:
    """Of the agent's loss by each weight."""

    @torch.no_grad()
    def loss_with(values: Tensor, index: int, moved: float) -> float:
        original = values[index].item()
        values[index] = original + moved
        loss = float(model._loss(batch, 0.2, None)[0])
        values[index] = original
        return loss

    slopes = [
        (loss_with(values, index, step) - loss_with(values, index, -step)) / (2 * step)
        for values in (parameter.data.view(-1) for parameter in parameters(model))
        for index in range(len(values))
    ]
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize(("name", "alpha"), PENALTIES)
def test_the_penaltys_gradient_equals_finite_differences(name, alpha):
    model, batch = penalised(name, alpha)
    expected = finite_differences(model, batch)
    # the error of central differences is of order step^2 = 1e-10 times third derivatives
    actual = gradient(model, batch)
    assert close(actual, expected, 1e-5)
    # negative controls: the sign, the coefficient
    assert not close(-actual, expected, 1e-2)
    assert not close(actual / COEFFICIENT, expected, 1e-2)


@pytest.mark.parametrize(("name", "alpha"), PENALTIES)
def test_a_detached_mean_is_noticed(name, alpha):
    """Negative control: the same loss, one of whose 24 rows does not see the student."""
    model, batch = penalised(name, alpha)
    expected = finite_differences(model, batch)
    change_means(model, lambda mean: torch.cat([mean[:1].detach(), mean[1:]]))
    assert not close(gradient(model, batch), expected, 1e-3)


@pytest.mark.parametrize(("ratio", "factor"), [("element", 1.0), ("sum", 1.0), ("mean", 1 / DIM)])
def test_the_penalty_has_the_scale_of_the_surrogate(ratio, factor):
    """KL by hand: the mean over rows of the sum over elements, or their mean with that ratio."""
    model, batch = penalised("kl", ratio=ratio, credit="global")
    hand = ByHand(model, batch)
    gap = hand.means() - hand.means(model.policy.reference_denoiser)
    by_mean = COEFFICIENT * factor * gap / hand.std**2 / len(gap)
    assert close(gradient(model, batch), hand.chain(by_mean))
    assert not close(gradient(model, batch), hand.chain(by_mean) / DIM)
