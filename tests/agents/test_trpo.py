"""BatchedTRPO makes TRPO's updates, on policies where TRPO fails."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sb3_contrib import TRPO
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from agents import BatchedTRPO, LatentFeatures, TorchVecEnv, make_sb3_env
from agents.distributions import KernelDistribution
from agents.divergences import divergence_map
from agents.policies import StudentPolicy
from redif_env import ReDiFVectorEnv

GRID = (850.0, 300.0)
OPTIONS = {"n_steps": 4, "batch_size": 16, "gamma": 1.0, "seed": 0, "n_critic_updates": 2}


@pytest.fixture
def residual(teacher, bank):
    def build():
        return make_sb3_env(8, "residual", teacher=teacher, bank=bank, num_steps=2, seed=0)

    return build


def stock_policy(**changes):
    return {"features_extractor_class": LatentFeatures, "net_arch": [8], **changes}


def trained(kind, env):
    model = kind("MultiInputPolicy", env, policy_kwargs=stock_policy(), target_kl=0.05, **OPTIONS)
    before = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
    model.learn(96)
    after = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()
    assert (after - before).abs().max() > 1e-3
    return after


def test_updates_are_those_of_trpo(residual):
    """Three iterations with line search and critic; float32 sums in another order."""
    wanted = trained(TRPO, residual())
    torch.testing.assert_close(trained(BatchedTRPO, residual()), wanted, rtol=1e-3, atol=1e-5)


def test_it_goes_backwards_twice_whatever_the_depth(residual, monkeypatch):
    calls = []
    grad = torch.autograd.grad

    def counted(*args, **kwargs):
        calls.append(args)
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    counts = []
    for kind in (BatchedTRPO, TRPO):
        model = kind("MultiInputPolicy", residual(), policy_kwargs=stock_policy(), **OPTIONS)
        obs = model.policy.obs_to_tensor(model.env.reset())[0]
        distribution = model.policy.get_distribution(obs)
        mean = distribution.distribution.mean
        calls.clear()
        model._compute_actor_grad(mean.square().sum(), mean.sum())
        counts.append(len(calls))
    assert counts[0] == 2
    assert counts[1] >= 8  # negative control: two for each tensor of the actor


def student(kind, teacher, bank, **changes):
    env = TorchVecEnv(ReDiFVectorEnv(8, teacher, schedule=GRID, bank=bank, seed=0))
    policy_kwargs = {"timesteps": GRID, "critic": True, "eta": 0.1, "min_std": 0.05}
    options = {**OPTIONS, "n_steps": 2, "cg_max_steps": 5, "target_kl": 0.5, **changes}
    return kind(StudentPolicy, env, policy_kwargs=policy_kwargs, **options)


def test_it_trains_a_student(teacher, bank):
    model = student(BatchedTRPO, teacher, bank)
    frozen = model.policy.ema_denoiser.network
    kept = [p.clone() for p in frozen.parameters()]
    start = [p.clone() for p in model.policy.denoiser.network.parameters()]
    model.learn(16)
    after = list(model.policy.denoiser.network.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, frozen.parameters(), strict=True))
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] < 0.5


def test_trpo_fails_on_frozen_weights(residual):
    """Upstream, see docs/upstream.md: when this fails, a workaround can go."""
    model = TRPO("MultiInputPolicy", residual(), policy_kwargs=stock_policy(), **OPTIONS)
    next(model.policy.parameters()).requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not require grad"):
        model.learn(32)


class Attention(BaseFeaturesExtractor):
    """Attention between the rows of an image."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 64)
        self.embed = nn.Linear(8, 24)

    def forward(self, observations):
        q, k, v = self.embed(observations["latents"]).chunk(3, -1)  # (N, 1, 8, 8)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


@pytest.mark.parametrize("kind", [BatchedTRPO, TRPO])
def test_attention_can_be_differentiated_twice(residual, kind):
    policy = stock_policy(features_extractor_class=Attention)
    model = kind("MultiInputPolicy", residual(), policy_kwargs=policy, **OPTIONS)
    if kind is TRPO:  # upstream: no second derivative of the kernel that torch prefers on the CPU
        with pytest.raises(RuntimeError, match=r"derivative for .*attention"):
            model.learn(32)
    else:
        model.learn(32)
        assert np.isfinite(model.logger.name_to_value["train/policy_objective"])


def test_the_torch_distribution_is_the_kernels(teacher, bank):
    """Density and KL agree with our own formulas, which sum over elements."""
    schedule, x_t = teacher.denoiser.schedule, bank.x_T[:4]
    t, s = torch.full((4,), 850.0), torch.tensor([300.0, 400.0, 500.0, 0.0])

    def at(x0_pred):
        return KernelDistribution(schedule, 0.3, 0.05, "ode").proba_distribution(x_t, x0_pred, t, s)

    old, new = at(bank.teacher_x_0[:4]), at(bank.teacher_x_0[:4] + 0.01)
    actions = old.sample()
    torch.testing.assert_close(new.distribution.log_prob(actions), new.log_prob(actions))
    wanted = divergence_map("kl", old.gaussian, new.gaussian).flatten(1).sum(1)
    got = torch.distributions.kl_divergence(old.distribution, new.distribution)
    torch.testing.assert_close(got, wanted)
    assert got.min() > 0
