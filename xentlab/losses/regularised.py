"""Cross entropy with something added: to the target, to the logits' size, to the prediction's entropy."""

import jax
import jax.numpy as jnp

from xentlab.contract import Logits, PerToken, Setting, Targets, check_setting, loss
from xentlab.losses.likelihood import nll
from xentlab.losses.numerics import log_p_and_entropy, log_p_target, log_softmax, p_log_p, wide
from xentlab.targets import at_target, off_target


def _share(epsilon, mean_log_p):
    """The uniform's part, of which at epsilon = 0 there is none, not of what is impossible either."""
    return epsilon * jnp.where((mean_log_p == -jnp.inf) & (epsilon == 0), 0, mean_log_p)


def _smoothed_stream(rivals, target, total, vocab, *, epsilon):
    mean_log_p = (total + target) / vocab - jnp.logaddexp(rivals, target)
    return -(1 - epsilon) * log_p_target(rivals, target) - _share(epsilon, mean_log_p)


def _z_stream(rivals, target, level, *, coefficient):
    return coefficient * (level + jnp.logaddexp(rivals, target)) ** 2 - log_p_target(rivals, target)


def _penalty_stream(rivals, target, entropy, *, beta):
    log_p, entropy = log_p_and_entropy(rivals, target, entropy)
    return -log_p - beta * entropy


def _squentropy_stream(rivals, target, squares, vocab):
    return squares / max(vocab - 1, 1) - log_p_target(rivals, target)


def _smoothed(vocab, *, epsilon=0.1):
    return 1 - epsilon + epsilon / vocab


@loss(
    source="Szegedy et al. 2016, Rethinking the Inception architecture, arXiv:1512.00567, section 7",
    formula=r"-\sum_j t_j \log p_j,\quad t = (1 - \epsilon) e + \epsilon / V",
    gradient=r"p - t",
    proper="no",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=_smoothed,
    low_p_one=_smoothed,
    infinite=("-inf rival",),
    settings=({}, {"epsilon": 0.4}),
    stream=_smoothed_stream,
)
def label_smoothing(logits: Logits, targets: Targets, *, epsilon: Setting = 0.1) -> PerToken:
    """Cross entropy to the target mixed with the uniform: logits [..., V], targets [...] -> [...], in nats.

    epsilon: in [0, 1). A class at a logit of -inf costs infinity, since the smoothed target still asks for it.

    >>> value = label_smoothing(jnp.log(jnp.array([0.8, 0.2])), jnp.array(0), epsilon=0.5)
    >>> print(f"{value:.5f}")  # .75 log 1.25 + .25 log 5 = .16736 + .40236
    0.56972
    """
    check_setting(epsilon, lambda epsilon: 0 <= epsilon < 1, f"label_smoothing needs epsilon in [0, 1); got {epsilon}.")
    log_p = log_softmax(wide(logits))
    value = -(1 - epsilon) * at_target(log_p, targets) - _share(epsilon, jnp.mean(log_p, axis=-1))
    return value.astype(jnp.result_type(logits))


@loss(
    source="Chowdhery et al. 2022, PaLM, arXiv:2204.02311, section 5 (coefficient 1e-4)",
    formula=r"-\log p_y + c \operatorname{lse}(z)^2",
    gradient=r"p (1 + 2 c \operatorname{lse}(z)) - e",
    proper="softmax",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=False,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    settings=({}, {"coefficient": 0.01}),
    stream=_z_stream,
    note="Pins lse near 0. Not convex where lse < -1 / (2c).",
)
def z_loss(logits: Logits, targets: Targets, *, coefficient: Setting = 1e-4) -> PerToken:
    """`nll` plus coefficient * logsumexp(z)^2, which keeps the normaliser near 1: logits [..., V], targets [...] -> [...].

    coefficient: at least 0; at 0 it is `nll`.

    >>> print(f"{z_loss(jnp.log(jnp.array([1.0, 3.0])), jnp.array(0), coefficient=1.0):.5f}")  # log 4 + (log 4)^2
    3.30811
    """
    check_setting(
        coefficient,
        lambda coefficient: coefficient >= 0,
        f"z_loss needs a coefficient of at least 0; got {coefficient}. At 0 it is nll.",
    )
    z = wide(logits)
    return (nll(z, targets) + coefficient * jax.nn.logsumexp(z, axis=-1) ** 2).astype(jnp.result_type(logits))


@loss(
    source="Pereyra et al. 2017, Regularizing neural networks by penalizing confident output distributions, arXiv:1701.06548",
    formula=r"-\log p_y - \beta H(p)",
    gradient=r"p - e + \beta\, p \circ (\log p + H(p))",
    proper="no",
    calibrated=True,
    convex=False,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    settings=({}, {"beta": 0.5}),
    stream=_penalty_stream,
    note="Convexity fails barely, for every beta > 0: at V = 2 from the gap s with s tanh(s/2) > 1 + 1/beta on.",
)
def confidence_penalty(logits: Logits, targets: Targets, *, beta: Setting = 0.1) -> PerToken:
    """`nll` minus beta times the prediction's entropy: logits [..., V], targets [...] -> [...], in nats.

    beta: at least 0; at 0 it is `nll`.

    >>> confidence_penalty(jnp.zeros(2), jnp.array(0), beta=0.5) / jnp.log(2.0)  # log 2 - 1/2 log 2
    Array(0.5, dtype=float32)
    """
    check_setting(beta, lambda beta: beta >= 0, f"confidence_penalty needs beta of at least 0; got {beta}. At 0 it is nll.")
    log_p = log_softmax(wide(logits))
    entropy = -jnp.sum(p_log_p(log_p), axis=-1)
    return (-at_target(log_p, targets) - beta * entropy).astype(jnp.result_type(logits))


@loss(
    source="Hui, Belkin & Wright 2023, Cut your losses with squentropy, arXiv:2302.03952, eq. 1",
    formula=r"-\log p_y + \tfrac{1}{V - 1} \sum_{j \ne y} z_j^2",
    gradient=r"p - e, \text{ plus } 2 z_j / (V - 1) \text{ off the target}",
    proper="no",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=False,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    infinite=("-inf rival",),
    stream=_squentropy_stream,
)
def squentropy(logits: Logits, targets: Targets) -> PerToken:
    """`nll` plus the mean square of the wrong classes' logits: logits [..., V], targets [...] -> [...].

    >>> squentropy(jnp.array([3.0, 3.0]), jnp.array(0)) - jnp.log(2.0)  # 3^2 / 1
    Array(9., dtype=float32)
    """
    z = wide(logits)
    squares = jnp.sum(off_target(z, targets) ** 2, axis=-1)
    return (nll(z, targets) + squares / max(z.shape[-1] - 1, 1)).astype(jnp.result_type(logits))
