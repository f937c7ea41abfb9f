"""A loss's stream form, bound to its settings, and a loss of one's own tried before the head takes it."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.catalogue import is_catalogued
from xentlab.checks import check_alone, checked
from xentlab.contract import LabError, Loss, facts_of, layers, name_of, settings_and_defaults, settings_of
from xentlab.linear.logits import Head
from xentlab.linear.reductions import Reduction, reductions_of
from xentlab.linear.stream import streamed
from xentlab.targets import nan_outside, or_nan

MOST_TRIED = 1024  # classes, with which a stream form is tried beside its function
LEVELLESS = ("target", "rivals", "total", "entropy", "vocab", "level")


@dataclasses.dataclass(frozen=True)
class Stream:
    """A loss's stream form with its settings bound: the reductions it needs by name, and the function of their values."""

    reductions: Mapping[str, Reduction]
    names: tuple[str, ...]
    function: Callable[..., jax.Array]

    def __call__(self, found: Mapping[str, jax.Array], vocab: int) -> jax.Array:
        """Each token's loss [N] from the reductions' values [N]."""
        each = self.function(*(float(vocab) if name == "vocab" else found[name] for name in self.names))
        if jnp.shape(each) != found["target"].shape:
            raise LabError(
                f"a stream form gives one value a token, {list(found['target'].shape)}; it gave {list(jnp.shape(each))}. Leave "
                "sums and means to the head."
            )
        for value in found.values():  # whatever a maximum in the form has lost of it
            each = or_nan(each, value.astype(each.dtype))
        return each


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def or_nan_outside(each: jax.Array, seen: Any, targets: jax.Array, vocab: int) -> jax.Array:
    """Each token's value [N], and NaN where its target lies outside [0, vocab); seen: arrays [N, ...] that it was made of.

    So is what flows back to such a token, but where nothing does: one that is masked afterwards spoils no gradient. And back to
    what it was made of, by a way of its own: a loss that is flat there, below a hinge's margin say, would let no NaN through.
    """
    return each + nan_outside(targets, vocab, each.dtype)


def _nan_outside_forward(each, seen, targets, vocab):
    bad = nan_outside(targets, vocab, each.dtype)
    return each + bad, (bad, seen)


def _nan_outside_backward(vocab, kept, cotangent):
    bad, seen = kept
    spoil = lambda to: jnp.where(cotangent == 0, 0, to + bad)
    along = lambda array: spoil(0).reshape(-1, *[1] * (array.ndim - 1)).astype(array.dtype)
    return spoil(cotangent), jax.tree.map(lambda array: jnp.broadcast_to(along(array), array.shape), seen), None


or_nan_outside.defvjp(_nan_outside_forward, _nan_outside_backward)


def stream_of(loss: Loss) -> Stream | None:
    """The stream form of a loss at its own settings, or None if it has none.

    >>> from xentlab import resolve
    >>> sorted(stream_of(resolve("brier")).reductions)
    ['rivals', 'rivals_2']
    """
    form = facts_of(loss).stream
    *partials, _ = layers(loss)
    if form is None or any(each.args for each in partials):  # of what is given by place a form knows nothing
        return None
    settings = settings_and_defaults(loss)
    kinds = inspect.signature(form).parameters.values()
    settings = {p.name: p.default for p in kinds if p.kind is p.KEYWORD_ONLY and p.default is not p.empty} | settings
    names = tuple(p.name for p in kinds if p.kind is not p.KEYWORD_ONLY)
    keywords = [p.name for p in kinds if p.kind is p.KEYWORD_ONLY]
    if lacking := [name for name in keywords if name not in settings]:
        raise LabError(f"{name_of(loss)}: its stream form wants {', '.join(lacking)}, which is no setting of the loss.")
    bound = {name: settings[name] for name in keywords}
    taken = {*bound, *(name.partition("_")[2] for name in names)}
    if ignored := [name for name in settings_of(loss) if name not in taken]:
        raise LabError(
            f"{name_of(loss)}: its stream form takes no {ignored[0]}, and would be another loss. Give the form a keyword of "
            "that name, or the head a function around the loss."
        )
    # Of a loss that no common shift changes, or that asks for the level. What else it asks for has one in any case, or none.
    level = any(name.partition("_")[0] not in LEVELLESS for name in names)
    if level and "level" in names:
        raise LabError(
            f"{name_of(loss)}: beside level its stream form may ask for {', '.join(LEVELLESS[:-1])} and rivals_... alone."
        )
    level = level or not (facts_of(loss).shift is True or "level" in names)
    return Stream(reductions_of(names, settings, level), names, functools.partial(form, **bound))


def try_out(loss: Loss, vocab: int, dtype: Any) -> None:
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
    >>> from xentlab.losses.likelihood import nll
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
