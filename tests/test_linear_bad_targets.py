"""What a head does of tokens that cannot be scored or do not count, and of logits where nothing is left of a margin."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from naive_heads import both, every_plan

from xentlab import LOSSES, at_target
from xentlab.linear import linear_loss

HIDDEN, WEIGHT = jnp.asarray([[1.0, 2.0], [1.0, 2.0]]), jnp.asarray([[-3.0, -4.0, -5.0], [0.0, 0.5, -0.5]])
HINGES = ("hinge", "perceptron", "hinge_weston_watkins", "squared_hinge")


def slopes(loss, plan):
    """Of the sum and its gradient by hidden states and the weight, as under jit: an eager call refuses bad targets."""
    of = functools.partial(linear_loss, loss=loss, plan=plan, reduction="sum", tiles=(2, 2))
    return jax.jit(jax.value_and_grad(of, (0, 1)))


@every_plan
def test_a_bad_target_is_in_every_gradient(loss, plan):
    """A loss that is flat where it is, as a hinge beyond its margin, would let no NaN through."""
    run, targets = slopes(loss, plan), jnp.array([0, 7])
    for scale in (1.0, 0.0, -10.0):
        value, (to_hidden, to_weight) = run(HIDDEN, scale * WEIGHT, targets)
        assert np.isnan([value, *to_hidden[1], *to_weight.ravel()]).all()
        assert np.isfinite(to_hidden[0]).all()
        _, (to_hidden, to_weight) = run(HIDDEN, scale * WEIGHT, targets, token_weights=jnp.array([1.0, 0.0]))
        assert np.isfinite(to_hidden).all()
        assert np.isfinite(to_weight).all()


def test_a_bad_target_of_one_s_own_loss_is_in_every_gradient():
    """`at_target` alone has no gradient there: nothing is at the target."""
    cubic = lambda logits, targets: -(at_target(jax.nn.log_softmax(logits), targets) ** 3)
    _, (to_hidden, to_weight) = slopes(cubic, "tokens")(HIDDEN, WEIGHT, jnp.array([0, -1]))
    assert np.isnan([*to_hidden[1], *to_weight.ravel()]).all()
    assert np.isfinite(to_hidden[0]).all()


@both
def test_a_token_of_weight_zero_has_no_gradient_by_it(plan):
    """Also where the first that counts has an infinite loss."""
    bias = jnp.array([0.0, 0.0, -jnp.inf])
    of = lambda weights: linear_loss(
        HIDDEN, WEIGHT, jnp.array([2, 0]), bias=bias, token_weights=weights, reduction="none", plan=plan
    )
    _, back = jax.vjp(jax.jit(of), jnp.array([1.0, 0.0]))
    np.testing.assert_array_equal(back(jnp.ones(2))[0], [np.inf, 0])


@pytest.mark.parametrize("number", [2**40, 3 * 10**9])
def test_whole_numbers_that_weigh_are_no_int32(number, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    targets, weights = jnp.array([1, 2]), np.array([number, number // 3])
    expected = linear_loss(HIDDEN, WEIGHT, targets, token_weights=weights.astype(np.float32))
    assert linear_loss(HIDDEN, WEIGHT, targets, token_weights=weights) == expected > 0


@both
@pytest.mark.parametrize("name", HINGES)
def test_a_margin_is_one_at_any_level(name, plan):
    """Of three equal logits of 3e7, beside which 1 is nothing."""
    loss, level = LOSSES[name], jnp.full((1, 3), 3e7)
    found = jax.jit(lambda w: linear_loss(jnp.ones((1, 1)), w, jnp.array([1]), loss=loss, plan=plan))(level)
    assert found == loss(level, jnp.array([1]))[0]


@both
@pytest.mark.parametrize("name", [*HINGES, "exponential"])
def test_without_any_class_there_is_nothing_to_lose(name, plan):
    loss, none = LOSSES[name], jnp.full(3, -jnp.inf)
    of = lambda h: linear_loss(h, WEIGHT, jnp.array([1, 1]), loss=loss, bias=none, plan=plan)
    value, slope = jax.jit(jax.value_and_grad(of))(HIDDEN)
    assert value == loss(none[None], jnp.array([1]))[0] == 0
    np.testing.assert_array_equal(slope, 0)
