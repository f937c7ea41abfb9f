"""The tokens plan: chunks of tokens, for any loss; value and gradient in one pass, three matrix products, no recomputation.

The gradient is made on the way forward, where the chunk's logits are at hand, and kept: [N, D] and [D, V], which a training
step makes in any case. A call that asks for the loss alone does one product. A loss with a stream form takes the reductions
over the chunk's logits, tile by tile, and any other sees whole rows: on a mesh that splits the vocabulary the devices trade
their columns of all tokens for all columns of their tokens, and back, by two all-to-alls a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.information import weighted_sum
from xentlab.linear.logits import over_tiles
from xentlab.linear.plan import rows_at_once, tokens_held
from xentlab.linear.reductions import or_nan_outside
from xentlab.linear.stream import kept_tile, pull_back, pulling, reduce, room
from xentlab.products import accumulator, moved_whole, on_cpu, sliced


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def weighted_total(loss, stream, head, tiles, hidden, weight, bias, targets, weights):
    """The sum of weights [N] times losses [N], a scalar, differentiable by hidden [N, D], weight, bias and weights.

    stream: the loss's stream form, if it has one. tiles: tokens a chunk, classes a tile. A weight of 0 removes a token.
    """
    return weighted_sum(per_token(loss, stream, head, tiles, hidden, weight, bias, targets), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def per_token(loss, stream, head, tiles, hidden, weight, bias, targets):
    """Each token's loss [N], chunk by chunk; the way back makes a chunk's logits anew."""
    return _losses(loss, stream, head, tiles, hidden, weight, bias, targets)


def _losses(loss, stream, head, tiles, hidden, weight, bias, targets):
    def run(hidden, weight, bias, targets):
        chunk, tile = tiles

        def step(losses, start, fresh):
            part = lambda array: lax.dynamic_slice_in_dim(array, start, chunk)
            if stream is None:
                rows, own = _rows(head, head.logits(part(hidden), weight, bias), part(targets))
                each = _gathered(head, loss(rows, own))
            else:
                found, _, _ = reduce(stream.reductions, head, tile, part(hidden), weight, bias, part(targets))
                each = or_nan_outside(stream(found, _vocab(head, weight)), part(targets), _vocab(head, weight))
            return lax.dynamic_update_slice_in_dim(losses, each.astype(losses.dtype), start, 0)

        return over_tiles(step, jnp.zeros(len(hidden), accumulator(hidden.dtype)), len(hidden), chunk)

    return head.spread(run, hidden, weight, bias, targets, out="t")


def _vocab(head, weight):
    return head.vocab(weight) * head.count(head.classes)


def _rows(head, z, *per_token):
    """Whole rows of logits for this device's part of the chunk, and the same part of what there is a token."""
    if head.classes is None:
        return z, *per_token
    share = len(z) // head.count(head.classes)
    own = lambda array: lax.dynamic_slice_in_dim(array, head.place(head.classes) * share, share)
    return lax.all_to_all(z, head.classes, 0, 1, tiled=True), *map(own, per_token)


def _columns(head, pull):
    """The way back: this device's columns of the whole chunk."""
    return pull if head.classes is None else lax.all_to_all(pull, head.classes, 1, 0, tiled=True)


def _pulled(loss, head, z, targets, weights):
    """Each row's loss, and the gradient of their weighted sum by what the softcap was given: [N], [N, V]."""
    rows = rows_at_once(*z.shape, z.dtype.itemsize)

    def step(state, start, fresh):
        pull, losses = state
        part = lambda array: lax.dynamic_slice_in_dim(array, start, rows)
        put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
        block, own = sliced(pull, start, rows), part(targets)
        each, back = jax.vjp(lambda block: loss(block, own), block)
        # Where the logits were: nobody reads these again.
        return put(pull, head.before_softcap(back(part(weights).astype(each.dtype))[0], block)), put(losses, each)

    pull, each = over_tiles(step, (z, jnp.zeros(len(z), z.dtype)), len(z), rows)
    return each, pull


def _gathered(head, each):
    return each if head.classes is None else lax.all_gather(each, head.classes, tiled=True)


def _value_and_gradients(loss, stream, head, tiles, hidden, weight, bias, targets, weights):
    """Each token's loss [N], and the gradients of their weighted sum by hidden, weight and bias, in `kept_type` of theirs."""
    chunk, tile = tiles

    def run(hidden, weight, bias, targets, weights):
        dtype, vocab = accumulator(hidden.dtype), head.vocab(weight)
        if on_cpu():
            group, through = chunk, _through_rows if stream is None else _through_reductions
            # One chunk writes the weight's gradient once; more than one sum it, wide.
            summed = dtype if len(hidden) > chunk or moved_whole(weight.dtype) else kept_type(weight.dtype)
            # All chunks keep their logits in one place, which is filled once.
            kept = None if stream is None else room(chunk, vocab, tile, dtype)
        else:
            group, through, kept = tokens_held(len(hidden), chunk, vocab, weight.dtype), _through_kept_pulls, None
            summed = dtype if len(hidden) > group else None  # of one group nothing is

        def step(state, start, fresh):
            to_hidden, sums, losses, kept = state
            part = lambda array: lax.dynamic_slice_in_dim(array, start, group)
            put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
            # Tokens that come a second time weigh nothing.
            counted = part(weights) if fresh is None else jnp.where(fresh, part(weights), 0)
            more, sums, each, kept = through(part(hidden), weight, bias, part(targets), counted, sums, kept)
            return put(to_hidden, part(to_hidden).astype(more.dtype) + more), sums, put(losses, each), kept

        to_weight = None if summed is None else jnp.zeros(weight.shape, summed)
        sums = to_weight, None if bias is None else jnp.zeros(bias.shape, dtype)
        begun = (jnp.zeros(hidden.shape, kept_type(hidden.dtype)), sums, jnp.zeros(len(hidden), dtype), kept)
        to_hidden, sums, losses, _ = over_tiles(step, begun, len(hidden), group)
        to_weight, to_bias = head.summed(sums, head.tokens)
        to_bias = None if bias is None else to_bias.astype(kept_type(bias.dtype))
        return losses, head.summed(to_hidden, head.classes), to_weight.astype(kept_type(weight.dtype)), to_bias

    def _through_reductions(hidden, weight, bias, targets, weights, sums, kept):
        """A CPU's way: all three products of a chunk, tile by tile, while its logits are in the cache."""
        each, found, kept = _reduced(hidden, weight, bias, targets, weights, kept)
        to_hidden, *sums = pull_back(stream.reductions, head, tile, hidden, weight, bias, targets, *found, kept=kept, sums=sums)
        return to_hidden, tuple(sums), each, kept

    def _reduced(hidden, weight, bias, targets, weights, kept):
        """Each token's loss; the reductions' values, asides and cotangents; and the logits, where `kept` was."""
        found, asides, kept = reduce(stream.reductions, head, tile, hidden, weight, bias, targets, kept)
        vocab = _vocab(head, weight)
        each, back = jax.vjp(lambda found: or_nan_outside(stream(found, vocab), targets, vocab), found)
        return each, (found, asides, back(weights.astype(each.dtype))[0]), kept

    def _through_rows(hidden, weight, bias, targets, weights, sums, kept):
        """A CPU's way for a loss that sees rows."""
        each, pull = _of_rows(hidden, weight, bias, targets, weights)
        to_weight, to_bias = sums
        to_bias = None if bias is None else to_bias + jnp.sum(pull, axis=0)
        pull, across = pull.astype(weight.dtype), head.across(hidden)

        def add(to_weight, start, fresh):
            columns = lax.dynamic_slice_in_dim(pull, start, tile, 1)
            columns = columns if fresh is None else jnp.where(fresh[None], columns, 0)
            # Tile by tile in place: a whole [D, V] product would be a second one beside the sum.
            more = head.to_weight(hidden, across, columns)
            return head.put(to_weight, more + head.part(to_weight, start, tile).astype(more.dtype), start)

        to_weight = over_tiles(add, to_weight, head.vocab(weight), tile)
        return head.to_hidden(pull, weight), (to_weight, to_bias), each, kept

    def _of_rows(hidden, weight, bias, targets, weights):
        """Each token's loss, and this device's columns of the gradient by the logits."""
        each, pull = _pulled(loss, head, *_rows(head, head.logits(hidden, weight, bias), targets, weights))
        return _gathered(head, each), _columns(head, pull)

    def _through_kept_pulls(hidden, weight, bias, targets, weights, sums, kept):
        """A chip's way: chunks' gradients by the logits are kept, in the weight's type, and two large products take them all.

        Each chunk's own would read the weight, and the sum of its gradients, once more: memory is what a chip waits for.
        """
        dtype, group = accumulator(hidden.dtype), len(hidden)
        to_weight, to_bias = sums

        def step(state, start, fresh):
            pulls, losses, to_bias = state
            rows, *own = (lax.dynamic_slice_in_dim(array, start, chunk) for array in (hidden, targets, weights))
            pulls, each, more = _with_pull(pulls, start, fresh, rows, weight, bias, *own)
            losses = lax.dynamic_update_slice_in_dim(losses, each.astype(dtype), start, 0)
            return pulls, losses, None if bias is None else to_bias + more

        begun = lax.empty((group, head.vocab(weight)), weight.dtype), jnp.zeros(group, dtype), to_bias
        pulls, losses, to_bias = over_tiles(step, begun, group, chunk)
        to_hidden = head.to_hidden(pulls, weight)
        # The only one is rounded as it is made: a wide one beside it would be the largest thing here.
        more = head.to_weight(hidden, head.across(hidden), pulls, kept_type(weight.dtype) if to_weight is None else None)
        to_weight = more if to_weight is None else to_weight + more
        return to_hidden, (to_weight, to_bias), losses, kept

    def _with_pull(pulls, start, fresh, hidden, weight, bias, targets, weights):
        """The pulls with a chunk's from row `start` on, its losses, and, if there is a bias, the sum [V] of its fresh rows.

        Summed before they are rounded: of a large vocabulary's float16 would keep nothing.
        """
        summed = lambda pull: jnp.sum(pull if fresh is None else jnp.where(fresh[:, None], pull, 0), axis=0)
        if stream is None:
            each, pull = _of_rows(hidden, weight, bias, targets, weights)
            pulls = lax.dynamic_update_slice_in_dim(pulls, pull.astype(pulls.dtype), start, 0)
            return pulls, each, None if bias is None else summed(pull)
        vocab, dtype = head.vocab(weight), accumulator(hidden.dtype)
        each, found, z = _reduced(hidden, weight, bias, targets, weights, room(chunk, vocab, tile, dtype))
        pull_of = pulling(stream.reductions, head, vocab, targets, *found)

        def put(state, first, _):
            pulls, to_bias = state
            pull = pull_of(kept_tile(z, first, chunk, tile), first)
            if bias is not None:
                to_bias = lax.dynamic_update_slice_in_dim(to_bias, summed(pull).astype(dtype), first, 0)
            return lax.dynamic_update_slice(pulls, pull.astype(pulls.dtype), (start, first)), to_bias

        pulls, to_bias = over_tiles(put, (pulls, None if bias is None else jnp.zeros(vocab, dtype)), vocab, tile)
        return pulls, each, to_bias

    if weight.dtype != jnp.float16:
        return head.spread(run, hidden, weight, bias, targets, weights, out="ttwb")
    # The greatest weight is made 1: a mean's 1 / N would leave most shares of a vocabulary below float16's least number.
    size = lax.stop_gradient(jnp.max(jnp.abs(weights)))
    lift = jnp.exp2(-jnp.round(jnp.log2(jnp.where(size > 0, size, 1))))
    losses, *gradients = head.spread(run, hidden, weight, bias, targets, weights * lift, out="ttwb")
    return losses, *(None if each is None else each / lift for each in gradients)


def kept_type(dtype):
    """What a gradient waits in for what it is to be multiplied by: float16 would lose, or not hold, what a scale saves."""
    return accumulator(dtype) if dtype == jnp.float16 else dtype


def _total_forward(loss, stream, head, tiles, hidden, weight, bias, targets, weights):
    losses, *gradients = _value_and_gradients(loss, stream, head, tiles, hidden, weight, bias, targets, weights)
    losses = jnp.where(weights == 0, 0, losses).astype(weights.dtype)
    like = [None if each is None else each[:0] for each in (hidden, weight, bias, losses)]  # their types
    return weighted_sum(losses, weights), ((*gradients, losses), like)


def _total_backward(loss, stream, head, tiles, kept, cotangent):
    # In the wider of both types: as float16 the usual scale of a loss, 2^16, is infinite.
    scaled = lambda array, like: None if array is None else (array.astype(cotangent.dtype) * cotangent).astype(like.dtype)
    to_hidden, to_weight, to_bias, losses = map(scaled, *kept)
    return to_hidden, to_weight, to_bias, None, losses


def _each_forward(loss, stream, head, tiles, *arrays):
    return _losses(loss, stream, head, tiles, *arrays), arrays


def _each_backward(loss, stream, head, tiles, kept, cotangents):
    gradients = _value_and_gradients(loss, stream, head, tiles, *kept, cotangents)[1:]
    cast = lambda array, like: None if array is None else array.astype(like.dtype)
    return *map(cast, gradients, kept[:3]), None


weighted_total.defvjp(_total_forward, _total_backward)
per_token.defvjp(_each_forward, _each_backward)
