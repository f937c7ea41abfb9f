"""What does a head cost, xentlab's and others', beside the matrix products that none can do without?

Value and gradients by hidden states and weight, float32, two threads for everyone. All contestants run in turn, round after
round, each in another order; the table has medians of their ratio to three bare products in the same round, with the quartiles,
and the most that the process held meanwhile. None is timed before its numbers agree with the naive head's. `--quick` takes the
first shape. Needs `pip install -e '.[bench]'` and `pip install --no-deps 'cut-cross-entropy>=25.1'` (bench_peers.py says why),
and a C++ compiler.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from bench_memory import measured
from bench_peers import PACKAGES, PEERS, SHAPES, THREADS, Call, clocked, jitted, numbers, settle, spread, telling
from bench_peers import run as sweep

from xentlab import LOSSES, LabError, charts, linear_loss
from xentlab.linear.form import stream_of
from xentlab.products import product, turned
from xentlab.runs import new_folder, record, write_frame, write_record

BARE = "three bare products"
TURNED = f"{BARE}, a turned copy"
# Of the greatest entry. Brier's gradient at such vocabularies is a difference of nearly equal numbers: at the first shape the
# naive head's own is off by 4e-4 from float64, and xentlab's by 2e-4, so that losses other than nll cannot agree as nearly.
TOLERANCES = {"nll": 1e-4}
LOOSE = 2e-2
SLOW = 5


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A head to time: what it is called, whose it is, its loss, what runs it, and its block size if it was found by trying.

    call is None where it does not run, and note says why. vocab_first: its gradient by the weight is [V, D].
    """

    what: str
    group: str
    loss: str
    call: Call | None
    block: int | None = None
    vocab_first: bool = False
    note: str = ""


def bare(hidden, weight, vocab_axis: int = 1, turn: bool = False):
    """Logits, and two products of their size: what value and gradients need at the least; the "value" is any number of them.

    turn: the weight's, by the faster of XLA's two kernels on a CPU, as xentlab's heads take it.
    """
    z = product(hidden, weight, 1, 1 - vocab_axis)
    if turn:
        by_weight = product(turned(hidden), z, 1, 0)
    else:
        by_weight = product(hidden, z, 0, 0) if vocab_axis else product(z, hidden, 0, 0)
    return z[0, 0], (product(z, weight, 1, vocab_axis), by_weight)


def own(losses, hidden, weight, targets) -> list[Contestant]:
    """The bare products, and for each loss the naive head and each of xentlab's plans; weight [D, V]."""
    found = [Contestant(BARE, "bare", "", jitted(bare, hidden, weight))]
    found.append(Contestant(TURNED, "bare", "", jitted(functools.partial(bare, turn=True), hidden, weight)))
    # As others have the weight.
    found.append(Contestant(f"{BARE}, [V, D]", "bare", "", jitted(functools.partial(bare, vocab_axis=0), hidden, weight.T)))
    return found + [head for name in losses for head in heads_of(name, hidden, weight, targets)]


def heads_of(name: str, hidden, weight, targets, tiles=(None,)) -> list[Contestant]:
    """A loss's naive head, and each of xentlab's plans by each of the tiles (tokens a chunk, classes a tile); weight [D, V]."""
    loss = LOSSES[name]
    call = lambda head: jitted(jax.value_and_grad(head, (0, 1)), hidden, weight, targets)
    found = [Contestant(f"naive {name}", "naive JAX", name, call(lambda h, w, y: jnp.mean(loss(h @ w, y))))]
    for plan in ("tokens", "stream") if stream_of(loss) else ("tokens",):
        for tile in tiles:
            said = "" if tile is None else f", {tile[0]} x {tile[1]}"
            head = functools.partial(linear_loss, loss=loss, plan=plan, tiles=tile)
            found.append(Contestant(f"{plan} {name}{said}", "xentlab", name, call(head)))
    return found


def others(peers, shape, arrays, tries: int) -> list[Contestant]:
    """Others' heads for nll, each at the block size that is the fastest here in so many tries, or at none of its own."""
    found = []
    for name in peers:
        group = "others" if PEERS[name].loss else "bare"
        peer = Contestant(name, group, PEERS[name].loss, None, vocab_first=True)
        try:
            block, *more = PEERS[name].blocks(*shape)
            if more:
                block = int(sweep([shape], [name], tries).query("best").block.iloc[0])
            found.append(dataclasses.replace(peer, call=PEERS[name].build(*arrays, block), block=block))
        except LabError:
            raise
        except Exception as error:
            found.append(unable(peer, error))
    return found


def unable(peer: Contestant, error: Exception) -> Contestant:
    """A peer that does not run here: a row that says so, not the end of the benchmark."""
    first_line = (str(error).splitlines() or [""])[0][:200]
    note = f"does not run here: {type(error).__name__}: {first_line}"
    print(f"{peer.what} {note}", file=sys.stderr, flush=True)
    return dataclasses.replace(peer, call=None, block=None, note=note)


@jax.jit
def off_by(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """The greatest difference, as a part of the greatest wanted; NaN, which a maximum of XLA's may lose on a CPU, if one is."""
    difference = found.astype(jnp.float32) - wanted
    off = jnp.max(jnp.abs(difference)) / jnp.max(jnp.abs(wanted))
    return jnp.where(jnp.all(jnp.isfinite(difference)), off, jnp.nan)


def check(each: Contestant, result: Any, expected: Any, allowed: float) -> None:
    """Raises `LabError` if value or gradients are off from those expected by more than is allowed of the greatest entry."""
    (value, (by_hidden, by_weight)), (right, gradients) = result, expected
    parts = {
        "value": (value, right),
        "hidden gradient": (by_hidden, gradients[0]),
        "weight gradient": (by_weight, gradients[1].T if each.vocab_first else gradients[1]),
    }
    for part, (found, wanted) in parts.items():
        off = float(off_by(jnp.asarray(found), wanted))
        if not off <= allowed:
            raise LabError(f"{each.what} is wrong: its {part} is off by {off:.1e} of the naive head's; {allowed} is allowed.")


def checked(contestants, outputs_mb: float) -> tuple[list[Contestant], dict[str, float], dict[str, float]]:
    """A first call of each, whose numbers must be right: the contestants, which of them run; the seconds; the MB held."""
    found, seconds, held, expected = [], {}, {}, {}
    for each in contestants:
        try:
            if each.call:
                result, seconds[each.what], held[each.what] = measured(each.call, outputs_mb)
        except Exception as error:
            if isinstance(error, LabError) or each.what not in PEERS:
                raise
            each = unable(each, error)
        found.append(each)
        if each.group == "naive JAX":
            expected[each.loss] = result
        elif each.call and each.loss:
            check(each, result, expected[each.loss], TOLERANCES.get(each.loss, LOOSE))
    return found, seconds, held


def ratios(contestants, first: dict[str, float], rounds: int, say) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Each one's times to the bare products' in the same round, and its median seconds; all are called in turn.

    A round has an order of its own, drawn, with the bare products first, in the middle and last, whose mean is taken: what the
    machine does meanwhile, and what one call leaves behind for the next, is nobody's lot in every round. What took more than
    SLOW times the bare products in the round that checked is not called again: one time is enough to see that it is slow, and
    it is the one that is told.
    """
    calls = {each.what: each.call for each in contestants if first[each.what] <= SLOW * first[BARE]}
    seconds, drawn = {what: [] for what in calls}, np.random.default_rng(0)
    for turn in range(1, rounds + 1):
        say(f"round {turn} of {rounds}")
        order = list(drawn.permutation([what for what in calls if what != BARE]))
        middle, bare = len(order) // 2, []
        for what in (BARE, *order[:middle], BARE, *order[middle:], BARE):
            (bare if what == BARE else seconds[what]).append(clocked(calls[what]))
        seconds[BARE].append(np.mean(bare))
    once = {what: ([took], [first[BARE]]) for what, took in first.items()}
    told = once | {what: (took, seconds[BARE]) for what, took in seconds.items()}
    ratio = {what: np.divide(took, bare) for what, (took, bare) in told.items()}
    return ratio, {what: float(np.median(took)) for what, (took, _) in told.items()}


def run(losses=("nll", "brier", "hinge"), shapes=SHAPES, rounds: int = 7, peers=tuple(PEERS), tries: int = 2) -> pd.DataFrame:
    """A row a shape and contestant: ratio to the bare products (median, quartiles), milliseconds, MB by XLA and as measured.

    Peers have nll alone, and are there if it is among the losses. Raises `LabError` where a number is wrong or a peer is not
    installed; a peer that does not run has a row with a note.
    """
    rows = []
    for shape in shapes:
        written = " x ".join(map(str, shape))
        say = telling(written)
        hidden, weight, targets = numbers(*shape)
        say("compiling, trying the peers' block sizes")
        contestants = own(losses, jnp.asarray(hidden), jnp.asarray(weight.T.copy()), jnp.asarray(targets, jnp.int32))
        contestants += others(peers if "nll" in losses else (), shape, (hidden, weight, targets), tries)
        contestants.sort(key=lambda each: ("", *losses).index(each.loss))
        say("checking values and gradients, measuring memory")
        contestants, first, held = checked(contestants, (hidden.nbytes + weight.nbytes) / 2**20)
        ratio, seconds = ratios([each for each in contestants if each.call], first, rounds, say)
        for each in contestants:
            row = {"shape": written, "what": each.what, "group": each.group, "loss": each.loss, "block": each.block}
            if each.call:
                row |= spread("ratio", ratio[each.what]) | {"milliseconds": 1e3 * seconds[each.what]}
                row |= {"temporary_mb": each.call.temporary_mb, "peak_mb": held[each.what]}
            rows.append(row | {"note": each.note})
        print(
            pd.DataFrame(rows[-len(contestants) :]).drop(columns=["shape", "note"]).round(2).to_string(index=False), flush=True
        )
    return pd.DataFrame(rows)


def main(
    losses: tuple[str, ...] = ("nll", "brier", "hinge"), rounds: int = 7, quick: bool = False, out: pathlib.Path | None = None
) -> None:
    """See the top of the file. Writes heads.csv, heads.png and run.json.

    quick: the first shape, 2 rounds, and each block size tried once.
    """
    settle()
    begun, shapes, rounds = time.perf_counter(), SHAPES[:1] if quick else SHAPES, 2 if quick else rounds
    folder = new_folder("bench", out or "runs/bench_linear_loss")
    frame = run(losses, shapes, rounds, tries=1 if quick else 2)
    write_frame(folder, "heads", frame)
    charts.write_png(charts.heads(frame), folder / "heads.png", scale=2)
    arguments = {"losses": losses, "rounds": rounds, "quick": quick, "shapes": shapes, "threads": THREADS}
    versions = {name: metadata.version(name) for name in PACKAGES}
    write_record(folder, record(arguments, [], time.perf_counter() - begun, peers=versions))
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
