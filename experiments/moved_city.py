"""What does an old map cost when the city was rebuilt?

A bigram model learns one Markov chain; then the chain moves, step by step, to another law (claim 15). What walking costs is
H(P) + KL(P || Q): the first part any map pays, the second is for the map's age. Tokens drawn from each moved chain agree.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import charts, resolve
from xentlab.models import logits
from xentlab.recipe import Recipe
from xentlab.sources import MarkovSource
from xentlab.tour import Check, Figure, Slider, Station, show
from xentlab.training import train

OLD, NEW = MarkovSource(vocab=8, seed=0, exponent=1.5), MarkovSource(vocab=8, seed=1, exponent=0.8)


def learnt(steps: int) -> np.ndarray:
    """The model's law after each token [V, V], in float64, trained by nll on the old chain."""
    trained = train(resolve("nll"), OLD, "bigram", [0.1], [0], Recipe(steps=steps, batch=32, blocks=4))
    q = jax.nn.softmax(logits(trained.model(0), jnp.arange(OLD.vocab)[:, None])[:, 0])
    return np.asarray(q, np.float64) / np.asarray(q, np.float64).sum(axis=1, keepdims=True)


def run(steps: int = 400, moves: int = 20, draws: int = 20_000) -> pd.DataFrame:
    """A row a step of the move, in bits a token: H(P), KL(P || Q), CE, KL(Q || P), and the mean cost of drawn tokens."""
    q, rows, rng = learnt(steps), [], np.random.default_rng(0)
    for at, share in enumerate(np.linspace(0, 1, moves + 1)):
        law = (1 - share) * OLD.table + share * NEW.table
        often = np.linalg.matrix_power(law, 200)[0]  # how often each context occurs in the long run
        mean = lambda each, often=often: float(often @ each.sum(axis=1))
        back = float(np.linalg.matrix_power(q, 200)[0] @ (q * np.log2(q / law)).sum(axis=1))
        ce, entropy = mean(-law * np.log2(q)), mean(-law * np.log2(law))
        before = rng.choice(len(often), draws, p=often / often.sum())
        after = (rng.random(draws)[:, None] > law[before].cumsum(axis=1)[:, :-1]).sum(axis=1)
        cost = -np.log2(q[before, after])
        row = {"at": at, "share": share, "entropy": entropy, "kl": mean(law * np.log2(law / q)), "cross_entropy": ce}
        rows.append(row | {"kl_back": back, "drawn": cost.mean(), "error": cost.std() / draws**0.5})
    return pd.DataFrame(rows)


def stations(steps: int = 400) -> list[Station]:
    """Claim 15."""
    frame = run(steps)
    here, there = frame.iloc[0], frame.iloc[-1]
    off = ((frame.drawn - frame.cross_entropy) / frame.error).abs().max()
    checks = (
        Check("CE - (H + KL), at worst", (frame.cross_entropy - frame.entropy - frame.kl).abs().max(), 0, 1e-9),
        Check("KL where the map was drawn, bits", here.kl, 0, 0.02),
        Check("what the fresh map still costs, against H(P)", here.cross_entropy, here.entropy, 0.02),
        Check("drawn tokens, standard errors off at worst", off, 4, relation="at most"),
        Check("KL grown by the move, bits", there.kl - here.kl, 0.5, relation="at least"),
        Check("KL(new || old) against KL(old || new), bits apart", abs(there.kl - there.kl_back), 0.02, relation="at least"),
    )
    found = f"Where the map was drawn it costs {here.cross_entropy:.3f} bits a token, {here.kl:.3f} of it divergence; in the "
    found += f"rebuilt city {there.cross_entropy:.3f} and {there.kl:.3f}. Entropy: {here.entropy:.3f}, {there.entropy:.3f}."
    share = (there.entropy - here.entropy) / (there.cross_entropy - here.cross_entropy)
    loose = f"The extra way is KL, not cross entropy: a perfect map of the new city would cost {there.entropy:.3f}. Of the "
    loose += f"rise in loss {share:.0%} is the city's, not the map's. And the extra is not symmetric: a map of the new city "
    loose += f"would cost {there.kl_back:.3f} bits extra in the old one."
    lines = frame.melt("share", ["cross_entropy", "entropy", "kl", "kl_back"], "what", "bits")
    about = "dots: drawn tokens, the large one where the page's slider is; kl_back: the new city's map in the old one"
    chart = alt.Chart(lines, title=alt.Title("the city moves, the map stays", subtitle=about)).mark_line(strokeWidth=2.5)
    x = alt.X("share:Q", title="share of the new law")
    chart = chart.encode(x, alt.Y("bits:Q", title="bits"), alt.Color("what:N", title=None))
    dots = alt.Chart(frame).mark_point(color="#888888", filled=True, size=25).encode(x, alt.Y("drawn:Q"))
    chart = charts.marked(alt.layer(chart, dots), frame, "share", "cross_entropy", 0)
    figure = Figure((chart,), found, Slider("share of the new law", frame, 0))
    told = "Cross entropy is the way you walk in a rebuilt city with an old map."
    return [Station(15, "An old map of a rebuilt city", told, found, loose, checks, (figure,), {"moved": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
