"""A run that was saved and loaded goes on bit by bit as one that was not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_world import ITERATION, weights
from torch import nn

from agents import ReDiFPPO
from agents.online import UpdateReward
from redif_env import MSE
from redif_env.errors import InvalidArgumentError
from redif_env.rewards import Discriminator, EnergyDistance, OnlineReward

SHAPE = (1, 8, 8)
REWARDS = {
    "none": MSE,
    "discriminator": lambda seed=0: MSE() + 0.5 * Discriminator(SHAPE, 10, batch_size=8, seed=seed),
    "memory": lambda: MSE() + 0.5 * EnergyDistance(memory=24),
    "both, twice": lambda: (
        Discriminator(SHAPE, batch_size=8, seed=1)
        + MSE()
        + EnergyDistance(memory=24)
        + Discriminator(SHAPE, batch_size=8, seed=2)
    ),
}
# Several minibatches and epochs, and exploration that follows the gap: all that has a state.
OPTIONS = {"n_epochs": 2, "gap_fraction": 0.5, "learning_rate": 1e-3}


def go_on(model, env) -> torch.Tensor:
    """Train for two iterations, as any process would from here on."""
    model.set_env(env)
    torch.manual_seed(7)
    online = bool(model.training_state.terms)
    callback = UpdateReward() if online else None
    model.learn(2 * ITERATION, reset_num_timesteps=False, callback=callback)
    return weights(model)


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("late", [False, True], ids=["load(env)", "set_env"])
def test_training_goes_on_as_if_nothing_had_happened(make_env, make_model, tmp_path, name, late):
    make = REWARDS[name]
    reward = make()
    model = make_model(make_env(reward=reward), **OPTIONS)
    callback = UpdateReward() if model.training_state.terms else None
    model.learn(2 * ITERATION, callback=callback)
    model.save(tmp_path / "agent")

    def fresh():
        return make_env(reward=make(), seed=5)

    loaded = ReDiFPPO.load(tmp_path / "agent", env=None if late else fresh())
    if late:
        loaded.save(tmp_path / "again")  # without an environment nothing must get lost
        loaded = ReDiFPPO.load(tmp_path / "again")
        loaded.set_env(fresh())
    env = loaded.get_env().env
    expected = go_on(model, make_env(reward=reward, seed=5))
    assert torch.equal(go_on(loaded, env), expected)
    if name != "none":
        # negative control: with a reward that starts anew it is another run
        other = ReDiFPPO.load(tmp_path / "agent", env=fresh())
        assert not torch.equal(go_on(other, fresh()), expected)


def test_an_agent_saved_without_the_state_of_a_reward_still_loads(make_env, make_model):
    model = make_model(make_env(reward=REWARDS["discriminator"]()))
    reward = model.training_state.terms[0]
    reward.update(torch.ones(4, *SHAPE), torch.zeros(4, *SHAPE), torch.zeros(4).long())
    before = reward.state_dict()
    parameters = model.get_parameters()
    del parameters["training_state"]
    model.set_parameters(parameters)
    after = reward.state_dict()
    assert after["updates"] == before["updates"] == 2
    for name, value in before["network"].items():
        assert torch.equal(after["network"][name], value)


class Best(OnlineReward):
    """Remembers something of the kind that it is told."""

    name, has_map, over_batch = "best", False, False

    def __init__(self, best) -> None:
        self.best = best

    def __call__(self, x_0, teacher_x_0, condition):
        return -(x_0 - teacher_x_0).square().flatten(1).mean(1)

    def update(self, x_0, teacher_x_0, condition):
        return {}

    def state_dict(self):
        return {"of": [self.best, "all"]}

    def load_state_dict(self, state) -> None:
        self.best = state["of"][0]


@pytest.mark.parametrize("best", [np.float64(0.5), np.zeros(2)])
def test_a_reward_whose_state_can_not_be_saved_is_refused(make_env, make_model, best):
    with pytest.raises(InvalidArgumentError, match=r"'best'.*plain numbers"):
        make_model(make_env(reward=Best(best)), credit="global")


def test_a_reward_that_is_not_whole_before_its_first_update_is_refused(make_env, make_model):
    reward = Best(0.5)
    del reward.best
    with pytest.raises(InvalidArgumentError, match=r"AttributeError.*__init__"):
        make_model(make_env(reward=reward), credit="global")


@pytest.mark.parametrize("best", [0.5, torch.ones(2), None])
def test_a_plain_state_is_saved(make_env, make_model, tmp_path, best):
    make_model(make_env(reward=Best(best)), credit="global").save(tmp_path / "agent")
    reward = Best(0)
    ReDiFPPO.load(tmp_path / "agent", env=make_env(reward=reward))
    assert torch.is_tensor(best) == torch.is_tensor(reward.best)
    assert reward.best is best or torch.equal(torch.as_tensor(reward.best), torch.as_tensor(best))


def test_a_plain_reward_may_follow_a_trained_one(make_env, make_model, tmp_path):
    make_model(make_env(reward=REWARDS["discriminator"]())).save(tmp_path / "agent")
    loaded = ReDiFPPO.load(tmp_path / "agent", env=make_env())
    assert loaded.learn(ITERATION).num_timesteps == ITERATION


@pytest.mark.parametrize("late", [False, True])
def test_another_trained_reward_is_refused(make_env, make_model, tmp_path, late):
    """Never ignored: training would go on with a reward as it was drawn."""

    def load_with(env):
        ReDiFPPO.load(tmp_path / "agent", env=env)

    make_model(make_env(reward=REWARDS["discriminator"]())).save(tmp_path / "agent")
    wider = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    for reward, match in (
        (REWARDS["memory"](), "energy_distance.*saved with.*discriminator"),
        (MSE() + Discriminator(SHAPE, network=wider), "discriminator.*same arguments"),
    ):
        env = make_env(reward=reward)
        use = ReDiFPPO.load(tmp_path / "agent").set_env if late else load_with
        with pytest.raises(InvalidArgumentError, match=match):
            use(env)
