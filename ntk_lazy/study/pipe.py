"""A reader that has gone away, as that of ``ntk-lazy study | head`` has."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TextIO


def abandon(stream: TextIO) -> None:
    """Let all that is still to be written to a stream go nowhere.

    Its file descriptor is turned to the null device, so that what is in its buffer does no harm when the
    interpreter flushes it at the end. A stream without a descriptor is left alone.
    """
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, stream.fileno())
        finally:
            os.close(nowhere)
