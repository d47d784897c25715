"""What all threads of a process share, and one product must not take from another: switches of torch, and modules."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

Undo = Callable[[], None]


class _Exclusive:
    """The one lock around the modules of users.

    One for all of them: a module can lie inside another, and two locks that are taken in two orders wait for ever. The
    thread that holds it may take it again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._after_fork)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        lock = self._lock
        with lock:
            yield

    def _after_fork(self) -> None:
        # Of all threads only the one that forked goes on: nobody else would ever let go.
        if self._lock.acquire(blocking=False):
            self._lock.release()
        else:
            self._lock = threading.RLock()


exclusive = _Exclusive()
"""Keep other threads from calling any module through this library, within the context."""


@final
class Shared:
    """A switch of the whole process that is turned as long as anybody needs it.

    The first to come turns it, and the last to leave puts it back, whichever threads they are. Putting back what each
    had found would leave it turned: the second found what the first had made of it.
    """

    def __init__(self, turn: Callable[[], Undo], turn_again: Callable[[], None]) -> None:
        """Take what turns it, and returns how it is put back, and what turns it again in between."""
        self._turn = turn
        self._turn_again = turn_again
        self._undo: Undo | None = None
        self._num_holders = 0
        self._own = threading.local()  # of the holders, those in this thread
        self._lock = threading.RLock()
        os.register_at_fork(after_in_child=self._after_fork)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it turned."""
        with self._lock:
            if self._undo is None:
                self._undo = self._turn()
            else:
                # Somebody's model may have turned it meanwhile.
                self._turn_again()
            self._count(1)
        try:
            yield
        finally:
            with self._lock:
                self._count(-1)
                self._release()

    def _count(self, change: int) -> None:
        self._num_holders += change
        self._own.count = getattr(self._own, "count", 0) + change

    def _release(self) -> None:
        if self._num_holders == 0 and self._undo is not None:
            undo, self._undo = self._undo, None
            undo()

    def _after_fork(self) -> None:
        self._lock = threading.RLock()
        self._num_holders = getattr(self._own, "count", 0)
        self._release()
