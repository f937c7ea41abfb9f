"""Square losses, and their relatives among the proper scores: on probabilities, on their direction, on logits."""

import jax
import jax.numpy as jnp

from xentlab.contract import Logits, PerToken, Setting, Targets, check_setting, loss
from xentlab.losses.numerics import log_p_target, log_softmax, one_minus_power, power, softmax, wide
from xentlab.targets import at_target, off_target


def _brier_stream(rivals, rivals_2, target):
    return jax.nn.sigmoid(rivals - target) ** 2 + jnp.exp(rivals_2 - 2 * jnp.logaddexp(rivals, target))


def _spherical_stream(rivals, rivals_2, target):
    lse = jnp.logaddexp(rivals, target)
    p_target, others = jnp.exp(target - lse), jnp.exp(rivals_2 - 2 * lse)
    norm = jnp.sqrt(p_target**2 + others)
    return others / (norm * (norm + p_target))


def _tsallis_stream(rivals, rivals_alpha, target, *, alpha):
    others = jnp.exp(rivals_alpha - alpha * jnp.logaddexp(rivals, target))
    return _tsallis(log_p_target(rivals, target), jax.nn.sigmoid(rivals - target), others, alpha)


def _tsallis(log_p, missed, others, alpha):
    """From log p_y, 1 - p_y and the rivals' sum of p^alpha: by their differences from 1, for at certainty those of 1 cancel."""
    lost = one_minus_power(log_p, alpha - 1)
    return lost - (alpha - 1) * missed * (1 - lost) + (alpha - 1) * others


def _square_stream(squares, target, *, k, M):
    return k * (target - M) ** 2 + squares


@loss(
    source="Brier 1950, Verification of forecasts expressed in terms of probability, Monthly Weather Review 78",
    formula=r"\sum_j (p_j - e_j)^2",
    gradient=r"2 p \circ (r - p^\top r),\quad r = p - e",
    proper="softmax",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=False,
    low_p_even=0.0,
    low_p_one=0.0,
    stream=_brier_stream,
)
def brier(logits: Logits, targets: Targets) -> PerToken:
    """Square loss on probabilities, between 0 and 2: logits [..., V], targets [...] -> [...].

    >>> brier(jnp.zeros(2), jnp.array(0))  # (1/2)^2 + (1/2)^2
    Array(0.5, dtype=float32)
    """
    rivals = off_target(softmax(wide(logits)), targets)
    # 1 - p_y is the rivals' sum: nothing cancels at certainty.
    return (jnp.sum(rivals, axis=-1) ** 2 + jnp.sum(rivals**2, axis=-1)).astype(jnp.result_type(logits))


@loss(
    source="Good 1971; for language models Shao et al. 2024, arXiv:2405.18906",
    formula=r"1 - p_y / \lVert p \rVert",
    gradient=r"\frac{p_y}{\lVert p \rVert}\Big(\frac{p \circ p}{\lVert p \rVert^2} - e\Big)",
    proper="softmax",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=False,
    low_p_even=0.0,
    low_p_one=0.0,
    stream=_spherical_stream,
)
def spherical(logits: Logits, targets: Targets) -> PerToken:
    """One minus the cosine between p and the target's axis: logits [..., V], targets [...] -> [...], in [0, 1].

    >>> spherical(jnp.zeros(4), jnp.array(0))  # 1 - (1/4) / (1/2)
    Array(0.5, dtype=float32)
    """
    p = softmax(wide(logits))
    p_target = at_target(p, targets)
    rivals = jnp.sum(off_target(p, targets) ** 2, axis=-1)
    norm = jnp.sqrt(p_target**2 + rivals)
    # (norm - p_y) / norm with the difference written as rivals / (norm + p_y): nothing cancels at certainty.
    return (rivals / (norm * (norm + p_target))).astype(jnp.result_type(logits))


@loss(
    source="Gneiting & Raftery 2007, Strictly proper scoring rules, JASA 102, section 4 (power scores)",
    formula=r"1 - \alpha p_y^{\alpha - 1} + (\alpha - 1) \sum_j p_j^\alpha",
    gradient=r"\alpha(\alpha - 1)\big(p^\alpha - p \textstyle\sum_j p_j^\alpha - p_y^{\alpha - 1} (e - p)\big)",
    proper="softmax",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=False,
    low_p_even=0.0,
    low_p_one=0.0,
    settings=({}, {"alpha": 3.0}, {"alpha": 1.1}),
    stream=_tsallis_stream,
    note="alpha = 2 is brier.",
)
def tsallis(logits: Logits, targets: Targets, *, alpha: Setting = 1.5) -> PerToken:
    """The power score, shifted to 0 at certainty: logits [..., V], targets [...] -> [...], in [0, alpha].

    alpha: above 1. The gradient at low p vanishes like p^(alpha - 1), and from alpha = 2 on like p.

    >>> float(tsallis(jnp.zeros(4), jnp.array(0)))  # 1 - 1.5 * 1/2 + 0.5 * 4 * 1/8
    0.5
    """
    check_setting(
        alpha, lambda alpha: alpha > 1, f"tsallis needs alpha above 1; got {alpha}. At 1 it is constant; use nll, its limit."
    )
    log_p = log_softmax(wide(logits))
    missed, others = (jnp.sum(off_target(p, targets), axis=-1) for p in (jnp.exp(log_p), power(log_p, alpha)))
    return _tsallis(at_target(log_p, targets), missed, others, alpha).astype(jnp.result_type(logits))


# The least share that a logit outside the square loss's range is read as. The loss does not say what a logit at or
# below 0 means; a metric has to.
SQUARE_FLOOR = 1e-6


def _square_link(logits, *, k=1.0, M=1.0):
    # The expected loss is least at z = k M P / (1 - P + k P); this is its inverse. The range is (0, M].
    z = jnp.clip(logits, SQUARE_FLOOR * M, M)
    shares = z / (k * M - (k - 1) * z)
    return shares / jnp.sum(shares, axis=-1, keepdims=True)


def _square_one(vocab, *, k=1.0, M=1.0):
    return 2.0 * k * M


@loss(
    source="Hui & Belkin 2021, Evaluation of neural architectures trained with square loss, arXiv:2006.07322, eq. 1",
    formula=r"k (z_y - M)^2 + \sum_{j \ne y} z_j^2",
    gradient=r"2(z - e) \text{ at } k = M = 1",
    link=_square_link,
    link_name="z / (kM - (k - 1) z) of z clipped to [1e-6 M, M], normalised (at k = M = 1: z itself)",
    proper="link",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=False,
    local=False,
    low_p_even=float("inf"),
    low_p_one=_square_one,
    infinite=("-inf rival",),
    settings=({}, {"k": 5.0, "M": 3.0}),
    stream=_square_stream,
)
def mse_logits(logits: Logits, targets: Targets, *, k: Setting = 1.0, M: Setting = 1.0) -> PerToken:
    """Square loss on logits, to M at the target (weight k) and 0 elsewhere: logits [..., V], targets [...] -> [...].

    Infinite where a logit is -inf. Here softmax(z) is not what is learnt: the logits themselves tend to P.

    >>> mse_logits(jnp.array([3.0, 2.0]), jnp.array(0))  # (3 - 1)^2 + 2^2
    Array(8., dtype=float32)
    """
    for name, value in (("k", k), ("M", M)):
        check_setting(value, lambda value: value > 0, f"mse_logits needs {name} above 0; got {value}.")
    z = wide(logits)
    rivals = jnp.sum(off_target(z, targets) ** 2, axis=-1)
    return (k * (at_target(z, targets) - M) ** 2 + rivals).astype(jnp.result_type(logits))
