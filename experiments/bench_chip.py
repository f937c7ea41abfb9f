"""What does a head cost on this GPU or TPU, xentlab's and others', beside the matrix products that none can do without?

Value and gradients by hidden states and weight, as `bench_linear_loss.py` has them for a CPU: all contestants run in turn,
round after round, and the table has medians of their ratio to three bare products in the same round, with the quartiles.
Memory is what a call holds beside its arguments and gradients, by XLA's count or torch's. Numbers are checked against the
naive head's in float32, and a row says if they are wrong. Others' heads run if they are there: `pip install jax-cce torch
liger-kernel cut-cross-entropy`. And a grid of training runs, laid out as `xentlab race` lays it out here, beside the same
program run by run and a loop of jitted steps.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from bench_linear_loss import BARE
from bench_peers import Call, jitted, package
from bench_race import clocked, scans, spread
from bench_race_peers import MLP, TRANSFORMER, python_loop, work_of

from xentlab import LOSSES, LabError, linear_loss
from xentlab.linear.reductions import stream_of
from xentlab.runs import new_folder, record, write_frame, write_record

PACKAGES = ("torch", "jax-cce", "liger-kernel", "cut-cross-entropy")
SHAPES = ((4096, 1024, 50_304, "float32"), (8192, 2304, 256_000, "bfloat16"))  # tokens, features, vocabulary
TINY = ((64, 16, 512, "float32"),)
TOLERANCE = 2e-2  # of the greatest entry: products of float32 are TF32 there, and a gradient in bfloat16 is rounded to it


@dataclasses.dataclass(frozen=True)
class Head:
    """A head to time; vocab_first: its gradient by the weight is [V, D]."""

    what: str
    loss: str
    call: Call
    vocab_first: bool = False


def numbers(tokens: int, features: int, vocab: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [N, D] and a weight [D, V] whose logits have a variance of 1, and targets [N]; made on the chip."""
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = lambda key, *shape: (jax.random.normal(key, shape) / features**0.25).astype(dtype)
    return drawn(keys[0], tokens, features), drawn(keys[1], features, vocab), jax.random.randint(keys[2], (tokens,), 0, vocab)


def bare(hidden: jax.Array, weight: jax.Array) -> Any:
    """Logits, and two products of their size, in the type of what is multiplied."""
    z = hidden @ weight
    return z[0, 0], (z @ weight.T, hidden.T @ z)


def naive(loss: Callable) -> Callable:
    """The head that anyone writes, its logits in the type of what is multiplied."""
    return lambda h, w, y: jnp.mean(loss(h @ w, y))


def own(losses, arrays, tiles=(None,)) -> Iterator[Head]:
    """The bare products, and for each loss the naive head and each of xentlab's plans, with each of the tiles."""
    yield Head(BARE, "", jitted(bare, *arrays[:2]))
    for name in losses:
        loss = LOSSES[name]
        yield Head(f"naive {name}", name, jitted(jax.value_and_grad(naive(loss), (0, 1)), *arrays))
        for plan in ("tokens", "stream") if stream_of(loss) else ("tokens",):
            for tile in tiles:
                head = functools.partial(linear_loss, loss=loss, plan=plan, tiles=tile)
                said = "" if tile is None else f", {tile[0]} x {tile[1]}"
                yield Head(f"{plan} {name}{said}", name, jitted(jax.value_and_grad(head, (0, 1)), *arrays))


def torched(head: Callable, arrays) -> Call:
    """A function of torch tensors hidden [N, D], weight [V, D] and targets on this GPU."""
    torch = package("torch")
    hidden, weight, targets = (torch.from_dlpack(each).clone() for each in arrays)
    leaves, labels = [hidden.requires_grad_(), weight.T.contiguous().requires_grad_()], targets.long()

    def call():
        value = head(*leaves, labels)
        found = value.detach(), torch.autograd.grad(value, leaves)
        torch.cuda.synchronize()
        return found

    call()
    outputs, before = sum(each.nbytes for each in leaves), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return Call(call, (torch.cuda.max_memory_allocated() - before - outputs) / 2**20)


def others(arrays) -> Iterator[Head]:
    """Others' heads for nll, as their authors have them run on a GPU, if they are there."""
    there = lambda *names: all(importlib.util.find_spec(name) for name in names)
    if there("jax_cce"):
        hidden, weight, targets = arrays
        head = package("jax_cce").linear_cross_entropy
        for block in (4096, 16_384):
            loss = lambda h, w, block=block: head(h, w, targets, chunk_size=block)
            yield Head(f"jax-cce, {block}", "nll", jitted(jax.value_and_grad(loss, (0, 1)), hidden, weight.T), vocab_first=True)
    if not there("torch") or not package("torch").cuda.is_available():
        return
    torch = package("torch")
    torch.backends.cuda.matmul.allow_tf32 = True  # as XLA does
    functional = package("torch.nn.functional")
    plain = lambda h, w, y: functional.cross_entropy(functional.linear(h, w).float(), y)
    heads = {"torch eager": lambda: plain, "torch compiled": lambda: torch.compile(plain)}
    if there("liger_kernel"):
        heads["liger-kernel"] = lambda: package("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    if there("cut_cross_entropy"):
        heads["cut-cross-entropy"] = lambda: package("cut_cross_entropy").linear_cross_entropy
    for name, build in heads.items():
        try:
            yield Head(name, "nll", torched(build(), arrays), vocab_first=True)
        except Exception as error:  # a peer that does not run here is no reason to have no benchmark
            print(f"{name} does not run here: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def check(head: Head, found: Any, expected: Any) -> None:
    """Raises `LabError` if value or gradients are not those expected."""
    (value, (by_hidden, by_weight)), (right, gradients) = found, expected
    if not isinstance(value, jax.Array):
        value, by_hidden, by_weight = (jnp.from_dlpack(each.contiguous()) for each in (value, by_hidden, by_weight))
    by_weight = by_weight.T if head.vocab_first else by_weight
    largest = lambda z: jnp.max(jnp.abs(z))
    for part, one, other in (("value", value, right), ("hidden", by_hidden, gradients[0]), ("weight", by_weight, gradients[1])):
        off = float(largest(one.astype(jnp.float32) - other) / largest(other))
        if not off <= TOLERANCE:
            raise LabError(
                f"{head.what} is wrong: its {part} is off by {off:.1e} of what it should be; {TOLERANCE} is allowed."
            )


def heads(losses, shapes, rounds: int, peers: bool = True, tiles=(None,)) -> pd.DataFrame:
    """A row a shape and head: ratio to the bare products (median, quartiles), milliseconds, temporary MB, what is wrong."""
    rows = []
    for *shape, dtype in shapes:
        arrays, seconds = numbers(*shape, dtype), {}
        contestants, notes = [*own(losses, arrays, tiles), *(others(arrays) if peers and "nll" in losses else ())], {}
        wide = *(each.astype(jnp.float32) for each in arrays[:2]), arrays[2]
        for loss in losses:
            expected = jax.jit(jax.value_and_grad(naive(LOSSES[loss]), (0, 1)))(*wide)
            for head in (each for each in contestants if each.loss == loss):
                try:
                    check(head, head.call(), expected)
                except LabError as error:  # what is wrong is timed, and said to be
                    notes[head.what] = str(error)
            print(f"{shape}: checked {loss}", file=sys.stderr, flush=True)
        del expected, wide
        for _ in range(rounds):
            for head in contestants:
                seconds.setdefault(head.what, []).append(clocked(head.call))
        for head in contestants:
            ratio = np.array(seconds[head.what]) / seconds[BARE]
            row = {"shape": " x ".join(map(str, shape)), "dtype": dtype, "what": head.what, **spread("ratio", ratio)}
            row |= {"milliseconds": 1e3 * np.median(seconds[head.what]), "temporary_mb": head.call.temporary_mb}
            rows.append(row | {"note": notes.get(head.what, "")})
        print(pd.DataFrame(rows[-len(contestants) :]).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def grids(of, rounds: int) -> pd.DataFrame:
    """A row a grid and way to train it: seconds of the whole, compiled before; how many times as long as xentlab's."""
    rows = []
    for grid in of:
        compiled = grid.program()
        ways = {"xentlab": lambda grid=grid, compiled=compiled: grid.trained(compiled)}
        ways["its scans, one after another"] = scans(grid, compiled, 1)
        ways["Python loop of jitted steps"] = python_loop(grid, compiled, work_of(grid, compiled))
        seconds = {name: [clocked(way) for way in [way] * (rounds + 1)][1:] for name, way in ways.items()}
        for name, each in seconds.items():
            row = {"grid": grid.name, "what": name, "runs": len(grid.pairs[0]), "steps": grid.recipe.steps}
            rows.append(row | spread("seconds", np.array(each)) | {"times": np.median(each) / np.median(seconds["xentlab"])})
        print(pd.DataFrame(rows).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def main(
    losses: tuple[str, ...] = ("nll", "brier", "hinge", "entmax15"),
    rounds: int = 7,
    quick: bool = False,
    out: pathlib.Path | None = None,
) -> None:
    """See the top of the file. quick: tiny shapes. Writes chip.csv, chip_race.csv and run.json."""
    begun, folder = time.perf_counter(), new_folder("bench", out or "runs/bench_chip")
    print(f"{jax.default_backend()}: {jax.devices()[0].device_kind}", flush=True)
    write_frame(folder, "chip", heads(losses, TINY if quick else SHAPES, rounds))
    some = [grid.shorter(20, 1) for grid in (MLP,)] if quick else (MLP, TRANSFORMER)
    write_frame(folder, "chip_race", grids(some, 2 if quick else 3))
    versions = {name: metadata.version(name) for name in PACKAGES if importlib.util.find_spec(name.replace("-", "_"))}
    arguments = {"losses": losses, "rounds": rounds, "quick": quick}
    write_record(folder, record(arguments, [], time.perf_counter() - begun, peers=versions))
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
