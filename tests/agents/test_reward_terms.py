"""The reward's terms in the log: means by hand, and nothing read before the end of a rollout."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from small_world import GRID, ITERATION
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from tripwire import arm, count_reads

from agents import ReDiFPPO
from agents.baselines import Backprop
from agents.statistics import EpisodeStatistics
from redif_env import MSE, CompressedSize
from redif_env.errors import InvalidArgumentError


def step(ended, returns, lengths, **terms):
    """What an environment reports of a step where episodes may have ended."""
    return {
        "_episode": torch.tensor(ended),
        "episode": {"r": torch.tensor(returns), "l": torch.tensor(lengths)},
        "reward_terms": {name: torch.tensor(values) for name, values in terms.items()},
    }


STEPS = [
    {},
    step([True, False, True], [1.0, 9.0, 3.0], [2, 9, 4], a=[1.0, 9.0, 2.0], b=[0.0, 9.0, -1.0]),
    step([False, True, False], [9.0, 5.0, 9.0], [9, 6, 9], a=[9.0, 3.0, 9.0], b=[9.0, 7.0, 9.0]),
]


def test_means_are_of_the_episodes_that_ended():
    statistics, buffer, logger = EpisodeStatistics(), deque(), Logger(None, [])
    for infos in STEPS:
        statistics.add(infos)
    statistics.record(buffer, logger)
    assert logger.name_to_value == {"rollout/reward/a": 2.0, "rollout/reward/b": 2.0}
    assert (buffer[0]["r"], buffer[0]["l"]) == (3.0, 4.0)


@pytest.mark.parametrize("steps", [[], [{}], [step([False], [1.0], [1], a=[1.0])]])
def test_without_an_episode_nothing_is_logged(steps):
    statistics, buffer, logger = EpisodeStatistics(), deque(), Logger(None, [])
    for infos in steps:
        statistics.add(infos)
    statistics.record(buffer, logger)
    assert not buffer
    assert not logger.name_to_value


def test_terms_of_other_environments_may_be_missing():
    statistics, buffer = EpisodeStatistics(), deque()
    infos = step([True], [1.5], [3])
    del infos["reward_terms"]
    statistics.add(infos)
    statistics.record(buffer, Logger(None, []))
    assert buffer[0]["r"] == 1.5


def test_a_rollout_is_read_once_however_many_terms():
    statistics = EpisodeStatistics()
    with count_reads() as reads:
        for infos in STEPS:
            statistics.add(arm(infos))
    assert reads == [0]
    with count_reads() as reads:
        statistics.record(deque(), Logger(None, []))
    assert reads == [1]


class Infos(BaseCallback):
    """Keeps the infos of every step."""

    def _init_callback(self) -> None:
        self.seen = []

    def _on_step(self) -> bool:
        self.seen.append(self.locals["infos"])
        return True


def test_an_agent_logs_each_term(make_env, make_model):
    model = make_model(make_env(reward="2*mse + 0.1*psnr", step_cost=0.5))
    model.set_logger(Logger(None, []))
    infos = Infos()
    model.learn(ITERATION, callback=infos, log_interval=None)
    logged = model.logger.name_to_value
    terms = infos.seen[-1]["reward_terms"]
    assert logged["rollout/reward/mse"] == pytest.approx(float(terms["mse"].mean()), rel=1e-5)
    assert logged["rollout/reward/psnr"] == pytest.approx(float(terms["psnr"].mean()), rel=1e-5)
    wanted = 2 * logged["rollout/reward/mse"] + 0.1 * logged["rollout/reward/psnr"]
    wanted -= 0.5 * len(GRID)
    assert model.ep_info_buffer[-1]["r"] == pytest.approx(wanted, rel=1e-4)


def test_other_policies_log_them_too(make_env):
    options = {"ratio": "sum", "advantage": "gae", "credit": "global", "batch_size": 8}
    model = ReDiFPPO("MultiInputPolicy", make_env(reward="mse + cosine"), **options)
    model.set_logger(Logger(None, []))
    model.learn(ITERATION, log_interval=None)
    assert {"rollout/reward/mse", "rollout/reward/cosine"} <= set(model.logger.name_to_value)


def test_backpropagation_refuses_what_has_no_gradient(teacher, bank):
    with pytest.raises(InvalidArgumentError, match="no gradient leads through this one"):
        Backprop.train(
            teacher, bank, torch.tensor(GRID), reward=MSE() + CompressedSize(), iterations=1
        )
