"""Where the expected value of a loss is least under a known distribution P, by its gradient field alone.

Where autodiff is honest the field's potential is the loss's value; where something is held constant the potential is the
field's own integral from 0, since the value would mislead.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from xentlab.audit.probe import STEP, Probe

# Without a majority, near ties, spikes, and entries under .01; the greatest is not always the first.
FIXED = np.array(
    [
        [0.9, 0.05, 0.03, 0.02],
        [0.4, 0.3, 0.2, 0.1],
        [0.2, 0.28, 0.3, 0.22],
        [0.05, 0.45, 0.06, 0.44],
        [0.02, 0.006, 0.97, 0.004],
        [0.25, 0.24, 0.25, 0.26],
        [0.15, 0.3, 0.05, 0.5],
        [0.38, 0.6, 0.015, 0.005],
    ]
)
FAR = 30.0  # a spread of logits past which a minimiser may lie at infinity
FARTHEST = 1e6  # where the search ends; a loss may measure logits in units of hundreds
BOXES = (20.0, 1e3, 1e4)  # of logits, for a linear program: margins may be of hundreds
LINK_TOLERANCE = 1e-4
# Where the field is rounding P is read back far better: label smoothing of 1e-4 is not proper.
EXACT, EXACT_TOLERANCE = 1e-11, 1e-7
ZERO = 1e-6  # of the field, in its own unit: Newton may end there where the least lies at infinity
RESOLVED = 1e-8  # of a curvature, relative to the greatest and to 1: what is less, differences of the field do not tell from 0
BEYOND = 10.0 ** np.arange(1, 7)  # times as far out, where a minimum at infinity is still none
HALVINGS = 40  # of a ray, by which a kink is found to 1e-12 of its length
PANELS, NODES = 8, 12  # of the integral along a ray: 1e-13 at a spread of 1e3, 1e-9 at 1e6
SCALES = (0.0, 1.0, 2.0, 10.0, 100.0)  # of log P, where Newton starts: a loss may measure logits in other units
LEVEL = 15.0  # of all logits, for the starts that are drawn: what clips logits has other minimisers there
STARTS = len(SCALES) + 3  # for each P
LAWS = 12  # P's that every loss is asked about
NEAR_TIE = 1.002  # of two classes: weights of classes that differ by more change which of them leads


@dataclasses.dataclass(frozen=True)
class Minimiser:
    """Where the expected loss of one P is least: logits [M, V] of all the minima found, their potential, and how."""

    law: np.ndarray
    logits: np.ndarray
    least: float
    settled: bool  # every one is a zero of the field, or the LP's optimum
    at_infinity: bool
    tolerance: float | np.ndarray = LINK_TOLERANCE  # of what each one reads back
    loose: np.ndarray | None = None  # [M, V, V]: rows by which each one may lie beside the minimum; None for an exact one

    @property
    def unknown(self) -> bool:
        """Whether the search came to no end."""
        return not self.settled and not self.at_infinity


def laws(seed: int, vocab: int, even: bool = True) -> np.ndarray:
    """The distributions that a loss is asked about, [12, V]: eight fixed, four drawn.

    even: whether all classes are alike to it; else near ties of each class and the next one come to them, [12 + 2 V, V].
    """
    drawn = np.random.default_rng((seed, 40)).dirichlet(np.ones(vocab), LAWS - len(FIXED))
    drawn = 0.9 * drawn + 0.1 / vocab + 1e-3 * (4 / vocab) * np.arange(vocab)  # no exact tie
    found = [_fixed(vocab), drawn]
    if not even:
        first, places = np.ones((vocab, vocab)), np.arange(vocab)
        first[places, places], first[places, (places + 1) % vocab] = 1.1 * NEAR_TIE, 1.1
        found += [first, np.flip(first)]  # one and the next, one and the one before
    return np.concatenate([each / each.sum(axis=1, keepdims=True) for each in found])


def _fixed(vocab: int) -> np.ndarray:
    """`FIXED`, of whose four classes fewer are left, or which stand apart among others that share a tenth by Zipf's law."""
    if vocab == 4:
        return FIXED
    if vocab < 4:
        few = FIXED[:, [0, 1, 3][:vocab]]
        return few / few.sum(axis=1, keepdims=True)
    apart = np.linspace(0, vocab - 1, 4).astype(int)
    others = np.setdiff1d(np.arange(vocab), apart)
    tail = 1 / np.arange(1, len(others) + 1)
    found = np.zeros((len(FIXED), vocab))
    found[:, apart], found[:, others] = 0.9 * FIXED, 0.1 * tail / tail.sum()
    return found


def expected(probe: Probe, z: np.ndarray, law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expected value [K] and field [K, V] at logits [K, V] under laws [K, V]."""
    vocab = probe.vocab
    value, field = probe.both(np.repeat(z, vocab, axis=0), np.tile(np.arange(vocab), len(z)))
    value, field = value.reshape(-1, vocab), field.reshape(-1, vocab, vocab)
    return np.einsum("kv,kv->k", law, value), np.einsum("kv,kvj->kj", law, field)


def potential(probe: Probe, honest: bool) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """(z [K, V], law [K, V]) -> the expected field's potential [K]: the expected value, or its integral from 0."""
    if honest:
        return lambda z, law: expected(probe, z, law)[0]
    # The field lives within a few units of 0, and z may lie 1e6 away: even steps of the distance's logarithm find it.
    points, weights = np.polynomial.legendre.leggauss(NODES)
    steps = np.concatenate([(points + 1 + 2 * panel) / (2 * PANELS) for panel in range(PANELS)])[:, None]
    weights = np.tile(weights, PANELS)[:, None] / (2 * PANELS)

    def integral(z, law):
        end = np.log1p(1e-3 + np.ptp(z, axis=1))
        nodes = np.expm1(end * steps) / np.expm1(end)
        along = (nodes[:, :, None] * z).reshape(-1, probe.vocab)
        field = expected(probe, along, np.tile(law, (len(steps), 1)))[1].reshape(len(steps), *z.shape)
        return np.einsum("nk,nkv,kv->k", weights * end * np.exp(end * steps) / np.expm1(end), field, z)

    return integral


def _of_pieces(probe: Probe) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The potential of a convex polyhedral loss from its field alone, exactly: a ray is halved where its ends' slopes differ.

    Between equal ones a convex potential is straight. Nodes at fixed places would miss the kinks, and its cuts be false.
    """

    def integral(z, law):
        def slope(rows, at):
            return np.einsum("kv,kv->k", expected(probe, at[:, None] * z[rows], law[rows])[1], z[rows])

        rows, low, high, total = np.arange(len(z)), np.zeros(len(z)), np.ones(len(z)), np.zeros(len(z))
        at_low, at_high = slope(rows, low), slope(rows, high)
        for halving in range(HALVINGS):
            straight = (np.abs(at_high - at_low) < 1e-12 * (1 + np.abs(at_high))) | (halving == HALVINGS - 1)
            area = (high - low) * (at_low + at_high) / 2
            total += np.bincount(rows[straight], area[straight], minlength=len(z))
            rows, low, high, at_low, at_high = (each[~straight] for each in (rows, low, high, at_low, at_high))
            if not len(rows):
                break
            middle = (low + high) / 2
            at_middle = slope(rows, middle)
            rows, low, high = np.tile(rows, 2), np.concatenate([low, middle]), np.concatenate([middle, high])
            at_low, at_high = np.concatenate([at_low, at_middle]), np.concatenate([at_middle, at_high])
        return total

    return integral


def minimise(probe: Probe, honest: bool, polyhedral: bool, even: bool = True) -> tuple[list[Minimiser], Callable]:
    """Where the potential is least for each of `laws`, and the potential.

    By linear programs for convex polyhedral losses, by Newton's method else.
    """
    asked = laws(probe.seed, probe.vocab, even)
    if not polyhedral:
        merit = potential(probe, honest)
        return _by_newton(probe, asked, merit, 1e-12 if honest else 1e-9), merit
    pieces = None if honest else _of_pieces(probe)
    return _by_programs(probe, asked, pieces), pieces or potential(probe, honest)


def is_polyhedral(probe: Probe) -> bool:
    """Flat pieces with slopes: no curvature at nearly all points, but a gradient at many. Then Newton has nothing to hold."""
    z, y = probe.points((1.0, 4.0), each=40, salt=41)
    flat = np.abs(probe.jacobian(z, y)).max(axis=(1, 2)) < 1e-7
    # Sparse losses have no curvature where one class has all the mass, but they curve near 0.
    near = 0.2 * z
    near_flat = np.abs(probe.jacobian(near, y)).max(axis=(1, 2)) < 1e-7
    return bool(flat.mean() > 0.9 and near_flat.mean() > 0.9 and (np.abs(probe.field(z, y)).max(axis=1) > 1e-3).mean() > 0.2)


@np.errstate(over="ignore")  # far out, of an exponential
def _by_newton(probe: Probe, asked: np.ndarray, merit: Callable, digits: float, sweeps: int = 150) -> list[Minimiser]:
    """Saddle-free Newton on the expected field, all laws from all starts at once, with a search along each step.

    digits: how far the merit can be told from its least, relative.
    """
    rng = np.random.default_rng((probe.seed, 42))
    log_law = np.log(asked)
    log_law -= log_law.mean(axis=1, keepdims=True)
    drawn = 2 * rng.normal(size=(STARTS - len(SCALES), *asked.shape))
    drawn = drawn + rng.uniform(-LEVEL, LEVEL, (*drawn.shape[:2], 1))
    starts = [*(scale * log_law for scale in SCALES), *drawn]
    z, law = np.concatenate(starts), np.tile(asked, (len(starts), 1))
    lengths = np.array([4.0, 1.0, 0.5, 0.25, 0.1, 0.03, 0.003, 1e-4])
    z = np.where(np.isfinite(merit(z, law))[:, None], z, 0)  # a start may be too far out
    now, active = merit(z, law), np.ones(len(z), bool)
    for _ in range(sweeps):
        rows = np.flatnonzero(active)
        if not len(rows):
            break
        field = expected(probe, z[rows], law[rows])[1]
        step = _newton_step(probe, z[rows], law[rows], field)
        tried = z[rows] + lengths[:, None, None] * step
        reached = merit(tried.reshape(-1, probe.vocab), np.tile(law[rows], (len(lengths), 1))).reshape(len(lengths), -1)
        reached = np.where(np.isfinite(reached), reached, np.inf)
        best = np.argmin(reached, axis=0)
        lower = reached[best, np.arange(len(rows))] < now[rows]
        # At the floor of rounding the merit no longer tells: a full step is taken while it still shortens the field.
        full = z[rows] + step
        shorter = np.linalg.norm(expected(probe, full, law[rows])[1], axis=1) < 0.5 * np.linalg.norm(field, axis=1)
        flat = ~lower & shorter & (merit(full, law[rows]) < now[rows] + 1e-10 * (1 + np.abs(now[rows])))
        moved = np.where(lower[:, None], tried[best, np.arange(len(rows))], np.where(flat[:, None], full, z[rows]))
        z[rows], now[rows] = moved, merit(moved, law[rows])
        ended = (~lower & ~flat) | (np.ptp(z[rows], axis=1) > FARTHEST) | (np.linalg.norm(field, axis=1) < 1e-13)
        active[rows[ended]] = False
    length, further = np.linalg.norm(expected(probe, z, law)[1], axis=1), merit(2 * z, law)
    # Of values that are alike to all digits the field still tells which one is further up.
    rises = np.einsum("kv,kv->k", z, expected(probe, 2 * z, law)[1]) > 0
    # Of those still under way the minimum may lie further out, and not at infinity.
    rows = np.flatnonzero(active & (np.ptp(z, axis=1) > FAR))
    if len(rows):
        out = merit((BEYOND[:, None, None] * z[rows]).reshape(-1, probe.vocab), np.tile(law[rows], (len(BEYOND), 1)))
        further[rows] = np.maximum(further[rows], out.reshape(len(BEYOND), -1).max(axis=0))
    loose = _loose(probe, z, law, now, merit)
    found = []
    for i in range(len(asked)):
        mine = np.arange(i, len(z), len(asked))
        least = now[mine].min()
        near = mine[now[mine] <= least + 1e-9 * (1 + abs(least))]
        near = near[np.argsort(length[near])]
        # At infinity it is where it is no greater twice as far out.
        endless = (np.ptp(z[near], axis=1) > FAR) & ~(further[near] > least + 1e-9 * (1 + abs(least))) & ~rises[near]
        if not endless.any():
            near = near[now[near] <= least + digits * (1 + abs(least))]
        tolerance = np.where(length[near] < EXACT, EXACT_TOLERANCE, LINK_TOLERANCE)
        settled, at_infinity = bool((length[near] < ZERO).all()), bool(endless.any())
        found.append(Minimiser(asked[i], z[near], float(least), settled, at_infinity, tolerance, loose[near]))
    return found


@np.errstate(over="ignore", invalid="ignore")
def _loose(probe: Probe, z: np.ndarray, law: np.ndarray, now: np.ndarray, merit: Callable) -> np.ndarray:
    """By how much logits [K, V] may lie beside the minimum they are near: rows [K, V, V], along each axis of the curvature.

    What Newton's step would still be, with the field's rounding; 1, where there is less curvature than shows, but none where it
    is flat: those are all minima.
    """
    field = expected(probe, z, law)[1]
    values, vectors, along = _axes(probe, z, law, field)
    rounding = 1e-15 * (1 + np.abs(field).max(axis=1, keepdims=True) + np.abs(now)[:, None])
    left = np.minimum(1, (np.abs(along) + rounding) / np.maximum(np.abs(values), 1e-300))
    least = np.maximum(RESOLVED * np.maximum(1, np.abs(values).max(axis=1, keepdims=True)), rounding / STEP)
    rows, axes = np.nonzero(np.abs(values) < least)
    if len(rows):
        way, far = vectors[rows, :, axes], anywhere(z[rows])
        around = lambda step: np.concatenate([z[rows] + step * way, z[rows] - step * way])
        laws, level, reach = np.tile(law[rows], (2, 1)), np.tile(now[rows], 2), np.tile(far[:, 0], 2)
        same = np.abs(merit(around(far), laws) - level) < 4e-15 * (reach + np.abs(level))
        still = (expected(probe, around(2.0), laws)[1] == np.tile(field[rows], (2, 1))).all(axis=1)  # behind a clip, say
        flat = same.reshape(2, -1).all(axis=0) | still.reshape(2, -1).any(axis=0)
        left[rows, axes] = np.where(flat, 0, 1)
    return left[:, :, None] * np.swapaxes(vectors, 1, 2)


def anywhere(z: np.ndarray) -> np.ndarray:
    """How far [..., 1] from logits [..., V] whatever is not flat shows it: past any other class, and back."""
    return 10 + 2 * np.ptp(z, axis=-1, keepdims=True)


def _axes(probe: Probe, z: np.ndarray, law: np.ndarray, field: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The expected field's curvatures [K, V], their axes [K, V, V], and the field along these [K, V]."""
    each = probe.jacobian(np.repeat(z, probe.vocab, axis=0), np.tile(np.arange(probe.vocab), len(z)))
    jacobian = np.einsum("kv,kvij->kij", law, each.reshape(*law.shape, *each.shape[1:]))
    values, vectors = np.linalg.eigh(np.nan_to_num((jacobian + np.swapaxes(jacobian, 1, 2)) / 2))
    return values, vectors, np.einsum("kij,ki->kj", vectors, field)


def _newton_step(probe: Probe, z: np.ndarray, law: np.ndarray, field: np.ndarray) -> np.ndarray:
    values, vectors, along = _axes(probe, z, law, field)
    floor = 1e-9 + 1e-8 * np.abs(values).max(axis=1, keepdims=True)
    # Negative curvature is descended as if it were positive; a direction without any gets a step of its gradient's sign.
    scaled = along / np.maximum(np.abs(values), np.maximum(floor, np.abs(along) / 4))
    return -np.einsum("kij,kj->ki", vectors, scaled)


def _by_programs(probe: Probe, asked: np.ndarray, merit: Callable | None) -> list[Minimiser]:
    """Kelley's cutting planes, one linear program a law and sweep: exact for a polyhedral loss in finitely many sweeps.

    The minimisers returned are the optimum itself and, for each rival of P's greatest class, the optimum among logits
    that do not put that class above the rival, where it is no worse: a tie or an inversion that the loss allows.
    """
    found = []
    for law in asked:
        top, cuts = int(np.argmax(law)), None
        for box, wider in itertools.pairwise(BOXES):
            least, z, settled, cuts = _program(probe, law, None, box, cuts, merit=merit)
            slack = 1e-8 * (1 + abs(least))
            inside = settled and least <= _program(probe, law, None, wider, cuts, merit=merit)[0] + slack
            if inside or not settled:
                break
        optima = [z]
        for rival in range(probe.vocab):
            if rival != top and inside:
                value, other, inside, _ = _program(probe, law, (top, rival), box, cuts, least + slack, merit)
                if value <= least + slack:
                    optima.append(other)
        found.append(Minimiser(law, np.array(optima), least, inside, False))
    return found


def _program(
    probe: Probe,
    law: np.ndarray,
    order: tuple[int, int] | None,
    box: float = BOXES[0],
    cuts: tuple[np.ndarray, np.ndarray] | None = None,
    most: float = np.inf,
    merit: Callable | None = None,
) -> tuple[float, np.ndarray, bool, tuple[np.ndarray, np.ndarray]]:
    """Least expected loss on |z| <= box, where order = (a, b) demands z_a <= z_b; where it is; whether that is all; the cuts.

    merit: the potential in the loss's place, where the field is not the value's. It starts from cuts of the same law, and ends
    once the least is known to be above `most`.
    """
    from scipy.optimize import linprog

    rng, vocab = np.random.default_rng((probe.seed, 43)), probe.vocab
    cuts_at = np.concatenate([np.zeros((1, vocab)), np.eye(vocab), rng.normal(size=(20, vocab))])
    rows, bounds = cuts or (np.zeros((0, vocab + 1)), np.zeros(0))
    if order:
        rows, bounds = np.concatenate([np.zeros((1, vocab + 1)), rows]), np.concatenate([np.zeros(1), bounds])
        rows[0, order[0]], rows[0, order[1]] = 1, -1
    best, where, settled = np.inf, np.zeros(vocab), False
    for _ in range(15 * vocab):  # Weston & Watkins' hinge needs about 10 a class at 16
        value, field = expected(probe, cuts_at, np.tile(law, (len(cuts_at), 1)))
        if merit:
            value = merit(cuts_at, np.tile(law, (len(cuts_at), 1)))
        allowed = cuts_at[:, order[0]] <= cuts_at[:, order[1]] + 1e-12 if order else np.ones(len(cuts_at), bool)
        if allowed.any() and value[allowed].min() < best:
            place = np.flatnonzero(allowed)[np.argmin(value[allowed])]
            best, where = float(value[place]), cuts_at[place]
        # value + field . (z - at) <= t
        rows = np.concatenate([rows, np.concatenate([field, -np.ones((len(field), 1))], axis=1)])
        bounds = np.concatenate([bounds, np.einsum("kv,kv->k", field, cuts_at) - value])
        solved = linprog([*np.zeros(vocab), 1.0], rows, bounds, bounds=[(-box, box)] * vocab + [(None, None)], method="highs")
        if solved.x is None or solved.fun > most or solved.fun >= best - 1e-10 * (1 + abs(best)):
            settled = solved.x is not None
            break
        cuts_at = solved.x[None, :vocab]
    return best, where, settled, (rows, bounds)
