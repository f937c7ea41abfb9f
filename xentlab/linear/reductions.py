"""What a loss may ask of a token's logits without seeing them all at once: the reductions of a `stream` form.

Each is taken over the rivals, the classes that are not the target, tile by tile. That the target stands apart keeps the digits
at certainty, where 1 - p is the rivals' share and lse - z_y would be a difference of equals.

- `target`: z_y. `vocab`: V, a number.
- `rivals`: logsumexp of the rivals' logits. `rivals_2`, `rivals_alpha`: the same of a multiple of them, by a number or by the
  loss's setting of that name.
- `top`: the greatest rival. `total`, `squares`: the sum of the rivals' logits, of their squares.
- `softplus`: the sum of log(1 + e^z) over the rivals.
- `entropy`: of the rivals' own shares, softmax over them alone, in nats.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xentlab.contract import LabError, Loss, facts_of, settings_of, unwrapped

LOWEST = float(np.finfo(np.float32).min)  # the running maximum of nothing: finite, so that no -inf - -inf arises


@dataclasses.dataclass(frozen=True)
class Reduction:
    """One reduction: start(tokens, dtype) -> state, add(state, z, rival) -> state, merge(state, axis) -> state, finish, slope.

    z: a tile of logits [N, C] in float32. rival: where they count, which the target does not. merge: over the mesh axis that
    holds the rest of the vocabulary. finish(state) -> the value [N], and what its slope needs besides, [N] or None.
    slope(value, aside, z): the value's derivative by each logit of the tile [N, C], from columns; it is masked outside.
    """

    start: Callable[[int, Any], Any]
    add: Callable[[Any, jax.Array, jax.Array], Any]
    merge: Callable[[Any, str], Any]
    finish: Callable[[Any], tuple[jax.Array, jax.Array | None]]
    slope: Callable[[jax.Array, jax.Array | None, jax.Array], jax.Array]


def _zeros(tokens: int, dtype: Any) -> jax.Array:
    return jnp.zeros(tokens, dtype)


def _greatest(value: jax.Array, axis: str) -> jax.Array:
    """The greatest of an axis' values, as a constant: JAX gives pmax no derivative, and none is needed of a mere shift."""
    return lax.pmax(lax.stop_gradient(value), axis)


def _summed(term: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array], jax.Array]) -> Reduction:
    return Reduction(
        start=_zeros,
        add=lambda state, z, rival: state + jnp.sum(jnp.where(rival, term(z), 0), axis=-1),
        merge=lax.psum,
        finish=lambda state: (state, None),
        slope=lambda value, aside, z: slope(z),
    )


def _logsumexp(multiple: float) -> Reduction:
    def add(state, z, rival):
        top, mass = state
        z = jnp.where(rival, multiple * z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(z, axis=-1))
        return higher, mass * jnp.exp(top - higher) + jnp.sum(jnp.exp(z - higher[:, None]), axis=-1)

    def merge(state, axis):
        higher = _greatest(state[0], axis)
        return higher, lax.psum(state[1] * jnp.exp(state[0] - higher), axis)

    return Reduction(
        start=lambda tokens, dtype: (jnp.full(tokens, LOWEST, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=merge,
        finish=lambda state: (_log_mass(*state), None),
        slope=lambda value, aside, z: multiple * jnp.exp(multiple * z - value),
    )


def _log_mass(top: jax.Array, mass: jax.Array) -> jax.Array:
    return jnp.where(mass == 0, -jnp.inf, top + jnp.log(jnp.where(mass == 0, 1, mass)))


def _entropy() -> Reduction:
    def moved_to(higher, state):
        top, mass, moment = state
        moved = top - higher
        shrunk = jnp.exp(moved)
        # moved is LOWEST or so before the first rival, with a mass of 0.
        return mass * shrunk, shrunk * (moment + jnp.where(mass > 0, mass * moved, 0))

    def add(state, z, rival):
        masked = jnp.where(rival, z, -jnp.inf)
        higher = jnp.maximum(state[0], jnp.max(masked, axis=-1))
        mass, moment = moved_to(higher, state)
        share = jnp.exp(masked - higher[:, None])
        below = jnp.where(share > 0, z - higher[:, None], 0)
        return higher, mass + jnp.sum(share, axis=-1), moment + jnp.sum(share * below, axis=-1)

    def merge(state, axis):
        higher = _greatest(state[0], axis)
        return higher, *lax.psum(moved_to(higher, state), axis)

    def finish(state):
        top, mass, moment = state
        safe = jnp.where(mass == 0, 1, mass)
        return jnp.log(safe) - moment / safe, _log_mass(top, mass)

    def slope(value, log_mass, z):
        log_share = z - log_mass
        share = jnp.exp(log_share)
        return -share * (jnp.where(share > 0, log_share, 0) + value)

    start = lambda tokens, dtype: (jnp.full(tokens, LOWEST, dtype), _zeros(tokens, dtype), _zeros(tokens, dtype))
    return Reduction(start, add, merge, finish, slope)


def _top() -> Reduction:
    def add(state, z, rival):
        top, ties = state
        z = jnp.where(rival, z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(z, axis=-1))
        # A tie shares the slope, as JAX's own max does; what ties with nothing yet is at -inf.
        tied = jnp.sum((z == higher[:, None]) & rival, axis=-1, dtype=z.dtype)
        return higher, jnp.where(top == higher, ties, 0) + tied

    def merge(state, axis):
        top, ties = state
        highest = top == _greatest(top, axis)
        # The mean of those that are at the top, which keeps a derivative where pmax has none.
        held, at_top, ties = lax.psum(
            (jnp.where(highest, top, 0), highest.astype(top.dtype), jnp.where(highest, ties, 0)), axis
        )
        return held / at_top, ties

    return Reduction(
        start=lambda tokens, dtype: (jnp.full(tokens, -jnp.inf, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=merge,
        finish=lambda state: state,
        slope=lambda value, ties, z: (z == value).astype(z.dtype) / ties,
    )


REDUCTIONS: dict[str, Reduction] = {
    "rivals": _logsumexp(1.0),
    "entropy": _entropy(),
    "top": _top(),
    "total": _summed(lambda z: z, jnp.ones_like),
    "squares": _summed(jnp.square, lambda z: 2 * z),
    "softplus": _summed(jax.nn.softplus, jax.nn.sigmoid),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """A loss's stream form with its settings bound: the reductions it needs by name, and the function of their values."""

    reductions: Mapping[str, Reduction]
    names: tuple[str, ...]
    function: Callable[..., jax.Array]

    def __call__(self, found: Mapping[str, jax.Array], vocab: int) -> jax.Array:
        """Each token's loss [N] from the reductions' values [N]."""
        return self.function(*(float(vocab) if name == "vocab" else found[name] for name in self.names))


def reductions_of(names: tuple[str, ...], settings: Mapping[str, Any]) -> dict[str, Reduction]:
    """The reductions of these names. Raises `LabError` for a name that is none."""
    found: dict[str, Reduction] = {}
    for name in names:
        stem, _, multiple = name.partition("_")
        if name in ("target", "vocab"):
            continue
        if name in REDUCTIONS:
            found[name] = REDUCTIONS[name]
        elif stem == "rivals" and (multiple.isdigit() or multiple in settings):
            found[name] = _logsumexp(float(settings.get(multiple, multiple)))
        else:
            known = ", ".join(["target", "vocab", *REDUCTIONS, "rivals_<number or setting>"])
            raise LabError(f"a stream form's parameters are reductions; {name!r} is none of {known}.")
    return found


def stream_of(loss: Loss) -> Stream | None:
    """The stream form of a loss at its own settings, or None if it has none.

    >>> from xentlab import resolve
    >>> sorted(stream_of(resolve("brier")).reductions)
    ['rivals', 'rivals_2']
    """
    form = facts_of(loss).stream
    if form is None:
        return None
    function = unwrapped(loss)[0]
    parameters = inspect.signature(function).parameters.values()
    settings = {p.name: p.default for p in parameters if p.default is not p.empty} | settings_of(loss)
    kinds = inspect.signature(form).parameters.values()
    names = tuple(p.name for p in kinds if p.kind is not p.KEYWORD_ONLY)
    bound = {p.name: settings[p.name] for p in kinds if p.kind is p.KEYWORD_ONLY}
    return Stream(reductions_of(names, settings), names, functools.partial(form, **bound))
