"""What this process may have of the machine, memory and cores: a container, or a batch system, may allow less."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import psutil

# Linux's control groups, in both of their versions: the folder, and what limit, use, and files out of use are called there.
SECOND = ("", "memory.max", "memory.current", "inactive_file")
FIRST = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def machine_memory(root: str = "/") -> tuple[int, int]:
    """Bytes in all, and bytes that are free now: the least of the machine's and of each control group's around this process.

    root: where /proc and /sys lie. What a group's files occupy in memory and have not used of late counts as free.

    >>> total, free = machine_memory()
    >>> 0 < free <= total
    True
    """
    memory = psutil.virtual_memory()
    totals, frees = [memory.total], [memory.available]
    for limit, used in _groups(pathlib.Path(root)):
        totals.append(limit)
        frees.append(max(0, limit - used))
    return min(totals), min(frees)


def usable_cores() -> int:
    """How many cores this process may use; by their number a CPU's products are summed one way or another.

    >>> 1 <= usable_cores() <= os.cpu_count()
    True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _groups(root: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group that this process is in, and that has a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        folder, limited, used, reclaimed = FIRST if controllers else SECOND
        top = root / "sys/fs/cgroup" / folder
        own = top / path.strip("/")
        for group in (own, *own.parents):
            try:
                limit = int((group / limited).read_text())
                statistics = dict(each.split() for each in (group / "memory.stat").read_text().splitlines())
                yield limit, int((group / used).read_text()) - int(statistics.get(reclaimed, 0))
            except (OSError, ValueError):  # a group that is not shown here, or "max"
                pass
            if group == top:
                break
