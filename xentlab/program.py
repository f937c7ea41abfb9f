"""One loss's training as compiled functions: a block of steps is a scan, a program takes any number of runs side by side."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from xentlab.contract import FAILURES, LabError, Loss, in_short, link_of, name_of
from xentlab.information import weighted_mean
from xentlab.layout import Spread
from xentlab.linear import linear_loss
from xentlab.metrics import smoothed_nll
from xentlab.models import logits, model_shapes, resolve_model
from xentlab.products import for_training, quickly
from xentlab.recipe import Recipe
from xentlab.sources import Source


def windows(tokens: np.ndarray, window: int, limit: int | None = None) -> np.ndarray:
    """Non-overlapping windows [W, window + 1] spread evenly over a stream, of at most `limit` predicted tokens, but one
    window at least.

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

    begin(rates [R], seeds [R]) -> states. draws(seeds [R]) -> an iterator over blocks: the number of its first step, and where
    in the text the windows of its steps begin, [R, steps, batch]. block(rates [R], states, start, places) -> states, train_loss
    [R]; the states given are used up. measure(states) -> validation_nll, smoothing, [R] each. rest: the model's static part.
    spread: where runs lie on the mesh. built, measures: both and measure as compiled, by the runs of a call.
    """

    begin: Callable
    draws: Callable
    block: Callable
    measure: Callable
    rest: Any
    spread: Spread
    built: dict[int, tuple[jax.stages.Compiled, jax.stages.Compiled]] = dataclasses.field(default_factory=dict)
    measures: dict[int, jax.stages.Compiled] = dataclasses.field(default_factory=dict)

    def _given(self, width: int) -> tuple[Any, ...]:
        """The shapes that block is given; the second's are measure's too."""
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
        rates, places = of(jnp.float32, width), of(jnp.int32, width, *next(self.draws([0]))[1].shape[1:])
        return rates, jax.eval_shape(self.begin, rates, of(jnp.uint32, width)), of(jnp.int32), places

    def compiled(self, width: int) -> tuple[jax.stages.Compiled, jax.stages.Compiled]:
        """block and measure for so many runs a call: compiled once, with XLA's account of their memory."""
        if width not in self.built:
            given = self._given(width)
            block = self.block.lower(*given).compile(for_training())
            if width not in self.measures:
                self.measures[width] = self.measure.lower(given[1]).compile(for_training())
            self.built[width] = block, self.measures[width]
        return self.built[width]

    def digest(self) -> str:
        """A hash of all that a run of it computes, and of what that closes over."""
        one = lambda dtype: jax.ShapeDtypeStruct((1,), dtype)
        given = self._given(1)
        parts = self.begin.lower(one(jnp.float32), one(jnp.uint32)), self.block.lower(*given), self.measure.lower(given[1])
        return hashlib.sha256("".join(each.as_text() for each in parts).encode()).hexdigest()

    def needs(self, width: int) -> tuple[int, int]:
        """Bytes that so many runs stand in, and that a call of them takes besides, on each device."""
        block, measure = (each.memory_analysis() for each in self.compiled(width))
        # States are given and handed back in the same place.
        return block.argument_size_in_bytes, max(block.temp_size_in_bytes, measure.temp_size_in_bytes)


def program(
    loss: Loss, source: Source, model: str | Callable = "mlp", recipe: Recipe | None = None, mesh: Mesh | None = None
) -> Program:
    """Compiles nothing yet; arguments and errors as in `train`."""
    return programs(source, model, recipe, mesh)(loss)


def programs(
    source: Source, model: str | Callable = "mlp", recipe: Recipe | None = None, mesh: Mesh | None = None
) -> Callable[[Loss], Program]:
    """`program` as a function of the loss alone: what is the same for several losses is traced and compiled once."""
    recipe = recipe or Recipe()
    make = resolve_model(model)
    tokens = source.split("train")
    stream = jax.device_put(tokens)  # jnp.asarray would compile a program for it
    # Without noise the same array: the compiled program holds it once.
    answers = jax.device_put(noisy(tokens, source.vocab, recipe.label_noise)) if recipe.label_noise else stream
    windows(tokens, recipe.window)  # long enough?
    held_out = jax.device_put(windows(source.split("validation"), recipe.window, recipe.validation_tokens))
    parameters, rest = _parted(make, source.vocab)
    if recipe.has_own_optimizer:
        recipe.check_optimizer(parameters)
    spread = Spread(mesh, recipe.batch, source.vocab)

    def begin(rate, seed):
        arrays = eqx.filter(make(source.vocab, jax.random.key(seed)), eqx.is_inexact_array)
        return arrays, recipe.transformation(rate).init(arrays), jnp.int32(-1)

    states = jax.eval_shape(begin, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((), jnp.uint32))
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(states)):
        raise LabError("the optimizer keeps a random key, which no checkpoint holds; take one without noise of its own.")

    # By NumPy: a program that draws takes XLA half as long again to compile.
    def draws(seeds):
        of, size = {seed: np.random.default_rng(seed) for seed in seeds}, (recipe.steps_a_block, recipe.batch)
        for start in recipe.starts:
            drawn = {seed: rng.integers(len(tokens) - recipe.window, size=size, dtype=np.int32) for seed, rng in of.items()}
            yield np.int32(start), np.stack([drawn[seed] for seed in seeds])

    # It runs once: compiling it well takes longer than it does.
    @functools.partial(jax.jit, compiler_options=quickly(1))
    def first(rates, seeds):
        return spread.states(jax.vmap(begin)(rates, seeds))

    through = []  # a link, measure through it, and what was compiled of that: a link may have no hash

    def measured(link):
        for known, measure, measures in through:
            if known is link:
                return measure, measures
        validated = _validator(link, recipe, rest, held_out, source.vocab)

        @jax.jit
        def measure(states):
            return spread.everywhere(_mapped(spread, validated, states))

        through.append((link, measure, {}))
        return through[-1][1:]

    def of(loss):
        step = _trainer(loss, recipe, rest, spread)

        @functools.partial(jax.jit, donate_argnums=1)
        def block(rates, states, start, places):
            advance = functools.partial(_advance, step, recipe, stream, answers, start)
            states, train_loss = _mapped(spread, advance, rates, states, places)
            return spread.states(states), spread.everywhere(train_loss)

        measure, measures = measured(link_of(loss))
        return Program(first, draws, block, measure, rest, spread, measures=measures)

    return of


def _advance(step, recipe, stream, answers, start, rate, state, places):
    """A run's state a block on, and the block's mean loss; places: where in the text its windows begin, [steps, batch]."""
    indices = start + jnp.arange(recipe.steps_a_block, dtype=jnp.int32)
    go = lambda state, at: step(rate, state, *at)
    # The last block may end early.
    skip = lambda state, at: (state, jnp.zeros(()))
    maybe = lambda state, at: jax.lax.cond(at[0] < recipe.steps, go, skip, state, at)
    body = maybe if recipe.steps % recipe.steps_a_block else go
    read = places[..., None] + jnp.arange(recipe.window, dtype=jnp.int32)[None, None]
    before = state[0]
    state, values = jax.lax.scan(body, state, (indices, (stream[read], answers[read + 1])))
    done = jnp.minimum(recipe.steps - start, recipe.steps_a_block)
    state = _stopped(*state, before, start + done - 1)
    return state, jnp.where(state[-1] >= 0, jnp.nan, jnp.sum(values) / done.astype(values.dtype))


def _trainer(loss: Loss, recipe: Recipe, rest: Any, spread: Spread) -> Callable:
    """A function (rate, state, number, (tokens, targets)) -> the state a step on, and the loss; rest: as of `Program`."""

    def objective(arrays, tokens, targets):
        trained = eqx.combine(arrays, rest)
        if recipe.head == "naive":
            return weighted_mean(loss(logits(trained, tokens), targets))[0]
        return linear_loss(trained.hidden(tokens), trained.weight, targets, loss=loss, mesh=spread.within)

    def step(rate, state, index, batch):
        arrays, optimizer_state, diverged_at = state
        tokens, targets = map(spread.batch, batch)
        try:
            value, gradient = jax.value_and_grad(objective)(arrays, tokens, targets)
        except LabError:
            raise
        except FAILURES as error:  # of the loss or the model, of so many tokens as nobody has tried it on
            raise LabError(
                f"a step of {name_of(loss)}, {recipe.batch} windows of {recipe.window} tokens, fails: {in_short(error)}. Loss "
                "and model are functions of any number of tokens."
            ) from error
        updates, optimizer_state = recipe.transformation(rate).update(gradient, optimizer_state, arrays)
        diverged_at = jnp.where(jnp.isfinite(value) | (diverged_at >= 0), diverged_at, index)
        return (optax.apply_updates(arrays, updates), optimizer_state, diverged_at), value

    return step


def _stopped(arrays, optimizer_state, diverged_at, before, last):
    """The state after a block, with the parameters from before it where it diverged.

    Once a block, for each step would take two more passes over all that is learned.
    """
    # In float32 at least, for float16's own may be infinite where no parameter is. Complex ones stay so.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32) if leaf.dtype.itemsize < 4 else leaf, arrays)
    sound = jnp.isfinite(optax.tree.norm(wide))
    diverged_at = jnp.where(sound | (diverged_at >= 0), diverged_at, last)
    kept = jax.tree.map(lambda new, old: jnp.where(diverged_at < 0, new, old), arrays, before)
    return kept, optimizer_state, diverged_at


def _validator(link: Callable, recipe: Recipe, rest: Any, held_out: Any, vocab: int) -> Callable:
    """A function of a state -> the validation NLL at the best share of the uniform, and that share's place."""

    def validated(state):
        arrays, _, diverged_at = state

        def right(window):
            predictions = link(logits(eqx.combine(arrays, rest), window[None, :-1]))
            return jnp.take_along_axis(predictions[0], window[1:, None], axis=-1)[:, 0]

        # As many windows at a time as a step has: a large vocabulary's [all tokens, V] would be what needs the most memory.
        each = smoothed_nll(jax.lax.map(right, held_out, batch_size=min(recipe.batch, len(held_out))), vocab)
        return jnp.where(diverged_at >= 0, jnp.nan, jnp.min(each)), jnp.argmin(each).astype(jnp.int32)

    return validated


def _mapped(spread: Spread, each: Callable, *runs: Any) -> Any:
    """A function of one run over all that a call takes."""
    if len(jax.tree.leaves(runs)[0]) > 1:
        return jax.vmap(each, spmd_axis_name=spread.across)(*runs)
    # A vmap of one would still batch every product.
    return jax.tree.map(lambda leaf: leaf[None], each(*jax.tree.map(lambda leaf: leaf[0], runs)))


def _parted(make: Callable, vocab: int) -> tuple[Any, Any]:
    """A model's parameters, by shapes alone, and what of it is none.

    Only one with other arrays is made for these: the compiling of that would take a second. They are no part of a run's state,
    so all seeds have the same: raises `LabError` where two seeds' differ.
    """
    parameter = lambda leaf: hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)
    parameters, rest = eqx.partition(model_shapes(make, vocab), parameter)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(rest)):
        rest, others = (eqx.partition(make(vocab, jax.random.key(seed)), eqx.is_inexact_array)[1] for seed in (0, 1))
        if not eqx.tree_equal(*(eqx.filter(each, eqx.is_array) for each in (rest, others))):
            raise LabError(
                "the model has arrays that are not trained, whole numbers or keys, and they differ from seed to seed. All runs "
                "of a grid have the same ones: make them of a key of their own, jax.random.key(0), and not of the one given."
            )
    return parameters, rest
