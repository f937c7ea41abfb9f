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

from xentlab.contract import LabError, Loss, facts_of, settings_of, unwrapped

LOWEST = float(np.finfo(np.float32).min)  # the running maximum of nothing: finite, so that no -inf - -inf arises


@dataclasses.dataclass(frozen=True)
class Reduction:
    """One reduction: start(tokens, dtype) -> state, add(state, z, rival) -> state, finish(state) -> [N], and its slope.

    z: a tile of logits [N, C] in float32. rival: where they are not the target. slope(found, value, z): its derivative by each
    logit of the tile [N, C], given all finished reductions and its own value as columns; it is masked to the rivals outside.
    """

    start: Callable[[int, Any], Any]
    add: Callable[[Any, jax.Array, jax.Array], Any]
    finish: Callable[[Any], jax.Array]
    slope: Callable[[Mapping[str, jax.Array], jax.Array, jax.Array], jax.Array]
    needs: tuple[str, ...] = ()


def _zeros(tokens: int, dtype: Any) -> jax.Array:
    return jnp.zeros(tokens, dtype)


def _summed(term: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array], jax.Array]) -> Reduction:
    return Reduction(
        _zeros,
        lambda state, z, rival: state + jnp.sum(jnp.where(rival, term(z), 0), axis=-1),
        lambda state: state,
        lambda found, value, z: slope(z),
    )


def _logsumexp(multiple: float) -> Reduction:
    def add(state, z, rival):
        top, mass = state
        z = jnp.where(rival, multiple * z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(z, axis=-1))
        return higher, mass * jnp.exp(top - higher) + jnp.sum(jnp.exp(z - higher[:, None]), axis=-1)

    return Reduction(
        lambda tokens, dtype: (jnp.full(tokens, LOWEST, dtype), _zeros(tokens, dtype)),
        add,
        lambda state: jnp.where(state[1] == 0, -jnp.inf, state[0] + jnp.log(jnp.where(state[1] == 0, 1, state[1]))),
        lambda found, value, z: multiple * jnp.exp(multiple * z - value),
    )


def _entropy() -> Reduction:
    def add(state, z, rival):
        top, mass, moment = state
        masked = jnp.where(rival, z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(masked, axis=-1))
        share, moved = jnp.exp(masked - higher[:, None]), top - higher
        below = jnp.where(share > 0, z - higher[:, None], 0)
        shrunk = jnp.exp(moved)
        # moved is LOWEST or so before the first rival, with a mass of 0.
        moment = shrunk * (moment + jnp.where(mass > 0, mass * moved, 0)) + jnp.sum(share * below, axis=-1)
        return higher, mass * shrunk + jnp.sum(share, axis=-1), moment

    def finish(state):
        _, mass, moment = state
        safe = jnp.where(mass == 0, 1, mass)
        return jnp.log(safe) - moment / safe

    def slope(found, value, z):
        log_share = z - found["rivals"]
        share = jnp.exp(log_share)
        return -share * (jnp.where(share > 0, log_share, 0) + value)

    start = lambda tokens, dtype: (jnp.full(tokens, LOWEST, dtype), _zeros(tokens, dtype), _zeros(tokens, dtype))
    return Reduction(start, add, finish, slope, needs=("rivals",))


def _top() -> Reduction:
    def add(state, z, rival):
        top, ties = state
        z = jnp.where(rival, z, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(z, axis=-1))
        # A tie shares the slope, as JAX's own max does; what ties with nothing yet is at -inf.
        tied = jnp.sum((z == higher[:, None]) & rival, axis=-1, dtype=z.dtype)
        return higher, jnp.where(top == higher, ties, 0) + tied

    return Reduction(
        lambda tokens, dtype: (jnp.full(tokens, -jnp.inf, dtype), _zeros(tokens, dtype)),
        add,
        lambda state: state[0],
        lambda found, value, z: (z == value).astype(z.dtype) / found["ties"],
    )


REDUCTIONS: dict[str, Reduction] = {
    "rivals": _logsumexp(1.0),
    "entropy": _entropy(),
    "top": _top(),
    # How many rivals share the top: what a tie's slope is divided by. It has no slope of its own.
    "ties": dataclasses.replace(_top(), finish=lambda state: state[1], slope=lambda found, value, z: jnp.zeros_like(z)),
    "total": _summed(lambda z: z, jnp.ones_like),
    "squares": _summed(jnp.square, lambda z: 2 * z),
    "softplus": _summed(jax.nn.softplus, jax.nn.sigmoid),
}
REDUCTIONS["top"] = dataclasses.replace(REDUCTIONS["top"], needs=("ties",))


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
    """The reductions of these names and those that their slopes need. Raises `LabError` for a name that is none."""
    found: dict[str, Reduction] = {}
    for name in names:
        stem, _, multiple = name.partition("_")
        if name in ("target", "vocab"):
            continue
        if name in REDUCTIONS:
            found |= reductions_of(REDUCTIONS[name].needs, settings) | {name: REDUCTIONS[name]}
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
