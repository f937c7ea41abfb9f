"""The stream plan: a loop over tiles of the vocabulary with running reductions; a row of logits never exists.

What is differentiable here are the reductions; the loss is plain JAX on their values [N], and so are weights, means and
per-token results. The way back makes each tile of logits anew: four matrix products instead of three, and memory that does
not grow with tokens times vocabulary. On a mesh that splits the vocabulary the reductions are merged, [N] numbers each, and
neither logits nor weight leave their device; the hidden states' gradient is summed over it, as it must be.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.linear.logits import Head, once, over_tiles, read_at, rivals_of, write_at
from xentlab.linear.reductions import LOWEST, Reduction, Row, greatest, lowest, risen, taken_in
from xentlab.products import accumulator, apart, lift, moved_whole
from xentlab.targets import is_at_target

Found = dict[str, jax.Array]
SHIFT = ""  # the name, no reduction's, under which the asides hold the greatest rival


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def streamed(
    reductions: Mapping[str, Reduction], head: Head, tile: int, hidden: jax.Array, weight: jax.Array, bias, targets: jax.Array
) -> Found:
    """The reductions' values and `target` [N], each differentiable by hidden [N, D], weight and bias.

    A bad target has a logit of 0 and all classes for rivals: its loss is to be made NaN, by `reductions.or_nan_outside`.
    """
    return _forward(reductions, head, tile, hidden, weight, bias, targets)[0]


def room(tokens: int, vocab: int, tile: int, dtype: Any) -> jax.Array:
    """Where `reduce` may keep a chunk's logits, tile after tile, each in one piece: [N * tiles * tile]."""
    return jnp.zeros(tokens * -(-vocab // tile) * tile, dtype)


def reduce(
    reductions, head: Head, tile: int, hidden, weight, bias, targets, kept: jax.Array | None = None
) -> tuple[Found, Found, jax.Array | None]:
    """One device's way forward: the values with `target`, what their slopes need besides, and all logits, given `room`."""
    dtype = accumulator(hidden.dtype)
    tokens, vocab = len(hidden), head.vocab(weight)
    first = head.place(head.classes) * vocab
    ahead = None
    if any(reduction.by_target for reduction in reductions.values()):
        here = (targets >= first) & (targets - first < vocab)
        own = head.logits_at(hidden, weight, bias, jnp.clip(targets - first, 0, vocab - 1))
        ahead = head.summed(jnp.where(here, own, 0), head.classes)

    def step(state, start, overlap):
        states, shift, target, kept = state
        z = head.logits(hidden, head.part(weight, start, tile), _part(bias, start, tile))
        if kept is not None:
            kept = lax.dynamic_update_slice_in_dim(kept, z.reshape(-1), _place(start, tile) * tokens, 0)
        counts, places = ~is_at_target(z, targets - (first + start)), targets - (first + start)
        if overlap is not None:  # a target that an earlier tile has had is nowhere
            places = jnp.where(places >= overlap, places, -1)
            counts = counts & (jnp.arange(tile, dtype=overlap.dtype) >= overlap)[None]
        # From where they are kept, so that z is copied there before it is written into.
        own = read_at(z if kept is None else kept_tile(kept, start, tokens, tile), places)
        rivals = rivals_of(z, places, own, overlap)
        count = tile - (0 if overlap is None else overlap) - ((places >= 0) & (places < tile)).astype(places.dtype)
        shift, seen_as = risen(shift, rivals, counts, count=count, target=ahead, first=first + start)
        return taken_in(reductions, states, seen_as), shift, target + own, kept

    states = {name: reduction.start(tokens, dtype) for name, reduction in reductions.items()}
    begun = (states, lowest(tokens, dtype), jnp.zeros(tokens, dtype), kept)
    states, shift, target, kept = over_tiles(step, begun, vocab, tile)
    if head.classes is not None:
        highest = greatest(shift, head.classes)
        states = {name: each.merge(states[name], shift - highest, head.classes) for name, each in reductions.items()}
        shift, target = highest, head.summed(target, head.classes)
    finished = {name: reduction.finish(states[name], shift) for name, reduction in reductions.items()}
    asides = {name: aside for name, (_, aside) in finished.items() if aside is not None} | {SHIFT: shift}
    # Found ahead it is that one, so that slopes see the margins that were summed.
    target = target if ahead is None else ahead
    if not all(reduction.level for reduction in reductions.values()):
        target = target - jnp.where(shift > LOWEST, shift, 0)
    found = {name: value for name, (value, _) in finished.items()} | {"target": target}
    return found, asides, kept


def _part(bias, start, size):
    return None if bias is None else lax.dynamic_slice_in_dim(bias, start, size)


def _place(start: Any, tile: int) -> Any:
    """Where a tile lies among those kept, in classes: its start, rounded up for the last one, which overlaps."""
    return -(-start // tile) * tile


def share_of_gradients(reductions, head: Head, tile: int, hidden, weight, *arrays, kept=None, sums=None):
    """One device's way back: its share of the gradients of hidden, weight and bias.

    arrays: bias, targets, and the values, asides and values' cotangents [N]. kept: the logits that `reduce` kept; else they are
    made anew. sums: gradients of weight and bias to add to, in float32.
    """
    run = functools.partial(_by_tiles, reductions, head, tile)
    if sums is None and moved_whole(weight.dtype):
        return _by_bits(run, hidden, weight, *arrays)
    return run(hidden, weight, *arrays, kept=kept, sums=sums)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_bits(run, *arrays):
    """With a weight's gradient whose tiles are written as bits: as numbers XLA would write all of it anew with each."""
    return run(*arrays, bits=True)


@_by_bits.defjvp
def _by_bits_forward(run, arrays, tangents):
    return jax.jvp(run, arrays, tangents)  # bits have no derivative


def _by_tiles(
    reductions, head, tile, hidden, weight, bias, targets, found, asides, cotangents, kept=None, sums=None, bits=False
):
    tokens, vocab = len(hidden), head.vocab(weight)
    # A mean's 1 / N would leave most shares of a vocabulary below float16's least number.
    narrow = weight.dtype == jnp.float16 and sums is None
    factor = lift(_largest({**cotangents, SHIFT: _to_target(reductions, asides, cotangents)})) if narrow else None
    lifted = lambda each: each if factor is None else each * factor
    lowered = lambda each: each if factor is None else each / factor
    to_logits_of = tile_gradient(reductions, head, vocab, targets, found, asides, jax.tree.map(lifted, cotangents))
    across = head.across(hidden)

    def step(state, start, overlap):
        to_hidden, to_weight, to_bias = state
        part = head.part(weight, start, tile)
        z = apart(head.logits(hidden, part, _part(bias, start, tile))) if kept is None else kept_tile(kept, start, tokens, tile)
        to_logits = once(to_logits_of(z, start), overlap, 0, 1)
        if bias is not None:
            more = lowered(jnp.sum(to_logits, axis=0)) + (0 if sums is None else _part(to_bias, start, tile))
            more = more.astype(to_bias.dtype)
            more = once(more, overlap, lambda: _part(to_bias, start, tile)) if sums is None else more
            to_bias = lax.dynamic_update_slice_in_dim(to_bias, more, start, 0)
        more = lowered(head.to_weight(hidden, across, to_logits.astype(weight.dtype)))
        more = more if sums is None else more + head.part(to_weight, start, tile).astype(more.dtype)
        more = more.astype(weight.dtype).view(to_weight.dtype) if bits else more
        if sums is None:
            more = once(more.astype(to_weight.dtype), overlap, lambda: head.part(to_weight, start, tile), head.vocab_axis)
        return to_hidden + head.to_hidden(to_logits.astype(weight.dtype), part), head.put(to_weight, more, start), to_bias

    # Zeros, and no lax.empty: within a vmap that is batched whatever it is for, and a Hessian's gradient is not.
    to_weight, to_bias = sums or (jnp.zeros(weight.shape, weight.dtype), None if bias is None else jnp.zeros_like(bias))
    to_weight = to_weight.view(jnp.uint16) if bits else to_weight
    begun = jnp.zeros(hidden.shape, accumulator(hidden.dtype)), to_weight, to_bias
    to_hidden, to_weight, to_bias = over_tiles(step, begun, vocab, tile)
    return lowered(to_hidden), to_weight.view(weight.dtype) if bits else to_weight, to_bias


def _largest(cotangents):
    """The largest number among them all, without its sign."""
    known = [jnp.max(jnp.where(jnp.isfinite(each), jnp.abs(each), 0), initial=0) for each in cotangents.values()]
    return functools.reduce(jnp.maximum, known)


def tile_gradient(reductions, head: Head, vocab: int, targets, found: Found, asides: Found, cotangents: Found):
    """to_logits_of(z, start): the gradient by what the softcap was given, from logits z [N, C] of the classes from `start` on.

    vocab: one device's classes. The rest as `share_of_gradients` has it.
    """
    column = lambda values: {name: value[:, None] for name, value in values.items()}
    to_target = _to_target(reductions, asides, cotangents)
    # What is NaN of a token, for its target is no class, is so at all its logits: of NaN times a slope that is a truth value
    # XLA makes a choice between NaN and 0.
    spoilt = jnp.where(jnp.isnan(cotangents["target"]), cotangents["target"], 0)[:, None]
    found, asides, cotangents = column(found), column(asides), column(cotangents)
    first = head.place(head.classes) * vocab

    def to_logits_of(z, start):
        row = Row(asides[SHIFT], found["target"], jnp.exp(z - asides[SHIFT]), first + start)
        to_logits = jnp.broadcast_to(spoilt, z.shape)
        for name, reduction in reductions.items():
            to_logits = to_logits + cotangents[name] * reduction.slope(found[name], asides.get(name), z, row)
        to_logits = write_at(to_logits, targets - (first + start), to_target)
        return head.before_softcap(to_logits, z)

    return to_logits_of


def _to_target(reductions, asides, cotangents):
    """The gradient by each token's z_y [N]."""
    own = {name: reduction.by_target for name, reduction in reductions.items() if reduction.by_target}
    return cotangents["target"] + sum(cotangents[name] * by_target(asides[name]) for name, by_target in own.items())


def kept_tile(kept: jax.Array, start: Any, tokens: int, tile: int) -> jax.Array:
    """The logits [tokens, tile] that `reduce` kept of the classes from `start` on."""
    return lax.dynamic_slice_in_dim(kept, _place(start, tile) * tokens, tokens * tile).reshape(tokens, tile)


def _forward(reductions, head, tile, hidden, weight, bias, targets):
    # Not `streamed` itself: a second derivative goes forward through here, which a custom rule would refuse.
    run = lambda *arrays: reduce(reductions, head, tile, *arrays)[:2]
    found, asides = head.spread(run, hidden, weight, bias, targets, out="tt")
    return found, (hidden, weight, bias, targets, found, asides)


def _backward(reductions, head, tile, kept, cotangents):
    hidden, weight, bias, targets, found, asides = kept

    def run(*arrays):
        to_hidden, *others = share_of_gradients(reductions, head, tile, *arrays)
        return head.summed(to_hidden, head.classes).astype(hidden.dtype), *head.summed(others, head.tokens)

    gradients = head.spread(run, hidden, weight, bias, targets, found, asides, cotangents, out="twb")
    return *gradients, None


streamed.defvjp(_forward, _backward)
