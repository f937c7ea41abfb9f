"""How fast is a grid of runs trained, beside what one would write by hand?

Two grids: an n-gram MLP's, 32 runs of 500 steps of 64 tokens, and a small transformer's. By `xentlab.training.train`, by the
peers of `bench_race_peers.py`, by its own scans laid out otherwise, and the matrix products of the steps alone, laid out alike.
All run in turn, round after round, on two cores: medians of the seconds, and of ratios in the same round, with quartiles. No
peer is timed before its losses are xentlab's. Everyone validates, twice a run and little. What is not said to compile has
compiled; "cold" is a new process, and "cached" one that finds the programs in JAX's cache. `--quick` takes small sizes.
"""

import concurrent.futures
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro
from bench_peers import QUARTILES, THREADS, clocked, on_two_cores, spread, telling
from bench_race_peers import (
    LOOP,
    MLP,
    NLL,
    NO_TORCH,
    SPAWN,
    TORCH,
    TORCHES,
    TRANSFORMER,
    Grid,
    check,
    peers,
    source,
    torch_workers,
)

from xentlab import charts
from xentlab.cache import keep_compiled
from xentlab.layout import preferred
from xentlab.mesh import make_mesh
from xentlab.program import Program, program
from xentlab.runs import new_folder, record, write_frame, write_record
from xentlab.training import train

FLOOR, OURS = "matrix products alone", "xentlab"
CACHED, COLD = f"{OURS}, compiling, cached", f"{OURS}, compiling, cold"
ONE_BY_ONE, WIDE = "its scans, one after another", "its scan, one vmap of all runs"
GROUPS = {FLOOR: "floor", OURS: "xentlab", CACHED: "xentlab", COLD: "xentlab"}
GROUPS |= {ONE_BY_ONE: "other layouts", WIDE: "other layouts", LOOP: "by hand", TORCHES: "by hand", TORCH: "by hand"}
RUNS, DEVICES = tuple(2**n for n in range(9)), (1, 2, 4, 8)
MESHED = 32  # runs, for the devices to share out


def bare(grid: Grid) -> Callable[[], Any]:
    """A step's products alone, forward, by input and by weight, in compiled scans laid out as `train` lays out runs.

    A weight's columns or rows are orthonormal: an input's gradient, which is the next step's input, keeps its size.
    """
    rng, inputs, weights = np.random.default_rng(0), [], []
    for *many, rows, width, out in grid.products:
        inputs.append(jnp.asarray(rng.standard_normal((*many, rows, width)), jnp.float32))
        tall = np.linalg.qr(rng.standard_normal((*many, max(width, out), min(width, out)))).Q
        weights.append(jnp.asarray(tall if width >= out else tall.swapaxes(-1, -2), jnp.float32))

    @jax.jit
    def scan(inputs, weights):
        def step(carry, _):
            forward = [x @ w for x, w in zip(carry[0], weights, strict=True)]
            # The faster of XLA's two kernels for it: see models.py.
            by_weight = [jax.lax.optimization_barrier(x.mT) @ z for x, z in zip(carry[0], forward, strict=True)]
            return ([jnp.einsum("...mn,...kn->...mk", z, w) for z, w in zip(forward, weights, strict=True)], by_weight), None

        return jax.lax.scan(step, (inputs, weights), length=grid.recipe.steps)[0]

    runs = len(grid.pairs[0])

    def call():
        with concurrent.futures.ThreadPoolExecutor(preferred(runs).at_a_time) as pool:
            return list(pool.map(lambda _: jax.block_until_ready(scan(inputs, weights)), range(runs)))

    return call


def scans(grid: Grid, compiled: Program, width: int) -> Callable[[], Any]:
    """xentlab's compiled blocks of `width` runs at once, one after another."""
    rates, seeds = grid.pairs

    def call():
        losses = []
        for first in range(0, len(rates), width):
            some = slice(first, first + width)
            states = compiled.begin(rates[some], seeds[some])
            for start, places in compiled.draws(seeds[some].tolist()):
                states, loss = compiled.block(rates[some], states, start, places)
                losses.append(jax.tree.map(np.asarray, (loss, compiled.measure(states))))
        return losses

    return call


def compiling(grid: Grid, cache: str) -> float:
    """The seconds of `train` in a process that has compiled nothing yet, and keeps what it compiles in a folder."""
    on_two_cores()
    os.environ["XENTLAB_CACHE"] = cache
    keep_compiled()
    source().split("train")
    return clocked(grid.trained)


def on_devices(grid: Grid, devices: int, rounds: int) -> list[float]:
    """Seconds of `train` on a mesh of virtual devices, which take different runs; to call in a process of its own."""
    on_two_cores()
    mesh = make_mesh({"runs": devices})
    compiled = program(NLL, source(), grid.model, grid.recipe, mesh)
    again = functools.partial(train, NLL, source(), grid.model, grid.rates, range(grid.seeds), grid.recipe, mesh=mesh)
    return [clocked(lambda: again(compiled=compiled)) for _ in range(rounds + 1)][1:]


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """A function's result in a process of its own, whose start is not in it."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


def contestants(grid: Grid, workers, cache: str) -> dict[str, Callable[[], float]]:
    """Everyone who trains the grid, by name: a call gives its seconds."""
    compiled = grid.program()
    calls = {FLOOR: bare(grid), OURS: lambda: grid.trained(compiled), ONE_BY_ONE: scans(grid, compiled, 1)}
    calls |= {WIDE: scans(grid, compiled, len(grid.pairs[0])), **peers(grid, compiled, workers)}
    found = {name: functools.partial(clocked, call) for name, call in calls.items()}

    def cold():
        shutil.rmtree(cache, ignore_errors=True)
        return in_new_process(compiling, grid, cache)

    return found | {COLD: cold, CACHED: lambda: in_new_process(compiling, grid, cache)}


def timed(calls: dict[str, Callable[[], float]], rounds: int, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """Each call's seconds [rounds], all in turn; a round before the first warms up."""
    seconds = {name: [] for name in calls}
    for turn in range(rounds + 1):
        say(f"round {turn} of {rounds}" if turn else "a round that warms up")
        for name, call in calls.items():
            if turn or name not in (COLD, CACHED):  # which are never warm
                seconds[name].append(call())
    return {name: np.array(each[-rounds:]) for name, each in seconds.items()}


def raced(grid: Grid, rounds: int, say: Callable[[str], None]) -> list[dict]:
    """A row a contestant."""
    say("checking the peers' losses")
    with torch_workers() as workers, tempfile.TemporaryDirectory() as folder:
        check(grid, workers)
        seconds = timed(contestants(grid, workers, f"{folder}/cache"), rounds, say)
    rows = []
    for name, group in GROUPS.items():
        row = {"what": name, "group": group, "runs": len(grid.pairs[0]), "devices": 1, "steps": grid.recipe.steps}
        if name in seconds:
            row |= spread("seconds", seconds[name]) | spread("to_floor", seconds[name] / seconds[FLOOR])
            if TORCH in seconds:
                row |= spread("gain", seconds[TORCH] / seconds[name])
        rows.append(row | {"note": "" if name in seconds else NO_TORCH})
    return rows


def scaled(grid: Grid, runs, devices, rounds: int, say: Callable[[str], None]) -> list[dict]:
    """xentlab with more runs of one rate, then of MESHED with more devices that share them out: a row a number of them."""
    grids = {count: dataclasses.replace(grid, rates=grid.rates[:1], seeds=count) for count in runs}
    compiled = grid.program()
    calls = {count: lambda one=one: clocked(lambda: one.trained(compiled)) for count, one in grids.items()}
    more_runs = timed(calls, rounds, lambda what: say(f"more runs, {what}"))
    row = {"what": OURS, "group": "xentlab", "steps": grid.recipe.steps, "note": ""}
    rows = [row | {"runs": count, "devices": 1, **spread("seconds", each)} for count, each in more_runs.items()]
    few = dataclasses.replace(grid, rates=grid.rates[:1], seeds=MESHED)
    for count in devices:
        say(f"{count} devices")
        taken = np.array(in_new_process(on_devices, few, count, rounds))
        rows.append(row | {"what": f"{OURS}, mesh", "runs": MESHED, "devices": count, **spread("seconds", taken)})
    return rows


def run(grids=(MLP, TRANSFORMER), rounds: int = 5, runs=RUNS, devices=DEVICES, steps: int = 50) -> pd.DataFrame:
    """A row a grid and contestant, and, under "mlp, scaled", one a number of runs or devices of `steps` steps each.

    seconds, to_floor (own time / the bare products'), gain (torch eager's / own): medians with quartiles, _q1 and _q3. What
    lacks its package has a note instead. Raises `LabError` where a peer trains something else.
    """
    rows = []
    for grid in grids:
        rows += [{"grid": grid.name, **row} for row in raced(grid, rounds, telling(grid.name))]
    short = grids[0].shorter(steps, 1)
    rows += [{"grid": f"{short.name}, scaled", **row} for row in scaled(short, runs, devices, rounds, telling(short.name))]
    return pd.DataFrame(rows)


def chart(frame: pd.DataFrame) -> alt.VConcatChart:
    """Above, each contestant's seconds, a column a grid; below, seconds a run by the number of runs, and by that of devices."""
    rows = frame.dropna(subset=["seconds"])
    hues = alt.Color("group:N", title=None, legend=alt.Legend(orient="bottom", symbolOpacity=1)).scale(
        domain=list(dict.fromkeys(GROUPS.values())),
        range=[charts.HUES[i] for i in (7, 0, 3, 1)],  # as in `charts.heads`
    )
    above, below = [], []
    for name, part in rows[rows.to_floor.notna()].groupby("grid", sort=False):
        base = alt.Chart(part, title=f"{name}, {part.runs.iloc[0]} runs of {part.steps.iloc[0]} steps").encode(
            y=alt.Y("what:N", sort=list(GROUPS), title=None).axis(labelLimit=300, ticks=False, domain=False, grid=True)
        )
        x = alt.X("seconds:Q", title="seconds").axis(values=[0.5, 1, 2, 4, 8, 16, 32])
        x = x.scale(type="log", domain=[part.seconds.min() / 1.5, part.seconds.max() * 2.5], nice=False)
        bars = base.mark_rule(strokeWidth=3, opacity=0.6).encode(
            alt.X("seconds_q1:Q", title="seconds"), alt.X2("seconds_q3:Q", title="seconds"), hues
        )
        dots, beyond = base.mark_circle(size=60, opacity=1).encode(x, hues), alt.X("seconds_q3:Q", title="seconds")
        written = charts.beside(base, beyond, alt.Text("seconds:Q", format=".2f"))
        above.append(alt.layer(bars, dots, *written).properties(width=300, height=190))
    for what, axis in ((OURS, "runs"), (f"{OURS}, mesh", "devices")):
        part = rows[(rows.what == what) & rows.to_floor.isna()].assign(each=lambda rows: 1e3 * rows.seconds / rows.runs)
        runs = "by the number of runs" if axis == "runs" else f"{part.runs.iloc[0]} runs on a mesh, by the number of devices"
        title = alt.Title(f"mlp, {part.steps.iloc[0]} steps a run", subtitle=runs)
        line = alt.Chart(part, title=title).mark_line(point=alt.OverlayMarkDef(color=charts.HUES[0]), color=charts.HUES[0])
        x = alt.X(f"{axis}:Q").scale(type="log", base=2).axis(values=sorted(part[axis]))
        below.append(
            line.encode(x, alt.Y("each:Q", title="milliseconds a run").scale(zero=True)).properties(width=300, height=150)
        )
    return alt.vconcat(alt.hconcat(*above), alt.hconcat(*below)).configure_view(strokeOpacity=0.3)


def shown(frame: pd.DataFrame) -> str:
    """The frame as a table to print."""
    columns = [
        "what",
        "runs",
        "devices",
        "steps",
        *(f"{name}{end}" for name in ("seconds", "to_floor", "gain") for end in QUARTILES),
    ]
    parts = [
        f"{name}\n{part[columns].dropna(axis=1, how='all').round(3).to_string(index=False)}"
        for name, part in frame.groupby("grid", sort=False)
    ]
    return "\n\n".join([*parts, *frame.note[frame.note != ""].unique()])


def main(rounds: int = 5, quick: bool = False, out: pathlib.Path | None = None) -> None:
    """See the top of the file. Writes race.csv, race.png and run.json."""
    on_two_cores()
    begun, folder = time.perf_counter(), new_folder("bench", out or "runs/bench_race")
    if quick:
        small = [dataclasses.replace(grid.shorter(steps, 1), seeds=2) for grid, steps in ((MLP, 50), (TRANSFORMER, 5))]
        frame = run(small, rounds=2, runs=(1, 2, 8), devices=(1, 2), steps=20)
    else:
        frame = run(rounds=rounds)
    print(shown(frame), flush=True)
    write_frame(folder, "race", frame)
    charts.write_png(chart(frame), folder / "race.png", scale=2)
    arguments = {
        "rounds": rounds,
        "quick": quick,
        "threads": THREADS,
        "grids": [dataclasses.asdict(each) for each in (MLP, TRANSFORMER)],
    }
    versions = {} if NO_TORCH else {"torch": metadata.version("torch")}
    write_record(folder, record(arguments, [source().describe()], time.perf_counter() - begun, peers=versions))
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
