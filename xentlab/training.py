"""One run is a compiled scan; a grid of rates and seeds is one compiled program, called a run a core or all runs at once.

What diverges stops alone. On a mesh the devices share each run.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from xentlab.contract import LabError, Loss, link_of
from xentlab.information import weighted_mean
from xentlab.layout import Layout, Spread, fitted, memory_limit, preferred
from xentlab.linear import linear_loss
from xentlab.metrics import smoothed_nll
from xentlab.models import checked_model, logits, resolve_model
from xentlab.products import on_cpu
from xentlab.recipe import Recipe
from xentlab.sources import Source

if TYPE_CHECKING:
    from xentlab.checkpoints import Grid


@dataclasses.dataclass(frozen=True)
class Trained:
    """A grid of finished runs of one loss. Arrays are [runs] or [runs, blocks]; models is a pytree with runs in front.

    diverged_at: the step at which a run's loss or update was not finite, or -1. It kept its last finite parameters.
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


def windows(tokens: np.ndarray, window: int, limit: int | None = None) -> np.ndarray:
    """Non-overlapping windows [W, window + 1] spread evenly over a stream, of at most `limit` predicted tokens.

    Raises `LabError` if the stream is shorter than one window.
    """
    if len(tokens) < window + 1:
        raise LabError(
            f"a part of the text has {len(tokens)} tokens, fewer than one window of {window + 1}. "
            "Give a longer text or a shorter window."
        )
    starts = np.arange(0, len(tokens) - window, window)
    if limit is not None and len(starts) * window > limit:
        starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // window)).astype(int)]
    return tokens[starts[:, None] + np.arange(window + 1)[None, :]]


def noisy(tokens: np.ndarray, vocab: int, share: float) -> np.ndarray:
    """The tokens [N], of which each is another one with probability `share`, all others alike; the same ones at every call.

    >>> noisy(np.zeros(4, np.int32), vocab=2, share=1.0)
    array([1, 1, 1, 1], dtype=int32)
    """
    drawn = np.random.default_rng(0)
    moved = (tokens + drawn.integers(1, max(2, vocab), len(tokens))) % vocab
    return np.where(drawn.random(len(tokens)) < share, moved, tokens).astype(tokens.dtype)


@dataclasses.dataclass(frozen=True)
class Program:
    """The training of one loss as compiled functions, for any number of runs R side by side.

    begin(rates [R], seeds [R]) -> states. places(seeds [R]) -> an iterator over blocks: where in the text the windows of their
    steps begin, [R, steps, batch]. block(rates [R], states, places, start) -> states, train_loss [R]: its steps, from the one
    numbered `start` on; the states given are used up. measure(states) -> validation_nll, smoothing, [R] each. rest: the model's
    static part. spread: where runs lie on the mesh.
    """

    begin: Callable
    places: Callable
    block: Callable
    measure: Callable
    rest: Any
    spread: Spread
    built: dict[int, tuple[jax.stages.Compiled, jax.stages.Compiled]] = dataclasses.field(default_factory=dict)

    def compiled(self, width: int) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """block and measure for so many runs a call: compiled once, with XLA's account of their memory."""
        if width not in self.built:
            of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
            rates, places = of(jnp.float32, width), of(jnp.int32, width, *next(self.places([0])).shape[1:])
            states = jax.eval_shape(self.begin, rates, of(jnp.uint32, width))
            lowered = self.block.lower(rates, states, places, of(jnp.int32)), self.measure.lower(states)
            self.built[width] = tuple(each.compile() for each in lowered)
        return self.built[width]

    def needs(self, width: int) -> tuple[int, int]:
        """Bytes that so many runs stand in, and that a call of them takes besides, on each device."""
        block, measure = (each.memory_analysis() for each in self.compiled(width))
        # States are given and handed back in the same place.
        return block.argument_size_in_bytes, max(block.temp_size_in_bytes, measure.temp_size_in_bytes)


def program(
    loss: Loss, source: Source, model: str | Callable = "mlp", recipe: Recipe | None = None, mesh: Mesh | None = None
) -> Program:
    """Compiles nothing yet; arguments and errors as in `train`."""
    recipe = recipe or Recipe()
    make = resolve_model(model)
    tokens = source.split("train")
    stream = jnp.asarray(tokens)
    # Without noise the same array: the compiled program holds it once.
    answers = jnp.asarray(noisy(tokens, source.vocab, recipe.label_noise)) if recipe.label_noise else stream
    windows(tokens, recipe.window)  # long enough?
    held_out = jnp.asarray(windows(source.split("validation"), recipe.window, recipe.validation_tokens))
    rest = _static(make, source.vocab)
    link, spread = link_of(loss), Spread(mesh, recipe.batch, source.vocab)

    def begin(rate, seed):
        arrays = eqx.filter(make(source.vocab, jax.random.key(seed)), eqx.is_inexact_array)
        return arrays, recipe.transformation(rate).init(arrays), jnp.int32(-1)

    # By NumPy: a program that draws takes XLA half as long again to compile.
    def places(seeds):
        of, size = {seed: np.random.default_rng(seed) for seed in seeds}, (recipe.steps_a_block, recipe.batch)
        while True:
            drawn = {seed: rng.integers(len(tokens) - recipe.window, size=size, dtype=np.int32) for seed, rng in of.items()}
            yield np.stack([drawn[seed] for seed in seeds])

    def objective(arrays, tokens, targets):
        trained = eqx.combine(arrays, rest)
        if recipe.head == "naive":
            return weighted_mean(loss(logits(trained, tokens), targets))[0]
        return linear_loss(trained.hidden(tokens), trained.weight, targets, loss=loss, mesh=spread.within)

    def step(rate, state, index, batch):
        arrays, optimizer_state, diverged_at = state
        tokens, targets = map(spread.batch, batch)
        value, gradient = jax.value_and_grad(objective)(arrays, tokens, targets)
        updates, optimizer_state = recipe.transformation(rate).update(gradient, optimizer_state, arrays)
        moved = optax.apply_updates(arrays, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(moved))
        alive = finite & (diverged_at < 0)
        # The optimizer's state goes on: nobody reads it once the run stands still, and choosing costs another pass.
        arrays = jax.tree.map(lambda new, old: jnp.where(alive, new, old), moved, arrays)
        return (arrays, optimizer_state, jnp.where(finite | (diverged_at >= 0), diverged_at, index)), value

    def validated(state):
        arrays, _, diverged_at = state

        def right(window):
            predictions = link(logits(eqx.combine(arrays, rest), window[None, :-1]))
            return jnp.take_along_axis(predictions[0], window[1:, None], axis=-1)[:, 0]

        # As many windows at a time as a step has: a large vocabulary's [all tokens, V] would be what needs the most memory.
        each = smoothed_nll(jax.lax.map(right, held_out, batch_size=min(recipe.batch, len(held_out))), source.vocab)
        return jnp.where(diverged_at >= 0, jnp.nan, jnp.min(each)), jnp.argmin(each).astype(jnp.int32)

    # It runs once: compiling it well takes longer than it does.
    @functools.partial(jax.jit, compiler_options=QUICKLY if on_cpu() else None)
    def first(rates, seeds):
        return spread.states(jax.vmap(begin)(rates, seeds))

    @functools.partial(jax.jit, donate_argnums=1)
    def block(rates, states, places, start):
        def advance(rate, state, places):
            indices = start + jnp.arange(recipe.steps_a_block, dtype=jnp.int32)
            go = lambda state, at: step(rate, state, *at)
            # The last block may end early.
            skip = lambda state, at: (state, jnp.zeros(()))
            maybe = lambda state, at: jax.lax.cond(at[0] < recipe.steps, go, skip, state, at)
            body = maybe if recipe.steps % recipe.steps_a_block else go
            read = places[..., None] + jnp.arange(recipe.window, dtype=jnp.int32)[None, None]
            state, values = jax.lax.scan(body, state, (indices, (stream[read], answers[read + 1])))
            done = jnp.minimum(recipe.steps - start, recipe.steps_a_block)
            return state, jnp.where(state[-1] >= 0, jnp.nan, jnp.sum(values) / done.astype(values.dtype))

        states, train_loss = mapped(advance, rates, states, places)
        return spread.states(states), spread.everywhere(train_loss)

    # By itself: other losses of the same link share it, once JAX keeps what it compiled.
    @jax.jit
    def measure(states):
        return spread.everywhere(mapped(validated, states))

    def mapped(each, *runs):
        if len(jax.tree.leaves(runs)[0]) > 1:
            return jax.vmap(each, spmd_axis_name=spread.across)(*runs)
        # A vmap of one would still batch every product.
        return jax.tree.map(lambda leaf: leaf[None], each(*jax.tree.map(lambda leaf: leaf[0], runs)))

    return Program(first, places, block, measure, rest, spread)


def _static(make: Callable, vocab: int) -> Any:
    """What of a model is no parameter. Only one with other arrays is made for it: the compiling of that would take a second."""
    key = jax.random.key(0)
    example = checked_model(eqx.filter_eval_shape(make, vocab, key), vocab)
    parameter = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    rest = eqx.partition(example, parameter)[1]
    shapes = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(rest))
    return eqx.partition(make(vocab, key), eqx.is_inexact_array)[1] if shapes else rest


QUICKLY = {"xla_backend_optimization_level": 1}
MEASURED = {"train_loss": np.float32, "validation_nll": np.float32, "smoothing": np.int32}


def train(
    loss: Loss,
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    recipe: Recipe | None = None,
    progress: Callable[[int], None] | None = None,
    mesh: Mesh | None = None,
    compiled: Program | None = None,
    checkpoint: Grid | None = None,
    laid_out: Callable[[Layout], None] = lambda layout: None,
) -> Trained:
    """Trains one loss at every learning rate and seed, in one compiled program.

    A seed fixes the first parameters, by jax.random.key(seed), and the order of the windows, by np.random.default_rng(seed), so
    runs of different losses and rates are paired.
    progress is called with the finished steps (of each run) after every block. mesh: of devices (`linear.mesh.make_mesh`):
    its axis runs takes different runs, tokens of a run are split over its axis data, the vocabulary over its axis model.
    compiled: `program` of the same loss, source, model, recipe and mesh: as many runs a call compile no block again.
    checkpoint: where the runs are kept between blocks; runs that it has go on from there, and end as they would have.
    laid_out is told how the runs lie on the machine.
    """
    recipe = recipe or Recipe()
    if not len(learning_rates) or not len(seeds):
        raise LabError("a grid needs at least one learning rate and one seed.")
    if not all(rate > 0 for rate in learning_rates):
        raise LabError(f"learning rates are positive; got {list(learning_rates)}.")
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise LabError(f"seeds are whole numbers from 0 to {2**32 - 1}; got {list(seeds)}.")
    compiled = compiled or program(loss, source, model, recipe, mesh)
    pairs = [(rate, seed) for rate in learning_rates for seed in seeds]
    layout, count = _layout(compiled, len(pairs), mesh), len(pairs)
    laid_out(layout)
    # A call takes `width` runs: the last one again where they do not divide.
    padded = pairs + pairs[-1:] * (-count % layout.width)
    rates = np.asarray([rate for rate, _ in padded], np.float32)
    drawn = [seed for _, seed in padded]
    states = compiled.begin(rates, np.asarray(drawn, np.uint32))
    starts = range(0, recipe.steps, recipe.steps_a_block)
    measured = {name: np.zeros((count, len(starts)), dtype) for name, dtype in MEASURED.items()}
    done, kept = _resumed(checkpoint, compiled.spread, states, measured, count)
    if done:
        states, measured = kept
        if progress:
            progress(min(recipe.steps, done * recipe.steps_a_block))
    states = _Groups(states, layout)

    blocks = enumerate(zip(starts, compiled.places(drawn), strict=False))
    for index, (start, places) in itertools.islice(blocks, done, None):
        results = states.advance(compiled, rates, places, np.int32(start), mesh)
        for name, column in zip(MEASURED, results, strict=True):
            measured[name][:, index] = column[:count]
        if checkpoint:
            everything = lambda: {"states": _everywhere(compiled.spread, states.whole(count)), "measured": measured}
            checkpoint.after(index + 1, index + 1 == len(starts), everything)
        if progress:
            progress(min(recipe.steps, start + recipe.steps_a_block))
    arrays, _, diverged_at = _everywhere(compiled.spread, states.whole(count))
    if mesh is not None:  # what comes next is one device's work, in every process the same
        arrays = jax.tree.map(jnp.asarray, jax.device_get(arrays))
    return Trained(
        rates=np.array([rate for rate, _ in pairs]),
        seeds=np.array([seed for _, seed in pairs]),
        steps=np.minimum(recipe.steps, np.array(starts) + recipe.steps_a_block),
        train_loss=measured["train_loss"],
        validation_nll=measured["validation_nll"],
        smoothing=measured["smoothing"][:, -1],
        diverged_at=np.asarray(diverged_at),
        models=eqx.combine(arrays, compiled.rest),
    )


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

    def advance(self, compiled, rates, places, start, mesh):
        """A block of every run: what was measured [runs], each of `MEASURED`."""
        # On a mesh jit places what the eager slices left elsewhere; a compiled program would refuse it.
        block, measure = compiled.compiled(self.layout.width) if mesh is None else (compiled.block, compiled.measure)

        def one(group):
            runs = self.groups[group]
            states, train_loss = block(rates[runs], self.states[group], places[runs], start)
            results = (train_loss, *measure(states))
            self.states[group] = self._parked(states)
            return jax.tree.map(np.asarray, results)

        with concurrent.futures.ThreadPoolExecutor(self.layout.at_a_time) as pool:
            results = list(pool.map(one, range(len(self.groups))))
        return [np.concatenate(column) for column in zip(*results, strict=True)]

    def whole(self, count):
        """The first `count` runs in one pytree."""
        return jax.tree.map(lambda *leaves: jnp.asarray(self.by.concatenate(leaves)[:count]), *self.states)
