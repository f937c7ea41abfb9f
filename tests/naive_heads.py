"""The naive head in float64, to which every form of `linear_loss` is held, and the batches and losses that both get."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab import LOSSES, facts_of, name_of
from xentlab.linear import linear_loss
from xentlab.linear.form import stream_of
from xentlab.names import with_settings

TOKENS, FEATURES, VOCAB = 23, 5, 97
CASES = [
    with_settings(loss, setting) for loss in LOSSES.values() for setting in facts_of(loss).settings if "prior" not in setting
]
# Every setting through its stream form; through tokens, which asks the loss itself or the same form, each loss once.
PLANNED = [(loss, "tokens") for loss in CASES if not isinstance(loss, functools.partial)]
PLANNED += [(loss, "stream") for loss in CASES if stream_of(loss)]
every_plan = pytest.mark.parametrize(
    ("loss", "plan"), PLANNED, ids=lambda each: each if isinstance(each, str) else name_of(each)
)
both = pytest.mark.parametrize("plan", ["tokens", "stream"])
NLL, BRIER = LOSSES["nll"], LOSSES["brier"]
cpus_alone = pytest.mark.skipif(jax.default_backend() != "cpu", reason="sizes are a CPU's")  # as where CI runs


def batch(tokens=TOKENS, features=FEATURES, vocab=VOCAB, scale=1.0, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden, weight = scale * rng.normal(size=(tokens, features)), rng.normal(size=(features, vocab))
    return jnp.asarray(hidden, dtype), jnp.asarray(weight, dtype), jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)


def naive(loss, targets, hidden, weight, bias=None, token_weights=None, softcap=None):
    """The head as anyone would write it; called with float64 arrays under x64."""
    z = hidden @ weight
    z = z if bias is None else z + bias[None]
    z = z if softcap is None else softcap * jnp.tanh(z / softcap)
    return jnp.average(loss(z, targets), weights=token_weights)


KEPT = {}  # references that both plans are held to


def reference(loss, targets, *arrays, **more):
    """Value and gradients of the naive head in float64."""
    key = (name_of(loss), repr(more), *(np.asarray(each).tobytes() for each in (targets, *arrays)))
    if key not in KEPT:
        KEPT[key] = _reference(loss, targets, *arrays, **more)
    return KEPT[key]


def _reference(loss, targets, *arrays, **more):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(array), jnp.float64) for array in arrays]
        run = jax.jit(
            jax.value_and_grad(functools.partial(naive, loss, jnp.asarray(np.asarray(targets)), **more), range(len(arrays)))
        )
        value, gradients = run(*wide)
        return np.asarray(value), [np.asarray(each) for each in gradients]


def close(found, expected, rtol=1e-5):
    """Within rtol of the array's own size: an entry that cancels is not asked for more."""
    for each, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(each, np.float64), right, rtol=0, atol=rtol * max(np.abs(right).max(), 1e-30))


def weighted_batch():
    """A batch with a bias and token weights: what a head is differentiated by, and the targets."""
    hidden, weight, targets = batch()
    rng = np.random.default_rng(1)
    bias, token_weights = jnp.asarray(rng.normal(size=VOCAB), jnp.float32), jnp.asarray(rng.random(TOKENS) + 0.1, jnp.float32)
    return (hidden, weight, bias, token_weights), targets


def heads(planned):
    """Values and gradients of each loss by its plan: one program, as XLA takes several times as long for one a loss."""

    def one(loss, plan, arrays, targets):
        head = lambda hidden, weight, bias, token_weights: linear_loss(
            hidden, weight, targets, loss=loss, plan=plan, tiles=(7, 13), bias=bias, token_weights=token_weights
        )
        return jax.value_and_grad(head, range(4))(*arrays)

    return jax.jit(lambda arrays, targets: [one(*each, arrays, targets) for each in planned])


@functools.cache
def every_head(plan):
    """All losses of a plan, and their heads."""
    planned = [each for each in PLANNED if each[1] == plan]
    return [loss for loss, _ in planned], heads(planned)


@functools.cache
def every_naive_head():
    """The same in float64 by the naive head, all at once."""
    arrays, targets = weighted_batch()
    with jax.enable_x64(True):
        wide = [np.asarray(each, np.float64) for each in arrays]
        one = lambda loss, arrays: jax.value_and_grad(functools.partial(naive, loss, targets), range(4))(*arrays)
        return jax.device_get(jax.jit(lambda arrays: [one(loss, arrays) for loss in CASES])(wide))
