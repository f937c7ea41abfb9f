"""Does cross entropy know what words mean?

It looks at the right token's probability alone (claim 18): whether the rest goes to a synonym or to nonsense is the same to
it. A loss that charges by distance between embeddings sees the difference, and is no longer proper.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES
from xentlab.audit import audit
from xentlab.charts import marked
from xentlab.tour import Check, Figure, Slider, Station, show

WORDS, EMBEDDINGS = ("big", "huge", "banana"), np.array([[0.0, 0.0], [0.3, 0.1], [2.0, 1.5]])
COST = np.linalg.norm(EMBEDDINGS[:, None] - EMBEDDINGS[None], axis=-1)


def embedding_cost(logits, targets):
    """The expected distance of what the model would say from the target: [..., 3], [...] -> [...]."""
    cost = jnp.take(jnp.asarray(COST, logits.dtype), targets, axis=0, mode="fill", fill_value=jnp.nan)
    return jnp.sum(jax.nn.softmax(logits) * cost, axis=-1)


def run(p_right: float = 0.5, points: int = 21) -> pd.DataFrame:
    """Both losses of the target `big` as the wrong mass moves from banana to huge; in float64."""
    share = np.linspace(0, 1, points)
    rest = np.clip((1 - p_right) * np.stack([share, 1 - share], axis=1), 1e-300, None)
    with jax.enable_x64(True):
        z = jnp.log(jnp.asarray(np.column_stack([np.full(points, p_right), rest])))
        targets = jnp.zeros(points, jnp.int32)
        values = {"nll": np.asarray(LOSSES["nll"](z, targets)), "embedding cost": np.asarray(embedding_cost(z, targets))}
    columns = {"share of the synonym": share, "p(huge)": (1 - p_right) * share, "p(banana)": (1 - p_right) * (1 - share)}
    return pd.DataFrame({"at": range(points), **columns, **values})


def stations(p_right: float = 0.5) -> list[Station]:
    """Claim 18."""
    frame = run(p_right)
    spread = frame[["nll", "embedding cost"]].max() - frame[["nll", "embedding cost"]].min()
    local = {name: audit(LOSSES[name]).verdicts["local"].value for name in ("nll", "brier")}
    checks = (
        Check("nll, moved by all of the wrong mass", spread["nll"], 0, 1e-12),
        Check("nll itself", frame.nll[0], -np.log(p_right), 1e-12),
        Check("embedding cost, moved", spread["embedding cost"], (1 - p_right) * (COST[0, 2] - COST[0, 1]), 1e-12),
        Check("the audit calls nll local", local["nll"], 1),
        Check("the audit calls brier local", local["brier"], 0),
    )
    found = (
        f"With p(big) = {p_right:g} held still, moving the rest from banana to huge changes nll by {spread['nll']:.1g} and the "
        f"embedding cost by {spread['embedding cost']:.3f}, from {frame['embedding cost'][0]:.3f} to "
        f"{frame['embedding cost'].iloc[-1]:.3f}."
    )
    loose = (
        "It does not measure meaning, and that is its merit: of smooth scores of softmax's p, from three tokens on, local and "
        "proper together leave only the logarithm. What a model knows of synonyms comes from the texts, where huge does follow "
        "now and then. The cost by embeddings is least where the model says the one word that is nearest on average, not the "
        "truth. Nor is ignoring the rest the same as ignoring kinds of error: brier, which is proper too, looks at it (the "
        "audit: not local)."
    )
    lines = frame.melt("share of the synonym", ["nll", "embedding cost"], "loss", "value")
    chart = alt.Chart(lines, title="the wrong half moves from banana (0) to huge (1)").mark_line(strokeWidth=2.5)
    chart = chart.encode(alt.X("share of the synonym:Q"), alt.Y("value:Q", title="loss"), alt.Color("loss:N", title=None))
    rows = frame.melt(["at", "share of the synonym"], ["nll", "embedding cost"], "loss", "value")
    figure = Figure(
        (marked(chart, rows, "share of the synonym", "value", 10),), found, Slider("share of the synonym", frame, 10)
    )
    told = "Cross entropy measures whether the model has understood."
    return [Station(18, "It does not measure meaning", told, found, loose, checks, (figure,), {"meaning": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
