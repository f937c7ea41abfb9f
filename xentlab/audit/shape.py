"""Symmetries, curvature and growth: what kind of function of the logits the loss is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import numpy as np

from xentlab.audit.probe import NO, UNDECIDED, YES, Probe, Verdict, no

ROUNDING = 1e-9  # of a value, relative; beside 0, of the gradient's size
HALVINGS, STEEPER = 30, 5.0  # of a chord; by how much a slope grows from one ten of them to the next
SHOWN = 15  # halvings after which its ends are shown: further on ten digits would not tell them apart
LEAD = 1e4  # that is certainty, for a temperature of hundreds too
DISTANCES, NEAR = [1e2, 1e3, 1e4, 1e5, 1e6], [1e-2, 1e-3, 1e-4, 1e-5, 1e-6]  # along rays: away from 0, and towards it
KEEPS_ON, FADES = 0.9, 0.2  # of a decade's growth, the next decade's: of log x it is 1, of 1 - 1/x a tenth
# Where what lies between is asked again: of log log x each of these adds as much as the one before, of what has a bound less.
FURTHER, FADES_FURTHER = [1e6, 1e12, 1e24, 1e48, 1e96, 1e192], 0.6


def _same(probe: Probe, moved: np.ndarray, targets: np.ndarray, z: np.ndarray, y: np.ndarray, what: str, kept: str) -> Verdict:
    before, after = probe.value(z, y), probe.value(moved, targets)
    finite = np.isfinite(before) & np.isfinite(after)
    differ = finite & ~np.isclose(before, after, rtol=1e-8, atol=1e-10 * probe.unit)
    if differ.any():
        place = int(np.argmax(np.where(differ, np.abs(before - after), -1)))
        return no(
            what,
            logits=z[place],
            target=y[place],
            value=before[place],
            other_logits=moved[place],
            other_target=targets[place],
            other_value=after[place],
        )
    if finite.sum() < len(z) // 2:
        return Verdict(UNDECIDED, f"only {finite.sum()} of {len(z)} points have finite values")
    return Verdict(YES, f"{kept} at {finite.sum()} points, relative 1e-8")


def _greatest(values: np.ndarray) -> int:
    """Where the greatest is, of those that are numbers."""
    return int(np.argmax(np.where(np.isnan(values), -np.inf, values)))


def _scale(probe: Probe, field: np.ndarray) -> float:
    """The greatest gradient among these points, the unit or more: what rounding is relative to."""
    return max(probe.unit, float(np.abs(field[np.isfinite(field)]).max(initial=0.0)))


def shift_invariant(probe: Probe) -> Verdict:
    """L(z + c) = L(z)."""
    z, y = probe.points(each=20, salt=4)
    shift = np.random.default_rng(probe.seed).uniform(-4, 4, (len(z), 1))
    return _same(probe, z + shift, y, z, y, "a shift of all logits changes the value", "a shift changes nothing")


def permutation_equivariant(probe: Probe) -> Verdict:
    """Renaming the classes, targets too, changes nothing."""
    z, y = probe.points(scales=(1.0, 4.0), each=40, salt=5)
    rng = np.random.default_rng(probe.seed)
    order = np.stack([rng.permutation(probe.vocab) for _ in z])
    renamed = np.take_along_axis(z, order, axis=1)
    targets = np.argmax(order == y[:, None], axis=1)
    return _same(probe, renamed, targets, z, y, "renaming the classes changes the value", "renaming changes nothing")


def local(probe: Probe) -> Verdict:
    """The value depends on the logits through the softmax probability of the target alone."""
    if (moved := shift_invariant(probe)).value is NO:
        return Verdict(NO, "a shift of all logits changes the value, and leaves p_y as it is", moved.witness)
    z, y = probe.points(scales=(1.0, 4.0, 20.0), each=40, salt=6)
    off = np.arange(probe.vocab) != y[:, None]
    rest = np.logaddexp.reduce(np.where(off, z, -np.inf), axis=1, keepdims=True)
    even = np.where(off, rest - np.log(probe.vocab - 1), z) + 0.9
    what = "two points of equal p_y have two values"
    return _same(probe, even, y, z, y, what, "the value stays the same while p_y does")


def zero_at_certainty(probe: Probe) -> Verdict:
    """L tends to 0 as p_y tends to 1, on each of three paths, z_y up, the rivals down, and both, for every target."""
    y = np.arange(probe.vocab)
    for name, up, down in (("z_y up", 1, 0), ("rivals down", 0, 1), ("both", 1, 1)):
        z = LEAD * np.where(np.eye(probe.vocab, dtype=bool), up, -down)
        value = probe.value(z, y)
        off = ~(np.abs(value) < ROUNDING * probe.unit)
        if off.any():
            worst = int(np.argmax(off))
            return no(f"not 0 at certainty, on the path: {name}", path=name, logits=z[worst], target=worst, value=value[worst])
    return Verdict(YES, f"below {ROUNDING:g} at a lead of {LEAD:g} on three paths, for every target")


def monotone(probe: Probe, honest: bool = True) -> Verdict:
    """The loss never rises as z_y rises. honest: whether the gradient is the value's, so that the value may be asked too."""
    z, y = probe.points(each=50, salt=7)
    # And where the target leads rivals that are alike, at any level of theirs: random logits seldom are.
    levels = np.linspace(-20, 20, 17)
    above, below = (each[levels[:, None] > levels] for each in np.meshgrid(levels, levels, indexing="ij"))
    leads = np.concatenate([above - below, np.linspace(1, 20, 40)])
    targets = np.arange(len(leads)) % probe.vocab
    led = np.concatenate([below, np.zeros(40)])[:, None] + leads[:, None] * (np.arange(probe.vocab) == targets[:, None])
    z, y = np.concatenate([z, led]), np.concatenate([y, targets])
    field = probe.field(z, y)
    slope = field[np.arange(len(z)), y]
    # Relative to the point's own gradient, but above the rounding of probabilities near 1.
    slope = np.where(slope > 1e-14 * _scale(probe, field), slope / (1e-300 + np.abs(field).max(axis=1)), 0)
    worst = _greatest(slope)
    if slope[worst] > 1e-6:
        return no("dL/dz_y > 0", logits=z[worst], target=y[worst], dL_dlogit=field[worst, y[worst]])
    if honest:  # across a jump no gradient sees it
        rise = np.random.default_rng((probe.seed, 15)).uniform(0, 6, len(z))
        higher = z + rise[:, None] * (np.arange(probe.vocab) == y[:, None])
        before, after = probe.value(z, y), probe.value(higher, y)
        rise = after - before - ROUNDING * (probe.unit + np.abs(before) + np.abs(after))
        worst = _greatest(rise)
        if rise[worst] > 0:
            return no(
                "the value is greater at a greater z_y",
                logits=z[worst],
                target=y[worst],
                value=before[worst],
                other_logits=higher[worst],
                other_value=after[worst],
            )
    return Verdict(YES, f"dL/dz_y <= 0 at {len(z)} points with |z| <= 20")


def _goes_on(most: np.ndarray, unit: float, fades: float = FADES) -> bool | None:
    """Whether a greatest size, one at each of several distances, grows without end; None where that cannot be told."""
    if (most == np.inf).any():
        return True
    with np.errstate(invalid="ignore"):
        last = np.diff(most)[-3:]
    noise = ROUNDING * (unit + np.abs(most[np.isfinite(most)]).max(initial=0))
    if (last > noise).all() and (last[1:] >= KEEPS_ON * last[:-1]).all():
        return True
    return False if last[-1] <= max(noise, fades * last[-2]) else None


def _growth(probe: Probe, size: Callable, what: str, name: str, falls: bool = True) -> Verdict:
    """Whether size(z, y) [N] stays finite along rays: it grows where each decade adds about as much as the one before.

    To the greatest of all rays, or takes from the least, if it may fall: by what is added, so that a constant in a loss changes
    nothing. Once a target, for the greatest of one may hide another's growth; what cannot be told yet is asked further out, and
    then of all together, whose greatest is less a matter of chance.
    """
    rng, vocab = np.random.default_rng((probe.seed, 8)), probe.vocab
    rays = np.concatenate(
        [np.eye(vocab), -np.eye(vocab), np.ones((1, vocab)), -np.ones((1, vocab)), rng.normal(size=(30, vocab))]
    )
    rays, y = np.repeat(rays, vocab, axis=0), np.tile(np.arange(vocab), len(rays))

    @functools.cache
    def sizes(*distances):
        with np.errstate(all="ignore"):
            return np.stack([size(distance * rays, y) for distance in distances])

    def along(distances, sign, asked):
        return np.where(np.isnan(sizes(*distances)) | ~asked, -np.inf, sign * sizes(*distances))

    slow, targets = [], [*(y == each for each in range(vocab)), np.ones(len(y), bool)]
    ways = itertools.product(((1, "grows"), (-1, "falls"))[: 1 + falls], targets, ((DISTANCES, ""), (NEAR, " towards 0")))
    for (sign, word), asked, (distances, where) in ways:
        ends = along(distances, sign, asked)
        most = ends.max(axis=1)
        goes_on = _goes_on(most, probe.unit)
        if goes_on is None and not where:
            distances, ends = FURTHER, along(FURTHER, sign, asked)
            goes_on = _goes_on(ends.max(axis=1), probe.unit, FADES_FURTHER)
        if goes_on is None and asked.all() and not where:
            slow.append(f"{what} {word} ever more slowly, by {', '.join(f'{step:.3g}' for step in np.diff(most))} a decade")
        if goes_on:
            endless = np.flatnonzero(ends.max(axis=1) == np.inf)
            far = max(1, endless[0]) if len(endless) else len(distances) - 1
            ray = ends[far].argmax()
            return no(
                f"{what} {word} without end along a ray{where}",
                logits=distances[far - 1] * rays[ray],
                target=y[ray],
                **{name: sizes(*distances)[far - 1, ray]},
                other_logits=distances[far] * rays[ray],
                other_target=y[ray],
                **{f"other_{name}": sizes(*distances)[far, ray]},
            )
    every = sizes(*DISTANCES, *NEAR)
    if np.isnan(every).any():
        place, ray = np.argwhere(np.isnan(every))[0]
        at = ((DISTANCES + NEAR)[place] * rays[ray]).round(8).tolist()
        return Verdict(
            UNDECIDED,
            f"{what} is NaN at logits {at}, target {y[ray]}, in float64 too: has "
            "p become 0 before its logarithm was taken? jax.nn.log_softmax never does",
        )
    if slow:
        return Verdict(UNDECIDED, f"{slow[-1]} from 10^2 to 10^6")
    way = f"along {len(rays)} rays from 10^2 to 10^6, and from 10^-2 to 10^-6"
    return Verdict(YES, f"{what} stays within {every.min():.4g} and {every.max():.4g} {way}")


def bounded(probe: Probe) -> Verdict:
    """The value stays between two numbers."""
    return _growth(probe, lambda z, y: probe.value(z, y), "the value", "value")


def lipschitz(probe: Probe, honest: bool = True) -> Verdict:
    """The gradient's length is bounded, and so is the value's slope along chords: at a jump there is no gradient to see.

    honest: whether the gradient is the value's, so that the value may be asked too.
    """
    grows = _growth(probe, lambda z, y: np.linalg.norm(probe.field(z, y), axis=1), "the gradient", "gradient_norm", falls=False)
    steep = _steep(probe) if honest and grows.value is YES else None
    return steep or grows


@np.errstate(invalid="ignore", over="ignore")
def _steep(probe: Probe) -> Verdict | None:
    """A place where the value's slope grows without end as a chord is halved, each time to its steeper half."""
    (a, y), (b, _) = probe.points(each=40, salt=16), probe.points(each=40, salt=17)
    at_a, at_b, slopes = probe.value(a, y), probe.value(b, y), []
    for halving in range(HALVINGS):
        if halving == SHOWN:
            shown = {"a": a, "b": b, "target": y, "value_a": at_a, "value_b": at_b}
        middle = (a + b) / 2
        at_middle = probe.value(middle, y)
        left = np.abs(at_middle - at_a) >= np.abs(at_b - at_middle)
        a, b = np.where(left[:, None], a, middle), np.where(left[:, None], middle, b)
        at_a, at_b = np.where(left, at_a, at_middle), np.where(left, at_middle, at_b)
        slopes.append(np.abs(at_b - at_a) / np.linalg.norm(b - a, axis=1))
    slopes = np.stack(slopes)
    # A thousand times shorter each: where there is a slope it has come to it, at a jump it is a thousand times as great.
    growth = np.min([slopes[-1] / slopes[-11], slopes[-11] / slopes[-21]], axis=0)
    growth = np.where(np.abs(at_b - at_a) > ROUNDING * (probe.unit + np.abs(at_a) + np.abs(at_b)), growth, 0)
    worst = _greatest(growth)
    if not growth[worst] > STEEPER:
        return None
    further = f"{HALVINGS - SHOWN} halvings on it is {slopes[-1, worst]:.3g}"
    said = f"between these points the value's slope grows without end: {further}"
    return no(said, **{name: each[worst] for name, each in shown.items()})


def convex(probe: Probe, honest: bool = True, domain: float = 20.0) -> Verdict:
    """Convex in z where |z| <= 20: along chords, and by the smallest curvature that a climb over points finds.

    A field that is no value's slope (a stop_gradient: honest is False) is judged by its monotonicity, which is the same thing;
    any other by its values too, for across a jump no gradient sees it.
    """
    scales = (0.5, 2.0, 6.0, 12.0, domain)
    (a, y), (b, _) = probe.points(scales, each=120, salt=9), probe.points(scales, each=120, salt=10)
    fields = probe.field(a, y), probe.field(b, y)
    along = np.einsum("nv,nv->n", fields[0] - fields[1], a - b)
    size = 1e-300 + np.einsum("nv,nv->n", np.abs(fields[0]) + np.abs(fields[1]), np.abs(a - b))
    # Where all gradients are rounding, their products are.
    size = size + 1e-6 * _scale(probe, np.concatenate(fields)) * np.abs(a - b).max(axis=1)
    worst = int(np.argmin(along / size))
    domain_words = f"on |z| <= {domain:g}" + ("" if honest else ", of the gradient's field and not of the value")
    if along[worst] / size[worst] < -1e-7:
        return no(
            f"the gradient turns back along a chord {domain_words}: (g(a) - g(b)).(a - b) < 0",
            a=a[worst],
            b=b[worst],
            target=y[worst],
            product=along[worst],
        )
    if honest:
        ends, middle = (probe.value(a, y), probe.value(b, y)), probe.value((a + b) / 2, y)
        excess = middle - sum(ends) / 2 - ROUNDING * (probe.unit + np.abs(ends[0]) + np.abs(ends[1]))
        worst = _greatest(excess)
        if excess[worst] > 0:
            return no(
                f"the value in the middle of a chord is above its ends' mean {domain_words}",
                a=a[worst],
                b=b[worst],
                target=y[worst],
                value_a=ends[0][worst],
                value_b=ends[1][worst],
                value_middle=middle[worst],
            )
    for step in (1e-4, 1e-5):  # what is within the first one's error the next one settles
        z, y, curvature, vector = _least_curvature(probe, domain, step)
        if curvature < -1e-6 or curvature >= 0:
            break
    if curvature < -1e-6:
        return no(
            f"a direction of negative curvature {domain_words}; relative to the Hessian's size",
            logits=z,
            target=y,
            direction=vector,
            curvature=curvature,
        )
    if curvature < 0:
        return Verdict(UNDECIDED, f"the least relative curvature found is {curvature:.1e}, within the error of differences")
    return Verdict(YES, f"{len(a)} chords and a climb over Hessians found none that turns down, {domain_words}")


def _least_curvature(probe: Probe, domain: float, step: float) -> tuple[np.ndarray, int, float, np.ndarray]:
    """The smallest eigenvalue, relative to the Hessian's size, of random starts that climb towards smaller ones."""
    rng = np.random.default_rng((probe.seed, 11))
    z, y = probe.points((1.0, 5.0, 12.0, domain), each=12, salt=12)
    # And near 0, and where all logits are about alike: uniform draws are not.
    level = np.array([0, -0.95, -0.5, -0.15, -0.05, 0.05, 0.15, 0.5, 0.95]) * domain
    alike = np.concatenate([scale * rng.normal(size=(len(level), probe.vocab)) + level[:, None] for scale in (0.05, 0.3)])
    z, y = np.concatenate([z, np.clip(alike, -domain, domain)]), np.concatenate([y, rng.integers(0, probe.vocab, len(alike))])
    best, vectors = _relative_curvature(probe, z, y, step)
    reach = domain / 3
    for _ in range(12):
        tried = np.clip(z + reach * rng.normal(size=z.shape), -domain, domain)
        found, directions = _relative_curvature(probe, tried, y, step)
        better = found < best
        z, best = np.where(better[:, None], tried, z), np.where(better, found, best)
        vectors = np.where(better[:, None], directions, vectors)
        reach *= 0.75
    place = int(np.argmin(best))
    return z[place], int(y[place]), float(best[place]), vectors[place]


def _relative_curvature(probe: Probe, z: np.ndarray, y: np.ndarray, step: float) -> tuple[np.ndarray, np.ndarray]:
    jacobian, finer = probe.jacobian(z, y, step), probe.jacobian(z, y, step / 2)
    size, scale = np.abs(jacobian).max(axis=(1, 2)), _scale(probe, probe.field(z, y))
    symmetric = (jacobian + np.swapaxes(jacobian, 1, 2)) / 2
    # Where two steps disagree there is a kink inside one of them: chords have judged those.
    sound = (np.abs(jacobian - finer).max(axis=(1, 2)) < 1e-3 * size) & (size > 1e-9 * scale) & np.isfinite(size)
    values, vectors = np.linalg.eigh(np.where(sound[:, None, None], symmetric, np.eye(probe.vocab)))
    size = np.where(sound, size, 1)
    # The differences' own error: h^2 relative to the size, and the field's rounding over h. What it could explain, it does.
    noise = 1e-7 + 2e-15 / step * scale / size
    return np.where(sound, np.minimum(values[:, 0] / size + noise, 0), 0.0), vectors[:, :, 0]
