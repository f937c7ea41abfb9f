"""If every target is one-hot, does the model become sure of itself?

Token by token cross entropy to a one-hot target is NLL, and is KL, for the target's entropy is 0 (claim 17). But the
targets are samples: a prefix that goes on one way seven times in ten and another way three times trains to (.7, .3).
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES, cross_entropy, information
from xentlab.fit import fit_logits
from xentlab.tour import Check, Figure, Station, show

SEEN = (0, 0, 0, 0, 0, 0, 0, 1, 1, 1)


def run(steps: int = 800, seen=SEEN) -> pd.DataFrame:
    """A row a step: the probability of each continuation, as trained on the ten one-hot targets."""
    path = fit_logits(LOSSES["nll"], np.bincount(seen) / len(seen), steps)
    p = np.exp(path) / np.exp(path).sum(axis=1, keepdims=True)
    return pd.DataFrame({"step": np.arange(steps + 1), "goes on with A": p[:, 0], "goes on with B": p[:, 1]})


def names(logits=(0.3, -0.5)) -> dict[str, float]:
    """One token's loss by three names, and its target's entropy, where the target is one-hot."""
    z, e = jnp.array(logits), jax.nn.one_hot(0, 2)
    found = {"NLL": LOSSES["nll"](z, jnp.int32(0)), "cross entropy": cross_entropy(z, e)}
    found |= {"KL": information.kl_divergence(e, jax.nn.softmax(z)), "entropy of the target": information.entropy(e)}
    return {name: float(value) for name, value in found.items()}


def stations(steps: int = 800) -> list[Station]:
    """Claim 17."""
    frame, token = run(steps), names()
    last = frame.iloc[-1]
    floor = -(0.7 * np.log(0.7) + 0.3 * np.log(0.3))
    loss = -(0.7 * np.log(last.iloc[1]) + 0.3 * np.log(last.iloc[2]))
    checks = (
        Check("cross entropy - NLL of one token", token["cross entropy"] - token["NLL"], 0, 1e-6),
        Check("KL - NLL of one token", token["KL"] - token["NLL"], 0, 1e-6),
        Check("entropy of a one-hot target", token["entropy of the target"], 0, 1e-12),
        Check("share of A, trained", last.iloc[1], 0.7, 1e-3),
        Check("share of B, trained", last.iloc[2], 0.3, 1e-3),
        Check("mean loss, nats, at its floor H(.7, .3)", loss, floor, 1e-4),
    )
    found = f"One token: NLL {token['NLL']:.6f}, cross entropy {token['cross entropy']:.6f}, KL {token['KL']:.6f}. Ten one-hot "
    found += f"targets, seven of them A: the model ends at ({last.iloc[1]:.4f}, {last.iloc[2]:.4f})."
    loose = (
        "Each target is one-hot, the law is not: no single label says .7. Each token's loss by itself could reach 0; the "
        f"mean of all ten cannot go below {floor:.4f} nats, and a model that is sure of A pays without bound for B."
    )
    rows = frame.melt("step", var_name="continuation", value_name="p")
    lines = alt.Chart(rows, title="one prefix, ten continuations").mark_line(strokeWidth=2.5)
    y = alt.Y("p:Q", title="probability").scale(domain=[0, 1])
    lines = lines.encode(alt.X("step:Q").scale(nice=False), y, alt.Color("continuation:N", title=None))
    rules = alt.Chart(pd.DataFrame({"p": [0.7, 0.3]})).mark_rule(color="#888888", strokeDash=[4, 4]).encode(alt.Y("p:Q"))
    told = "With a one-hot target cross entropy collapses to the negative log likelihood."
    figure = Figure((alt.layer(rules, lines),), found)
    return [
        Station(17, "One-hot targets, and what they are samples of", told, found, loose, checks, (figure,), {"shares": frame})
    ]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
