"""Is it the logarithm that makes training stable?

Not by itself (claim 5): -log(softmax(z)) takes a logarithm and is infinite, with a gradient that is no number, once the
logits lie 90 apart in float32. The fused log_softmax never forms the probability, and errs nowhere.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES
from xentlab.tour import Check, Figure, Station, show


def naive(logits, targets):
    """-log of the softmax, step by step, for one token: [V], [] -> []."""
    p = jnp.exp(logits) / jnp.exp(logits).sum()
    return -jnp.log(p)[targets]


def run(gaps=tuple(range(0, 121, 2))) -> pd.DataFrame:
    """Loss and gradient for logits (0, gap) and target 0 in float32, naive and fused."""
    rows = []
    for form, loss in (("naive", naive), ("fused", LOSSES["nll"])):
        both = jax.jit(jax.value_and_grad(loss))
        for gap in gaps:
            value, gradient = both(jnp.array([0, gap], jnp.float32), jnp.int32(0))
            row = {"gap": gap, "form": form, "value": float(value)}
            rows.append(row | {"at_target": float(gradient[0]), "at_rival": float(gradient[1])})
    return pd.DataFrame(rows)


def stations() -> list[Station]:
    """Claim 5."""
    frame = run()
    by_form = frame.set_index(["form", "gap"])
    fused, broken = by_form.loc[("fused", 100)], by_form.loc[("naive", 100)]
    lost = frame[(frame.form == "naive") & ~(np.isfinite(frame.value) & np.isfinite(frame.at_target))].gap.min()
    checks = (
        Check("naive loss at (0, 100)", broken.value, np.inf),
        Check("naive gradient at the target", broken.at_target, np.nan),
        Check("fused loss", fused.value, 100, 1e-5),
        Check("fused gradient at the target", fused.at_target, -1, 1e-6),
        Check("fused gradient at the rival", fused.at_rival, 1, 1e-6),
    )
    found = f"At logits (0, 100) the naive form gives {broken.value:g} and a gradient of {broken.at_target:g}; the fused form "
    found += f"{fused.value:g} and ({fused.at_target:g}, {fused.at_rival:g})."
    loose = (
        f"The naive form has its logarithm, and is lost from a gap of {lost:g} on. The remedy is the fused log-softmax: the "
        "largest logit is subtracted before anything is exponentiated, and log and exp cancel on paper, not in float32."
    )
    value = drawn(frame[np.isfinite(frame.value)], alt.Y("value:Q", title="nats"), "loss")
    slope = drawn(frame[np.isfinite(frame.at_target)], alt.Y("at_target:Q", title=None), "gradient at the target")
    told = "Working with logs makes training numerically stable."
    figure = Figure(
        (value, slope), f"Both forms rise together; the naive one ends at a gap of {lost:g}, the fused one goes on."
    )
    return [Station(5, "Fused, not only logarithmic", told, found, loose, checks, (figure,), {"fused": frame})]


def drawn(rows: pd.DataFrame, y: alt.Y, title: str) -> alt.LayerChart:
    """The naive form as a broad band, which the fused one's line leaves where it ends."""
    x, color = alt.X("gap:Q", title="gap between the rival's logit and the target's"), alt.Color("form:N", title=None)
    forms = (("naive", 9, 0.45), ("fused", 2.5, 1))
    lines = lambda form, width, opacity: alt.Chart(rows[rows.form == form]).mark_line(strokeWidth=width, opacity=opacity)
    return alt.layer(*(lines(*each).encode(x, y, color) for each in forms), title=title)


if __name__ == "__main__":
    show(stations, __file__, __doc__)
