"""What is left of the gradient as the target's probability goes to 0."""

from __future__ import annotations

import numpy as np

from xentlab.audit.probe import UNDECIDED, VOCAB, Probe, Verdict, plain
from xentlab.gradients import PATHS, path_logits

# Far enough down that what vanishes like p log p is below a part in 10^4, and float64 still holds p.
LOW = np.logspace(-6, -14, 17)


def _pull(probe: Probe, rivals: str) -> np.ndarray:
    z, _ = path_logits(LOW, VOCAB, rivals)
    return np.abs(probe.field(z, np.zeros(len(LOW), int))[:, 0])


def fit(pull: np.ndarray) -> tuple[float, float, float]:
    """log pull = a + order log p + k log log(1/p), by least squares: order, k, and the worst residual.

    Without the last term the growth of a logarithm is taken for a small power.
    """
    columns = np.stack([np.ones_like(LOW), np.log(LOW), np.log(np.log(1 / LOW))], axis=1)
    solution, *_ = np.linalg.lstsq(columns, np.log(pull), rcond=None)
    return float(solution[1]), float(solution[2]), float(np.abs(columns @ solution - np.log(pull)).max())


def low_p(probe: Probe) -> dict[str, Verdict]:
    """`low_p_limit`, {"even": .., "one": ..}, and `low_p_order` on the path "even".

    A limit is a number, or inf. Order 0 stays (a logarithm's growth too), > 0 vanishes like p^order, < 0 grows.
    """
    limits, said, order = {}, [], None
    for rivals in PATHS:
        pull = _pull(probe, rivals)
        if not np.isfinite(pull).all():
            limits[rivals], found = UNDECIDED, None
            said.append(f"{rivals}: not finite somewhere between p = 1e-6 and 1e-14")
        elif (pull == 0).all():
            limits[rivals], found = 0.0, None
            said.append(f"{rivals}: exactly 0 from p = 1e-6 down")
        elif (pull == 0).any():
            limits[rivals], found = UNDECIDED, None
            said.append(f"{rivals}: 0 at some p and not at others")
        else:
            found, k, residual = fit(pull)
            if residual > 0.01:
                limits[rivals], found = UNDECIDED, None
                said.append(f"{rivals}: no power of p and of log(1/p) fits (residual {residual:.2g})")
            else:
                power = found if abs(found) > 0.02 else -k if abs(k) > 0.1 else 0.0
                limits[rivals] = 0.0 if power > 0 else float("inf") if power < 0 else plain(round(pull[-1], 8))
                said.append(
                    f"{rivals}: |dL/dz_y| = {pull[0]:.4g} at p = 1e-6, {pull[-1]:.4g} at 1e-14, "
                    f"as p^{round(found, 3) + 0.0:.3f} log(1/p)^{round(k, 2) + 0.0:.2f}"
                )
        if rivals == "even":
            order = UNDECIDED if found is None and limits[rivals] == UNDECIDED else found
    evidence = "; ".join(said)
    rounded = round(order, 3) + 0.0 if isinstance(order, float) else order
    return {"low_p_limit": Verdict(limits, evidence), "low_p_order": Verdict(rounded, evidence.split("; ")[0])}
