"""Checkpoints as files: whole or not there, and damage is noticed."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch
from safetensors.torch import load_file

from agents.checkpoints import (
    BEST,
    MANIFEST,
    PLAIN,
    TENSORS,
    Checkpoints,
    DamagedCheckpointError,
    pack,
    read,
    unpack,
)
from redif_env.errors import InvalidArgumentError


def same(one, other) -> bool:
    """Whether two nested states are equal bit for bit, types and order included."""
    if isinstance(one, torch.Tensor):
        return (
            isinstance(other, torch.Tensor)
            and (one.dtype, one.shape) == (other.dtype, other.shape)
            and one.flatten().view(torch.uint8).equal(other.flatten().view(torch.uint8))
        )
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)  # NaN and -0.0 too


def make_state(number: int = 0) -> dict:
    weight = torch.arange(6.0).reshape(2, 3) / 7 + number
    return {
        "policy": {"a": weight, "average": weight, "bytes": torch.ByteTensor([1, 2, number])},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "betas": (0.9, 0.999)},
        "marks": [{"tensor": "no tensor"}, {"tuple": 1}, {"items": []}, {"tensor": 1, "b": 2}],
        "numbers": [0.1, float("nan"), float("inf"), -0.0, 2**62, True, None, "text"],
        "empty": [{}, [], (), torch.empty(0), torch.empty(0, 2)],
        "half": torch.tensor([1 / 3], dtype=torch.bfloat16),
        "turned": torch.arange(6).reshape(2, 3).T,
    }


def test_nested_state_comes_back_bit_for_bit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.write(3, make_state())
    iteration, state = checkpoints.newest()
    assert iteration == 3
    assert same(state, make_state())
    assert not same(state, make_state(1))


def test_a_tensor_that_occurs_twice_is_kept_once(tmp_path):
    Checkpoints(tmp_path).write(0, make_state())
    assert len(load_file(tmp_path / "iteration-0000000" / TENSORS)) == 7
    # of one memory, but not one tensor
    weight = torch.arange(4.0)
    plain, tensors = pack([weight, weight[:2], weight.reshape(2, 2)])
    assert same(unpack(plain, tensors), [weight, weight[:2], weight.reshape(2, 2)])


def test_what_json_cannot_hold_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match=r"/policy/0: .*object"):
        Checkpoints(tmp_path).write(0, {"policy": [object()]})
    assert not list(tmp_path.iterdir())


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [TENSORS, PLAIN, MANIFEST])
@pytest.mark.parametrize("damage", [truncate, flip, os.unlink], ids=["short", "bit", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, name, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(10, make_state(10))
    checkpoints.write(20, make_state(20))
    if (name, damage) == (MANIFEST, truncate):
        os.truncate(checkpoints.path(20) / name, 30)  # its last byte is a line's end
    else:
        damage(checkpoints.path(20) / name)
    with pytest.raises(DamagedCheckpointError):
        read(checkpoints.path(20))
    with pytest.warns(RuntimeWarning, match=r"iteration-0000020.*damaged"):
        iteration, state = checkpoints.newest()
    assert iteration == 10
    assert same(state, make_state(10))
    checkpoints.write(20, make_state(20))  # the run that went on from 10 writes it again
    assert checkpoints.newest()[0] == 20


def test_without_any_whole_checkpoint_there_is_none(tmp_path):
    assert Checkpoints(tmp_path / "missing").newest() is None
    (tmp_path / "iteration-0000001").mkdir()
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert Checkpoints(tmp_path).newest() is None


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    errors = {0: 0.01, 10: 0.5, 20: 0.2, 30: 0.3, 40: 0.4, 50: 0.6}
    for iteration in (10, 20, 30, 40, 50):
        checkpoints.write(iteration, make_state(iteration))
        # the error of the newest is measured after it is written
        checkpoints.prune({i: e for i, e in errors.items() if i < iteration})
    assert checkpoints.iterations() == [20, 40, 50]
    best = '{\n  "checkpoint": "iteration-0000020",\n  "paired_mse": 0.2\n}\n'
    assert (tmp_path / BEST).read_text() == best
    with pytest.raises(InvalidArgumentError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_a_full_disk_leaves_the_earlier_ones(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(10, make_state(10))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # no file may grow further
    try:
        with pytest.raises(OSError, match="too large"):
            checkpoints.write(20, make_state(20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(20, make_state(20))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-0000010"]
    assert same(checkpoints.newest()[1], make_state(10))
    checkpoints.write(20, make_state(20))  # with room again
    assert checkpoints.newest()[0] == 20


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(OSError, match="checkpoints"):
        Checkpoints(tmp_path / "checkpoints").write(0, make_state())


def test_what_a_killed_writer_left_is_removed(tmp_path):
    left = tmp_path / ".iteration-0000010.abc.tmp" / "iteration-0000010"
    left.mkdir(parents=True)
    (left / TENSORS).write_text("half")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    checkpoints.write(10, make_state())
    assert [path.name for path in tmp_path.iterdir()] == ["iteration-0000010"]
