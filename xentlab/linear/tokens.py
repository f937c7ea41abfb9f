"""The tokens plan: chunks of tokens, for any loss; value and gradient in one pass, three matrix products, no recomputation.

The gradient is made on the way forward, where the chunk's logits are at hand, and kept: [N, D] and [D, V], which a training
step makes in any case. A call that asks for the loss alone does one product. A loss with a stream form takes the reductions
over the chunk's logits, tile by tile, and any other sees whole rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.information import weighted_sum
from xentlab.linear.logits import Head, once, over_tiles
from xentlab.linear.plan import tokens_held
from xentlab.linear.reductions import Reduction
from xentlab.linear.rows import row_gradients, row_losses
from xentlab.linear.scored import Score, added, losses_of, no_gradients
from xentlab.linear.stream import kept_tile, reduce, room, share_of_gradients, tile_gradient
from xentlab.products import accumulator, lift, moved_whole, on_cpu, part_of

GREATEST = 2**15  # what float16 surely holds
MARGIN = 16  # a rival's, by which it may push


@dataclasses.dataclass(frozen=True)
class How:
    """How a pass goes: the loss, as `scored` has it, the reductions of its stream form, if it has one, the head, and tiles.

    chunk: tokens. tile: classes.
    """

    score: Score
    reductions: Mapping[str, Reduction] | None
    head: Head
    chunk: int
    tile: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_total(how: How, hidden, weight, bias, targets, weights, values):
    """The sum of weights [N] times losses [N], a scalar, differentiable by hidden [N, D], weight, bias, weights and values.

    values: as `scored` has them. A weight of 0 removes a token.
    """
    return weighted_sum(per_token(how, hidden, weight, bias, targets, values), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def per_token(how: How, hidden, weight, bias, targets, values):
    """Each token's loss [N], chunk by chunk; the way back makes a chunk's logits anew."""
    return _losses(how, hidden, weight, bias, targets, values)


def _losses(how, *arrays):
    return how.head.spread(functools.partial(_share_of_losses, how), *arrays, out="t")


def _share_of_losses(how, hidden, weight, bias, targets, values):
    """One device's way forward."""

    def step(losses, start, _):
        part = lambda array: part_of(array, start, how.chunk)
        if how.reductions is None:
            each = row_losses(how.score, how.head, how.head.logits(part(hidden), weight, bias), part(targets), values)
        else:
            found, _, _ = reduce(how.reductions, how.head, how.tile, part(hidden), weight, bias, part(targets))
            each = losses_of(how.score, found, part(targets), values)
        return lax.dynamic_update_slice_in_dim(losses, each.astype(losses.dtype), start, 0)

    return over_tiles(step, jnp.zeros(len(hidden), accumulator(hidden.dtype)), len(hidden), how.chunk)


def _value_and_gradients(how, hidden, weight, bias, targets, weights, values):
    """Each token's loss [N]; gradients of their weighted sum by hidden, weight, bias, in `kept_type`s, and by values."""
    share = functools.partial(_share_of_gradients, how)
    spread = lambda weights: how.head.spread(share, hidden, weight, bias, targets, weights, values, out="ttwba")
    if weight.dtype != jnp.float16:
        losses, *gradients = spread(weights)
        return losses, gradients
    # The greatest weight is made 1: a mean's 1 / N would leave most shares of a vocabulary below float16's least number. Less
    # where all rivals may push the target at once, whose sum is to stay below the greatest number.
    most = how.head.vocab(weight) / GREATEST
    if how.reductions is not None:
        most = most * MARGIN if any(reduction.by_target for reduction in how.reductions.values()) else 1
    factor = lift(max(1, most) * jnp.max(jnp.where(jnp.isfinite(weights), jnp.abs(weights), 0)))
    losses, *gradients = spread(weights * factor)
    return losses, jax.tree.map(lambda each: each / factor, gradients)


def _share_of_gradients(how, hidden, weight, bias, targets, weights, values):
    """One device's way forward and back: what `_value_and_gradients` gives, of its tokens and classes."""
    dtype, head, by_rows = accumulator(hidden.dtype), how.head, how.reductions is None
    if on_cpu():
        group, through = how.chunk, _through_rows if by_rows else _through_reductions
        # One chunk writes the weight's gradient once; more than one sum it, wide.
        summed = dtype if len(hidden) > group or moved_whole(weight.dtype) else kept_type(weight.dtype)
        # All chunks keep their logits in one place, which is filled once.
        kept = None if by_rows else room(group, head.vocab(weight), how.tile, dtype)
    else:
        group = tokens_held(len(hidden), how.chunk, head.vocab(weight), weight.dtype)
        through, kept = _through_kept_gradients, None
        summed = dtype if len(hidden) > group else None  # of one group nothing is

    def step(state, start, overlap):
        to_hidden, sums, losses, kept = state
        part = lambda array: part_of(array, start, group)
        put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
        # Tokens that come a second time weigh nothing.
        counted = once(part(weights), overlap, 0)
        shown = part(hidden), weight, bias, part(targets), counted, values
        more, sums, each, kept = through(how, *shown, sums, kept)
        more = once(more, overlap, 0)  # of an infinite gradient it would be 0 times that
        return put(to_hidden, part(to_hidden).astype(more.dtype) + more), sums, put(losses, each), kept

    to_weight = None if summed is None else jnp.zeros(weight.shape, summed)
    sums = to_weight, None if bias is None else jnp.zeros(bias.shape, dtype), no_gradients(values)
    # Devices' shares are summed before they are rounded.
    waits = dtype if head.classes else kept_type(hidden.dtype)
    begun = (jnp.zeros(hidden.shape, waits), sums, jnp.zeros(len(hidden), dtype), kept)
    to_hidden, sums, losses, _ = over_tiles(step, begun, len(hidden), group)
    to_weight, to_bias, to_values = head.summed(sums, head.tokens)
    to_bias = None if bias is None else to_bias.astype(kept_type(bias.dtype))
    if by_rows:  # whole rows are each of another device's
        to_values = head.summed(to_values, head.classes)
    to_weight = to_weight.astype(kept_type(weight.dtype))
    return losses, head.summed(to_hidden, head.classes), to_weight, to_bias, to_values


def _through_reductions(how, hidden, weight, bias, targets, weights, values, sums, kept):
    """A CPU's way: all three products of a chunk, tile by tile, while its logits are in the cache."""
    *sums, to_values = sums
    each, found, to_values, kept = _reduced(how, hidden, weight, bias, targets, weights, values, to_values, kept)
    arrays = hidden, weight, bias, targets, *found
    to_hidden, *sums = share_of_gradients(how.reductions, how.head, how.tile, *arrays, kept=kept, sums=sums)
    return to_hidden, (*sums, to_values), each, kept


def _reduced(how, hidden, weight, bias, targets, weights, values, to_values, kept):
    """Each token's loss; the reductions' values, asides and cotangents; values' sums; and the logits, where `kept` was."""
    found, asides, kept = reduce(how.reductions, how.head, how.tile, hidden, weight, bias, targets, kept)
    each, back = jax.vjp(lambda found, values: how.score(found, targets, values), found, values)
    cotangents, more = back(weights.astype(each.dtype))
    return each, (found, asides, cotangents), added(to_values, more), kept


def _through_rows(how, hidden, weight, bias, targets, weights, values, sums, kept):
    """A CPU's way for a loss that sees rows."""
    head, tile = how.head, how.tile
    to_weight, to_bias, to_values = sums
    z = head.logits(hidden, weight, bias)
    each, to_logits, to_values = row_gradients(how.score, head, z, targets, weights, values, to_values)
    to_bias = None if bias is None else to_bias + jnp.sum(to_logits, axis=0)
    to_logits, across = to_logits.astype(weight.dtype), head.across(hidden)

    def add(to_weight, start, overlap):
        columns = once(lax.dynamic_slice_in_dim(to_logits, start, tile, 1), overlap, 0, 1)
        # Tile by tile in place: a whole [D, V] product would be a second one beside the sum.
        more = head.to_weight(hidden, across, columns)
        return head.put(to_weight, more + head.part(to_weight, start, tile).astype(more.dtype), start)

    to_weight = over_tiles(add, to_weight, head.vocab(weight), tile)
    return head.to_hidden(to_logits, weight), (to_weight, to_bias, to_values), each, kept


def _through_kept_gradients(how, hidden, weight, bias, targets, weights, values, sums, kept):
    """A chip's way: chunks' gradients by the logits are kept, in the weight's type, and two large products take them all.

    Each chunk's own would read the weight, and the sum of its gradients, once more: memory is what a chip waits for.
    """
    dtype, group, head = accumulator(hidden.dtype), len(hidden), how.head
    to_weight, *others = sums

    def step(state, start, overlap):
        to_logits, losses, to_bias, to_values = state
        part = lambda array: lax.dynamic_slice_in_dim(array, start, how.chunk)
        twice = bool(values) and overlap is not None  # some tokens are seen a second time, by sums that would count it
        had, counted = part(to_logits), once(part(weights), overlap, 0) if twice else part(weights)
        own = part(targets), counted, values, to_values
        to_logits, each, more, to_values = _with_chunk(how, to_logits, start, overlap, part(hidden), weight, bias, *own)
        if twice:
            new = once(part(to_logits), overlap, had)
            to_logits = lax.dynamic_update_slice_in_dim(to_logits, new, start, 0)
        losses = lax.dynamic_update_slice_in_dim(losses, each.astype(dtype), start, 0)
        return to_logits, losses, None if bias is None else to_bias + more, to_values

    begun = jnp.zeros((group, head.vocab(weight)), weight.dtype), jnp.zeros(group, dtype), *others
    to_logits, losses, *others = over_tiles(step, begun, group, how.chunk)
    to_hidden = head.to_hidden(to_logits, weight)
    # The only one is rounded as it is made: a wide one beside it would be the largest thing here.
    more = head.to_weight(hidden, head.across(hidden), to_logits, kept_type(weight.dtype) if to_weight is None else None)
    to_weight = more if to_weight is None else to_weight + more
    return to_hidden, (to_weight, *others), losses, kept


def _with_chunk(how, to_logits, start, overlap, hidden, weight, bias, targets, weights, values, to_values):
    """to_logits with a chunk's from row `start` on, its losses, the sum [V] of its rows for a bias (once each), values' sums.

    Summed before they are rounded: of a large vocabulary's float16 would keep nothing.
    """
    head, tile = how.head, how.tile
    summed = lambda new: jnp.sum(once(new, overlap, 0), axis=0)
    if how.reductions is None:
        z = head.logits(hidden, weight, bias)
        each, new, to_values = row_gradients(how.score, head, z, targets, weights, values, to_values)
        to_logits = lax.dynamic_update_slice_in_dim(to_logits, new.astype(to_logits.dtype), start, 0)
        return to_logits, each, None if bias is None else summed(new), to_values
    vocab, dtype = head.vocab(weight), accumulator(hidden.dtype)
    kept = room(how.chunk, vocab, tile, dtype)
    each, found, to_values, z = _reduced(how, hidden, weight, bias, targets, weights, values, to_values, kept)
    to_logits_of = tile_gradient(how.reductions, head, vocab, targets, *found)

    def put(state, first, _):
        to_logits, to_bias = state
        new = to_logits_of(kept_tile(z, first, how.chunk, tile), first)
        if bias is not None:
            to_bias = lax.dynamic_update_slice_in_dim(to_bias, summed(new).astype(dtype), first, 0)
        return lax.dynamic_update_slice(to_logits, new.astype(to_logits.dtype), (start, first)), to_bias

    to_logits, to_bias = over_tiles(put, (to_logits, None if bias is None else jnp.zeros(vocab, dtype)), vocab, tile)
    return to_logits, each, to_bias, to_values


def kept_type(dtype):
    """What a gradient waits in for what it is to be multiplied by: float16 would lose, or not hold, what a scale saves."""
    return accumulator(dtype) if dtype == jnp.float16 else dtype


def _total_forward(how, hidden, weight, bias, targets, weights, values):
    losses, gradients = _value_and_gradients(how, hidden, weight, bias, targets, weights, values)
    losses = jnp.where(weights == 0, 0, losses).astype(weights.dtype)
    like = [None if each is None else each[:0] for each in (hidden, weight, bias)]  # their types
    return weighted_sum(losses, weights), (gradients, like, losses, [each.ravel()[:0] for each in values])


def _total_backward(how, kept, cotangent):
    # In the wider of both types: as float16 the usual scale of a loss, 2^16, is infinite.
    scaled = lambda array, like: None if array is None else (array.astype(cotangent.dtype) * cotangent).astype(like.dtype)
    (*gradients, to_values), like, losses, values = kept
    to_hidden, to_weight, to_bias = map(scaled, gradients, like)
    return to_hidden, to_weight, to_bias, None, scaled(losses, losses), list(map(scaled, to_values, values))


def _each_forward(how, *arrays):
    return _losses(how, *arrays), arrays


def _each_backward(how, kept, cotangents):
    *arrays, values = kept
    _, (*gradients, to_values) = _value_and_gradients(how, *arrays, cotangents, values)
    cast = lambda array, like: None if array is None else array.astype(like.dtype)
    return *map(cast, gradients, kept[:3]), None, list(map(cast, to_values, values))


weighted_total.defvjp(_total_forward, _total_backward)
per_token.defvjp(_each_forward, _each_backward)
