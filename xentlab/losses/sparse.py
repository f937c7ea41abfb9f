"""Fenchel-Young losses whose links give exact zeros: sparsemax and 1.5-entmax."""

import jax
import jax.numpy as jnp

from xentlab.contract import Logits, PerToken, Targets, loss
from xentlab.losses.numerics import wide
from xentlab.targets import at_target


def _below_top(logits):
    """z minus its maximum, [..., V], at no less than float32: running sums need the digits."""
    x = wide(logits)
    return x - jnp.max(x, axis=-1, keepdims=True)


GROUPS = 512  # of classes, whose greatest members alone say nearly where the threshold lies


def _threshold(x, excess_and_slope):
    """The root tau of a decreasing convex function of the threshold, by Newton from its left, [..., V] -> [..., 1].

    tau = max - 1 lies at or below the root, and from there every Newton step stays at or below it; so the search ends
    where a step no longer rises. For sparsemax that is Michelot's finite algorithm. Some of the classes alone have their
    root at or below that of all, so a large vocabulary is asked last: the search begins where the greatest of each group of
    classes leave it, and a few sweeps over the vocabulary do where a sort would make log^2 V.
    """
    start = jnp.full_like(x[..., :1], -1)  # the maximum of x is 0
    size = x.shape[-1] // GROUPS
    if size >= 8:
        grouped = x[..., : size * GROUPS].reshape(*x.shape[:-1], size, GROUPS)
        start = _risen(jnp.max(grouped, axis=-2), start, excess_and_slope)
    tau = _risen(x, start, excess_and_slope)
    # Rounding in a long sum may have overshot by a little: one step in either direction takes that back.
    excess, slope = excess_and_slope(jax.nn.relu(x - tau))
    return tau + excess / slope


def _risen(x, start, excess_and_slope):
    """Newton from `start`, [..., 1], until no step rises by more than rounding."""
    least = 8 * jnp.finfo(x.dtype).eps

    def rising(carry):
        _, moved, sweep = carry
        return jnp.any(moved) & (sweep < 64)

    def newton(carry):
        tau, _, sweep = carry
        excess, slope = excess_and_slope(jax.nn.relu(x - tau))
        higher = tau + excess / slope
        return jnp.maximum(tau, higher), higher > tau + least, sweep + 1

    return jax.lax.while_loop(rising, newton, (start, jnp.ones_like(start, bool), 0))[0]


def _linear_excess(above):
    return (
        jnp.sum(above, axis=-1, keepdims=True) - 1,
        jnp.sum(above > 0, axis=-1, keepdims=True, dtype=jnp.int32).astype(above.dtype),
    )


def _square_excess(above):
    return jnp.sum(above**2, axis=-1, keepdims=True) - 1, 2 * jnp.sum(above, axis=-1, keepdims=True)


@jax.custom_jvp
def sparsemax_link(logits: Logits) -> Logits:
    """The Euclidean projection of z onto the simplex, [..., V] -> [..., V]. Martins & Astudillo 2016.

    >>> sparsemax_link(jnp.array([1.0, 0.5, -2.0]))  # minus 1/4, what falls below 0 cut off
    Array([0.75, 0.25, 0.  ], dtype=float32)
    """
    x = _below_top(logits)
    return jax.nn.relu(x - _threshold(x, _linear_excess)).astype(logits.dtype)


@sparsemax_link.defjvp
def _(primals, tangents):
    (logits,), (dz,) = primals, tangents
    p = sparsemax_link(logits)
    support = (p > 0).astype(p.dtype)
    mean = jnp.sum(support * dz, axis=-1, keepdims=True) / jnp.sum(support, axis=-1, keepdims=True)
    return p, support * (dz - mean)


@jax.custom_jvp
def entmax15_link(logits: Logits) -> Logits:
    """1.5-entmax, p = relu(z/2 - tau)^2, [..., V] -> [..., V]. Peters et al. 2019.

    >>> entmax15_link(jnp.array([2.0, 0.0, -9.0]))  # relu(1 - 0)^2, relu(0 - 0)^2
    Array([1., 0., 0.], dtype=float32)
    """
    x = _below_top(logits) / 2
    return (jax.nn.relu(x - _threshold(x, _square_excess)) ** 2).astype(logits.dtype)


@entmax15_link.defjvp
def _(primals, tangents):
    (logits,), (dz,) = primals, tangents
    p = entmax15_link(logits)
    root = jnp.sqrt(p)
    mean = jnp.sum(root * dz, axis=-1, keepdims=True) / jnp.sum(root, axis=-1, keepdims=True)
    return p, root * (dz - mean)


def _conjugate(link, entropy):
    """max_p z.p - entropy(p) by its maximiser `link`, [..., V] -> what lies below the greatest logit, and that logit [...].

    Its derivative is the link, and the second is the link's own. A stop_gradient around the maximiser would have the gradient
    right and the Hessian 0.
    """

    @jax.custom_jvp
    def below(logits, p):
        shifted = _below_top(logits).astype(logits.dtype)
        # z.p from the top down, and without 0 * -inf; the top is added back at the end.
        return jnp.sum(jnp.where(p > 0, p * jnp.where(p > 0, shifted, 0), 0), axis=-1) - entropy(p)

    @below.defjvp
    def _(primals, tangents):
        # At the maximiser the value does not move with p; the slope by the logits is p, which moves with them.
        return below(*primals), jnp.sum(primals[1] * tangents[0], axis=-1)

    def conjugate(logits):
        # The top is a constant of the representation: value = below + top, and the whole slope is booked on `below`.
        return below(logits, link(logits)), jax.lax.stop_gradient(jnp.max(logits, axis=-1))

    return conjugate


_sparsemax_conjugate = _conjugate(sparsemax_link, lambda p: (jnp.sum(p**2, axis=-1) - 1) / 2)
_entmax15_conjugate = _conjugate(entmax15_link, lambda p: (jnp.sum(p * jnp.sqrt(p), axis=-1) - 1) / 0.75)


def _fenchel_young(conjugate, logits, targets):
    below, top = conjugate(logits)
    # z_y and the top are of one size: their difference is exact where the loss is small.
    return below + (top - at_target(logits, targets))


@loss(
    source="Martins & Astudillo 2016, From softmax to sparsemax, arXiv:1602.02068, section 3",
    formula=r"\max_{p \in \Delta} \big(z^\top p - \tfrac12 \lVert p \rVert^2\big) + \tfrac12 - z_y",
    gradient=r"\operatorname{sparsemax}(z) - e",
    link=sparsemax_link,
    link_name="sparsemax(z)",
    proper="link",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
)
def sparsemax(logits: Logits, targets: Targets) -> PerToken:
    """The Fenchel-Young loss of the simplex projection: logits [..., V], targets [...] -> [...]. 0 from a lead of 1 on.

    >>> sparsemax(jnp.array([0.5, 0.0]), jnp.array(0))  # p = (3/4, 1/4): 3/8 - 5/16 + 1/2 - 1/2
    Array(0.0625, dtype=float32)
    """
    return _fenchel_young(_sparsemax_conjugate, logits, targets)


@loss(
    source="Peters et al. 2019, Sparse sequence-to-sequence models, arXiv:1905.05702; Roulet et al. 2025, arXiv:2501.18537",
    formula=r"\max_{p \in \Delta} \big(z^\top p - \tfrac43 (\textstyle\sum_j p_j^{3/2} - 1)\big) - z_y",
    gradient=r"\operatorname{entmax}_{1.5}(z) - e",
    link=entmax15_link,
    link_name="entmax15(z)",
    proper="link",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
)
def entmax15(logits: Logits, targets: Targets) -> PerToken:
    """The Fenchel-Young loss between `nll` and `sparsemax`: logits [..., V], targets [...] -> [...]. 0 from a lead of 2 on.

    >>> round(float(entmax15(jnp.zeros(4), jnp.array(0))), 4)  # p = 1/4 each: 4/3 (1 - 4/8)
    0.6667
    """
    return _fenchel_young(_entmax15_conjugate, logits, targets)
