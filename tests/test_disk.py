"""What is written is whole, on disk and one run's own."""

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from dinalrm_jax.disk import Locked, lock, whole_directory, write_json
from tests.conftest import ROOT

HOLD = """
import sys, time
from dinalrm_jax.disk import whole_directory
with whole_directory(sys.argv[1]) as partial:
    (partial / "half").write_text("half")
    print("holding", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that is writing tmp_path/out."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holding\n"
        yield process
        process.kill()


def test_two_processes_do_not_write_one_directory(holder, tmp_path):
    with (
        pytest.raises(Locked, match=rf"out is being written by .* on .*, process {holder.pid}, since 20"),
        whole_directory(tmp_path / "out"),
    ):
        pass


def test_what_a_killed_process_leaves_is_removed(holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert list(tmp_path.glob(".out.partial-*"))
    with whole_directory(tmp_path / "out") as partial:
        assert [path.name for path in tmp_path.glob(".out.partial-*")] == [partial.name]
        (partial / "whole").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["whole"]


def test_an_error_leaves_nothing_and_nothing_is_overwritten(tmp_path):
    with pytest.raises(ZeroDivisionError), whole_directory(tmp_path / "out") as partial:
        (partial / "half").write_text(str(1 / 0))
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="choose another output"), whole_directory(tmp_path / "out"):
        pass


def test_everything_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Every file and directory is synchronised before the rename, and the parent after it."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(os.readlink(f"/proc/self/fd/{fd}")) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *names: calls.append("rename") or replace(*names))
    with whole_directory(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
    before, after = calls[: calls.index("rename")], calls[calls.index("rename") + 1 :]
    assert {str(partial), str(partial / "sub"), str(partial / "sub" / "file")} <= set(before)
    assert after == [str(tmp_path)]
    calls.clear()
    write_json(tmp_path / "value.json", {"a": 1})
    assert calls[1:] == ["rename", str(tmp_path)]
    assert "value.json" in calls[0]
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}


def test_a_lock_is_free_after_its_end(tmp_path):
    for _ in range(2):
        with lock(tmp_path / "target"):
            pass
    assert not list(tmp_path.iterdir())
    with lock(tmp_path / "target"), pytest.raises(Locked), lock(tmp_path / "target"):
        pass


def test_a_lock_needs_neither_a_name_nor_an_owner(tmp_path, monkeypatch):
    """`--workdir .`, and a container's user whom no file names; a link is the same place."""

    def nobody():
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr("getpass.getuser", nobody)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    with lock("."), pytest.raises(Locked, match=f"being written by user {os.getuid()} on "), lock(tmp_path):
        pass
    with lock("link"), pytest.raises(Locked), lock("real"):
        pass


def test_a_lock_that_was_released_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    """Its holder removed the file in between: the lock of a file without a name would keep nobody out."""
    flock, opened = fcntl.flock, []

    def late(file, operation):
        if not opened:
            (tmp_path / ".target.lock").unlink()
        opened.append(file)
        flock(file, operation)

    monkeypatch.setattr("dinalrm_jax.disk.fcntl.flock", late)
    with lock(tmp_path / "target"):
        assert len(opened) == 2
        with pytest.raises(Locked), lock(tmp_path / "target"):
            pass
