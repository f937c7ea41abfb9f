"""One run is a compiled scan; a grid of rates and seeds is one compiled program, called a run a core or all runs at once.

What diverges stops alone. On a mesh the devices share each run.
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xentlab.contract import LabError, Loss, link_of
from xentlab.information import weighted_mean
from xentlab.linear import linear_loss
from xentlab.metrics import smoothed_nll
from xentlab.models import checked_model, logits, resolve_model
from xentlab.recipe import Recipe
from xentlab.sources import Source


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
    if not share:
        return tokens
    drawn = np.random.default_rng(0)
    moved = (tokens + drawn.integers(1, max(2, vocab), len(tokens))) % vocab
    return np.where(drawn.random(len(tokens)) < share, moved, tokens).astype(tokens.dtype)


def layout(runs: int) -> tuple[int, int]:
    """How a grid of runs is laid out for the backend: (runs that one call takes, calls at a time).

    A CPU does best with one run a core: a wide batch of small matrix products leaves its cache. On GPU and TPU one wide
    program takes all runs at once.
    """
    if jax.default_backend() == "cpu":
        return 1, min(runs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return runs, 1


@dataclasses.dataclass(frozen=True)
class Program:
    """The training of one loss as compiled functions, for any number of runs R side by side.

    begin(rates [R], seeds [R]) -> states. block(rates [R], states, start) -> states, (train_loss, validation_nll, smoothing)
    [R] each: a block of steps from `start` on, and a measurement; the states given are used up. rest: the model's static part.
    """

    begin: Callable
    block: Callable
    rest: Any


def program(
    loss: Loss, source: Source, model: str | Callable = "mlp", recipe: Recipe | None = None, mesh: Mesh | None = None
) -> Program:
    """Compiles nothing yet; arguments and errors as in `train`."""
    recipe = recipe or Recipe()
    make = resolve_model(model)
    stream = jnp.asarray(source.split("train"))
    answers = jnp.asarray(noisy(source.split("train"), source.vocab, recipe.label_noise))
    windows(source.split("train"), recipe.window)  # long enough?
    held_out = jnp.asarray(windows(source.split("validation"), recipe.window, recipe.validation_tokens))
    example = checked_model(make(source.vocab, jax.random.key(0)), source.vocab)
    _, rest = eqx.partition(example, eqx.is_inexact_array)
    link, spread = link_of(loss), _Spread(mesh, recipe.batch, source.vocab)

    def begin(rate, seed):
        start, data = jax.random.split(jax.random.key(seed))
        arrays = eqx.filter(make(source.vocab, start), eqx.is_inexact_array)
        return arrays, recipe.transformation(rate).init(arrays), data, jnp.int32(-1)

    def objective(arrays, tokens, targets):
        trained = eqx.combine(arrays, rest)
        if recipe.head == "naive":
            return weighted_mean(loss(logits(trained, tokens), targets))[0]
        return linear_loss(trained.hidden(tokens), trained.weight, targets, loss=loss, mesh=mesh)

    def step(rate, state, index):
        arrays, optimizer_state, data, diverged_at = state
        starts = jax.random.randint(
            jax.random.fold_in(data, index), (recipe.batch,), 0, stream.shape[0] - recipe.window, jnp.int32
        )
        cut = lambda whole, starts: jax.vmap(lambda start: jax.lax.dynamic_slice(whole, (start,), (recipe.window,)))(starts)
        tokens, targets = spread.batch(cut(stream, starts)), spread.batch(cut(answers, starts + 1))
        value, gradient = jax.value_and_grad(objective)(arrays, tokens, targets)
        updates, moved_state = recipe.transformation(rate).update(gradient, optimizer_state, arrays)
        moved = optax.apply_updates(arrays, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(moved))
        alive = finite & (diverged_at < 0)
        keep = lambda new, old: jnp.where(alive, new, old)
        arrays, optimizer_state = jax.tree.map(keep, (moved, moved_state), (arrays, optimizer_state))
        return (arrays, optimizer_state, data, jnp.where(finite | (diverged_at >= 0), diverged_at, index)), value

    def measure(arrays):
        def right(window):
            predictions = link(logits(eqx.combine(arrays, rest), window[None, :-1]))
            return jnp.take_along_axis(predictions[0], window[1:, None], axis=-1)[:, 0]

        # As many windows at a time as a step has: a large vocabulary's [all tokens, V] would be what needs the most memory.
        each = smoothed_nll(jax.lax.map(right, held_out, batch_size=min(recipe.batch, len(held_out))), source.vocab)
        return jnp.min(each), jnp.argmin(each).astype(jnp.int32)

    @jax.jit
    def first(rates, seeds):
        return spread.states(jax.vmap(begin)(rates, seeds))

    @functools.partial(jax.jit, donate_argnums=1)
    def block(rates, states, start):
        def advance(rate, state):
            def maybe(state, index):
                # The last block may end early.
                skip = lambda state: (state, jnp.zeros(()))
                return jax.lax.cond(index < recipe.steps, lambda state: step(rate, state, index), skip, state)

            state, values = jax.lax.scan(maybe, state, start + jnp.arange(recipe.steps_a_block, dtype=jnp.int32))
            done = jnp.minimum(recipe.steps - start, recipe.steps_a_block)
            validation, share = measure(state[0])
            broken = state[3] >= 0
            train_loss = jnp.where(broken, jnp.nan, jnp.sum(values) / done.astype(values.dtype))
            return state, (train_loss, jnp.where(broken, jnp.nan, validation), share)

        if rates.shape[0] == 1:  # a vmap of one would still batch every product
            one = advance(*jax.tree.map(lambda leaf: leaf[0], (rates, states)))
            states, measured = jax.tree.map(lambda leaf: leaf[None], one)
        else:
            states, measured = jax.vmap(advance)(rates, states)
        return spread.states(states), measured

    return Program(first, block, rest)


@dataclasses.dataclass(frozen=True)
class _Spread:
    """Where a run lies on a mesh: a batch's windows over the axis data, all that is [..., V] over the axis model."""

    mesh: Mesh | None
    windows: int
    vocab: int

    def __post_init__(self):
        devices = self.mesh.shape.get("data", 1) if self.mesh else 1
        if self.windows % devices:
            raise LabError(f"{devices} devices cannot share a batch of {self.windows} windows evenly; take a multiple.")

    def batch(self, batch):
        return self._constrained(batch, "data")

    def states(self, states):
        """Weight, its moments, and whatever else ends in the vocabulary; the rest is everywhere."""
        if self.mesh is None:
            return states
        place = lambda leaf: (*[None] * (leaf.ndim - 1), "model") if leaf.ndim > 1 and leaf.shape[-1] == self.vocab else ()
        return jax.tree.map(lambda leaf: self._constrained(leaf, *place(leaf)), states)

    def _constrained(self, array, *axes):
        if self.mesh is None:
            return array
        known = [axis if axis in self.mesh.axis_names else None for axis in axes]
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*known)))


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
) -> Trained:
    """Trains one loss at every learning rate and seed, in one compiled program.

    A seed fixes the first parameters and the order of the windows, so runs of different losses and rates are paired.
    progress is called with the finished steps (of each run) after every block. mesh: of devices that share each run, tokens
    over its axis data and the vocabulary over its axis model (`xentlab.linear.mesh.make_mesh`); runs then go one by one.
    compiled: `program` of the same loss, source, model, recipe and mesh: as many runs a call compile no block again.
    """
    recipe = recipe or Recipe()
    if not len(learning_rates) or not len(seeds):
        raise LabError("a grid needs at least one learning rate and one seed.")
    if not all(rate > 0 for rate in learning_rates):
        raise LabError(f"learning rates are positive; got {list(learning_rates)}.")
    compiled = compiled or program(loss, source, model, recipe, mesh)
    pairs = [(rate, seed) for rate in learning_rates for seed in seeds]
    rates = jnp.asarray([rate for rate, _ in pairs], jnp.float32)
    every = compiled.begin(rates, jnp.asarray([seed for _, seed in pairs], jnp.uint32))
    width, at_a_time = layout(len(pairs)) if mesh is None else (1, 1)
    groups = [slice(first, first + width) for first in range(0, len(pairs), width)]
    states = [jax.tree.map(lambda leaf, group=group: leaf[group], every) for group in groups]
    steps, measured = [], []

    def advance_group(place, start):
        states[place], results = compiled.block(rates[groups[place]], states[place], jnp.int32(start))
        return jax.tree.map(np.asarray, results)

    with concurrent.futures.ThreadPoolExecutor(at_a_time) as pool:
        for start in range(0, recipe.steps, recipe.steps_a_block):
            # The first call of all compiles, alone: two threads would each compile the same program.
            ahead = [advance_group(0, start)] if not steps else []
            rest_of = range(len(ahead), len(groups))
            results = [*ahead, *pool.map(advance_group, rest_of, [start] * len(rest_of))]
            measured.append([np.concatenate(column) for column in zip(*results, strict=True)])
            steps.append(min(recipe.steps, start + recipe.steps_a_block))
            if progress:
                progress(steps[-1])
    every = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *states)
    train_loss, validation, share = (np.stack(column, axis=1) for column in zip(*measured, strict=True))
    return Trained(
        rates=np.array([rate for rate, _ in pairs]),
        seeds=np.array([seed for _, seed in pairs]),
        steps=np.array(steps),
        train_loss=train_loss,
        validation_nll=validation,
        smoothing=share[:, -1],
        diverged_at=np.asarray(every[3]),
        models=eqx.combine(every[0], compiled.rest),
    )


def fit_logits(loss: Loss, law: np.ndarray, steps: int = 2000, learning_rate: float = 0.05) -> np.ndarray:
    """What a loss makes of one known distribution: free logits trained by Adam on the expected loss, from 0, in float64.

    loss: any loss. law: probabilities [V]. The rate falls to 0 along a cosine. Returns the logits after 0, 1, ... steps,
    [steps + 1, V].

    >>> from xentlab import resolve
    >>> p = jax.nn.softmax(fit_logits(resolve("nll"), np.array([0.1, 0.4, 0.5]))[-1])
    >>> [round(float(each), 4) for each in p]
    [0.1, 0.4, 0.5]
    """
    targets, optimizer = jnp.arange(len(law)), optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def expected(logits, law):
        return jnp.sum(law * loss(jnp.broadcast_to(logits, (len(law), len(law))), targets))

    @jax.jit
    def fit(law):
        def step(state, _):
            logits, moments = state
            updates, moments = optimizer.update(jax.grad(expected)(logits, law), moments)
            return (optax.apply_updates(logits, updates), moments), logits

        start = jnp.zeros(len(law), law.dtype)
        (last, _), path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        return jnp.concatenate([path, last[None]])

    with jax.enable_x64(True):
        return np.asarray(fit(jnp.asarray(law, jnp.float64)))
