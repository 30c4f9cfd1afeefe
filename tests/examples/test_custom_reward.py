"""The reward of the example, and that a student learns it."""

from __future__ import annotations

import inspect

import torch

from examples import custom_reward
from examples.custom_reward import Edges
from redif_env import check_reward


def test_edges_by_hand():
    x_0 = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).reshape(1, 1, 2, 2)
    # Slopes to the right: 1, 4, and nothing beyond the border; downwards: 3, 6.
    wanted = [[-(1.0 + 9.0), -36.0], [-16.0, 0.0]]
    assert Edges().reward_map(x_0, torch.zeros_like(x_0), None)[0, 0].tolist() == wanted
    assert float(Edges()(x_0, torch.zeros_like(x_0), None)) == -62 / 4


def test_edges_keep_the_protocol_and_ignore_brightness(bank):
    check_reward(Edges(), bank)
    brighter = Edges()(bank.teacher_x_0 + 0.5, bank.teacher_x_0, None)
    assert brighter.abs().max() < 1e-10
    assert bool((Edges()(bank.teacher_x_0.flip(3), bank.teacher_x_0, None) < -0.1).all())


def test_it_is_short():
    assert len(inspect.getsource(Edges).splitlines()) < 20


def test_a_student_learns_it():
    """640 trajectories take 33 % off both errors (seeds 0 to 2); half of that is asked for."""
    options = {"teacher_steps": 5, "schedule": (850.0,), "num_envs": 64, "bank_size": 64}
    terms = custom_reward.main(custom_reward.Args(iterations=10, **options))
    assert set(terms) == {"mse", "edges"}
    for before, after in terms.values():
        assert before < 0.83 * before < after < 0
