"""Hand it any loss, get its theory: a verdict on each property, with a witness that can be checked by hand."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit import autodiff, kinship, limits, numerics, shape
from xentlab.audit.decisions import decide
from xentlab.audit.probe import NO, UNDECIDED, VOCAB, YES, Probe, Verdict, make_probe, no
from xentlab.catalogue import resolve
from xentlab.checks import abstract
from xentlab.contract import Facts, LabError, Loss, facts_of, low_p_claim, name_of, settings_of, unwrapped, whole
from xentlab.gradients import PATHS

__all__ = ["FAILED", "VERDICTS", "Audit", "Verdict", "as_json", "audit", "claims", "disagreements", "has_facts"]

VERDICTS = (
    *("elementwise", "honest_autodiff", "conservative", "rejects_bad_targets"),
    *("shift_invariant", "permutation_equivariant", "local", "zero_at_certainty", "monotone"),
    *("bounded", "lipschitz", "convex", "strictly_proper", "proper_through", "calibrated"),
    *("low_p_limit", "low_p_order", "finite", "max_error", "same_gradient_as"),
)
FAILED = "the question failed"
MOST = 32  # classes: there a search among minimisers takes up to minutes and .5 GB, which grow as their number to the third
_SINGLE: dict[str, Callable[[Probe], Verdict]] = {
    function.__name__: function
    for function in (
        autodiff.honest_autodiff,
        autodiff.conservative,
        autodiff.rejects_bad_targets,
        shape.shift_invariant,
        shape.permutation_equivariant,
        shape.local,
        shape.zero_at_certainty,
        shape.bounded,
        kinship.same_gradient_as,
    )
}


@dataclasses.dataclass(frozen=True)
class Audit:
    """What was found of a loss: its name, a `Verdict` for each name of `VERDICTS`, and the vocabulary it was asked at."""

    loss: str
    verdicts: MappingProxyType[str, Verdict]
    vocab: int = VOCAB


def audit(loss: str | Loss, seed: int = 0, vocab: int = VOCAB) -> Audit:
    """Finds out what is true of a loss, from its values and gradients alone.

    loss: a name, or any callable (logits [..., V], targets [...]) -> [...]. All questions are asked in float64 (`finite` and
    `max_error` of narrower types), most of them about the loss's *gradient field*: where something in it is held constant, its
    value would mislead. Of the value are `elementwise`, `rejects_bad_targets`, `shift_invariant`, `permutation_equivariant`,
    `local`, `zero_at_certainty` and `bounded`; of both `honest_autodiff`, `finite`, `max_error` and, where autodiff is honest,
    `monotone` and `convex`. A property that the tests cannot settle is "undecided", with the reason. The same seed gives the
    same audit. vocab: how many classes it is asked at, 2 to 32, which take seconds at 4, half a minute at most at 16 and
    minutes at 32; a loss that knows its own vocabulary answers there alone. Raises `LabError` for a name that is none, a file
    that does not import, another seed and another vocabulary.

    >>> found = audit("brier").verdicts
    >>> found["strictly_proper"].value, found["convex"].value, found["low_p_order"].value
    (True, False, 1.0)
    """
    seed = whole(seed, 0, f"a seed is a whole number of at least 0; got {seed!r}.")
    sizes = (
        f"an audit is asked at a vocabulary of 2 to {MOST}, for its time grows as the third power of it; got {vocab!r}. "
        "Give a loss that knows a larger one settings of fewer classes."
    )
    if (vocab := whole(vocab, 2, sizes)) > MOST:
        raise LabError(sizes)
    function = resolve(loss, check=False)
    probe = make_probe(function, seed, vocab)
    found = {"elementwise": _guarded(_elementwise, probe)}
    if (first := found["elementwise"].value) is not YES:
        why = "not one value a token that depends on that token alone" if first is NO else "see elementwise"
        if found["elementwise"].evidence.startswith(FAILED):
            found["elementwise"] = Verdict(UNDECIDED, f"{FAILED}: {_why(function, vocab)}")
        rest = Verdict(UNDECIDED, f"{why}: nothing else is asked")
        return _audit(probe, {**found, **{name: rest for name in VERDICTS if name not in found}})
    for name, question in _SINGLE.items():
        found[name] = _guarded(question, probe)
    honest, conservative = found["honest_autodiff"].value is not NO, found["conservative"].value
    for question in (shape.lipschitz, shape.monotone, shape.convex):
        found[question.__name__] = _guarded(functools.partial(question, honest=honest), probe)
    kinds = ("convex", "shift_invariant", "permutation_equivariant")
    for names, question in (
        (("low_p_limit", "low_p_order"), limits.low_p),
        (("finite", "max_error"), numerics.numerics),
        (
            ("strictly_proper", "proper_through", "calibrated"),
            lambda probe: decide(probe, honest, conservative, *(found[name].value for name in kinds)),
        ),
    ):
        several = _guarded(question, probe)
        found.update(dict.fromkeys(names, several) if isinstance(several, Verdict) else several)
    return _audit(probe, found)


def _why(loss: Loss, vocab: int) -> str:
    """Why a loss cannot be asked anything, and what is to be done."""
    try:
        resolve(loss, vocab=vocab)
    except LabError as error:
        return str(error)
    return "it works at ordinary shapes, and not on float64 logits; what it makes itself has the logits' dtype."


def _audit(probe: Probe, found: dict[str, Verdict]) -> Audit:
    return Audit(name_of(probe.loss), MappingProxyType({name: found[name] for name in VERDICTS}), probe.vocab)


def _elementwise(probe: Probe) -> Verdict:
    shape = (2, 3, probe.vocab)
    logits, targets = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct(shape[:2], jnp.int32)
    value = abstract(probe.loss, logits, targets)
    got = list(getattr(value, "shape", ())) if hasattr(value, "shape") else type(value).__name__
    if got != [2, 3]:
        return no("not one value a token", logits_shape=[*shape], targets_shape=[2, 3], output_shape=got)
    with jax.enable_x64(True):
        wide = abstract(probe.loss, jax.ShapeDtypeStruct(shape, jnp.float64), targets).dtype
    if jnp.issubdtype(wide, jnp.floating) and jnp.finfo(wide).bits < 64:
        return Verdict(
            UNDECIDED,
            f"of float64 logits it makes {wide}, which has too few digits to be judged by. Let the cast only "
            "widen: logits.astype(jnp.promote_types(logits.dtype, jnp.float32))",
        )
    return autodiff.elementwise(probe)


def _guarded(question: Callable[[Probe], Any], probe: Probe) -> Any:
    """An answer, or "undecided" with what went wrong: a loss that breaks one question still gets the others."""
    try:
        return question(probe)
    except Exception as error:
        return Verdict(UNDECIDED, f"{FAILED}: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")


def claims(loss: Loss) -> bool:
    """Whether anybody has said anything of a loss."""
    return facts_of(loss) != Facts()


def has_facts(loss: Loss) -> bool:
    """Whether a loss's facts are of the settings that it has: of those by default, or of others that they name."""
    given = {name: value for name, value in settings_of(loss).items() if name != "prior"}
    parameters = inspect.signature(unwrapped(loss)[0]).parameters
    usual = {name: parameter.default for name, parameter in parameters.items()}
    named = [usual | dict(each) for each in facts_of(loss).settings]
    return any(all(np.array_equal(value, each.get(name)) for name, value in given.items()) for each in named)


def disagreements(found: Audit, loss: Loss) -> list[str]:
    """Where an audit and the facts that a loss claims differ, a line each; claims that nobody made are passed over.

    Facts are of the settings that they name; at others no more is claimed than a limit that is a function of them.
    """
    if not claims(loss):
        return []
    facts, verdicts = facts_of(loss), found.verdicts
    limits_found, through = verdicts["low_p_limit"].value, verdicts["proper_through"].value
    pairs = [
        ("honest_autodiff", not facts.stops_gradient, verdicts["honest_autodiff"].value),
        ("strictly_proper", facts.proper and facts.proper == "softmax", verdicts["strictly_proper"].value),
        ("proper_through", facts.proper and facts.proper != "no", UNDECIDED if through == UNDECIDED else through is not None),
        ("calibrated", facts.calibrated, verdicts["calibrated"].value),
        ("convex", facts.convex, verdicts["convex"].value),
        ("bounded", facts.bounded, verdicts["bounded"].value),
        ("shift_invariant", facts.shift, verdicts["shift_invariant"].value),
        ("local", facts.local, verdicts["local"].value),
    ]
    # Claims are of three classes and more: between two the hinge is calibrated, and whatever is shift invariant is local.
    pairs = pairs if has_facts(loss) else []
    kept = [each for each in pairs if each[1] is not None and not (found.vocab == 2 and each[2] is True)]
    said = [f"{name}: claimed {claim}, found {value}" for name, claim, value in kept if claim != value]
    for rivals in PATHS:
        claim = low_p_claim(loss, rivals, found.vocab)
        value = limits_found[rivals] if isinstance(limits_found, dict) else UNDECIDED
        if claim is not None and (value == UNDECIDED or not math.isclose(claim, value, rel_tol=1e-4, abs_tol=1e-6)):
            said.append(f"low_p_limit {rivals}: claimed {claim}, found {value}")
    return said


def as_json(audits: list[Audit]) -> list[dict[str, Any]]:
    """Audits as plain lists and dicts, [{loss, vocab, verdicts: {name: {value, evidence, witness}}}]; infinities as "inf"."""
    return [
        {
            "loss": each.loss,
            "vocab": each.vocab,
            "verdicts": {name: _finite(dataclasses.asdict(v)) for name, v in each.verdicts.items()},
        }
        for each in audits
    ]


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
