"""Does cross entropy measure how well two distributions agree?

It is least, H(P), only where Q is P; but it looks from P's side alone: where Q calls impossible what P does one time in ten
it is infinite, and what P never does may be anything (claim 16).
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab.charts import marked
from xentlab.information import bits, cross_entropy, entropy, kl_divergence
from xentlab.tour import Check, Figure, Slider, Station, show

P = (0.1, 0.4, 0.5)


def run() -> pd.DataFrame:
    """For each q of the first token, the rest shared as P shares it: CE, H(P), both divergences, in bits, in float64."""
    first = np.array([0.0, *np.logspace(-9, -1, 33), *np.linspace(0.15, 0.95, 17)])
    q = np.stack([first, (1 - first) * 4 / 9, (1 - first) * 5 / 9], axis=1)
    with jax.enable_x64(True):
        q, p = jnp.asarray(q), jnp.broadcast_to(jnp.asarray(P, jnp.float64), q.shape)
        columns = {"cross_entropy": cross_entropy(p, q), "entropy": entropy(p)}
        columns |= {"kl": kl_divergence(p, q), "kl_back": kl_divergence(q, p)}
        columns = {name: np.asarray(bits(value)) for name, value in columns.items()}
    return pd.DataFrame({"at": range(len(first)), "q": first, **columns})


def stations() -> list[Station]:
    """Claim 16."""
    frame = run()
    gone, finite = frame.iloc[0], frame.iloc[1:]
    best = finite.loc[finite.cross_entropy.idxmin()]
    checks = (
        Check("with the street missing, q = 0", gone.cross_entropy, np.inf),
        Check("KL(P || Q) there", gone.kl, np.inf),
        Check("KL(Q || P) there, bits: finite", gone.kl_back, -np.log2(0.9), 1e-9),
        Check("the q where it is least", best.q, 0.1, 1e-9),
        Check("its least, bits: H(P)", best.cross_entropy, best.entropy, 1e-9),
        Check("lowest above H(P), bits", (finite.cross_entropy - finite.entropy).min(), 0, 1e-9, "at least"),
    )
    found = (
        f"With q = 0 for a token of probability .1 the cross entropy is {gone.cross_entropy:g}; at q = {finite.q.iloc[0]:.0e} "
        f"it is {finite.cross_entropy.iloc[0]:.3f} bits. It is least, {best.cross_entropy:.5f}, where Q is P."
    )
    loose = (
        f"A missing support makes it infinite, one way only: KL(P || Q) = {gone.kl:g}, KL(Q || P) = {gone.kl_back:.3f} bits. "
        "So it is no distance. A softmax of finite logits never says 0: training meets the slope of that wall, not the wall."
    )
    lines = finite.melt("q", ["cross_entropy", "entropy", "kl_back"], "what", "bits")
    chart = alt.Chart(lines, title="what the map gives a street that P walks one time in ten").mark_line(strokeWidth=2.5)
    x = alt.X("q:Q", title="q of that street").scale(type="log").axis(format="~e", tickCount=6)
    chart = chart.encode(x, alt.Y("bits:Q", title="bits"), alt.Color("what:N", title=None))
    figure = Figure((marked(chart, finite, "q", "cross_entropy", 33),), found, Slider("q", frame, 33))
    told = "Cross entropy measures the alignment of two distributions."
    return [Station(16, "The street that the map lacks", told, found, loose, checks, (figure,), {"missing_street": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
