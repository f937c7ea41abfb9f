"""The head: a linear layer and any loss, a chunk or a tile of the logits [tokens, vocabulary] at a time."""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from xentlab.catalogue import settled
from xentlab.contract import AnyArray, LabError, Loss
from xentlab.information import divisor, weighted_mean, weighted_sum
from xentlab.linear.arguments import as_real, fitting, refuse_bad_targets, refuse_explicit
from xentlab.linear.form import or_nan_outside, stream_of, try_out
from xentlab.linear.logits import together, varies
from xentlab.linear.plan import Plan, explain_plan
from xentlab.linear.reductions import reductions_of
from xentlab.linear.scored import failing_form, scored
from xentlab.linear.stream import streamed
from xentlab.linear.tokens import How, per_token, weighted_total
from xentlab.losses.likelihood import nll
from xentlab.losses.numerics import log_p_and_entropy
from xentlab.products import accumulator
from xentlab.targets import as_index

__all__ = ["Plan", "explain_plan", "linear_log_probs", "linear_loss"]

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
    hidden, weight, targets, bias, head, vocab = fitting(hidden, weight, targets, bias, softcap, vocab_first, spread)
    if reduction not in ("mean", "sum", "none"):
        raise LabError(f"a reduction is mean, sum or none; got {reduction!r}.")
    refuse_explicit(token_weights)
    tokens, wide = targets.size, accumulator(hidden.dtype)
    weights = None if token_weights is None else as_real("token_weights", token_weights, wide).astype(wide)
    if weights is not None and weights.shape != targets.shape:
        raise LabError(f"token_weights are one a token: targets are {list(targets.shape)}, they are {list(weights.shape)}.")
    refuse_bad_targets(targets, weights, vocab, " Tokens to leave out have a weight of 0 in token_weights.")
    chosen = explain_plan(tokens, hidden.shape[-1], vocab, loss, hidden.dtype, plan, tiles, reduction == "none", head.devices)
    try_out(loss, vocab, wide)
    # What a loss of one's own closes over may be another value at the next call.
    fixed = settled(loss)
    run = _by_plan if fixed is None else _compiled
    return run(fixed or loss, head, chosen, reduction, hidden, weight, bias, as_index(targets), weights)


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
    hidden, weight, targets, bias, head, vocab = fitting(hidden, weight, targets, bias, softcap, vocab_first, spread)
    refuse_bad_targets(targets, None, vocab)
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
