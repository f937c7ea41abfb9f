"""Matrix products: what they are summed in, and which of a CPU's kernels a gradient by a matrix takes."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
from jax import lax


def accumulator(dtype: Any) -> Any:
    """What sums are held in: float32, or the input's own type if that is wider.

    >>> accumulator(jnp.bfloat16), accumulator(jnp.float32)
    (dtype('float32'), dtype('float32'))
    """
    return jnp.dtype(dtype if jnp.finfo(dtype).bits > 32 else jnp.float32)


def product(a: jax.Array, b: jax.Array, along_a: int, along_b: int, dtype: Any = None) -> jax.Array:
    """A matrix product over one axis of each, accumulated wide, and returned so: upcasting afterwards would be too late.

    dtype: what is returned instead, by a chip, whose products round their wide sums once, at the end.
    """
    return lax.dot_general(a, b, (((along_a,), (along_b,)), ((), ())), preferred_element_type=dtype or accumulator(a.dtype))


def turned(matrix: jax.Array) -> jax.Array:
    """The transpose of a matrix, to be multiplied; on a CPU it is a copy.

    XLA's kernel for a product that sums over both operands' rows, as every gradient by a matrix does, is slow there, up to
    twice as slow for two large operands; of a transposed copy it takes another one. Elsewhere a transpose within a product
    costs nothing.

    >>> turned(jnp.ones((2, 3))).shape
    (3, 2)
    """
    return made(matrix.T)


def written(matrix: jax.Array) -> jax.Array:
    """The matrix row by row in memory, where XLA may take a transpose for another way to read what is there.

    A flat array can be read one way only.

    >>> written(jnp.ones((2, 3)).T).shape
    (3, 2)
    """
    return lax.optimization_barrier(matrix.reshape(-1)).reshape(matrix.shape)


def made(array: jax.Array) -> jax.Array:
    """The array, which on a CPU is made as it is: XLA would fold how it is made into what is made of it, and slow that down."""
    return lax.optimization_barrier(array) if on_cpu() else array


def apart(product: jax.Array) -> jax.Array:
    """A product, on a GPU apart from what is made of it.

    XLA would fold an exponential of it into it, by a kernel that takes a third longer for a head's logits than cuBLAS does (a
    profile on an H200).
    """
    return lax.optimization_barrier(product) if on_gpu() else product


def sliced(array: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """A slice, on a CPU made as it is, before anything is made of it or written where it came from.

    In a branch, out of which XLA moves nothing. Else it may read the slice again wherever it is used, hold that no such reading
    is sure to precede a writing, and copy the whole array for it; or, of bfloat16, widen all of it ahead of a loop of slices.

    >>> sliced(jnp.arange(4), 1, 2)
    Array([1, 2], dtype=int32)
    """
    take = lambda array: lax.dynamic_slice_in_dim(array, start, size, axis)
    if not on_cpu():
        return take(array)
    return lax.cond(start >= 0, take, lambda array: jnp.zeros_like(jax.eval_shape(take, array)), array)


def moved_whole(dtype: Any) -> bool:
    """Whether XLA, to read or write a part of such an array, widens all of it: bfloat16 on a CPU, until jaxlib 0.11.2.

    >>> moved_whole(jnp.float32), moved_whole(jnp.float16)
    (False, False)
    """
    return on_cpu() and dtype == jnp.bfloat16 and _widens_bfloat16()


def part_of(array: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """A slice, of an array that XLA would else widen as a whole to read it made as it is.

    >>> part_of(jnp.arange(4), 1, 2)
    Array([1, 2], dtype=int32)
    """
    return (sliced if moved_whole(array.dtype) else lax.dynamic_slice_in_dim)(array, start, size, axis)


@functools.cache
def _widens_bfloat16() -> bool:
    """Asked of the XLA that is here, by a program of one write: the float32 in it is what it widens."""
    write = lambda array, part: lax.dynamic_update_slice_in_dim(array, part, 1, 0)
    shapes = [jax.ShapeDtypeStruct((size,), jnp.bfloat16) for size in (4, 2)]
    return "f32[4]" in jax.jit(write).lower(*shapes).compile().as_text()


def lift(size: jax.Array) -> jax.Array:
    """A power of two by which a size is about 1, for what would be below float16's least number; 1 for none.

    >>> lift(jnp.array([0.0, 2.0**-12]))
    Array([1.000e+00, 4.096e+03], dtype=float32)
    """
    return jnp.exp2(-jnp.round(jnp.log2(jnp.where(size > 0, lax.stop_gradient(size), 1))))


def on_cpu() -> bool:
    """Whether programs are compiled for a CPU."""
    return jax.default_backend() == "cpu"


def on_gpu() -> bool:
    """Whether programs are compiled for a GPU."""
    return jax.default_backend() == "gpu"


def quickly(level: int, once: bool = True) -> dict[str, Any] | None:
    """Compiler options that take less of XLA's time: on a CPU LLVM's level of optimisation, 0 to 3; elsewhere none.

    once: the program runs once, so that slower code is no loss.
    """
    if not on_cpu():
        return None
    # An older generator of code, which newer versions have no more, takes half the time; its code takes a quarter longer.
    older = {"xla_cpu_use_fusion_emitters": False} if once and jaxlib.version.__version_info__ < (0, 11) else {}
    return {"xla_backend_optimization_level": level} | older


def for_training() -> dict[str, Any] | None:
    """Compiler options of a training, and of what is measured as in one.

    LLVM's first level makes code as fast as its third here, in seven eighths of the time.
    """
    return quickly(1, once=False)
