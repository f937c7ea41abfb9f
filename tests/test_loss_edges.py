"""Where a number has a limit it takes it: in narrow types, at large vocabularies, beside what is impossible, at edges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab import LOSSES, cross_entropy, facts_of
from xentlab.information import cross_entropy as expected_news
from xentlab.information import weighted_mean
from xentlab.linear import linear_loss

LARGE = 70_000
# Whose value at even logits float16 holds; a sum over classes of squared logits, or of their odds, it does not.
HELD = sorted(LOSSES.keys() - {"exponential", "hinge_weston_watkins", "squared_hinge", "one_vs_rest", "unlikelihood"})


@functools.cache
def of_a_large_vocabulary(dtype):
    """Values and gradients of all losses at even logits: one program."""
    one = lambda name, z: jax.value_and_grad(lambda z: LOSSES[name](z, jnp.array(LARGE - 1)))(z)
    return jax.jit(lambda z: {name: one(name, z) for name in HELD})(jnp.zeros(LARGE, dtype))


@pytest.mark.parametrize("name", HELD)
def test_float16_has_a_large_vocabulary(name):
    """A sum of 65,536 ones is infinite there, and a uniform guess was perfect."""
    value, gradient = of_a_large_vocabulary("float16")[name]
    exact, slope = of_a_large_vocabulary("float32")[name]
    assert (value.dtype, gradient.dtype) == (jnp.float16, jnp.float16)
    np.testing.assert_allclose(np.float32(value), exact, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(np.float32(gradient[-1]), slope[-1], rtol=2e-3, atol=1e-3)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("name", LOSSES)
def test_numpys_own_numbers_are_taken(name):
    """In float64, which JAX has not unless it is told to, and would warn of."""
    value = LOSSES[name](np.array([[0.5, -1.0, 2.0]]), np.array([1]))
    np.testing.assert_allclose(value, LOSSES[name](jnp.array([[0.5, -1.0, 2.0]]), jnp.array([1])), rtol=1e-6)
    assert value.dtype == jnp.float32


@pytest.mark.parametrize("vocab", [300, 1000, 2000])
def test_a_direction_in_float16_has_a_gradient(vocab):
    gradient = jax.grad(lambda z: LOSSES["spherical"](z, jnp.array(0)))(jnp.zeros(vocab, jnp.float16))
    exact = jax.grad(lambda z: LOSSES["spherical"](z, jnp.array(0)))(jnp.zeros(vocab))
    np.testing.assert_allclose(np.float32(gradient), exact, rtol=2e-3, atol=1e-4)


def test_a_mean_in_float16_is_that_of_its_numbers():
    mean, weight = weighted_mean(jnp.full(8192, 10.0, jnp.float16))
    assert (mean, mean.dtype, weight) == (10, jnp.float16, 8192)
    assert weighted_mean(jnp.ones(LARGE, jnp.float16)) == (1, LARGE)
    assert weighted_mean(jnp.full(1000, 3.0, jnp.bfloat16))[0] == 3


IMPOSSIBLE = jnp.array([-jnp.inf, 1.0, 0.0, 2.0, -1.0])


@pytest.mark.parametrize("name", ["hinge", "perceptron"])
def test_of_an_impossible_target_the_greatest_rival_has_the_gradient(name):
    value, gradient = jax.value_and_grad(LOSSES[name])(IMPOSSIBLE, jnp.array(0))
    assert value == jnp.inf
    assert gradient.tolist() == [-1, 0, 0, 1, 0]


@pytest.mark.parametrize("plan", ["stream", "tokens"])
@pytest.mark.parametrize("name", ["hinge", "perceptron", "hinge_weston_watkins", "squared_hinge", "focal", "nll"])
def test_the_head_gives_an_impossible_target_what_the_function_does(name, plan):
    hidden, targets = jnp.array([[0.0, 1, 0, 2, -1], [1, 0, 0, 0, 0]]), jnp.array([0, 1])
    bias = jnp.where(jnp.arange(5) == 0, -jnp.inf, 0.0)
    found = linear_loss(hidden, jnp.eye(5), targets, bias=bias, loss=LOSSES[name], reduction="none", plan=plan)
    np.testing.assert_allclose(found, LOSSES[name](hidden + bias[None], targets), rtol=1e-6)
    assert found[0] == jnp.inf


@pytest.mark.parametrize("name", ["nll", "hinge", "perceptron", "hinge_weston_watkins", "squared_hinge", "exponential"])
def test_a_rival_that_is_out_leads_no_target_that_is_out(name):
    """Of two classes at -inf neither is ahead; the third leads by infinity."""
    z, target = jnp.array([-jnp.inf, -jnp.inf, 0.0]), jnp.array(0)
    value, gradient = jax.value_and_grad(LOSSES[name])(z, target)
    assert value == jnp.inf
    assert gradient[1] == 0
    assert gradient[2] > 0
    assert linear_loss(jnp.zeros((1, 1)), jnp.zeros((1, 3)), target[None], bias=z, loss=LOSSES[name]) == jnp.inf
    assert jnp.isnan(LOSSES[name](z.at[0].set(jnp.nan), target))


@pytest.mark.parametrize("plan", ["stream", "tokens"])
def test_a_weight_that_is_infinite_is_its_own_token_s_alone(plan):
    hidden, weights = jnp.ones((11, 4), jnp.float16), jnp.ones(11).at[2].set(jnp.inf)
    mixed = jnp.arange(52.0).reshape(4, 13).astype(jnp.float16) / 52
    run = lambda hidden: linear_loss(hidden, mixed, jnp.arange(11), token_weights=weights, reduction="sum", plan=plan)
    assert jnp.isfinite(jax.grad(run)(hidden)).all(axis=1).tolist() == [place != 2 for place in range(11)]


def test_a_bias_in_float16_overflows_nowhere():
    """Warnings are errors here."""
    hidden, weight = jnp.ones((3, 2), jnp.float16), jnp.ones((2, 5), jnp.float16)
    run = jax.jit(lambda bias: linear_loss(hidden, weight, jnp.zeros(3, jnp.int32), bias=bias))
    assert run(jnp.zeros(5, jnp.float16)) == pytest.approx(np.log(5))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focals_gradient_has_its_limit_at_an_impossible_target(gamma):
    """So that a mask afterwards saves it: elsewhere 0 times it is no NaN."""
    focal = functools.partial(LOSSES["focal"], gamma=gamma)
    gradient = jax.grad(focal)(IMPOSSIBLE, jnp.array(0))
    np.testing.assert_allclose(gradient, jax.grad(LOSSES["nll"])(IMPOSSIBLE, jnp.array(0)), rtol=1e-6)


def test_at_the_edge_of_a_setting_a_term_is_gone():
    masked = jnp.array([1.0, 0.0, -jnp.inf])
    for name, settings in (("label_smoothing", {"epsilon": 0.0}), ("focal", {"gamma": 0.0}), ("z_loss", {"coefficient": 0.0})):
        found, exact = LOSSES[name](masked, jnp.array(1), **settings), LOSSES["nll"](masked, jnp.array(1))
        np.testing.assert_allclose(found, exact, rtol=1e-6, err_msg=name)
    assert LOSSES["mixce"](masked, jnp.array(2), eta=0.0) == 0


@pytest.mark.parametrize("height", [1e4, -1e4])
def test_a_prior_counts_beside_great_logits(height):
    """log(4 * (1 + 1/2 + ... + 1/11)); and where the greatest logit's class is impossible, by its prior, of (1, 3) / 4."""
    adjusted = LOSSES["logit_adjusted"]
    value, gradient = jax.value_and_grad(adjusted)(jnp.full(11, height), jnp.array(3))
    prior = 1 / np.arange(1, 12) / (1 / np.arange(1, 12)).sum()
    np.testing.assert_allclose(value, -np.log(prior[3]), rtol=2e-7)
    np.testing.assert_allclose(gradient, prior - np.eye(11)[3], rtol=1e-6)
    link = facts_of(adjusted).link(jnp.full(11, height))
    np.testing.assert_allclose(link, prior, rtol=1e-6)
    led = jnp.array([3e4, height, height])
    np.testing.assert_allclose(adjusted(led, jnp.array(1), prior=(0.0, 0.25, 0.75)), np.log(4), rtol=1e-6)


def test_a_share_of_0_has_its_derivative():
    """Where a smoothing is learned it begins there."""
    z, one_hot = jnp.array([1.0, 0.0, -1.0]), jnp.array([1.0, 0.0, 0.0])
    slope = jax.grad(lambda share: cross_entropy(z, (1 - share) * one_hot + share / 3))(0.0)
    assert slope == pytest.approx(float(jnp.mean(z[0] - z)), rel=1e-6)
    by_p = jax.grad(expected_news)(one_hot, jnp.array([0.5, 0.3, 0.2]))
    np.testing.assert_allclose(by_p, -np.log([0.5, 0.3, 0.2]), rtol=1e-6)
    assert cross_entropy(jnp.array([0.0, -jnp.inf]), jnp.array([1.0, 0.0])) == 0


@pytest.mark.parametrize("name", ["entmax15", "nll", "brier", "hinge"])
@pytest.mark.parametrize("plan", ["auto", "tokens"])
def test_results_of_each_token_are_differentiated_twice(name, plan):
    """In values that enter the second derivative themselves, as of a ratio or a power."""
    drawn = np.random.default_rng(0)
    hidden, weight = (jnp.asarray(drawn.normal(size=shape), jnp.float32) for shape in ((6, 3), (3, 11)))
    targets = jnp.arange(6)
    of = lambda each: lambda hidden: jnp.sum(each(hidden) ** 2)
    head = of(lambda hidden: linear_loss(hidden, weight, targets, loss=LOSSES[name], reduction="none", plan=plan))
    naive = of(lambda hidden: LOSSES[name](hidden @ weight, targets))
    twice = [jax.jit(lambda h, f=f: jax.jvp(jax.grad(f), (h,), (hidden,))[1])(hidden) for f in (head, naive)]
    np.testing.assert_allclose(*twice, rtol=1e-4, atol=1e-5)
