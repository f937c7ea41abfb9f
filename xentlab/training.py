"""One run is a compiled scan; a grid of rates and seeds is one compiled program, called a run a core or all runs at once.

What diverges stops alone.
"""

import concurrent.futures
import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from xentlab.catalogue import near_names, parse_call
from xentlab.contract import LabError, Loss, link_of
from xentlab.information import weighted_mean
from xentlab.metrics import smoothed_nll
from xentlab.models import checked_model, logits, resolve_model
from xentlab.sources import Source

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
    "lion": optax.lion,
}


def _constant(steps: int) -> optax.Schedule:
    return optax.constant_schedule(1.0)


def _linear(steps: int, *, warmup: float = 0.05) -> optax.Schedule:
    up = max(1, round(warmup * steps))
    return optax.join_schedules([optax.linear_schedule(0, 1, up), optax.linear_schedule(1, 0, max(1, steps - up))], [up])


def _cosine(steps: int, *, warmup: float = 0.05, end: float = 0.05) -> optax.Schedule:
    up = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0, 1, up, max(up + 1, steps), end)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is trained; every loss of a race gets the same.

    steps; batch: windows a step; window: predicted tokens a window; optimizer: one of `OPTIMIZERS` with its options,
    "adamw(weight_decay=0.1)", or a function learning_rate -> optax transformation; schedule: one of `SCHEDULES` with its
    options, scaled by the rate; clip: greatest length of the whole gradient, or None; blocks: how often it is measured.
    """

    steps: int = 400
    batch: int = 16
    window: int = 32
    optimizer: str | Callable[[Any], optax.GradientTransformation] = "adamw"
    schedule: str = "cosine"
    clip: float | None = None
    blocks: int = 20
    validation_tokens: int = 4096

    def __post_init__(self):
        for field in ("steps", "batch", "window", "blocks", "validation_tokens"):
            if getattr(self, field) < 1:
                raise LabError(f"{field} must be at least 1; got {getattr(self, field)}.")
        if self.clip is not None and not self.clip > 0:
            raise LabError(f"clip is a positive length, or none; got {self.clip}.")
        self.transformation(0.1)

    @property
    def steps_a_block(self) -> int:
        """How many steps lie between two measurements."""
        return -(-self.steps // self.blocks)

    def transformation(self, rate: Any) -> optax.GradientTransformation:
        """The optax transformation at one learning rate, which may be traced."""
        shape = _from_table(self.schedule, "schedule", SCHEDULES, skip=1)(self.steps)
        make = self.optimizer if callable(self.optimizer) else _from_table(self.optimizer, "optimizer", OPTIMIZERS, skip=1)
        optimizer = make(lambda step: rate * shape(step))
        return optimizer if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), optimizer)


def _from_table(text: str, what: str, table: dict[str, Callable], skip: int) -> Callable:
    name, options = parse_call(text, what)
    if name not in table:
        raise LabError(f"no {what} named {name!r}; {near_names(name, table)}")
    known = list(inspect.signature(table[name]).parameters)[skip:]
    for key in options:
        if key not in known:
            raise LabError(f"{name} has no option {key!r}; its options: {', '.join(known) or 'none'}.")
    return functools.partial(table[name], **options)


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


def layout(runs: int) -> tuple[int, int]:
    """How a grid of runs is laid out for the backend: (runs that one call takes, calls at a time).

    A CPU does best with one run a core: a wide batch of small matrix products leaves its cache. On GPU and TPU one wide
    program takes all runs at once.
    """
    if jax.default_backend() == "cpu":
        return 1, min(runs, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return runs, 1


def train(
    loss: Loss,
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = (0.01,),
    seeds: Sequence[int] = (0,),
    recipe: Recipe | None = None,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Trains one loss at every learning rate and seed, in one compiled program.

    A seed fixes the first parameters and the order of the windows, so runs of different losses and rates are paired.
    progress is called with the finished steps (of each run) after every block.
    """
    recipe = recipe or Recipe()
    if not len(learning_rates) or not len(seeds):
        raise LabError("a grid needs at least one learning rate and one seed.")
    if not all(rate > 0 for rate in learning_rates):
        raise LabError(f"learning rates are positive; got {list(learning_rates)}.")
    make = resolve_model(model)
    stream = jnp.asarray(source.split("train"))
    windows(source.split("train"), recipe.window)  # long enough?
    held_out = jnp.asarray(windows(source.split("validation"), recipe.window, recipe.validation_tokens))
    example = checked_model(make(source.vocab, jax.random.key(0)), source.vocab)
    _, rest = eqx.partition(example, eqx.is_inexact_array)
    link = link_of(loss)

    def begin(rate, seed):
        start, data = jax.random.split(jax.random.key(seed))
        arrays = eqx.filter(make(source.vocab, start), eqx.is_inexact_array)
        return arrays, recipe.transformation(rate).init(arrays), data, jnp.int32(-1)

    def objective(arrays, batch):
        predicted = logits(eqx.combine(arrays, rest), batch[:, :-1])
        return weighted_mean(loss(predicted, batch[:, 1:]))[0]

    def step(rate, state, index):
        arrays, optimizer_state, data, diverged_at = state
        starts = jax.random.randint(
            jax.random.fold_in(data, index), (recipe.batch,), 0, stream.shape[0] - recipe.window, jnp.int32
        )
        batch = jax.vmap(lambda start: jax.lax.dynamic_slice(stream, (start,), (recipe.window + 1,)))(starts)
        value, gradient = jax.value_and_grad(objective)(arrays, batch)
        updates, moved_state = recipe.transformation(rate).update(gradient, optimizer_state, arrays)
        moved = optax.apply_updates(arrays, updates)
        finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(moved))
        alive = finite & (diverged_at < 0)
        keep = lambda new, old: jnp.where(alive, new, old)
        arrays, optimizer_state = jax.tree.map(keep, (moved, moved_state), (arrays, optimizer_state))
        return (arrays, optimizer_state, data, jnp.where(finite | (diverged_at >= 0), diverged_at, index)), value

    def measure(arrays):
        predictions = link(logits(eqx.combine(arrays, rest), held_out[:, :-1]))
        right = jnp.take_along_axis(predictions, held_out[:, 1:, None], axis=-1)[..., 0]
        each = smoothed_nll(right, source.vocab)
        return jnp.min(each), jnp.argmin(each).astype(jnp.int32)

    @jax.jit
    def first(rates, seeds):
        return jax.vmap(begin)(rates, seeds)

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
            return jax.tree.map(lambda leaf: leaf[None], one)
        return jax.vmap(advance)(rates, states)

    pairs = [(rate, seed) for rate in learning_rates for seed in seeds]
    rates = jnp.asarray([rate for rate, _ in pairs], jnp.float32)
    every = first(rates, jnp.asarray([seed for _, seed in pairs], jnp.uint32))
    width, at_a_time = layout(len(pairs))
    groups = [slice(first, first + width) for first in range(0, len(pairs), width)]
    states = [jax.tree.map(lambda leaf, group=group: leaf[group], every) for group in groups]
    steps, measured = [], []

    def advance_group(place, start):
        states[place], results = block(rates[groups[place]], states[place], jnp.int32(start))
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
        models=eqx.combine(every[0], rest),
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
