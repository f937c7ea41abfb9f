"""Does the peak that Linux keeps of a process tell what one call held?

`measured` looks at every contestant of `bench_linear_loss.py`, JAX's or torch's: by the kernel's high-water mark of resident
memory, set back before the call. Here it measures NumPy arrays of a known size, and heads whose bytes XLA counts itself.
"""

import ctypes
import gc
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from xentlab import LOSSES, linear_loss

ARENA_MAX = -8  # of mallopt, in glibc's malloc.h
STATUS, RESET = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")


def _resident_mb(which: str) -> float:
    """VmRSS, what is resident now, or VmHWM, the most that was."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1024


def measured(call: Callable[[], Any], outputs_mb: float = 0.0) -> tuple[Any, float, float]:
    """What a call gives, its seconds, and the MB that the process held at its height above what it held before and its outputs.

    What is compiled or pooled at first is not its own: call it before, unless it is compiled ahead. NaN MB but on Linux.
    """
    if there := RESET.exists():
        gc.collect()
        # What the allocator keeps of memory that was freed is resident: used again, it would be no rise.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
        RESET.write_text("5")
        before = _resident_mb("VmRSS")
    begun = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begun
    return result, seconds, max(0.0, _resident_mb("VmHWM") - before - outputs_mb) if there else math.nan


def one_arena() -> None:
    """To call before there are threads: glibc would give each an arena of memory, of which malloc_trim leaves the top."""
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(ARENA_MAX, 1)


def run(arrays_mb=(4, 16, 64, 256), tokens: int = 1024, features: int = 64, vocab: int = 32_768) -> pd.DataFrame:
    """A row an allocation: what was asked for or counted, and what was measured, in MB."""
    rows = []
    for size in arrays_mb:
        *_, held = measured(lambda size=size: np.ones(size * 2**17).sum())
        rows.append({"what": f"a NumPy array of {size} MB", "expected_mb": float(size), "measured_mb": held})
    rng = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((tokens, features), (features, vocab)))
    targets, loss = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32), LOSSES["nll"]
    heads = {
        "naive": lambda h, w: jnp.mean(loss(h @ w, targets)),
        "tokens": lambda h, w: linear_loss(h, w, targets, loss=loss, plan="tokens"),
        "stream": lambda h, w: linear_loss(h, w, targets, loss=loss, plan="stream"),
    }
    for name, head in heads.items():
        made = jax.jit(jax.value_and_grad(head, (0, 1))).lower(hidden, weight).compile()
        call = lambda made=made: jax.block_until_ready(made(hidden, weight))
        call()
        counted = made.memory_analysis().temp_size_in_bytes / 2**20
        *_, held = measured(call, (hidden.nbytes + weight.nbytes) / 2**20)
        rows.append({"what": f"{name} nll, by XLA's count", "expected_mb": counted, "measured_mb": held})
    return pd.DataFrame(rows)


def main() -> None:
    """See the top of the file."""
    if sys.platform != "linux":
        raise SystemExit("the peak is read from /proc, which only Linux has.")
    one_arena()
    print(run().round(1).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
