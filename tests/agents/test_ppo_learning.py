"""ReDiFPPO improves the deterministic student on noise that it never saw."""

from __future__ import annotations

import pytest
from small_world import PLAIN_EXPLORATION

from agents import ReDiFPPO
from redif_env import schedules
from redif_env.rewards import MSE


def learned(make_env, held_out, seed: int, **changes) -> tuple[float, float]:
    """Held-out reward of the deterministic student, before and after 15 iterations."""
    env_changes = {"reward": changes.pop("reward", "mse"), "schedule": changes.pop("schedule")}
    env = make_env(64, seed=seed, **env_changes)
    settings = {"learning_rate": 3e-4, "batch_size": 32, "eta": 0.1, "min_std": 0.02, "n_epochs": 1}
    settings = {**settings, "gap_fraction": None, **changes}
    model = ReDiFPPO("StudentPolicy", env, ema_decay=0.5, seed=seed, **settings)

    def reward() -> float:
        return -schedules.paired_mse(model.student(), held_out, env.timesteps)

    before = reward()
    model.learn(15 * 64 * env.max_steps)
    return before, reward()


@pytest.mark.parametrize("exploration", [PLAIN_EXPLORATION, {}], ids=["all", "default"])
@pytest.mark.parametrize("schedule", [(850.0,), (950.0, 850.0)], ids=["one step", "two steps"])
def test_the_held_out_reward_rises(make_env, held_out, schedule, exploration):
    before, after = learned(make_env, held_out, seed=1, schedule=schedule, **exploration)
    # plain DDIM is at -0.064 here; seeds 0 to 2 of all four settings reached -0.031 to -0.041
    assert after > 0.8 * before


def test_a_reversed_reward_makes_the_student_worse(make_env, held_out):
    """Negative control: the rise above is the reward's doing."""
    before, after = learned(
        make_env, held_out, seed=1, schedule=(850.0,), reward=-1.0 * MSE(), **PLAIN_EXPLORATION
    )
    assert after < 1.2 * before
