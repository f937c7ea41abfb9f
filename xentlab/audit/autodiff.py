"""Is the loss what the contract says, token by token, and does its gradient belong to its value?"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit.probe import STEP, UNDECIDED, YES, Probe, Verdict, central_differences, no
from xentlab.products import quickly


def elementwise(probe: Probe) -> Verdict:
    """One value a token, which no other token of the batch moves."""
    z, y = probe.points(scales=(1.0, 4.0), each=16, salt=1)
    other_z, other_y = probe.points(scales=(2.0, 6.0), each=16, salt=13)
    here = probe.value(z, y)
    if np.isnan(here).any():
        place = int(np.argmax(np.isnan(here)))
        shown = (
            f"the value is NaN at logits {z[place].round(4).tolist()}, target {y[place]}, and at {np.isnan(here).mean():.0%} of"
        )
        told = "no model can be trained on it. Are logits taken for probabilities? Take jax.nn.log_softmax of them first"
        return Verdict(UNDECIDED, f"{shown} {len(z)} ordinary points: {told}")
    few = here == here.astype(np.float32)
    if few.all() and len(np.unique(here)) > len(here) // 2:  # of a mere count of classes there are few
        return Verdict(
            UNDECIDED,
            "of float64 logits it makes what float32 holds, at all points: cast down inside and back, it has too few digits to "
            "be judged by. Let the cast only widen: logits.astype(jnp.promote_types(logits.dtype, jnp.float32))",
        )
    # The others as they come, all of them learnt, and none: what ranks its batch tells these apart.
    ahead = other_y[:, None] == np.arange(probe.vocab)
    for place, lead in itertools.product(range(0, len(z), 5), (0, 40, -40)):
        moved, targets = other_z + lead * ahead, other_y.copy()
        elsewhere = (place + 7) % len(z)
        for spot in (place, elsewhere):
            moved[spot], targets[spot] = z[place], y[place]
        there = probe.value(moved, targets)[[place, elsewhere]]
        if not np.isclose(here[place], there, rtol=1e-9, atol=1e-12 * probe.unit).all():
            return no(
                "the same token has another value beside other tokens, or in another place",
                logits=z[place],
                target=y[place],
                value=here[place],
                value_beside_others=there[0],
                value_in_another_place=there[1],
            )
    rows = _in_rows(probe, z, y)
    differ = ~np.isclose(here, rows, rtol=1e-9, atol=1e-12 * probe.unit)
    if differ.any():
        place = int(np.argmax(differ))
        shown = {"value_of_tokens": here[place], f"value_in_two_rows_of_{len(z) // 2}": rows[place]}
        return no(
            "a token of a batch [B, T] has another value than among tokens [N]", logits=z[place], target=y[place], **shown
        )
    kept = f"{-(-len(z) // 5)} tokens keep their value to 1e-9 in another place, and when all others change"
    return Verdict(YES, f"{kept}; all {len(z)} in two rows of a batch")


def _in_rows(probe: Probe, z: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The values of tokens [N] as a batch [2, N / 2]: what is right along one axis may not be along two."""
    with jax.enable_x64(True):
        logits, targets = jnp.asarray(z.reshape(2, -1, probe.vocab)), jnp.asarray(y.reshape(2, -1), jnp.int32)
        # A function of its own: JAX keeps what it compiles by the function, and what the loss closes over may have changed.
        compiled = jax.jit(lambda *batch: probe.loss(*batch), compiler_options=quickly(0))
        return np.asarray(compiled(logits, targets), np.float64).ravel()


def honest_autodiff(probe: Probe) -> Verdict:
    """Autodiff equals finite differences: no stop_gradient and no custom rule that says something else."""
    z, y = probe.points(scales=(0.5, 2.0, 6.0, 20.0), each=40, salt=2)
    field = probe.field(z, y)
    step = 1e-6
    difference, finer = (central_differences(probe.value, z, y, each) for each in (step, step / 2))
    size = probe.unit + np.abs(field).max(axis=-1, keepdims=True) + np.abs(probe.value(z, y))[:, None]
    error = (np.abs(field - difference) / size).max(axis=-1)
    if np.isnan(error).any():
        place = int(np.flatnonzero(np.isnan(error))[0])
        return Verdict(UNDECIDED, f"value or gradient is NaN at z = {z[place].round(4).tolist()}, target {y[place]}")
    wrong = error > 1e-6
    # A kink or a jump inside a difference, or rounding, shows in half the step; a rule that lies does not.
    settled = (np.abs(finer - difference) / size).max(axis=-1) < 0.1 * error
    lies = wrong & (settled if wrong.mean() < 0.05 else True)
    if lies.any():
        place = int(np.argmax(np.where(lies, error, 0)))
        return no(
            f"autodiff and central differences (step {step:g}) disagree at {lies.sum()} of {len(z)} points",
            logits=z[place],
            target=y[place],
            autodiff=field[place],
            differences=difference[place],
        )
    return Verdict(YES, f"autodiff equals central differences to 1e-6 at {(~wrong).sum()} of {len(z)} points")


def conservative(probe: Probe) -> Verdict:
    """The gradient field is some function's gradient: its Jacobian is symmetric."""
    z, y = probe.points(scales=(0.5, 2.0, 6.0), each=30, salt=3)
    jacobian, finer = probe.jacobian(z, y), probe.jacobian(z, y, 0.5e-5)
    size = probe.unit + np.abs(jacobian).max(axis=(1, 2))
    # Great at a kink; else the field's rounding, which is that of what cancels in it, over the step.
    scale = max(probe.unit, float(np.abs(probe.field(z, y)).max()))
    error = (np.abs(jacobian - finer).max(axis=(1, 2)) + 2e-15 / STEP * scale) / size
    smooth, told = error < 1e-4, error < 1e-6
    twist = np.abs(jacobian - np.swapaxes(jacobian, 1, 2)).max(axis=(1, 2)) / size - 10 * error
    worst = int(np.argmax(np.where(smooth, twist, -1)))
    if twist[worst] > 1e-5:
        return no(
            "the field's Jacobian is not symmetric: no function has this gradient",
            logits=z[worst],
            target=y[worst],
            jacobian=jacobian[worst],
        )
    if told.sum() < 10:
        return Verdict(UNDECIDED, f"the field is smooth, and known to six digits, at only {told.sum()} of {len(z)} points")
    return Verdict(YES, f"the Jacobian is symmetric to 1e-5 at {told.sum()} smooth points")


def rejects_bad_targets(probe: Probe) -> Verdict:
    """A target outside [0, V) raises, or gives NaN for its token; it never scores another class."""
    z = np.tile(np.resize([0.3, -1.0, 0.8, 0.1], probe.vocab), (7, 1))
    # Other libraries leave out a token whose target is -100.
    targets = np.array([-1, probe.vocab, probe.vocab + 7, -probe.vocab, 2**31 - 1, -100, -(2**31)], np.int32)
    value = probe.value(z, targets)
    scored = ~np.isnan(value)
    if scored.any():
        try:  # what is compiled cannot raise
            probe.loss(jnp.asarray(z, jnp.float32), jnp.asarray(targets))
        except Exception as error:  # whatever it raises, it does not score
            return Verdict(YES, f"raises {type(error).__name__}")
        place = int(np.flatnonzero(scored)[0])
        return no("a target outside the vocabulary gets a value", logits=z[place], target=targets[place], value=value[place])
    return Verdict(YES, f"NaN at the targets {targets.tolist()} of a vocabulary of {probe.vocab}")
