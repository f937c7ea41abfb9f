"""Tiles of logits, their way back into hidden states, weight and bias, and where all of them lie on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from xentlab.products import accumulator, made, moved_whole, on_cpu, on_gpu, part_of, product, turned, written
from xentlab.targets import is_at_target

TURNED_BYTES = 40 * 2**20  # of hidden states, the most that a CPU copies
MANY = 2**20  # numbers, from which on a GPU's time goes into memory rather than into starting kernels


@dataclasses.dataclass(frozen=True)
class Head:
    """How logits come from hidden states [N, D] and a weight, and how they are spread.

    softcap: logits are c tanh(z / c). vocab_first: the weight is [V, D]. tokens, classes: the axes of `mesh` over which tokens
    and vocabulary are split; None where they are whole. Methods that take a part work on one device's share.
    """

    softcap: float | None = None
    vocab_first: bool = False
    mesh: Mesh | None = None
    tokens: str | None = None
    classes: str | None = None

    @property
    def vocab_axis(self) -> int:
        """The weight's axis of length V."""
        return 0 if self.vocab_first else 1

    def vocab(self, weight: jax.Array) -> int:
        """V."""
        return weight.shape[self.vocab_axis]

    def part(self, weight: jax.Array, start: Any, size: int) -> jax.Array:
        """The weight of `size` classes from `start` on."""
        return part_of(weight, start, size, self.vocab_axis)

    def put(self, weight: jax.Array, part: jax.Array, start: Any) -> jax.Array:
        """The weight with that part replaced, in place where XLA can."""
        return lax.dynamic_update_slice_in_dim(weight, part.astype(weight.dtype), start, self.vocab_axis)

    def logits(self, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Logits [N, C] of the classes of a weight's part."""
        z = product(hidden, weight, 1, 1 - self.vocab_axis)
        if bias is not None:
            z = z + bias.astype(z.dtype)[None]
        return self._capped(z)

    def logits_at(self, hidden: jax.Array, weight: jax.Array, bias: jax.Array | None, places: jax.Array) -> jax.Array:
        """The logits [N] of one class a token, each within the weight's part."""
        wide = accumulator(hidden.dtype)
        if moved_whole(weight.dtype):  # a gather would widen all of it
            own = lambda place: self.part(weight, place, 1).reshape(-1)
            z = jnp.einsum("nd,nd->n", hidden, lax.map(own, places), preferred_element_type=wide)
        else:
            columns = jnp.take(weight, places, axis=self.vocab_axis)
            z = jnp.einsum("nd,nd->n" if self.vocab_first else "nd,dn->n", hidden, columns, preferred_element_type=wide)
        if bias is not None:
            z = z + bias.astype(z.dtype)[places]
        return self._capped(z)

    def _capped(self, z: jax.Array) -> jax.Array:
        return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)

    def before_softcap(self, to_logits: jax.Array, z: jax.Array) -> jax.Array:
        """The gradient by what the softcap was given, from the gradient by the logits z."""
        return to_logits if self.softcap is None else to_logits * (1 - (z / self.softcap) ** 2)

    def to_hidden(self, to_logits: jax.Array, weight: jax.Array) -> jax.Array:
        """The hidden states' gradient [N, D] from the logits' [N, C]."""
        return product(to_logits, weight, 1, self.vocab_axis)

    def across(self, hidden: jax.Array) -> jax.Array | None:
        """A copy of the hidden states for `to_weight`, where that helps and is small beside what a head holds: [D, N], or None.

        A CPU's product with it is faster (see `turned`): by it the whole head takes a tenth less, or somewhat less than that.
        So is a GPU's of float32, 1.0 ms for 1.6 on an H200: TF32's units want rows along what is summed over.
        """
        if on_gpu():
            return written(hidden.T) if hidden.dtype == jnp.float32 and hidden.size >= MANY else None
        return turned(hidden) if turns(hidden.nbytes) else None

    def to_weight(self, hidden: jax.Array, across: jax.Array | None, to_logits: jax.Array, dtype: Any = None) -> jax.Array:
        """The gradient of the weight's part from the logits' [N, C]; dtype: what a chip rounds its wide sums to, if to any."""
        rows, along = (hidden, 0) if across is None else (across, 1)
        if not self.vocab_first:
            return product(rows, to_logits, along, 0, dtype)
        if across is None or not on_cpu():
            return product(to_logits, rows, 0, along, dtype)
        return made(product(rows, to_logits, along, 0, dtype)).T

    def count(self, axis: str | None) -> int:
        """Devices along one of the two axes."""
        return 1 if axis is None else self.mesh.shape[axis]

    @property
    def devices(self) -> tuple[int, int]:
        """Those that share the tokens, and those that share the vocabulary."""
        return self.count(self.tokens), self.count(self.classes)

    def place(self, axis: str | None) -> Any:
        """This device's place along an axis."""
        return 0 if axis is None else lax.axis_index(axis)

    def summed(self, array: Any, axis: str | None) -> Any:
        """The sum over an axis' devices."""
        return array if axis is None else lax.psum(array, axis)

    def spread(self, function: Callable, *arrays: Any, out: str) -> Any:
        """function of each device's share of hidden, weight, bias, then of arrays [N, ...]; `out` names its results' places.

        The letters of `out`, one a result: t, split as the tokens are; w, as the weight; b, as the bias; a, whole everywhere.
        A tuple or list among the arrays goes to all of them whole.
        """
        if self.mesh is None:
            return function(*arrays)
        axes = [self.classes if axis == self.vocab_axis else None for axis in (0, 1)]
        places = {"t": PartitionSpec(self.tokens), "w": PartitionSpec(*axes), "b": PartitionSpec(self.classes)}
        places["a"] = PartitionSpec()
        more = "".join("a" if isinstance(array, (tuple, list)) else "t" for array in arrays[3:])
        given = tuple(places[kind] for kind in "twb" + more)
        results = tuple(places[kind] for kind in out)
        # The derivatives' sums are ours to write (see stream.py): JAX's check of what varies over the mesh would want casts.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=results[0] if len(out) == 1 else results, check_vma=False
        )(*arrays)


def turns(nbytes: int) -> bool:
    """Whether hidden states of so many bytes are copied for the weight's gradient."""
    return on_cpu() and nbytes <= TURNED_BYTES


def over_tiles(step: Callable[[Any, Any, jax.Array | None], Any], state: Any, length: int, tile: int) -> Any:
    """step(state, start, overlap) for tiles of an axis of `length` >= `tile`. The last one overlaps the one before it.

    overlap: how many places at its start an earlier tile has had; None where `tile` divides `length`, and no tile has any.
    Nothing is padded, and every tile being of one size, the step is compiled once.
    """
    count = -(-length // tile)
    if count == 1:
        return step(state, 0, None)

    def one(i, state):
        start = jnp.minimum(i * tile, length - tile)
        return step(state, start, i * tile - start if length % tile else None)

    return lax.fori_loop(0, count, one, _as_varied(one, state))


def once(array: jax.Array, overlap: jax.Array | None, instead: Any, axis: int = 0) -> jax.Array:
    """A tile's array with `instead` at the places along an axis that an earlier tile has had: what broadcasts, or makes that.

    >>> once(jnp.ones(4), jnp.int32(1), 0.0)
    Array([0., 1., 1., 1.], dtype=float32)
    """
    if overlap is None:
        return array

    def masked(array):
        had = jnp.arange(array.shape[axis], dtype=overlap.dtype) < overlap
        had = jnp.expand_dims(had, [each for each in range(array.ndim) if each != axis])
        return jnp.where(had, instead() if callable(instead) else instead, array)

    # A CPU's mask is a pass over the tile, which only the last one needs; elsewhere it costs nothing within what is beside it.
    return lax.cond(overlap > 0, masked, lambda array: array, array) if on_cpu() else masked(array)


def _as_varied(one, state):
    """A loop's start, varying over as many of a mesh's axes as what a step makes of it: in the caller's own `jax.shard_map`."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return state
    return jax.tree.map(lambda leaf, wanted: _varied(leaf, _axes_of(wanted)), state, jax.eval_shape(one, 0, state))


def together(*arrays: Any) -> list[Any]:
    """Arrays that vary over the same axes of a `jax.shard_map` of the caller's, all those over which one of them does."""
    axes = frozenset().union(*(_axes_of(jax.typeof(array)) for array in arrays if array is not None))
    return [None if array is None else _varied(array, axes) for array in arrays]


def varies(array: jax.Array) -> bool:
    """Whether JAX keeps account that an array varies over some axis of a `jax.shard_map`'s mesh."""
    return bool(_axes_of(jax.typeof(array)))


def _varied(array, axes):
    more = tuple(axes - _axes_of(jax.typeof(array)))
    return lax.pcast(array, more, to="varying") if more else array


def _axes_of(kind):
    """The mesh axes over which an array of this kind varies; JAX keeps them here or there, by its version, or not at all."""
    varying = kind.vma if hasattr(kind, "vma") else getattr(kind.manual_axis_type, "varying", None)
    return varying or frozenset()


def read_at(z: jax.Array, places: jax.Array) -> jax.Array:
    """z [N, C] at one place a row, [N]; 0 where `places` lies outside [0, C)."""
    # Among many logits a GPU's comparison is a pass over them, by a profile on an H200; among few it is one kernel less.
    if _scatters() or (on_gpu() and z.size >= MANY):
        found = jnp.take_along_axis(z, jnp.clip(places, 0, z.shape[1] - 1)[:, None], axis=1)[:, 0]
        return jnp.where((places >= 0) & (places < z.shape[1]), found, 0)
    return jnp.sum(jnp.where(is_at_target(z, places), z, 0), axis=-1)


def write_at(z: jax.Array, places: jax.Array, values: Any) -> jax.Array:
    """z [N, C] with one number a row written over, from values [N] or one; nothing where `places` lies outside [0, C)."""
    values = jnp.broadcast_to(jnp.asarray(values, z.dtype), places.shape)
    if _scatters():
        inside = jnp.where(places < 0, z.shape[1], places)
        return z.at[jnp.arange(len(z), dtype=jnp.int32), inside].set(values, mode="drop")
    return jnp.where(is_at_target(z, places), values[:, None], z)


def rivals_of(z: jax.Array, places: jax.Array, own: jax.Array, overlap: jax.Array | None = None) -> jax.Array:
    """z [N, C] with -inf where the target is, and what an earlier tile has had; own [N]: what `read_at` found there."""
    # On a CPU by way of `own`, so that reading comes first, and z is written into without a copy of it.
    out = jnp.minimum(lax.stop_gradient(own), -jnp.inf) if _scatters() else jnp.full_like(own, -jnp.inf)
    return write_at(once(z, overlap, out[:, None], 1), places, out)


def _scatters() -> bool:
    """Whether to touch one number a row rather than compare all.

    On a CPU each comparison is a pass over the tile, a fifth of the head's time in all. Elsewhere it is fused into its
    neighbours, and a scatter is what costs.
    """
    return on_cpu()
