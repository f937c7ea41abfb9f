"""Are log-probability, likelihood, NLL, cross entropy, perplexity and a framework's function one quantity?

One batch, every name, one number (claims 1 and 17); the chain rule over whole strings, which sum to 1 (claim 3); and where
the one-hot target is only a sample: a prefix continued 70/30 trains to (.7, .3), which no one-hot label says.
torch's cross_entropy is among the names where torch is installed (extra `bench`).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd

from xentlab import LOSSES, cross_entropy, information


def names(logits, targets) -> dict[str, float]:
    """The mean loss of one batch in nats, by every road."""
    one_hot = jax.nn.one_hot(targets, logits.shape[-1])
    log_p = information.sequence_log_prob(logits, targets)
    p = np.asarray(jax.nn.softmax(logits), np.float64)[np.arange(len(targets)), np.asarray(targets)]
    q = jax.nn.softmax(logits)
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
    except ImportError:
        return {name: float(value) for name, value in found.items()}
    found["torch cross_entropy"] = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)), torch.tensor(np.asarray(targets, np.int64))
    )
    return {name: float(value) for name, value in found.items()}


def strings_sum(symbols: int, length: int, seed: int) -> float:
    """The summed probability of all strings of one length, under random conditionals of the symbol before."""
    table = jax.random.normal(jax.random.key(seed), (symbols + 1, symbols))
    strings = jnp.array(list(itertools.product(range(symbols), repeat=length)))
    before = jnp.concatenate([jnp.full((len(strings), 1), symbols), strings[:, :-1]], axis=1)
    return float(jnp.exp(information.sequence_log_prob(table[before], strings)).sum())


def trained_share(steps: int) -> float:
    """What nll makes of a prefix that goes on with token 0 seven times and with token 1 three times in ten."""
    targets, optimizer = jnp.array([0] * 7 + [1] * 3), optax.adam(0.1)
    objective = lambda z: LOSSES["nll"](jnp.broadcast_to(z, (10, 2)), targets).mean()

    def step(state, _):
        z, moments = state
        updates, moments = optimizer.update(jax.grad(objective)(z), moments)
        return (z + updates, moments), None

    (z, _), _ = jax.lax.scan(step, (jnp.zeros(2), optimizer.init(jnp.zeros(2))), length=steps)
    return float(jax.nn.softmax(z)[0])


def run(tokens: int = 64, vocab: int = 50, steps: int = 500, seed: int = 0) -> pd.DataFrame:
    """Every name's value; then the two facts beside it, each with what it should be."""
    first, second = jax.random.split(jax.random.key(seed))
    logits, targets = jax.random.normal(first, (tokens, vocab)), jax.random.randint(second, (tokens,), 0, vocab)
    found = names(logits, targets)
    rows = [{"what": name, "value": value, "expected": found["nll"]} for name, value in found.items()]
    rows.append({"what": "all strings of 3 over 3 symbols", "value": strings_sum(3, 3, seed), "expected": 1.0})
    rows.append({"what": "share of a 70/30 continuation", "value": trained_share(steps), "expected": 0.7})
    return pd.DataFrame(rows).assign(difference=lambda f: (f.value - f.expected).abs())


if __name__ == "__main__":
    print(run().to_string(index=False))
