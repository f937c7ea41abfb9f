"""Is cross entropy's gradient the strongest at low probability?

In the probability it explodes like 1/p; in the logit, which is what a network moves, it is 1 - p and stays below 1, and
others keep up with it or pass it (claim 9). What vanishes are brier, the square loss on probabilities, and
generalized_cross_entropy. Both ways in which p can
become small are shown, for any losses: `python experiments/low_probability.py --losses nll brier ./mine.py:my_loss`.
"""

import math

import altair as alt
import numpy as np
import pandas as pd

from xentlab import charts
from xentlab.defaults import LOSSES
from xentlab.gradients import gradient_profile, profile_points
from xentlab.reading import gradients as read
from xentlab.tour import Check, Figure, Slider, Station, show

SIZES = tuple(4**power for power in range(1, 10))
COLUMNS = ["loss", "p", "value", "dvalue_dp", "dvalue_dlogit"]
# dL/dz_y beside V - 1 even rivals, by hand: brier's vanishes like p, mse_logits's grows like -log p, hinge's holds.
PULLS = {"brier": lambda p, V: -2 * p * (1 - p) ** 2 * V / (V - 1), "hinge": lambda p, V: -1}
PULLS["mse_logits"] = lambda p, V: 2 * math.log((V - 1) * p / (1 - p)) - 2


def run(losses=LOSSES, vocab: int = 16) -> pd.DataFrame:
    """Profiles on both paths, and each loss's gradient relative to nll's at the same p."""
    p = profile_points()
    frame = gradient_profile(losses, p, vocab, "both")
    nll = gradient_profile(["nll"], p, vocab, "both").set_index(["rivals", "p"]).dvalue_dlogit.rename("nll")
    joined = frame.join(nll, on=["rivals", "p"])
    return frame.assign(times_nll=(joined.dvalue_dlogit / joined.nll).abs())


def by_vocabulary(losses=LOSSES, sizes=SIZES) -> pd.DataFrame:
    """The pull in the logit where training starts, at p = 1/V."""
    profiles = [gradient_profile(losses, [1 / V], V).assign(at=at, V=V) for at, V in enumerate(sizes)]
    return pd.concat(profiles, ignore_index=True).assign(pull=lambda f: f.dvalue_dlogit.abs())[["at", "V", "loss", "pull"]]


def stations(losses: tuple[str, ...] = LOSSES, vocab: int = 16, sizes: tuple[int, ...] = SIZES) -> list[Station]:
    """Claim 9."""
    frame, starts = run(losses, vocab), by_vocabulary(losses, sizes)
    named = gradient_profile(["nll"], [0.9, 0.1, 0.01], vocab)
    checks = [Check(f"nll: dL/dp at {row.p:g}", row.dvalue_dp, -1 / row.p, 1e-9) for row in named.itertuples()]
    checks += [Check(f"nll: dL/dz_y at {row.p:g}", row.dvalue_dlogit, row.p - 1, 1e-9) for row in named.itertuples()]
    for row in frame[frame.loss.isin(PULLS) & (frame.rivals == "even") & np.isclose(frame.p, 1e-6)].itertuples():
        checks.append(Check(f"{row.loss}: dL/dz_y at 1e-06", row.dvalue_dlogit, PULLS[row.loss](row.p, vocab), 1e-9))
    even = frame[frame.rivals == "even"].copy()
    even["at"] = even.p.rank(method="dense").astype(int) - 1
    names, start, middle = list(dict.fromkeys(frame.loss)), 36, 2 * len(sizes) // 3
    panels = []
    for space in charts.SPACES:
        dots = even.assign(size=even[space].abs())[["at", "loss", "p", "size"]]
        chart = charts.profile(frame, names, space, "even")
        panels.append(charts.marked(chart, dots[dots["size"] > 1e-9], "p", "size", start))
    spring = Figure(tuple(panels), " ".join(read(frame)), Slider("p", even[["at", *COLUMNS]], start))
    lines = alt.Chart(starts, title="the pull at the start, where p = 1/V").mark_line(strokeWidth=2).encode(
        alt.X("V:Q").scale(type="log", base=2), alt.Y("pull:Q", title="|∂L/∂z_y|").scale(type="log"), **charts.colours(names)
    )  # fmt: skip
    chart = charts.marked(lines, starts[["at", "V", "loss", "pull"]], "V", "pull", middle)
    last = starts[starts["at"] == starts["at"].max()].set_index("loss").pull
    said = f"At V = {starts.V.max()} a uniform start pulls with " + ", ".join(f"{n} {last[n]:.2g}" for n in names) + "."
    begin = Figure((chart,), said, Slider("vocabulary V", starts, middle))
    told = "The lower the probability of the right token, the heavier the penalty, like a spring."
    loose = "The slope explodes in p and saturates in the logit. " + " ".join(read(frame))
    found = f"In p nll's slope is {', '.join(f'{x:.3g}' for x in named.dvalue_dp)} at p = .9, .1, .01; in the logit "
    found += f"{', '.join(f'{x:.3g}' for x in named.dvalue_dlogit)}. {said}"
    one = tuple(charts.profile(frame, names, space, "one") for space in charts.SPACES)
    figures = spring, begin, Figure(one, "The same where the target's logit stays, and one rival's rises.")
    frames = {"profiles": frame, "starts": starts}
    return [Station(9, "The spring, in two spaces", told, found, loose, tuple(checks), figures, frames)]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
