"""Losses that turn the log score up or down at low probability: local ones, functions of p_y alone."""

import inspect
import math

import jax
import jax.numpy as jnp

from xentlab.contract import Logits, PerToken, Setting, Targets, check_setting, loss
from xentlab.losses.numerics import log_p_target, log_softmax, one_minus_exp, one_minus_power, p_log_p, wide
from xentlab.targets import at_target


def _local(of_log_p):
    """The stream form of a local loss, a function of log p_y and the loss's settings."""

    def stream(rivals, target, **settings):
        return of_log_p(log_p_target(rivals, target), **settings)

    keywords = [p for p in inspect.signature(of_log_p).parameters.values() if p.kind is p.KEYWORD_ONLY]
    places = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("rivals", "target")]
    stream.__signature__ = inspect.Signature([*places, *keywords])
    return stream


def _of(logits, targets, of_log_p, **settings):
    """A local loss, computed in float32 where the logits are narrower."""
    return of_log_p(at_target(log_softmax(wide(logits)), targets), **settings).astype(jnp.result_type(logits))


def _focal(log_p, *, gamma):
    # At p = 1 exactly a power below 1 has an infinite slope; there the loss and its gradient are 0. At p = 0 they are nll's.
    certain, impossible = log_p == 0, log_p == -jnp.inf
    between = jnp.where(certain | impossible, -1, log_p)
    value = -(one_minus_exp(between) ** gamma) * between
    return jnp.where(certain, 0, jnp.where(impossible, -log_p, value))


@loss(
    source="Lin et al. 2017, Focal loss for dense object detection, arXiv:1708.02002, eq. 4",
    formula=r"-(1 - p_y)^\gamma \log p_y",
    gradient=r"\ell'(p_y)\, p_y (e - p),\quad \ell'(p) = \gamma (1 - p)^{\gamma - 1} \log p - (1 - p)^\gamma / p",
    proper="no",
    calibrated=True,
    convex=False,
    bounded=False,
    shift=True,
    local=True,
    low_p_even=1.0,
    low_p_one=1.0,
    settings=({}, {"gamma": 1.0}, {"gamma": 0.5}),
    note="Not proper: Charoenphakdee et al. 2021, arXiv:2011.09172. |dL/dz_y| overshoots to 1.13 on its way to 1.",
    stream=_local(_focal),
)
def focal(logits: Logits, targets: Targets, *, gamma: Setting = 2.0) -> PerToken:
    """The log score, damped where the model is already right: logits [..., V], targets [...] -> [...], in nats.

    gamma: at least 0; at 0 it is `nll`.

    >>> focal(jnp.zeros(2), jnp.array(0)) / jnp.log(2.0)  # (1/2)^2 log 2
    Array(0.25, dtype=float32)
    """
    check_setting(gamma, lambda gamma: gamma >= 0, f"focal needs gamma of at least 0; got {gamma}. At 0 it is nll.")
    return _of(logits, targets, _focal, gamma=gamma)


def _poly1(log_p, *, epsilon):
    return -log_p + epsilon * one_minus_exp(log_p)


@loss(
    source="Leng et al. 2022, PolyLoss, arXiv:2204.12511, eq. 5",
    formula=r"-\log p_y + \epsilon (1 - p_y)",
    gradient=r"(1 + \epsilon p_y)(p - e)",
    proper="no",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=True,
    low_p_even=1.0,
    low_p_one=1.0,
    settings=({}, {"epsilon": -0.5}),
    note="Convex only for -1 <= epsilon <= 1.",
    stream=_local(_poly1),
)
def poly1(logits: Logits, targets: Targets, *, epsilon: Setting = 1.0) -> PerToken:
    """The log score with its first polynomial coefficient moved by epsilon: logits [..., V], targets [...] -> [...].

    >>> float(poly1(jnp.zeros(2), jnp.array(0)) - jnp.log(2.0))  # epsilon / 2
    0.5
    """
    check_setting(epsilon, lambda epsilon: True, f"poly1 needs an epsilon that is a finite number; got {epsilon}.")
    return _of(logits, targets, _poly1, epsilon=epsilon)


def _tempered_link(logits, *, q=0.7):
    # At q = 1 nothing of the logits would be left: it is half of mae, which is read by its softmax.
    return jax.nn.softmax(jnp.where(q == 1, 1, 1 - q).astype(logits.dtype) * logits)


def _gce(log_p, *, q):
    return one_minus_power(log_p, q) / q


@loss(
    source="Zhang & Sabuncu 2018, Generalized cross entropy loss, arXiv:1805.07836, eq. 6",
    formula=r"(1 - p_y^q) / q",
    gradient=r"-p_y^q (e - p)",
    link=_tempered_link,
    link_name="softmax((1 - q) z)",
    proper="link",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=True,
    low_p_even=0.0,
    low_p_one=0.0,
    settings=({}, {"q": 0.3}),
    stream=_local(_gce),
)
def generalized_cross_entropy(logits: Logits, targets: Targets, *, q: Setting = 0.7) -> PerToken:
    """Between `nll` (q -> 0) and half of `mae` (q = 1): logits [..., V], targets [...] -> [...], in [0, 1/q].

    q: in (0, 1]. The gradient at low p vanishes like p^q.

    >>> generalized_cross_entropy(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0), q=0.5)  # (1 - 1/2) / (1/2)
    Array(1., dtype=float32)
    """
    check_setting(
        q, lambda q: 0 < q <= 1, f"generalized_cross_entropy needs q in (0, 1]; got {q}. For q = 0 use nll, its limit."
    )
    return _of(logits, targets, _gce, q=q)


def _mae(log_p):
    return 2 * one_minus_exp(log_p)


@loss(
    source="Ghosh et al. 2017, Robust loss functions under label noise, arXiv:1712.09482",
    formula=r"\sum_j |p_j - e_j| = 2 (1 - p_y)",
    gradient=r"-2 p_y (e - p)",
    proper="no",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=True,
    low_p_even=0.0,
    low_p_one=0.0,
    note="Its minimiser is one-hot: it learns the likeliest class and nothing of the others.",
    stream=_local(_mae),
)
def mae(logits: Logits, targets: Targets) -> PerToken:
    """Absolute error on probabilities: logits [..., V], targets [...] -> [...], in [0, 2].

    >>> mae(jnp.zeros(4), jnp.array(0))  # 3/4 + 3 * 1/4
    Array(1.5, dtype=float32)
    """
    return _of(logits, targets, _mae)


def _js(log_p):
    miss = one_minus_exp(log_p)
    # The formula with 1 + p = 2 - miss, in which the log 2 terms cancel on paper instead of in floating point.
    return (miss * math.log(2) - (2 - miss) * jnp.log1p(-miss / 2) + p_log_p(log_p)) / 2


@loss(
    source="Englesson & Azizpour 2021, Generalized Jensen-Shannon divergence loss, arXiv:2105.04522, at pi = 1/2",
    formula=r"\operatorname{JS}(e, p) = \log 2 + \tfrac12 p_y \log p_y - \tfrac12 (1 + p_y) \log(1 + p_y)",
    gradient=r"\tfrac12 \log\tfrac{p_y}{1 + p_y}\; p_y (e - p)",
    proper="no",
    calibrated=True,
    convex=False,
    bounded=True,
    shift=True,
    local=True,
    low_p_even=0.0,
    low_p_one=0.0,
    stream=_local(_js),
)
def jensen_shannon(logits: Logits, targets: Targets) -> PerToken:
    """Jensen-Shannon divergence between p and the one-hot target, in nats: logits [..., V], targets [...] -> [...].

    >>> jensen_shannon(jnp.array([0.0, 200.0]), jnp.array(0)) / jnp.log(2.0)  # its supremum
    Array(1., dtype=float32)
    """
    return _of(logits, targets, _js)


def _eta(vocab, *, eta=0.5):
    return eta


def _mixce(log_p, *, eta):
    # At p = 0 the reverse part, p log p, is 0; and at eta = 0 there is no other.
    weight = eta + (1 - eta) * jax.lax.stop_gradient(jnp.exp(log_p))
    impossible = log_p == -jnp.inf
    # What is infinite has no derivative by eta.
    infinite = jnp.where(jax.lax.stop_gradient(weight) == 0, 0, log_p)
    return jnp.where(impossible, -infinite, -weight * jnp.where(impossible, 0, log_p))


@loss(
    source="Zhang et al. 2023, MixCE: mixing forward and reverse cross-entropies, arXiv:2305.16958, eq. 7",
    formula=r"-(\eta + (1 - \eta)\operatorname{stop}(p_y)) \log p_y",
    gradient=r"-(\eta + (1 - \eta) p_y)(e - p)",
    proper="no",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=True,
    stops_gradient=True,
    low_p_even=_eta,
    low_p_one=_eta,
    settings=({}, {"eta": 0.75}),
    note="Judged by its gradient field, not its value. The field is monotone for eta >= 1/2; at 1/2 it is half poly1's.",
    stream=_local(_mixce),
)
def mixce(logits: Logits, targets: Targets, *, eta: Setting = 0.5) -> PerToken:
    """Cross entropy mixed with its reverse, by a weight that is not differentiated: logits [..., V], targets [...] -> [...].

    eta: cross entropy's share, in [0, 1].

    >>> mixce(jnp.zeros(2), jnp.array(0)) / jnp.log(2.0)  # 1/2 + 1/2 * 1/2
    Array(0.75, dtype=float32)
    """
    check_setting(eta, lambda eta: 0 <= eta <= 1, f"mixce needs eta in [0, 1]; got {eta}. At 1 it is nll.")
    return _of(logits, targets, _mixce, eta=eta)
