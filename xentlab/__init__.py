"""xentlab: a differentiable loss lab for next-token models, in JAX."""

from xentlab.audit import Audit, Verdict, audit
from xentlab.catalogue import LOSSES, resolve
from xentlab.contract import Facts, LabError, facts_of, link_of, loss, name_of
from xentlab.linear import explain_plan, linear_log_probs, linear_loss
from xentlab.losses.likelihood import cross_entropy
from xentlab.targets import at_target, off_target

__version__ = "0.1.0"
__all__ = [
    "LOSSES",
    "Audit",
    "Facts",
    "LabError",
    "Verdict",
    "at_target",
    "audit",
    "cross_entropy",
    "explain_plan",
    "facts_of",
    "linear_log_probs",
    "linear_loss",
    "link_of",
    "loss",
    "name_of",
    "off_target",
    "resolve",
]
