"""Files appear whole or not at all."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys

import pytest

from redif_env import files


def test_write_json_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"b": path})
    assert json.loads(path.read_text()) == {"b": str(path)}
    circle: dict = {}
    circle["self"] = circle
    with pytest.raises(ValueError, match="Circular"):
        files.write_json(path, circle)
    assert json.loads(path.read_text()) == {"b": str(path)}
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_appears_once_it_is_complete(tmp_path):
    with files.replacing(tmp_path / "run") as temporary:
        temporary.mkdir()
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_text("a")
        assert not (tmp_path / "run").exists()
    assert (tmp_path / "run" / "inner" / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["run"]


def test_a_folder_does_not_replace_another(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").write_text("kept")
    with pytest.raises(OSError), files.replacing(tmp_path / "run") as temporary:  # noqa: PT011, PT012
        temporary.mkdir()
        (temporary / "a").write_text("a")
    assert os.listdir(tmp_path / "run") == ["kept"]


def test_what_was_not_written_does_not_appear(tmp_path):
    with pytest.raises(FileNotFoundError), files.replacing(tmp_path / "file"):
        pass
    assert not os.listdir(tmp_path)


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    files.write_text(path, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            files.write_text(path, 1000 * "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # some disks say so only when they are to hold it
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


KILLED = """
import sys, time
from pathlib import Path
from redif_env.files import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_writer_leaves_can_be_removed(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    writer = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout.readline() == "writing\n"
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert path.read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
    files.remove_temporaries(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_the_digest_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4
    assert files.sha256(path) == known
