"""What does a token at probability p cost, in nats and in bits?

The same price in two currencies (claim 8): -log p, and that divided by log 2.
"""

import math

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import information
from xentlab.charts import marked
from xentlab.tour import Check, Figure, Slider, Station, show

NAMED = (1.0, 0.9, 0.1, 0.01)


def run(probabilities=NAMED) -> pd.DataFrame:
    """-log p in nats and in bits, in float64."""
    with jax.enable_x64(True):
        nats = np.asarray(information.self_information(jnp.asarray(probabilities, jnp.float64)))
    return pd.DataFrame({"p": probabilities, "nats": nats, "bits": information.bits(nats)})


def stations() -> list[Station]:
    """Claim 8."""
    named, curve = run(), run(tuple(np.round(np.arange(0.01, 1.001, 0.01), 2)))
    checks = [Check(f"p = {row.p:g}, nats", row.nats, abs(math.log(row.p)), 1e-12) for row in named.itertuples()]
    checks += [Check(f"p = {row.p:g}, bits", row.bits, abs(math.log2(row.p)), 1e-12) for row in named.itertuples()]
    found = "; ".join(f"p = {row.p:g} costs {row.nats:.3f} nats or {row.bits:.3f} bits" for row in named.itertuples()) + "."
    loose = "Nats and bits get mixed: papers on models report nats a token, compressors bits a byte, and "
    loose += f"{named.nats[2]:.3f} and {named.bits[2]:.3f} are one price for p = 0.1. A number without its unit says nothing."
    lines = alt.Chart(curve)
    x = alt.X("p:Q", title="p, the probability of the right token")
    nats = marked(
        lines.mark_line(strokeWidth=2.5, color="#4477AA").encode(x, alt.Y("nats:Q")), rows := at(curve), "p", "nats", 49
    )
    bits = lines.mark_line(strokeWidth=2.5, color="#EE6677", strokeDash=[6, 3]).encode(x, alt.Y("bits:Q").axis(orient="right"))
    chart = alt.layer(nats, bits, title="-log p: nats (blue, left) and bits (red, right)").resolve_scale(y="independent")
    told = "The loss at p = 1 is 0, at 0.9 it is 0.105, at 0.1 it is 2.303, at 0.01 it is 4.605."
    figure = Figure((chart,), "Both curves fall from p near 0 to 0 at p = 1.", Slider("p", rows, 49))
    return [Station(8, "One price, two currencies", told, found, loose, tuple(checks), (figure,), {"prices": curve})]


def at(curve: pd.DataFrame) -> pd.DataFrame:
    """The curve's rows as a slider's positions."""
    return curve.assign(at=range(len(curve)))


if __name__ == "__main__":
    show(stations, __file__, __doc__)
