"""Losses that score a probability by its logarithm: cross entropy under its names, and sums of binary log scores."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from xentlab.contract import AnyArray, LabError, Logits, PerToken, Targets, is_known, loss
from xentlab.losses.numerics import log_hit_and_miss, log_p_target, log_softmax, wide
from xentlab.targets import at_target, is_at_target, off_target


@loss(
    source="Good 1952, Rational Decisions, JRSS B 14; Bridle 1990 for the softmax",
    formula=r"-\log p_y = \operatorname{lse}(z) - z_y",
    gradient=r"p - e",
    proper="softmax",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=True,
    low_p_even=1.0,
    low_p_one=1.0,
    stream=lambda rivals, target: -log_p_target(rivals, target),
)
def nll(logits: Logits, targets: Targets) -> PerToken:
    """Negative log likelihood, which is cross entropy to a one-hot target, in nats: logits [..., V], targets [...] -> [...].

    >>> nll(jnp.log(jnp.array([0.5, 0.25, 0.25])), jnp.array(1))  # log 4
    Array(1.3862944, dtype=float32)
    """
    return -at_target(log_softmax(logits), targets)


def cross_entropy(logits: Logits, target_distribution: Float[AnyArray, "..."]) -> PerToken:
    """Cross entropy -sum_j t_j log p_j to a whole distribution, in nats: logits [..., V], t [..., V] -> [...].

    Equal to `nll` where t is one-hot. The gradient is p sum(t) - t. A class with t = 0 costs nothing, also at a logit
    of -inf; a class with t > 0 at a logit of -inf costs infinity. Raises `LabError` where the shapes differ.
    Shannon 1948; with the softmax, Bridle 1990.

    >>> cross_entropy(jnp.zeros(4), jnp.array([0.1, 0.4, 0.5, 0.0]))  # log 4: the model is uniform
    Array(1.3862944, dtype=float32)
    """
    if logits.shape != target_distribution.shape:
        raise LabError(
            f"cross_entropy takes one probability a class: logits are {logits.shape}, the target distribution "
            f"{target_distribution.shape}. For class indices use nll."
        )
    log_p = log_softmax(logits)
    # What is not asked for costs nothing, where it is impossible too; elsewhere a share of 0 has its derivative.
    counts = (target_distribution != 0) | (log_p > -jnp.inf)
    return -jnp.sum(target_distribution * jnp.where(counts, log_p, 0), axis=-1)


def zipf_prior(vocab: int, dtype=jnp.float32) -> Float[Array, " vocab"]:
    """The prior pi_j in proportion to 1 / (j + 1), [V]: a tokenizer's ids usually go from frequent to rare.

    >>> zipf_prior(3) * 11
    Array([6., 3., 2.], dtype=float32)
    """
    weights = 1 / jnp.arange(1, vocab + 1, dtype=dtype)
    return weights / jnp.sum(weights)


def _with_prior(logits, prior):
    """Logits in float32 at least, with each class's log prior."""
    logits, vocab = wide(logits), logits.shape[-1]
    if prior is not None and is_known(prior):
        given = np.asarray(prior)
        if given.shape == (vocab,) and not (np.isfinite(given).all() and (given >= 0).all() and (given > 0).any()):
            raise LabError("logit_adjusted's prior is of shares, finite ones of at least 0 and not all of them 0.")
    prior = zipf_prior(vocab, logits.dtype) if prior is None else jnp.asarray(prior, logits.dtype)
    if prior.shape != (vocab,):
        raise LabError(f"logit_adjusted needs one prior a class: the vocabulary is {vocab}, the prior {prior.shape}.")
    log_prior = jnp.broadcast_to(jnp.log(prior), logits.shape)
    # Beside a logit of 1e4 a log prior is rounded away: they meet at 0, where the greatest of the possible classes lies.
    top = jnp.max(jnp.where(log_prior > -jnp.inf, logits, -jnp.inf), axis=-1, keepdims=True)
    return logits - jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0)) + log_prior


def _adjusted_link(logits, *, prior=None):
    return jax.nn.softmax(_with_prior(logits, prior)).astype(jnp.result_type(logits))


@loss(
    source="Menon et al. 2021, Long-tail learning via logit adjustment, arXiv:2007.07314, eq. 10",
    formula=r"-\log \operatorname{softmax}(z + \log \pi)_y",
    gradient=r"\operatorname{softmax}(z + \log \pi) - e",
    link=_adjusted_link,
    link_name="softmax(z + log prior)",
    proper="link",
    calibrated=False,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    settings=({}, {"prior": (0.5, 0.2, 0.15, 0.1, 0.05)}),
    note="The logits' own argmax is uncalibrated by design: it ignores the prior, to serve rare classes.",
)
def logit_adjusted(logits: Logits, targets: Targets, *, prior=None) -> PerToken:
    """`nll` of logits shifted by the classes' log prior: logits [..., V], targets [...] -> [...], in nats.

    prior: [V] probabilities; by default `zipf_prior(V)`, pi_j in proportion to 1 / (j + 1).

    >>> logit_adjusted(jnp.zeros(2), jnp.array(0), prior=(0.25, 0.75))  # log 4
    Array(1.3862944, dtype=float32)
    """
    return nll(_with_prior(logits, prior), targets).astype(jnp.result_type(logits))


def _sigmoid_link(logits):
    # Each class's own probability; where they do not sum to 1 they are read as shares.
    return jax.nn.softmax(jax.nn.log_sigmoid(logits))


@loss(
    source="Rifkin & Klautau 2004, In defense of one-vs-all classification, JMLR 5; with the logistic loss",
    formula=r"\sum_j \log(1 + e^{z_j}) - z_y",
    gradient=r"\sigma(z) - e",
    link=_sigmoid_link,
    link_name="sigmoid(z), normalised",
    proper="link",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=False,
    local=False,
    low_p_even=1.0,
    low_p_one=0.5,
    stream=lambda softplus, target: softplus + jax.nn.softplus(-target),
)
def one_vs_rest(logits: Logits, targets: Targets) -> PerToken:
    """V binary log scores, one a class: logits [..., V], targets [...] -> [...], in nats.

    >>> one_vs_rest(jnp.zeros(3), jnp.array(0)) / jnp.log(2.0)  # three coins
    Array(3., dtype=float32)
    """
    z = wide(logits)
    rivals = jnp.sum(jax.nn.softplus(off_target(z, targets, fill=-jnp.inf)), axis=-1)
    return (jax.nn.softplus(-at_target(z, targets)) + rivals).astype(jnp.result_type(logits))


def _unlikelihood_even(vocab):
    return 2.0 if vocab == 2 else 1.0


def _unlikelihood_one(vocab):
    return vocab / (vocab - 1)


@loss(
    source="Welleck et al. 2020, Neural text generation with unlikelihood training, arXiv:1908.04319, all negatives",
    formula=r"-\log p_y - \sum_{j \ne y} \log(1 - p_j)",
    gradient=r"p - e + w - p \sum_k w_k,\quad w_j = \tfrac{p_j}{1 - p_j},\ w_y = 0",
    proper="softmax",
    calibrated=True,
    convex=False,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=_unlikelihood_even,
    low_p_one=_unlikelihood_one,
    note="Convex at V = 2 only.",
)
def unlikelihood(logits: Logits, targets: Targets) -> PerToken:
    """Log score of the target and of every other class's absence: logits [..., V], targets [...] -> [...], in nats.

    The written-down form takes log(1 - p) and is NaN at certainty; this one is not.

    >>> unlikelihood(jnp.zeros(2), jnp.array(0)) / jnp.log(2.0)  # -log 1/2 - log(1 - 1/2)
    Array(2., dtype=float32)
    """
    log_p, log_miss = log_hit_and_miss(wide(logits))
    absent = jnp.sum(jnp.where(is_at_target(log_p, targets), 0, log_miss), axis=-1)
    return (-at_target(log_p, targets) - absent).astype(jnp.result_type(logits))
