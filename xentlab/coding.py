"""Bytes, not estimates: a model's predictions drive constriction's range coder, and what it wrote is decoded back.

A file is one line of JSON (what a decoder needs beside the model) and the coder's 32-bit words. The decoder sees no token
that it has not decoded: the encoder hides the future from the model in the same way, so that both ask the same question
of the same compiled function. A digest of every probability is stored; another model, or another machine's rounding, is an
error and never garbage.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Integer

from xentlab.contract import LabError, whole

# windows of token ids [L, T] -> the probability of the token that follows each position [L, T, V]
Predict = Callable[[np.ndarray], np.ndarray]
MAGIC = "xentlab-range-coder-1"
Tokens = Integer[np.ndarray, " tokens"]


@dataclasses.dataclass(frozen=True)
class Coded:
    """What was written: the whole file, the bits of its payload, and the bits that the model's cross entropy promises.

    A token to which the model gives less than 2^-24 costs about 24 bits in the file, and -log2 p, infinite of 0, in model_bits.
    """

    file: bytes
    payload_bits: int
    model_bits: float


def encode(predict: Predict, tokens: Tokens, vocab: int, window: int = 32, lanes: int = 8) -> Coded:
    """Codes tokens [N] with a model's predictions; the model reads windows of `window` tokens, as in training.

    The text is cut into `lanes` that are coded side by side; each lane's first token is coded as one of `vocab`, the rest
    by `predict`. Raises `LabError` for tokens that do not lie in [0, vocab), too few of them, a vocabulary of one, and
    predictions that are no distributions.

    >>> always = lambda tokens: np.broadcast_to(np.float32([0.5, 0.25, 0.25]), (*tokens.shape, 3))
    >>> coded = encode(always, np.zeros(800, np.int32), vocab=3)
    >>> coded.payload_bits, round(coded.model_bits)  # 792 tokens of 1 bit, and 8 of log2(3)
    (832, 805)
    >>> (decode(always, coded.file) == 0).all()
    np.True_
    """
    tokens = np.asarray(tokens)
    if tokens.dtype.kind not in "iu" or tokens.ndim != 1:
        raise LabError(f"tokens to code are integers [N]; got {tokens.dtype} {list(tokens.shape)}.")
    vocab = whole(vocab, 2, f"tokens are coded as some of at least two: vocab >= 2; got {vocab!r}.")
    window = whole(window, 1, f"a window is a whole number of tokens, at least 1; got {window!r}.")
    lanes = whole(lanes, 1, f"lanes are a whole number of at least 1; got {lanes!r}.")
    if len(tokens) < 2 * lanes:
        raise LabError(f"{len(tokens)} tokens are too few to code in {lanes} lanes; give at least {2 * lanes}.")
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise LabError(f"tokens to code must lie in [0, {vocab}); got {tokens.min()} to {tokens.max()}.")
    import constriction

    coder, family = constriction.stream.queue.RangeEncoder(), _family()
    head = {"format": MAGIC, "tokens": len(tokens), "vocab": vocab, "window": window, "lanes": lanes}
    digest, bits = _digest(head), 0.0
    columns = _lanes(tokens, lanes)

    def put(step, rows):
        nonlocal bits
        symbols = columns[: len(rows), step]
        coder.encode(symbols, family, rows)
        with np.errstate(divide="ignore"):
            bits -= float(np.log2(rows[np.arange(len(rows)), symbols].astype(np.float64)).sum())
        return symbols

    _walk(predict, len(tokens), vocab, window, lanes, digest, put)
    payload = np.asarray(coder.get_compressed(), "<u4").tobytes()
    digests = {"probabilities_sha256": digest.hexdigest(), "payload_sha256": hashlib.sha256(payload).hexdigest()}
    return Coded(json.dumps({**head, **digests}).encode() + b"\n" + payload, 8 * len(payload), bits)


def decode(predict: Predict, file: bytes) -> Tokens:
    """The tokens [N] of a file that `encode` made with the same predictions.

    Raises `LabError` if it is no such file, if it is cut off, and if the predictions are not bit for bit the encoder's.
    """
    import constriction

    line, newline, payload = file.partition(b"\n")
    try:
        head = json.loads(line)
        shape = {key: int(head[key]) for key in ("tokens", "vocab", "window", "lanes")}
        digests = head["payload_sha256"], head["probabilities_sha256"]
        count, vocab, window, lanes = shape.values()
        known = head["format"] == MAGIC and newline and min(shape.values()) > 0 and vocab > 1 and count >= 2 * lanes
    except (ValueError, KeyError, TypeError, OverflowError):
        known = False
    if not known:
        raise LabError("this is no file of xentlab's range coder.")
    if hashlib.sha256(payload).hexdigest() != digests[0] or len(payload) % 4:
        raise LabError("the file is damaged or cut off: its payload has another digest than when it was written.")
    coder, family = constriction.stream.queue.RangeDecoder(np.frombuffer(payload, "<u4").astype(np.uint32)), _family()
    digest = _digest({"format": MAGIC} | shape)
    columns = np.zeros((lanes, -(-count // lanes)), np.int32)

    def take(step, rows):
        columns[: len(rows), step] = coder.decode(family, rows)
        return columns[: len(rows), step]

    with contextlib.suppress(AssertionError):  # what other probabilities find in the payload need not be a code at all
        _walk(predict, count, vocab, window, lanes, digest, take)
    if digest.hexdigest() != digests[1]:
        raise LabError(
            "the model's probabilities are not bit for bit those that the file was coded with, so its text is lost to them. "
            "Decode with the same model, versions and kind of machine."
        )
    return columns.reshape(-1)[_places(count, lanes)]


def _digest(head: dict[str, object]) -> "hashlib._Hash":
    """Of a file's shape, to which every probability is added: another number of tokens is another file."""
    return hashlib.sha256(json.dumps(head).encode())


def _family():
    import constriction

    # Quantised to 24 bits with at least 2^-24 for every symbol: what the model calls impossible costs 24 bits, not infinity.
    return constriction.stream.model.Categorical(perfect=False)


def _lane_lengths(count: int, lanes: int) -> np.ndarray:
    """Lanes of tokens, the longer ones first, so that at each step the lanes still open are the first few."""
    return np.array([count // lanes + (lane < count % lanes) for lane in range(lanes)])


def _places(count: int, lanes: int) -> np.ndarray:
    """Where each token of the text lies in the [lanes, longest] table, flat."""
    longest = -(-count // lanes)
    return np.concatenate([lane * longest + np.arange(length) for lane, length in enumerate(_lane_lengths(count, lanes))])


def _lanes(tokens: Tokens, lanes: int) -> Integer[np.ndarray, "lanes longest"]:
    columns = np.zeros((lanes, -(-len(tokens) // lanes)), np.int32)
    columns.reshape(-1)[_places(len(tokens), lanes)] = tokens
    return columns


def _walk(
    predict: Predict,
    count: int,
    vocab: int,
    window: int,
    lanes: int,
    digest: "hashlib._Hash",
    visit: Callable[[int, Float[np.ndarray, "lanes vocab"]], Tokens],
) -> None:
    """Goes through all lanes, a token a step: `visit(step, probabilities of the open lanes) -> their tokens`.

    Encoder and decoder share this walk, so that both give the model the same tokens in the same shape.
    """
    near_one = lambda rows: np.allclose(rows.sum(axis=1, dtype=np.float64), 1, atol=1e-3)
    lengths = _lane_lengths(count, lanes)
    uniform = np.full((lanes, vocab), 1 / vocab, np.float32)
    seen = np.zeros((lanes, window), np.int32)
    last = visit(0, uniform)
    seen[:, 0] = last
    for step in range(1, int(lengths[0])):
        open_lanes = int((lengths > step).sum())
        place = (step - 1) % window
        if step > 1 and place == 0:  # a new window begins with the last token
            seen[:] = 0
            seen[: len(last), 0] = last
        rows = np.ascontiguousarray(np.asarray(predict(seen))[:, place], np.float32)
        if rows.shape != (lanes, vocab) or not np.isfinite(rows).all() or (rows < 0).any() or not near_one(rows):
            raise LabError(f"the model's predictions at step {step} are no distributions over {vocab} tokens.")
        digest.update(rows.tobytes())
        last = visit(step, rows[:open_lanes])
        if place + 1 < window:
            seen[:open_lanes, place + 1] = last
