"""The race of trainings at a tiny size: peers train what xentlab trains, ratios are those of a round, nobody is dropped."""

import concurrent.futures
import dataclasses
import importlib.util
import os

import jax.numpy as jnp
import numpy as np
import pytest
from scripts import script

from xentlab import LabError, charts

TRAINS = True
TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not TORCH, reason="torch is in the extra bench")


@pytest.fixture(scope="module")
def bench():
    with script("bench_race") as module:
        yield module


@pytest.fixture(scope="module")
def by_hand(bench):
    """The peers' module."""
    import bench_race_peers

    return bench_race_peers


@pytest.fixture(scope="module")
def workers():
    """In this process: torch's start in others is what takes long."""
    with concurrent.futures.ThreadPoolExecutor(1) as one, concurrent.futures.ThreadPoolExecutor(1) as other:
        yield [one, other] if TORCH else []


@pytest.fixture(scope="module")
def tiny(bench):
    """Two runs of four steps."""
    return dataclasses.replace(bench.MLP.shorter(4, 2), rates=(1e-2,), seeds=2)


@pytest.fixture(scope="module")
def frame(bench, tiny):
    return bench.run((tiny,), rounds=1, runs=(1, 2), devices=(2,), steps=2)


def test_continuous_integration_has_torch():
    assert TORCH or not os.environ.get("CI"), "CI installs the extra bench"


@pytest.mark.parametrize("name", ["MLP", "TRANSFORMER"])
def test_peers_train_what_xentlab_trains(by_hand, workers, name, monkeypatch):
    monkeypatch.setattr(by_hand, "CHECKED", 5)
    grid = dataclasses.replace(getattr(by_hand, name), rates=(1e-3, 1e-2), seeds=2)
    off = by_hand.check(grid, workers)
    assert set(off) == ({by_hand.LOOP, by_hand.TORCH, by_hand.TORCHES} if workers else {by_hand.LOOP})


def test_a_peer_that_trains_something_else_ends_the_benchmark(by_hand, tiny, monkeypatch):
    right = by_hand.mlp_by_hand
    monkeypatch.setattr(by_hand, "mlp_by_hand", lambda arrays, tokens: right(arrays, tokens[:, ::-1]))
    with pytest.raises(LabError, match=r"Python loop of jitted steps trains another mlp: a loss is off by"):
        by_hand.check(tiny, [])


@needs_torch
def test_two_processes_give_every_run_once_and_in_order(by_hand, workers, tiny):
    grid = dataclasses.replace(tiny, seeds=3)
    calls = by_hand.peers(grid, grid.program(), workers)
    np.testing.assert_allclose(calls[by_hand.TORCHES](), calls[by_hand.TORCH](), rtol=1e-5)


@pytest.mark.parametrize("name", ["MLP", "TRANSFORMER"])
def test_the_floor_has_three_products_a_layer_and_keeps_its_numbers(bench, name):
    grid = dataclasses.replace(getattr(bench, name).shorter(3, 1), seeds=1)
    ends = bench.bare(grid)()
    assert len(ends) == len(grid.rates)
    for inputs, gradients in ends:
        assert [each.shape for each in inputs] == [shape[:-1] for shape in grid.products]
        assert [each.shape for each in gradients] == [(*shape[:-3], *shape[-2:]) for shape in grid.products]
        # Orthonormal weights project: what is left is neither 0 nor more than what there was.
        assert all(0.05 < float(jnp.std(each)) < 1.1 for each in inputs)


def test_every_contestant_has_a_row(bench, frame):
    rows = frame[frame.grid == "mlp"]
    assert rows.what.tolist() == list(bench.GROUPS)
    missing = rows[rows.note != ""]
    assert set(missing.what) == (set() if TORCH else {bench.TORCH, bench.TORCHES})
    assert (rows.seconds.dropna() > 0).all()


def test_the_frame_has_its_columns(bench, frame):
    measured = [f"{name}{end}" for name in ("seconds", "to_floor", "gain") for end in bench.QUARTILES]
    assert {"grid", "what", "group", "runs", "devices", "steps", "note", *measured[: 9 if TORCH else 6]} == set(frame.columns)
    scaled = frame[frame.grid == "mlp, scaled"]
    assert scaled.runs.tolist() == [1, 2, bench.MESHED]
    assert scaled.devices.tolist() == [1, 1, 2]
    assert scaled.to_floor.isna().all()


def test_ratios_are_those_of_a_round(bench, tiny, monkeypatch):
    """Times that double from round to round: ratios do not, and the round that warms up does not count."""
    factors = {bench.FLOOR: 1, bench.OURS: 3, bench.TORCH: 12}
    turns = {name: iter([5.0, *(factor * 2.0**turn for turn in range(3))]) for name, factor in factors.items()}
    calls = {name: lambda name=name: next(turns[name]) for name in turns}
    monkeypatch.setattr(bench, "check", lambda *_: {})
    monkeypatch.setattr(bench, "torch_workers", lambda: concurrent.futures.ThreadPoolExecutor(1))
    monkeypatch.setattr(bench, "contestants", lambda *_: calls)
    rows = {row["what"]: row for row in bench.raced(tiny, 3, lambda _: None)}
    assert [rows[bench.OURS][f"to_floor{end}"] for end in bench.QUARTILES] == [3, 3, 3]
    assert [rows[bench.OURS][f"gain{end}"] for end in bench.QUARTILES] == [4, 4, 4]
    assert rows[bench.OURS]["seconds"] == 6
    assert "seconds" not in rows[bench.WIDE]


def test_the_chart_of_it_is_drawn_and_the_table_shown(bench, frame, tmp_path):
    assert charts.write_png(bench.chart(frame), tmp_path / "race.png").stat().st_size > 20_000
    assert all(name in bench.shown(frame) for name in bench.GROUPS)
