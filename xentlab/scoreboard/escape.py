"""The door of optimisation: how long a loss takes to leave a start that is confident and wrong.

Two questions. `escape_time` has two classes and one margin under gradient flow, where nothing can be tuned. `wrong_start`
trains a linear model by gradient descent from an output bias of -20 on the frequent tokens (after Golik et al. 2013, who
found squared error stuck at bad starts), each loss at its own best rate, on a chain's own law, so that no draw plays a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.contract import LabError, Loss, link_of, value_and_gradient
from xentlab.sources import MarkovSource

# In each context of this chain one token is likelier than all others together, so that every calibrated loss, and hinge
# too, prefers it: the accuracy is a goal that all can reach.
CHAIN = MarkovSource(vocab=16, exponent=3.0, seed=1, tokens=10)
FREQUENT = 4
BIAS = -20.0
STEPS = 2000
# A grid in half decades that extends itself by its own width while its best lies at an end, until it is past the limits.
GRID = (0.1, 10.0)
LIMITS = (1e-4, 1e6)
# Then between the best and its neighbours, in thirds, so often: steps go with 1 / rate up to a cliff, and the best lies at it.
# To 4% of a rate, the steps are the loss's and not the grid's: any multiple of a loss has the same.
ROUNDS = 3


def escape_time(loss: Loss, margins: np.ndarray | list[float]) -> np.ndarray:
    """How long gradient flow ds/dt = -dL/ds takes from a margin s = -m to s = 0, two classes at logits (s, 0), target 0.

    The time is the integral of 1 / |dL/ds|, in float64; +inf where the loss does not pull towards the target all the way.
    Raises `LabError` for a margin that is not positive.

    >>> from xentlab import LOSSES
    >>> escape_time(LOSSES["nll"], [2.0, 12.0]).round(3)  # m + 1 - e^-m
    array([ 2.865, 13.   ])
    """
    margins = np.atleast_1d(np.asarray(margins, np.float64))
    if not (margins > 0).all():
        raise LabError(f"margins are positive: how far the start is on the wrong side; got {margins.tolist()}.")

    @jax.jit
    def pull(s):
        z = jnp.stack([s, jnp.zeros_like(s)], axis=-1)
        return -value_and_gradient(loss, z, jnp.zeros(s.shape, jnp.int32))[1][:, 0]

    nodes, weights = np.polynomial.legendre.leggauss(20)
    times = []
    with jax.enable_x64(True):
        for margin in margins:
            edges = np.linspace(-margin, 0, 65)
            half = np.diff(edges) / 2
            points = (edges[:-1] + half)[:, None] + half[:, None] * nodes
            speed = np.asarray(pull(jnp.asarray(points.reshape(-1)))).reshape(points.shape)
            with np.errstate(divide="ignore"):
                times.append(float((half[:, None] * weights / speed).sum()) if (speed > 0).all() else np.inf)
    return np.array(times)


def settled(reached: np.ndarray) -> np.ndarray:
    """The step from which on each run [runs, steps] stays at its goal, counted from 1; inf if it does not, or if it came
    there in the last tenth only, which shows nothing.

    >>> settled(np.array([[False, True, False] + [True] * 17, [False] * 19 + [True]]))
    array([ 4., inf])
    """
    held = np.flip(np.logical_and.accumulate(np.flip(reached, axis=1), axis=1), axis=1)
    shown = held[:, : held.shape[1] - held.shape[1] // 10].any(axis=1)
    return np.where(shown, np.argmax(held, axis=1) + 1.0, np.inf)


@dataclasses.dataclass(frozen=True)
class Escape:
    """steps: until accuracy stays at its goal, or inf; rate: the one it took, NaN if none did; low, high: the rates tried."""

    steps: float
    rate: float
    low: float
    high: float


def wrong_start(loss: Loss, bias: float = BIAS, steps: int = STEPS) -> Escape:
    """Steps of plain gradient descent until 95% of the chain's tokens that a perfect reader would get are got, for good.

    Logits are a table's row for the context plus an output bias; both begin at 0 but for `bias` on the frequent tokens. That
    start is the same in logits, not in probabilities: nll of 2z, read through softmax(2z), begins twice as deep.
    Every rate of a grid is tried, the grid extends itself while its best lies at an end, and then grows finer around the best.
    """
    runs = _descents(loss, bias, steps)
    best_possible = float(CHAIN.stationary @ CHAIN.table.max(axis=1))
    found: dict[float, float] = {}

    def try_rates(halves):
        rates = [round(float(10.0 ** (half / 2)), 12) for half in halves]
        reached = np.asarray(runs(jnp.asarray(rates, jnp.float32))) >= 0.95 * best_possible
        found.update(zip(rates, settled(reached).tolist(), strict=True))

    def best_rate():
        return min(found, key=lambda rate: (found[rate], rate))

    low, high = (round(2 * np.log10(end)) for end in GRID)
    least, most = (round(2 * np.log10(end)) for end in LIMITS)
    try_rates(range(low, high + 1))
    width = high - low + 1  # one shape of grid, compiled once
    while True:
        rates, best = sorted(found), best_rate()
        none = np.isinf(found[best])
        if (none or best == rates[-1]) and high < most:
            try_rates(range(high + 1, high + 1 + width))
            high += width
        elif (none or best == rates[0]) and low > least:
            try_rates(range(low - width, low))
            low -= width
        else:
            break
    if none:
        return Escape(found[best], float("nan"), rates[0], rates[-1])
    between = np.linspace(-1, 1, width + 2)[1:-1]  # the best itself, and two on either side
    for finer in range(ROUNDS):
        try_rates(2 * np.log10(best_rate()) + between / 3**finer)
    return Escape(found[best_rate()], best_rate(), rates[0], rates[-1])


def _descents(loss: Loss, bias: float, steps: int) -> Callable:
    """A compiled function of rates [R] -> the accuracy after each step of gradient descent at each of them, [R, steps]."""
    law, share = jnp.asarray(CHAIN.table, jnp.float32), jnp.asarray(CHAIN.stationary, jnp.float32)
    vocab = CHAIN.vocab
    frequent = np.argsort(-(CHAIN.stationary @ CHAIN.table))[:FREQUENT]
    start = jnp.zeros(vocab, jnp.float32).at[frequent].set(bias)
    targets = jnp.broadcast_to(jnp.arange(vocab, dtype=jnp.int32), (vocab, vocab))
    link = link_of(loss)

    def risk(parameters):
        table, offset = parameters
        z = jnp.broadcast_to((table + offset)[:, None, :], (vocab, vocab, vocab))
        each = jnp.where(law > 0, law * loss(z, targets), 0)
        return share @ jnp.sum(each, axis=-1)

    def accuracy(parameters):
        table, offset = parameters
        scores = link(table + offset)
        best = scores == jnp.max(scores, axis=-1, keepdims=True)
        # What ties is a guess among the tied.
        return share @ (jnp.sum(law * best, axis=-1) / jnp.sum(best, axis=-1))

    def step(rate, parameters):
        gradient = jax.grad(risk)(parameters)
        parameters = jax.tree.map(lambda p, g: p - rate * g, parameters, gradient)
        return parameters, accuracy(parameters)

    def run(rate):
        first = jnp.zeros((vocab, vocab)), start[None, :]
        return jax.lax.scan(lambda parameters, _: step(rate, parameters), first, length=steps)[1]

    return jax.jit(jax.vmap(run))
