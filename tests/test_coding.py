"""Coded bytes decode to the same tokens, cost what the model's cross entropy says, and never decode to garbage."""

import json

import hypothesis
import hypothesis.strategies as st
import jaxtyping
import numpy as np
import pytest

from xentlab import LabError
from xentlab.coding import decode, encode

LAW = np.random.default_rng(0).dirichlet(np.ones(5), size=5).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 5, 12_000).astype(np.int32)


def bigram(tokens):
    return LAW[tokens]


@pytest.fixture(scope="module")
def coded():
    return encode(bigram, TOKENS, 5)


def test_the_text_comes_back(coded):
    np.testing.assert_array_equal(decode(bigram, coded.file), TOKENS)


def test_the_file_is_as_long_as_the_cross_entropy(coded):
    """Counted by hand: each lane's first token is one of five, and lanes lie one after another in the text."""
    own = -np.log2(LAW[TOKENS[:-1], TOKENS[1:]].astype(np.float64))
    joints = np.arange(1, 8) * 1500 - 1
    by_hand = own.sum() - own[joints].sum() + 8 * np.log2(5)
    assert coded.model_bits == pytest.approx(by_hand, rel=1e-9)
    assert 0 <= coded.payload_bits - coded.model_bits < 64
    assert len(coded.file.partition(b"\n")[2]) * 8 == coded.payload_bits


@hypothesis.given(st.integers(4, 60), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_any_length_lanes_and_window(length, lanes, window, seed):
    hypothesis.assume(length >= 2 * lanes)
    tokens = np.random.default_rng(seed).integers(0, 5, length).astype(np.int32)
    file = encode(bigram, tokens, 5, window=window, lanes=lanes).file
    np.testing.assert_array_equal(decode(bigram, file), tokens)


def test_a_model_that_peeks_at_the_future_sees_none():
    """The next token is there for a model that is not causal; the coder hides it, so both sides agree and nothing is gained."""

    def peeks(tokens):
        ahead = np.roll(tokens, -1, axis=-1)
        return np.float32(0.9) * np.eye(5, dtype=np.float32)[ahead] + np.float32(0.02)

    coded = encode(peeks, TOKENS[:2000], 5)
    np.testing.assert_array_equal(decode(peeks, coded.file), TOKENS[:2000])
    assert coded.payload_bits > 2000 * np.log2(5)


def test_what_the_model_calls_impossible_costs_24_bits():
    sure = lambda tokens: np.broadcast_to(np.float32([1, 0]), (*tokens.shape, 2))
    tokens = np.zeros(400, np.int32)
    tokens[100:110] = 1
    coded = encode(sure, tokens, 2, lanes=1)
    assert coded.model_bits == np.inf
    assert coded.payload_bits == pytest.approx(240, abs=64)
    np.testing.assert_array_equal(decode(sure, coded.file), tokens)


def test_other_probabilities_are_an_error_and_never_garbage(coded):
    nudged = LAW.copy()
    nudged[4, 4] = np.nextafter(nudged[4, 4], np.float32(1))
    with pytest.raises(LabError, match="not bit for bit"):
        decode(lambda tokens: nudged[tokens], coded.file)
    with pytest.raises(LabError, match="not bit for bit"):
        decode(lambda tokens: LAW[(tokens + 1) % 5], coded.file)


def test_a_damaged_file_is_an_error(coded):
    head, _, payload = coded.file.partition(b"\n")
    for broken in (coded.file[:-4], coded.file[:-1], head + b"\n" + payload[:100] + b"\x00" + payload[101:]):
        with pytest.raises(LabError, match="damaged or cut off"):
            decode(bigram, broken)
    endless = head.replace(b'"tokens": ', b'"tokens": Infinity, "was": ')
    for other in (b"", b"hello", b"{}\n", json.dumps({"format": "zip"}).encode() + b"\n", endless + b"\n" + payload):
        with pytest.raises(LabError, match="no file of"):
            decode(bigram, other)


def test_bad_input_is_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=r"tokens to code are integers \[N\]; got float64 \[12000\]"):
        encode(bigram, TOKENS.astype(float), 5)
    with pytest.raises(LabError, match=r"\[N\]; got int32 \[6000, 2\]"):
        encode(bigram, TOKENS.reshape(-1, 2), 5)
    for setting, message in (
        ({"vocab": 1}, "vocab >= 2; got 1"),
        ({"vocab": "5"}, "vocab >= 2; got '5'"),
        ({"window": 0}, "at least 1; got 0"),
        ({"window": 2.0}, "at least 1; got 2.0"),
        ({"lanes": 0}, "at least 1; got 0"),
    ):
        with pytest.raises(LabError, match=message):
            encode(bigram, **({"tokens": TOKENS * 0, "vocab": 5} | setting))
    with pytest.raises(LabError, match="got -1 to 4"):
        encode(bigram, np.arange(-1, 5).repeat(10), 5)
    with pytest.raises(LabError, match=r"must lie in \[0, 5\); got 0 to 5"):
        encode(bigram, np.arange(6).repeat(10), 5)
    with pytest.raises(LabError, match="too few"):
        encode(bigram, TOKENS[:9], 5)
    for rows in (np.full(5, np.nan), np.zeros(5), np.full(5, 0.22), np.array([2.0, -1, 0, 0, 0])):
        with pytest.raises(LabError, match="no distributions over 5"):
            encode(lambda tokens, rows=rows: np.broadcast_to(rows, (*tokens.shape, 5)), TOKENS, 5)


@pytest.mark.parametrize(
    "change",
    [{"tokens": 799}, {"lanes": 0}, {"window": 0}, {"tokens": -5}, {"vocab": 4}, {"vocab": 1}, {"payload_sha256": None}],
)
def test_another_head_is_an_error_and_never_garbage(change):
    always = lambda tokens: np.broadcast_to(np.float32([0.5, 0.25, 0.25]), (*tokens.shape, 3))
    line, _, payload = encode(always, np.zeros(800, np.int32), vocab=3).file.partition(b"\n")
    head = {key: value for key, value in (json.loads(line) | change).items() if value is not None}
    with pytest.raises(LabError):
        decode(always, json.dumps(head).encode() + b"\n" + payload)


def test_what_is_no_distribution_is_not_coded():
    with pytest.raises(LabError, match="are no distributions over 3"):
        encode(lambda seen: np.full((*seen.shape, 3), 0.9, np.float32), np.zeros(100, int), vocab=3)
