"""How much longer than on a quiet machine tests, tools and benchmarks wait for other processes.

A limit is written for a quiet machine and multiplied where it is used: `communicate(timeout=20 * time_factor())`. A
loop that waits asks again in every turn, so that load which comes later counts as well.
"""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "GSPO_TEST_TIME_FACTOR"
LARGEST = 20.0
"""A test that hangs is to be reported on a busy machine too."""
LOAD = Path("/proc/loadavg")


def time_factor() -> float:
    """Runnable threads per core, from 1 to 20; or what the environment variable GSPO_TEST_TIME_FACTOR says.

    Counted are the load of the last minute and the threads that are runnable now, whichever is more: the first follows
    a load that has just begun with a minute's delay, the second is seen at one moment only.

    Raises:
        ValueError: GSPO_TEST_TIME_FACTOR is no positive number.
    """
    if asked := os.environ.get(VARIABLE):
        factor = float(asked)
        if not 0 < factor < float("inf"):
            raise ValueError(f"{VARIABLE}={asked} must be a positive number, such as 3 for limits three times as long")
        return factor
    threads = os.getloadavg()[0]
    if LOAD.exists():  # "0.20 0.18 0.12 1/80 11206": the fourth is runnable/all
        threads = max(threads, float(LOAD.read_text().split()[3].split("/")[0]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(1.0, threads / cores), LARGEST)
