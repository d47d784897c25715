"""Run one job in this process, time it and watch its memory: ``python worker.py job.json``; numpy is all it needs.

The job names a folder with ``data.npz`` (inputs ``x``, block ``V``, parameters ``p/...``) and ``check.npy`` to write.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_ENOUGH = 15.0  # seconds that repeats may take
Run = Callable[[], Any]


def resident(kind: str) -> int:
    """Bytes this process holds (VmRSS), or held at most (VmHWM)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main(jobs: dict[str, Callable[[dict[str, Any], Any], tuple[Run, Callable[[Any], Any]]]]) -> None:
    """Do what the file names.

    Args:
        jobs: By name, functions of the job and its data that return what is timed, and a function that turns its
            result into arrays to be checked.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    data = np.load(Path(job["folder"]) / "data.npz")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before = resident("VmRSS")
    began = time.perf_counter()
    run, finish = jobs[job["task"]](job, data)
    result = run()
    first = time.perf_counter() - began
    seconds: list[float] = []
    while not job["once"] and len(seconds) < 5 and sum(seconds) < _ENOUGH:
        began = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - began)
    peak = resident("VmHWM") - before
    np.savez(Path(job["folder"]) / "check.npz", **finish(result))
    print(json.dumps({"first_seconds": first, "seconds": statistics.median(seconds or [first]), "peak_bytes": peak}))


def matrix(name: str = "result") -> Callable[[Any], dict[str, np.ndarray]]:
    """Turn a result that is one array into what is checked."""
    return lambda result: {name: np.asarray(result)}
