"""Identities of information theory, and the numbers of CLAIMS: the essay's own examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from xentlab import LabError, cross_entropy, information
from xentlab.information import sequence_log_prob
from xentlab.losses.likelihood import nll


@st.composite
def distributions(draw, size=5, zeros=True):
    weights = np.array(draw(st.lists(st.floats(1e-3, 1), min_size=size, max_size=size)))
    if zeros:
        keep = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)))
        weights = np.where(keep | (np.arange(size) == 0), weights, 0)
    return (weights / weights.sum()).astype(np.float32)


@given(p=distributions(), q=distributions(zeros=False))
def test_cross_entropy_is_entropy_plus_divergence(p, q):
    p, q = jnp.asarray(p), jnp.asarray(q)
    whole = information.entropy(p) + information.kl_divergence(p, q)
    assert float(information.cross_entropy(p, q)) == pytest.approx(float(whole), abs=2e-6)
    assert information.kl_divergence(p, q) >= -1e-6


@given(p=distributions(), q=distributions())
def test_entropies_equal_scipy(p, q):
    assert float(information.entropy(jnp.asarray(p))) == pytest.approx(scipy.stats.entropy(p), abs=2e-6)
    ours, theirs = float(information.kl_divergence(jnp.asarray(p), jnp.asarray(q))), scipy.stats.entropy(p, q)
    assert ours == (np.inf if np.isinf(theirs) else pytest.approx(theirs, abs=3e-6))


def test_a_share_that_float32_has_none_of_is_none():
    """NumPy holds 1e-50 to be more than 0, and JAX takes it as 0."""
    p, even = np.array([1e-50, 1.0]), np.array([0.5, 0.5])
    assert float(information.entropy(p)) == 0
    assert float(information.kl_divergence(p, even)) == pytest.approx(np.log(2))
    assert float(information.cross_entropy(np.array([0.0, 1.0]), p)) == 0


def test_means_of_narrow_numbers_and_of_large_counts():
    """Of 300 times 300 float16 has no number, and int32 none of 2^40."""
    many, most = jnp.full(4, 1000, jnp.float16), np.array([2**40, 2**40])
    assert information.weighted_mean(many, many)[0] == 1000
    assert float(information.weighted_mean(most)[0]) == 2**40


def test_published_numbers():
    p = jnp.array([0.1, 0.4, 0.5])
    for q, ce, kl in (([1 / 3] * 3, 1.58496, 0.22400), ([0.5, 0.4, 0.1], 2.28974, 0.92877)):
        assert float(information.bits(information.cross_entropy(p, jnp.array(q)))) == pytest.approx(ce, abs=1e-5)
        assert float(information.bits(information.kl_divergence(p, jnp.array(q)))) == pytest.approx(kl, abs=1e-5)
    assert float(information.bits(information.entropy(p))) == pytest.approx(1.36096, abs=1e-5)
    logits = jnp.log(jnp.full((100, 10), 0.1))
    assert float(information.sequence_log_prob(logits, jnp.zeros(100, jnp.int32))) == pytest.approx(-230.2585, abs=1e-3)


def test_support_mismatch_is_infinite_and_not_nan():
    p, q = jnp.array([0.5, 0.5, 0.0]), jnp.array([1.0, 0.0, 0.0])
    assert information.kl_divergence(p, q) == jnp.inf
    assert information.cross_entropy(p, q) == jnp.inf
    assert information.kl_divergence(q, p) == pytest.approx(np.log(2))


def test_a_divergence_of_what_is_no_number_is_none():
    p, q = jnp.array([[jnp.nan, 1.0], [0.0, 1.0]]), jnp.array([[0.5, 0.5], [jnp.nan, 1.0]])
    np.testing.assert_array_equal(information.kl_divergence(p, q), [np.nan, 0])


def test_one_hot_cross_entropy_is_nll_also_beside_minus_infinity():
    logits = jnp.array([[1.0, -jnp.inf, 0.3], [0.1, 0.2, -3.0]])
    targets = jnp.array([0, 2])
    one_hot = jax.nn.one_hot(targets, 3)
    np.testing.assert_allclose(cross_entropy(logits, one_hot), nll(logits, targets), rtol=1e-6)
    gradient = jax.grad(lambda z: cross_entropy(z, one_hot).sum())(logits)
    np.testing.assert_allclose(gradient, jax.nn.softmax(logits) - one_hot, atol=1e-6)


def test_soft_cross_entropy_gradient_is_p_minus_t():
    logits, t = jnp.array([0.3, -1.0, 2.0]), jnp.array([0.7, 0.3, 0.0])
    np.testing.assert_allclose(jax.grad(cross_entropy)(logits, t), jax.nn.softmax(logits) - t, atol=1e-6)
    assert cross_entropy(jnp.array([0.0, 0.0, -jnp.inf]), jnp.array([0.0, 0.5, 0.5])) == jnp.inf
    with pytest.raises(LabError, match="nll"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2, 4)))


def test_joint_probability_of_all_strings_is_one():
    """Claim 3: the chain rule is exact. All strings of length 3 over 3 symbols, under a random table of conditionals."""
    conditionals = jax.random.normal(jax.random.key(0), (4, 3))  # by the previous symbol, the last row for the start
    strings = jnp.stack(jnp.meshgrid(*[jnp.arange(3)] * 3, indexing="ij"), -1).reshape(27, 3)
    before = jnp.concatenate([jnp.full((27, 1), 3), strings[:, :-1]], axis=1)
    total = jnp.exp(information.sequence_log_prob(conditionals[before], strings)).sum()
    assert float(total) == pytest.approx(1, abs=1e-6)


def test_what_is_masked_leaves_no_trace_in_value_or_gradient():
    logits = jnp.array([[0.0, 0.0], [jnp.nan, jnp.inf]])
    of = lambda z: sequence_log_prob(z, jnp.array([0, 1]), jnp.array([1.0, 0.0]))
    value, gradient = jax.value_and_grad(of)(logits)
    assert value == pytest.approx(-np.log(2))
    np.testing.assert_allclose(gradient, [[0.5, -0.5], [0, 0]])


def test_mean_of_parts_is_the_mean_of_the_whole():
    values = jnp.arange(7.0)
    weights = jnp.array([1.0, 0, 1, 1, 0, 1, 1])
    (m1, w1), (m2, w2) = (information.weighted_mean(values[s], weights[s]) for s in (slice(0, 2), slice(2, 7)))
    whole, weight = information.weighted_mean(values, weights)
    assert float((m1 * w1 + m2 * w2) / (w1 + w2)) == pytest.approx(float(whole))
    assert float((m1 + m2) / 2) != pytest.approx(float(whole))
    assert weight == 5


def test_an_all_masked_batch_is_zero_with_a_zero_gradient():
    for hostile in (jnp.nan, jnp.inf, 3.0):
        values = jnp.full(4, hostile)
        mean = lambda values: information.weighted_mean(values, jnp.zeros(4))[0]
        assert mean(values) == 0
        np.testing.assert_array_equal(jax.grad(mean)(values), np.zeros(4))


@pytest.mark.parametrize(
    ("values", "weights", "mean", "weight"),
    [
        (jnp.array([1.0, 3.0, 8.0]), jnp.array([True, True, False]), 2, 2),
        (jnp.arange(300.0), jnp.ones(300, jnp.int8), 149.5, 300),
        (jnp.arange(300.0), jnp.ones(300, jnp.uint8), 149.5, 300),
        (jnp.array([1, 2]), None, 1.5, 2),
        (jnp.array([1, 2, 4]), jnp.array([1, 2, 0]), 5 / 3, 3),
        (jnp.array([True, False]), jnp.array([0.25, 0.75]), 0.25, 1),
    ],
)
def test_masks_and_counts_are_weights(values, weights, mean, weight):
    found = information.weighted_mean(values, weights)
    assert found == (pytest.approx(mean), weight)
    assert [each.dtype for each in found] == [jnp.float32] * 2
    if weights is not None:
        assert information.weighted_sum(values, weights) == pytest.approx(mean * weight)
        assert information.divisor(weights) == weight


def test_counts_beyond_float32_are_kept():
    with jax.enable_x64(True):
        found = information.weighted_mean(jnp.array([1.0, 3.0]), jnp.array([2**53 - 1, 0]))
        assert found == (1, 2**53 - 1)


@pytest.mark.parametrize(("values", "weights"), [((2, 3), (3,)), ((3,), (1,)), ((2, 3), (3, 2))])
def test_a_mask_of_the_wrong_shape_is_refused(values, weights):
    with pytest.raises(LabError, match="one weight a value"):
        information.weighted_mean(jnp.ones(values), jnp.ones(weights))
