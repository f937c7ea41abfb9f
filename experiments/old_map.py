"""What does it cost to walk with the wrong map, and is cross entropy that cost?

Cross entropy is an expected code length, H(P) + KL(P || Q): even the perfect map costs H(P), the extra way is the divergence
(claim 14). The slider moves the map Q; a missing street is the question of missing_street.py.
"""

import altair as alt
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab.charts import marked
from xentlab.information import bits, cross_entropy, entropy, kl_divergence
from xentlab.tour import Check, Figure, Slider, Station, show

P = (0.1, 0.4, 0.5)
MAPS = {"P itself": P, "uniform": (1 / 3, 1 / 3, 1 / 3), "P turned round": (0.5, 0.4, 0.1)}


def measured(law, maps) -> pd.DataFrame:
    """In bits, for each map Q: H(P), KL(P || Q), their sum, H(P, Q) by itself, and KL(Q || P)."""
    q = jnp.asarray(maps, jnp.float32)
    p = jnp.broadcast_to(jnp.asarray(law, jnp.float32), q.shape)
    columns = {"entropy": entropy(p), "kl": kl_divergence(p, q)}
    columns |= {"cross_entropy": cross_entropy(p, q), "kl_back": kl_divergence(q, p)}
    frame = pd.DataFrame({name: bits(np.asarray(value, np.float64)) for name, value in columns.items()})
    return frame.assign(sum=frame.entropy + frame.kl)


def run() -> pd.DataFrame:
    """Each named map, in bits."""
    return measured(P, list(MAPS.values())).assign(map=list(MAPS))


def path(steps: int = 20) -> pd.DataFrame:
    """Q goes straight from a map without the first street (share -3/7) through P (0) and uniform (1), and beyond."""
    p, uniform = np.array(P), np.full(3, 1 / 3)
    share = np.concatenate([np.linspace(-3 / 7, 0, steps // 2 + 1), np.linspace(0, 1.9, steps + 1)[1:]])
    maps = np.clip(p + share[:, None] * (uniform - p), 0, None)
    maps[0, 0] = 0.0  # there the first street's probability is 0, but for rounding
    maps /= maps.sum(axis=1, keepdims=True)
    return measured(P, maps).assign(share=share, **{f"q{i + 1}": maps[:, i] for i in range(3)})


def stations() -> list[Station]:
    """Claim 14."""
    found, along = run().set_index("map"), path()
    flat, turned = (found.loc[name] for name in list(MAPS)[1:])
    finite = along[np.isfinite(along.kl)]
    checks = (
        Check("against the uniform map, bits", flat.cross_entropy, 1.58496, 1e-5),
        Check("of which divergence", flat.kl, 0.22400, 1e-5),
        Check("against (.5, .4, .1), bits", turned.cross_entropy, 2.28974, 1e-5),
        Check("of which divergence, (.5, .4, .1)", turned.kl, 0.92877, 1e-5),
        Check("CE - (H + KL) along the path, at worst", (finite["sum"] - finite.cross_entropy).abs().max(), 0, 1e-5),
    )
    tall = along.melt("share", ["entropy", "kl", "cross_entropy"], "what", "bits")
    title = "Q from a map that misses a street, through P (0) and uniform (1), and beyond"
    lines = alt.Chart(tall[np.isfinite(tall.bits)], title=title)
    lines = lines.mark_line(strokeWidth=2.5).encode(
        alt.X("share:Q"), alt.Y("bits:Q", title="bits"), alt.Color("what:N", title=None)
    )
    rows = along[["share", "q1", "q2", "q3", "entropy", "kl", "cross_entropy", "kl_back"]].assign(at=range(len(along)))
    chart = marked(lines, rows[np.isfinite(rows.kl)], "share", "cross_entropy", 12)
    sums = f"H(P) is {flat.entropy:.5f} bits. The uniform map costs {flat.cross_entropy:.5f}, {flat.kl:.5f} of it divergence; "
    sums += f"(.5, .4, .1) costs {turned.cross_entropy:.5f}, of which {turned.kl:.5f}."
    loose = f"It is no probability of an error: it is a length, {turned.cross_entropy:.2f} bits here. And not all of it is the "
    loose += f"map's fault: the perfect one still costs {flat.entropy:.2f}."
    told = "Cross entropy is H(P, Q) = -Σ P log Q, the cost of expecting Q where P holds."
    figure = Figure((chart,), sums, Slider("Q along the path", rows, 12))
    station = Station(
        14, "A length, and its extra", told, sums, loose, checks, (figure,), {"maps": found.reset_index(), "path": along}
    )
    return [station]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
