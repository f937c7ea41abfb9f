"""One run is a compiled scan; a grid of rates and seeds is one compiled program, called a run a core or all runs at once.

What diverges stops alone. On a mesh the devices share each run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xentlab.contract import LabError, Loss, whole
from xentlab.defaults import quiet
from xentlab.layout import Layout, Spread, fitted, memory_limit, preferred
from xentlab.products import on_cpu
from xentlab.program import Program, program
from xentlab.recipe import Recipe
from xentlab.sources import Source, checked_source

if TYPE_CHECKING:
    from xentlab.checkpoints import Grid


@dataclasses.dataclass(frozen=True)
class Trained:
    """A grid of finished runs of one loss. Arrays are [runs] or [runs, blocks]; models is a pytree with runs in front.

    diverged_at: the step at which a run's loss was not finite, or the last of the block after which its parameters' norm, in
    float32, was not; or -1. It kept the parameters that it began that block with.
    """

    rates: np.ndarray
    seeds: np.ndarray
    steps: np.ndarray
    train_loss: np.ndarray
    validation_nll: np.ndarray
    smoothing: np.ndarray
    diverged_at: np.ndarray
    models: Any

    def model(self, run: int) -> Any:
        """The trained model of one run."""
        arrays, rest = eqx.partition(self.models, eqx.is_inexact_array)
        return eqx.combine(jax.tree.map(lambda leaf: leaf[run], arrays), rest)


def joined(one: Trained, other: Trained) -> Trained:
    """Two grids of one loss as one: the runs of both."""
    models = []
    for each in (one.models, other.models):
        arrays, rest = eqx.partition(each, eqx.is_inexact_array)
        models.append(arrays)
    models = eqx.combine(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *models), rest)
    names = ("rates", "seeds", "train_loss", "validation_nll", "smoothing", "diverged_at")
    runs = {name: np.concatenate([getattr(one, name), getattr(other, name)]) for name in names}
    return Trained(steps=one.steps, models=models, **runs)


MEASURED = {"train_loss": np.float32, "validation_nll": np.float32, "smoothing": np.int32}


def train(
    loss: Loss,
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    recipe: Recipe | None = None,
    progress: Callable[[int], None] = quiet,
    mesh: Mesh | None = None,
    compiled: Program | None = None,
    checkpoint: Grid | None = None,
    laid_out: Callable[[Layout], None] = quiet,
) -> Trained:
    """Trains one loss at every learning rate and seed, in one compiled program.

    A seed fixes the first parameters, by jax.random.key(seed), and the order of the windows, by np.random.default_rng(seed), so
    runs of different losses and rates are paired.
    progress is called with the finished steps (of each run) after every block. mesh: of devices (`mesh.make_mesh`):
    its axis runs takes different runs, tokens of a run are split over its axis data, the vocabulary over its axis model.
    compiled: `program` of the same loss, source, model, recipe and mesh: as many runs a call compile no block again.
    checkpoint: where the runs are kept between blocks; runs that it has go on from there, and end as they would have.
    laid_out is told how the runs lie on the machine.
    """
    recipe = recipe or Recipe()
    check_grid(learning_rates, seeds)
    compiled = compiled or program(loss, checked_source(source), model, recipe, mesh)
    pairs = [(rate, int(seed)) for rate in learning_rates for seed in seeds]
    layout, count = _layout(compiled, len(pairs), mesh), len(pairs)
    laid_out(layout)
    # A call takes `width` runs: the last one again where they do not divide.
    padded = pairs + pairs[-1:] * (-count % layout.width)
    rates = np.asarray([rate for rate, _ in padded], np.float32)
    run_seeds = [seed for _, seed in padded]
    states = compiled.begin(rates, np.asarray(run_seeds, np.uint32))
    measured = {name: np.zeros((count, len(recipe.starts)), dtype) for name, dtype in MEASURED.items()}
    done, kept = _resumed(checkpoint, compiled.spread, states, measured, count)
    if done:
        states, measured = kept
        progress(min(recipe.steps, done * recipe.steps_a_block))
    states = _Groups(states, layout)

    for index, (start, places) in itertools.islice(enumerate(compiled.draws(run_seeds)), done, None):
        results = states.advance(compiled, rates, start, places, mesh)
        for name, column in zip(MEASURED, results, strict=True):
            measured[name][:, index] = column[:count]
        if checkpoint:
            everything = lambda: {"states": _everywhere(compiled.spread, states.whole(count)), "measured": measured}
            checkpoint.after(index + 1, index + 1 == len(recipe.starts), everything)
        progress(min(recipe.steps, int(start) + recipe.steps_a_block))
    arrays, _, diverged_at = _everywhere(compiled.spread, states.whole(count))
    if mesh is not None:  # what comes next is one device's work, in every process the same
        arrays = jax.tree.map(jnp.asarray, jax.device_get(arrays))
    return Trained(
        rates=np.array([rate for rate, _ in pairs]),
        seeds=np.array([seed for _, seed in pairs]),
        steps=np.minimum(recipe.steps, np.array(recipe.starts) + recipe.steps_a_block),
        train_loss=measured["train_loss"],
        validation_nll=measured["validation_nll"],
        smoothing=measured["smoothing"][:, -1],
        diverged_at=np.asarray(diverged_at),
        models=eqx.combine(arrays, compiled.rest),
    )


def check_grid(learning_rates: Sequence[float], seeds: Sequence[int]) -> None:
    """Raises `LabError` for rates and seeds that no run can have."""
    if np.ndim(learning_rates) != 1 or np.ndim(seeds) != 1 or not len(learning_rates) or not len(seeds):
        raise LabError(f"a grid needs learning rates and seeds, a list of each; got {learning_rates} and {seeds}.")
    with np.errstate(over="ignore"):
        fit = all(hasattr(rate, "__float__") and 0 < np.float32(rate) < np.inf for rate in learning_rates)
    if not fit:
        raise LabError(f"learning rates are positive and finite; got {list(learning_rates)}.")
    message = f"seeds are whole numbers from 0 to {2**32 - 1}; got {list(seeds)}."
    if any(whole(seed, 0, message) >= 2**32 for seed in seeds):
        raise LabError(message)


def _layout(compiled: Program, runs: int, mesh: Mesh | None) -> Layout:
    wanted = preferred(runs, mesh)
    # On a CPU's mesh a call is as narrow as it can be.
    limit = None if mesh is not None and on_cpu() else memory_limit()
    return fitted(runs, wanted, compiled.needs, limit, mesh.shape.get("runs", 1) if mesh else 1)


def _resumed(checkpoint, spread, states, measured, count):
    """Blocks done, and states and measurements as they stood then; 0 and None where nothing was kept."""
    if checkpoint is None:
        return 0, None
    cut = _everywhere(spread, jax.tree.map(lambda leaf: leaf[:count], states))
    found = checkpoint.load({"states": cut, "measured": measured})
    if found is None:
        return 0, None
    done, tree = found
    more = len(jax.tree.leaves(states)[0]) - count
    again = lambda leaf: jnp.concatenate([leaf, jnp.repeat(leaf[-1:], more, axis=0)]) if more else leaf
    return done, (jax.tree.map(again, tree["states"]), jax.tree.map(np.array, tree["measured"]))


def _everywhere(spread: Spread, states: Any) -> Any:
    """Runs as every process can read them: whole on each of its devices."""
    return states if spread.mesh is None else jax.jit(spread.everywhere)(states)


class _Groups:
    """The runs' states by the call that takes them, and how to move them all by a block."""

    def __init__(self, states: Any, layout: Layout):
        count, width = len(jax.tree.leaves(states)[0]), layout.width
        self.layout, self.groups = layout, [slice(first, first + width) for first in range(0, count, width)]
        # Calls side by side are a CPU's, many and small: NumPy cuts and joins them at no cost, JAX at 60 us a leaf and run.
        self.by = np if layout.at_a_time > 1 else jnp
        states = jax.device_get(states) if self.by is np else states
        self.states = [self._parked(jax.tree.map(lambda leaf, place=place: leaf[place], states)) for place in self.groups]

    def _parked(self, states):
        return jax.device_get(states) if self.layout.parked else states

    def advance(self, compiled, rates, start, places, mesh):
        """A block of every run: what was measured [runs], each of `MEASURED`."""
        # On a mesh jit places what the eager slices left elsewhere; a compiled program would refuse it.
        block, measure = compiled.compiled(self.layout.width) if mesh is None else (compiled.block, compiled.measure)

        def one(group):
            runs = self.groups[group]
            states, train_loss = block(rates[runs], self.states[group], start, places[runs])
            results = (train_loss, *measure(states))
            self.states[group] = self._parked(states)
            return jax.tree.map(np.asarray, results)

        with concurrent.futures.ThreadPoolExecutor(self.layout.at_a_time) as pool:
            results = list(pool.map(one, range(len(self.groups))))
        return [np.concatenate(column) for column in zip(*results, strict=True)]

    def whole(self, count):
        """The first `count` runs in one pytree."""
        runs = jax.tree.map(lambda *leaves: self.by.concatenate(leaves)[:count], *self.states)
        # Not by jnp.asarray, which compiles a program for each shape; JAX's own may lie on several hosts, and stay there.
        return jax.device_put(runs) if self.by is np else runs
