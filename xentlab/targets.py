"""Each token's value at its target: by comparison, never by a gather, and NaN where the target is no class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from xentlab.contract import AnyArray, LabError


def at_target(values: Float[AnyArray, "... vocab"], targets: Integer[AnyArray, "..."]) -> Float[Array, "..."]:
    """Each token's value at its target: values [..., V], targets [...] -> [...]. NaN for a target outside [0, V).

    A comparison and a sum, not a gather: it fuses into what made `values`, needs no scatter on the way back, and splits
    over a sharded vocabulary. A gather would also wrap -1 to the last class, and score it.

    >>> at_target(jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), jnp.array([2, 0]))
    Array([3., 4.], dtype=float32)
    >>> at_target(jnp.array([1.0, 2.0, 3.0]), jnp.array(-1))
    Array(nan, dtype=float32)
    """
    values = jnp.asarray(values)
    return jnp.sum(jnp.where(is_at_target(values, targets), values, 0), axis=-1) + nan_outside(
        targets, values.shape[-1], values.dtype
    )


def off_target(
    values: Float[AnyArray, "... vocab"], targets: Integer[AnyArray, "..."], fill: float = 0.0
) -> Float[Array, "... vocab"]:
    """`values` [..., V] with `fill` in the target's place; a whole row of NaN for a target outside [0, V).

    >>> off_target(jnp.array([1.0, 2.0, 3.0]), jnp.array(2))
    Array([1., 2., 0.], dtype=float32)
    """
    values = jnp.asarray(values)
    others = jnp.where(is_at_target(values, targets), fill, values)
    return others + jnp.broadcast_to(nan_outside(targets, values.shape[-1], values.dtype)[..., None], values.shape)


def is_at_target(values: Float[AnyArray, "... vocab"], targets: Integer[AnyArray, "..."]) -> Bool[Array, "... vocab"]:
    """Where each token's target lies, as a mask [..., V]; all False for a target outside [0, V)."""
    targets = as_index(targets)
    if not values.shape:
        raise LabError("logits [..., V] have a vocabulary as their last axis; got a single number.")
    if values.shape[:-1] != targets.shape:
        raise LabError(
            f"logits of shape {values.shape} need targets of shape {values.shape[:-1]}; got {targets.shape}. "
            "The vocabulary is the last axis of the logits, and targets are class indices, not one-hot."
        )
    classes = jax.lax.broadcasted_iota(targets.dtype, values.shape, values.ndim - 1)
    return classes == targets[..., None]


def as_index(targets: Integer[AnyArray, "..."]) -> Integer[Array, "..."]:
    """Targets as 32-bit integers; one that these cannot hold is a bad one still. Raises `LabError` for what is no integer.

    >>> as_index(np.array([5, 2**32 + 3]))
    Array([         5, 2147483647], dtype=int32)
    """
    targets = targets if hasattr(targets, "dtype") else np.asarray(targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise LabError(f"targets are integers, a class each; got {targets.dtype}.")
    if targets.dtype.itemsize > 4:  # it would wrap, and 2^32 + 3 would score class 3
        clip = jnp.clip if isinstance(targets, jax.Array) else np.clip
        targets = clip(targets, 0 if targets.dtype.kind == "u" else -1, 2**31 - 1)
    return jnp.asarray(targets).astype(jnp.int32)


def nan_outside(targets: Integer[AnyArray, "..."], vocab: int, dtype: Any) -> Float[Array, "..."]:
    """0 for a target in [0, vocab), NaN for one outside, [...] -> [...].

    A square root, for its NaN must not be seen at compile time: given `where(inside, x, nan)` before an exp, XLA's CPU
    compiler of jaxlib 0.10 takes the NaN for something that cannot happen, and a bad target scores like a good one.

    >>> nan_outside(jnp.array([0, 3]), 3, jnp.float32)
    Array([ 0., nan], dtype=float32)
    """
    targets = as_index(targets)
    return jnp.sqrt(((targets >= 0) & (targets < vocab)).astype(dtype) - 1)


def or_nan(value: Float[AnyArray, "*tokens"], own: Float[AnyArray, "*tokens"]) -> Float[Array, "*tokens"]:
    """Each token's value, or `own` where that is NaN: both [...].

    For a value that came through a maximum: on a CPU XLA's vectorised one gives the other operand for a NaN.

    >>> or_nan(jnp.array([0.0, 0.0]), jnp.array([1.0, jnp.nan]))
    Array([ 0., nan], dtype=float32)
    """
    return jnp.where(jnp.isnan(own), own, value)
