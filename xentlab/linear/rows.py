"""A loss that sees whole rows of a chunk's logits, some rows at a time, its gradient written where the logits were.

On a mesh that splits the vocabulary the devices trade their columns of all tokens for all columns of their tokens, and back, by
two all-to-alls a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.linear.logits import Head, once, over_tiles
from xentlab.linear.plan import rows_at_once
from xentlab.linear.scored import Score, added, losses_of
from xentlab.products import sliced


def row_losses(score: Score, head: Head, z: jax.Array, targets, values) -> jax.Array:
    """Each token's loss [N] from a chunk's logits [N, C], this device's columns of them."""
    z, targets = _rows(head, z, targets)
    rows = rows_at_once(*z.shape, z.dtype.itemsize)

    def step(losses, start, _):
        each = losses_of(score, sliced(z, start, rows), lax.dynamic_slice_in_dim(targets, start, rows), values)
        return lax.dynamic_update_slice_in_dim(losses, each.astype(losses.dtype), start, 0)

    return _gathered(head, over_tiles(step, jnp.zeros(len(z), z.dtype), len(z), rows))


def row_gradients(score: Score, head: Head, z: jax.Array, targets, weights, values, to_values):
    """Each token's loss, and gradients of their weighted sum: by what the softcap was given, and by values.

    z: as above, and in its place the gradient. to_values: what those by values are added to.
    """
    z, targets, weights = _rows(head, z, targets, weights)
    rows = rows_at_once(*z.shape, z.dtype.itemsize)

    def step(state, start, overlap):
        to_logits, losses, to_values = state
        part = lambda array: lax.dynamic_slice_in_dim(array, start, rows)
        put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
        block, own = sliced(to_logits, start, rows), part(targets)
        # Of rows that an earlier block has had the gradient is there, and the logits are not. The loss sees the last row in
        # their place, which is always new: it may have no derivative at what is none of its logits.
        shown, own = once(block, overlap, lambda: block[-1:]), once(own, overlap, lambda: own[-1:])
        each, back = jax.vjp(lambda shown, values: score(shown, own, values), shown, values)
        counted = once(part(weights), overlap, 0)
        to_block, more = back(counted.astype(each.dtype))
        new = head.before_softcap(to_block, shown)
        new, each = once(new, overlap, block), once(each, overlap, part(losses))
        # Where the logits were: nobody reads these again.
        return put(to_logits, new), put(losses, each), added(to_values, more)

    to_logits, each, to_values = over_tiles(step, (z, jnp.zeros(len(z), z.dtype), to_values), len(z), rows)
    return _gathered(head, each), _columns(head, to_logits), to_values


def _rows(head, z, *per_token):
    """Whole rows of logits for this device's part of the chunk, and the same part of what there is a token."""
    if head.classes is None:
        return z, *per_token
    share = len(z) // head.count(head.classes)
    own = lambda array: lax.dynamic_slice_in_dim(array, head.place(head.classes) * share, share)
    return lax.all_to_all(z, head.classes, 0, 1, tiled=True), *map(own, per_token)


def _columns(head, to_logits):
    """The way back: this device's columns of the whole chunk."""
    return to_logits if head.classes is None else lax.all_to_all(to_logits, head.classes, 1, 0, tiled=True)


def _gathered(head, each):
    return each if head.classes is None else lax.all_gather(each, head.classes, tiled=True)
