"""Are log-probability, likelihood, NLL, cross entropy, perplexity and a framework's function one quantity?

One batch, every name, one number (claim 1), beside float64 numpy. torch's cross_entropy is among the names where torch is
installed (extra `bench`). The slider: what a uniform guess over V tokens costs, by every name.
"""

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from xentlab import LOSSES, cross_entropy, information
from xentlab.charts import marked
from xentlab.tour import Check, Figure, Slider, Station, show


def names(logits, targets) -> dict[str, float]:
    """The mean loss of one batch in nats, by every road."""
    one_hot, q = jax.nn.one_hot(targets, logits.shape[-1]), jax.nn.softmax(logits)
    log_p = information.sequence_log_prob(logits, targets)
    p = np.asarray(q, np.float64)[np.arange(len(targets)), np.asarray(targets)]
    found = {
        "nll": information.weighted_mean(LOSSES["nll"](logits, targets))[0],
        "cross entropy to the one-hot": cross_entropy(logits, one_hot).mean(),
        "H(P) + KL(P || Q)": (information.entropy(one_hot) + information.kl_divergence(one_hot, q)).mean(),
        "-log likelihood of the text / tokens": -log_p / len(targets),
        "-log of the product, in float64": -np.log(np.prod(p)) / len(p),
        "log perplexity": jnp.log(information.perplexity(-log_p / len(targets))),
        "bits times log 2": information.bits(-log_p / len(targets)) * np.log(2),
        "optax": optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(),
    }
    try:
        import torch

        arrays = torch.tensor(np.asarray(logits)), torch.tensor(np.asarray(targets, np.int64))
        found["torch cross_entropy"] = torch.nn.functional.cross_entropy(*arrays)
    except ImportError:
        pass
    return {name: float(value) for name, value in found.items()}


def run(logits, targets) -> pd.DataFrame:
    """Every name's value beside float64 numpy's."""
    z = np.asarray(logits, np.float64)
    exact = float(np.mean(np.log(np.exp(z).sum(-1)) - z[np.arange(len(z)), np.asarray(targets)]))
    return pd.DataFrame([{"what": name, "value": value, "expected": exact} for name, value in names(logits, targets).items()])


def stations(tokens: int = 64, vocab: int = 50, seed: int = 0) -> list[Station]:
    """Claim 1."""
    rng = np.random.default_rng(seed)
    logits, targets = jnp.asarray(rng.normal(size=(tokens, vocab)), jnp.float32), jnp.asarray(rng.integers(0, vocab, tokens))
    found = run(logits, targets)
    sizes = 2 ** np.arange(1, 19)
    with jax.enable_x64(True):
        nats = np.array([float(jax.jit(LOSSES["nll"])(np.zeros(size), np.int32(0))) for size in sizes])
    uniform = pd.DataFrame({"at": range(18), "V": sizes, "nats": nats, "bits": nats / np.log(2), "perplexity": np.exp(nats)})
    line = alt.Chart(uniform, title="A uniform guess over V tokens").mark_line(strokeWidth=2.5)
    line = line.encode(alt.X("V:Q").scale(type="log", base=2), alt.Y("nats:Q", title="NLL, nats a token"))
    twice = float(optax.softmax_cross_entropy_with_integer_labels(jax.nn.softmax(logits), targets).mean())
    station = Station(
        1,
        "Many names, one mountain",
        "Log-probability, likelihood, NLL, cross entropy, perplexity and cross_entropy are the same thing.",
        f"{len(found)} names for the mean loss of {tokens} tokens gave {found.expected[0]:.6f} nats, the furthest "
        f"{(found.value - found.expected).abs().max():.0e} from float64.",
        f"Perplexity is e to that number, {np.exp(found.expected[0]):.3f}. And a framework's function takes logits: given the "
        f"probabilities instead, it raises nothing and says {twice:.3f} nats.",
        tuple(Check(row.what, row.value, row.expected, 1e-6) for row in found.itertuples()),
        (Figure((marked(line, uniform, "V", "nats", 14),), "NLL grows like log V.", Slider("vocabulary V", uniform, 14)),),
        {"names": found},
    )
    return [station]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
