"""Tiles of logits, and their way back into hidden states, weight and bias: what both plans share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from xentlab.contract import is_at_target
from xentlab.linear.reductions import Reduction


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits come from hidden states [N, D] and a weight: softcap (c tanh(z / c)), and which axis is the vocabulary."""

    softcap: float | None = None
    vocab_first: bool = False

    @property
    def vocab_axis(self) -> int:
        """The weight's axis of length V."""
        return 0 if self.vocab_first else 1

    def vocab(self, weight: jax.Array) -> int:
        """V."""
        return weight.shape[self.vocab_axis]

    def part(self, weight: jax.Array, start: Any, size: int) -> jax.Array:
        """The weight of `size` classes from `start` on."""
        return lax.dynamic_slice_in_dim(weight, start, size, self.vocab_axis)

    def put(self, weight: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        """The weight with that part replaced, in place where XLA can."""
        return lax.dynamic_update_slice_in_dim(weight, part.astype(weight.dtype), start, self.vocab_axis)

    def logits(self, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
        """Logits [N, C] of the classes of a weight's part, and their derivative by what the softcap was given, if any."""
        z = product(hidden, weight, 1, 1 - self.vocab_axis)
        if bias is not None:
            z = z + bias.astype(z.dtype)[None]
        if self.softcap is None:
            return z, None
        bounded = jnp.tanh(z / self.softcap)
        return self.softcap * bounded, 1 - bounded**2

    def to_hidden(self, pull: jax.Array, weight: jax.Array) -> jax.Array:
        """The hidden states' gradient [N, D] from the logits' [N, C]."""
        return product(pull, weight, 1, self.vocab_axis)

    def to_weight(self, hidden: jax.Array, pull: jax.Array) -> jax.Array:
        """The gradient of the weight's part from the logits' [N, C]."""
        return product(pull, hidden, 0, 0) if self.vocab_first else product(hidden, pull, 0, 0)


def accumulator(dtype: Any) -> Any:
    """What sums are held in: float32, or the input's own type if that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def product(a: jax.Array, b: jax.Array, along_a: int, along_b: int) -> jax.Array:
    """A matrix product over one axis of each, accumulated and returned wide: upcasting afterwards would be too late."""
    return lax.dot_general(a, b, (((along_a,), (along_b,)), ((), ())), preferred_element_type=accumulator(a.dtype))


def over_tiles(step: Callable[[Any, Any, int], Any], state: Any, length: int, tile: int) -> Any:
    """step(state, start, size) for each tile of an axis, the last one as short as it is: nothing is padded."""
    whole = length // tile
    if whole == 1:
        state = step(state, 0, tile)
    elif whole:
        state = lax.fori_loop(0, whole, lambda i, state: step(state, i * tile, tile), state)
    return step(state, whole * tile, length - whole * tile) if length % tile else state


def pull_of(
    reductions: Mapping[str, Reduction],
    found: Mapping[str, jax.Array],
    cotangents: Mapping[str, jax.Array],
    z: jax.Array,
    hit: jax.Array,
) -> jax.Array:
    """The logits' gradient [N, C] from the reductions' values and cotangents [N]; hit: where the target lies."""
    column = {name: value[:, None] for name, value in found.items()}
    sums = jnp.zeros_like(z)
    for name, reduction in reductions.items():
        sums = sums + cotangents[name][:, None] * reduction.slope(column, column[name], z)
    return jnp.where(hit, cotangents["target"][:, None], sums)


def hits(z: jax.Array, targets: jax.Array, start: Any) -> jax.Array:
    """Where the targets lie among the classes from `start` on, [N, C]."""
    return is_at_target(z, targets - start)
