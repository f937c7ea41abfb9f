"""Is the probability of a text really the product of its tokens' probabilities?

Exactly (claim 3): over random conditionals, the strings of three symbols sum to 1, and drawing symbol by symbol gives each
string as often as its product says. It is about the string's probability, not about each symbol's being likely.
"""

import itertools

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import information
from xentlab.tour import Check, Figure, Station, show


def run(symbols: int = 3, length: int = 3, draws: int = 100_000, seed: int = 7) -> pd.DataFrame:
    """Every string: its probability by `sequence_log_prob`, by a float64 product, and its share among draws."""
    rng = np.random.default_rng(seed)
    # The row of the symbol before; the last row stands for the beginning.
    table = rng.normal(size=(symbols + 1, symbols)).astype(np.float32)
    law = np.exp(np.float64(table)) / np.exp(np.float64(table)).sum(axis=1, keepdims=True)
    strings = np.array(list(itertools.product(range(symbols), repeat=length)))
    before = np.concatenate([np.full((len(strings), 1), symbols), strings[:, :-1]], axis=1)
    log_p = jax.jit(information.sequence_log_prob)(jnp.asarray(table)[before], jnp.asarray(strings))
    now, number = np.full(draws, symbols), np.zeros(draws, int)
    for _ in range(length):
        now = (rng.random(draws)[:, None] > law[now].cumsum(axis=1)).sum(axis=1)
        number = number * symbols + now
    return pd.DataFrame(
        {
            "string": ["".join("abcdefgh"[i] for i in string) for string in strings],
            "p": np.exp(np.asarray(log_p, np.float64)),
            "product": law[before, strings].prod(axis=1),
            "drawn": np.bincount(number, minlength=len(strings)) / draws,
            "first_p": law[symbols, strings[:, 0]],
        }
    )


def stations(draws: int = 100_000) -> list[Station]:
    """Claim 3."""
    frame = run(draws=draws)
    apart = (frame.p / frame["product"] - 1).abs().max()
    off = ((frame.drawn - frame["product"]) / np.sqrt(frame["product"] * (1 - frame["product"]) / draws)).abs().max()
    checks = (
        Check("the sum over all strings", frame.p.sum(), 1, 1e-6),
        Check("joint / product of the conditionals - 1, at worst", apart, 0, 2e-6),
        Check("share of the draws, standard errors off at worst", off, 4, relation="at most"),
    )
    best, likeliest = frame.loc[frame.p.idxmax()], frame.loc[frame.first_p.idxmax()]
    found = f"{len(frame)} strings sum to {frame.p.sum():.7f}; each is the product of its conditionals to {apart:.0e}."
    loose = f"It holds without any symbol being right. The likeliest string is {best.string} (p = {best.p:.3f}); the likeliest "
    same = best.string[0] == likeliest.string[0]
    loose += f"first symbol is {likeliest.string[0]}, {'which begins it' if same else 'which does not begin it'}: a greedy "
    loose += "choice, token by token, is another question than the likeliest text."
    rows = frame.assign(first=frame.string.str[0]).sort_values("p", ascending=False)
    bars = alt.Chart(rows, title=f"{len(rows)} strings; bars: the product, dots: their share of {draws:,} draws").mark_bar()
    order = rows.string.tolist()
    bars = bars.encode(alt.X("string:N", sort=order, title=None), alt.Y("product:Q", title="probability"), color="first:N")
    dots = alt.Chart(rows).mark_point(color="#888888", filled=True, size=30, opacity=1)
    dots = dots.encode(alt.X("string:N", sort=order), alt.Y("drawn:Q"))
    told = "The probability of a text is the product of its tokens' probabilities, each given what came before."
    figure = Figure((bars + dots,), found)
    return [Station(3, "A text is a product, exactly", told, found, loose, checks, (figure,), {"strings": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
