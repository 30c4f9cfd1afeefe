"""LatentFeatures: every part of the observation counts, size does not; TimeFeatures: only times."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from sb3_contrib import TRPO
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.preprocessing import preprocess_obs

from agents import LatentFeatures, TimeFeatures, make_sb3_env
from redif_env.errors import InvalidArgumentError

SHAPES = [(1, 8, 8), (3, 16, 16), (2, 20, 9), (1, 9, 9), (5,)]


def space(shape, classes=4, past=False):
    parts = {
        "latents": spaces.Box(-np.inf, np.inf, shape, np.float32),
        "timestep": spaces.Box(0, 1, (1,), np.float32),
        "steps_left": spaces.Box(0, 1, (1,), np.float32),
    }
    if past:
        parts["past_prediction"] = parts["latents"]
    if classes:
        parts["condition"] = spaces.Discrete(classes)
    return spaces.Dict(parts)


def observe(seen, num=3):
    """What a policy hands to its extractor: N random observations, classes one-hot."""
    seen.seed(0)
    rows = [seen.sample() for _ in range(num)]
    stacked = {name: torch.as_tensor(np.stack([row[name] for row in rows])) for name in seen}
    return preprocess_obs(stacked, seen)


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_part_counts_and_rows_do_not_mix(shape, classes, past):
    torch.manual_seed(0)
    seen = space(shape, classes, past)
    extractor = LatentFeatures(seen, 16)
    before = observe(seen)
    features = extractor(before)
    assert (features.shape, extractor.features_dim) == ((3, 16), 16)
    for name in seen:
        changed = {key: value.clone() for key, value in before.items()}
        changed[name][1] = changed[name][1].roll(1) if name == "condition" else 0.5
        difference = (extractor(changed) - features).abs().amax(1)
        assert difference[1] > 1e-4, name
        assert difference[[0, 2]].max() < 1e-6


def test_neighbouring_times_are_told_apart():
    """Between t and t + 1/16, where raw numbers move by 0.0625, the fastest wave turns round."""
    seen = space((1, 8, 8))
    extractor = LatentFeatures(seen, 16)
    heard = []
    extractor.mix[0].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    for t in (0.5, 0.5625):
        extractor({**observe(seen, 1), "timestep": torch.tensor([[t]])})
    moved = (heard[1] - heard[0]).abs().squeeze(0)
    assert int((moved > 0).sum()) <= 16
    assert moved.max() > 1.4


def test_weights_do_not_grow_with_the_area():
    def count(side):
        return sum(p.numel() for p in LatentFeatures(space((4, side, side)), 256).parameters())

    assert count(64) < 1.1 * count(16)
    assert count(64) < 0.25 * 256 * 4 * 64 * 64  # of a flattened image's first layer


def test_only_what_is_too_large_is_convolved():
    assert len(LatentFeatures(space((1, 8, 8))).image) == 0
    assert len(LatentFeatures(space((1, 9, 8))).image) == 2
    assert len(LatentFeatures(space((1, 64, 64))).image) == 6


def test_it_can_be_differentiated_twice():
    """As TRPO does, on images large enough for convolutions."""
    seen = space((1, 16, 16))
    extractor = LatentFeatures(seen, 4)
    weights = list(extractor.parameters())
    grads = torch.autograd.grad(extractor(observe(seen)).sum(), weights, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), weights)
    assert all(bool(g.isfinite().all()) for g in again)


@pytest.mark.parametrize("kind", [PPO, TRPO, SAC])
def test_policies_take_it(teacher, bank, kind, tmp_path):
    env = make_sb3_env(4, "residual", teacher=teacher, bank=bank, seed=0)
    options = {"learning_starts": 4, "buffer_size": 64} if kind is SAC else {"n_steps": 4}
    policy_kwargs = {"features_extractor_class": LatentFeatures, "net_arch": [8]}
    model = kind("MultiInputPolicy", env, batch_size=4, policy_kwargs=policy_kwargs, **options)
    model.learn(16)
    model.save(tmp_path / "model")
    observation = env.reset()
    actions, _ = model.predict(observation, deterministic=True)
    again, _ = kind.load(tmp_path / "model").predict(observation, deterministic=True)
    np.testing.assert_array_equal(actions, again)


@pytest.mark.parametrize("seen", [spaces.Box(0, 1, (3,)), spaces.Dict(x=spaces.Box(0, 1, (3,)))])
def test_other_observations_are_refused(seen):
    with pytest.raises(InvalidArgumentError, match=r"observation_space=.*pass a Dict with latents"):
        LatentFeatures(seen)


def test_no_features_are_refused():
    with pytest.raises(InvalidArgumentError, match="features_dim=0"):
        LatentFeatures(space((5,)), 0)


# TimeFeatures


def test_only_times_are_seen(teacher, bank):
    """Flat observations against the dict's times; nothing else moves a feature."""
    options = {"teacher": teacher, "bank": bank, "max_steps": 4, "seed": 0}
    envs = [make_sb3_env(3, "schedule", seen, **options) for seen in ("flat", "dict")]
    for env in envs:
        env.reset()
    extractor = TimeFeatures(envs[0].observation_space)
    choices = np.array([1, 3, 5])
    flat, seen = (env.step(choices)[0] for env in envs)
    features = extractor(torch.as_tensor(flat))
    assert features.shape == (3, extractor.features_dim) == (3, 32)
    k = np.arange(1, 17)
    wanted = [np.cos(np.pi * k * seen[name]) for name in ("steps_left", "timestep")]
    np.testing.assert_allclose(features, np.concatenate(wanted, axis=1), atol=1e-5)
    assert features.unique(dim=0).shape[0] == 3
    flat[:, :-2] += 1
    assert torch.equal(extractor(torch.as_tensor(flat)), features)


@pytest.mark.parametrize("seen", [space((5,)), spaces.Box(0, 1, (1, 8, 8)), spaces.Box(0, 1, (1,))])
def test_observations_that_are_not_flat_are_refused(seen):
    with pytest.raises(InvalidArgumentError, match=r"observation_space=.*pass a flat Box"):
        TimeFeatures(seen)
