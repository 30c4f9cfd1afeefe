r"""Divergences of the student's step from a frozen reference's, with gradients.

Both are factorised Gaussians, and every function here returns one divergence *per element*: that of
the element's own one-dimensional Gaussian p = `new` from q = `ref`. A coefficient, or a target,
that is chosen for their mean is therefore the same for 64 and for 65,536 elements.

What a sum over elements would mean differs. KL and Renyi divergences of independent elements add,
so the sum is the joint divergence. Chi-square and power do not: :math:`1 + \chi^2` multiplies, and
so does :math:`1 + \alpha(\alpha-1) \mathrm{Power}`. The Jensen-Shannon divergence neither adds nor
multiplies, and a joint one saturates at log 2. For those three, read the mean as the average of
one-dimensional divergences, and not as the joint divergence over the number of elements.

All but Jensen-Shannon follow from one Gaussian integral. With the gap
:math:`g = (\mu_{new} - \mu_{ref}) / \mathrm{std}_{ref}`, the ratio
:math:`r = \mathrm{std}_{new} / \mathrm{std}_{ref}` and :math:`c = \alpha + (1-\alpha) r^2`,

.. math:: \log \int p^\alpha q^{1-\alpha} = \alpha (\alpha - 1) \Big[ \frac{g^2}{2c}
    + \frac{1}{2\alpha} \Big( \frac{\log c}{1-\alpha} - 2 \log r \Big) \Big]

where c > 0; else the integral is infinite (Gil, Alajaji and Linder 2013, univariate Gaussians).
At r = 1 the bracket is :math:`g^2 / 2` for every alpha.

Standard deviations must be positive: a deterministic step has no density.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redif_env.errors import InvalidArgumentError, check_choice, check_number
from redif_env.transition import Gaussian

DIVERGENCES = ("kl", "js", "chi_square", "renyi", "power")

# Beyond exp of this, chi-square and power go on along their tangent. It keeps squared gradients,
# summed over an action's elements, inside float32.
MAX_EXPONENT = 20.0
MAX_ALPHA = 100.0

MIN_COEFFICIENT, MAX_COEFFICIENT = 1e-6, 1e6

# Nearer to a removable singularity than this, the limit is exact to float64's rounding.
_TINY = 1e-12
# A log-ratio beyond this adds nothing to the Jensen-Shannon divergence, even in float64.
_CERTAIN = 100.0
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)
_QUADRATURE = list(zip(_NODES.tolist(), (_WEIGHTS / _WEIGHTS.sum()).tolist(), strict=True))


def divergence_map(name: str, new: Gaussian, ref: Gaussian, alpha: float = 0.5) -> Tensor:
    """The divergence of each element of `new` from the same element of `ref`.

    It is taken from `new` to `ref`, D(new || ref), with gradients to whatever of the two requires
    them: compute `ref` under `no_grad`. Its mean is the penalty; the module's docstring says what
    its sum would be.

    Args:
        name: One of `DIVERGENCES`.
        new: The student's step, mean `(N, ...)`, std broadcastable over it and positive.
        ref: The frozen reference's step, likewise.
        alpha: Order of `"renyi"` and `"power"`, see there; the others ignore it. At the default of
            one half both are symmetric, and finite for any two Gaussians.

    Returns:
        `(N, ...)` like the mean; float32, or float64 where the means are. `"chi_square"`, and
        `"renyi"` and `"power"` with alpha outside [0, 1], are infinite, with a gradient of zero,
        where the stds differ too much; see `check_divergence`.

    Raises:
        InvalidArgumentError: `name` or `alpha` is out of range.
    """
    check_choice("name", name, DIVERGENCES)
    if name == "kl":
        return kl(new, ref)
    if name == "js":
        return js(new, ref)
    if name == "chi_square":
        return chi_square(new, ref)
    return renyi(new, ref, alpha) if name == "renyi" else power(new, ref, alpha)


def check_divergence(name: str, alpha: float = 0.5, std_ratio: float = 1.0) -> None:
    r"""Raise `InvalidArgumentError` where a divergence is unknown, or certain to be infinite.

    For use at construction. The order must satisfy :math:`\alpha + (1 - \alpha) r^2 > 0`, which
    holds for any std where alpha is in [0, 1], and for any alpha where the stds are equal.
    Chi-square has order 2: it is infinite from :math:`r = \sqrt 2` on.

    Args:
        name: One of `DIVERGENCES`.
        alpha: Order of `"renyi"` (above 0) and `"power"` (any).
        std_ratio: r, the student's std over the reference's, where it is known beforehand: the
            largest that can occur for orders above 1, the smallest for those below 0.
    """
    check_choice("name", name, DIVERGENCES)
    std_ratio = check_number("std_ratio", std_ratio)
    order = {"kl": 1.0, "js": 1.0, "chi_square": 2.0}.get(name)
    if order is None:
        order = _renyi_order(alpha) if name == "renyi" else _power_order(alpha)
    if order + (1 - order) * std_ratio**2 <= 0:
        bound = math.sqrt(order / (order - 1))
        raise InvalidArgumentError(
            "std_ratio",
            std_ratio,
            f"keep it {'below' if order > 1 else 'above'} {bound:.4g}, where the {name} divergence"
            f" of order {order:g} becomes infinite, or choose an alpha in (0, 1], or 'kl' or 'js'.",
        )


def kl(new: Gaussian, ref: Gaussian) -> Tensor:
    r"""Kullback-Leibler divergence of each element, `(N, ...)` (Kullback and Leibler 1951).

    .. math:: \int p \log \frac{p}{q} = \tfrac12 \big( g^2 + r^2 - 1 - \log r^2 \big)

    The order-1 limit of `renyi` and `power`. At equal stds it is :math:`g^2 / 2`.

    Args:
        new, ref: as for `divergence_map`.
    """
    return _scaled_log_integral(*_standardised(new, ref), 1.0)


def renyi(new: Gaussian, ref: Gaussian, alpha: float) -> Tensor:
    r"""Renyi divergence of each element, `(N, ...)` (Renyi 1961; van Erven and Harremoes 2014).

    .. math:: \frac{1}{\alpha - 1} \log \int p^\alpha q^{1-\alpha}
        = \frac{\alpha g^2}{2c} + \frac{\log c}{2 (1 - \alpha)} - \log r

    At equal stds it is :math:`\alpha g^2 / 2`. Where :math:`c \le 0`, that is alpha above 1 and
    :math:`r^2 \ge \alpha / (\alpha - 1)`, it is infinite, with a gradient of zero.

    Args:
        new, ref: as for `divergence_map`.
        alpha: Order, in (0, 100]; 1 is `kl`, 1/2 is twice the Bhattacharyya distance.
    """
    order = _renyi_order(alpha)
    return order * _scaled_log_integral(*_standardised(new, ref), order)


def power(new: Gaussian, ref: Gaussian, alpha: float) -> Tensor:
    r"""Power divergence of each element, `(N, ...)` (Cressie and Read 1984, lambda = alpha - 1).

    .. math:: \frac{1}{\alpha (\alpha - 1)} \Big( \int p^\alpha q^{1-\alpha} - 1 \Big)

    At alpha = 1 it is `kl(new, ref)`, at 0 `kl(ref, new)`, at 2 half of `chi_square`, at 1/2 four
    times the squared Hellinger distance :math:`1 - \int \sqrt{p q}`. In (0, 1) it is bounded by
    :math:`1 / (\alpha (1 - \alpha))`, and its gradient fades beyond gaps of a few stds. Outside
    [0, 1] it is infinite, with a gradient of zero, where :math:`c \le 0`; elsewhere exponents above
    `MAX_EXPONENT` continue along the tangent.

    Args:
        new, ref: as for `divergence_map`.
        alpha: Order, in [-100, 100].
    """
    order = _power_order(alpha)
    scaled = _scaled_log_integral(*_standardised(new, ref), order)
    factor = order * (order - 1)
    return scaled if abs(factor) < _TINY else _expm1(factor * scaled) / factor


def chi_square(new: Gaussian, ref: Gaussian) -> Tensor:
    r"""Pearson's chi-square divergence of each element, `(N, ...)`.

    .. math:: \int \frac{(p - q)^2}{q} = \int \frac{p^2}{q} - 1

    At equal stds it is :math:`e^{g^2} - 1`. From :math:`r = \sqrt 2` on it is infinite, with a
    gradient of zero. Exponents above `MAX_EXPONENT` (at equal stds, a gap of 4.5 stds) continue
    along the tangent, so that a far element is still pulled back by a finite gradient.

    Args:
        new, ref: as for `divergence_map`.
    """
    return _expm1(2 * _scaled_log_integral(*_standardised(new, ref), 2.0))


def js(new: Gaussian, ref: Gaussian) -> Tensor:
    r"""Jensen-Shannon divergence of each element, `(N, ...)`, in nats (Lin 1991, equal weights).

    With :math:`m = (p + q) / 2`, :math:`y = \tfrac12 \log (p / q)` and
    :math:`h(y) = y \tanh y - \log \cosh y`, which is not negative,

    .. math:: \tfrac12 \int p \log \frac{p}{m} + \tfrac12 \int q \log \frac{q}{m}
        = \tfrac12 E_p[h(y)] + \tfrac12 E_q[h(y)]

    There is no closed form: each expectation is a Gauss-Hermite sum of 32 nodes, and the gradient
    is that sum's own. For gaps below one std and equal stds the sum is exact to 1e-12; its error
    stays below 2e-4 at any gap for equal stds, 1e-3 for stds within a factor of 2, and 2e-2
    within a factor of 4. Nearby Gaussians have :math:`g^2 / 8`; far ones have log 2, with a
    gradient that fades.

    Args:
        new, ref: as for `divergence_map`.
    """
    gap, ratio = torch.broadcast_tensors(*_standardised(new, ref))
    of_new = _ExpectedInformation.apply(gap, ratio)
    of_ref = _ExpectedInformation.apply(gap / ratio, 1 / ratio)
    return (of_new + of_ref) / 2


class AdaptiveCoefficient:
    """A penalty's coefficient that holds its divergence near a target.

    After each update the coefficient grows by `FACTOR` where the measured divergence exceeds
    `FACTOR` times the target, and shrinks by it below the target over `FACTOR` (Schulman et al.
    2017, section 4, who double and halve). A measurement that is not finite changes nothing.

    Args:
        target: Divergence to hold, mean per element, above 0.
        coefficient: Where to start, in [1e-6, 1e6], which it never leaves.

    Attributes:
        target: As given.
        coefficient: What to multiply the penalty by.
    """

    FACTOR = 1.5

    def __init__(self, target: float, coefficient: float = 1.0) -> None:
        self.state = {"target": target, "coefficient": coefficient}

    @property
    def state(self) -> dict[str, float]:
        """Plain numbers that pickle; assign them to another instance to go on where this one is."""
        return {"target": self.target, "coefficient": self.coefficient}

    @state.setter
    def state(self, state: dict[str, float]) -> None:
        target = check_number("target", state["target"])
        if target == 0:
            raise InvalidArgumentError("target", target, "pass a divergence above 0.")
        self.coefficient = check_number(
            "coefficient", state["coefficient"], MIN_COEFFICIENT, MAX_COEFFICIENT
        )
        self.target = target

    def update(self, measured: float) -> float:
        """Account for a measured divergence, mean per element; return the new coefficient."""
        if math.isfinite(measured):
            if measured > self.target * self.FACTOR:
                self.coefficient *= self.FACTOR
            elif measured < self.target / self.FACTOR:
                self.coefficient /= self.FACTOR
        self.coefficient = min(max(self.coefficient, MIN_COEFFICIENT), MAX_COEFFICIENT)
        return self.coefficient


def adapting(
    before: AdaptiveCoefficient | None, target: float | None, coefficient: float = 1.0
) -> AdaptiveCoefficient | None:
    """`before` where it has this target, else a new one; None without a target."""
    if target is None:
        return None
    if before is not None and before.target == target:
        return before
    return AdaptiveCoefficient(target, coefficient)


def _standardised(new: Gaussian, ref: Gaussian) -> tuple[Tensor, Tensor]:
    """The gap in units of `ref`'s std, and the ratio of stds, in float32 at least."""
    dtype = torch.promote_types(new.mean.dtype, torch.float32)
    ref_std = ref.std.to(dtype)
    return (new.mean.to(dtype) - ref.mean.to(dtype)) / ref_std, new.std.to(dtype) / ref_std


def _scaled_log_integral(gap: Tensor, ratio: Tensor, alpha: float) -> Tensor:
    """The bracket of the module's docstring: log of the integral over alpha (alpha - 1).

    It has limits, both KL divergences, at alpha = 1 and 0. The latter is the former with the
    Gaussians swapped, which is how every alpha below 1/2 is computed.
    """
    if alpha < 0.5:
        return _scaled_log_integral(gap / ratio, 1 / ratio, 1 - alpha)
    excess = (ratio - 1) * (ratio + 1)
    c_minus_1 = (1 - alpha) * excess
    finite = c_minus_1 > -1
    c_minus_1 = torch.where(finite, c_minus_1, 0.0)  # before the log, whose gradient would be NaN
    log_c = excess if abs(1 - alpha) < _TINY else torch.log1p(c_minus_1) / (1 - alpha)
    scaled = gap**2 / (2 * (1 + c_minus_1)) + (log_c - 2 * ratio.log()) / (2 * alpha)
    return torch.where(finite, scaled, math.inf)


def _expm1(exponent: Tensor) -> Tensor:
    """exp(x) - 1, continued along its tangent from `MAX_EXPONENT` on."""
    tangent = math.exp(MAX_EXPONENT) * (exponent - MAX_EXPONENT).relu()
    return torch.expm1(exponent.clamp_max(MAX_EXPONENT)) + tangent


class _ExpectedInformation(torch.autograd.Function):
    r"""E[h(y)] for x drawn from the Gaussian of mean `gap` and std `ratio`, against N(0, 1).

    y is half of the log-ratio l of the two densities at x. With :math:`x = g + r z`,
    :math:`l = \tfrac12 (g + (r-1) z)(g + (r+1) z) - \log r` and
    :math:`dh/dl = l \sigma(l) \sigma(-l)`. The derivatives are summed node by node as the value is:
    autograd would keep several tensors for each of the nodes.
    """

    @staticmethod
    def forward(ctx: Any, gap: Tensor, ratio: Tensor) -> Tensor:
        ctx.save_for_backward(gap, ratio)
        value = torch.zeros_like(gap)
        for z, weight in _QUADRATURE:
            value += weight * _information(_log_ratio(gap, ratio, z))
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gap, ratio = ctx.saved_tensors
        by_gap, by_ratio = torch.zeros_like(gap), torch.zeros_like(gap)
        for z, weight in _QUADRATURE:
            log_ratio = _log_ratio(gap, ratio, z)
            slope = weight * log_ratio * log_ratio.sigmoid() * (-log_ratio).sigmoid()
            by_gap += slope * (gap + ratio * z)
            by_ratio += slope * (z * (gap + ratio * z) - 1 / ratio)
        return grad * by_gap, grad * by_ratio


def _log_ratio(gap: Tensor, ratio: Tensor, z: float) -> Tensor:
    """Log-ratio l at a node, as a product, which keeps the digits of a small gap."""
    log_ratio = (gap + (ratio - 1) * z) * (gap + (ratio + 1) * z) / 2 - ratio.log()
    return log_ratio.clamp(-_CERTAIN, _CERTAIN)


def _information(log_ratio: Tensor) -> Tensor:
    """The h of `js` from the log-ratio's size, which keeps the digits of a small one."""
    size = log_ratio.abs()
    return -torch.log1p(torch.expm1(-size) / 2) - size * (-size).sigmoid()


def _renyi_order(alpha: float) -> float:
    order = check_number("alpha", alpha, 0.0, MAX_ALPHA)
    if order == 0:
        raise InvalidArgumentError(
            "alpha", alpha, "pass an order above 0: at 0 any two Gaussians have divergence 0."
        )
    return order


def _power_order(alpha: float) -> float:
    return check_number("alpha", alpha, -MAX_ALPHA, MAX_ALPHA)
