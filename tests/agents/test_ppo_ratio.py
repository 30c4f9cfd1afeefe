"""Before the first update of an iteration the ratio is 1, or there is an error."""

from __future__ import annotations

import pytest
import torch
from small_world import ITERATION, OnRolloutEnd, weights

from agents.ppo import RatioError
from redif_env.loading import describe


def scale_weights(model) -> None:
    for weight in model.policy.denoiser.network.parameters():
        weight.data.mul_(1.1)


def change_guidance(model) -> None:
    model.policy.denoiser.guidance_scale = 3.0


def activate_dropout(model) -> None:
    model.policy.denoiser.network.train()


@pytest.mark.parametrize("ratio", ["element", "sum", "mean"])
@pytest.mark.parametrize("meddle", [scale_weights, change_guidance, activate_dropout])
def test_a_policy_that_changed_before_the_update_is_refused(make_model, teacher, meddle, ratio):
    student = describe(teacher.denoiser, teacher.make_solver())
    student["network"]["dropout"] = 0.5
    model = make_model(credit="global", policy_kwargs={"student": student}, ratio=ratio)
    model.policy.load_student(teacher.denoiser.network.state_dict())
    model.learn(2 * ITERATION)  # without meddling there is no error
    before = weights(model)
    with pytest.raises(RatioError, match="before the first update"):
        model.learn(ITERATION, callback=OnRolloutEnd(meddle))
    if meddle is not scale_weights:
        assert torch.equal(weights(model), before)  # and nothing was updated


def test_another_dtype_in_the_update_is_refused(make_model):
    context, model = torch.autocast("cpu", dtype=torch.bfloat16), make_model()
    try:
        with pytest.raises(RatioError, match="autocast"):
            model.learn(ITERATION, callback=OnRolloutEnd(lambda _: context.__enter__()))
    finally:
        context.__exit__(None, None, None)
    model.learn(ITERATION)


def test_the_error_is_measured_an_element_whatever_is_clipped(make_model):
    """A sum would magnify rounding by the size of the latent, a mean hide a real difference."""
    messages = set()
    for ratio in ("element", "sum", "mean"):
        model = make_model(credit="global", ratio=ratio)
        with pytest.raises(RatioError) as caught:
            model.learn(ITERATION, callback=OnRolloutEnd(scale_weights))
        messages.add(str(caught.value))
    assert len(messages) == 1
