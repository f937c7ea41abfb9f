"""What a loss makes of one known distribution, without a model between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xentlab.contract import Loss

RATE = 0.05  # Adam's, as it begins


def fit_logits(loss: Loss, law: np.ndarray, steps: int = 2000) -> np.ndarray:
    """What a loss makes of one known distribution: free logits trained by Adam on the expected loss, from 0, in float64.

    loss: any loss. law: probabilities [V]. The rate falls to 0 along a cosine. Returns the logits after 0, 1, ... steps,
    [steps + 1, V].

    >>> from xentlab import resolve
    >>> p = jax.nn.softmax(fit_logits(resolve("nll"), np.array([0.1, 0.4, 0.5]))[-1])
    >>> [round(float(each), 4) for each in p]
    [0.1, 0.4, 0.5]
    """
    targets, optimizer = jnp.arange(len(law)), optax.adam(optax.cosine_decay_schedule(RATE, steps))

    def expected(logits, law):
        return jnp.sum(law * loss(jnp.broadcast_to(logits, (len(law), len(law))), targets))

    @jax.jit
    def fit(law):
        def step(state, _):
            logits, moments = state
            updates, moments = optimizer.update(jax.grad(expected)(logits, law), moments)
            return (optax.apply_updates(logits, updates), moments), logits

        start = jnp.zeros(len(law), law.dtype)
        (last, _), path = jax.lax.scan(step, (start, optimizer.init(start)), length=steps)
        return jnp.concatenate([path, last[None]])

    with jax.enable_x64(True):
        return np.asarray(fit(jnp.asarray(law, jnp.float64)))
