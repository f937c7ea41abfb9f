"""What the literature reports, tried again: a tiny run of each has its numbers, and verdicts follow the numbers alone."""

import itertools
import json

import jax
import numpy as np
import pandas as pd
import pytest

from xentlab import resolve
from xentlab.models import logits, resolve_model
from xentlab.recipe import Recipe
from xentlab.results import paired
from xentlab.sources import MarkovSource
from xentlab.tour import reported
from xentlab.tour.walk import experiments_folder, load
from xentlab.training import train

TRAINS = True
SMALL = "mlp(context=2, width=4, inner=8, features=4)"
# As few programs as there are ways through a script: compiling them is what takes the time.
TINY = {
    "from_scratch_or_fine_tuned": {"model": SMALL, "rates": (0.01,), "steps": 4, "further": 2, "losses": ("nll", "brier")},
    "vocabulary_sweep": {
        **{"vocabularies": (4,), "models": {"table": "bigram"}, "rates": (0.01,), "steps": 4},
        "losses": ("nll", "mse_logits(k=15, M=30)"),
    },
    "label_noise": {"model": SMALL, "shares": (0.4,), "rates": (0.01,), "steps": 4, "losses": ("mae",)},
    "bad_init": {"model": SMALL, "rates": {"sgd": (1.0,)}, "scales": (50,), "steps": 4, "further": 2, "losses": ("nll",)},
}
# Worlds where all is as reported: sources, losses, and by how much a loss differs from nll, by its place and the source's.
AS_REPORTED = {
    "from_scratch_or_fine_tuned": (
        ("from scratch", "after nll", "after nll, one rate"),
        ("nll", "brier", "spherical"),
        lambda loss, source: {"test_nll": (1, 0.2, 0.4)[source], "accuracy": (-0.1, 0.1, 0.2)[source]},
    ),
    "vocabulary_sweep": (
        ("table, V = 8", "table, V = 64", "table, V = 512"),
        ("nll", "mse_logits", "mse_logits(k=15, M=30)"),
        lambda loss, source: {"accuracy": (1 + source) * (-1) ** loss, "kl_to_law": (1 + source) / loss},
    ),
    "label_noise": (
        ("noise 0, one rate", "noise 0.4, one rate", "noise 0", "noise 0.4"),
        ("nll", "mae", "generalized_cross_entropy"),
        lambda loss, source: {"accuracy": 0.1 * (source % 2) * loss},
    ),
    "bad_init": (
        ("sgd, head × 1", "sgd, head × 50", "sgd, after nll"),
        ("nll", "brier"),
        lambda loss, source: {"test_nll": 1, "accuracy": (-0.1, -0.2, 0.1)[source]},
    ),
}
WORLDS = {
    "As expected": lambda seed: 1,
    "Against what is reported": lambda seed: -1,
    "Not told apart at these seeds": lambda seed: (-1) ** seed,
}


def script_of(name):
    return load(experiments_folder() / f"{name}.py")


def planted(name, sign, seeds=6):
    """A frame where nll is the same everywhere, and each other loss away from it by sign(seed) times what is reported."""
    sources, losses, effect = AS_REPORTED[name]
    rows = []
    for (there, source), (place, loss) in itertools.product(enumerate(sources), enumerate(losses)):
        away = effect(place, there) if place else {}
        for seed in range(seeds):
            values = {metric: 2 + seed / 10 + sign(seed) * away.get(metric, 0) for metric in reported.METRICS}
            rows.append({"source": source, "loss": loss, "seed": seed, **values})
    return pd.DataFrame(rows)


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_run_has_its_columns_and_finite_numbers(name):
    script = script_of(name)
    frame = script.run(**TINY[name], seeds=(0, 1))
    assert {"source", "loss", "seed", "rate", "rate_for_accuracy", "at_edge", *reported.METRICS} == set(frame.columns)
    assert len(frame) == 2 * frame.source.nunique() * len(TINY[name]["losses"])
    numbers = [column for column in frame.columns if column != "kl_to_law" or name in ("vocabulary_sweep", "label_noise")]
    assert np.isfinite(frame[numbers].drop(columns=["source", "loss"]).astype(float)).all(axis=None)
    assert isinstance(script.verdicts(frame), list)


@pytest.mark.parametrize("said", WORLDS)
@pytest.mark.parametrize("name", AS_REPORTED)
def test_verdicts_follow_the_numbers(name, said):
    sentences = script_of(name).verdicts(planted(name, WORLDS[said]))
    assert len(sentences) >= 3
    assert [sentence for sentence in sentences if not sentence.startswith(f"{said}: ")] == []
    assert not any("nan" in sentence for sentence in sentences)


def runs(rates, nll, accuracy, diverged=False):
    columns = {"rate": rates, "validation_nll": nll, "validation_accuracy": accuracy, "diverged": diverged}
    return pd.DataFrame(columns).astype({"rate": float})


def test_each_measure_has_its_own_best_rate_and_the_grid_grows_to_it():
    """NLL is best at 0.1, accuracy at 10; at 100 a run diverges, so that its accuracy does not count."""
    asked = []

    def at(rates):
        asked.append(tuple(rates))
        return runs(list(rates), [abs(np.log10(rate) + 1) for rate in rates], list(rates), [rate > 50 for rate in rates])

    found = reported._grown(at, (0.1, 1.0))
    assert asked == [(0.1, 1.0), (0.01, 10.0), (100.0,)]
    assert reported._best(found) == (0.1, 10.0)
    assert reported._beyond(found, (0.1, 10.0)) == set()
    assert reported._beyond(found, (0.01, 100.0)) == {0.001, 1000.0}


def test_where_all_diverge_smaller_rates_are_tried_and_none_is_best():
    every = runs([0.1, 1.0], [np.nan, np.nan], [0.5, 0.5], True)
    assert reported._best(every) is None
    assert reported._beyond(every, None) == {0.01}
    assert reported._beyond(every[:1], None) == set()


def test_what_has_no_interval_or_no_run_has_no_verdict():
    tests = pd.DataFrame({"source": "text", "loss": ["nll", "mae"], "seed": 0, "accuracy": [0.5, 0.4]})
    one, none = reported.verdicts(paired(tests, "accuracy"), {("text", "mae"): -1, ("text", "brier"): 1})
    assert one.startswith("Not told apart at these seeds: mae's accuracy minus nll's (text) is -0.1")
    assert none.startswith("Not measured: brier (text).")


def test_a_gap_to_a_run_that_is_missing_is_left_out():
    tests = pd.DataFrame({"source": ["a", "a", "b"], "loss": ["nll", "mae", "mae"], "seed": 0, "accuracy": [0.5, 0.25, 0.3]})
    gaps = reported.gaps(tests, "accuracy")
    assert gaps.accuracy.iloc[0] == -0.25
    assert np.isnan(gaps.accuracy.iloc[1])
    assert paired(gaps, "accuracy").empty


def test_a_start_is_the_model_that_nll_trained_from_that_seed():
    source, seeds, recipe = MarkovSource(vocab=4, tokens=2000), (0, 1, 2), {"steps": 3}
    start = reported.nll_trained(source, "bigram", 0.1, seeds, **recipe)
    models = train(resolve("nll"), source, "bigram", [0.1], seeds, Recipe(**recipe)).models.weight
    picked = jax.vmap(lambda seed: start(4, jax.random.key(seed)).weight)(np.arange(4, dtype=np.uint32))
    for seed, model in zip(seeds, models, strict=True):
        assert np.array_equal(picked[seed], model)
        assert np.array_equal(start(4, jax.random.key(seed)).weight, model)
    assert np.isnan(picked[3]).all()


def test_a_scaled_head_begins_confident():
    scaled = script_of("bad_init").scaled
    tokens, key = jax.numpy.arange(4)[None], jax.random.key(0)
    usual = logits(resolve_model(SMALL)(8, key), tokens)
    assert np.allclose(logits(scaled(SMALL, 50)(8, key), tokens), 50 * usual, rtol=1e-5, atol=1e-6)


def test_noise_is_learnt_from_a_short_text_and_tested_on_a_long_one():
    chain = script_of("label_noise").ShortChain()
    assert [len(chain.split(part)) for part in ("train", "validation", "test")] == [1500, 4000, 4000]


def test_a_run_keeps_its_frames_its_picture_and_its_verdicts(tmp_path, capsys):
    script = script_of("bad_init")
    frame = planted("bad_init", WORLDS["As expected"]).assign(rate=1.0, rate_for_accuracy=1.0, at_edge=False)
    told = []
    run = lambda tell=None, steps=7, seeds=(0,): told.append(seeds) or frame
    reported.main("tried", run, script.verdicts, ("accuracy", "test_nll"), {"seeds": (0, 1)}, [MarkovSource()], tmp_path)
    out, kept = capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text())
    assert told == [(0, 1)]
    assert (kept["arguments"]["steps"], kept["arguments"]["seeds"], kept["sources"][0]["kind"]) == (7, [0, 1], "markov")
    assert kept["verdicts"] == script.verdicts(frame)
    assert all(sentence in out for sentence in kept["verdicts"])
    assert set(pd.read_csv(tmp_path / "pairs.csv").metric) == {"accuracy", "test_nll"}
    assert len(pd.read_csv(tmp_path / "tests.csv")) == len(frame)
    assert (tmp_path / "differences.png").stat().st_size > 10_000
