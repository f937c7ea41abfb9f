"""Symmetries, curvature and growth: what kind of function of the logits the loss is."""

from __future__ import annotations

import numpy as np

from xentlab.audit.probe import UNDECIDED, VOCAB, YES, Probe, Verdict, no

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
ROUNDING = 1e-9  # of a value, relative


def _same(probe: Probe, moved: np.ndarray, targets: np.ndarray, z: np.ndarray, y: np.ndarray, what: str, kept: str) -> Verdict:
    before, after = probe.value(z, y), probe.value(moved, targets)
    finite = np.isfinite(before) & np.isfinite(after)
    differ = finite & ~np.isclose(before, after, **CLOSE)
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


def shift_invariant(probe: Probe) -> Verdict:
    """L(z + c) = L(z)."""
    z, y = probe.points(each=20, salt=4)
    shift = np.random.default_rng(probe.seed).uniform(-4, 4, (len(z), 1))
    return _same(probe, z + shift, y, z, y, "a shift of all logits changes the value", "a shift changes nothing")


def permutation_equivariant(probe: Probe) -> Verdict:
    """Renaming the classes, targets too, changes nothing."""
    z, y = probe.points(scales=(1.0, 4.0), each=40, salt=5)
    rng = np.random.default_rng(probe.seed)
    order = np.stack([rng.permutation(VOCAB) for _ in z])
    renamed = np.take_along_axis(z, order, axis=1)
    targets = np.argmax(order == y[:, None], axis=1)
    return _same(probe, renamed, targets, z, y, "renaming the classes changes the value", "renaming changes nothing")


def local(probe: Probe) -> Verdict:
    """The value depends on the logits through the softmax probability of the target alone."""
    z, y = probe.points(scales=(1.0, 4.0), each=40, salt=6)
    off = np.arange(VOCAB) != y[:, None]
    rest = np.logaddexp.reduce(np.where(off, z, -np.inf), axis=1, keepdims=True)
    even = np.where(off, rest - np.log(VOCAB - 1), z) + 0.9
    what = "two points of equal p_y have two values"
    return _same(probe, even, y, z, y, what, "the value stays the same while p_y does")


def zero_at_certainty(probe: Probe) -> Verdict:
    """L tends to 0 as p_y tends to 1, on each of three paths: z_y up, the rivals down, and both."""
    for name, up, down in (("z_y up", 1, 0), ("rivals down", 0, 1), ("both", 1, 1)):
        gap = np.array([100.0, 400.0])
        z = -down * gap[:, None] * np.ones(VOCAB)
        z[:, 0] = up * gap
        value = probe.value(z, np.zeros(2, int))
        if not (np.abs(value) < 1e-9).all():
            return no(f"not 0 at certainty, on the path: {name}", path=name, logits=z[1], target=0, value=value[1])
    return Verdict(YES, "below 1e-9 at a lead of 400 on three paths")


def monotone(probe: Probe, honest: bool = True) -> Verdict:
    """The loss never rises as z_y rises. honest: whether the gradient is the value's, so that the value may be asked too."""
    z, y = probe.points(each=50, salt=7)
    far = np.zeros((40, VOCAB))
    far[:, 0] = np.linspace(1, 20, 40)
    z, y = np.concatenate([z, far]), np.concatenate([y, np.zeros(40, int)])
    field = probe.field(z, y)
    slope = field[np.arange(len(z)), y] / (1e-300 + np.abs(field).max(axis=1))
    worst = int(np.argmax(slope))
    # Relative to the point's own gradient, but above the rounding of probabilities near 1.
    if slope[worst] > 1e-6 and field[worst, y[worst]] > 1e-14:
        return no("dL/dz_y > 0", logits=z[worst], target=y[worst], dL_dlogit=field[worst, y[worst]])
    if honest:  # across a jump no gradient sees it
        higher = z + np.random.default_rng((probe.seed, 15)).uniform(0, 6, len(z))[:, None] * (np.arange(VOCAB) == y[:, None])
        before, after = probe.value(z, y), probe.value(higher, y)
        rise = after - before - ROUNDING * (1 + np.abs(before) + np.abs(after))
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


def _along_rays(probe: Probe, size) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, int] | None]:
    """The greatest size [3] over rays at distances 10^2, 10^3 and 10^4, and the points [3, V] and targets [3] where.

    And a point and a target where it is no number, if there are such.
    """
    rng = np.random.default_rng((probe.seed, 8))
    rays = np.concatenate(
        [np.eye(VOCAB), -np.eye(VOCAB), np.ones((1, VOCAB)), -np.ones((1, VOCAB)), rng.normal(size=(30, VOCAB))]
    )
    rays, y = np.repeat(rays, VOCAB, axis=0), np.tile(np.arange(VOCAB), len(rays))
    found, no_number = [], None
    for distance in (1e2, 1e3, 1e4):
        with np.errstate(all="ignore"):
            sizes = size(distance * rays, y)
        if np.isnan(sizes).any() and no_number is None:
            place = int(np.argmax(np.isnan(sizes)))
            no_number = distance * rays[place], int(y[place])
        place = _greatest(sizes)
        found.append((sizes[place], distance * rays[place], y[place]))
    return *(np.array(column) for column in zip(*found, strict=True)), no_number


def _growth(probe: Probe, size, what: str, name: str) -> Verdict:
    sizes, z, y, no_number = _along_rays(probe, size)
    # A fifth more: random rays cross a bump at some distances and not at others, and a logarithm grows by a third.
    grown = [i for i in (1, 2) if not sizes[i] <= 1.2 * sizes[:i].max() + 1e-9 or np.isinf(sizes[i])]
    if grown:
        far = grown[0]
        return no(
            f"{what} grows without end along a ray",
            logits=z[far - 1],
            target=y[far - 1],
            **{name: sizes[far - 1]},
            other_logits=z[far],
            other_target=y[far],
            **{f"other_{name}": str(sizes[far]) if np.isinf(sizes[far]) else sizes[far]},
        )
    if no_number:
        return Verdict(
            UNDECIDED,
            f"{what} is NaN at logits {no_number[0].round(4).tolist()}, target {no_number[1]}, in float64 too: has p become 0 "
            "before its logarithm was taken? jax.nn.log_softmax never does",
        )
    return Verdict(YES, f"{what} stays at {sizes[2]:.4g} along {VOCAB * 40} rays out to 10^4")


def bounded(probe: Probe) -> Verdict:
    """sup L is finite."""
    return _growth(probe, lambda z, y: probe.value(z, y), "the value", "value")


def lipschitz(probe: Probe) -> Verdict:
    """The gradient's length is bounded."""
    return _growth(probe, lambda z, y: np.linalg.norm(probe.field(z, y), axis=1), "the gradient", "gradient_norm")


def convex(probe: Probe, honest: bool = True, domain: float = 20.0) -> Verdict:
    """Convex in z where |z| <= 20: along chords, and by the smallest curvature that a climb over points finds.

    A field that is no value's slope (a stop_gradient: honest is False) is judged by its monotonicity, which is the same thing;
    any other by its values too, for across a jump no gradient sees it.
    """
    scales = (0.5, 2.0, 6.0, 12.0, domain)
    (a, y), (b, _) = probe.points(scales, each=120, salt=9), probe.points(scales, each=120, salt=10)
    along = np.einsum("nv,nv->n", probe.field(a, y) - probe.field(b, y), a - b)
    size = 1e-300 + np.einsum("nv,nv->n", np.abs(probe.field(a, y)) + np.abs(probe.field(b, y)), np.abs(a - b))
    worst = int(np.argmin(along / size))
    domain_words = f"on |z| <= {domain:g}"
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
        excess = middle - sum(ends) / 2 - ROUNDING * (1 + np.abs(ends[0]) + np.abs(ends[1]))
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
    z, y, curvature, vector = _least_curvature(probe, domain)
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


def _least_curvature(probe: Probe, domain: float) -> tuple[np.ndarray, int, float, np.ndarray]:
    """The smallest eigenvalue, relative to the Hessian's size, of random starts that climb towards smaller ones."""
    rng = np.random.default_rng((probe.seed, 11))
    z, y = probe.points((1.0, 5.0, 12.0, domain), each=12, salt=12)
    best, vectors = _relative_curvature(probe, z, y)
    reach = domain / 3
    for _ in range(12):
        tried = np.clip(z + reach * rng.normal(size=z.shape), -domain, domain)
        found, directions = _relative_curvature(probe, tried, y)
        better = found < best
        z, best = np.where(better[:, None], tried, z), np.where(better, found, best)
        vectors = np.where(better[:, None], directions, vectors)
        reach *= 0.75
    place = int(np.argmin(best))
    return z[place], int(y[place]), float(best[place]), vectors[place]


def _relative_curvature(probe: Probe, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    jacobian, finer = probe.jacobian(z, y, 1e-4), probe.jacobian(z, y, 0.5e-4)
    size = np.abs(jacobian).max(axis=(1, 2))
    symmetric = (jacobian + np.swapaxes(jacobian, 1, 2)) / 2
    # Where two steps disagree there is a kink inside one of them: chords have judged those.
    sound = (np.abs(jacobian - finer).max(axis=(1, 2)) < 1e-3 * size) & (size > 1e-9) & np.isfinite(size)
    values, vectors = np.linalg.eigh(np.where(sound[:, None, None], symmetric, np.eye(VOCAB)))
    size = np.where(sound, size, 1)
    # The differences' own error: h^2 relative to the size, and the field's rounding over h. What it could explain, it does.
    noise = 1e-7 + 2e-11 / size
    return np.where(sound, np.minimum(values[:, 0] / size + noise, 0), 0.0), vectors[:, :, 0]
