"""What a model is worth: against laws that are known, and sums that must agree."""

import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab.examine import TEMPERATURES, TEST_METRICS, Predictor, examiner
from xentlab.sources import MarkovSource

SOURCE = MarkovSource(vocab=6, tokens=30_000, seed=2)


class Table(eqx.Module):
    """A model whose logits are a table's rows."""

    weight: jax.Array

    def hidden(self, tokens):
        return jax.nn.one_hot(tokens, len(self.weight))


def sharpened(factor):
    """The chain's own law, its logits times a factor."""
    return Table(factor * jnp.log(SOURCE.law(jnp.arange(6)[:, None])).astype(jnp.float32))


@pytest.fixture(scope="module")
def examine():
    return examiner(SOURCE, 16, 3000)


def test_the_law_itself_is_level_with_itself_and_any_other_map_behind_but_one_that_knows_the_answers(examine):
    """The law read through 16 tokens' own batch: each row's next token gets one half more than the law gives it."""
    level, behind = (examine(Predictor(sharpened(factor), jax.nn.softmax, 0.0)).beyond_law for factor in (1.0, 3.0))
    assert abs(level) < 0.01
    assert behind < -100

    def knows(logits):
        tokens = jnp.argmax(logits[..., 6:], axis=-1)
        answer = jax.nn.one_hot(jnp.roll(tokens, -1, axis=-1), 6)
        return (jax.nn.softmax(logits[..., :6]) + answer) / 2

    law = sharpened(1.0).weight
    assert examine(Predictor(Table(jnp.concatenate([law, jnp.eye(6)], axis=1)), knows, 0.0)).beyond_law > 1000


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_temperature_undoes_what_scaled_the_logits(examine, factor):
    """Up to what 3000 tokens tell of it; then the model is the law again, and without it it is not."""
    found = examine(Predictor(sharpened(factor), jax.nn.softmax, 0.0)).scores
    assert set(found) == set(TEST_METRICS)
    assert found["temperature"] == pytest.approx(factor, rel=0.06)
    assert found["tempered_kl_to_law"] < 2e-3
    assert factor == 1 or found["kl_to_law"] > 20 * found["tempered_kl_to_law"]
    assert found["tempered_nll"] <= found["test_nll"] + 2e-3


def test_the_temperature_is_where_the_nll_is_least(examine):
    """Against NumPy, on a fine grid of temperatures."""
    from xentlab.program import windows

    predictor = Predictor(sharpened(2.0), jax.nn.softmax, 0.1)
    held_out = windows(SOURCE.split("validation"), 16, 3000)
    log_p = np.log(np.asarray(predictor(held_out[:, :-1]), np.float64))
    grid = np.exp(np.linspace(-1, 1.5, 2001))

    def nll(temperature):
        scaled = log_p / temperature
        scaled -= np.log(np.exp(scaled).sum(-1, keepdims=True))
        return -np.take_along_axis(scaled, held_out[:, 1:, None], -1).mean()

    best = grid[np.argmin([nll(each) for each in grid])]
    assert examine(predictor).scores["temperature"] == pytest.approx(best, rel=3e-3)


def test_where_no_temperature_is_best_it_says_1_or_an_end(examine):
    assert examine(Predictor(Table(jnp.zeros((6, 6))), jax.nn.softmax, 0.0)).scores["temperature"] == 1
    assert examine(Predictor(sharpened(0.005), jax.nn.softmax, 0.0)).scores["temperature"] == TEMPERATURES[0]  # nearly even
    backwards = examine(Predictor(sharpened(-1.0), jax.nn.softmax, 0.0)).scores["temperature"]
    assert backwards == TEMPERATURES[1]


def test_who_is_always_right_is_cooled_to_the_end_and_bits_are_by_all_the_bytes_of_a_token():
    cycle = np.tile(np.arange(6, dtype=np.int32), 50)
    described = {"name": "cycle", "vocab": 6, "order": 0, "split": lambda part: cycle, "describe": dict}
    source = types.SimpleNamespace(**described, token_bytes=np.full(6, 2))
    right = Table(4 * jnp.roll(jnp.eye(6), 1, axis=1))
    scores = examiner(source, 16, 100)(Predictor(right, jax.nn.softmax, 0.0)).scores
    assert (scores["accuracy"], scores["temperature"]) == (1, TEMPERATURES[0])
    assert scores["bits_per_byte"] == pytest.approx(scores["test_nll"] / np.log(2) / 2)
    assert scores["perplexity"] == pytest.approx(np.exp(scores["test_nll"]))


def test_parts_make_the_whole(examine):
    """Bins of confidence and of frequency hold every token once."""
    found = examine(Predictor(sharpened(1.7), jax.nn.softmax, 0.01))
    tokens = 16 * ((len(SOURCE.split("test")) - 1) // 16)
    for reading, name in (("raw", ""), ("tempered", "tempered_")):
        rows = found.reliability[reading]
        assert sum(row["tokens"] for row in rows) == tokens
        gap = sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / tokens
        assert gap == pytest.approx(found.scores[f"{name}calibration_error"])
        assert sum(row["tokens"] * row["accuracy"] for row in rows) / tokens == pytest.approx(found.scores["accuracy"])
    for column in ("test_nll", "tempered_nll"):
        mean = sum(row["tokens"] * row[column] for row in found.frequency) / tokens
        assert mean == pytest.approx(found.scores[column], rel=1e-6)
    counts = np.bincount(SOURCE.split("train"), minlength=6)
    for count in counts:
        assert sum(row["count_low"] <= count <= row["count_high"] for row in found.frequency) == 1


def test_zeros_stay_zeros(examine):
    """A sparse link: what it rules out no temperature brings back, and the share of the uniform does."""
    sparse = lambda logits: jax.nn.softmax(jnp.where(logits < jnp.max(logits, -1, keepdims=True) - 1, -jnp.inf, logits))
    found = examine(Predictor(sharpened(1.0), sparse, 0.01)).scores
    assert np.isfinite([found["test_nll"], found["tempered_nll"], found["temperature"]]).all()


def test_a_temperature_changes_no_one_s_lead(examine):
    """Of two classes a rounding apart, which a temperature may bring together: what was right stays so."""

    def near_ties(logits):
        p = jax.nn.softmax(logits[..., :6])
        return jnp.concatenate([p[..., :1], p[..., :1] * (1 + 2.0**-22), p[..., 2:]], axis=-1) / (1 + p[..., :1] - p[..., 1:2])

    table = Table(jnp.asarray(np.random.default_rng(0).normal(size=(6, 6)) / 9, jnp.float32).at[:, 0].set(1))
    raw, tempered = examine(Predictor(table, near_ties, 0.0)).reliability.values()
    right = lambda rows: round(sum(row["tokens"] * row["accuracy"] for row in rows))
    assert right(raw) == right(tempered)
