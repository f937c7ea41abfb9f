"""Which plan runs a head, with which tiles, and why."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.contract import LabError, Loss, name_of
from xentlab.linear.form import stream_of
from xentlab.linear.logits import turns
from xentlab.losses.likelihood import nll
from xentlab.memory import machine_memory
from xentlab.products import accumulator, moved_whole, on_cpu

PLANS = ("auto", "stream", "tokens")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The tokens plan's chunk, in tokens and the bytes of its logits; a tile's classes, of that plan and of stream, and bytes.

    lanes: classes of which a tile is a multiple, or products are slow. held_bytes: of the gradients by the logits that wait for
    the products with all of them. None: as many as there are.
    """

    chunk: int
    chunk_bytes: int | None
    tokens_tile: int | None
    tile: int | None
    tile_bytes: int
    lanes: int
    held_bytes: int = 0


# Tried on 2 CPU cores at the shapes of experiments/bench_linear_loss.py: the fastest, or near it and smaller. At the second of
# them the tokens plan took a seventh less with tiles of some 4000 classes than of some 400, most of it in its products.
CPU = Sizes(chunk=512, chunk_bytes=None, tokens_tile=4096, tile=512, tile_bytes=12 * 2**20, lanes=8)
# Tried on a GPU (H200) at the shapes of experiments/bench_chip.py: a chip wants large products, and has no cache to stay in. Of
# stream's tiles those of 256 MB are 3% faster, and hold twice as much. Chunks of 512 tokens take a slower kernel, of 2048
# save 3% for half as much again.
CHIP = Sizes(chunk=1024, chunk_bytes=2**30, tokens_tile=None, tile=None, tile_bytes=96 * 2**20, lanes=128, held_bytes=2**32)
COUNTED = 2**31 - 1  # tokens, classes, logits of a chunk, at most: by more than int32 they would be read where others are
SHARE = 16  # of a device's memory the part that a plan may take to be faster
ROWS_BYTES = 2 * 2**20  # of logits, for a loss that sees whole rows: some ten passes over them then stay in a CPU's cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a head runs: plan, why, tiles (tokens a chunk, classes a tile), matrix products of value and gradient, memory.

    temporary_bytes is reckoned from the shapes: what is held beside arguments and gradients at the height of the pass. With
    token_weights there is a copy of the hidden states more. naive_bytes: the same of a head that holds all logits.
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
    loss: Loss = nll,
    dtype: Any = jnp.float32,
    plan: str = "auto",
    tiles: tuple[int, int] | None = None,
    per_token: bool = False,
    layout: tuple[int, int] = (1, 1),
) -> Plan:
    """The plan that `linear_loss` takes for hidden [tokens, features] and a weight [features, vocab], and why.

    loss, plan, tiles: as `linear_loss` takes them. dtype: of hidden and weight. per_token: with reduction "none". layout:
    devices among which the tokens are split, and the vocabulary; what is counted is one device's. Of a loss with a stream form
    auto takes "tokens" where that holds no more than "stream" does, or little of this device's memory, so its answer differs
    from machine to machine; among several processes, which must agree, memory is not asked.

    Raises `LabError` for an unknown plan, for "stream" with a loss that has no stream form, and for sizes and types of no head.

    >>> from xentlab import resolve
    >>> explain_plan(8192, 2304, 256_000, resolve("entmax15")).why
    'entmax15 has no stream form'
    >>> explain_plan(8192, 2304, 256_000, resolve("nll"), plan="stream").products  # logits, made anew for two gradients
    4
    """
    if plan not in PLANS:
        raise LabError(f"a plan is one of {', '.join(PLANS)}; got {plan!r}.")
    if not callable(loss):
        raise LabError(f"a loss is a function of logits and targets; got {loss!r}. Of a name xentlab.resolve makes one.")
    tiles = None if tiles is None else _counts(tiles)
    tokens, features, vocab, *layout = _sizes(tokens, features, vocab, layout)
    dtype = floating(dtype)
    streams, wide = stream_of(loss) is not None, accumulator(dtype).itemsize
    if plan == "stream" and not streams:
        raise LabError(
            f"{name_of(loss)} has no stream form, a function of reductions (@loss(stream=...)); plan 'tokens' takes any loss."
        )
    per_device = -(-tokens // math.prod(layout)) * layout[1], -(-vocab // layout[1])

    def sized(name):
        chunk, tile = tiles or _tiles(name, *per_device, wide)
        if name == "tokens":
            chunk = max(min(chunk, COUNTED // (-(-per_device[1] // tile) * tile)) // layout[1], 1) * layout[1]
        else:
            chunk = per_device[0]
        chunk = min(chunk, max(per_device[0], 1))
        tile = min(tile, per_device[1])
        held = _temporary(name, streams, *per_device, features, chunk, tile, dtype)
        if layout[0] > 1:  # once all else is gone, the sum of the devices' gradients stands beside their own
            held = max(held, features * per_device[1] * (wide if name == "tokens" else jnp.dtype(dtype).itemsize))
        return (chunk, tile), held

    name, why, naive = plan, "it was asked for", 2 * per_device[0] * per_device[1] * wide
    if plan == "auto":
        name, why = _chosen(loss, streams, per_token, sized("tokens")[1], sized("stream")[1], naive)
    tiles, temporary = sized(name)
    products = 4 if name == "stream" or per_token else 3
    flops = products * 2 * per_device[0] * features * per_device[1]
    return Plan(name, why, tiles, products, flops, temporary, naive)


def _sizes(tokens, features, vocab, layout):
    """Sizes and layout as Python's numbers, of which a product does not overflow, one after the other; or a `LabError`."""
    shown = lambda each: each if np.size(each) < 3 else f"of shape {list(np.shape(each))}"
    named = {"tokens": tokens, "features": features, "vocab": vocab, "layout": layout}
    got = ", ".join(f"{name} {shown(each)}" for name, each in named.items())
    try:
        tokens, features, vocab, data, model = map(operator.index, (tokens, features, vocab, *layout))
    except (TypeError, ValueError):
        tokens = features = vocab = data = model = -1
    if tokens < 0 or min(features, vocab, data, model) < 1:
        raise LabError(
            "sizes are whole numbers, as explain_plan(*hidden.shape, vocab, loss) has them, and all but tokens at least 1; a "
            f"layout is two, devices for tokens and for the vocabulary; got {got}."
        )
    counted(tokens, vocab)
    return tokens, features, vocab, data, model


def counted(tokens: int, vocab: int) -> None:
    """Raises `LabError` for more tokens or classes than int32 counts."""
    if max(tokens, vocab) > COUNTED:
        raise LabError(
            f"tokens and classes are counted in int32, up to {COUNTED:,} of each; got {tokens:,} and {vocab:,}. Take the "
            "tokens in several calls; more classes no head takes."
        )


def floating(dtype: Any) -> Any:
    """The type of hidden states and a weight, or a `LabError`."""
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in DTYPES:
        known = ", ".join(str(jnp.dtype(each)) for each in DTYPES)
        raise LabError(
            f"hidden is one of {known}; got {dtype if found is None else found}. Cast it, as hidden.astype(jnp.float32)."
        )
    return found


def _counts(tiles):
    try:
        chunk, tile = map(operator.index, tiles)
    except (TypeError, ValueError):
        chunk = tile = 0
    if min(chunk, tile) < 1:
        raise LabError(f"tiles are two counts, tokens a chunk and classes a tile; got {tiles!r}.")
    return chunk, tile


def _chosen(loss, streams, per_token, held, streamed, naive):
    """The plan that auto takes, and why; held, streamed: bytes that tokens would hold, and stream; naive: the naive head."""
    if not streams:
        return "tokens", f"{name_of(loss)} has no stream form"
    # Measured: on a GPU (experiments/bench_chip.py) a third less time, for several times the memory; on a CPU
    # (experiments/bench_linear_loss.py) a tenth to a fifth less. Per-token results take four products either way.
    each = "as tokens does, for results of each token"
    three = f"four products, {each.replace('tokens', 'stream')}" if per_token else "three products where stream takes four"
    if held <= streamed:  # of many tokens stream sums the hidden states' gradients wide
        return "tokens", f"it takes {three}, and by this estimate holds no more than that"
    if not per_token and held <= _room(naive):
        return "tokens", f"it takes {three}, and holds under 1/{SHARE} of the memory there is"
    return "stream", f"it holds less than tokens does, for four products {each if per_token else 'where tokens takes three'}"


def _room(naive: int) -> int:
    """Bytes that the tokens plan may hold where stream could be taken: none on a chip of unknown size, or among processes.

    On a CPU, where it gains less, at most half of what the naive head would: a batch of one chunk is all of its logits.
    """
    if jax.process_count() > 1:  # which must all take the same plan, and may have other memories
        return 0
    if on_cpu():
        return min(machine_memory()[0] // (SHARE * jax.local_device_count()), naive // 2)
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", 0) // SHARE


def _tiles(name, tokens, vocab, wide):
    """Tokens a chunk and classes a tile, of this backend's sizes; 128 classes are always allowed.

    A tile that divides the vocabulary is taken if it is about the widest, as what overlaps is computed twice; else as few tiles
    as there must be, evenly wide, so that the last one overlaps by little.
    """
    sizes = CPU if on_cpu() else CHIP
    if name == "stream":
        chunk, widest = tokens, sizes.tile
    else:
        chunk, widest = sizes.chunk, sizes.tokens_tile
        if sizes.chunk_bytes:
            chunk = min(chunk, max(128, sizes.chunk_bytes // (wide * vocab) // 128 * 128))
        if tokens > chunk:  # as few as there must be, evenly large: the last one overlaps by little
            chunk = min(chunk, _evenly(tokens, chunk, sizes.lanes))
        if widest is None:
            return chunk, vocab
    most = max(128, min(widest or vocab, sizes.tile_bytes // (wide * max(1, chunk))) // 128 * 128)
    wider = most * 9 // 8 // sizes.lanes * sizes.lanes if name == "tokens" else most  # what stream holds is its tiles
    fitting = (tile for tile in range(wider, most * 4 // 5, -sizes.lanes) if vocab % tile == 0)
    return max(chunk, 1), next(fitting, _evenly(vocab, most, sizes.lanes))


def _evenly(count: int, most: int, step: int = 1) -> int:
    """The size of as few parts as there must be, evenly large, none above `most` but to be a multiple of the step."""
    size = -(-count // max(1, -(-count // most)))
    return -(-size // step) * step


def tokens_held(tokens: int, chunk: int, vocab: int, dtype: Any) -> int:
    """How many of a chip's tokens keep their logits' gradients for one product: all, or as many chunks as memory is given.

    >>> tokens_held(8192, 512, 256_000, jnp.bfloat16), tokens_held(16_384, 512, 256_000, jnp.bfloat16)
    (8192, 8192)
    """
    return min(tokens, max(1, CHIP.held_bytes // (vocab * jnp.dtype(dtype).itemsize) // chunk) * chunk)


def rows_at_once(rows: int, vocab: int, itemsize: int) -> int:
    """How many rows of a chunk's logits go through a loss and its derivative at once: where it can be, a divisor of theirs.

    >>> rows_at_once(256, 32_768, 4), rows_at_once(509, 32_768, 4)
    (16, 16)
    """
    if not on_cpu():
        return rows  # wide kernels hide their memory's latency; a loop of small ones would wait for each
    most = min(rows, max(1, ROWS_BYTES // (vocab * itemsize)))
    best = max(each for each in range(1, most + 1) if rows % each == 0)
    return best if 2 * best >= most else _evenly(rows, most)  # evenly, with a last block that overlaps by little


def _temporary(name, streams, tokens, vocab, features, chunk, tile, dtype):
    """Bytes beside arguments and gradients: tiles or chunks of logits, copies, and what sums hold wide of a narrow type.

    On a CPU within about 1.3 either way of what XLA says of nll and entmax15, by 24 shapes in each type of 50 to 32,768
    tokens; heads of a few MB may be off by 2. Of other losses that see rows it is rather too much, and of stream by a bfloat16
    weight [V, D], whose layout it is not told.
    """
    narrow, wide = jnp.dtype(dtype).itemsize, accumulator(dtype).itemsize
    kept_wide = dtype == jnp.float16  # see tokens.kept_type
    waiting = tokens * features * wide * kept_wide
    if not on_cpu():  # logits, and of a loss that sees rows their gradient; and that as the products take it
        logits = wide if streams else 2 * wide
        if name == "tokens":
            held = tokens_held(tokens, chunk, vocab, dtype)
            summed = features * vocab * wide * (kept_wide or tokens > held)
            return chunk * vocab * logits + held * (vocab * narrow + features * wide) + summed + waiting
        return tile * (tokens + features) * (logits + narrow) + tokens * features * wide
    if name == "stream":
        return _streamed(tokens, vocab, features, tile, dtype)
    return waiting + _chunked(streams, tokens, vocab, features, chunk, tile, dtype)


def _streamed(tokens, vocab, features, tile, dtype):
    """A CPU's stream plan: two arrays of a tile's logits, or one and a product for the hidden states' gradient; and copies."""
    narrow, wide = jnp.dtype(dtype).itemsize, accumulator(dtype).itemsize
    part, states, columns = tokens * tile * wide, tokens * features * wide, features * tile * wide
    cast, copied = narrow < wide, turns(tokens * features * narrow)
    if tile == vocab:  # no loop
        return max(3 * part + states * (copied or cast), part + 2 * states * cast)
    if dtype == jnp.float16:  # its products widen what they are given
        return max(2 * part, states) + states * (2 + copied) + columns
    held = max(2 * part, part + states) + columns
    if not cast:
        return held + states * copied
    if moved_whole(dtype):  # the weight's gradient as bits
        return held + states * (1 if copied else 2) + features * vocab * narrow
    # An XLA that widens nothing else has a kernel for the hidden states only if they are turned.
    return held + (states + tokens * features * narrow if copied else 2 * states)


def _chunked(streams, tokens, vocab, features, chunk, tile, dtype):
    """A CPU's tokens plan: a chunk's logits, a tile of them and of the weight's gradient, sums that are wide for the type."""
    narrow, wide, half = jnp.dtype(dtype).itemsize, accumulator(dtype).itemsize, dtype == jnp.float16
    logits, part, states, columns = chunk * vocab * wide, chunk * tile * wide, chunk * features * wide, features * tile * wide
    cast, once = narrow < wide, tokens <= chunk and tile == vocab  # once: no loop
    summed = features * vocab * wide * (half or (cast and (moved_whole(dtype) or tokens > chunk or once)))
    free = features * vocab * narrow if summed else 0  # where the weight's gradient will be, once it is rounded
    if streams and once:
        return summed + _beside(free, logits) + max(logits, states)
    if streams:
        tiled = max(2 * part, part + columns) - (part if part <= free < logits else 0)
        return summed + _beside(free, logits) + tiled + 2 * states
    block = rows_at_once(chunk, vocab, wide) * vocab * wide  # of rows that the loss sees; entmax15 makes three more of it
    held = _beside(free, logits) + block * (3 if block == logits else 4)
    if once:
        return summed + held + states
    # What the products take of the gradient by the logits; float16's widen it anew, and all of the weight.
    taken = chunk * vocab * narrow
    if half:
        taken = _beside(free, logits, logits, taken) + summed
    elif cast:
        taken = logits + taken - max((size for size in (logits, taken) if size <= free), default=0) + columns
    else:
        taken = logits + part + columns
    return summed + max(held, taken) + 2 * states


def _beside(free, *sizes):
    """The bytes of what does not fit into a free place, taken one after the other."""
    left = 0
    for size in sizes:
        if size <= free:
            free -= size
        else:
            left += size
    return left
