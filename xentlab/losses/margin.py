"""Margin losses: what counts is by how much the target's logit leads, and a lead that suffices costs nothing."""

import jax
import jax.numpy as jnp

from xentlab.contract import Logits, PerToken, Targets, loss
from xentlab.losses.numerics import wide
from xentlab.targets import at_target, off_target, or_nan


def _leads(logits, targets):
    """z_j - z_y for the rivals, -inf in the target's place, and of a rival at -inf: [..., V]."""
    target = at_target(logits, targets)[..., None]
    # A rival that is out leads nobody, also a target that is out: the two's difference would be a NaN.
    leads = jnp.where((logits == -jnp.inf) & ~jnp.isnan(target), -jnp.inf, logits - target)
    # Filled last: a target at -inf, less itself, would be one as well.
    return off_target(leads, targets, fill=-jnp.inf)


def _ahead(top, target):
    """top - target, [...], and -inf where there is no rival, whatever the target's logit: there is none to lead."""
    none = top == -jnp.inf
    return jnp.where(none, -jnp.inf, top - jnp.where(none, 0, target))


def _lead(logits, targets):
    """By how much the greatest rival leads the target, [...]: of two that tie each has half of the gradient."""
    rivals, target = off_target(logits, targets, fill=-jnp.inf), at_target(logits, targets)
    lead = _ahead(jnp.max(rivals, axis=-1), target)
    return or_nan(lead, target + jnp.sum(jnp.where(jnp.isnan(rivals), rivals, 0), axis=-1))


def _unless_nan(value, leads):
    """Each token's value, or NaN where one of its leads is: on a CPU XLA's vectorised maximum gives the other operand."""
    return or_nan(value, jnp.sum(jnp.where(jnp.isnan(leads), leads, 0), axis=-1))


@loss(
    source="Crammer & Singer 2001, On the algorithmic implementation of multiclass kernel-based vector machines, JMLR 2",
    formula=r"\max(0,\ 1 + \max_{j \ne y} z_j - z_y)",
    gradient=r"e_{j^*} - e \text{ while the margin is violated, else } 0",
    proper="no",
    calibrated=False,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    stream=lambda top, target: jax.nn.relu(1 + _ahead(top, target)),
    note="Uncalibrated from V = 3 on: without a majority class, z = 0 is optimal.",
)
def hinge(logits: Logits, targets: Targets) -> PerToken:
    """The multiclass hinge: logits [..., V], targets [...] -> [...]. At a tie the gradient is a mean of subgradients.

    >>> hinge(jnp.array([2.0, 1.5, 0.0]), jnp.array(0))  # 1 + 1.5 - 2
    Array(0.5, dtype=float32)
    """
    lead = _lead(logits, targets)
    return or_nan(jax.nn.relu(1 + lead), lead)


def _one_a_rival(vocab):
    return vocab - 1.0


@loss(
    source="Weston & Watkins 1999, Support vector machines for multi-class pattern recognition, ESANN",
    formula=r"\sum_{j \ne y} \max(0,\ 1 + z_j - z_y)",
    gradient=r"e_j \text{ for each violating rival } j, \text{ minus their count at } y",
    proper="no",
    calibrated=False,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=_one_a_rival,
    low_p_one=_one_a_rival,
    stream=lambda hinges: hinges,
    note="Uncalibrated from V = 3 on: Wang & Scott 2020. On the second path the count is 1 where the other rivals lie "
    "below z_y - 1.",
)
def hinge_weston_watkins(logits: Logits, targets: Targets) -> PerToken:
    """A hinge for every rival, summed: logits [..., V], targets [...] -> [...].

    >>> hinge_weston_watkins(jnp.array([2.0, 1.5, 1.25]), jnp.array(0))  # 0.5 + 0.25
    Array(0.75, dtype=float32)
    """
    leads = _leads(logits, targets)
    return _unless_nan(jnp.sum(jax.nn.relu(1 + leads), axis=-1), leads)


@loss(
    source="Lee, Lin & Wahba 2004 and Zhang 2004 (JMLR 5) for squared margins; the sum is Weston & Watkins' with a square",
    formula=r"\sum_{j \ne y} \max(0,\ 1 + z_j - z_y)^2",
    gradient=r"2 m_j \text{ at each rival with margin } m_j = 1 + z_j - z_y > 0, \text{ minus their sum at } y",
    proper="no",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=float("inf"),
    low_p_one=float("inf"),
    stream=lambda hinges_2: hinges_2,
)
def squared_hinge(logits: Logits, targets: Targets) -> PerToken:
    """A squared hinge for every rival, summed: logits [..., V], targets [...] -> [...].

    >>> squared_hinge(jnp.array([2.0, 1.5, 1.5]), jnp.array(0))  # 1/4 + 1/4
    Array(0.5, dtype=float32)
    """
    leads = _leads(logits, targets)
    return _unless_nan(jnp.sum(jax.nn.relu(1 + leads) ** 2, axis=-1), leads)


@loss(
    source="Rosenblatt 1958, The perceptron, Psychological Review 65; multiclass as in Duda & Hart 1973",
    formula=r"\max_j z_j - z_y",
    gradient=r"e_{\max} - e",
    proper="no",
    calibrated=False,
    convex=True,
    bounded=False,
    shift=True,
    local=False,
    low_p_even=1.0,
    low_p_one=1.0,
    stream=lambda top, target: jax.nn.relu(_ahead(top, target)),
    note="z = 0 is optimal for every P.",
)
def perceptron(logits: Logits, targets: Targets) -> PerToken:
    """By how much the greatest logit leads the target's: logits [..., V], targets [...] -> [...].

    >>> perceptron(jnp.array([2.0, 3.5, 0.0]), jnp.array(0))
    Array(1.5, dtype=float32)
    """
    lead = _lead(logits, targets)
    return or_nan(jax.nn.relu(lead), lead)


def _doubled_link(logits):
    return jax.nn.softmax(2 * logits)


@loss(
    source="Mukherjee & Schapire 2013 (AdaBoost.MR's loss), A theory of multiclass boosting, JMLR 14",
    formula=r"\sum_{j \ne y} e^{z_j - z_y} = 1 / p_y - 1",
    gradient=r"e^{z_j - z_y} \text{ at each rival } j, \text{ minus their sum at } y",
    link=_doubled_link,
    link_name="softmax(2z)",
    proper="link",
    calibrated=True,
    convex=True,
    bounded=False,
    shift=True,
    local=True,
    low_p_even=float("inf"),
    low_p_one=float("inf"),
    infinite=("large gaps",),
    stream=lambda rivals, target: jnp.exp(_ahead(rivals, target)),
)
def exponential(logits: Logits, targets: Targets) -> PerToken:
    """The odds against the target: logits [..., V], targets [...] -> [...]. Infinite in float32 from a gap of 88.7 on.

    >>> exponential(jnp.log(jnp.array([0.25, 0.75])), jnp.array(0))  # 1 / 0.25 - 1
    Array(3., dtype=float32)
    """
    return jnp.sum(jnp.exp(_leads(wide(logits), targets)), axis=-1).astype(jnp.result_type(logits))
