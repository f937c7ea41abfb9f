"""Which plan runs a head, with which tiles, and why."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from xentlab.contract import LabError, Loss, name_of
from xentlab.linear.logits import accumulator
from xentlab.linear.reductions import stream_of

PLANS = ("auto", "stream", "tokens")
CHUNK = 256  # tokens of a chunk in the tokens plan
TILE = 512  # classes of a tile in the stream plan: the fastest of 256, 512 and 1024 at two of three shapes on a CPU
TILE_BYTES = 12 * 2**20  # of logits, the most that a tile may hold
ROWS = 4096  # classes at a time as the tokens plan sums the weight's gradient


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a head runs: plan, why, tiles (tokens a chunk, classes a tile), matrix products of value and gradient, memory.

    temporary_bytes is reckoned from the shapes: what is held beside arguments and gradients at the height of the pass.
    flops are those of value and gradient, 2 N D V a product.
    """

    name: Literal["stream", "tokens"]
    why: str
    tiles: tuple[int, int]
    products: int
    flops: int
    temporary_bytes: int
    naive_bytes: int


def explain_plan(
    tokens: int,
    features: int,
    vocab: int,
    loss: Loss,
    dtype: Any = jnp.float32,
    plan: str = "auto",
    tiles: tuple[int, int] | None = None,
    per_token: bool = False,
) -> Plan:
    """The plan that `linear_loss` takes for hidden [tokens, features] and a weight [features, vocab], and why.

    per_token: with reduction "none". Raises `LabError` for an unknown plan, and for "stream" with a loss that has no
    stream form.

    >>> from xentlab import resolve
    >>> explain_plan(8192, 2304, 256_000, resolve("nll")).name, explain_plan(8192, 2304, 256_000, resolve("entmax15")).name
    ('stream', 'tokens')
    """
    if plan not in PLANS:
        raise LabError(f"a plan is one of {', '.join(PLANS)}; got {plan!r}.")
    if tiles is not None and (len(tiles) != 2 or not all(isinstance(each, int) and each > 0 for each in tiles)):
        raise LabError(f"tiles are two counts, tokens a chunk and classes a tile; got {tiles!r}.")
    streams, wide = stream_of(loss) is not None, jnp.dtype(accumulator(dtype)).itemsize
    if plan == "stream" and not streams:
        raise LabError(
            f"{name_of(loss)} has no stream form, a function of reductions (@loss(stream=...)); plan 'tokens' takes any loss."
        )
    if plan == "auto":
        # Measured (experiments/bench_linear_loss.py): its tiles stay in the cache, which outweighs a fourth product.
        name = "stream" if streams else "tokens"
        why = (
            "it has a stream form, which is faster on a CPU and holds less"
            if streams
            else f"{name_of(loss)} has no stream form"
        )
    else:
        name, why = plan, "it was asked for"
    chunk, tile = tiles or (CHUNK, _tile(tokens, vocab, wide) if name == "stream" else ROWS)
    narrow = jnp.dtype(dtype).itemsize
    summed = features * vocab * wide if narrow < wide and tokens > chunk else 0
    # Logits, their gradient, and the gradient in the weight's type.
    held = min(chunk, tokens) * vocab * (2 * wide + (narrow if narrow < wide else 0)) + summed
    streamed = 2 * min(tile, vocab) * (tokens + features) * wide + tokens * features * (wide if narrow < wide else 0)
    products = 4 if name == "stream" or per_token else 3
    temporary = streamed if name == "stream" else held
    flops = products * 2 * tokens * features * vocab
    return Plan(name, why, (chunk, tile), products, flops, int(temporary), 2 * tokens * vocab * wide)


def _tile(tokens: int, vocab: int, wide: int) -> int:
    """Classes a tile, in whole vectors: no more than TILE_BYTES of logits, no fewer than 128, and V without rest if need be.

    A rest is exact too, but XLA holds the hidden states' gradient once more for it.
    """
    most = max(128, min(TILE, TILE_BYTES // (wide * max(1, tokens)) // 128 * 128))
    even = (tile for tile in range(most, most // 2, -128) if vocab % tile == 0)
    return min(vocab, next(even, most))
