"""Tokens needed and steps to escape, against published figures, closed forms and their own theory."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from xentlab import LOSSES, LabError, at_target
from xentlab.audit.numerics import numerics
from xentlab.audit.probe import make_probe
from xentlab.scoreboard.efficiency import CONSISTENT, efficiency, make_truth, simulate, tokens_needed
from xentlab.scoreboard.escape import BIAS, CHAIN, FREQUENT, escape_time, wrong_start

TRAINS = True
TRUTH = make_truth()


@functools.cache
def judged(name):
    return efficiency(LOSSES[name], TRUTH)


# Reference values, from a sketch independent of this code: softmax-linear, 16 classes, 6 normal features and a bias,
# over three draws of the weights; two hundredths are left for other draws and features.
REFERENCE = {
    ("tsallis", 0.3): (1.06, 1.06),
    ("tsallis", 0.7): (1.16, 1.19),
    ("tsallis", 1.0): (1.21, 1.24),
    ("brier", 0.3): (1.24, 1.29),
    ("brier", 0.7): (1.58, 1.72),
    ("spherical", 0.7): (1.60, 1.71),
    ("exponential", 0.3): (1.09, 1.09),
    ("exponential", 0.7): (1.39, 1.50),
    ("exponential", 1.0): (1.75, 2.02),
}


@pytest.mark.parametrize(("name", "scale"), list(REFERENCE))
def test_tokens_needed_equal_the_reference(name, scale):
    low, high = REFERENCE[name, scale]
    assert low - 0.02 <= efficiency(LOSSES[name], make_truth(scale)).tokens_needed <= high + 0.02


def test_maximum_likelihood_needs_one_and_nothing_needs_less():
    """Cramer-Rao: nll is exactly 1, its excess rank / 2; every consistent loss of the catalogue lies above."""
    nll = judged("nll")
    assert nll.tokens_needed == pytest.approx(1, abs=1e-9)
    assert nll.excess == pytest.approx(7 * 15 / 2)
    for name in ("logit_adjusted", "unlikelihood", "generalized_cross_entropy"):
        assert judged(name).tokens_needed >= 1 - 1e-6
    # It pulls logsumexp to 0 a little: a bias of 1e-8 nats, and so a hair less variance than the bound.
    assert judged("z_loss").tokens_needed == pytest.approx(1, abs=1e-3)


def test_twice_a_loss_needs_as_much_and_a_mixture_lies_between():
    twice = efficiency(lambda z, y: 2 * LOSSES["brier"](z, y), TRUTH).tokens_needed
    brier = judged("brier").tokens_needed
    mixed = efficiency(lambda z, y: LOSSES["brier"](z, y) + LOSSES["nll"](z, y), TRUTH).tokens_needed
    assert twice == pytest.approx(brier, rel=1e-6)
    assert 1 < mixed < brier


def test_a_loss_that_is_not_proper_has_a_bias_instead():
    for name in ("label_smoothing", "focal", "hinge", "mse_logits"):
        found = judged(name)
        assert found.bias > CONSISTENT
        assert math.isnan(found.tokens_needed)


def test_a_loss_that_teaches_nothing_or_is_no_number_has_no_number():
    """It stays where the search began, which is the truth: that is no consistency, and needs no fewer tokens than any."""
    nothing = lambda logits, targets: (jnp.argmax(logits, axis=-1) != targets).astype(logits.dtype)
    no_number = lambda logits, targets: jnp.sqrt(at_target(jax.nn.log_softmax(logits), targets))
    for loss in (nothing, no_number):
        found = efficiency(loss, make_truth(points=64))
        assert np.isnan([found.bias, found.tokens_needed, found.excess]).all()


def test_a_truth_that_is_a_maximum_or_a_saddle_is_no_minimiser():
    """There the gradient is 0, and the curvature has full rank: its sign tells."""
    maximum = lambda logits, targets: -LOSSES["nll"](logits, targets)
    turned = lambda logits, targets: LOSSES["nll"](
        logits.at[..., 0].set(2 * jax.lax.stop_gradient(logits[..., 0]) - logits[..., 0]), targets
    )
    for loss in (maximum, turned):
        found = efficiency(loss, make_truth(points=64))
        assert np.isnan([found.bias, found.tokens_needed, found.excess]).all()


def test_a_field_whose_derivative_is_not_symmetric_still_has_a_minimum():
    """Twice the pull in one class: descent ends at the truth as before, and the sandwich is nll's own."""

    def bent(logits, targets):
        once = logits[..., :1]
        return LOSSES["nll"](jnp.concatenate([20 * once - jax.lax.stop_gradient(19 * once), logits[..., 1:]], -1), targets)

    found = efficiency(bent, make_truth(points=64))
    assert found.bias == 0
    assert found.tokens_needed == pytest.approx(1)


def test_a_stop_gradient_is_judged_by_its_field():
    """mixce(.5) has half the gradient of poly1(1), whatever its value says."""
    assert judged("mixce").bias == pytest.approx(judged("poly1").bias, rel=1e-6)


def test_the_bias_of_label_smoothing_by_an_independent_solver():
    """Its minimiser is maximum likelihood for the smoothed law: solved here by another method, from another start."""
    from scipy.optimize import minimize

    target = 0.9 * TRUTH.law + 0.1 / 16

    def risk(flat):
        z = TRUTH.features @ flat.reshape(TRUTH.weights.shape)
        log_q = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        slope = TRUTH.features.T @ (np.exp(log_q) - target) / len(z)
        return -(target * log_q).sum(1).mean(), slope.reshape(-1)

    found = minimize(risk, np.zeros(TRUTH.weights.size), jac=True, method="BFGS", options={"gtol": 1e-8})
    z = TRUTH.features @ found.x.reshape(TRUTH.weights.shape)
    log_q = z - np.log(np.exp(z).sum(1, keepdims=True))
    by_hand = (TRUTH.law * (np.log(TRUTH.law) - log_q)).sum(1).mean()
    assert judged("label_smoothing").bias == pytest.approx(by_hand, rel=1e-4)


def test_where_it_helps_the_uniform_is_mixed_in():
    """A sparse loss calls impossible what can happen; nll's minimiser is the truth."""
    small = make_truth(points=64)
    assert efficiency(LOSSES["sparsemax"], small).smoothing > 0
    assert efficiency(LOSSES["nll"], small).smoothing == 0


def test_a_seed_is_a_sample_of_its_own():
    fit = lambda seed: simulate(LOSSES["nll"], TRUTH, TRUTH.weights, sizes=(4000,), replicates=1, seed=seed).excess_kl[0]
    once, again, other = map(fit, (0, 0, 1))
    assert once == again != other
    assert len(TRUTH.features) == 1024  # as many as the figures were found with


@pytest.fixture(scope="module")
def maximum_likelihood():
    return simulate(LOSSES["nll"], TRUTH, TRUTH.weights, replicates=12)


@pytest.mark.parametrize("name", ["nll", "brier"])
def test_fits_to_samples_bear_the_theory_out(name, maximum_likelihood):
    """The experiment sample_efficiency does this at its full size; here the interval is wider, and covers too."""
    found = judged(name)
    trials = simulate(LOSSES[name], TRUTH, found.weights, replicates=12) if name != "nll" else maximum_likelihood
    assert (trials.residual < 1e-5).all()
    _, low, high = tokens_needed(trials, found.excess if name == "nll" else maximum_likelihood)
    assert low < found.tokens_needed < high
    assert high - low < 0.6


def test_the_slope_is_told_from_the_next_order():
    """KL = a/n + b/n^2 exactly: the slope is a, whatever b."""
    made = lambda a, b: pd.DataFrame(
        [{"tokens": n, "replicate": r, "excess_kl": a / n + b / n**2} for n in (1000, 4000) for r in range(3)]
    )
    assert tokens_needed(made(150.0, 9e4), made(50.0, -3e4)) == pytest.approx((3, 3, 3))
    assert tokens_needed(made(150.0, 9e4), 50.0) == pytest.approx((3, 3, 3))


ESCAPE = {
    "nll": (2.86, 5.99, 9.0, 13.0),
    "brier": (3.87, 41.5, 752, 40_700),
    "generalized_cross_entropy": (7.3, 51, 390.5, 6357),
    "focal": (3.1, 5.8, 8.8, 12.8),
}


@pytest.mark.parametrize("name", list(ESCAPE))
def test_escape_times_equal_the_reference(name):
    assert escape_time(LOSSES[name], [2, 5, 8, 12]) == pytest.approx(ESCAPE[name], rel=0.01)


def test_escape_time_in_closed_form():
    margins = np.array([0.5, 3.0, 20.0])
    np.testing.assert_allclose(escape_time(LOSSES["nll"], margins), margins + 1 - np.exp(-margins), rtol=1e-9)
    np.testing.assert_allclose(escape_time(LOSSES["hinge"], margins), margins, rtol=1e-9)
    assert escape_time(lambda z, y: -LOSSES["nll"](z, y), [1.0])[0] == np.inf
    with pytest.raises(LabError, match="positive"):
        escape_time(LOSSES["nll"], [0.0])


def test_the_chain_of_the_wrong_start_has_a_goal_that_all_can_reach():
    assert (CHAIN.table.max(axis=1) > 0.5).all()


def test_no_best_rate_lies_at_the_end_of_its_grid():
    for name in ("nll", "hinge", "mse_logits", "focal"):
        found = wrong_start(LOSSES[name])
        assert found.low < found.rate < found.high
        assert found.steps < 300


def test_a_pull_that_vanishes_leaves_no_way_out_and_from_zero_there_is_one():
    stuck = wrong_start(LOSSES["brier"])
    assert math.isinf(stuck.steps)
    assert stuck.high >= 1e6
    assert wrong_start(LOSSES["brier"], bias=0.0).steps < 100


def test_the_wrong_start_is_confident_and_wrong():
    frequent = np.sort(CHAIN.stationary @ CHAIN.table)[-FREQUENT:].sum()
    assert frequent > 0.4
    assert float(jax.nn.softmax(jnp.array([0.0, BIAS]))[1]) < 1e-8


def test_of_rates_that_are_as_quick_the_least_counts(monkeypatch):
    monkeypatch.setattr("xentlab.scoreboard.escape.settled", lambda reached: np.array([9.0, 3, 3, 3, 9]))
    monkeypatch.setattr("xentlab.scoreboard.escape.ROUNDS", 0)
    found = wrong_start(LOSSES["nll"], steps=2)
    assert (found.steps, found.rate) == (3, pytest.approx(10**-0.5))


def test_a_multiple_of_a_loss_takes_as_many_steps():
    """Its best rate lies elsewhere between two of the grid's: by these alone nll took 8, 18, 13 or 11."""
    taken = [wrong_start(lambda z, y, c=c: c * LOSSES["nll"](z, y), steps=100).steps for c in (1, 1.5, 2, 2.5)]
    assert max(taken) <= min(taken) + 1


def test_even_logits_are_a_guess_and_no_way_out():
    assert wrong_start(lambda z, y: 0 * z.sum(axis=-1), bias=0.0, steps=20).steps == np.inf


def test_a_multiple_of_a_loss_has_the_same_error():
    """Relative to 1 at least, what is small would be exact. Float16's range a multiple may leave, an error of its own."""
    multiple = lambda c: lambda z, y: c * LOSSES["nll"](z, y)
    errors = [numerics(make_probe(multiple(c)))["max_error"].value for c in (2.0**-13, 1, 2.0**13)]
    for dtype in ("float32", "bfloat16"):
        for part in ("value", "gradient"):
            assert max(each[dtype][part] for each in errors) < 3 * min(each[dtype][part] for each in errors)


def test_a_loss_without_a_slope_has_no_error_by_a_division_of_nothing():
    flat = numerics(make_probe(lambda z, y: jnp.ones_like(z[..., 0])))["max_error"].value
    assert flat == {dtype: {"value": 0, "gradient": 0} for dtype in flat}


def test_margins_are_positive_numbers():
    for margins in ([0.0], [np.nan, 1.0]):
        with pytest.raises(LabError, match="margins are positive"):
            escape_time(LOSSES["nll"], margins)


def test_a_loss_is_judged_by_what_it_reads_now_and_may_be_an_object_of_arrays():
    truth, weights = make_truth(points=64), [jnp.ones(16)]
    own = lambda z, y: weights[0][y] * LOSSES["nll"](z, y)
    assert efficiency(own, truth).bias < CONSISTENT
    weights[0] = jnp.linspace(0.2, 3, 16)
    biased = efficiency(own, truth).bias
    assert biased > 0.05

    class Weighted(eqx.Module):
        weights: jax.Array

        def __call__(self, z, y):
            return self.weights[y] * LOSSES["nll"](z, y)

    assert efficiency(Weighted(weights[0]), truth).bias == biased
