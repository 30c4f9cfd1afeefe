"""Fixtures that all tests share: one thread, a cache of our own, a fast teacher and its bank."""

import atexit
import os
import shutil
import tempfile

if "REDIF_CACHE" not in os.environ:
    os.environ["REDIF_CACHE"] = tempfile.mkdtemp(prefix="redif-test-cache-")
    atexit.register(shutil.rmtree, os.environ["REDIF_CACHE"], ignore_errors=True)

import hypothesis
import pytest
import torch

from redif_env import Teacher, TeacherBank, load_teacher

torch.set_num_threads(1)
hypothesis.settings.register_profile("redif", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("redif")


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    """The bundled teacher with 5 steps, where the usual 50 make no difference. Do not change it."""
    return load_teacher("digits", num_steps=5)


@pytest.fixture(scope="session")
def bank(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> TeacherBank:
    """32 training tasks of `teacher`. Do not change it."""
    return TeacherBank.build(teacher, 32, cache_dir=tmp_path_factory.mktemp("bank"))


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
