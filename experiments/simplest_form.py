"""Why the logarithm, and not simply -p or (1 - p)^2?

Three losses of the right token's p alone, each trained on the law P = (.1, .4, .5) (claim 7). -log p ends at P; -p puts all
on the likeliest token; (1 - p)^2 drops the rare one. The full square, Brier's, ends at P too, by looking at the other
tokens as well.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES, at_target
from xentlab.fit import fit_logits
from xentlab.tour import Check, Figure, Station, show

P = (0.1, 0.4, 0.5)
# By hand: -p is linear, its optimum a corner. For (1 - p)^2 the sum of P_i (1 - p_i)^2 has P_i (1 - p_i) equal where p_i > 0;
# all three would need p_1 < 0, so p_1 = 0, and .4 (1 - p_2) = .5 p_2.
ENDS = {"-log p": P, "-p": (0, 0, 1), "(1 - p)²": (0, 4 / 9, 5 / 9), "brier, Σ(p - e)²": P}


def linear(logits, targets):
    """-p_y."""
    return -at_target(jax.nn.softmax(logits), targets)


def square(logits, targets):
    """(1 - p_y)^2, the target's p alone."""
    return (1 - at_target(jax.nn.softmax(logits), targets)) ** 2


def run(steps: int = 3000) -> pd.DataFrame:
    """Where each loss ends: a row a loss and token, with P and the exact end; local: how far the rest of p moves the loss."""
    losses = dict(zip(ENDS, (LOSSES["nll"], linear, square, LOSSES["brier"]), strict=True))
    even, uneven = (jnp.log(jnp.array(p)) for p in ([0.5, 0.25, 0.25], [0.5, 0.49, 0.01]))
    rows = []
    for name, loss in losses.items():
        end = np.asarray(jax.nn.softmax(fit_logits(loss, np.array(P), steps)[-1]), np.float64)
        moved = abs(float(loss(even, jnp.int32(0)) - loss(uneven, jnp.int32(0))))
        rows += [
            {"loss": name, "token": "abc"[i], "P": P[i], "p": end[i], "exact": ENDS[name][i], "moved_by_others": moved}
            for i in range(3)
        ]
    return pd.DataFrame(rows)


def stations(steps: int = 3000) -> list[Station]:
    """Claim 7."""
    frame = run(steps)
    checks = [Check(f"{row.loss}: p({row.token})", row.p, row.exact, 2e-3) for row in frame.itertuples()]
    moved = frame.groupby("loss", sort=False).moved_by_others.first()
    checks += [Check(f"{name}: moved by the rest of p", moved[name], 0, 1e-6) for name in list(ENDS)[:3]]
    checks.append(Check("brier: moved by the rest of p", moved.iloc[3], 0.1, relation="at least"))
    end = lambda name: "(" + ", ".join(f"{p:.3f}" for p in frame[frame.loss == name].p) + ")"
    found = f"Trained on P = {P}, " + ", ".join(f"{name} ends at {end(name)}" for name in ENDS) + "."
    loose = (
        "The reason is not simplicity: -p is simpler. It is that the loss may look at the right token alone (local) and still "
        "be least at the truth (strictly proper): among smooth scores of softmax's p, from three tokens on, only the "
        f"logarithm does both. Brier's score is proper and not local: with p_y at .5 held still, moving the rest changes it by "
        f"{moved.iloc[3]:.3f}."
    )
    told = "-log is the simplest function with the right behaviour."
    bars = alt.Chart(frame, title="where each loss ends, trained on P (ticks)").mark_bar(opacity=0.85)
    x, row = alt.X("p:Q", title="probability").scale(domain=[0, 1]), alt.Y("loss:N", sort=list(ENDS), title=None)
    offset = alt.YOffset("token:N")
    ticks = alt.Chart(frame).mark_tick(thickness=3, color="#888888").encode(alt.X("P:Q"), row, offset)
    figure = Figure((bars.encode(x, row, offset, alt.Color("token:N")) + ticks,), found)
    return [Station(7, "Simple, and right", told, found, loose, tuple(checks), (figure,), {"ends": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
