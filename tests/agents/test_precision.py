"""bfloat16 in the student's network: in rollout and update alike, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from small_world import ITERATION, OnRolloutEnd, weights
from torch import nn

from agents import ReDiFPPO
from agents.ppo import RatioError
from redif_env.errors import InvalidArgumentError

HALF = {"precision": "bfloat16"}
# Little exploration, so that differences of the means would be seen.
FINE = {"eta": 0.0, "min_std": 0.005, "policy_kwargs": HALF}


def dtypes_inside(network):
    """Will hold what the network's convolutions compute in, and whether for a gradient."""
    seen = set()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(
                lambda _, args, output: seen.add((output.dtype, torch.is_grad_enabled()))
            )
    return seen


@pytest.mark.parametrize("options", [{}, {"divergence": "kl", "micro_batch_size": 3}], ids=str)
def test_the_ratio_is_one_before_the_first_update(make_model, options):
    model = make_model(**FINE, **options)
    inside = dtypes_inside(model.policy.denoiser.network)
    errors, check = [], model._check_ratio
    model._check_ratio = lambda error: (errors.append(float(error)), check(error))
    before = weights(model)
    model.learn(2 * ITERATION)
    assert inside == {(torch.bfloat16, False), (torch.bfloat16, True)}
    assert len(errors) == 2
    assert max(errors) < 1e-2
    assert not torch.equal(weights(model), before)


def test_all_that_is_kept_is_float32(make_model):
    model = make_model(**FINE)
    model.learn(ITERATION)
    policy = model.policy
    trained = list(policy.denoiser.network.parameters())
    assert {w.dtype for w in trained} == {w.grad.dtype for w in trained} == {torch.float32}
    assert {s["exp_avg"].dtype for s in policy.optimizer.state.values()} == {torch.float32}
    kept = ("mean", "std", "actions", "advantages", "observation/latents")
    assert {model.rollout_buffer[name].dtype for name in kept} == {torch.float32}


def test_what_is_deployed_computes_in_float32(make_model, bank):
    model = make_model(**FINE)
    inside = dtypes_inside(model.policy.ema_denoiser.network)
    model.policy.sample(bank.x_T[:4], bank.condition[:4])
    assert inside == {(torch.float32, False)}
    assert model.student().autocast is None


def test_float32_in_the_update_is_noticed(make_model):
    """Negative control: the check would see it if rollout and update differed in precision."""
    model = make_model(**FINE)

    def switch_off(agent):
        agent.policy.denoiser.autocast = None

    with pytest.raises(RatioError, match="autocast"):
        model.learn(ITERATION, callback=OnRolloutEnd(switch_off))


def test_gradients_point_where_those_of_float32_do(make_model):
    """bfloat16 has 8 bits: 0.4 % a rounding, which mostly cancels in a gradient."""
    model = make_model(batch_size=ITERATION, stochastic_steps="all", learning_rate=0.0)
    model.learn(ITERATION)
    batch = next(model.rollout_buffer.get(ITERATION))

    def gradient(dtype):
        model.policy.denoiser.autocast = dtype
        model._add_gradients(batch, 10.0, None)
        return torch.cat([w.grad.flatten() for w in model.policy.denoiser.network.parameters()])

    plain, half = gradient(None), gradient(torch.bfloat16)
    assert torch.equal(plain, gradient(None))
    assert torch.nn.functional.cosine_similarity(plain, half, dim=0) > 0.95
    assert not torch.equal(plain, half)


def test_the_precision_is_saved(make_model, tmp_path):
    model = make_model(**FINE)
    model.save(tmp_path / "agent")
    assert ReDiFPPO.load(tmp_path / "agent").policy.denoiser.autocast == torch.bfloat16
    assert make_model().policy.denoiser.autocast is None


def test_float16_is_refused(make_model):
    """It would need a scaled loss."""
    with pytest.raises(InvalidArgumentError, match="bfloat16") as caught:
        make_model(policy_kwargs={"precision": "float16"})
    assert caught.value.argument == "precision"
