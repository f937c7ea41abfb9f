"""Several processes at one race, by `jax.distributed`: on one machine, or one a host."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from xentlab.contract import LabError

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as lost


def join(hosts: str | None) -> int:
    """Joins the processes of "HOST:PORT,COUNT,INDEX", or those that the cluster names ("auto"); how many they are.

    Before JAX touches a device. Raises `LabError` for anything else, and where the others do not come.
    """
    if hosts is None:
        return 1
    found = re.fullmatch(r"([^,]+:\d+),(\d+),(\d+)", hosts)
    if hosts != "auto" and (not found or int(found[3]) >= int(found[2])):
        raise LabError(
            f"processes are joined by HOST:PORT,COUNT,INDEX with INDEX from 0 to COUNT - 1, or by auto; got {hosts!r}."
        )
    named = {}
    if found:
        named = {"coordinator_address": found[1], "num_processes": int(found[2]), "process_id": int(found[3])}
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its notifier would take SIGTERM for a notice that nobody here reads: a process that is told to end ends.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**named, heartbeat_timeout_seconds=HEARTBEAT, initialization_timeout=120)
    except (RuntimeError, ValueError) as error:
        raise LabError(f"the processes of {hosts} did not come together: {' '.join(str(error).split())[:300]}") from error
    return int(found[2]) if found else jax.process_count()


def own_stdout() -> None:
    """Before a process joins others: gloo greets on its stdout, which is for data. What is not Python's goes to stderr then."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def first() -> bool:
    """Whether this process is the one that writes and prints."""
    return jax.process_index() == 0


def gathered(each: Any) -> np.ndarray:
    """Every process's array, [processes, ...]; waits until all have given theirs."""
    array = np.asarray(each)
    if jax.process_count() == 1:
        return array[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(array).reshape(-1, *array.shape)


def unlike(what: Mapping[str, Any]) -> list[str]:
    """The names under which the processes hold different things; waits until all have said. Names are the same in all.

    >>> unlike({"steps": 400})  # alone
    []
    """
    written = [json.dumps(each, sort_keys=True, default=str).encode() for each in what.values()]
    sums = gathered(np.stack([np.frombuffer(hashlib.sha256(each).digest(), np.uint8) for each in written]))
    return [name for place, name in enumerate(what) if (sums[:, place] != sums[:1, place]).any()]
