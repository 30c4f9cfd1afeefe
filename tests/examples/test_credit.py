"""benchmarks/credit.py: what it measures where the answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from agents.benchmark import Sizes, make_task
from benchmarks import credit
from redif_env import Denoiser, schedules

TIMES = (874.0, 539.0, 297.0)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REDIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        return make_task("digits", Sizes(train=8, validation=8, test=8))


def args(**changes):
    options = {"times": TIMES, "num_tasks": 4, "num_draws": 64, "radii": (0, 1), **changes}
    return credit.Args(**options)


@pytest.mark.parametrize("order", [1, 2])
def test_the_last_steps_credit_is_the_gradient(task, order):
    given = args(solver_order=order)
    walk = credit.Walk(task, given)
    cosine, share = credit.measure(walk, 2, given)[0]
    assert cosine == pytest.approx(1, abs=1e-3)
    assert share == pytest.approx(1, abs=1e-3)  # opposite noise of one size: no noise is left
    # negative controls: neighbours bring noise, and earlier steps have effects elsewhere
    assert credit.measure(walk, 2, given)[1][1] < 0.5
    assert credit.measure(walk, 0, given)[0][0] < 0.95


class Alone(nn.Module):
    """Places that know nothing of each other."""

    def forward(self, x_t, t, condition=None):
        return 0.5 * x_t


@pytest.mark.parametrize("order", [1, 2])
def test_where_places_are_alone_all_steps_credit_is_the_gradient(task, order):
    """So the past that an action leaves behind is where it should be."""
    given = args(solver_order=order)
    walk = credit.Walk(task, given)
    schedule = walk.denoiser.schedule
    walk.denoiser = Denoiser(
        Alone(), schedule, "sample", (1, 8, 8), num_classes=10, solver_order=order
    )
    for step in range(3):
        cosine, share = credit.measure(walk, step, given)[0]
        assert (cosine, share) == (pytest.approx(1, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_in_the_weights_the_last_steps_credit_is_the_gradient(task):
    given = args(num_batches=6)
    found = credit.measure_in_weights(credit.Walk(task, given), 2, given)
    exact, length = found[None], found[0][0]
    assert exact[0] == pytest.approx(1, abs=1e-3)
    assert length == pytest.approx(
        1, abs=0.02
    )  # the difference of noise this small is no slope yet
    assert found[0][1] == pytest.approx(exact[1], rel=0.05)
    assert found[1][1] < exact[1] / 2  # negative control: neighbours bring noise


@pytest.mark.parametrize("order", [1, 2])
def test_the_steps_gradients_are_together_that_of_the_sampler(task, order):
    walk = credit.Walk(task, args(solver_order=order))
    weights = [*walk.denoiser.network.parameters()]
    tasks = walk.tasks
    x_0 = schedules.sample(walk.denoiser, tasks.x_T, tasks.condition, walk.grid)
    wanted = torch.autograd.grad(-(x_0 - tasks.teacher_x_0).square().sum(), weights)
    for step in range(3):
        state, _, gradient = credit._exact(walk, step)
        own, _ = walk.step(state, step)
        parts = torch.autograd.grad((own * gradient).sum(), weights)
        wanted = [left - part for left, part in zip(wanted, parts, strict=True)]
    scale = max(float(part.abs().max()) for part in parts)
    assert max(float(left.abs().max()) for left in wanted) < 1e-3 * scale


def test_it_walks_as_the_sampler_does(task):
    walk = credit.Walk(task, args())
    with torch.no_grad():
        end, _ = walk.starts()[-1]
        tasks = walk.tasks
        wanted = schedules.sample(walk.denoiser, tasks.x_T, tasks.condition, walk.grid)
    torch.testing.assert_close(end, wanted)
