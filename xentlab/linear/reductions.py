"""What a loss may ask of a token's logits without seeing them all at once: the reductions of a `stream` form.

Each is taken over the rivals, the classes that are not the target, tile by tile. That the target stands apart keeps the digits
at certainty, where 1 - p is the rivals' share and lse - z_y would be a difference of equals.

- `target`: z_y. `vocab`: V, a number.
- `rivals`: logsumexp of the rivals' logits. `rivals_2`, `rivals_alpha`: the same of a multiple of them, by a number or by the
  loss's setting of that name.
- `top`: the greatest rival. `total`, `squares`: the sum of the rivals' logits, of their squares.
- `softplus`: the sum of log(1 + e^z) over the rivals.
- `hinges`, `hinges_2`: the sum of max(0, 1 + z_j - z_y) over the rivals j, of its square.
- `entropy`: of the rivals' own shares, softmax over them alone, in nats.
- `level`: the greatest rival, as a constant. A form that asks for it has `target`, `rivals`, `rivals_...` and `total` less it.

A loss of which it is said that no common shift of the logits changes it (`Facts.shift`) may be given all of them less the
greatest rival's: far from 0 they keep their digits so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from xentlab.contract import LabError, is_known
from xentlab.products import on_cpu
from xentlab.targets import or_nan

LOWEST = float(np.finfo(np.float32).min)  # the running maximum of nothing: finite, so that no -inf - -inf arises


class Tile(NamedTuple):
    """A tile of logits as the reductions see it.

    rivals: the logits [N, C], wide, with -inf where no rival is. counts: where one is; count [N]: how many. below: the rivals
    less the greatest so far; fallen [N]: by how much that one has risen with this tile, as a number <= 0. Both are free of
    derivatives of that greatest, a mere shift. target [N]: z_y, where a reduction asks for it. first: its first column's class.
    """

    rivals: jax.Array
    counts: jax.Array
    count: jax.Array
    below: jax.Array
    fallen: jax.Array
    target: jax.Array | None
    first: jax.Array | int


class Row(NamedTuple):
    """What a tile's slopes may need of its logits z [N, C] besides, from columns: the greatest rival, z_y, exp(z - shift).

    first: the class of the tile's first column.
    """

    shift: jax.Array
    target: jax.Array
    share: jax.Array
    first: jax.Array | int


@dataclasses.dataclass(frozen=True)
class Reduction:
    """One reduction: how it starts, takes in a tile, is merged over a mesh, ends, and what its slope is.

    start(tokens, dtype) -> state; add(state, tile) -> state.
    merge(state, fallen, axis) -> state: over the mesh axis that holds the rest of the vocabulary, where the greatest rival lies
    higher by -fallen [N].
    finish(state, shift) -> the value [N], and what its slope needs besides, [N] or None; shift [N]: the greatest rival.
    slope(value, aside, z, row): the value's derivative by each logit of the tile [N, C]; it is written over where no rival is.
    by_target(aside): that by z_y, of a reduction that reads it: z_y is found ahead of the tiles then.
    level: whether values are of the logits as they are; else of those less the greatest rival, and so is the target's then.
    What is added to a level of thousands loses its digits, and a loss that no common shift changes need not know it.
    waits: whether it sees its tile `after` the reduction before; powers of one exponential share theirs.
    """

    start: Callable[[int, Any], Any]
    add: Callable[[Any, Tile], Any]
    merge: Callable[[Any, jax.Array, str], Any]
    finish: Callable[[Any, jax.Array], tuple[jax.Array, jax.Array | None]]
    slope: Callable[..., jax.Array]
    by_target: Callable[[jax.Array], jax.Array] | None = None
    level: bool = True
    waits: bool = True


def lowest(tokens: int, dtype: Any) -> jax.Array:
    """The greatest of no rivals, [tokens]."""
    return jnp.full(tokens, LOWEST, dtype)


def risen(shift: jax.Array, rivals: jax.Array, counts: jax.Array, **rest: Any) -> tuple[jax.Array, Tile]:
    """The greatest rival with those of a tile [N, C], and the tile; rest: count, target and first, as `Tile` has them."""
    higher = lax.stop_gradient(jnp.maximum(shift, jnp.max(rivals, axis=-1)))
    return higher, Tile(rivals, counts, below=rivals - higher[:, None], fallen=shift - higher, **rest)


def after(known: list[jax.Array], array: jax.Array) -> jax.Array:
    """The array [N, C], made when all of these sums [N] are known; a row of which one is NaN is NaN.

    Of two sums that wait for nothing XLA's CPU backend makes both terms first, and holds a tile for each.

    >>> after([jnp.array([3.0, jnp.nan])], jnp.ones((2, 2)))
    Array([[ 1.,  1.],
           [nan, nan]], dtype=float32)
    """
    if not known or not on_cpu():
        return array
    return array + functools.reduce(or_nan, known, jnp.zeros_like(known[0]))[:, None]


def taken_in(reductions: Mapping[str, Reduction], states: Mapping[str, Any], tile: Tile) -> dict[str, Any]:
    """The reductions' states with a tile taken in, by one after another."""
    new, known = {}, []
    for name, reduction in reductions.items():
        later = tile._replace(rivals=after(known, tile.rivals), below=after(known, tile.below)) if reduction.waits else tile
        new[name] = reduction.add(states[name], later)
        known = jax.tree.leaves(new[name]) or known
    return new


def greatest(value: jax.Array, axis: str) -> jax.Array:
    """The greatest of an axis' values, as a constant: JAX gives pmax no derivative, and none is needed of a mere shift."""
    return lax.pmax(lax.stop_gradient(value), axis)


def _zeros(tokens: int, dtype: Any) -> jax.Array:
    return jnp.zeros(tokens, dtype)


def _summed(term: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array], jax.Array]) -> Reduction:
    return Reduction(
        start=_zeros,
        add=lambda state, tile: state + jnp.sum(jnp.where(tile.counts, term(tile.rivals), 0), axis=-1),
        merge=lambda state, fallen, axis: lax.psum(state, axis),
        finish=lambda state, shift: (state, None),
        slope=lambda value, aside, z, row: slope(z),
    )


def _positive(margins: jax.Array) -> jax.Array:
    """max(0, margins), and NaN for NaN, which a CPU's vectorised maximum would lose."""
    return jnp.where(margins < 0, 0, margins)


def _margins(rivals: jax.Array, target: jax.Array) -> jax.Array:
    """1 + z_j - z_y, the difference first: beside large logits the 1 would be lost.

    What is out, and the target's own place, stays so beside a target at -inf, from which all others lead by infinity.
    """
    return jnp.where(rivals == -jnp.inf, -jnp.inf, 1 + (rivals - target))


def _hinges(term: Callable[[jax.Array], jax.Array], slope: Callable[[jax.Array], jax.Array]) -> Reduction:
    """The sum of a margin's term, and beside it the sum of its slope: by how much all rivals push the target."""

    def add(state, tile):
        sums, slopes = state
        margins = _margins(tile.rivals, tile.target[:, None])
        more = jnp.sum(term(margins), axis=-1)
        return sums + more, slopes + jnp.sum(slope(after([more], margins)), axis=-1)

    return Reduction(
        start=lambda tokens, dtype: (_zeros(tokens, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=lambda state, fallen, axis: lax.psum(state, axis),
        finish=lambda state, shift: state,
        slope=lambda value, pushed, z, row: slope(_margins(z, row.target)),
        by_target=jnp.negative,
    )


def _logsumexp(multiple: float, level: bool = True) -> Reduction:
    base = (lambda shift: multiple * shift) if level else jnp.zeros_like
    shrunk = lambda mass, fallen: mass * jnp.exp(multiple * fallen)
    # A whole power shares its exponential with the others; what underflows has lost 1e-38 of the greatest. Any other is an
    # exponential of its own: a root has no derivative at a share of 0, which a second derivative would ask for.
    raised = lambda below, share: share ** int(multiple) if multiple == int(multiple) else jnp.exp(multiple * below)
    return Reduction(
        start=_zeros,
        add=lambda mass, tile: shrunk(mass, tile.fallen) + jnp.sum(raised(tile.below, jnp.exp(tile.below)), axis=-1),
        merge=lambda mass, fallen, axis: lax.psum(shrunk(mass, fallen), axis),
        # What a level of thousands has left of log(mass) is no number for a slope, which asks for shares alone.
        finish=lambda mass, shift: (_log_mass(base(shift), mass), _log_mass(0, mass) if level else None),
        slope=lambda value, log_mass, z, row: (
            multiple * _scale(jnp.zeros_like(row.shift), log_mass if level else value) * raised(z - row.shift, row.share)
        ),
        level=level,
        waits=False,
    )


def _scale(shift: Any, log_mass: jax.Array) -> jax.Array:
    """What a share of the greatest is to be multiplied by, to be one of the mass; 0 where no rival has any."""
    return jnp.where(log_mass == -jnp.inf, 0, jnp.exp(shift - log_mass))


def _log_mass(shift: Any, mass: jax.Array) -> jax.Array:
    return jnp.where(mass == 0, -jnp.inf, shift + jnp.log(jnp.where(mass == 0, 1, mass)))


def _level() -> Reduction:
    """The greatest rival. Its slope is 0: whatever it is, the sum of it and of what is less it is the same."""
    return Reduction(
        start=lambda tokens, dtype: (),
        add=lambda state, tile: state,
        merge=lambda state, fallen, axis: state,
        finish=lambda state, shift: (jnp.where(shift > LOWEST, shift, 0), None),
        slope=lambda value, aside, z, row: jnp.zeros_like(z),
        level=False,
    )


def _total_below() -> Reduction:
    """The sum of the rivals' logits less the greatest of them."""

    def add(state, tile):
        total, count = state
        below = jnp.sum(jnp.where(tile.counts, tile.below, 0), axis=-1)
        return total + count * tile.fallen + below, count + tile.count.astype(count.dtype)

    def merge(state, fallen, axis):
        total, count = state
        return lax.psum((total + count * fallen, count), axis)

    return Reduction(
        start=lambda tokens, dtype: (_zeros(tokens, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=merge,
        finish=lambda state, shift: (state[0], None),
        slope=lambda value, aside, z, row: jnp.ones_like(z),
        level=False,
    )


def _entropy() -> Reduction:
    def shrunk(state, fallen):
        mass, moment = state
        share = jnp.exp(fallen)
        # fallen is LOWEST or so before the first rival, with a mass of 0.
        return mass * share, share * (moment + jnp.where(mass > 0, mass * fallen, 0))

    def add(state, tile):
        mass, moment = shrunk(state, tile.fallen)
        more = jnp.sum(jnp.exp(tile.below), axis=-1)
        below = after([more], tile.below)
        share = jnp.exp(below)
        # Both wheres: 0 times -inf has no derivative, and of a bare product XLA's CPU backend would hold both factors.
        product = jnp.where(share > 0, share * jnp.where(share > 0, below, 0), 0)
        return mass + more, moment + jnp.sum(product, axis=-1)

    def finish(state, shift):
        mass, moment = state
        safe = jnp.where(mass == 0, 1, mass)
        return jnp.log(safe) - moment / safe, _log_mass(0, mass)

    def slope(value, log_mass, z, row):
        share = row.share * _scale(0, log_mass)
        return -share * (jnp.where(share > 0, z - row.shift - log_mass, 0) + value)

    return Reduction(
        start=lambda tokens, dtype: (_zeros(tokens, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=lambda state, fallen, axis: lax.psum(shrunk(state, fallen), axis),
        finish=finish,
        slope=slope,
    )


def _top() -> Reduction:
    def add(state, tile):
        top, ties, place = state
        higher = jnp.maximum(top, jnp.max(tile.rivals, axis=-1))
        # A tie shares the slope, as JAX's own max does; what ties with nothing yet is at -inf. A NaN, which a CPU's vectorised
        # maximum loses, is in no order with the top, and shows here.
        ordered = jnp.where(tile.rivals <= higher[:, None], 0, jnp.nan).astype(top.dtype)
        equal, still = lambda each: (tile.rivals == each[:, None]) & tile.counts, top == higher
        tied = jnp.sum(jnp.where(equal(higher), 1, ordered), axis=-1)
        # Of one alone, which is to be known first: side by side XLA would hold two tiles for both sums.
        alone = equal(jnp.where(tied == 1, higher, jnp.nan))
        found = jnp.sum(jnp.where(alone, _columns(tile.first, tile.rivals), 0), axis=-1)
        return higher, jnp.where(still | jnp.isnan(ties), ties, 0) + tied, jnp.where(still, place, 0) + found

    def merge(state, fallen, axis):
        top, ties, place = state
        highest = top == greatest(top, axis)
        # The mean of those that are at the top, which keeps a derivative where pmax has none.
        held, at_top, ties, place = lax.psum(
            (
                jnp.where(highest, top, 0),
                highest.astype(top.dtype),
                jnp.where(highest | jnp.isnan(ties), ties, 0),
                jnp.where(highest, place, 0),
            ),
            axis,
        )
        return held / at_top, ties, place

    def finish(state, shift):
        top, ties, place = state
        return or_nan(top, ties), jnp.where(ties == 1, place, -ties)  # of one its class, of more their number

    def slope(value, one_or_many, z, row):
        # Of one by its class: logits that are made anew may be a rounding away from those of which it was the greatest.
        own = (_columns(row.first, z) == one_or_many).astype(z.dtype)
        tied = (z >= value - 4 * jnp.finfo(z.dtype).eps * jnp.abs(value)).astype(z.dtype)
        return jnp.where(one_or_many >= 0, own, tied / -one_or_many)

    return Reduction(
        start=lambda tokens, dtype: (jnp.full(tokens, -jnp.inf, dtype), _zeros(tokens, dtype), _zeros(tokens, dtype)),
        add=add,
        merge=merge,
        finish=finish,
        slope=slope,
    )


def _columns(first: jax.Array | int, z: jax.Array) -> jax.Array:
    """The classes of a tile's columns [1, C], as numbers of its own type: exact below 2^24."""
    return (first + jnp.arange(z.shape[1], dtype=jnp.int32)).astype(z.dtype)[None]


REDUCTIONS: dict[str, Reduction] = {
    "entropy": _entropy(),
    "level": _level(),
    "top": _top(),
    "total": _summed(lambda z: z, jnp.ones_like),
    "squares": _summed(jnp.square, lambda z: 2 * z),
    "softplus": _summed(jax.nn.softplus, jax.nn.sigmoid),
    "hinges": _hinges(_positive, lambda margins: (margins > 0).astype(margins.dtype)),
    "hinges_2": _hinges(lambda margins: _positive(margins) ** 2, lambda margins: 2 * _positive(margins)),
}


def reductions_of(names: tuple[str, ...], settings: Mapping[str, Any], level: bool = True) -> dict[str, Reduction]:
    """The reductions of these names; level: as `Reduction` has it. Raises `LabError` for a name that is none."""
    found: dict[str, Reduction] = {}
    for name in names:
        stem, _, multiple = name.partition("_")
        if name in ("target", "vocab"):
            continue
        if name == "rivals":
            found[name] = _logsumexp(1.0, level)
        elif name == "total" and not level:
            found[name] = _total_below()
        elif name in REDUCTIONS:
            found[name] = REDUCTIONS[name]
        elif stem == "rivals" and (multiple.isdigit() or multiple in settings):
            times = settings.get(multiple, multiple)
            if not is_known(times):
                raise LabError(
                    f"{name} needs a number that is known when JAX compiles; {multiple} is traced. Make it static, or give the "
                    f"head a function around the loss, which sees whole rows: lambda z, y: loss(z, y, {multiple}={multiple})."
                )
            times = float(times)
            if not times > 0:
                raise LabError(f"{name} is the logsumexp of a positive multiple of the rivals' logits; got {times:g}.")
            found[name] = _logsumexp(times, level)
        else:
            known = ", ".join(["target", "vocab", "rivals", *REDUCTIONS, "rivals_<number or setting>"])
            raise LabError(f"a stream form's parameters are reductions; {name!r} is none of {known}.")
    return found
