"""The tokens plan: chunks of tokens, for any loss; value and gradient in one pass, three matrix products, no recomputation.

The gradient is made on the way forward, where the chunk's logits are at hand, and kept: [N, D] and [D, V], which a training
step makes in any case. A call that asks for the loss alone does one product.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.linear.logits import Head, accumulator, hits, over_tiles, pull_of


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def weighted_total(loss, stream, head, tiles, hidden, weight, bias, targets, weights):
    """The sum of weights [N] times losses [N], a scalar, differentiable by hidden [N, D], weight, bias and weights.

    stream: the loss's stream form, if it has one: its gradient then takes fewer passes over the chunk's logits than
    autodiff's. tiles: tokens a chunk, and classes at a time as the weight's gradient is summed. A weight of 0 removes a token.
    """

    def step(total, start, size):
        part = lambda array: lax.dynamic_slice_in_dim(array, start, size)
        z, _ = head.logits(part(hidden), weight, bias)
        return total + _weighted_sum(loss(z, part(targets)), part(weights))

    return over_tiles(step, jnp.zeros((), accumulator(hidden.dtype)), len(hidden), tiles[0])


def _weighted_sum(each, weights):
    return jnp.sum(jnp.where(weights == 0, 0, each * weights).astype(weights.dtype))


def _forward(loss, stream, head, tiles, hidden, weight, bias, targets, weights):
    dtype = accumulator(hidden.dtype)
    chunk, tile = tiles
    # One chunk writes the weight's gradient once; more than one sum it, wide.
    summed = dtype if len(hidden) > chunk else weight.dtype

    def step(state, start, size):
        to_hidden, to_weight, to_bias, losses = state
        part = lambda array: lax.dynamic_slice_in_dim(array, start, size)
        put = lambda array, part: lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), start, 0)
        z, slope = head.logits(part(hidden), weight, bias)
        each, pull = _value_and_pull(loss, stream, z, part(targets), part(weights))
        pull = pull if slope is None else pull * slope
        to_bias = None if bias is None else to_bias + jnp.sum(pull, axis=0)
        pull = pull.astype(weight.dtype)

        def add(to_weight, first, classes):
            moved = head.to_weight(part(hidden), lax.dynamic_slice_in_dim(pull, first, classes, 1))
            # Tile by tile in place: a whole [D, V] product would be a second one beside the sum.
            return head.put(to_weight, moved + head.part(to_weight, first, classes).astype(moved.dtype), first)

        to_weight = over_tiles(add, to_weight, head.vocab(weight), tile)
        return put(to_hidden, head.to_hidden(pull, weight)), to_weight, to_bias, put(losses, each)

    begun = (
        jnp.zeros_like(hidden),
        jnp.zeros(weight.shape, summed),
        None if bias is None else jnp.zeros(bias.shape, dtype),
        jnp.zeros(len(hidden), dtype),
    )
    to_hidden, to_weight, to_bias, losses = over_tiles(step, begun, len(hidden), chunk)
    to_bias = None if bias is None else to_bias.astype(bias.dtype)
    losses = jnp.where(weights == 0, 0, losses).astype(weights.dtype)
    return _weighted_sum(losses, weights), (to_hidden, to_weight.astype(weight.dtype), to_bias, losses)


def _value_and_pull(loss, stream, z, targets, weights):
    """Each token's loss [N], and the gradient of its weighted sum by the logits [N, V]."""
    if stream is None:
        each, back = jax.vjp(lambda z: loss(z, targets), z)
        return each, back(weights.astype(each.dtype))[0]
    hit = hits(z, targets, 0)
    states = {name: each.add(each.start(len(z), z.dtype), z, ~hit) for name, each in stream.reductions.items()}
    found = {name: each.finish(states[name]) for name, each in stream.reductions.items()}
    seen = jnp.sum(hit, axis=-1, dtype=jnp.int32)
    found["target"] = jnp.sum(jnp.where(hit, z, 0), axis=-1) + jnp.sqrt((seen - 1).astype(z.dtype))
    each, back = jax.vjp(lambda found: stream(found, z.shape[-1]), found)
    return each, pull_of(stream.reductions, found, back(weights.astype(each.dtype))[0], z, hit)


def _backward(loss, stream, head, tiles, kept, cotangent):
    to_hidden, to_weight, to_bias, losses = kept
    scaled = lambda array: None if array is None else array * cotangent.astype(array.dtype)
    return scaled(to_hidden), scaled(to_weight), scaled(to_bias), None, scaled(losses)


weighted_total.defvjp(_forward, _backward)


def per_token(loss, head: Head, chunk: int, hidden, weight, bias, targets):
    """Each token's loss [N], chunk by chunk; the way back makes a chunk's logits anew."""

    @jax.checkpoint
    def losses(hidden, targets):
        return loss(head.logits(hidden, weight, bias)[0], targets)

    whole = len(hidden) // chunk
    parts = []
    if whole:
        shaped = lambda array: array[: whole * chunk].reshape(whole, chunk, *array.shape[1:])
        parts.append(lax.map(lambda pair: losses(*pair), (shaped(hidden), shaped(targets))).reshape(-1))
    if len(hidden) % chunk or not whole:
        parts.append(losses(hidden[whole * chunk :], targets[whole * chunk :]))
    return jnp.concatenate(parts)
