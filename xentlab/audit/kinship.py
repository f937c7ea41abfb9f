"""Which loss of the catalogue has the same gradient, up to a factor, at a setting that it was tested at or at any other."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit.probe import Probe, Verdict
from xentlab.catalogue import LOSSES, is_catalogued, resolve
from xentlab.contract import LabError, Loss, facts_of, name_of, settings_of, unwrapped, value_and_gradient
from xentlab.losses.likelihood import nll
from xentlab.names import with_settings
from xentlab.products import quickly

POINTS = 6  # a class: the target leads in six, whatever their number
SCALES = (0.5, 2.0, 6.0, 20.0)  # of their logits: what clips a small p is another loss only there
LEADS = (20.0, -20.0, 60.0, -60.0, -200.0)  # of a target over rivals about 0: what turns there alone is another loss
TRIED = np.concatenate([-np.geomspace(0.9, 0.1, 4), np.geomspace(1e-3, 10, 20)])  # settings, between which the search begins
DIGITS = (3, 6, 9, 12, 17)  # of a setting: the fewest that do
_ONCE = threading.Lock()  # audits may run side by side; the table is made once


@functools.cache
def _catalogue_fields(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """The gradient [N, V] of every loss of the catalogue at every setting, but a prior's: made for another vocabulary."""
    z, y = _batch(seed, vocab)
    settings = ((loss, each) for loss in LOSSES.values() for each in facts_of(loss).settings)
    found = [with_settings(loss, each) for loss, each in settings if "prior" not in each]

    # All in one program, which takes a third of the time of op by op, and compiled carelessly: it runs once.
    @functools.partial(jax.jit, compiler_options=quickly(0))
    def fields(z):
        return {name_of(loss): value_and_gradient(loss, z, jnp.asarray(y))[1] for loss in found}

    with jax.enable_x64(True):
        return jax.device_get(fields(jnp.asarray(z)))


def _batch(seed: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, 30))
    points = POINTS * vocab
    scale = np.resize(SCALES, points)[:, None]
    z, y = scale * rng.normal(size=(points, vocab)), rng.integers(0, vocab, points)
    far = np.arange(len(LEADS)) % vocab
    apart = rng.normal(size=(len(LEADS), vocab)) + np.array(LEADS)[:, None] * (np.arange(vocab) == far[:, None])
    return np.concatenate([z, apart]), np.concatenate([y, far]).astype(np.int32)


@np.errstate(all="ignore")  # of a gradient that is infinite far out, or of a setting that is none
def same_gradient_as(probe: Probe) -> Verdict:
    """A catalogue loss of which this one's gradient is a multiple, as {"loss": .., "factor": ..}, or None."""
    field = probe.field(*_batch(probe.seed, probe.vocab))
    me = _as_set(probe.loss) if is_catalogued(probe.loss) else None
    with _ONCE:
        catalogue = _catalogue_fields(probe.seed, probe.vocab)
        families, fields_at = _families(), _family_fields(probe.seed, probe.vocab)
    for name, theirs in catalogue.items():
        if _as_set(resolve(name, check=False)) != me and (factor := _factor(field, theirs)):
            return _kin(name, factor, len(field))
    # Nearly all of them have nll as a limit, which is known by its name.
    sound = bool(np.isfinite(field).all() and field.any()) and me != _as_set(nll)
    others = [place for place, (loss, _) in enumerate(families) if sound and (me is None or me[0] is not loss)]
    for place, setting, theirs in _nearest(field, fields_at, others):
        if (factor := _factor(field, theirs)) and (name := _allowed(*families[place], setting, probe.vocab)):
            return _kin(name, factor, len(field))
    searched = f", and from {len(others)} of these at the setting where they are nearest" if others else ""
    return Verdict(None, f"differs from all {len(catalogue)} losses and settings at {len(field)} points{searched}")


def _kin(name: str, factor: float, points: int) -> Verdict:
    return Verdict({"loss": name, "factor": float(f"{factor:.9g}")}, f"equal at {points} points to 1e-8")


def _factor(field: np.ndarray, theirs: np.ndarray) -> float | None:
    """The positive number of which theirs [N, V] is to be a multiple to be this field; None if it is none."""
    norm = float(np.sum(theirs * theirs))
    factor = float(np.sum(field * theirs)) / norm if norm else 0.0
    rounding = 1e-10 * factor * float(np.median(np.abs(theirs).max(axis=1)))
    return factor if factor > 0 and np.allclose(field, factor * theirs, rtol=1e-8, atol=rounding) else None


@functools.cache
def _families() -> list[tuple[Loss, str]]:
    """The losses of the catalogue with one setting, a number, and what it is called."""
    number = lambda loss: [key for key, each in inspect.signature(loss).parameters.items() if type(each.default) is float]
    return [(loss, *keys) for loss in LOSSES.values() if len(keys := number(loss)) == 1]


@functools.cache
def _family_fields(seed: int, vocab: int) -> Callable[[float], np.ndarray]:
    """The gradients [families, N, V] of them all at one setting."""
    z, y = _batch(seed, vocab)

    @functools.partial(jax.jit, compiler_options=quickly(0))
    def fields(setting, z):
        each = [functools.partial(loss, **{key: setting}) for loss, key in _families()]
        return jnp.stack([value_and_gradient(loss, z, jnp.asarray(y))[1] for loss in each])

    def at(setting):
        with jax.enable_x64(True):
            return np.asarray(fields(jnp.float64(setting), jnp.asarray(z)))

    return at


def _nearest(field: np.ndarray, fields_at: Callable[[float], np.ndarray], families: list[int]):
    """Families and settings, with their fields, which are multiples of this one but for the setting's digits."""
    from scipy.optimize import least_squares

    if not families:
        return
    size = np.abs(field).max(axis=1, keepdims=True)
    # A point counts as much as another, but for those where the gradient is rounding.
    counts = np.where(size > 1e-6 * np.median(size), 1 / np.maximum(size, 1e-300), 0)

    def off(theirs):
        ours, theirs = (counts * field).ravel(), np.nan_to_num(counts * theirs, posinf=0.0, neginf=0.0).ravel()
        factor = max(0.0, ours @ theirs / max(theirs @ theirs, 1e-300))
        return (ours - factor * theirs) / np.linalg.norm(ours)

    tried = np.array([[np.linalg.norm(off(theirs)) for theirs in fields_at(setting)[families]] for setting in TRIED])
    for family, begun in zip(families, TRIED[np.argmin(tried, axis=0)], strict=True):
        misfit = lambda at, family=family: off(fields_at(at[0])[family])
        found = least_squares(misfit, begun, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=30)
        if np.linalg.norm(found.fun) < 1e-6:
            for digits in DIGITS:
                setting = float(f"{found.x[0]:.{digits}g}")
                yield family, setting, fields_at(setting)[family]


def _allowed(loss: Loss, key: str, setting: float, vocab: int) -> str | None:
    """The name of a loss at a setting, if it takes that."""
    found = functools.partial(loss, **{key: int(setting) if setting == int(setting) else setting})
    try:
        jax.eval_shape(found, jax.ShapeDtypeStruct((vocab,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32))
    except LabError:
        return None
    return name_of(found)


def _as_set(loss):
    """The function of one of the catalogue, and all of its settings: focal, focal(gamma=2) and focal(gamma=2.0) are one."""
    function, parameters = unwrapped(loss)[0], inspect.signature(unwrapped(loss)[0]).parameters.values()
    return function, {each.name: each.default for each in parameters if each.default is not each.empty} | settings_of(loss)
