"""A loss as the tokens plan takes it: beside it what it closes over, so that this too is differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh

from xentlab.contract import FAILURES, LabError, Loss, in_short, name_of
from xentlab.linear.form import Stream, or_nan_outside
from xentlab.products import accumulator

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
        score = lambda rows, targets: or_nan_outside(loss(rows, targets), rows, targets, vocab)
        one = jax.ShapeDtypeStruct((vocab,), dtype)
    else:
        score = lambda found, targets: or_nan_outside(stream(found, vocab), found, targets, vocab)
        one = dict.fromkeys((*stream.reductions, "target"), jax.ShapeDtypeStruct((), dtype))
    alone = lambda seen, target: score(jax.tree.map(lambda each: each[None], seen), target[None])[0]
    here = jax.sharding.get_abstract_mesh()
    at_home = jax.sharding.use_abstract_mesh(here if here.manual_axes else jax.sharding.AbstractMesh((), ()))
    with at_home, failing_form(loss) if stream else contextlib.nullcontext():
        traced = jax.make_jaxpr(alone)(one, jax.ShapeDtypeStruct((), jnp.int32))
    if any(jnp.issubdtype(jnp.result_type(value), jax.dtypes.prng_key) for value in traced.consts):
        raise LabError(
            "the loss closes over a random key, and would draw the same for many tokens, which the head scores in parts. Take "
            "it of whole logits, loss(hidden @ weight, targets)."
        )
    if mesh is not None and any(_on_a_mesh(value) for value in traced.consts):
        raise LabError(
            "the loss closes over an array that lies on a mesh, which JAX lets into no device's part of it. A number that jit "
            "is given from elsewhere may be closed over, so of a step's own result jax.device_get, which lies on no mesh; plan "
            "'stream' takes any, if the loss has a stream form; class weights "
            "are token_weights=class_weights[targets] with reduction='sum', over the number of tokens for a mean."
        )
    places = [i for i, value in enumerate(traced.consts) if isinstance(value, jax.core.Tracer)]
    if any(jnp.issubdtype(jnp.result_type(traced.consts[i]), jnp.complexfloating) for i in places):
        raise LabError("the loss closes over a complex number that is traced; give its real and imaginary parts apart.")
    if varies or not places:
        return lambda seen, targets, values: score(seen, targets), []

    def of_one(seen, target, values):
        consts = list(traced.consts)
        for i, value in zip(places, values, strict=True):
            consts[i] = value
        return jaxpr_as_fun(traced.replace(consts=consts))(*jax.tree.leaves((seen, target)))[0]

    # As arrays: what `jax.grad` is given may be a number of Python's.
    return jax.vmap(of_one, (0, 0, None)), [jnp.asarray(traced.consts[i]) for i in places]


@contextlib.contextmanager
def failing_form(loss: Loss) -> Iterator[None]:
    """Says of what a loss's stream form raises whose it is."""
    try:
        yield
    except LabError:
        raise
    except FAILURES as error:
        raise LabError(f"{name_of(loss)}'s stream form fails: {in_short(error)}.") from error


def _on_a_mesh(value) -> bool:
    return isinstance(value, jax.Array) and not jax.typeof(value).sharding.mesh.empty


def losses_of(score: Score, seen: Any, targets: jax.Array, values: list[jax.Array]) -> jax.Array:
    """Each token's loss [N], so that it can be differentiated forward where the loss, by a custom_vjp, cannot."""
    try:
        return jax.vjp(lambda seen, values: score(seen, targets, values), seen, values)[0]
    except FAILURES:
        # It has no derivative at all, a callback's say: the value is asked for alone, or whoever asks for more is told so.
        return score(seen, targets, values)


def no_gradients(values: list[jax.Array]) -> list[jax.Array | None]:
    """Sums of the gradients by values, each wide; None for one, an integer say, that has no gradient."""
    has_one = lambda value: jnp.issubdtype(value.dtype, jnp.floating)
    return [jnp.zeros(value.shape, accumulator(value.dtype)) if has_one(value) else None for value in values]


def added(sums: list[jax.Array | None], gradients: list[Any]) -> list[jax.Array | None]:
    """Those sums with some gradients more."""
    return [None if had is None else had + more.astype(had.dtype) for had, more in zip(sums, gradients, strict=True)]
