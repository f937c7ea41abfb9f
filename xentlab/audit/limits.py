"""What is left of the gradient as the target's probability goes to 0."""

from __future__ import annotations

import numpy as np

from xentlab.audit.probe import UNDECIDED, Probe, Verdict
from xentlab.gradients import PATHS, path_logits

LOW = np.logspace(-6, -14, 17)  # where the order is read
# -log p, where the limit is: on to what float64 still holds, and further down for what only differences of logits enter.
FAR, FARTHEST = np.array([32.0, 100.0, 300.0, 690.0]), np.array([1e3, 3e3, 1e4])
GROWS = 0.1  # a power of log(1/p), at least


def _pulls(probe: Probe, rivals: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """|dL/dz_y| at the probabilities LOW; and -log p further down, and the pull there, as far as it is a number."""
    vocab = probe.vocab
    z, _ = path_logits(LOW, vocab, rivals)
    x = np.concatenate([FAR, FARTHEST])
    far = np.zeros((len(x), vocab))
    if rivals == "even":
        far[:, 0] = np.log(vocab - 1) - x
    else:
        far[:, 1] = x
    pull = np.abs(probe.field(np.concatenate([z, far]), np.zeros(len(z) + len(x), int))[:, 0])
    near, far = pull[: len(z)], pull[len(z) :]
    # Where p itself has become 0, what is made of it may be no number, or 0.
    known = len(x) if np.isfinite(far).all() and (far > 0).all() else len(FAR)
    return near, x[:known], far[:known]


def fit(pull: np.ndarray) -> tuple[float, float, float]:
    """log pull = a + order log p + k log log(1/p), by least squares: order, k, and the worst residual.

    Without the last term the growth of a logarithm is taken for a small power.
    """
    columns = np.stack([np.ones_like(LOW), np.log(LOW), np.log(np.log(1 / LOW))], axis=1)
    solution, *_ = np.linalg.lstsq(columns, np.log(pull), rcond=None)
    return float(solution[1]), float(solution[2]), float(np.abs(columns @ solution - np.log(pull)).max())


def logarithm(pull: np.ndarray) -> float:
    """The worst residual of log pull = a + k log(log(1/p) + c), for the best c: what `fit` may take for a small power."""
    x, log_pull = np.log(1 / LOW), np.log(pull)

    def residual(c):
        columns = np.stack([np.ones_like(x), np.log(x + c)], axis=1)
        return np.abs(columns @ np.linalg.lstsq(columns, log_pull, rcond=None)[0] - log_pull).max()

    shifts = np.concatenate([-np.linspace(0, 13, 40), np.linspace(0, 30, 90)])
    best = min(shifts, key=residual)
    finer = best + np.linspace(-0.4, 0.4, 81)
    return float(min(residual(c) for c in finer))


def _limit(near: np.ndarray, x: np.ndarray, far: np.ndarray) -> float | str:
    """What the pull tends to, by how it goes on from p = 1e-14: a number, inf, or undecided."""
    if far[-1] <= 1e-6 * near[0]:
        return 0.0
    if not np.isfinite(far).all():  # of what had not grown before, 1 - p has become 0
        number = np.concatenate([near[-1:], far[np.isfinite(far)]])
        return float("inf") if number[-1] >= 1e6 * near[0] else UNDECIDED
    if far[-1] >= 1e6 * near[0]:
        return float("inf")
    if np.isclose(far[-1], far[-2], rtol=1e-6, atol=0):
        return float(f"{far[-1]:.8g}")
    powers = np.diff(np.log(far[-3:])) / np.diff(np.log(x[-3:]))  # of log(1/p)
    if (powers > GROWS).all():
        return float("inf")
    return 0.0 if (powers < -GROWS).all() else UNDECIDED


def low_p(probe: Probe) -> dict[str, Verdict]:
    """`low_p_limit`, {"even": .., "one": ..}, and `low_p_order` on the path "even".

    Both are of target 0: a loss that weighs its classes has others for the rest.
    A limit is a number, or inf. Order 0 stays (a logarithm's growth too), > 0 vanishes like p^order, < 0 grows.
    """
    limits, said, order = {}, [], None
    for rivals in PATHS:
        pull, x, far = _pulls(probe, rivals)
        if not np.isfinite(pull).all():
            limits[rivals], found = UNDECIDED, UNDECIDED
            said.append(f"{rivals}: not finite somewhere between p = 1e-6 and 1e-14")
        elif (pull == 0).all():
            limits[rivals], found = 0.0, None
            said.append(f"{rivals}: exactly 0 from p = 1e-6 down")
        elif (far == 0).all() and not (np.diff(pull == 0) & (pull[1:] != 0)).any():
            last = np.flatnonzero(pull)[-1]
            limits[rivals], found = 0.0, None if pull[last] > 1e-10 * pull[0] else UNDECIDED  # or it has been rounded to 0
            said.append(f"{rivals}: of target 0 |dL/dz_y| = {pull[0]:.4g} at p = 1e-6, and exactly 0 below p = {LOW[last]:.2g}")
        elif (pull == 0).any():
            limits[rivals], found = UNDECIDED, UNDECIDED
            said.append(f"{rivals}: 0 at some p and not at others")
        else:
            limits[rivals], (found, k, residual) = _limit(pull, x, far), fit(pull)
            said.append(
                f"{rivals}: of target 0 |dL/dz_y| = {pull[0]:.4g} at p = 1e-6, {pull[-1]:.4g} at 1e-14, "
                f"{far[-1]:.4g} at e^-{x[-1]:g}"
            )
            # 0 where this power of p would be above the rounding of a probability near 1: it has been cut off.
            if (far[-found * x > -25] == 0).any():
                found = None
            elif limits[rivals] != UNDECIDED and 0 < limits[rivals] < np.inf:
                found = 0.0  # what is fitted is how it comes there
            elif abs(found) < GROWS and logarithm(pull) < 0.1 * residual:
                found = 0.0
                said[-1] += ", as a power of log(1/p) + c"
            elif residual > 0.01:
                found = UNDECIDED
                said[-1] += f"; no power of p and of log(1/p) fits (residual {residual:.2g})"
            else:
                said[-1] += f", as p^{round(found, 2) + 0.0:.2f} log(1/p)^{round(k, 2) + 0.0:.2f}"
        if rivals == "even":
            order = found
    rounded = round(order, 2) + 0.0 if isinstance(order, float) else order  # a fit errs by thousandths
    return {"low_p_limit": Verdict(limits, "; ".join(said)), "low_p_order": Verdict(rounded, said[0])}
