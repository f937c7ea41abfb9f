"""Where does training stop that has nothing left to learn?

At the entropy of the source, not at 0 (claim 13): three free logits trained by nll on tokens of the law (.1, .4, .5) come
down to 1.36096 bits, and every nat above it is divergence.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES, information
from xentlab.fit import fit_logits
from xentlab.tour import Check, Figure, Station, show

P = (0.1, 0.4, 0.5)


def run(steps: int = 600, law=P) -> pd.DataFrame:
    """A row a step: the expected loss, H(P, Q), its entropy part H(P), and KL(P || Q), in bits."""
    path = fit_logits(LOSSES["nll"], np.array(law), steps)
    with jax.enable_x64(True):
        q = jax.nn.softmax(jnp.asarray(path))
        p = jnp.broadcast_to(jnp.asarray(law, jnp.float64), q.shape)
        parts = {"cross entropy": information.cross_entropy(p, q), "entropy": information.entropy(p)}
        parts["divergence"] = information.kl_divergence(p, q)
        bits = {name: np.asarray(information.bits(value)) for name, value in parts.items()}
    return pd.DataFrame({"step": np.arange(steps + 1), **bits})


def stations(steps: int = 600) -> list[Station]:
    """Claim 13."""
    frame = run(steps)
    first, last = frame.iloc[0], frame.iloc[-1]
    checks = (
        Check("entropy, bits", last.entropy, 1.36096, 5e-6),
        Check("entropy, nats", last.entropy * np.log(2), 0.94335, 5e-6),
        Check("the loss where training stops, bits", last["cross entropy"], 1.36096, 1e-4),
        Check("the loss where it starts (uniform), bits", first["cross entropy"], np.log2(3), 1e-9),
        Check("least distance to the floor on the way, bits", frame.divergence.min(), 0, 1e-9, "at least"),
    )
    found = f"Training went from {first['cross entropy']:.5f} bits to {last['cross entropy']:.5f}; the entropy is "
    distance = max(last.divergence, 0)  # rounding takes it a little below
    found += f"{last.entropy:.5f} bits = {last.entropy * np.log(2):.5f} nats, the distance "
    found += "below 1e-9." if distance < 1e-9 else f"{distance:.0e}."
    loose = "A loss that is not 0 need not be one that can still fall: here what is left is the source's own. A model that has "
    loose += f"learnt everything still pays {last.entropy / first['cross entropy']:.0%} of what knowing nothing costs."
    rows = frame.melt("step", var_name="part", value_name="bits")
    lines = alt.Chart(rows, title="three logits trained on .1/.4/.5").mark_line(strokeWidth=2.5)
    lines = lines.encode(
        alt.X("step:Q").scale(nice=False), alt.Y("bits:Q"), alt.Color("part:N", title=None), strokeDash="part:N"
    )
    told = "The entropy of (0.1, 0.4, 0.5) is 1.36 bits."
    return [Station(13, "The floor", told, found, loose, checks, (Figure((lines,), found),), {"floor": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
