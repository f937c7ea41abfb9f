"""Which loss of the catalogue has the same gradient, up to a factor."""

from __future__ import annotations

import functools
import inspect
import threading

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit.probe import Probe, Verdict
from xentlab.catalogue import LOSSES, is_catalogued, resolve
from xentlab.contract import facts_of, name_of, settings_of, unwrapped, value_and_gradient
from xentlab.names import with_settings
from xentlab.products import quickly

POINTS = 6  # a class: the target leads in six, whatever their number
SCALES = (0.5, 2.0, 6.0, 20.0)  # of their logits: what clips a small p is another loss only there
LEADS = (20.0, -20.0, 60.0, -60.0, -200.0)  # of a target over rivals about 0: what turns there alone is another loss
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


@np.errstate(over="ignore", invalid="ignore")  # of a gradient that is infinite far out
def same_gradient_as(probe: Probe) -> Verdict:
    """A catalogue loss of which this one's gradient is a multiple, as {"loss": .., "factor": ..}, or None."""
    field = probe.field(*_batch(probe.seed, probe.vocab))
    me = _as_set(probe.loss) if is_catalogued(probe.loss) else None
    with _ONCE:
        catalogue = _catalogue_fields(probe.seed, probe.vocab)
    for name, theirs in catalogue.items():
        if _as_set(resolve(name, check=False)) == me:
            continue
        norm = float(np.sum(theirs * theirs))
        factor = float(np.sum(field * theirs)) / norm if norm else 0.0
        rounding = 1e-10 * factor * float(np.median(np.abs(theirs).max(axis=1)))
        if factor > 0 and np.allclose(field, factor * theirs, rtol=1e-8, atol=rounding):
            return Verdict({"loss": name, "factor": float(f"{factor:.9g}")}, f"equal at {len(field)} points to 1e-8")
    return Verdict(None, f"differs from all {len(catalogue)} losses and settings at {len(field)} points")


def _as_set(loss):
    """The function of one of the catalogue, and all of its settings: focal, focal(gamma=2) and focal(gamma=2.0) are one."""
    function, parameters = unwrapped(loss)[0], inspect.signature(unwrapped(loss)[0]).parameters.values()
    return function, {each.name: each.default for each in parameters if each.default is not each.empty} | settings_of(loss)
