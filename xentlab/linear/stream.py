"""The stream plan: a loop over tiles of the vocabulary with running reductions; a row of logits never exists.

What is differentiable here are the reductions; the loss is plain JAX on their values [N], and so are weights, means and
per-token results. The way back makes each tile of logits anew: four matrix products instead of three, and memory that does
not grow with tokens times vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from xentlab.linear.logits import Head, accumulator, hits, over_tiles, pull_of
from xentlab.linear.reductions import Reduction

Found = dict[str, jax.Array]


def streamed(
    reductions: Mapping[str, Reduction], head: Head, tile: int, hidden: jax.Array, weight: jax.Array, bias, targets: jax.Array
) -> Found:
    """The reductions' values and `target` [N], each differentiable by hidden [N, D], weight and bias; NaN for a bad target."""
    return _streamed(tuple(reductions.items()), head, tile, hidden, weight, bias, targets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _streamed(*arguments):
    return _reduce(*arguments)


def _reduce(reductions, head, tile, hidden, weight, bias, targets):
    dtype = accumulator(hidden.dtype)
    tokens, vocab = len(hidden), head.vocab(weight)

    def step(state, start, size):
        states, target, seen = state
        z, _ = head.logits(hidden, head.part(weight, start, size), _part(bias, start, size))
        hit = hits(z, targets, start)
        states = {name: reduction.add(states[name], z, ~hit) for name, reduction in reductions}
        return states, target + jnp.sum(jnp.where(hit, z, 0), axis=-1), seen + jnp.sum(hit, axis=-1, dtype=jnp.int32)

    states = {name: reduction.start(tokens, dtype) for name, reduction in reductions}
    begun = (states, jnp.zeros(tokens, dtype), jnp.zeros(tokens, jnp.int32))
    states, target, seen = over_tiles(step, begun, vocab, tile)
    # A square root of -1, not a NaN constant: see contract._nan_without.
    target = target + jnp.sqrt((seen - 1).astype(dtype))
    return {name: reduction.finish(states[name]) for name, reduction in reductions} | {"target": target}


def _part(bias, start, size):
    return None if bias is None else jax.lax.dynamic_slice_in_dim(bias, start, size)


def _forward(reductions, head, tile, hidden, weight, bias, targets):
    # Not _streamed itself: a second derivative goes forward through here, which a custom rule would refuse.
    found = _reduce(reductions, head, tile, hidden, weight, bias, targets)
    return found, (hidden, weight, bias, targets, found)


def _backward(reductions, head, tile, kept, cotangents):
    hidden, weight, bias, targets, found = kept
    dtype = accumulator(hidden.dtype)

    def step(state, start, size):
        to_hidden, to_weight, to_bias = state
        part = head.part(weight, start, size)
        z, slope = head.logits(hidden, part, _part(bias, start, size))
        pull = pull_of(dict(reductions), found, cotangents, z, hits(z, targets, start))
        pull = pull if slope is None else pull * slope
        if bias is not None:
            to_bias = jax.lax.dynamic_update_slice_in_dim(to_bias, jnp.sum(pull, axis=0).astype(to_bias.dtype), start, 0)
        pull = pull.astype(weight.dtype)
        to_hidden = to_hidden + head.to_hidden(pull, part)
        return to_hidden, head.put(to_weight, head.to_weight(hidden, pull), start), to_bias

    begun = (jnp.zeros(hidden.shape, dtype), jnp.zeros_like(weight), None if bias is None else jnp.zeros_like(bias))
    to_hidden, to_weight, to_bias = over_tiles(step, begun, head.vocab(weight), tile)
    return to_hidden.astype(hidden.dtype), to_weight, to_bias, None


_streamed.defvjp(_forward, _backward)
