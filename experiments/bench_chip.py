"""What does a head cost on this GPU or TPU, xentlab's and others', beside the matrix products that none can do without?

Value and gradients by hidden states and weight, as `bench_linear_loss.py` has them for a CPU: all contestants run in turn,
round after round, and the table has medians of their ratio to three bare products in the same round, with the quartiles.
Memory is what a call holds beside its arguments and gradients, by XLA's count or torch's. Numbers are checked against the
naive head's in float32, and a row says if they are wrong. Others' heads run if they are there: `pip install jax-cce torch
liger-kernel cut-cross-entropy`. And a grid of training runs, laid out as `xentlab race` lays it out here, beside the same
program run by run and a loop of jitted steps.
"""

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
from bench_linear_loss import BARE, Contestant, check, heads_of
from bench_peers import Call, clocked, jitted, package, spread, telling
from bench_race import ONE_BY_ONE, OURS, scans, timed
from bench_race_peers import LOOP, MLP, TRANSFORMER, python_loop, work_of

from xentlab import LabError
from xentlab.runs import new_folder, record, write_frame, write_record

PACKAGES = ("torch", "jax-cce", "liger-kernel", "cut-cross-entropy")
SHAPES = ((4096, 1024, 50_304, "float32"), (8192, 2304, 256_000, "bfloat16"))  # tokens, features, vocabulary
TINY = ((64, 16, 512, "float32"),)
TOLERANCE = 2e-2  # of the greatest entry: products of float32 are TF32 there, and a gradient in bfloat16 is rounded to it


def numbers(tokens: int, features: int, vocab: int, dtype: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [N, D] and a weight [D, V] whose logits have a variance of 1, and targets [N]; made on the chip."""
    keys = jax.random.split(jax.random.key(0), 3)
    drawn = lambda key, *shape: (jax.random.normal(key, shape) / features**0.25).astype(dtype)
    return drawn(keys[0], tokens, features), drawn(keys[1], features, vocab), jax.random.randint(keys[2], (tokens,), 0, vocab)


def bare(hidden: jax.Array, weight: jax.Array) -> Any:
    """Logits, and two products of their size, in the type of what is multiplied."""
    z = hidden @ weight
    return z[0, 0], (z @ weight.T, hidden.T @ z)


def torched(head: Callable, arrays) -> Call:
    """A function of torch tensors hidden [N, D], weight [V, D] and targets on this GPU."""
    torch = package("torch")
    hidden, weight, targets = (torch.from_dlpack(each).clone() for each in arrays)
    leaves, labels = [hidden.requires_grad_(), weight.T.contiguous().requires_grad_()], targets.long()

    def call():
        value = head(*leaves, labels)
        gradients = torch.autograd.grad(value, leaves)
        torch.cuda.synchronize()
        # Where they lie, as `check` can read them.
        return jnp.from_dlpack(value.detach()), tuple(jnp.from_dlpack(each.contiguous()) for each in gradients)

    call()
    outputs, before = sum(each.nbytes for each in leaves), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return Call(call, (torch.cuda.max_memory_allocated() - before - outputs) / 2**20)


def others(arrays) -> Iterator[Contestant]:
    """Others' heads for nll, as their authors have them run on a GPU, if they are there."""
    there = importlib.util.find_spec
    theirs = functools.partial(Contestant, group="others", loss="nll", vocab_first=True)
    if there("jax_cce"):
        hidden, weight, targets = arrays
        head = package("jax_cce").linear_cross_entropy
        for block in (4096, 16_384):
            loss = lambda h, w, block=block: head(h, w, targets, chunk_size=block)
            yield theirs(f"jax-cce, {block}", call=jitted(jax.value_and_grad(loss, (0, 1)), hidden, weight.T))
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
            yield theirs(name, call=torched(build(), arrays))
        except Exception as error:  # a peer that does not run here is no reason to have no benchmark
            print(f"{name} does not run here: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr, flush=True)


def heads(losses, shapes, rounds: int, peers: bool = True, tiles=(None,)) -> pd.DataFrame:
    """A row a shape and head: ratio to the bare products (median, quartiles), milliseconds, temporary MB, what is wrong."""
    rows = []
    for *shape, dtype in shapes:
        say = telling(shape)
        arrays, notes = numbers(*shape, dtype), {}
        contestants = [Contestant(BARE, "bare", "", jitted(bare, *arrays[:2]))]
        contestants += [head for loss in losses for head in heads_of(loss, *arrays, tiles)]
        contestants += others(arrays) if peers and "nll" in losses else ()
        wide = *(each.astype(jnp.float32) for each in arrays[:2]), arrays[2]
        for loss in losses:
            expected = heads_of(loss, *wide, tiles=())[0].call()
            for head in (each for each in contestants if each.loss == loss):
                try:
                    check(head, head.call(), expected, TOLERANCE)
                except LabError as error:  # what is wrong is timed, and said to be
                    notes[head.what] = str(error)
            say(f"checked {loss}")
        del expected, wide
        seconds = timed({head.what: functools.partial(clocked, head.call) for head in contestants}, rounds, say)
        for head in contestants:
            ratio = seconds[head.what] / seconds[BARE]
            row = {"shape": " x ".join(map(str, shape)), "dtype": dtype, "what": head.what, "loss": head.loss}
            row |= spread("ratio", ratio) | {"milliseconds": 1e3 * np.median(seconds[head.what])}
            rows.append(row | {"temporary_mb": head.call.temporary_mb, "note": notes.get(head.what, "")})
        print(pd.DataFrame(rows[-len(contestants) :]).round(3).to_string(index=False), flush=True)
    return pd.DataFrame(rows)


def grids(of, rounds: int) -> pd.DataFrame:
    """A row a grid and way to train it: seconds of the whole, compiled before; how many times as long as xentlab's."""
    rows = []
    for grid in of:
        compiled = grid.program()
        ways = {OURS: functools.partial(grid.trained, compiled), ONE_BY_ONE: scans(grid, compiled, 1)}
        ways[LOOP] = python_loop(grid, compiled, work_of(grid, compiled))
        seconds = timed({name: functools.partial(clocked, way) for name, way in ways.items()}, rounds, telling(grid.name))
        for name, each in seconds.items():
            row = {"grid": grid.name, "what": name, "runs": len(grid.pairs[0]), "steps": grid.recipe.steps}
            rows.append(row | spread("seconds", each) | {"times": np.median(each) / np.median(seconds[OURS])})
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
