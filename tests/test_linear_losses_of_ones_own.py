"""Losses that are not the catalogue's, under a head: jitted, from optax, with settings that their stream form lacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from naive_heads import NLL, VOCAB, batch, both, close, reference

from xentlab import LOSSES, LabError, facts_of, loss
from xentlab.linear import explain_plan, linear_log_probs, linear_loss
from xentlab.linear.form import stream_of

TRAINS = True  # as in test_linear.py


@functools.wraps(NLL)
def doubled(logits, targets):
    return 2 * NLL(logits, targets)


def test_a_jitted_function_around_a_loss_is_another_loss():
    """jax.jit copies what functools.wraps copied; a jitted loss itself is the same one."""
    hidden, weight, targets = batch()
    assert facts_of(jax.jit(doubled)).stream is None
    assert facts_of(jax.jit(NLL)) is facts_of(NLL)
    close(linear_loss(hidden, weight, targets, loss=jax.jit(doubled)), 2 * reference(NLL, targets, hidden, weight)[0])


@pytest.mark.parametrize("bad", [-1, -90, -100, VOCAB, 2**31 - 1])
def test_a_bad_target_is_nan_whatever_the_loss_makes_of_it(bad):
    """optax's own reads a negative target from the other end."""
    hidden, weight, targets = batch()
    own = optax.softmax_cross_entropy_with_integer_labels
    head = jax.jit(lambda targets: linear_loss(hidden, weight, targets, loss=own, reduction="none"))
    found = np.asarray(head(targets.at[5].set(bad)))
    assert np.flatnonzero(np.isnan(found)).tolist() == [5]


@pytest.mark.parametrize("which", [0, 1])
def test_log_probs_that_are_masked_spoil_no_gradient(which):
    """Padding by -100, as torch has it."""
    hidden, weight, targets = batch()
    padded = targets.at[2].set(-100)
    total = lambda w, y: jnp.sum(jnp.where(padded >= 0, linear_log_probs(hidden, w, y)[which], 0))
    close(jax.jit(jax.grad(total))(weight, padded), np.asarray(jax.jit(jax.grad(total))(weight, targets)))


@both
@pytest.mark.parametrize("name", ["focal", "jensen_shannon", "confidence_penalty", "squared_hinge", "exponential"])
def test_a_token_of_weight_0_has_a_target_that_no_bias_forbids(plan, name):
    """Class 0 is forbidden, as padding often is, and no token that counts asks for it."""
    hidden, weight, targets = batch()
    targets = jnp.maximum(targets, 1)
    bias = jnp.zeros(VOCAB).at[0].set(-1e30)
    more = {"loss": LOSSES[name], "bias": bias, "plan": plan, "tiles": (7, 13)}
    run = jax.jit(jax.grad(lambda w, h, y, t: linear_loss(h, w, y, token_weights=t, **more)))
    found = run(weight, hidden, targets, jnp.ones(len(targets)).at[3].set(0))
    others = np.delete(np.arange(len(targets)), 3)
    close(found, np.asarray(run(weight, hidden[others], targets[others], jnp.ones(len(others)))), 2e-5)


def test_a_setting_that_the_stream_form_lacks_is_told():
    @loss(stream=lambda rivals, target: jax.nn.softplus(rivals - target))
    def scaled(logits, targets, *, scale=1.0):
        return scale * NLL(logits, targets)

    arrays = hidden, weight, targets = batch()
    head = lambda loss: jax.jit(functools.partial(linear_loss, loss=loss))
    close(head(scaled)(*arrays), reference(NLL, targets, hidden, weight)[0])
    with pytest.raises(LabError, match="takes no scale"):
        head(functools.partial(scaled, scale=3.0))(*arrays)
    around = lambda logits, targets: scaled(logits, targets, scale=3.0)
    close(head(around)(*arrays), 3 * reference(NLL, targets, hidden, weight)[0])


STREAMED = [name for name, each in LOSSES.items() if stream_of(each)]


@functools.cache
def at_ten_thousand(plan):
    """Each loss at logits about 10,000: by the head, by a plan, and by itself in float64. A program for all of them."""
    rng = np.random.default_rng(0)
    logits = 1e4 * np.sign(rng.normal(size=(20, 1))) + rng.integers(-20, 20, size=(20, 40)) / 8
    logits, targets = logits.astype(np.float32), rng.integers(0, 40, 20).astype(np.int32)
    head = functools.partial(linear_loss, reduction="none", plan=plan, tiles=(8, 16))
    found = jax.jit(lambda z: {name: head(z, jnp.eye(40), targets, loss=LOSSES[name]) for name in STREAMED})(logits)
    with jax.enable_x64(True):
        wide = jnp.asarray(logits, jnp.float64)
        return found, jax.jit(lambda z: {name: LOSSES[name](z, jnp.asarray(targets)) for name in STREAMED})(wide)


@both
@pytest.mark.parametrize("name", STREAMED)
def test_logits_of_ten_thousand_keep_their_digits(plan, name):
    """What a loss is made of are differences of a few, which a float32 of 10,000 has to a thousandth."""
    found, right = at_ten_thousand(plan)
    np.testing.assert_allclose(found[name], right[name], rtol=1e-6)


@both
def test_an_impossible_target_costs_what_the_loss_says(plan):
    bias, ones = jnp.array([-jnp.inf, 0, 0]), jnp.ones((2, 3))
    for name in ("confidence_penalty", "jensen_shannon", "nll", "brier", "focal"):
        naive = LOSSES[name](jnp.ones((1, 2)) @ ones + bias[None], jnp.array([0]))[0]
        head = lambda bias, name=name: linear_loss(
            jnp.ones((1, 2)), ones, jnp.array([0]), loss=LOSSES[name], bias=bias, plan=plan
        )
        np.testing.assert_allclose(jax.jit(head)(bias), naive, rtol=1e-6, err_msg=name)


def test_stream_has_no_chunks_of_tokens():
    assert explain_plan(8192, 256, 32768, NLL, plan="stream", tiles=(1, 512)).temporary_bytes > 8192 * 512 * 4


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda rivals, target: jax.lax.stop_gradient(jax.nn.softplus(rivals - target)), "it gives a gradient of 0 by class"),
        (lambda rivals, target: jax.nn.softplus(rivals - jax.lax.stop_gradient(target)), "it gives a gradient of"),
        (lambda rivals, target: jnp.log1p(jnp.exp(rivals - target)), "it gives inf, the function .* lose far logits"),
        (lambda rivals, target: jnp.minimum(jax.nn.softplus(rivals - target), 12), "it gives 12, the function"),
        (lambda rivals, target: rivals // 0.0 + [][0], "stream form fails: IndexError: list index out of range"),
    ],
)
@both
def test_a_form_whose_gradient_or_far_values_are_another_loss_s_is_refused(plan, form, said):
    own = loss(shift=True, stream=form)(lambda logits, targets: NLL(logits, targets))
    with pytest.raises(LabError, match=said):
        linear_loss(*batch()[:2], batch()[2], loss=own, plan=plan)
