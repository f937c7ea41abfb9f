"""Which block sizes are the peers' best?

Others' heads for `bench_linear_loss.py`, as their authors give them; all take a weight [V, D] and know cross entropy alone.
Where one leaves a size to its user, several are timed in turn, value and gradients. Best is the smallest of those within 3% of
the fastest: a smaller lead than that is noise, and a smaller block holds less memory.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from bench_memory import one_arena

from xentlab import LabError

SHAPES = ((1024, 256, 32_768), (2048, 512, 50_304), (4096, 512, 128_256))  # tokens, features, vocabulary
THREADS = 2
LEVEL = 1.03  # times the fastest: as good
QUARTILES = {"_q1": 0.25, "": 0.5, "_q3": 0.75}
PACKAGES = ("torch", "jax-cce", "cut-cross-entropy")
REMEDIES = {
    "torch": "pip install -e '.[bench]'",
    "jax_cce": "pip install -e '.[bench]'",
    # Not in the extra: it asks for triton, 286 MB to fetch and 1 GB on the disk, for kernels that no CPU runs.
    "cut_cross_entropy": "pip install --no-deps 'cut-cross-entropy>=25.1'",
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A head at one shape, built: call() does value and gradients, waits, and gives (value, (by hidden, by weight)).

    temporary_mb: XLA's own count of what it holds besides; NaN for what is not XLA's.
    """

    function: Callable[[], Any]
    temporary_mb: float = math.nan

    def __call__(self) -> Any:
        return self.function()


def jitted(function: Callable, *arrays: jax.Array) -> Call:
    """A compiled JAX function of these arrays."""
    made = jax.jit(function).lower(*arrays).compile()
    return Call(lambda: jax.block_until_ready(made(*arrays)), made.memory_analysis().temp_size_in_bytes / 2**20)


def clocked(call: Callable[[], Any]) -> float:
    """The seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def spread(name: str, values: np.ndarray) -> dict[str, float]:
    """Median and quartiles as columns."""
    return {f"{name}{end}": float(np.quantile(values, share)) for end, share in QUARTILES.items()}


def telling(of: Any) -> Callable[[str], None]:
    """A function that says on stderr how far something is."""
    return lambda what: print(f"{of}: {what}", file=sys.stderr, flush=True)


def package(name: str) -> Any:
    """The imported package. Raises `LabError` that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.split(".")[0]
        if error.name.split(".")[0] != top:  # something that the package itself lacks
            raise
        raise LabError(f"{top} is not installed, a contestant of this benchmark: {REMEDIES[top]}") from error


def jax_cce(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, block: int) -> Call:
    """jax-cce; block: classes a chunk."""
    head, labels = package("jax_cce").linear_cross_entropy, jnp.asarray(targets, jnp.int32)
    loss = lambda h, w: head(h, w, labels, chunk_size=block)
    return jitted(jax.value_and_grad(loss, (0, 1)), jnp.asarray(hidden), jnp.asarray(weight))


def _torched(loss: Callable, hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray) -> Call:
    """A function of torch tensors; none is copied."""
    torch = package("torch")
    torch.set_num_threads(THREADS)
    leaves = [torch.from_numpy(each).requires_grad_() for each in (hidden, weight)]
    labels = torch.from_numpy(targets.astype(np.int64))

    def call():
        value = loss(*leaves, labels)
        return value.detach(), torch.autograd.grad(value, leaves)

    return Call(call)


def torch_bare(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, block: int | None) -> Call:
    """Three bare products in torch: what is left of a head's lead over XLA's when this is taken off is the head's own."""
    torch = package("torch")
    torch.set_num_threads(THREADS)
    h, w = (torch.from_numpy(each) for each in (hidden, weight))

    def call():
        z = h @ w.T
        return z[0, 0], (z @ w, z.T @ h)

    return Call(call)


def torch_eager(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, block: int | None) -> Call:
    """torch as anyone writes it: linear, then cross_entropy."""
    functional = package("torch.nn.functional")
    loss = lambda h, w, y: functional.cross_entropy(functional.linear(h, w), y)
    return _torched(loss, hidden, weight, targets)


def torch_chunked(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, block: int | None) -> Call:
    """torch's linear_cross_entropy by chunks; block: tokens a chunk, torch's own choice if None.

    Without options it does not chunk: that is `torch_eager`.
    """
    functional, options = package("torch.nn.functional"), package("torch.nn").LinearCrossEntropyOptions(batch_chunk_size=block)
    loss = functools.partial(functional.linear_cross_entropy, options=options)
    return _torched(loss, hidden, weight, targets)


def cut_cross_entropy(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, block: int | None) -> Call:
    """cut-cross-entropy's torch_compile, its way without a GPU."""
    package("torch._dynamo")
    if importlib.util.find_spec("triton"):
        head = package("cut_cross_entropy").linear_cross_entropy
    else:
        # It imports its triton kernels everywhere but on a Mac, where torch_compile, which needs none, is what it offers.
        with mock.patch("platform.system", return_value="Darwin"):
            head = package("cut_cross_entropy").linear_cross_entropy
    call = _torched(functools.partial(head, impl="torch_compile"), hidden, weight, targets)
    call()  # compiles
    return call


def token_blocks(tokens: int, features: int, vocab: int) -> list[int]:
    """Tokens a chunk to try: all, a half, ..., a thirty-second."""
    return sorted({-(-tokens // 2**halvings) for halvings in range(6)})


def class_blocks(tokens: int, features: int, vocab: int) -> list[int]:
    """Classes a chunk to try: jax-cce's own 4096, and such as divide the vocabulary, for which it pads nothing."""
    most = 2 ** np.arange(9, 15)
    whole = {vocab // n for each in most for n in range(-(-vocab // each), 2 * vocab // each + 1) if vocab % n == 0}
    coarse = {max((block for block in whole if block <= each), default=vocab) for each in most}
    return sorted(coarse | {min(4096, vocab)})


@dataclasses.dataclass(frozen=True)
class Peer:
    """Someone else's head: build(hidden [N, D], weight [V, D], targets [N], block) -> Call; blocks(N, D, V): sizes to try.

    loss: its name in the catalogue, "" if it is none.
    """

    build: Callable[..., Call]
    blocks: Callable[[int, int, int], list] = lambda *_: [None]
    loss: str = "nll"


PEERS = {
    "three bare products, torch, [V, D]": Peer(torch_bare, loss=""),
    "jax-cce, best chunk": Peer(jax_cce, class_blocks),
    "torch eager": Peer(torch_eager),
    "torch linear_cross_entropy, default": Peer(torch_chunked),
    "torch linear_cross_entropy, best chunk": Peer(torch_chunked, token_blocks),
    "cut-cross-entropy, torch_compile": Peer(cut_cross_entropy),
}


def numbers(tokens: int, features: int, vocab: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hidden states [N, D] and a weight [V, D] in float32 whose logits have a variance of 1, and targets [N]."""
    rng = np.random.default_rng(seed)
    drawn = lambda *shape: rng.standard_normal(shape, np.float32) / np.float32(features**0.25)
    return drawn(tokens, features), drawn(vocab, features), rng.integers(0, vocab, tokens)


def run(shapes=SHAPES, names=tuple(PEERS), rounds: int = 2) -> pd.DataFrame:
    """A row a shape, peer and block size to try: milliseconds, the least of the rounds; whether best."""
    rows = []
    for shape in shapes:
        arrays = numbers(*shape)
        for name in names:
            blocks = PEERS[name].blocks(*shape)
            if len(blocks) < 2:
                continue
            calls = {block: PEERS[name].build(*arrays, block) for block in blocks}
            took = dict.fromkeys(blocks, math.inf)
            for _ in range(rounds):
                for block, call in calls.items():
                    took[block] = min(took[block], 1e3 * clocked(call))
            best = min(block for block in blocks if took[block] <= LEVEL * min(took.values()))
            for block in blocks:
                row = {"shape": " x ".join(map(str, shape)), "what": name, "block": block, "milliseconds": took[block]}
                rows.append(row | {"best": block == best})
    return pd.DataFrame(rows)


def settle() -> None:
    """Two threads of the CPU for everyone, which allocate from one arena. To call before JAX starts."""
    one_arena()
    on_two_cores()


def on_two_cores() -> None:
    """Two threads for everyone. To call before JAX starts, whose threads are as many as its processors."""
    jax.config.update("jax_platforms", "cpu")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])


def main(quick: bool = False, rounds: int = 2) -> None:
    """See the top of the file. quick: the first shape alone."""
    settle()
    for shape in SHAPES[:1] if quick else SHAPES:
        print(run([shape], rounds=rounds).round(1).to_string(index=False), flush=True)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
