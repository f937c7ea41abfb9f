"""Entropy, cross entropy, divergence, perplexity, and the one mean that the lab takes. In nats unless the name says bits.

Distributions are arrays [..., V] of probabilities. 0 log 0 is 0; mass on what the other calls impossible costs +inf.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Real

from xentlab.contract import AnyArray, LabError
from xentlab.losses.numerics import log_softmax
from xentlab.products import accumulator
from xentlab.targets import at_target

Distribution = Float[AnyArray, "*batch vocab"]
PerDistribution = Float[Array, "*batch"]
Numbers = Real[AnyArray, "..."] | Bool[AnyArray, "..."]


def self_information(p: Float[Array, "..."]) -> Float[Array, "..."]:
    """-log p of each probability, in nats; +inf at 0. Shannon 1948.

    >>> self_information(jnp.array([1.0, 0.5]))
    Array([0.       , 0.6931472], dtype=float32)
    """
    return 0 - jnp.log(p)  # no -0.0 at p = 1


def cross_entropy(p: Distribution, q: Distribution) -> PerDistribution:
    """H(P, Q) = -sum P log Q in nats, [..., V], [..., V] -> [...]: the mean length of P's news in Q's code.

    +inf where P has mass on what Q calls impossible. Raises `LabError` where the shapes differ. Shannon 1948.

    >>> float(cross_entropy(jnp.array([0.5, 0.5]), jnp.array([1.0, 0.0])))
    inf
    """
    p, q = _same_shape(p, q)
    # Where P has no mass Q's zeros do not count; elsewhere a share of 0 has its derivative, -log Q.
    return jnp.sum(p * -jnp.log(jnp.where((p > 0) | (q > 0), q, 1)), axis=-1)


def entropy(p: Distribution) -> PerDistribution:
    """H(P) = -sum P log P in nats, [..., V] -> [...]. Shannon 1948.

    >>> print(f"{entropy(jnp.array([0.1, 0.4, 0.5])):.5f}")  # 1.36096 bits
    0.94335
    """
    return cross_entropy(p, p)


def kl_divergence(p: Distribution, q: Distribution) -> PerDistribution:
    """KL(P || Q) = sum P log(P / Q) in nats, [..., V], [..., V] -> [...]; +inf on a support mismatch.

    NaN for what is itself NaN alone. Raises `LabError` where the shapes differ. Kullback & Leibler 1951.

    >>> kl_divergence(jnp.array([1.0, 0.0]), jnp.array([0.5, 0.5])) / jnp.log(2.0)
    Array(1., dtype=float32)
    """
    p, q = _same_shape(p, q)
    present = ~(p <= 0)  # a share that is NaN is none that is absent
    ratio = jnp.log(jnp.where(present, p, 1)) - jnp.log(jnp.where(present, q, 1))
    return jnp.sum(jnp.where(present, p * ratio, 0), axis=-1)


def bits(nats):
    """Nats as bits: divided by log 2.

    >>> bits(math.log(8))
    3.0
    """
    return nats / math.log(2)


def perplexity(mean_nll):
    """exp of a mean negative log likelihood in nats: the size of the uniform choice that is as hard.

    >>> round(float(perplexity(math.log(10))), 4)
    10.0
    """
    return jnp.exp(mean_nll)


def sequence_log_prob(
    logits: Float[Array, "*batch time vocab"],
    tokens: Integer[Array, "*batch time"],
    mask: Float[Array, "*batch time"] | None = None,
) -> PerDistribution:
    """log P(tokens) = sum_i log p(token_i | what came before), in nats: logits [..., T, V], tokens [..., T] -> [...].

    logits[..., i, :] is the prediction *of* tokens[..., i]. mask: 1 where a token counts, 0 where it does not. A sum of
    logarithms: a hundred tokens at 0.1 are -230.26, where their product is 0 in float32.

    >>> sequence_log_prob(jnp.zeros((2, 4)), jnp.array([3, 0])) / jnp.log(2.0)  # 1/4 * 1/4
    Array(-4., dtype=float32)
    """
    if mask is None:
        return jnp.sum(at_target(log_softmax(logits), tokens), axis=-1, dtype=_wide(logits))
    # Both wheres: the inner one keeps what is no number out of the gradient as well.
    each = at_target(log_softmax(jnp.where(mask[..., None] == 0, 0, logits)), tokens)
    return jnp.sum(jnp.where(mask == 0, 0, each * mask), axis=-1, dtype=_wide(logits))


def weighted_mean(values: Numbers, weights: Numbers | None = None) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The mean of values [...] under weights [...], and the sum of the weights: (mean, weight), two scalars; sums in float32.

    A value of weight 0 is out, even if it is NaN or infinite, and its weight has no gradient. Where every weight is 0 the mean
    is 0 and so is its gradient: a batch with nothing in it teaches nothing. Means of parts combine by their weights, never as a
    mean of means: (m1 w1 + m2 w2) / (w1 + w2). Whole numbers and masks are taken as floating ones, here and below. Raises
    `LabError` where the shapes differ.

    >>> weighted_mean(jnp.array([1.0, 5.0, jnp.nan]), jnp.array([3.0, 1.0, 0.0]))
    (Array(2., dtype=float32), Array(4., dtype=float32))
    """
    values = _floating(values)
    weights = jnp.ones_like(values) if weights is None else _floating(weights)
    if weights.shape != values.shape:
        raise LabError(f"weighted_mean needs one weight a value: values are {values.shape}, weights {weights.shape}.")
    mean = weighted_sum(values, weights) / divisor(weights).astype(_wide(values))
    return mean.astype(jnp.result_type(values)), _counted(weights)


def weighted_sum(values: Numbers, weights: Numbers) -> Float[Array, ""]:
    """The sum of weights times values, both [...]: a value of weight 0 is out, as in `weighted_mean`.

    >>> weighted_sum(jnp.array([1.0, 5.0, jnp.nan]), jnp.array([1.0, -1.0, 0.0]))
    Array(-4., dtype=float32)
    """
    values, weights = _floating(values), _floating(weights)
    counts, dtype = weights != 0, _wide(values)
    # Both wheres: the inner one keeps a NaN of weight 0 out of the gradient as well. Of 300 * 300 float16 has no number.
    each = weights.astype(dtype) * jnp.where(counts, values, 0).astype(dtype)
    return jnp.sum(jnp.where(counts, each, 0))


def divisor(weights: Numbers) -> Float[Array, ""]:
    """What a `weighted_mean` divides by: the sum of the weights [...], or 1 where every weight is 0.

    Weights that cancel have a mean without bounds, and are not a batch with nothing in it. One that is 0 has no gradient.

    >>> jax.value_and_grad(divisor)(jnp.array([2.0, 0.0]))
    (Array(2., dtype=float32), Array([1., 0.], dtype=float32))
    """
    weights = _floating(weights)
    return jnp.where(jnp.any(weights != 0), _counted(weights), 1)


def _counted(weights):
    return jnp.sum(jnp.where(weights != 0, weights, 0), dtype=_wide(weights))


def _wide(summed):
    """The type that sums are made in: of 8,192 tens float16 has none."""
    return accumulator(jnp.result_type(summed))


def _floating(numbers):
    """Numbers as floating ones: 300 counts of a byte are no byte, and no mean of whole numbers is one."""
    if not isinstance(numbers, jax.Array) and (numbers := np.asarray(numbers)).dtype.kind in "iub":
        numbers = numbers.astype(np.float64)  # by NumPy, for of 2^40 JAX makes an int32 that is 0
    numbers = jnp.asarray(numbers)
    if jnp.issubdtype(numbers.dtype, jnp.floating):
        return numbers
    return numbers.astype(jnp.float64 if numbers.dtype.itemsize == 8 else jnp.float32)


def _same_shape(p: AnyArray, q: AnyArray) -> tuple[jax.Array, jax.Array]:
    """Both as JAX has them: NumPy would hold a float64 share to be more than the 0 that float32 makes of it."""
    p, q = jnp.asarray(p), jnp.asarray(q)
    if p.shape != q.shape:
        raise LabError(f"two distributions over one vocabulary have one shape; got {p.shape} and {q.shape}.")
    return p, q
