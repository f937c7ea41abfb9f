"""The benchmark at a small size: numbers are checked before times, memory is measured right, no contestant is dropped."""

import dataclasses
import importlib.util
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import documents, script

from xentlab import LOSSES, LabError, charts

TRAINS = True  # jax-cce promotes dtypes
SHAPE = (48, 16, 320)
NEEDED = {"jax-cce, best chunk": "jax_cce", "torch eager": "torch", "torch linear_cross_entropy, best chunk": "torch"}
THERE = tuple(name for name, package in NEEDED.items() if importlib.util.find_spec(package))


@pytest.fixture(scope="module")
def bench():
    with script("bench_linear_loss") as module:
        yield module


@pytest.fixture(scope="module")
def frame(bench):
    return bench.run(losses=("nll", "hinge"), shapes=(SHAPE,), rounds=3, peers=THERE)


def test_continuous_integration_has_every_peer():
    assert len(THERE) == len(NEEDED) or not os.environ.get("CI"), "CI installs the extra bench"


def test_every_contestant_has_a_row(frame):
    bare = [f"three bare products{how}" for how in ("", ", a turned copy", ", [V, D]")]
    plans = [f"{plan} {loss}" for loss in ("nll", "hinge") for plan in ("naive", "tokens", "stream")]
    assert {*bare, *plans, *THERE} == set(frame.what)
    assert frame.note.tolist() == [""] * len(frame)


def test_ratios_are_to_the_bare_products_of_the_same_round(frame):
    rows = frame.set_index("what")
    assert rows.loc["three bare products", ["ratio_q1", "ratio", "ratio_q3"]].tolist() == [1, 1, 1]
    assert (frame.ratio_q1 <= frame.ratio).all()
    assert (frame.ratio <= frame.ratio_q3).all()
    assert (frame.milliseconds > 0).all()


def test_xlas_count_is_there_for_jax_and_the_measured_peak_for_all(frame):
    assert frame.set_index("what").temporary_mb.isna().to_dict() == {what: what.startswith("torch") for what in frame.what}
    if sys.platform == "linux":
        assert (frame.peak_mb >= 0).all()


def test_block_sizes_are_kept_where_they_were_tried(frame):
    assert frame.block.notna().tolist() == ["best chunk" in what for what in frame.what]


def test_the_chart_of_it_is_drawn(frame, tmp_path):
    assert charts.write_png(charts.heads(frame), tmp_path / "heads.png").stat().st_size > 20_000
    assert charts.write_png(charts.heads(frame.assign(peak_mb=np.nan)), tmp_path / "time.png").stat().st_size > 10_000


@pytest.mark.parametrize("factor", [2.0, np.nan])
def test_a_wrong_gradient_ends_the_benchmark(bench, monkeypatch, factor):
    def wrong(hidden, weight, targets, block=None):
        loss = lambda h, w: jnp.mean(LOSSES["nll"](h @ w.T, jnp.asarray(targets, jnp.int32)))
        value, gradients = jax.value_and_grad(loss, (0, 1))(jnp.asarray(hidden), jnp.asarray(weight))
        return bench.Call(lambda: (value, (gradients[0], factor * gradients[1])))

    monkeypatch.setitem(bench.PEERS, "wrong", dataclasses.replace(bench.PEERS["torch eager"], build=wrong))
    with pytest.raises(LabError, match=r"wrong is wrong: its weight gradient is off by (1\.0e\+00|nan)"):
        bench.run(losses=("nll",), shapes=(SHAPE,), rounds=1, peers=("wrong",))


def test_a_peer_that_does_not_run_is_a_row_that_says_why(bench, monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setitem(bench.PEERS, "broken", dataclasses.replace(bench.PEERS["torch eager"], build=fails))
    frame = bench.run(losses=("nll",), shapes=(SHAPE,), rounds=1, peers=("broken",)).set_index("what")
    assert frame.note["broken"] == "does not run here: RuntimeError: no compiler"
    assert np.isnan(frame.ratio["broken"])
    assert frame.ratio.notna().sum() == len(frame) - 1
    charts.heads(frame.reset_index()).to_dict()


@pytest.mark.parametrize(
    ("peer", "package"),
    [
        ("jax-cce, best chunk", "jax_cce"),
        ("torch eager", "torch"),
        pytest.param(
            "cut-cross-entropy, torch_compile",
            "cut_cross_entropy",
            marks=pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="it asks for torch first"),
        ),
    ],
)
def test_a_missing_package_is_told_with_its_remedy(bench, monkeypatch, peer, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LabError, match=f"{package} is not installed, .*: pip install .*(bench|{package.replace('_', '-')})"):
        bench.run(losses=("nll",), shapes=(SHAPE,), rounds=1, peers=(peer,))


def test_blocks_to_try_divide_the_vocabulary(bench):
    blocks = bench.PEERS["jax-cce, best chunk"].blocks
    for vocab in (64, 32_768, 50_304, 128_256):
        assert all(vocab % block == 0 for block in blocks(1, 1, vocab) if block != 4096)
        assert len(blocks(1, 1, vocab)) <= 7
    assert bench.PEERS["torch linear_cross_entropy, best chunk"].blocks(1024, 1, 1) == [32, 64, 128, 256, 512, 1024]


def test_the_documents_name_who_is_ahead():
    """Two shapes: one with a fastest, one where two are level; and a contestant that did not run is in the table, not ahead."""
    write = documents()
    times = {
        "1 x 2 x 3000": {"bare": 1.0, "naive nll": 2.0, "stream nll": 1.5, "theirs": 1.2, "broken": None},
        "4 x 5 x 6": {"bare": 1.0, "naive nll": 2.0, "stream nll": 1.01, "theirs": 1.0, "broken": None},
    }
    groups = {"bare": "bare", "naive nll": "naive JAX", "stream nll": "xentlab", "theirs": "others", "broken": "others"}
    rows = [
        {"shape": shape, "what": what, "group": groups[what], "loss": None if what == "bare" else "nll", "block": None}
        | {"ratio_q1": time and time - 0.02, "ratio": time, "ratio_q3": time and time + 0.02}
        | {
            "peak_mb": None if time is None else 9.0 if what == "stream nll" else 1000.4,
            "note": "" if time else "has no compiler",
        }
        for shape, each in times.items()
        for what, time in each.items()
    ]
    made = {"rows": rows, "rounds": 7, "threads": 2, "versions": {"jax": "1.0"}, "peers": {"theirs": "2.0"}}
    assert write.ahead(made) == (
        "Fastest for nll: theirs at 1 × 2 × 3,000; theirs and stream nll level at 4 × 5 × 6; the faster of xentlab's plans "
        "takes 1.25, 1.01 times the first's time. Least memory: stream nll at every shape. Of the naive JAX head's time the "
        "faster plan takes 0.75, 0.51 for nll."
    )
    table = write.heads(made)
    assert "| theirs | 1.20 (1.18–1.22) | 1,000 | 1.00 (0.98–1.02) | 1,000 |" in table
    assert "| broken | – | – | – | – |" in table
    assert "broken has no compiler." in table


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_measured_peak_is_what_was_held(bench):
    """In both directions: what NumPy allocated, less what it hands out, and nothing where nothing new is held."""
    held = lambda: np.ones(3 * 2**20)[: 2**20].copy()
    held()
    result, seconds, height = bench.measured(held, 8.0)
    assert result.shape == (2**20,)
    assert seconds > 0
    assert height == pytest.approx(24, abs=2)
    assert bench.measured(lambda: None)[-1] < 2


@pytest.fixture(scope="module")
def chip():
    with script("bench_chip") as module:
        yield module


def test_the_benchmark_for_chips_runs_on_this_one(chip):
    frame = chip.heads(("nll", "entmax15"), chip.TINY, rounds=2, tiles=(None, (16, 128)))
    own = [f"{plan} {loss}" for loss, plans in (("nll", ("tokens", "stream")), ("entmax15", ("tokens",))) for plan in plans]
    named = {what for what in frame.what if not what.startswith(("jax-cce", "torch"))}
    assert named == {chip.BARE, "naive nll", "naive entmax15", *own, *(f"{each}, 16 x 128" for each in own)}
    assert any(frame.what.str.startswith("jax-cce")) == bool(importlib.util.find_spec("jax_cce"))
    assert frame.note.tolist() == [""] * len(frame)
    assert (frame.milliseconds > 0).all()


def test_the_benchmark_for_chips_says_what_is_wrong(chip, monkeypatch):
    wrong = lambda h, w, y, loss, plan, tiles: 2 * jnp.mean(loss(h @ w, y))
    monkeypatch.setattr(sys.modules["bench_linear_loss"], "linear_loss", wrong)
    notes = chip.heads(("nll",), chip.TINY, rounds=1, peers=False).set_index("what").note
    assert notes["naive nll"] == ""
    assert notes["stream nll"].startswith("stream nll is wrong: its value is off by 1.0e+00")
