"""The head: a linear layer and any loss, a chunk or a tile of the logits [tokens, vocabulary] at a time."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh
from jaxtyping import Array, Float, Integer

from xentlab.catalogue import is_catalogued
from xentlab.checks import check_alone, checked
from xentlab.contract import AnyArray, LabError, Loss, name_of
from xentlab.information import divisor, weighted_mean, weighted_sum
from xentlab.linear.logits import Head, together, varies
from xentlab.linear.plan import Plan, counted, explain_plan, floating
from xentlab.linear.reductions import or_nan_outside, reductions_of, stream_of
from xentlab.linear.scored import failing_form, scored
from xentlab.linear.stream import streamed
from xentlab.linear.tokens import How, per_token, weighted_total
from xentlab.losses.likelihood import nll
from xentlab.losses.numerics import log_p_and_entropy
from xentlab.products import accumulator
from xentlab.targets import as_index

__all__ = ["Plan", "explain_plan", "linear_log_probs", "linear_loss"]

MOST_TRIED = 1024  # classes, with which a stream form is tried beside its function
MASKED = -1e37  # below this a bias is a mask: no softmax gives such a class a share

Hidden = Float[AnyArray, "*tokens features"]
Weight = Float[AnyArray, "rows columns"]
Targets = Integer[AnyArray, "*tokens"]


def linear_loss(
    hidden: Hidden,
    weight: Weight,
    targets: Targets,
    *,
    loss: Loss = nll,
    bias: Float[AnyArray, " vocab"] | None = None,
    token_weights: Float[AnyArray, "*tokens"] | None = None,
    softcap: float | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    plan: Literal["auto", "stream", "tokens"] = "auto",
    tiles: tuple[int, int] | None = None,
    vocab_first: bool = False,
    mesh: Mesh | None = None,
    token_axis: str | None = "data",
    vocab_axis: str | None = "model",
) -> Float[Array, ...]:
    """loss(hidden @ weight + bias, targets), averaged, in tiles: hidden [..., D], weight [D, V], targets [...] -> [] or [...].

    loss: any function of logits [..., V] and targets [...], unreduced. token_weights [...]: the mean is weighted by them; a
    token of weight 0 is out, whatever its target and hidden state, and its weight has no gradient. softcap c, a Python number:
    logits are c tanh(z / c), as Gemma 2 has them. reduction: "none" gives each token's loss, times its weight. plan:
    `explain_plan` tells what "auto" takes; tiles: (tokens a chunk, classes a tile). vocab_first: the weight is [V, D], as
    embeddings lie; nothing is transposed. mesh: of devices, tokens split over its token_axis and the vocabulary over its
    vocab_axis, either of which it may lack; shapes stay those of the whole.

    A token's loss is a function of its own row of logits, its target and what it closes over: class weights, a temperature that
    is learned. That may be traced, and has its gradient; but under plan "tokens" it may not lie on the mesh, and within a
    `jax.shard_map` of your own it has one only with check_vma=False. What a loss draws at random may be alike in many tokens. A
    logit of +inf makes a loss NaN. A bias below -1e37 is a mask, -inf, and has no gradient.

    Sums and reductions are held in float32 whatever the input (float64 for float64), and the result is; by plan "stream"
    devices' shares of the weight's gradient are added in its own type; a bias or token_weights of integers are cast.
    Differentiable by hidden, weight, bias and token_weights, and a second time, forward over reverse (jax.jvp of jax.grad). To
    be called under jax.jit: an eager call with a loss of one's own compiles its loops anew each time. Bad targets raise
    `LabError` in eager calls; under jit such a loss is NaN, and so are gradients to which it counts. Also raises it for shapes
    and types that do not fit, a loss that is not one value a token, and a stream form that is another loss.

    >>> hidden, weight = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]])
    >>> linear_loss(hidden, weight, jnp.array([2]))  # logits 0: log 3
    Array(1.0986123, dtype=float32)
    """
    spread = (mesh, token_axis, vocab_axis)
    hidden, weight, targets, bias, head, vocab = _checked(hidden, weight, targets, bias, softcap, vocab_first, spread)
    if reduction not in ("mean", "sum", "none"):
        raise LabError(f"a reduction is mean, sum or none; got {reduction!r}.")
    _refuse_explicit(token_weights)
    tokens, wide = targets.size, accumulator(hidden.dtype)
    weights = None if token_weights is None else _real("token_weights", token_weights, wide).astype(wide)
    if weights is not None and weights.shape != targets.shape:
        raise LabError(f"token_weights are one a token: targets are {list(targets.shape)}, they are {list(weights.shape)}.")
    _refuse_bad_targets(targets, weights, vocab, " Tokens to leave out have a weight of 0 in token_weights.")
    chosen = explain_plan(tokens, hidden.shape[-1], vocab, loss, hidden.dtype, plan, tiles, reduction == "none", head.devices)
    _try(loss, vocab, wide)
    # What a loss of one's own closes over may be another value at the next call.
    run = _compiled if is_catalogued(loss) else _by_plan
    return run(loss, head, chosen, reduction, hidden, weight, bias, as_index(targets), weights)


def _by_plan(loss, head, chosen, reduction, hidden, weight, bias, targets, weights):
    """`linear_loss` of arguments that fit, by the plan that is chosen; weights: None for tokens that all count alike."""
    shape, tokens, vocab, wide = targets.shape, targets.size, head.vocab(weight), accumulator(hidden.dtype)
    counts = jnp.ones(shape, wide) if weights is None else weights
    hidden, weight, bias, targets, counts = together(hidden, weight, bias, targets, counts)
    hidden, flat, flat_weights = _level(head, hidden, targets, counts)
    if tokens and (weights is not None or len(flat) > tokens):
        hidden, flat = _without_those_out(hidden, flat, flat_weights, bias)
    stream = stream_of(loss)
    if chosen.name == "tokens":
        score, values = scored(loss, stream, vocab, wide, head.mesh, varies(hidden))
        how = How(score, stream and stream.reductions, head, *chosen.tiles)
    if not tokens:
        each = jnp.zeros(0, wide)
    elif chosen.name == "stream":
        found = streamed(stream.reductions, head, chosen.tiles[1], hidden, weight, bias, flat)
        with failing_form(loss):
            each = stream(found, vocab)
        each = or_nan_outside(each, found, flat, vocab)
    elif reduction == "none":
        each = per_token(how, hidden, weight, bias, flat, values)
    else:
        scale = divisor(flat_weights) if reduction == "mean" else jnp.ones((), wide)
        total = weighted_total(how, hidden, weight, bias, flat, flat_weights / scale, values)
        return total.astype(wide)
    each = each.astype(wide)
    if reduction == "none":
        counts = flat_weights != 0  # both wheres: of one that is infinite 0 times would be a NaN in the gradient by its weight
        return jnp.where(counts, jnp.where(counts, each, 0) * flat_weights, 0)[:tokens].reshape(shape)
    return weighted_mean(each, flat_weights)[0] if reduction == "mean" else weighted_sum(each, flat_weights)


# An eager call is one program, kept for the next one, and not one an operation, with its loops compiled anew each time.
_compiled = jax.jit(_by_plan, static_argnums=(0, 1, 2, 3))


def linear_log_probs(
    hidden: Hidden,
    weight: Weight,
    targets: Targets,
    *,
    bias: Float[AnyArray, " vocab"] | None = None,
    softcap: float | None = None,
    tiles: tuple[int, int] | None = None,
    vocab_first: bool = False,
    mesh: Mesh | None = None,
    token_axis: str | None = "data",
    vocab_axis: str | None = "model",
) -> tuple[Float[Array, "*tokens"], Float[Array, "*tokens"]]:
    """Each token's log-probability and its prediction's entropy, in nats: hidden [..., D], weight [D, V] -> [...], [...].

    Without ever holding the logits, in float32, and differentiable: for reinforcement learning, distillation, evaluation.
    Arguments and errors as in `linear_loss`.

    >>> log_p, entropy = linear_log_probs(jnp.zeros((1, 2)), jnp.zeros((2, 4)), jnp.array([3]))
    >>> print(f"{log_p[0]:.4f} {entropy[0]:.4f}")  # log 1/4, log 4
    -1.3863 1.3863
    """
    spread = (mesh, token_axis, vocab_axis)
    hidden, weight, targets, bias, head, vocab = _checked(hidden, weight, targets, bias, softcap, vocab_first, spread)
    _refuse_bad_targets(targets, None, vocab)
    tile = explain_plan(targets.size, hidden.shape[-1], vocab, nll, hidden.dtype, "stream", tiles, layout=head.devices).tiles[1]
    return _log_probs(head, tile, hidden, weight, bias, as_index(targets))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _log_probs(head, tile, hidden, weight, bias, targets):
    """`linear_log_probs` of arguments that fit."""
    vocab = head.vocab(weight)
    hidden, weight, bias, targets = together(hidden, weight, bias, targets)
    flat, flat_targets, _ = _level(head, hidden, targets, jnp.ones(targets.shape))
    found = streamed(reductions_of(("rivals", "entropy"), {}, level=False), head, tile, flat, weight, bias, flat_targets)
    found = {name: value[: targets.size].reshape(targets.shape) for name, value in found.items()}
    log_p, entropy = log_p_and_entropy(found["rivals"], found["target"], found["entropy"])
    return or_nan_outside(log_p, found, targets, vocab), or_nan_outside(entropy, found, targets, vocab)


def _without_those_out(hidden, targets, weights, bias):
    """Hidden states and targets, tokens of weight 0 replaced by one that counts.

    0 times what they may hold, NaN, a target that does not exist or that a bias forbids, would be in every gradient; so would
    be 0 times that of a loss which has none where all logits are 0.
    """
    out = weights == 0
    # By a mask and a sum: of an array that lies on several devices an index would gather all of it on each.
    first, none = jnp.arange(len(out)) == jnp.argmax(~out), out.all()
    state = lax.stop_gradient(jnp.sum(jnp.where(first[:, None], hidden, 0), axis=0, dtype=hidden.dtype))
    target = jnp.sum(jnp.where(first, targets, 0), dtype=targets.dtype)
    state = jnp.where(none, jnp.ones((), hidden.dtype), state)
    target = jnp.where(none, 0 if bias is None else jnp.argmax(bias).astype(targets.dtype), target)
    return jnp.where(out[:, None], state[None], hidden), jnp.where(out, target, targets)


def _level(head, hidden, targets, weights):
    """All tokens in one row, and, on a mesh, some more so that every device gets as many: like the last one, of weight 0."""
    hidden, targets, weights = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    more = -len(targets) % math.prod(head.devices)
    if not more:
        return hidden, targets, weights
    # Like the last one: class 0 may be one that a bias forbids.
    return jnp.pad(hidden, ((0, more), (0, 0)), "edge"), jnp.pad(targets, (0, more), "edge"), jnp.pad(weights, (0, more))


def _checked(hidden, weight, targets, bias, softcap, vocab_first, spread):
    """The arguments as arrays that fit, the head and V, or a `LabError`."""
    _refuse_explicit(hidden, weight, targets, bias)
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
    bias = None if bias is None else _real("a bias", bias, accumulator(hidden.dtype))
    if bias is not None and float(jnp.finfo(bias.dtype).min) < MASKED:
        bias = jnp.where(bias < MASKED, -jnp.inf, bias)  # a mask of finfo.min, say: what is added to that would overflow
    return hidden, weight, targets, bias, head, vocab


def _real(what, array, dtype):
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


def _refuse_explicit(*arrays) -> None:
    """Raises `LabError` for an array that lies on a mesh with explicit axes, be it whole."""
    for array in arrays:
        if isinstance(array, jax.Array) and AxisType.Explicit in (on := jax.typeof(array).sharding.mesh).axis_types:
            raise _explicit(on)


def _refuse_bad_targets(targets, weights, vocab, more="") -> None:
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


def _try(loss: Loss, vocab: int, dtype: Any) -> None:
    """Raises `LabError` for a loss that does not keep the contract, and for a stream form that is another loss.

    Traced on two numbers of tokens: what closes over a number a token, of one count of them, fails at the other.
    """
    for tokens in (2, 3):
        checked(loss, vocab, (tokens,), dtype)
    if not is_catalogued(loss):  # the tests hold those, and their forms, to it
        check_alone(loss, _tried(vocab), (3,))
        check_form(loss, vocab)


def _tried(vocab: int) -> int:
    """At how many classes a loss is computed to see what it does: its own, which it may know, unless they are many."""
    return vocab if vocab <= MOST_TRIED else 5


def check_form(loss: Loss, vocab: int) -> None:
    """Raises `LabError` for a stream form that is another loss than its function, or has another gradient.

    >>> from xentlab import loss
    >>> check_form(loss(stream=lambda rivals, target: rivals)(lambda z, y: nll(z, y)), 5)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xentlab.contract.LabError: <lambda>'s stream form is another loss: at logits ...
    """
    stream, classes = stream_of(loss), _tried(vocab)
    if stream is None:
        return
    rng = np.random.default_rng(0)
    logits, targets = 2 * rng.normal(size=(6, classes)).astype(np.float32), rng.integers(0, classes, 6).astype(np.int32)
    logits[::2] += 3  # a claim that no common shift changes it is tried too
    # Far logits as well: where log(1 + exp(z)) is infinite, softplus(z) is not.
    logits, targets = np.concatenate([logits, 30 * logits]), np.tile(targets, 2)

    own = "" if classes == vocab else f" It was tried at {classes} classes: has it a number of its own, not z.shape[-1]?"

    def form(z):
        return stream(streamed(stream.reductions, Head(), classes, z, jnp.eye(classes), None, jnp.asarray(targets)), classes)

    def slope(of):
        values, pull = jax.vjp(of, jnp.asarray(logits))
        return pull(jnp.ones_like(values))[0]

    for what, asked in (("", lambda of: of(jnp.asarray(logits))), ("a gradient of ", slope)):
        try:
            with jax.ensure_compile_time_eval():
                mine, theirs = (np.asarray(asked(of)) for of in (form, lambda z: loss(z, jnp.asarray(targets))))
        except LabError:
            raise
        except Exception:  # it closes over what is traced, or knows another vocabulary: the two cannot be had apart from here
            return
        differ = np.isfinite(theirs) & ~np.isclose(mine, theirs, rtol=1e-3, atol=1e-4)
        if differ.any():
            at = tuple(np.argwhere(differ)[0])
            row = [round(float(each), 3) for each in logits[at[0], :8]]
            more = f" by class {at[1]}" if what else ""
            far = " Does it lose far logits, as log(1 + exp(z)) does and jax.nn.softplus(z) does not?" if at[0] >= 6 else ""
            raise LabError(
                f"{name_of(loss)}'s stream form is another loss: at logits {row} and target {targets[at[0]]} it gives {what}"
                f"{mine[at]:.6g}{more}, the function {theirs[at]:.6g}. Is a fact false, shift=True say?{far}{own}"
            )
