"""Divergences against torch's own, fine-grid integrals, closed forms, and finite differences."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

from agents.divergences import (
    DIVERGENCES,
    MAX_COEFFICIENT,
    MAX_EXPONENT,
    MIN_COEFFICIENT,
    AdaptiveCoefficient,
    check_divergence,
    chi_square,
    divergence_map,
    js,
    kl,
    power,
    renyi,
)
from redif_env.errors import InvalidArgumentError
from redif_env.transition import Gaussian

# Every order that behaves in its own way: below 0, in (0, 1), above 1; kl, js, chi_square have none
CASES = [
    ("kl", 0.5),
    ("js", 0.5),
    ("chi_square", 0.5),
    ("renyi", 0.3),
    ("renyi", 0.5),
    ("renyi", 0.9),
    ("renyi", 3.0),
    ("power", -0.4),
    ("power", 0.3),
    ("power", 0.5),
    ("power", 0.8),
    ("power", 3.0),
]
SYMMETRIC = {("js", 0.5), ("renyi", 0.5), ("power", 0.5)}
GAPS = [0.05, -0.4, 1.0]
every_case = pytest.mark.parametrize(("name", "alpha"), CASES)


def pair(new_std: list[float], ref_std: list[float]) -> tuple[Gaussian, Gaussian]:
    """Rows of three gaps, a std a row, in float64; the student's tensors require gradients."""
    stds = torch.tensor([new_std, ref_std], dtype=torch.float64)[..., None]
    ref_mean = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64).repeat(len(new_std), 1)
    new_mean = ref_mean + torch.tensor(GAPS, dtype=torch.float64)
    new = Gaussian(new_mean.requires_grad_(), stds[0].clone().requires_grad_())
    return new, Gaussian(ref_mean.requires_grad_(), stds[1].clone().requires_grad_())


def equal_and_unequal() -> tuple[Gaussian, Gaussian]:
    """Ratios 1, 1.07 and 0.83: all orders in `CASES` are finite, either way round."""
    return pair([0.7, 0.75, 0.5], [0.7, 0.7, 0.6])


def by_grid(name: str, new: Gaussian, ref: Gaussian, alpha: float) -> torch.Tensor:
    """The definition, integrated by the trapezoidal rule over 20,001 points."""
    x = torch.linspace(-20, 20, 20_001, dtype=torch.float64)
    log_p, log_q = (Normal(mean[..., None], std[..., None]).log_prob(x) for mean, std in (new, ref))
    p, q = log_p.exp(), log_q.exp()

    def integral(integrand: torch.Tensor) -> torch.Tensor:
        return torch.trapezoid(integrand, x)

    if name == "kl":
        return integral(p * (log_p - log_q))
    if name == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return integral(p * (log_p - log_m) + q * (log_q - log_m)) / 2
    if name == "chi_square":
        return integral((2 * log_p - log_q).exp() - 2 * p + q)
    mixed = integral((alpha * log_p + (1 - alpha) * log_q).exp())
    return mixed.log() / (alpha - 1) if name == "renyi" else (mixed - 1) / (alpha * (alpha - 1))


def student_gradients(divergence: torch.Tensor, new: Gaussian) -> list[torch.Tensor]:
    return list(torch.autograd.grad(divergence.sum(), [new.mean, new.std]))


def finite_differences(function, tensors: Gaussian, step: float = 1e-5) -> list[torch.Tensor]:
    """Central differences of the sum of `function()`, moving each element of the tensors."""
    gradients = []
    for tensor in tensors:
        flat, gradient = tensor.detach().view(-1), torch.empty(tensor.numel(), dtype=torch.float64)
        for index in range(len(flat)):
            original, values = flat[index].item(), []
            for moved in (original + step, original - step):
                flat[index] = moved
                values.append(function().sum().item())
            flat[index] = original
            gradient[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient.view_as(tensor))
    return gradients


def agree(actual, expected, rtol: float, atol: float = 0.0) -> bool:
    return all(torch.allclose(a, b, rtol, atol) for a, b in zip(actual, expected, strict=True))


def quadrature_tolerance(name: str) -> dict[str, float]:
    """JS sums 32 nodes; for stds within a factor of 1.4 and gaps below 2 stds that is 1e-6."""
    return {"rtol": 1e-5, "atol": 1e-6} if name == "js" else {"rtol": 1e-7, "atol": 1e-11}


@every_case
def test_values_equal_the_integral_on_a_fine_grid(name, alpha):
    new, ref = equal_and_unequal()
    expected = by_grid(name, new, ref, alpha)
    tolerance = quadrature_tolerance(name)
    assert agree(divergence_map(name, new, ref, alpha), expected, **tolerance)
    # negative controls: the other direction, a factor, another order
    swapped = divergence_map(name, ref, new, alpha)
    assert agree(swapped, expected, **tolerance) == ((name, alpha) in SYMMETRIC)
    assert not agree(divergence_map(name, new, ref, alpha) / 2, expected, **tolerance)
    if name in ("renyi", "power"):
        assert not agree(divergence_map(name, new, ref, alpha + 0.05), expected, **tolerance)


@every_case
def test_gradients_equal_finite_differences(name, alpha):
    new, ref = equal_and_unequal()

    def function() -> torch.Tensor:
        return divergence_map(name, new, ref, alpha)

    gradients = student_gradients(function(), new)
    differences = finite_differences(function, new)
    assert agree(gradients, differences, rtol=1e-6, atol=1e-8)
    # negative controls: the reference's gradient has the other sign, and a factor shows
    of_ref = torch.autograd.grad(function().sum(), [ref.mean, ref.std])
    assert not agree(of_ref, differences, rtol=1e-6, atol=1e-8)
    assert not agree([2 * gradient for gradient in gradients], differences, rtol=1e-6, atol=1e-8)


@every_case
def test_gradients_equal_those_of_the_integral(name, alpha):
    """Autograd through the definition; for JS a check of the quadrature, not only of its sum."""
    new, ref = equal_and_unequal()
    gradients = student_gradients(divergence_map(name, new, ref, alpha), new)
    expected = student_gradients(by_grid(name, new, ref, alpha), new)
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if name == "js" else {"rtol": 1e-6, "atol": 1e-8}
    assert agree(gradients, expected, **tolerance)
    other = student_gradients(by_grid(name, ref, new, alpha), new)
    assert agree(gradients, other, **tolerance) == ((name, alpha) in SYMMETRIC)


def test_kl_equals_torch():
    new, ref = pair([0.7, 2.0, 0.1], [0.7, 0.3, 1.5])
    expected = kl_divergence(Normal(*new), Normal(*ref))
    torch.testing.assert_close(kl(new, ref), expected)
    # negative control: the other direction, wherever the stds differ
    assert ((kl(ref, new) - expected).abs() > 0.1).tolist() == [[False] * 3, [True] * 3, [True] * 3]


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2.0, 4.0])
def test_at_equal_stds_only_the_gap_is_left(alpha):
    new, ref = pair([0.4], [0.4])
    squared = (torch.tensor([GAPS], dtype=torch.float64) / 0.4) ** 2
    close = torch.testing.assert_close
    close(kl(new, ref), squared / 2)
    close(chi_square(new, ref), squared.exp() - 1)
    close(renyi(new, ref, alpha), alpha * squared / 2)
    factor = alpha * (alpha - 1)
    # at alpha = 4 the largest exponent is 12 (1 / 0.4)^2 / 2 = 37.5, on the tangent
    assert (factor * squared / 2 < MAX_EXPONENT).sum().item() == (3 if alpha < 4 else 2)
    inside = factor * squared / 2 < MAX_EXPONENT
    expected = ((factor * squared / 2).exp() - 1) / factor
    close(power(new, ref, alpha)[inside], expected[inside])


@pytest.mark.parametrize("offset", [0.0, 1e-13, 1e-9, -1e-9, 1e-7])
def test_limits_of_the_orders(offset):
    new, ref = equal_and_unequal()

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)

    close(renyi(new, ref, 1 + offset), kl(new, ref))
    close(power(new, ref, 1 + offset), kl(new, ref))
    close(power(new, ref, offset), kl(ref, new))
    close(power(new, ref, 2 + offset), chi_square(new, ref) / 2)
    close(power(new, ref, -1 + offset), chi_square(ref, new) / 2)
    close(power(new, ref, 0.5 + offset), 4 * (1 - (-renyi(new, ref, 0.5) / 2).exp()))
    close(renyi(new, ref, 2 + offset), torch.log1p(chi_square(new, ref)))
    # negative control: an order that is merely near 1 is not the limit
    assert not torch.allclose(renyi(new, ref, 1.01), kl(new, ref), rtol=1e-5, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e-9, -1e-9])
def test_gradients_have_the_same_limits(offset):
    new, ref = equal_and_unequal()
    expected = student_gradients(kl(new, ref), new)
    assert agree(
        student_gradients(renyi(new, ref, 1 + offset), new), expected, rtol=1e-5, atol=1e-7
    )
    assert agree(
        student_gradients(power(new, ref, 1 + offset), new), expected, rtol=1e-5, atol=1e-7
    )
    swapped = student_gradients(kl(ref, new), new)
    assert agree(student_gradients(power(new, ref, offset), new), swapped, rtol=1e-5, atol=1e-7)
    assert not agree(swapped, expected, rtol=1e-5, atol=1e-7)


@every_case
def test_zero_where_equal_and_positive_elsewhere(name, alpha):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2, 50, 4, generator=generator)
    std = torch.rand(2, 50, 1, generator=generator) * 0.2 + 0.9  # ratios within 0.81 and 1.23
    new, ref = (
        Gaussian(mean[0].requires_grad_(), std[0].requires_grad_()),
        Gaussian(mean[1], std[1]),
    )
    assert (divergence_map(name, new, ref, alpha) > 0).all()
    same_mean = divergence_map(name, Gaussian(ref.mean, new.std), ref, alpha)
    assert (same_mean > 0).all()
    at_home = divergence_map(name, new, Gaussian(*(part.detach() for part in new)), alpha)
    assert (at_home == 0).all()
    assert all((gradient.abs() < 1e-6).all() for gradient in student_gradients(at_home, new))


@pytest.mark.parametrize(
    ("name", "alpha", "curvature"),
    [
        ("kl", 0.5, 1 / 2),
        ("js", 0.5, 1 / 8),
        ("chi_square", 0.5, 1),
        ("renyi", 0.3, 0.3 / 2),
        ("power", 0.3, 1 / 2),
        ("power", 3.0, 1 / 2),
    ],
)
def test_tiny_gaps_keep_their_digits_in_float32(name, alpha, curvature):
    """Differences of logarithms would leave 1e-7 of noise where the divergence is 1e-7."""
    gap = torch.tensor([[1e-2, 1e-3, -1e-3, 1e-4]], requires_grad=True)
    std = torch.full((1, 1), 0.05)
    value = divergence_map(name, Gaussian(0.05 * gap, std), Gaussian(torch.zeros(1, 4), std), alpha)
    torch.testing.assert_close(value, curvature * gap**2, rtol=3e-3, atol=0)
    (gradient,) = torch.autograd.grad(value.sum(), gap)
    torch.testing.assert_close(gradient, 2 * curvature * gap, rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    ("std_ratio", "error"), [(1.0, 2e-4), (0.5, 1e-3), (2.0, 1e-3), (0.25, 2e-2), (4.0, 2e-2)]
)
def test_js_stays_within_its_stated_error_at_any_gap(std_ratio, error):
    mean = torch.linspace(0, 8, 33, dtype=torch.float64)[None] * min(1, std_ratio)
    one = torch.ones(1, 1, dtype=torch.float64)
    scale = 0.8 / max(1, std_ratio)  # so that the grid covers both
    new = Gaussian(scale * mean, scale * std_ratio * one)
    ref = Gaussian(torch.zeros_like(mean), scale * one)
    assert (js(new, ref) - by_grid("js", new, ref, 0.5)).abs().max() < error


def test_js_at_equal_stds_and_small_gaps_is_exact():
    one = torch.ones(1, 1, dtype=torch.float64)
    mean = torch.linspace(0, 1, 21, dtype=torch.float64)[None]
    new, ref = Gaussian(mean, one), Gaussian(torch.zeros_like(mean), one)
    assert (js(new, ref) - by_grid("js", new, ref, 0.5)).abs().max() < 1e-12


def test_js_is_symmetric_and_at_most_log_2():
    new, ref = pair([0.2, 1.0, 3.0], [0.5, 1.0, 0.1])
    torch.testing.assert_close(js(new, ref), js(ref, new), rtol=1e-12, atol=0)
    far = Gaussian(ref.mean + 1e6, ref.std)
    torch.testing.assert_close(js(far, ref), torch.full_like(ref.mean, math.log(2)))
    generator = torch.Generator().manual_seed(1)
    random = Gaussian(
        10 * torch.randn(200, 5, generator=generator), 5 * torch.rand(200, 1, generator=generator)
    )
    home = Gaussian(torch.zeros(200, 5), torch.ones(200, 1))
    assert js(random, home).max() <= math.log(2) + 1e-6  # float32's rounding of the weights
    assert js(random, home).max() > 0.69


def test_js_has_second_derivatives():
    new, ref = equal_and_unequal()

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return js(Gaussian(*tensors), ref)

    assert torch.autograd.gradcheck(function, tuple(new))
    assert torch.autograd.gradgradcheck(function, tuple(new))


@every_case
@pytest.mark.parametrize("gap", [3.0, 30.0, 1e4, 1e6])
def test_large_gaps_leave_values_and_gradients_finite(name, alpha, gap):
    std = torch.full((1, 1), 0.02)
    new = Gaussian(torch.tensor([[0.02 * gap, -0.02 * gap]], requires_grad=True), std)
    value = divergence_map(name, new, Gaussian(torch.zeros(1, 2), std), alpha)
    (gradient,) = torch.autograd.grad(value.sum(), new.mean)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    bounded = name == "js" or (name == "power" and 0 < alpha < 1)
    if not bounded or gap < 10:  # still pulled home, each element from its own side
        assert gradient[0, 0] > 0
        assert gradient[0, 1] < 0
    # negative control: the plain formula overflows
    if name == "chi_square" and gap > 10:
        assert torch.expm1((new.mean / std) ** 2).isinf().all()


def test_js_of_gaps_whose_square_overflows_is_log_2():
    one, mean = torch.ones(1, 1), torch.tensor([[1e25, -1e30]], requires_grad=True)
    value = js(Gaussian(mean, one), Gaussian(torch.zeros(1, 2), one))
    torch.testing.assert_close(value, torch.full((1, 2), math.log(2)))
    assert torch.autograd.grad(value.sum(), mean)[0].abs().max() < 1e-6


def test_chi_square_continues_without_a_jump_or_a_kink():
    edge = math.sqrt(MAX_EXPONENT)
    gap = torch.tensor([[edge - 1e-9, edge + 1e-9, edge + 1]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    new = Gaussian(gap.requires_grad_(), one)
    value = chi_square(new, Gaussian(torch.zeros_like(gap), one))
    (slope,) = torch.autograd.grad(value.sum(), new.mean)
    top = math.exp(MAX_EXPONENT)
    torch.testing.assert_close(value[0, :2], torch.full((2,), top - 1).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        slope[0, :2], torch.full((2,), 2 * edge * top).double(), rtol=1e-6, atol=0
    )
    beyond = top - 1 + top * ((edge + 1) ** 2 - MAX_EXPONENT)
    assert value[0, 2].item() == pytest.approx(beyond)
    assert value[0, 2].item() < math.exp((edge + 1) ** 2) / 10


@pytest.mark.parametrize(
    ("name", "alpha", "infinite"),
    [
        ("chi_square", 0.5, [False, True, False]),  # from a ratio of sqrt(2) = 1.414 on
        ("renyi", 3.0, [True, True, False]),  # from sqrt(3 / 2) = 1.225 on
        ("power", 3.0, [True, True, False]),
        ("power", -1.0, [False, False, True]),  # up to sqrt(1 / 2) = 0.707
        ("kl", 0.5, [False] * 3),
        ("js", 0.5, [False] * 3),
        ("renyi", 0.5, [False] * 3),
        ("power", 0.5, [False] * 3),
    ],
)
def test_stds_too_far_apart_are_infinite_in_their_own_row_only(name, alpha, infinite):
    ratios = [1.4, 1.5, 0.7]
    new, ref = pair(ratios, [1.0] * 3)
    value = divergence_map(name, new, ref, alpha)
    assert value.isinf().all(1).tolist() == value.isinf().any(1).tolist() == infinite
    mean_gradient, std_gradient = student_gradients(value, new)
    assert (mean_gradient == 0).all(1).tolist() == infinite
    assert (std_gradient == 0).flatten().tolist() == infinite
    for ratio, is_infinite in zip(ratios, infinite, strict=True):
        if is_infinite:
            with pytest.raises(InvalidArgumentError, match=f"std_ratio={ratio}: keep it"):
                check_divergence(name, alpha, ratio)
        else:
            check_divergence(name, alpha, ratio)


def test_on_the_edge_of_infinity_gradients_are_zero_and_not_nan():
    """At order 9/8 and three times the std, c is 0 exactly, and its logarithm has no gradient."""
    new, ref = pair([3.0, 2.9], [1.0, 1.0])
    value = renyi(new, ref, 1.125)
    assert value.isinf().tolist() == [[True] * 3, [False] * 3]
    for gradient in student_gradients(value, new):
        assert (gradient[0] == 0).all()
        assert (gradient[1] != 0).all()
        assert gradient.isfinite().all()


def test_kl_and_renyi_add_over_elements_and_chi_square_multiplies():
    """What the docstring says of sums, with the joint distributions of two elements."""
    new, ref = (Gaussian(mean[:, :2], std) for mean, std in equal_and_unequal())
    joint_new, joint_ref = (Independent(Normal(*gaussian), 1) for gaussian in (new, ref))
    torch.testing.assert_close(kl(new, ref).sum(1), kl_divergence(joint_new, joint_ref))

    x = torch.linspace(-9, 9, 301, dtype=torch.float64)
    points = torch.cartesian_prod(x, x)
    row = [Independent(Normal(mean[1], std[1]), 1).log_prob(points) for mean, std in (new, ref)]
    cell = (x[1] - x[0]) ** 2
    log_mixed = torch.log((0.3 * row[0] + 0.7 * row[1]).exp().sum() * cell)
    torch.testing.assert_close(renyi(new, ref, 0.3)[1].sum(), log_mixed / -0.7)
    joint = (2 * row[0] - row[1]).exp().sum() * cell - 1
    torch.testing.assert_close((1 + chi_square(new, ref)[1]).prod() - 1, joint)
    # negative control
    assert (chi_square(new, ref)[1].sum() - joint).abs() > 0.005


@every_case
def test_elements_and_rows_do_not_mix(name, alpha):
    generator = torch.Generator().manual_seed(2)
    mean = torch.randn(2, 3, 2, 4, 4, generator=generator)
    std = torch.rand(2, 3, 1, 1, 1, generator=generator) * 0.2 + 0.9
    new, ref = (Gaussian(*parts) for parts in zip(mean, std, strict=True))
    value = divergence_map(name, new, ref, alpha)
    assert value.shape == new.mean.shape
    for row in range(3):
        alone = [Gaussian(*(part[row : row + 1] for part in both)) for both in (new, ref)]
        torch.testing.assert_close(divergence_map(name, *alone, alpha), value[row : row + 1])
    # a std an element is broadcast too
    wide = Gaussian(new.mean, new.std.expand_as(new.mean).contiguous())
    torch.testing.assert_close(divergence_map(name, wide, ref, alpha), value)
    moved = new.mean.clone()
    moved[1, 0, 2, 3] += 1
    changed = divergence_map(name, Gaussian(moved, new.std), ref, alpha) != value
    assert changed.nonzero().tolist() == [[1, 0, 2, 3]]


def test_half_precision_is_computed_in_float32():
    new, ref = (Gaussian(*(part.detach().bfloat16() for part in g)) for g in equal_and_unequal())
    for name in DIVERGENCES:
        value = divergence_map(name, new, ref)
        assert value.dtype == torch.float32
        wide = [Gaussian(*(part.float() for part in both)) for both in (new, ref)]
        assert torch.equal(value, divergence_map(name, *wide))


def test_the_map_is_the_function_of_its_name():
    new, ref = equal_and_unequal()
    expected = [kl(new, ref), js(new, ref), chi_square(new, ref)]
    expected += [renyi(new, ref, 0.7), power(new, ref, 0.7)]
    for name, value in zip(DIVERGENCES, expected, strict=True):
        assert torch.equal(divergence_map(name, new, ref, 0.7), value)


@pytest.mark.parametrize(
    ("name", "alpha", "message"),
    [
        ("hellinger", 0.5, "name='hellinger': pass one of 'kl', 'js'"),
        ("renyi", 0.0, "alpha=0.0: pass an order above 0"),
        ("renyi", -1.0, "alpha=-1.0: pass a finite number of at least 0"),
        ("renyi", math.nan, "alpha=nan"),
        ("power", math.inf, "alpha=inf"),
        ("power", "two", "alpha='two'"),
        ("power", -101, "alpha=-101"),
    ],
)
def test_bad_names_and_orders_meet_a_typed_error(name, alpha, message):
    new, ref = equal_and_unequal()
    for call in (
        lambda: divergence_map(name, new, ref, alpha),
        lambda: check_divergence(name, alpha),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call()


def hold(coefficient: float, response, steps: int = 120) -> tuple[AdaptiveCoefficient, float]:
    """Drive a system whose divergence moves halfway to `response(coefficient)` at each step."""
    adaptive, measured = AdaptiveCoefficient(0.01, coefficient), response(coefficient)
    for _ in range(steps):
        measured += 0.5 * (response(adaptive.coefficient) - measured)
        adaptive.update(measured)
    return adaptive, measured


@pytest.mark.parametrize("start", [1e-5, 1.0, 1e5])
def test_the_coefficient_brings_a_system_to_its_target(start):
    adaptive, measured = hold(start, lambda coefficient: 0.3 / (0.1 + coefficient))
    assert 0.01 / 1.5 <= measured <= 0.01 * 1.5
    # negative control: where the penalty has the wrong sign, it does not
    adaptive, measured = hold(start, lambda coefficient: 0.02 * (1 + coefficient))
    assert measured > 0.015
    assert adaptive.coefficient == MAX_COEFFICIENT


def test_the_coefficient_by_hand_and_its_bounds():
    adaptive = AdaptiveCoefficient(0.1, 2.0)
    assert adaptive.update(0.1) == adaptive.update(0.149) == adaptive.update(0.067) == 2.0
    assert adaptive.update(0.151) == 3.0
    assert adaptive.update(0.0) == 2.0
    assert adaptive.update(math.nan) == adaptive.update(math.inf) == 2.0
    assert adaptive.update(torch.tensor(1.0)) == 3.0
    for measured, bound in ((1.0, MAX_COEFFICIENT), (0.0, MIN_COEFFICIENT)):
        for _ in range(100):
            adaptive.update(measured)
        assert adaptive.coefficient == bound


def test_the_state_pickles_and_goes_on():
    adaptive = AdaptiveCoefficient(0.1, 2.0)
    adaptive.update(1.0)
    restored = AdaptiveCoefficient(5.0)
    restored.state = pickle.loads(pickle.dumps(adaptive.state))
    assert restored.state == {"target": 0.1, "coefficient": 3.0}
    assert restored.update(1.0) == adaptive.update(1.0) == 4.5
    assert pickle.loads(pickle.dumps(adaptive)).state == adaptive.state


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1.0), "target=0.0: pass a divergence above 0"),
        ((-1.0, 1.0), "target=-1.0"),
        ((math.nan, 1.0), "target=nan"),
        ((0.1, 0.0), "coefficient=0.0"),
        ((0.1, 1e7), "coefficient=10000000.0"),
    ],
)
def test_bad_targets_and_coefficients_meet_a_typed_error(arguments, message):
    with pytest.raises(InvalidArgumentError, match=message):
        AdaptiveCoefficient(*arguments)
