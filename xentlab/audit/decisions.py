"""What a loss's minimisers say of the distributions that they are of: is it proper, through which link, and calibrated?"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit.minimisers import LAWS, STARTS, Minimiser, anywhere, is_polyhedral, minimise
from xentlab.audit.probe import NO, UNDECIDED, YES, Probe, Verdict, no, plain
from xentlab.contract import facts_of, link_of, softmax_link
from xentlab.losses.sparse import entmax15_link, sparsemax_link
from xentlab.products import quickly

SPARSE = {"sparsemax": sparsemax_link, "entmax15": entmax15_link}


def links(probe: Probe) -> dict[str, Callable]:
    """The links that a loss may be proper through, in order; last its own, where that is none of them."""
    found = {
        "softmax": jax.nn.softmax,
        "identity": lambda z: z,
        "sigmoid": jax.nn.sigmoid,
        "softmax(2z)": lambda z: jax.nn.softmax(2 * z),
        "(1+z)/2": lambda z: (1 + z) / 2,
        **_sparse_links(),
    }
    own = facts_of(probe.loss).link
    if own not in (softmax_link, *SPARSE.values()):
        found["its own"] = link_of(probe.loss)
    return found


@functools.cache
def _sparse_links() -> dict[str, Callable]:
    """Compiled once: called as they are, their loops would be for every loss that is asked about."""
    return {name: jax.jit(link, compiler_options=quickly(0)) for name, link in SPARSE.items()}


def _scaled(minimiser: Minimiser) -> dict[str, Callable]:
    """Softmax and sigmoid of the one multiple of the logits that may read back this law: a loss may have its own units."""
    z, law = minimiser.logits[0], minimiser.law
    wanted = {"softmax": (z - z.mean(), np.log(law) - np.log(law).mean()), "sigmoid": (z, np.log(law) - np.log1p(-law))}
    links, found = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}, {}
    for name, (have, want) in wanted.items():
        if have.any():
            factor = float(have @ want / (have @ have))
            if f"{factor:.4g}" == "1":
                continue
            found[f"{name}({factor:.4g}z)"] = lambda z, link=links[name], factor=factor: link(factor * z)
    return found


def decide(
    probe: Probe,
    honest: bool,
    conservative: bool | str,
    convex: bool | str = UNDECIDED,
    shift: bool | str = UNDECIDED,
    even: bool | str = YES,
) -> dict[str, Verdict]:
    """`strictly_proper`, `proper_through` and `calibrated`: of the loss over its unit, which changes none of them.

    The rest are verdicts that were found before; even: whether renaming the classes changes nothing.
    """
    unit, probe = probe.unit, probe.in_units()
    if conservative is NO:
        reason = Verdict(UNDECIDED, "the field is no function's gradient: it has no minimum to speak of")
        return dict.fromkeys(("strictly_proper", "proper_through", "calibrated"), reason)
    polyhedral = convex is not NO and is_polyhedral(probe)
    found, merit = minimise(probe, honest, polyhedral, even is not NO)
    what = "value" if honest else "potential"
    through, how = None, f"{len(found)} distributions over {probe.vocab} classes, {STARTS} starts, {what} in float64"
    misses: dict[str, Verdict] = {}
    for name, link in (links(probe) | _scaled(next((each for each in found if not each.unknown), found[0]))).items():
        misses[name] = _reads_back(merit, honest, link, found, level=shift is YES and name == "softmax")
        if misses[name].value is not NO:
            through = name if misses[name].value is YES else UNDECIDED
            break
    rare = _of_a_rare_class(merit, probe.vocab) if through == "softmax" and honest and shift is YES else None
    if rare:
        misses["softmax"], through = rare, None
    strictly, tolerance = misses["softmax"], max(float(np.max(each.tolerance)) for each in found)
    if strictly.value is YES:
        strictly = Verdict(YES, f"softmax(z*) = P to {tolerance:g} for {how}")
    words = f"z* reads back P to {tolerance:g}; {how}" if through else f"none of {', '.join(misses)}; {how}"
    words = misses[name].evidence if through is UNDECIDED else words
    words = "softmax(z*) is P, but not where a class is rarer than in any other P that was asked about" if rare else words
    verdicts = {
        "strictly_proper": strictly,
        "proper_through": Verdict(through, words, None if through else strictly.witness),
        "calibrated": _keeps_the_argmax(merit, found, how, honest),
    }
    return {name: _as_measured(verdict, unit) for name, verdict in verdicts.items()}


def _as_measured(verdict: Verdict, unit: float) -> Verdict:
    """A verdict on a loss over its unit, with the values of its witness, which are what is no list, times that."""
    if verdict.witness is None:
        return verdict
    witness = {key: plain(unit * each) if isinstance(each, float) else each for key, each in verdict.witness.items()}
    return dataclasses.replace(verdict, witness=witness)


def _reads_back(merit: Callable, honest: bool, link: Callable, found: list[Minimiser], level: bool = False) -> Verdict:
    """Whether link(z*) is P for every P and every minimiser z* of the merit, which is a value only where that is honest.

    level: whether the link is softmax and no shift changes the loss, so that any point below log P answers for a search that
    came to no end, and for one that read P back to its tolerance.
    """
    ends = np.cumsum([len(each.logits) for each in found])[:-1]
    reads = np.split(_read(link, np.concatenate([each.logits for each in found])), ends)
    unsure = []
    for each, here in zip(found, reads, strict=True):
        if each.unknown:
            continue
        off = np.abs(here - each.law).max(axis=1) / each.tolerance
        worst = int(np.argmax(off))
        if off[worst] > 1 or each.at_infinity:
            value, other = _beside_log_p(merit, each, worst)
            less = value < other - 1e-9 * (1 + abs(other))
            more = level and value > other + 1e-14 * (1 + abs(other))  # than at log P: no minimum is there
            if not each.at_infinity and not (level and less) and (more or not _is_off(link, each, worst, here[worst])):
                unsure.append(Verdict(UNDECIDED, f"{_flat(each)}, and where it is least is known too loosely to be read"))
                continue
            how = f"{'least' if less else 'as small'} elsewhere" + (", at infinity" if each.at_infinity else "")
            return _elsewhere(how, honest, each, worst, here, value, other)
    for each, here in zip(found, reads, strict=True) if level else ():
        values = merit(each.logits, np.tile(each.law, (len(each.logits), 1)))
        place = int(np.argmin(np.where(np.isnan(values), np.inf, values)))
        value, other = _beside_log_p(merit, each, place)
        if value < other - (1e-12 if honest else 1e-9) * (1 + abs(other)):
            return _elsewhere("less elsewhere", honest, each, place, here, value, other)
    return next(iter([*unsure, *(_no_zero(each) for each in found if each.unknown)]), Verdict(YES, "reads back P"))


def _of_a_rare_class(merit: Callable, vocab: int) -> Verdict | None:
    """A P of whose least class a loss would rather hear nothing: it clips p where no other P of the audit looks."""
    least = np.array([1e-3, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9])[:, None]
    laws = np.concatenate([np.tile((1 - least) / (vocab - 1), vocab - 1), least], axis=1)
    less = np.log(laws) - 30 * (np.arange(vocab) == vocab - 1)
    here, there = merit(less, laws), merit(np.log(laws), laws)
    lower = there - here - 1e-13 * (1 + np.abs(there))
    if not (lower > 0).any():
        return None
    place = int(np.nanargmax(lower))
    found = Minimiser(laws[place], less[place : place + 1], here[place], settled=False, at_infinity=False)
    return _elsewhere("less elsewhere", True, found, 0, _read(jax.nn.softmax, found.logits), here[place], there[place])


def _read(link: Callable, rows: np.ndarray) -> np.ndarray:
    """What a link makes of logits [N, V]: in parts of one shape, so that every audit's links are compiled once."""
    part = STARTS * LAWS
    filled = np.resize(rows, (-(-len(rows) // part) * part, rows.shape[1]))
    with jax.enable_x64(True):
        reads = [np.asarray(link(jnp.asarray(each))) for each in np.split(filled, len(filled) // part)]
    return np.concatenate(reads)[: len(rows)]


def _is_off(link: Callable, minimiser: Minimiser, place: int, here: np.ndarray) -> bool:
    """Whether P is not what is read there, nor where else the minimum may lie."""
    if minimiser.loose is None:
        return True
    z, beside = minimiser.logits[place], minimiser.loose[place]
    endless = np.linalg.norm(beside, axis=1, keepdims=True) > 0.99  # no curvature shows, so that it may lie anywhere
    beside = np.where(endless, anywhere(z) * beside, beside)
    there = _read(link, z + np.concatenate([beside, -beside]))
    slack = np.nan_to_num(np.abs(there - here).max(axis=1), nan=1.0).reshape(2, -1).max(axis=0).sum()
    return bool(np.abs(here - minimiser.law).max() > np.max(minimiser.tolerance) + 2 * slack)


def _flat(minimiser: Minimiser) -> str:
    return f"for P = {plain(minimiser.law.round(4))} the field is about 0 far around its zero"


def _beside_log_p(merit: Callable, minimiser: Minimiser, place: int) -> np.ndarray:
    """The merit at one of the logits that were reached, and at log P."""
    law = minimiser.law
    return merit(np.stack([minimiser.logits[place], np.log(law)]), np.stack([law, law]))


def _elsewhere(how: str, honest: bool, each: Minimiser, place: int, read: np.ndarray, here: float, there: float) -> Verdict:
    what = "the expected loss" if honest else "the potential of the field, its integral from 0 and not the loss's value,"
    shown = {_merit_name(honest): here, f"{_merit_name(honest)}_at_log_P": there}
    return no(f"{what} is {how}", P=each.law, logits=each.logits[place], reads=read[place], **shown)


def _merit_name(honest: bool) -> str:
    return "expected_loss" if honest else "potential"


def _no_zero(minimiser: Minimiser) -> Verdict:
    return Verdict(UNDECIDED, f"no zero of the field was reached for P = {plain(minimiser.law.round(4))}")


def _keeps_the_argmax(merit: Callable, found: list[Minimiser], how: str, honest: bool) -> Verdict:
    for each in found:
        if each.unknown:
            return _no_zero(each)
        top = int(np.argmax(each.law))
        lead = _lead(each.logits, top)
        worst = int(np.argmin(lead))
        slack = 0.0
        if each.loose is not None and not each.at_infinity:
            slack = float(np.abs(_lead(each.logits[worst] + each.loose[worst], top) - lead[worst]).sum())
        if each.at_infinity and _indifferent(merit, each, top):
            law = plain(each.law.round(4))
            why = "and there the likeliest class and another may change places for less than going on changes"
            return Verdict(UNDECIDED, f"the infimum for P = {law} lies at infinity, {why}")
        if slack > 1e-6 and abs(lead[worst]) < slack:
            return Verdict(UNDECIDED, f"{_flat(each)}, and no class is known to lead there")
        if lead[worst] < 1e-6:
            return no(
                "the likeliest class does not lead at this minimiser: " + ("a tie" if lead[worst] > -1e-6 else "another does"),
                P=each.law,
                logits=each.logits[worst],
                **{_merit_name(honest): each.least},
            )
    return Verdict(YES, f"the likeliest class leads at every minimiser; {how}")


def _lead(z: np.ndarray, top: int) -> np.ndarray:
    """By how much a class leads the others, [M], in logits [M, V]."""
    return z[:, top] - np.delete(z, top, axis=1).max(axis=1)


def _indifferent(merit: Callable, minimiser: Minimiser, top: int) -> bool:
    """Whether at infinity the likeliest class changes places with another for about what is still gained twice as far out.

    That is little where there is an infimum; where there is none the merit falls without end, and no order is as good.
    """
    z, law = minimiser.logits, minimiser.law
    orders = np.tile(np.arange(len(law)), (len(law), 1))
    orders[:, top], orders[np.arange(len(law)), np.arange(len(law))] = np.arange(len(law)), top
    swapped = np.delete(z[:, orders], top, axis=1).reshape(-1, len(law))
    found = merit(np.concatenate([z, 2 * z, swapped]), np.tile(law, (2 * len(z) + len(swapped), 1)))
    here, further, others = np.split(found, [len(z), 2 * len(z)])
    gained = float(np.max(here - further))
    return 1e-12 < gained / (1 + abs(minimiser.least)) < 1e-3 and bool(others.min() < here.min() + 10 * gained)
