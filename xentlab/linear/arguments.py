"""What `linear_loss` is given, as arrays that fit one another, or an error that says the remedy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from xentlab.contract import LabError
from xentlab.linear.logits import Head
from xentlab.linear.plan import counted, floating
from xentlab.products import accumulator

MASKED = -1e37  # below this a bias is a mask: no softmax gives such a class a share


def fitting(hidden, weight, targets, bias, softcap, vocab_first, spread):
    """The arguments as arrays that fit, the head and V, or a `LabError`."""
    refuse_explicit(hidden, weight, targets, bias)
    hidden, weight = jnp.asarray(hidden), jnp.asarray(weight)
    targets = targets if isinstance(targets, jax.Array) else np.asarray(targets)
    if not hidden.ndim or weight.ndim != 2:
        raise LabError(f"hidden is [..., D] and a weight [D, V] or [V, D]; got {list(hidden.shape)} and {list(weight.shape)}.")
    floating(hidden.dtype)
    if not targets.size and jnp.issubdtype(targets.dtype, jnp.floating):  # as NumPy types an empty list
        targets = targets.astype(np.int32)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise LabError(f"targets are class indices, integers; got {targets.dtype}. Of one-hot ones take the argmax.")
    head = Head(_softcap(softcap), vocab_first, *_axes(*spread))
    features, vocab = weight.shape[1 - head.vocab_axis], weight.shape[head.vocab_axis]
    if hidden.shape[-1] != features:
        other = "[V, D], vocab_first=True" if not vocab_first else "[D, V], vocab_first=False"
        raise LabError(
            f"hidden {list(hidden.shape)} ends in {hidden.shape[-1]} features, the weight {list(weight.shape)} takes "
            f"{features}. Is the weight {other}?"
        )
    if hidden.shape[:-1] != targets.shape:
        raise LabError(f"hidden [..., D] goes with targets [...]; got {list(hidden.shape)} and {list(targets.shape)}.")
    if features == 0:
        raise LabError("hidden states have no features: their logits are all alike.")
    if bias is not None and np.shape(bias) != (vocab,):
        raise LabError(f"a bias is one number a class, [{vocab}]; got {list(np.shape(bias))}.")
    if vocab == 0:
        raise LabError("the vocabulary is empty.")
    counted(targets.size, vocab)
    if vocab % head.count(head.classes):
        raise LabError(
            f"{head.count(head.classes)} devices cannot share {vocab} classes evenly, and JAX shards no other way. Give "
            "vocab_axis=None to leave the vocabulary whole; or add columns to the weight with a bias of -1e30: a softmax gives "
            "them no share (but under a softcap, and in losses that ask all classes, they would count)."
        )
    if hidden.dtype != weight.dtype:
        raise LabError(
            f"hidden is {hidden.dtype} and the weight {weight.dtype}; cast one of them, so that no one is surprised."
        )
    bias = None if bias is None else as_real("a bias", bias, accumulator(hidden.dtype))
    if bias is not None and float(jnp.finfo(bias.dtype).min) < MASKED:
        bias = jnp.where(bias < MASKED, -jnp.inf, bias)  # a mask of finfo.min, say: what is added to that would overflow
    return hidden, weight, targets, bias, head, vocab


def as_real(what, array, dtype):
    """An array of real numbers, or a `LabError`; dtype: what integers and truth values are cast to."""
    array = array if isinstance(array, jax.Array) else np.asarray(array)
    if jnp.issubdtype(array.dtype, jnp.floating):
        return jnp.asarray(array)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool):
        raise LabError(f"{what}: real numbers are wanted; got {array.dtype}. Of complex ones give the part that is meant.")
    if not isinstance(array, jax.Array):
        array = array.astype(np.float64)  # by NumPy, for of 2^40 JAX makes an int32 that is 0
    return jnp.asarray(array).astype(dtype)


def _softcap(softcap):
    if isinstance(softcap, jax.core.Tracer):
        raise LabError(
            "softcap is a part of the program, with no gradient, and cannot be traced: close over a Python number, or name it "
            "in jax.jit's static_argnames."
        )
    try:
        whole = softcap is None or (not isinstance(softcap, (bool, np.bool_)) and 0 < float(softcap) < math.inf)
    except (TypeError, ValueError):
        whole = False
    if not whole:
        raise LabError(f"softcap is a positive number or None; got {softcap!r}.")
    if softcap is not None and not 1e-30 < float(softcap) < 1e30:  # in float32 z / c or c itself would be none
        raise LabError(f"softcap is a bound of logits, of tens as a rule; got {softcap!r}. None caps nothing.")
    return None if softcap is None else float(softcap)


def _axes(mesh, token_axis, vocab_axis):
    """The mesh, and its axes for tokens and vocabulary where it has them."""
    around = jax.sharding.get_abstract_mesh()
    if not (mesh is None or isinstance(mesh, Mesh)):
        raise LabError(f'mesh is a jax.sharding.Mesh; got {mesh!r}. Of "data=2,model=4" xentlab.mesh makes one.')
    if AxisType.Explicit in (*around.axis_types, *(mesh.axis_types if mesh else ())):
        raise _explicit(around if mesh is None else mesh)
    if mesh is None:
        return None, None, None
    if around.manual_axes:
        raise LabError(
            "within jax.shard_map each device has its share of the tokens already; leave mesh= out in there, and hand it the "
            "whole vocabulary, for of a part it would know no other class. Or call it outside, where mesh= splits both."
        )
    axes = [axis if axis in mesh.axis_names else None for axis in (token_axis, vocab_axis)]
    lacking = [axis for axis in (token_axis, vocab_axis) if axis not in (*mesh.axis_names, "data", "model", None)]
    if axes == [None, None] or lacking:
        raise LabError(
            f"the mesh's axes are {', '.join(mesh.axis_names)}; token_axis is {token_axis!r}, vocab_axis {vocab_axis!r}. Name "
            "one axis of yours by each; None leaves tokens or vocabulary whole."
        )
    if token_axis == vocab_axis:
        raise LabError(
            f"tokens and vocabulary are split over two axes; both are {token_axis!r}. Give vocab_axis=None to leave it whole."
        )
    return mesh, *axes


def _explicit(mesh):
    return LabError(
        "the mesh has explicit axes, by which JAX wants every array's place told; make it, for jax.set_mesh too, with "
        f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}."
    )


def refuse_explicit(*arrays) -> None:
    """Raises `LabError` for an array that lies on a mesh with explicit axes, be it whole."""
    for array in arrays:
        if isinstance(array, jax.Array) and AxisType.Explicit in (on := jax.typeof(array).sharding.mesh).axis_types:
            raise _explicit(on)


def refuse_bad_targets(targets, weights, vocab, more="") -> None:
    """In an eager call a target that counts and lies outside [0, V) is an error; a traced one cannot be looked at.

    Nor is one that jax.jit closes over: what comes of it may be masked there. weights: None where all count.
    """
    weights = jnp.ones(()) if weights is None else weights  # traced within jax.jit
    if isinstance(targets, jax.core.Tracer) or isinstance(weights, jax.core.Tracer):
        return
    flat = np.asarray(targets).reshape(-1)
    bad = np.flatnonzero(((flat < 0) | (flat >= vocab)) & (np.asarray(weights).reshape(-1) != 0))
    if len(bad):
        raise LabError(
            f"targets must lie in [0, {vocab}); got {flat[bad[0]]} at token {bad[0]} ({len(bad)} such). Did the tokenizer's "
            f"vocabulary change?{more}"
        )
