"""Metrics against arithmetic by hand and against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from xentlab import LabError, metrics


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    correct = np.array([1, 1, 1, 0])
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx((0.1 + 0.1) / 4)
    assert metrics.expected_calibration_error(np.ones(3), np.ones(3)) == 0
    with pytest.raises(LabError, match="at least one; got none"):
        metrics.expected_calibration_error(np.zeros(0), np.zeros(0))


def test_calibration_error_is_a_mean_over_bins_and_not_over_tokens():
    """Over- and under-confidence cancel within a bin, never across bins."""
    same_bin = metrics.expected_calibration_error(np.array([0.5, 0.5]), np.array([1, 0]))
    two_bins = metrics.expected_calibration_error(np.array([0.3, 0.7]), np.array([1, 0]))
    assert (same_bin, two_bins) == (0, pytest.approx(0.7))


def test_what_is_no_number_is_not_right():
    scores = metrics.score(jnp.full((1, 3), jnp.nan), jnp.array([0]))
    assert np.isnan(scores["correct"]).all()
    assert np.isnan(metrics.expected_calibration_error(np.array([0.5, np.nan]), np.array([1.0, 0.0])))
    with pytest.raises(LabError, match="at least 1; got 0"):
        metrics.reliability(np.array([0.5]), np.array([1.0]), bins=0)


def test_shares_that_a_narrow_type_has_none_of():
    p = [0.0, 1.0, 0.5]
    found = metrics.smoothed_nll(jnp.array(p, jnp.float16), 1000)
    assert np.asarray(found) == pytest.approx(np.asarray(metrics.smoothed_nll(jnp.array(p), 1000)), rel=1e-3)
    law = np.array([[1e-50, 1.0]])  # NumPy holds the first to be more than 0, and JAX takes it as 0
    assert float(metrics.score(jnp.log(jnp.array([[0.5, 0.5]])), jnp.array([0]), law)["kl"][0]) == pytest.approx(np.log(2))
    assert float(metrics.temperature_slope(law, jnp.array([1]), jnp.array(1.0))[0]) == 0


def test_a_confidence_on_an_edge_falls_into_the_bin_below_it():
    row = {"bin_low": 0, "bin_high": 0.5, "tokens": 2, "confidence": 0.35, "accuracy": 0.5}
    assert metrics.reliability(np.array([0.5, 0.2]), np.array([1, 0]), bins=2) == [row]


def test_what_has_no_probability_pulls_at_no_temperature():
    """The other two do: 1/4 log 1/4 + 3/4 log 3/4 - log 1/4."""
    p = jnp.broadcast_to(jnp.array([0, 0.25, 0.75]), (2, 3))
    slopes = metrics.temperature_slope(p, jnp.array([0, 1]), jnp.float32(1))
    np.testing.assert_allclose(slopes, [0, 0.75 * np.log(3)], rtol=1e-6)


def test_one_token_that_validation_has_not_shown_is_no_infinite_loss():
    """In float32 a softmax is 0 below exp(-103), or earlier where such numbers are flushed: every share is above that."""
    p = jax.nn.softmax(jnp.array([0.0, -200.0]))
    assert p[1] == 0
    assert all(np.isfinite(-np.log(metrics.smooth(p, jnp.float32(share)))).all() for share in metrics.SMOOTHING)


def test_smoothing_makes_a_zero_finite_and_a_sure_token_dearer():
    each = metrics.smoothed_nll(jnp.array([[0.0, 0.5], [0.25, 1.0]]), 4)
    assert np.isfinite(each).all()
    share = metrics.SMOOTHING[-1]
    expected = -np.log((1 - share) * np.array([0, 0.5, 0.25, 1]) + share / 4).mean()
    assert float(each[-1]) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(metrics.smooth(jnp.array([[0.5, 0.5, 0, 0]]), jnp.float32(0.1)).sum(), 1, rtol=1e-6)


def test_scores_by_hand():
    predictions = jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
    law = jnp.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    found = metrics.score(jnp.log(predictions), jnp.array([0, 1]), law)
    np.testing.assert_allclose(found["nll"], -np.log([0.5, 0.2]), rtol=1e-6)
    np.testing.assert_array_equal(found["correct"], [1, 0])
    np.testing.assert_allclose(found["confidence"], [0.5, 0.7])
    np.testing.assert_allclose(found["kl"], [0.5 * np.log(2), 0], atol=1e-7)
    assert np.isnan(metrics.score(jnp.log(predictions), jnp.array([0, 1]))["kl"]).all()


def test_interval_equals_scipy():
    values = np.array([1.0, 1.3, 0.8, 1.1])
    expected = scipy.stats.t.interval(0.95, 3, values.mean(), scipy.stats.sem(values))
    mean, low, high = metrics.mean_and_interval(values)
    assert (mean, low, high) == (pytest.approx(values.mean()), pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert np.isnan(metrics.mean_and_interval(np.array([2.0]))[1])


def test_measurements_take_batches_and_count_what_they_say():
    drawn = np.random.default_rng(0)
    confidence, correct = drawn.random((4, 6)), drawn.random((4, 6)) < 0.5
    assert metrics.expected_calibration_error(confidence, correct) == metrics.expected_calibration_error(
        confidence.ravel(), correct.ravel()
    )
    assert metrics.temperature_slope(jnp.array([[0.7, 0.3, 0.0]]), jnp.array([2]), jnp.array(1.0)) == 0
