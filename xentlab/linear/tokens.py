"""The tokens plan: chunks of tokens, for any loss; value and gradient in one pass, three matrix products, no recomputation.

The gradient is made on the way forward, where the chunk's logits are at hand, and kept: [N, D] and [D, V], which a training
step makes in any case. A call that asks for the loss alone does one product. A loss with a stream form takes the reductions
over the chunk's logits, tile by tile, and any other sees whole rows: on a mesh that splits the vocabulary the devices trade
their columns of all tokens for all columns of their tokens, and back, by two all-to-alls a chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh

from xentlab.contract import LabError, Loss
from xentlab.information import weighted_sum
from xentlab.linear.logits import over_tiles
from xentlab.linear.plan import rows_at_once, tokens_held
from xentlab.linear.reductions import Stream, or_nan_outside
from xentlab.linear.stream import kept_tile, reduce, room, share_of_gradients, tile_gradient
from xentlab.products import accumulator, lift, moved_whole, on_cpu, part_of, sliced

GREATEST = 2**15  # what float16 surely holds
MARGIN = 16  # a rival's, by which it may push

Score = Callable[[Any, jax.Array, list[jax.Array]], jax.Array]


def scored(
    loss: Loss, stream: Stream | None, vocab: int, dtype: Any, mesh: Mesh | None = None, varies: bool = False
) -> tuple[Score, list[jax.Array]]:
    """How a loss is had from what a chunk shows of its tokens, and the values that it closes over and JAX traces.

    score(seen, targets, values) -> each token's loss [N]; seen: whole rows of logits [N, V], or, of a loss with a stream form,
    its reductions' values [N] by name. JAX differentiates by arguments alone, and a loop of chunks has a rule of its own: what
    a loss closes over, a temperature that is learned say, would be out of reach. varies: in the caller's own `jax.shard_map`,
    where JAX keeps account of what varies over its mesh; a function that was traced on what does not cannot be called there.
    """
    if stream is None:
        score = lambda rows, targets: or_nan_outside(loss(rows, targets), targets, vocab)
        one = jax.ShapeDtypeStruct((vocab,), dtype)
    else:
        score = lambda found, targets: or_nan_outside(stream(found, vocab), targets, vocab)
        one = dict.fromkeys((*stream.reductions, "target"), jax.ShapeDtypeStruct((), dtype))
    alone = lambda seen, target: score(jax.tree.map(lambda each: each[None], seen), target[None])[0]
    here = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(here if here.manual_axes else jax.sharding.AbstractMesh((), ())):
        traced = jax.make_jaxpr(alone)(one, jax.ShapeDtypeStruct((), jnp.int32))
    if any(jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key) for value in traced.consts):
        raise LabError(
            "the loss closes over a random key, and would draw the same for many tokens, which the head scores in parts. Take "
            "it of whole logits, loss(hidden @ weight, targets)."
        )
    if mesh is not None and any(_on_a_mesh(value) for value in traced.consts):
        raise LabError(
            "the loss closes over an array that lies on a mesh, which JAX lets into no device's part of it. A number that jit "
            "is given from elsewhere may be closed over; plan 'stream' takes any, if the loss has a stream form; class weights "
            "are token_weights=class_weights[targets] with reduction='sum', over the number of tokens for a mean."
        )
    places = [i for i, value in enumerate(traced.consts) if isinstance(value, jax.core.Tracer)]
    if varies or not places:
        return lambda seen, targets, values: score(seen, targets), []

    def of_one(seen, target, values):
        consts = list(traced.consts)
        for i, value in zip(places, values, strict=True):
            consts[i] = value
        return jaxpr_as_fun(traced.replace(consts=consts))(*jax.tree.leaves((seen, target)))[0]

    return jax.vmap(of_one, (0, 0, None)), [traced.consts[i] for i in places]


def _on_a_mesh(value) -> bool:
    return isinstance(value, jax.Array) and not jax.typeof(value).sharding.mesh.empty


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def weighted_total(score, reductions, head, tiles, hidden, weight, bias, targets, weights, values):
    """The sum of weights [N] times losses [N], a scalar, differentiable by hidden [N, D], weight, bias, weights and values.

    score, values: as `scored` has them. reductions: those of the loss's stream form, if it has one. tiles: tokens a chunk,
    classes a tile. A weight of 0 removes a token.
    """
    return weighted_sum(per_token(score, reductions, head, tiles, hidden, weight, bias, targets, values), weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def per_token(score, reductions, head, tiles, hidden, weight, bias, targets, values):
    """Each token's loss [N], chunk by chunk; the way back makes a chunk's logits anew."""
    return _losses(score, reductions, head, tiles, hidden, weight, bias, targets, values)


def _losses(score, reductions, head, tiles, hidden, weight, bias, targets, values):
    def run(hidden, weight, bias, targets, values):
        chunk, tile = tiles

        def step(losses, start, fresh):
            part = lambda array: part_of(array, start, chunk)
            if reductions is None:
                each = _gathered(
                    head, _of_blocks(score, values, *_rows(head, head.logits(part(hidden), weight, bias), part(targets)))
                )
            else:
                found, _, _ = reduce(reductions, head, tile, part(hidden), weight, bias, part(targets))
                each = _value(score, found, part(targets), values)
            return lax.dynamic_update_slice_in_dim(losses, each.astype(losses.dtype), start, 0)

        return over_tiles(step, jnp.zeros(len(hidden), accumulator(hidden.dtype)), len(hidden), chunk)

    return head.spread(run, hidden, weight, bias, targets, values, out="t")


def _value(score, seen, targets, values):
    """Each token's loss, so that it can be differentiated forward where the loss, by a custom_vjp, cannot."""
    return jax.vjp(lambda seen, values: score(seen, targets, values), seen, values)[0]


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


def _of_blocks(score, values, z, targets):
    """Each row's loss [N], some rows at a time."""
    rows = rows_at_once(*z.shape, z.dtype.itemsize)

    def step(losses, start, _):
        each = _value(score, sliced(z, start, rows), lax.dynamic_slice_in_dim(targets, start, rows), values)
        return lax.dynamic_update_slice_in_dim(losses, each.astype(losses.dtype), start, 0)

    return over_tiles(step, jnp.zeros(len(z), z.dtype), len(z), rows)


def _pulled(score, head, z, targets, weights, values, to_values):
    """Each row's loss, and gradients of their weighted sum: by what the softcap was given; by values, added to `to_values`."""
    rows = rows_at_once(*z.shape, z.dtype.itemsize)

    def step(state, start, fresh):
        pull, losses, to_values = state
        part = lambda array: lax.dynamic_slice_in_dim(array, start, rows)
        put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
        block, own = sliced(pull, start, rows), part(targets)
        each, back = jax.vjp(lambda block, values: score(block, own, values), block, values)
        counted = part(weights) if fresh is None else jnp.where(fresh, part(weights), 0)
        to_block, more = back(counted.astype(each.dtype))
        new = head.before_softcap(to_block, block)
        if fresh is not None:  # of rows that an earlier block has had the gradient is there, and the logits are not
            new, each = jnp.where(fresh[:, None], new, block), jnp.where(fresh, each, part(losses))
        # Where the logits were: nobody reads these again.
        return put(pull, new), put(losses, each), _more(to_values, more)

    pull, each, to_values = over_tiles(step, (z, jnp.zeros(len(z), z.dtype), to_values), len(z), rows)
    return each, pull, to_values


def _nothing_yet(values):
    """Sums of the gradients by values, each wide; None for one, an integer say, that has no gradient."""
    has_one = lambda value: jnp.issubdtype(value.dtype, jnp.floating)
    return [jnp.zeros(value.shape, accumulator(value.dtype)) if has_one(value) else None for value in values]


def _more(sums, gradients):
    return [None if had is None else had + more.astype(had.dtype) for had, more in zip(sums, gradients, strict=True)]


def _gathered(head, each):
    return each if head.classes is None else lax.all_gather(each, head.classes, tiled=True)


def _value_and_gradients(score, reductions, head, tiles, hidden, weight, bias, targets, weights, values):
    """Each token's loss [N]; gradients of their weighted sum by hidden, weight, bias, in `kept_type`s, and by values."""
    chunk, tile = tiles

    def run(hidden, weight, bias, targets, weights, values):
        dtype, vocab = accumulator(hidden.dtype), head.vocab(weight)
        if on_cpu():
            group, through = chunk, _through_rows if reductions is None else _through_reductions
            # One chunk writes the weight's gradient once; more than one sum it, wide.
            summed = dtype if len(hidden) > chunk or moved_whole(weight.dtype) else kept_type(weight.dtype)
            # All chunks keep their logits in one place, which is filled once.
            kept = None if reductions is None else room(chunk, vocab, tile, dtype)
        else:
            group, through, kept = tokens_held(len(hidden), chunk, vocab, weight.dtype), _through_kept_pulls, None
            summed = dtype if len(hidden) > group else None  # of one group nothing is

        def step(state, start, fresh):
            to_hidden, sums, losses, kept = state
            part = lambda array: part_of(array, start, group)
            put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
            # Tokens that come a second time weigh nothing.
            counted = part(weights) if fresh is None else jnp.where(fresh, part(weights), 0)
            shown = part(hidden), weight, bias, part(targets), counted, values
            more, sums, each, kept = through(*shown, sums, kept)
            return put(to_hidden, part(to_hidden).astype(more.dtype) + more), sums, put(losses, each), kept

        to_weight = None if summed is None else jnp.zeros(weight.shape, summed)
        sums = to_weight, None if bias is None else jnp.zeros(bias.shape, dtype), _nothing_yet(values)
        # Devices' shares are summed before they are rounded.
        waits = dtype if head.classes else kept_type(hidden.dtype)
        begun = (jnp.zeros(hidden.shape, waits), sums, jnp.zeros(len(hidden), dtype), kept)
        to_hidden, sums, losses, _ = over_tiles(step, begun, len(hidden), group)
        to_weight, to_bias, to_values = head.summed(sums, head.tokens)
        to_bias = None if bias is None else to_bias.astype(kept_type(bias.dtype))
        if reductions is None:  # whole rows are each of another device's
            to_values = head.summed(to_values, head.classes)
        to_weight = to_weight.astype(kept_type(weight.dtype))
        return losses, head.summed(to_hidden, head.classes), to_weight, to_bias, to_values

    def _through_reductions(hidden, weight, bias, targets, weights, values, sums, kept):
        """A CPU's way: all three products of a chunk, tile by tile, while its logits are in the cache."""
        *sums, to_values = sums
        each, found, to_values, kept = _reduced(hidden, weight, bias, targets, weights, values, to_values, kept)
        to_hidden, *sums = share_of_gradients(
            reductions, head, tile, hidden, weight, bias, targets, *found, kept=kept, sums=sums
        )
        return to_hidden, (*sums, to_values), each, kept

    def _reduced(hidden, weight, bias, targets, weights, values, to_values, kept):
        """Each token's loss; the reductions' values, asides and cotangents; values' sums; and the logits, where `kept` was."""
        found, asides, kept = reduce(reductions, head, tile, hidden, weight, bias, targets, kept)
        each, back = jax.vjp(lambda found, values: score(found, targets, values), found, values)
        cotangents, more = back(weights.astype(each.dtype))
        return each, (found, asides, cotangents), _more(to_values, more), kept

    def _through_rows(hidden, weight, bias, targets, weights, values, sums, kept):
        """A CPU's way for a loss that sees rows."""
        to_weight, to_bias, to_values = sums
        each, pull, to_values = _of_rows(hidden, weight, bias, targets, weights, values, to_values)
        to_bias = None if bias is None else to_bias + jnp.sum(pull, axis=0)
        pull, across = pull.astype(weight.dtype), head.across(hidden)

        def add(to_weight, start, fresh):
            columns = lax.dynamic_slice_in_dim(pull, start, tile, 1)
            columns = columns if fresh is None else jnp.where(fresh[None], columns, 0)
            # Tile by tile in place: a whole [D, V] product would be a second one beside the sum.
            more = head.to_weight(hidden, across, columns)
            return head.put(to_weight, more + head.part(to_weight, start, tile).astype(more.dtype), start)

        to_weight = over_tiles(add, to_weight, head.vocab(weight), tile)
        return head.to_hidden(pull, weight), (to_weight, to_bias, to_values), each, kept

    def _of_rows(hidden, weight, bias, targets, weights, values, to_values):
        """Each token's loss, this device's columns of the gradient by the logits, and values' sums."""
        rows = _rows(head, head.logits(hidden, weight, bias), targets, weights)
        each, pull, to_values = _pulled(score, head, *rows, values, to_values)
        return _gathered(head, each), _columns(head, pull), to_values

    def _through_kept_pulls(hidden, weight, bias, targets, weights, values, sums, kept):
        """A chip's way: chunks' gradients by the logits are kept, in the weight's type, and two large products take them all.

        Each chunk's own would read the weight, and the sum of its gradients, once more: memory is what a chip waits for.
        """
        dtype, group = accumulator(hidden.dtype), len(hidden)
        to_weight, *others = sums

        def step(state, start, fresh):
            pulls, losses, to_bias, to_values = state
            part = lambda array: lax.dynamic_slice_in_dim(array, start, chunk)
            twice = bool(values) and fresh is not None  # some tokens are seen a second time, by sums that would count it
            had, counted = part(pulls), jnp.where(fresh, part(weights), 0) if twice else part(weights)
            own = part(targets), counted, values, to_values
            pulls, each, more, to_values = _with_pull(pulls, start, fresh, part(hidden), weight, bias, *own)
            if twice:
                pulls = lax.dynamic_update_slice_in_dim(pulls, jnp.where(fresh[:, None], part(pulls), had), start, 0)
            losses = lax.dynamic_update_slice_in_dim(losses, each.astype(dtype), start, 0)
            return pulls, losses, None if bias is None else to_bias + more, to_values

        begun = lax.empty((group, head.vocab(weight)), weight.dtype), jnp.zeros(group, dtype), *others
        pulls, losses, *others = over_tiles(step, begun, group, chunk)
        to_hidden = head.to_hidden(pulls, weight)
        # The only one is rounded as it is made: a wide one beside it would be the largest thing here.
        more = head.to_weight(hidden, head.across(hidden), pulls, kept_type(weight.dtype) if to_weight is None else None)
        to_weight = more if to_weight is None else to_weight + more
        return to_hidden, (to_weight, *others), losses, kept

    def _with_pull(pulls, start, fresh, hidden, weight, bias, targets, weights, values, to_values):
        """The pulls with a chunk's from row `start` on, its losses, the sum [V] of its fresh rows for a bias, and values' sums.

        Summed before they are rounded: of a large vocabulary's float16 would keep nothing.
        """
        summed = lambda pull: jnp.sum(pull if fresh is None else jnp.where(fresh[:, None], pull, 0), axis=0)
        if reductions is None:
            each, pull, to_values = _of_rows(hidden, weight, bias, targets, weights, values, to_values)
            pulls = lax.dynamic_update_slice_in_dim(pulls, pull.astype(pulls.dtype), start, 0)
            return pulls, each, None if bias is None else summed(pull), to_values
        vocab, dtype = head.vocab(weight), accumulator(hidden.dtype)
        kept = room(chunk, vocab, tile, dtype)
        each, found, to_values, z = _reduced(hidden, weight, bias, targets, weights, values, to_values, kept)
        to_logits_of = tile_gradient(reductions, head, vocab, targets, *found)

        def put(state, first, _):
            pulls, to_bias = state
            pull = to_logits_of(kept_tile(z, first, chunk, tile), first)
            if bias is not None:
                to_bias = lax.dynamic_update_slice_in_dim(to_bias, summed(pull).astype(dtype), first, 0)
            return lax.dynamic_update_slice(pulls, pull.astype(pulls.dtype), (start, first)), to_bias

        pulls, to_bias = over_tiles(put, (pulls, None if bias is None else jnp.zeros(vocab, dtype)), vocab, tile)
        return pulls, each, to_bias, to_values

    if weight.dtype != jnp.float16:
        losses, *gradients = head.spread(run, hidden, weight, bias, targets, weights, values, out="ttwba")
        return losses, gradients
    # The greatest weight is made 1: a mean's 1 / N would leave most shares of a vocabulary below float16's least number. Less
    # where all rivals may push the target at once, whose sum is to stay below the greatest number.
    most = head.vocab(weight) / GREATEST
    if reductions is not None:
        most = most * MARGIN if any(reduction.by_target for reduction in reductions.values()) else 1
    factor = lift(max(1, most) * jnp.max(jnp.where(jnp.isfinite(weights), jnp.abs(weights), 0)))
    losses, *gradients = head.spread(run, hidden, weight, bias, targets, weights * factor, values, out="ttwba")
    return losses, jax.tree.map(lambda each: each / factor, gradients)


def kept_type(dtype):
    """What a gradient waits in for what it is to be multiplied by: float16 would lose, or not hold, what a scale saves."""
    return accumulator(dtype) if dtype == jnp.float16 else dtype


def _total_forward(score, reductions, head, tiles, hidden, weight, bias, targets, weights, values):
    losses, gradients = _value_and_gradients(score, reductions, head, tiles, hidden, weight, bias, targets, weights, values)
    losses = jnp.where(weights == 0, 0, losses).astype(weights.dtype)
    like = [None if each is None else each[:0] for each in (hidden, weight, bias)]  # their types
    return weighted_sum(losses, weights), (gradients, like, losses, [each.ravel()[:0] for each in values])


def _total_backward(score, reductions, head, tiles, kept, cotangent):
    # In the wider of both types: as float16 the usual scale of a loss, 2^16, is infinite.
    scaled = lambda array, like: None if array is None else (array.astype(cotangent.dtype) * cotangent).astype(like.dtype)
    (*gradients, to_values), like, losses, values = kept
    to_hidden, to_weight, to_bias = map(scaled, gradients, like)
    return to_hidden, to_weight, to_bias, None, scaled(losses, losses), list(map(scaled, to_values, values))


def _each_forward(score, reductions, head, tiles, *arrays):
    return _losses(score, reductions, head, tiles, *arrays), arrays


def _each_backward(score, reductions, head, tiles, kept, cotangents):
    *arrays, values = kept
    _, (*gradients, to_values) = _value_and_gradients(score, reductions, head, tiles, *arrays, cotangents, values)
    cast = lambda array, like: None if array is None else array.astype(like.dtype)
    return *map(cast, gradients, kept[:3]), None, list(map(cast, to_values, values))


weighted_total.defvjp(_total_forward, _total_backward)
per_token.defvjp(_each_forward, _each_backward)
