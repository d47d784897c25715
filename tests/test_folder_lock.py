"""One process at a time writes to a folder; one that was killed keeps nobody out, and one that waits loses nothing."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_records import make_record
from torch import nn

from ntk_lazy.errors import ArgumentError
from ntk_lazy.folder_lock import LOCK_NAME, FolderLock
from ntk_lazy.records import append_record, read_records
from ntk_lazy.tracker import SpectrumTracker

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the other process of these tests calls fcntl")

# Another process that knows nothing of this package: it locks, says so, and waits to be told or killed.
_OTHER = """
import fcntl, os, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
file.truncate(0)
file.write(f"{os.getpid()} elsewhere\\n")
file.flush()
print("locked", flush=True)
sys.stdin.readline()
"""


@contextmanager
def another_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-S", "-c", _OTHER, str(folder / LOCK_NAME)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert process.stdout.readline() == "locked\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def tracker_in(folder: Path) -> SpectrumTracker:
    return SpectrumTracker(torch.linspace(-1, 1, 5).reshape(-1, 1), k=2, folder=folder)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))


def test_a_second_process_is_refused_by_the_number_of_the_first_and_let_in_when_that_is_killed(tmp_path):
    with another_process(tmp_path) as other:
        with pytest.raises(ArgumentError, match=f"in use by process {other.pid} on elsewhere"):
            tracker_in(tmp_path)
        assert not (tmp_path / "spectrum.jsonl").exists()
        other.kill()
        other.wait()
        assert (tmp_path / LOCK_NAME).exists()  # a file may stay behind; the lock does not
        assert tracker_in(tmp_path).record(model(), 0).is_usable


def test_a_tracker_keeps_others_out_until_it_is_closed_or_gone(tmp_path):
    tracker = tracker_in(tmp_path)
    assert (tmp_path / LOCK_NAME).read_text().split()[0] == str(os.getpid())
    with pytest.raises(AssertionError, match="BlockingIOError"), another_process(tmp_path):
        pass
    tracker.close()
    assert list(tmp_path.iterdir()) == []
    with another_process(tmp_path), pytest.raises(ArgumentError, match="in use"):
        tracker.record(model(), 0)
    tracker.record(model(), 0)
    del tracker
    with another_process(tmp_path):
        pass


def test_a_fork_does_not_keep_the_lock_of_its_parent(tmp_path):
    lock = FolderLock(tmp_path)
    lock.hold()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:  # lives on as an orphaned worker would, and ends without what Python does at its end
        os.close(tell)
        os.read(told, 1)
        os._exit(0)
    try:
        lock.release()
        with another_process(tmp_path):
            pass
    finally:
        os.close(tell)
        os.close(told)
        os.waitpid(child, 0)


def test_of_two_writers_in_one_process_the_later_goes_on_and_the_earlier_is_refused(tmp_path):
    earlier = tracker_in(tmp_path)
    earlier.record(model(), 0)
    later = tracker_in(tmp_path)
    earlier.record(model(), 1)  # nothing was written by the other yet: it may only look
    later.record(model(), 2)
    with pytest.raises(ArgumentError, match=str(os.getpid())):
        earlier.record(model(), 3)
    later.record(model(), 4)
    assert [r.step for r in read_records(tmp_path / "spectrum.jsonl")] == [0, 1, 2, 4]


def test_a_copy_of_a_tracker_asks_for_the_folder_again(tmp_path):
    tracker = tracker_in(tmp_path)
    for again in (pickle.loads(pickle.dumps(tracker)), copy.deepcopy(tracker)):
        tracker.close()
        with another_process(tmp_path), pytest.raises(ArgumentError, match="in use"):
            again.record(model(), 0)
        assert again.record(model(), 0).is_usable
        again.close()


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path):
    lock = FolderLock(tmp_path)
    lock.hold()
    (tmp_path / LOCK_NAME).unlink()
    with another_process(tmp_path), pytest.raises(ArgumentError, match="in use"):
        lock.claim()
    lock.claim()
    with pytest.raises(AssertionError, match="BlockingIOError"), another_process(tmp_path):
        pass


def test_where_no_lock_can_be_had_the_work_goes_on_and_the_log_says_so(tmp_path, monkeypatch, caplog):
    def no_locks(number: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("ntk_lazy.folder_lock._lock", no_locks)
    assert tracker_in(tmp_path).record(model(), 0).is_usable
    assert "not locked against other processes: Operation not supported" in caplog.text
    assert len(read_records(tmp_path / "spectrum.jsonl")) == 1


@pytest.mark.slow
def test_lines_that_are_appended_at_once_are_all_there(tmp_path):
    path, count = tmp_path / "spectrum.jsonl", 40
    padding = "x" * 200_000  # a line that takes a while, so that another is written within

    def write(first: int) -> None:
        for step in range(first, first + count):
            append_record(path, make_record(step, message=padding))

    threads = [threading.Thread(target=write, args=(1_000 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted(r.step for r in read_records(path))
    assert found == [1_000 * i + step for i in range(4) for step in range(count)]
