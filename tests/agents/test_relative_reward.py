"""make_sb3_env(relative=True): gains over the frozen student reach Stable-Baselines3."""

from __future__ import annotations

import numpy as np
import pytest
from sb3_contrib import MaskablePPO

from agents import make_sb3_env
from redif_env import baseline_returns
from redif_env.errors import InvalidArgumentError


@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_gains_reach_rewards_and_statistics(teacher, bank, observation):
    options = {"teacher": teacher, "bank": bank, "num_steps": 1, "seed": 0}
    rewards = {}
    for relative in (False, True):
        env = make_sb3_env(32, "residual", observation, relative=relative, **options)
        env.set_options({"tasks": np.arange(32)})
        env.reset()
        _, rewards[relative], dones, infos = env.step(np.full((32, 64), 0.5, np.float32))
        assert dones.all()
        noted = [info["episode"]["r"] for info in infos]
        np.testing.assert_allclose(noted, rewards[relative], rtol=1e-6)
    difference = rewards[False] - rewards[True]
    np.testing.assert_allclose(difference, baseline_returns(env.env).numpy(), atol=1e-6)
    assert np.abs(difference).min() > 1e-3


def test_masks_still_reach_sb3_contrib(teacher, bank):
    env = make_sb3_env(4, "schedule", relative=True, teacher=teacher, bank=bank, seed=0)
    model = MaskablePPO("MultiInputPolicy", env, n_steps=8, batch_size=16, seed=0)
    model.learn(64)
    assert {info["r"] > -5 for info in model.ep_info_buffer} == {True}


def test_the_joint_variant_has_no_student(teacher, bank):
    with pytest.raises(InvalidArgumentError, match="residual=True"):
        make_sb3_env(4, "joint", relative=True, teacher=teacher, bank=bank)
