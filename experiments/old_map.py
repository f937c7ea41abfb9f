"""What does it cost to walk with the wrong map, and is cross entropy that cost?

Cross entropy is an expected code length, H(P) + KL(P || Q): even the perfect map costs H(P), the extra way is the divergence
(claims 14 and 15), which is not symmetric. And one street that the map calls impossible makes it infinite (claim 16).
"""

import altair as alt
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab.charts import write_png
from xentlab.information import cross_entropy, entropy, kl_divergence
from xentlab.runs import new_folder, write_frame

P = (0.1, 0.4, 0.5)
MAPS = {
    "P itself": P,
    "uniform": (1 / 3, 1 / 3, 1 / 3),
    "P turned round": (0.5, 0.4, 0.1),
    "a street missing": (0.0, 0.45, 0.55),
}


def measured(law, maps) -> pd.DataFrame:
    """In bits, for each map Q: H(P), KL(P || Q), their sum, H(P, Q) by itself, and KL(Q || P)."""
    q = jnp.asarray(maps, jnp.float32)
    p = jnp.broadcast_to(jnp.asarray(law, jnp.float32), q.shape)
    columns = {
        "entropy": entropy(p),
        "kl": kl_divergence(p, q),
        "cross_entropy": cross_entropy(p, q),
        "kl_back": kl_divergence(q, p),
    }
    frame = pd.DataFrame({name: np.asarray(value, np.float64) / np.log(2) for name, value in columns.items()})
    return frame.assign(sum=frame.entropy + frame.kl)


def run() -> pd.DataFrame:
    """Each named map, in bits."""
    return measured(P, list(MAPS.values())).assign(map=list(MAPS))


def path(points: int = 41) -> pd.DataFrame:
    """Q goes straight from P through the uniform map and beyond, to where a street is gone."""
    p, uniform = np.array(P), np.full(3, 1 / 3)
    share = np.linspace(-0.4, 1.9, points)
    maps = np.clip(p + share[:, None] * (uniform - p), 0, None)
    return measured(P, maps / maps.sum(axis=1, keepdims=True)).assign(share=share)


if __name__ == "__main__":
    write_frame(folder := new_folder("old_map", "runs/old_map"), "maps", found := run())
    write_frame(folder, "path", along := path())
    tall = along.melt("share", ["entropy", "kl", "cross_entropy"], "what", "bits")
    chart = alt.Chart(tall[np.isfinite(tall.bits)], title="H(P, Q) = H(P) + KL(P || Q), from Q = P (0) to the uniform map (1)")
    chart = chart.mark_line(strokeWidth=2.5).encode(x="share", y="bits", color="what")
    write_png(chart.properties(width=520, height=300), folder / "path.png")
    print(found.round(5).to_string(index=False), f"Wrote {folder}.", sep="\n")
