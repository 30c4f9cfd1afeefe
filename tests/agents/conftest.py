"""A small world that trains in a fraction of a second: 5 teacher steps, 3 student steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from small_world import GRID, NUM_ENVS

from agents import ReDiFPPO
from redif_env.teacher import Teacher, TeacherBank
from redif_env.vector_env import ReDiFVectorEnv


@pytest.fixture(scope="session")
def held_out(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> TeacherBank:
    """64 validation tasks. Do not change them."""
    folder = tmp_path_factory.mktemp("held_out")
    return TeacherBank.build(teacher, 64, split="validation", cache_dir=folder)


@pytest.fixture
def make_env(teacher: Teacher, bank: TeacherBank) -> Callable[..., ReDiFVectorEnv]:
    """Makes the small environment; any argument can be replaced."""

    def make(num_envs: int = NUM_ENVS, **changes) -> ReDiFVectorEnv:
        settings = {"schedule": GRID, "group_size": 4, "bank": bank, "seed": 0, **changes}
        return ReDiFVectorEnv(num_envs, settings.pop("teacher", teacher), **settings)

    return make


@pytest.fixture
def make_model(make_env: Callable[..., ReDiFVectorEnv]) -> Callable[..., ReDiFPPO]:
    """Makes an agent on the small environment; any argument can be replaced."""

    def make(env=None, **changes) -> ReDiFPPO:
        settings = {
            "learning_rate": 1e-4,
            "batch_size": 8,
            "n_epochs": 1,
            "eta": 0.1,
            "min_std": 0.02,
            "gap_fraction": None,
            "seed": 0,
        }
        return ReDiFPPO("StudentPolicy", env or make_env(), **{**settings, **changes})

    return make
