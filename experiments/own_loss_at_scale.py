"""Does a loss of one's own run at the vocabulary of a large model, on a small machine?

`pressed`, in the script, is in no catalogue. One step of gradient descent on the head at V = 128,256: as it is, by chunks of
tokens; with a stream form, one line more, by tiles of the vocabulary; and the naive head, of which XLA's own count of bytes is
given too.
"""

import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from xentlab import at_target, linear_loss, loss


def pressed(logits, targets, *, power: float = 3.0):
    """-log p_y + (1 - p_y)^power: logits [..., V], targets [...] -> [...]."""
    log_p = at_target(jax.nn.log_softmax(logits), targets)
    return (1 - jnp.exp(log_p)) ** power - log_p


@loss(stream=lambda rivals, target, *, power: jax.nn.sigmoid(rivals - target) ** power + jax.nn.softplus(rivals - target))
def pressed_streamed(logits, targets, *, power: float = 3.0):
    """The same loss; 1 - p_y is the sigmoid of the rivals' logsumexp less the target's logit, and -log p_y the softplus."""
    return pressed(logits, targets, power=power)


def run(tokens: int = 1024, features: int = 512, vocab: int = 128_256, naive: bool = True) -> pd.DataFrame:
    """A row a head: the loss before and after one step, seconds of the step, temporary MB, the process's peak so far in MB."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(tokens, features)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
    heads = {
        "stream": lambda w: linear_loss(hidden, w, targets, loss=pressed_streamed, plan="stream"),
        "tokens": lambda w: linear_loss(hidden, w, targets, loss=pressed),
    }
    if naive:
        heads["naive"] = lambda w: jnp.mean(pressed(hidden @ w, targets))
    rows = []
    for name, head in heads.items():

        def step(weight, head=head):
            value, gradient = jax.value_and_grad(head)(weight)
            return weight - 3 * gradient, value

        weight = 0.05 * jax.random.normal(jax.random.key(0), (features, vocab))
        compiled = jax.jit(step, donate_argnums=0).lower(weight).compile()
        begun = time.perf_counter()
        moved, before = jax.block_until_ready(compiled(weight))
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        after = linear_loss(hidden, moved, targets, loss=pressed_streamed)
        row = {"head": name, "before": float(before), "after": float(after), "seconds": seconds}
        rows.append(row | {"temporary_mb": temporary, "process_peak_mb": peak})
    return pd.DataFrame(rows)


def main(tokens: int = 1024, features: int = 512, vocab: int = 128_256) -> None:
    """See the top of the file."""
    print(run(tokens, features, vocab).round(4).to_string(index=False))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
