"""The door of probability: how many tokens a loss needs relative to maximum likelihood, by theory and by simulation.

The model is softmax-linear, z = W phi(x), with phi(x) = (x, 1), x standard normal [6] and 16 classes; the truth is such a model
with normal weights. Shared parameters are what tells losses apart: with one free logit vector a context, every strictly
proper loss finds the empirical distribution. Where the loss's own minimiser is the truth, the expected excess KL of a fit to
n tokens is trace(F J^-1 I J^-T) / (2n) + o(1/n), with F the Fisher information of the predictions, J the expected derivative of
the loss's gradient and I the gradient's covariance, all in W (White 1982; Huber 1967); for nll it is rank(F) / (2n). Where the
minimiser is not the truth, what remains with endless tokens is the asymptotic bias. All of it in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.catalogue import hashable, program_of, settled
from xentlab.contract import Loss, link_of, value_and_gradient
from xentlab.information import kl_divergence
from xentlab.metrics import SMOOTHING, mean_and_interval, smooth

if TYPE_CHECKING:
    import pandas as pd

CLASSES, FEATURES = 16, 6
SCALE = 0.7
POINTS = 2**10  # quasi-random features that stand for their law
# A loss whose own minimiser is nearer to the truth than this, in nats, is consistent: float64 and the solver give 1e-10.
CONSISTENT = 1e-6


@dataclasses.dataclass(frozen=True)
class Truth:
    """A softmax-linear source: features [N, F + 1] that stand for their law, and its weights [F + 1, V]."""

    features: np.ndarray
    weights: np.ndarray

    @functools.cached_property
    def law(self) -> np.ndarray:
        """The true probabilities at the features, [N, V]."""
        z = self.features @ self.weights
        p = np.exp(z - z.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)


def make_truth(scale: float = SCALE, seed: int = 0, points: int = POINTS) -> Truth:
    """A source with normal weights of a scale, bias included, and scrambled Sobol points of a normal law as features."""
    from scipy.stats import norm, qmc

    draws = norm.ppf(qmc.Sobol(FEATURES, seed=np.random.default_rng(99)).random(points))
    weights = scale * np.random.default_rng(seed).normal(size=(FEATURES + 1, CLASSES))
    return Truth(np.concatenate([draws, np.ones((points, 1))], axis=1), weights)


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a loss makes of endless tokens, and of many.

    bias: KL in nats from the truth to the loss's minimiser, NaN where the loss has no one minimiser there, or no number;
    tokens_needed: relative to maximum likelihood, NaN where bias is not 0; smoothing: the share of the uniform mixed in, where
    the bias is less with it; excess: what n times the excess KL tends to, in nats; weights: the minimiser [F + 1, V].
    """

    bias: float
    tokens_needed: float
    smoothing: float
    excess: float
    weights: np.ndarray


def efficiency(loss: Loss, truth: Truth) -> Efficiency:
    """A loss's sandwich against maximum likelihood's, or its asymptotic bias, in float64.

    >>> from xentlab import LOSSES
    >>> found = efficiency(LOSSES["nll"], make_truth(points=256))
    >>> print(f"{found.tokens_needed:.6f}, {found.excess:.6f}")  # rank(F) / 2 = 7 * 15 / 2
    1.000000, 52.500000
    """
    with jax.enable_x64(True):
        compiled = _compiled(loss, truth.weights.shape[1])
        weights, _ = _minimise(functools.partial(_expected, compiled, truth), truth.weights, 200, 1e-9)
        weights = _polish(compiled, weights, truth)
        bias, share = _bias(compiled, weights, truth)
        excess = needed = float("nan")
        if bias < CONSISTENT:
            fisher, curvature = _fisher(compiled, weights, truth), _curvature(compiled, weights, truth)
            rank = int(np.linalg.matrix_rank(fisher, hermitian=True, tol=1e-10 * np.abs(fisher).max()))
            # The search began at the truth, and stays there too without slope, or at a maximum or saddle: it has found nothing.
            if not np.isfinite(curvature).all() or not _is_minimum(curvature, rank):
                return Efficiency(float("nan"), needed, share, excess, weights)
            # Directions that change no logit difference have no curvature in most losses, and no Fisher information.
            inverse = np.linalg.pinv(curvature, rcond=1e-9)
            excess = float(np.trace(fisher @ inverse @ _covariance(compiled, weights, truth) @ inverse.T)) / 2
            needed = 2 * excess / rank
        # Rounding alone is below 0; a NaN stays one.
        return Efficiency(float(np.maximum(bias, 0)), needed, share, excess, weights)


def simulate(
    loss: Loss,
    truth: Truth,
    start: np.ndarray,
    sizes: Sequence[int] = (4000, 16_000),
    replicates: int = 16,
    seed: int = 0,
) -> pd.DataFrame:
    """Trains on samples of the source by L-BFGS, and measures the excess KL: the theory's own trial.

    start [F + 1, V]: the weights that every fit begins with, in whose curvature it measures its steps. The theory is of the
    minimum beside the truth, so begin at the loss's own minimiser (`Efficiency.weights`); from zeros, losses that are not
    convex may end elsewhere.

    One row a fit: tokens, replicate, excess_kl in nats (at the truth's features), residual (the gradient's greatest entry
    at the end). The same seed gives every loss the same samples.
    """
    import pandas as pd

    rows, compiled = [], _compiled(loss, truth.weights.shape[1])
    with jax.enable_x64(True):
        weights, law = jnp.asarray(truth.weights), truth.law
        scale = _scale(_curvature(compiled, start, truth))
        for size in sizes:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), size), replicates)
            for replicate, key in enumerate(keys):
                sample = _sample(key, weights, size)
                found, residual = _minimise(
                    lambda weights, sample=sample: compiled.on_sample(weights, *sample), start, 400, 1e-7, scale
                )
                excess = float(_divergence(law, compiled.read(truth.features @ found), 0.0))
                rows.append({"tokens": size, "replicate": replicate, "excess_kl": excess, "residual": residual})
    return pd.DataFrame(rows)


@functools.partial(jax.jit, static_argnums=2)
def _sample(key: Any, weights: Any, size: int) -> tuple[Any, Any]:
    """Features [size, F + 1] and targets [size] that the source draws."""
    first, second = jax.random.split(key)
    x = jnp.concatenate([jax.random.normal(first, (size, FEATURES)), jnp.ones((size, 1))], axis=1)
    return x, jax.random.categorical(second, x @ weights).astype(jnp.int32)


def tokens_needed(trials: pd.DataFrame, reference: pd.DataFrame | float) -> tuple[float, float, float]:
    """The simulated need of tokens relative to a reference's, with its 95% interval by Student's t over the replicates.

    reference: the trials of maximum likelihood on the same samples, so that the replicates pair and what the samples share
    cancels (a ratio of means: Cochran 1977, section 6); or a limit of n times the excess KL that theory gives. NaN where a
    fit calls impossible what can happen.
    """
    mine = _slopes(trials)
    theirs = _slopes(reference) if hasattr(reference, "pivot") else np.full_like(mine, reference)
    if not np.isfinite(mine).all():
        return float("nan"), float("nan"), float("nan")
    ratio = mine.mean() / theirs.mean()
    _, low, high = mean_and_interval((mine - ratio * theirs) / theirs.mean())
    return float(ratio), float(ratio + low), float(ratio + high)


def _slopes(trials: pd.DataFrame) -> np.ndarray:
    """Each replicate's limit of n times the excess KL: the least squares of n KL on 1 and 1/n (KL = a/n + b/n^2)."""
    table = trials.assign(scaled=trials.tokens * trials.excess_kl).pivot(index="replicate", columns="tokens", values="scaled")
    sizes = table.columns.to_numpy(float)
    columns = np.stack([np.ones(len(sizes)), sizes.min() / sizes], axis=1)
    with np.errstate(invalid="ignore"):
        return table.to_numpy() @ (np.linalg.pinv(columns)[0] if len(sizes) > 1 else np.ones(1))


def _polish(compiled: Compiled, weights: np.ndarray, truth: Truth) -> np.ndarray:
    """Newton steps on the field, kept while they help: L-BFGS follows the value, which a stop_gradient sends astray."""
    field = lambda weights: _expected(compiled, truth, weights)[1]
    here = field(weights)
    for _ in range(20):
        if not 1e-9 < _size(here) < np.inf:
            break
        curvature = _curvature(compiled, weights, truth)
        if not np.isfinite(curvature).all():
            break
        step = np.linalg.pinv(curvature, rcond=1e-9) @ here.reshape(-1)
        tries = [weights - scale * step.reshape(weights.shape) for scale in (1.0, 0.3, 0.1)]
        fields = [field(each) for each in tries]
        sizes = [_size(each) for each in fields]
        if not np.nanmin(sizes) < 0.9 * _size(here):
            break
        best = int(np.nanargmin(sizes))
        weights, here = tries[best], fields[best]
    return weights


def _minimise(
    risk: Callable, start: np.ndarray, steps: int, tolerance: float, scale: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """L-BFGS, until the gradient's greatest entry is below the tolerance or nothing helps: the weights, and that entry there.

    risk(weights) -> value, gradient. scale [P, P]: of the coordinates u that the search goes in, weights = start + scale @ u.
    """
    from scipy.optimize import minimize

    scale = np.eye(start.size) if scale is None else scale
    at = lambda u: start + (scale @ u).reshape(start.shape)

    def flat(u):
        value, gradient = risk(at(u))
        return float(value), scale.T @ np.asarray(gradient).reshape(-1)

    options = {"maxcor": 20, "maxiter": steps, "ftol": 0.0, "gtol": tolerance}
    found = minimize(flat, np.zeros(start.size), jac=True, method="L-BFGS-B", options=options)
    best = at(found.x)
    return best, _size(np.asarray(risk(best)[1]))


def _scale(curvature: np.ndarray) -> np.ndarray:
    """Coordinates [P, P] in which a function of that curvature is round: in them a fit takes a fifth of the steps.

    What hardly curves, such as what changes no logit difference, is taken for a thousandth of what curves the most.
    """
    if not np.isfinite(curvature).all():
        return np.eye(len(curvature))
    roots, directions = np.linalg.eigh((curvature + curvature.T) / 2)
    sizes = np.abs(roots)
    return directions / np.sqrt(np.maximum(sizes, max(1e-3 * sizes.max(), 1e-30)))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is compiled of a loss; the rest is NumPy's, as compiling is what this door spends most of its time on.

    every: logits [N, V] -> values [N, V targets], gradients [N, V targets, V]. on_sample: weights [F + 1, V], features
    [N, F + 1], targets [N] -> the mean loss and its gradient. read, read_slope: the link, and its derivative.
    """

    every: Callable
    on_sample: Callable
    read: Callable
    read_slope: Callable


def _compiled(loss: Loss, vocab: int) -> Compiled:
    """What is compiled of a loss, kept while it is the same: one of one's own may close over another value than before."""
    fixed = settled(loss)
    return _kept(hashable(loss), program_of(loss, vocab)) if fixed is None else _kept(fixed, None)


@functools.lru_cache(maxsize=64)
def _kept(loss: Loss, program: str | None) -> Compiled:
    def every(z):
        shape = (len(z), z.shape[-1], z.shape[-1])
        targets = jnp.broadcast_to(jnp.arange(z.shape[-1], dtype=jnp.int32), shape[:2])
        return value_and_gradient(loss, jnp.broadcast_to(z[:, None, :], shape), targets)

    def on_sample(weights, features, targets):
        return jnp.mean(loss(features @ weights, targets))

    return Compiled(jax.jit(every), jax.jit(jax.value_and_grad(on_sample)), *_kept_link(link_of(loss), program))


@functools.lru_cache(maxsize=64)
def _kept_link(link: Callable, program: str | None) -> tuple[Callable, Callable]:
    """By itself: most losses of the catalogue have the same."""
    return jax.jit(lambda z: link(z)), jax.jit(jax.vmap(jax.jacfwd(link)))


@jax.jit
def _divergence(law: Any, predictions: Any, share: Any) -> Any:
    """The mean KL from the law to predictions with that share of the uniform."""
    return jnp.mean(kl_divergence(law, smooth(predictions, share)))


def _bias(compiled: Compiled, weights: np.ndarray, truth: Truth) -> tuple[float, float]:
    """The KL from the truth at the best share of the uniform, and that share."""
    predictions, law = compiled.read(truth.features @ weights), truth.law
    shares = (0.0, *SMOOTHING)  # the law itself is known: no token comes unforeseen
    each = [float(_divergence(law, predictions, share)) for share in shares]
    best = int(np.argmin(each))
    return each[best], shares[best]


def _expected(compiled: Compiled, truth: Truth, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """The expected loss, and its gradient [F + 1, V]."""
    value, field = _under(truth, compiled.every(truth.features @ weights))
    return value.mean(), truth.features.T @ field / len(truth.features)


def _under(truth: Truth, found: Any) -> tuple[np.ndarray, np.ndarray]:
    """Expected values [N] and gradients [N, V] under the law, from those for every target."""
    law, (values, fields) = truth.law, map(np.asarray, found)
    return np.sum(law * values, axis=1), np.matmul(law[:, None], fields)[:, 0]


def _size(field: np.ndarray) -> float:
    return float(np.abs(field).max())


def _curvature(compiled: Compiled, weights: np.ndarray, truth: Truth) -> np.ndarray:
    """J, the mean gradient's derivative by W [P, P]: by central differences, as autodiff would take a stop_gradient for 0."""
    z, step = truth.features @ weights, 1e-5
    mean = lambda z: _under(truth, compiled.every(z))[1]
    slopes = [(mean(z + step * e) - mean(z - step * e)) / (2 * step) for e in np.eye(CLASSES)]
    return _by_weights(np.stack(slopes, axis=-1), truth.features)


def _is_minimum(curvature: np.ndarray, rank: int) -> bool:
    """Whether descent along the field comes back from every nearby point, with at least so many directions curved.

    By the real parts of J's eigenvalues: of a stop_gradient J need not be symmetric, and its symmetric part may turn down
    where descent still ends.
    """
    roots = np.linalg.eigvals(curvature)
    # A 0 that is there many times strays by the root of rounding.
    descends = roots.real.min() > -1e-6 * np.abs(roots).max()
    return bool(descends and np.linalg.matrix_rank(curvature, rtol=1e-9) >= rank)


def _covariance(compiled: Compiled, weights: np.ndarray, truth: Truth) -> np.ndarray:
    """I, the gradient's covariance in W [P, P]."""
    fields = np.asarray(compiled.every(truth.features @ weights)[1])
    return _by_weights(np.einsum("nyu,nyv,ny->nuv", fields, fields, truth.law, optimize=True), truth.features)


def _fisher(compiled: Compiled, weights: np.ndarray, truth: Truth) -> np.ndarray:
    """F, the predictions' Fisher information in W [P, P]."""
    slope = np.asarray(compiled.read_slope(truth.features @ weights))
    return _by_weights(np.einsum("nyu,nyv,ny->nuv", slope, slope, 1 / truth.law, optimize=True), truth.features)


def _by_weights(blocks: np.ndarray, features: np.ndarray) -> np.ndarray:
    """The mean over n of blocks[n, v, u] (x) phi_n phi_n^T, as a matrix over (feature, class): [P, P]."""
    size = features.shape[1] * blocks.shape[-1]
    return np.einsum("nvu,na,nb->avbu", blocks, features, features, optimize=True).reshape(size, size) / len(features)
