"""Is the loss of a text the average over its tokens, and is that the average over micro-batches?

The mean is over the tokens that count (claim 11). Ragged micro-batches give it back as (sum, weight) pairs; the mean of their
means is another number. And -log p is no probability of a mistake: that is 1 - p.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES, information
from xentlab.tour import Check, Figure, Station, show


def run(lengths=(4, 16, 64, 2), vocab: int = 50, seed: int = 0) -> pd.DataFrame:
    """A row a micro-batch of one padded text: its mean NLL, its weight (tokens that count), its mean 1 - p."""
    rng = np.random.default_rng(seed)
    rows = []
    for i, length in enumerate(lengths):
        # Short texts are made the harder ones.
        logits = jnp.asarray(rng.normal(size=(max(lengths), vocab)), jnp.float32)
        targets = jnp.asarray(rng.integers(0, vocab, max(lengths)))
        logits = logits + 3 * (1 - 1 / length) * jax.nn.one_hot(targets, vocab)
        counts = jnp.asarray(np.arange(max(lengths)) < length, jnp.float32)
        nll = LOSSES["nll"](logits, targets)
        mean, weight = information.weighted_mean(nll, counts)
        mistake = information.weighted_mean(1 - jnp.exp(-nll), counts)[0]
        rows.append(
            {"batch": f"{i + 1}: {length} tokens", "mean": float(mean), "weight": float(weight), "mistake": float(mistake)}
        )
        rows[-1]["sum"] = float(np.asarray(nll, np.float64)[:length].sum())
    return pd.DataFrame(rows)


def stations(lengths: tuple[int, ...] = (4, 16, 64, 2)) -> list[Station]:
    """Claim 11."""
    frame = run(lengths)
    whole = frame["sum"].sum() / sum(lengths)
    combined = float(np.average(frame["mean"], weights=frame.weight))
    of_means, mistake = frame["mean"].mean(), float(np.average(frame.mistake, weights=frame.weight))
    checks = (
        Check("(sum, weight) pairs, combined", combined, whole, 1e-6),
        Check("tokens that count", frame.weight.sum(), sum(lengths)),
        Check("mean of means, off by", abs(of_means - whole), 0.1, relation="at least"),
        Check("1 - e^-(mean NLL), against the mean of 1 - p: Jensen", 1 - np.exp(-whole) - mistake, 0, relation="at least"),
    )
    found = f"{sum(lengths)} tokens cost {whole:.4f} nats on average; {len(lengths)} micro-batches combined by their weights "
    found += f"{combined:.4f}, the mean of their means {of_means:.4f}."
    loose = (
        f"Means of micro-batches are not the mean: here, where short texts were made harder, they are "
        f"{of_means / whole - 1:+.0%} off, the short ones counting as much as the long. And the loss is no probability of a "
        f"mistake: the mean of 1 - p is {mistake:.3f}; the mean of -log p, {whole:.3f}, can pass 1."
    )
    rows = pd.DataFrame({"road": ["all tokens", "(sum, weight)", "mean of means"], "nats": [whole, combined, of_means]})
    bars = alt.Chart(frame, title="micro-batches: mean NLL (size: tokens)").mark_point(filled=True, opacity=0.8)
    y = alt.Y("batch:N", sort=None, title=None)
    bars = bars.encode(alt.X("mean:Q", title="nats a token").scale(zero=False), y, alt.Size("weight:Q", legend=None))
    roads = alt.Chart(rows, title="the text's loss, by three roads").mark_bar()
    roads = roads.encode(
        alt.X("nats:Q", title="nats a token"), alt.Y("road:N", sort=None, title=None), color=alt.Color("road:N", legend=None)
    )
    told = "The loss of a text is the average over its tokens: the mean probability of a mistake."
    figure = Figure((bars, roads), found)
    return [Station(11, "The average, and whose", told, found, loose, checks, (figure,), {"batches": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
