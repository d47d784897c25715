"""One process at a time writes to a folder, and one that was killed leaves nothing behind that keeps others out."""

from __future__ import annotations

import errno
import logging
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

from ntk_lazy.errors import ArgumentError

if sys.platform == "win32":
    import msvcrt

    # Far behind the text: what Windows locks cannot be read by others.
    _LOCKED_BYTE = 1 << 20

    def _lock(number: int) -> None:
        os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_NBLCK, 1)

    def _unlock(number: int) -> None:
        os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
        msvcrt.locking(number, msvcrt.LK_UNLCK, 1)

else:
    import fcntl

    def _lock(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(number: int) -> None:
        fcntl.flock(number, fcntl.LOCK_UN)


_LOG = logging.getLogger(__name__)
LOCK_NAME = ".lock"
_IN_USE = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.01


class _Held:
    """A lock of the system on one folder, let go when nobody in this process refers to it any more."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number, self.pid = path, number, os.getpid()
        self.writer: weakref.ref[FolderLock] | None = None
        weakref.finalize(self, _let_go, path, number, self.pid)

    @property
    def is_ours(self) -> bool:
        """Whether the name in the folder is still that of the file that we hold: somebody may have removed it."""
        return self.pid == os.getpid() and _is_same_file(self.path, self.number)


# Folders that this process holds, and who may look at them; a lock of the system is one for all threads.
_HELD: weakref.WeakValueDictionary[Path, _Held] = weakref.WeakValueDictionary()
_GUARD = threading.RLock()


@final
class FolderLock:
    """The right to write to a folder, against other processes and, once claimed, against others of this process.

    It is a lock of the operating system on a file ``.lock`` in the folder, which also says who holds it: it goes with
    its process, however that ends, and with the last ``FolderLock`` on the folder in this process. A forked child has
    not got it. Where the file system has no locks, or the folder cannot be written to, one line in the log says so.

    Attributes:
        folder: The folder, which must exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held: _Held | None = None
        self._has_claimed = False

    def hold(self) -> None:
        """Keep other processes out.

        Raises:
            ArgumentError: Another process holds the folder; the message names it.
        """
        path = self.folder.resolve() / LOCK_NAME
        with _GUARD:
            held = _HELD.get(path)
            if held is None or not held.is_ours:
                held = _take(path)
                if held is not None:
                    _HELD[path] = held
            self._held = held

    def claim(self) -> None:
        """Be the one that writes: hold, and take over from whoever wrote before in this process.

        Raises:
            ArgumentError: Another process holds the folder, or another of this process has taken over.
        """
        self.hold()
        with _GUARD:
            if self._held is None:
                return
            writer = self._held.writer and self._held.writer()
            if self._has_claimed and writer is not None and writer is not self:
                raise ArgumentError(
                    f"{self.folder} is written to by something else in this process ({os.getpid()}) that began later. "
                    "Give each training a folder of its own."
                )
            self._held.writer, self._has_claimed = weakref.ref(self), True

    def release(self) -> None:
        """Let others have the folder; ``hold`` and ``claim`` take it again."""
        with _GUARD:
            if self._held is not None and self._held.writer is not None and self._held.writer() is self:
                self._held.writer = None
            self._held = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy, here or in another process, holds nothing until it asks.
        return {"folder": self.folder, "_held": None, "_has_claimed": False}


@contextmanager
def exclusively(number: int) -> Iterator[None]:
    """Keep all others out of an open file for a moment, those of this process included; waits for its turn.

    Args:
        number: File descriptor.

    Raises:
        OSError: Somebody has kept it for half a minute.
    """
    deadline, is_locked = time.monotonic() + _WAIT_SECONDS, False
    while not is_locked:
        try:
            _lock(number)
            is_locked = True
        except OSError as error:
            if error.errno not in _IN_USE:
                break  # no locks on this file system: better to write without one than not at all
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_SECONDS)
    try:
        yield
    finally:
        if is_locked:
            _unlock(number)


def _take(path: Path) -> _Held | None:
    """Lock the file, make it if need be, and write into it who we are; None where that cannot be done here."""
    while True:
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
        except OSError as error:
            _LOG.warning("%s is not locked against other processes: %s", path.parent, error.strerror)
            return None
        try:
            _lock(number)
        except OSError as error:
            holder = _holder(number)
            os.close(number)
            if error.errno in _IN_USE:
                raise ArgumentError(
                    f"{path.parent} is in use by {holder}. Wait for its end or choose another folder; to read its "
                    "records, call ntk_lazy.records.read_records."
                ) from error
            _LOG.warning("%s is not locked against other processes: %s", path.parent, error.strerror)
            return None
        if _is_same_file(path, number):
            break
        os.close(number)  # whoever held it has removed it between our two calls
    with suppress(OSError):  # a full disk: the lock holds without its text
        os.ftruncate(number, 0)
        os.lseek(number, 0, os.SEEK_SET)
        os.write(number, f"{os.getpid()} {socket.gethostname()}\n".encode())
    return _Held(path, number)


def _let_go(path: Path, number: int, pid: int) -> None:
    """Remove the file while it is still locked, so that nobody is left with a lock on a file without a name."""
    if pid != os.getpid():
        return  # a forked child, which has closed its copy
    with suppress(OSError):
        if _is_same_file(path, number):
            path.unlink()
    with suppress(OSError):
        os.close(number)


def _is_same_file(path: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(number))
    except OSError:
        return False


def _holder(number: int) -> str:
    """Say who has written into a lock file."""
    os.lseek(number, 0, os.SEEK_SET)
    words = os.read(number, 256).decode(errors="replace").split()
    return f"process {words[0]} on {words[1]}" if len(words) == 2 else "another process"


def _forget_in_child() -> None:
    """Close the copies that a fork makes: they would keep the lock when the parent is killed and the child lives on."""
    global _GUARD  # noqa: PLW0603  # another thread of the parent may have held it, and does not exist here
    _GUARD = threading.RLock()
    for held in list(_HELD.values()):
        with suppress(OSError):
            os.close(held.number)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
