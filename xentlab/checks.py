"""Whether a loss keeps the contract: asked before it is trained, audited or put on a head."""

import contextlib
import functools
import inspect
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.contract import FAILURES, LabError, Loss, facts_of, in_short, link_of, name_of, softmax_link, value_and_gradient
from xentlab.products import quickly

SIZES = ("shape", "broadcast", "size", "dimension", "out of bounds")  # words of errors that another vocabulary makes


def checked(loss: Loss, vocab: int = 5, shape: tuple[int, ...] = (2, 3), dtype: Any = jnp.float32) -> Loss:
    """The loss itself, once an abstract call has shown that it keeps the contract. Raises `LabError` if not."""
    logits, targets = jax.ShapeDtypeStruct((*shape, vocab), dtype), jax.ShapeDtypeStruct(shape, jnp.int32)
    shown = f"logits {[*shape, vocab]} and targets {list(shape)}"
    other_way = "It works with the two the other way round: a loss takes (logits, targets)."
    try:
        value = abstract(loss, logits, targets)
    except LabError as error:
        if _takes(loss, targets, logits):
            raise LabError(f"{name_of(loss)} fails on {shown}: {error} {other_way}") from error
        raise
    except FAILURES as error:
        where = f"It was tried at V = {vocab}; ask at its own, by --vocab or vocab= where there is one."
        own = f" Has it a vocabulary of its own? {where}"
        of_a_value = isinstance(error, jax.errors.JAXTypeError)  # which shows a shape too
        own *= not of_a_value and any(word in str(error) for word in SIZES)
        remedy = "It is a function of (logits [..., V], targets [...])." + own
        if isinstance(loss, type):
            remedy = "It is a class: give an instance of it, which is called with (logits [..., V], targets [...])."
        elif missing := _missing(loss):
            remedy = (
                f"{missing[0]} has no default: give it one, or a value by name, ./mine.py:{name_of(loss)}({missing[0]}=1). "
                "Factors of tokens are linear_loss's token_weights."
            )
        elif "dlpack" in str(error) or "Tensor" in str(error):
            remedy = "Take jax.numpy where it takes another library's arrays: the lab differentiates and compiles it."
        elif isinstance(error, TypeError):  # of its arguments, maybe
            remedy = (
                "A loss takes (logits [..., V], targets [...]) and keyword settings with defaults; factors of tokens are "
                f"linear_loss's token_weights.{own}"
            )
        if isinstance(error, jax.errors.TracerArrayConversionError):
            remedy = "Take jax.numpy where it takes NumPy: the lab differentiates and compiles it."
        elif isinstance(error, jax.errors.ConcretizationTypeError):
            remedy = "Values are not known while it is compiled: take jnp.where in place of an if, and fixed shapes."
        one_hot = lambda scores, shares: loss(scores, jax.nn.one_hot(shares, vocab, dtype=dtype))
        if _takes(one_hot, logits, targets):
            remedy = "It takes one-hot targets: wrap it, loss(logits, jax.nn.one_hot(targets, logits.shape[-1]))."
        remedy = other_way if _takes(loss, targets, logits) else remedy
        raise LabError(f"{name_of(loss)} fails on {shown}: {in_short(error)}. {remedy}") from error
    got = getattr(value, "shape", None)
    if got != shape or not jnp.issubdtype(value.dtype, jnp.floating):
        what = f"{value.dtype} of shape {list(got)}" if got is not None else type(value).__name__
        remedy = "Take the vocabulary as the last axis, and leave the mean to the lab."
        if got == shape:
            remedy = "Cast it, and mind that what only compares has no gradient."
        elif got == (*shape, 1):
            remedy = "Take the last axis away: [..., 0], or sums without keepdims."
        raise LabError(
            f"{name_of(loss)} returned {what} for {shown}; a loss returns one floating value a token, {list(shape)}. {remedy}"
        )
    return loss


def check_gradient(loss: Loss, vocab: int = 5) -> None:
    """Raises `LabError` for a loss that JAX cannot differentiate, by shape alone.

    >>> check_gradient(lambda z, y: jax.lax.while_loop(jnp.all, lambda v: v, z[..., 0]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xentlab.contract.LabError: <lambda> has no gradient: ValueError: Reverse-mode ... The lab trains with it: ...
    """
    logits, targets = jax.ShapeDtypeStruct((2, vocab), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
    try:
        abstract(functools.partial(value_and_gradient, loss), logits, targets)
    except FAILURES as error:
        raise LabError(
            f"{name_of(loss)} has no gradient: {in_short(error)}. The lab trains with it: take what JAX "
            "differentiates in reverse, lax.scan for a while_loop say, or give it a jax.custom_vjp."
        ) from error


def check_alone(loss: Loss, vocab: int = 5, shape: tuple[int, ...] = (2, 3)) -> None:
    """Raises `LabError` for a loss of which one token's value changes with what the others are, or how many.

    Asked of the first and the last token of a batch [*shape, vocab], which it is sure of and not, and of each alone. What
    cannot be computed here passes: it closes over what is traced, say, or over a number a token. So does what closes over a
    random key, by which it draws otherwise for each number of tokens.

    >>> check_alone(lambda z, y: jnp.sum((z - jnp.mean(z, axis=0, keepdims=True)) ** 2, axis=-1))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xentlab.contract.LabError: <lambda> mixes tokens: beside others a token's loss is ...
    """
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(*shape, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, shape).astype(np.int32)
    logits.reshape(-1, vocab)[0, targets.flat[0]] = logits.max() + 2
    logits.reshape(-1, vocab)[-1, targets.flat[-1]] = logits.min() - 2
    ends = [(slice(end, end + 1 or None),) * len(shape) for end in (0, -1)]
    several = lambda z, y: [loss(z, y), *(loss(z[end], y[end]) for end in ends)]
    try:
        closed_over = jax.make_jaxpr(lambda z, y: loss(z, y))(logits, targets).consts
        if any(jnp.issubdtype(jnp.result_type(each), jax.dtypes.prng_key) for each in closed_over):
            return
        with jax.ensure_compile_time_eval(), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            # As one program: operation by operation a new process would compile for seconds.
            found = jax.jit(several, compiler_options=quickly(0))(logits, targets)
            together, *alone = (np.asarray(each, np.float64).ravel() for each in found)
    except FAILURES:
        return
    for (one, *_), other in zip(alone, (together[0], together[-1]), strict=True):
        if not np.isclose(one, other, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise LabError(
                f"{name_of(loss)} mixes tokens: beside others a token's loss is {other:.6g}, alone {one:.6g}. A loss gives "
                "each token's own, of its logits and target alone: the audit asks of single tokens, the head cuts batches up."
            )


def check_link(loss: Loss, vocab: int = 5) -> None:
    """Raises `LabError` for a link that makes no probabilities.

    >>> from xentlab.contract import loss
    >>> check_link(loss(link=jax.nn.log_softmax)(lambda logits, targets: ...))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    xentlab.contract.LabError: ... read through no probabilities: at logits ...
    """
    if facts_of(loss).link is softmax_link:
        return
    logits = np.linspace(-2, 2, vocab, dtype=np.float32)
    rows = np.stack([logits, logits[::-1] + 1, 2 * logits])[None]
    try:
        link = link_of(loss)
        read, each = (np.asarray(link(jnp.asarray(z)), np.float64) for z in (logits, rows))
    except FAILURES as error:
        raise LabError(f"{name_of(loss)}'s link fails on logits [{vocab}]: {type(error).__name__}: {error}") from error
    shown = lambda values: np.array2string(values.ravel()[:5], precision=3)
    if read.shape != (vocab,) or not (read >= 0).all() or abs(read.sum() - 1) > 1e-3:
        raise LabError(
            f"{name_of(loss)} is read through no probabilities: at logits {shown(logits)} its link gives {shown(read)}. A link "
            "takes logits [..., V] and gives probabilities [..., V]."
        )
    if (
        each.shape != rows.shape
        or not np.allclose(each.sum(axis=-1), 1, atol=1e-3)
        or not np.allclose(each[0, 0], read, atol=1e-4)
    ):
        raise LabError(
            f"{name_of(loss)}'s link mixes tokens: it reads one row of logits as {shown(read)}, and the same beside others as "
            f"{shown(each.ravel()[:vocab])}. It takes logits [..., V]; does a sum in it lack axis=-1, keepdims=True?"
        )


def abstract(loss: Loss, *arguments: jax.ShapeDtypeStruct) -> Any:
    """What a loss returns, by shape alone; what NumPy warns of on the way is in the error or of no matter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # A function of its own: JAX keeps what it traces by the function, and what was traced in float32 with a float64 array
        # of NumPy's closed over fails where it is asked in float64.
        return jax.eval_shape(lambda *given: loss(*given), *arguments)


def _missing(loss: Loss) -> list[str]:
    """What a loss asks for beside logits and targets, and was not given."""
    with contextlib.suppress(TypeError, ValueError):  # compiled code may have no signature
        left = list(inspect.signature(loss).parameters.values())[2:]
        return [
            each.name
            for each in left
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
    return []


def _takes(loss: Loss, first: jax.ShapeDtypeStruct, second: jax.ShapeDtypeStruct) -> bool:
    """Whether a loss works with these arguments, logits and targets in some order or form."""
    with contextlib.suppress(*FAILURES):
        return getattr(abstract(loss, first, second), "shape", None) == min(first.shape, second.shape, key=len)
    return False
