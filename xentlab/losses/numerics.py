"""What the losses share so that their values and gradients keep their digits at both ends, p -> 0 and p -> 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from xentlab.contract import LabError, Logits, Setting


def is_first_top(values: Float[Array, "... vocab"]) -> Bool[Array, "... vocab"]:
    """Where each row's greatest value lies, the first of them at a tie, as a mask [..., V]; all False in a row with NaN.

    A maximum and a minimum over places, not an argmax: XLA's CPU compiler makes vector code of those two alone, and the two
    take half of its time.

    >>> is_first_top(jnp.array([1.0, 3.0, 3.0]))
    Array([False,  True, False], dtype=bool)
    """
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, values.ndim - 1)
    tops = values == jax.lax.stop_gradient(jnp.max(values, axis=-1, keepdims=True))
    return places == jnp.min(jnp.where(tops, places, values.shape[-1]), axis=-1, keepdims=True)


def wide(logits: Logits) -> Logits:
    """Logits in float32 where they are narrower: of a sum over 65,536 classes float16 has no number.

    Raises `LabError` for logits that are no floating numbers: a loss has their type, and of integers it would be cut to one.

    >>> wide(jnp.zeros(2, jnp.bfloat16)).dtype, wide(jnp.zeros(2)).dtype
    (dtype('float32'), dtype('float32'))
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise LabError(f"logits are floating numbers; got {logits.dtype}: logits.astype(float) makes them so.")
    return logits.astype(jnp.float32) if logits.dtype.itemsize < 4 else logits


def log_softmax(logits: Logits) -> Logits:
    """log softmax over the last axis, [..., V] -> [..., V], relatively right at certainty too.

    `jax.nn.log_softmax` takes log(1 + s) of the rivals' share s, which is 0 once s < 1e-7 in float32; here it is
    log1p(s), and the greatest logit itself is a constant 0 after the shift, so that the gradient 1 - p keeps its digits.

    >>> print("{:.4e} {:.4f}".format(*log_softmax(jnp.array([30.0, 0.0]))))  # -exp(-30), and -30 less that
    -9.3576e-14 -30.0000
    """
    dtype, logits = jnp.result_type(logits), wide(logits)
    is_top = is_first_top(logits)
    greatest = jnp.sum(jnp.where(is_top, logits, 0), axis=-1, keepdims=True)
    below = jnp.where(is_top, 0, logits - greatest)
    rivals = jnp.sum(jnp.where(is_top, 0, jnp.exp(below)), axis=-1, keepdims=True)
    return (below - jnp.log1p(rivals)).astype(dtype)


def softmax(logits: Logits) -> Logits:
    """exp(log_softmax): probabilities [..., V]."""
    return jnp.exp(log_softmax(wide(logits))).astype(jnp.result_type(logits))


@jax.custom_jvp
def one_minus_exp(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 - exp(x), relatively right for small x, and so is its derivative for great -x.

    `-expm1` has the value right, but JAX's derivative of expm1 is ans + 1, which has lost every digit by exp(x) = 1e-16.

    >>> float(jax.grad(one_minus_exp)(jnp.array(-40.0))) == -float(jnp.exp(-40.0))
    True
    """
    return -jnp.expm1(x)


@one_minus_exp.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return one_minus_exp(x), -jnp.exp(x) * dx


def power(log_p: Float[Array, "..."], exponent: Setting) -> Float[Array, "..."]:
    """p^exponent from log p [...], for an exponent above 0: 0 at p = 0, where its derivatives are 0 too.

    >>> power(jnp.log(jnp.array([0.0, 0.25])), 0.5)
    Array([0. , 0.5], dtype=float32)
    """
    absent = log_p == -jnp.inf
    return jnp.where(absent, 0, jnp.exp(exponent * jnp.where(absent, 0, log_p)))


def one_minus_power(log_p: Float[Array, "..."], exponent: Setting) -> Float[Array, "..."]:
    """1 - p^exponent from log p [...], for an exponent above 0, relatively right at both ends, as are its derivatives.

    >>> one_minus_power(jnp.log(jnp.array([0.0, 0.25])), 0.5)
    Array([1. , 0.5], dtype=float32)
    """
    absent = log_p == -jnp.inf
    return jnp.where(absent, 1, one_minus_exp(exponent * jnp.where(absent, 0, log_p)))


def p_log_p(log_p: Float[Array, "..."]) -> Float[Array, "..."]:
    """p log p from log p [...], 0 at p = 0.

    >>> p_log_p(jnp.array([-jnp.inf, 0.0]))
    Array([0., 0.], dtype=float32)
    """
    return jnp.exp(log_p) * jnp.where(log_p == -jnp.inf, 0, log_p)


def log_p_target(rivals: Float[Array, "..."], target: Float[Array, "..."]) -> Float[Array, "..."]:
    """log p_y from the logsumexp of the rivals' logits and the target's, [...], [...] -> [...]; right at certainty too.

    >>> print(f"{log_p_target(jnp.array(0.0), jnp.array(30.0)):.4e}")  # -exp(-30)
    -9.3576e-14
    """
    return -jax.nn.softplus(rivals - target)


def log_p_and_entropy(
    rivals: Float[Array, "..."], target: Float[Array, "..."], entropy: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """log p_y, and the prediction's entropy from the rivals' own besides: that of "target or not" and, where not, theirs.

    >>> print("{:.4f} {:.4f}".format(*log_p_and_entropy(jnp.log(3.0), jnp.array(0.0), jnp.log(3.0))))  # log 1/4, log 4
    -1.3863 1.3863
    """
    log_p, log_miss = log_p_target(rivals, target), log_p_target(target, rivals)
    missed = one_minus_exp(log_p)
    binary = -p_log_p(log_p) - missed * jnp.where(missed > 0, log_miss, 0)
    return log_p, binary + missed * entropy


def log_hit_and_miss(logits: Logits) -> tuple[Logits, Logits]:
    """log softmax and log(1 - softmax), [..., V] -> two [..., V], without taking 1 - p where p is near 1.

    For the class with the greatest logit 1 - p is the sum of the rivals' probabilities; every other p is at most 1/2.

    >>> log_p, log_miss = log_hit_and_miss(jnp.array([50.0, 0.0]))
    >>> print("{:.4f} {:.4e}".format(*log_miss))  # -50, and -exp(-50)
    -50.0000 -1.9287e-22
    """
    dtype, logits = jnp.result_type(logits), wide(logits)
    is_top = is_first_top(logits)
    greatest = jnp.sum(jnp.where(is_top, logits, 0), axis=-1, keepdims=True)
    rivals = jnp.where(is_top, -jnp.inf, logits - greatest)
    second = jax.lax.stop_gradient(jnp.max(rivals, axis=-1, keepdims=True))
    # A safe stand-in where every rival is at -inf: the logarithm of no mass has a NaN gradient even where it is unused.
    empty = second == -jnp.inf
    second = jnp.where(empty, 0, second)
    each = jnp.exp(rivals - second)
    total = jnp.sum(each, axis=-1, keepdims=True)
    log_rivals = jnp.where(empty, -jnp.inf, second + jnp.log(jnp.where(empty, 1, total)))
    log_mass = jax.nn.softplus(log_rivals)
    log_p = jnp.where(is_top, 0, rivals) - log_mass
    p = each * jnp.exp(second - log_mass)
    return log_p.astype(dtype), jnp.where(is_top, log_rivals - log_mass, jnp.log1p(-p)).astype(dtype)
