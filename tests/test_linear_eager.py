"""The head without jax.jit around it: one program a call, and what a loss of one's own reads at each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compiler
from naive_heads import both

from xentlab import LOSSES, loss
from xentlab.linear import linear_log_probs, linear_loss


@both
def test_an_eager_call_is_compiled_once_and_not_an_operation_at_a_time(plan, monkeypatch):
    """Its loops were compiled anew at every call, which took thirty times as long as the call itself."""
    made, real = [], compiler.compile_or_get_cached
    monkeypatch.setattr(compiler, "compile_or_get_cached", lambda *given, **named: (made.append(1), real(*given, **named))[1])
    hidden, weight, targets = np.ones((21, 3), np.float32), np.ones((3, 37), np.float32), np.arange(21)

    def calls(loss):
        made.clear()
        head = lambda hidden, weight: linear_loss(hidden, weight, targets, loss=loss, plan=plan, tiles=(7, 16))
        jax.value_and_grad(head, (0, 1))(hidden, weight)
        return len(made)

    assert 0 < calls(LOSSES["brier"]) < 8
    assert calls(LOSSES["brier"]) == 0
    linear_log_probs(hidden, weight, targets)
    made.clear()
    linear_log_probs(hidden, weight, targets)
    assert made == []


@both
def test_what_a_loss_of_ones_own_reads_is_what_stands_there_at_the_call(plan):
    factor = [1.0]
    form = lambda rivals, target: factor[0] * jax.nn.softplus(rivals - target)
    own = loss(stream=form)(lambda z, y: factor[0] * LOSSES["nll"](z, y))
    run = lambda: linear_loss(jnp.ones((2, 3)), jnp.ones((3, 5)), jnp.arange(2), loss=own, plan=plan)
    once, factor[0] = float(run()), 2.0
    assert float(run()) == pytest.approx(2 * once, rel=1e-6)


@both
def test_a_setting_that_was_changed_is_the_one_that_counts(plan):
    gamma = np.array(1.0)
    focal = functools.partial(LOSSES["focal"], gamma=gamma)
    hidden, weight, targets = jnp.ones((2, 3)), jnp.arange(15.0).reshape(3, 5) / 9, jnp.arange(2)
    run = lambda loss: float(linear_loss(hidden, weight, targets, loss=loss, plan=plan))
    fresh = lambda gamma: pytest.approx(run(functools.partial(LOSSES["focal"], gamma=gamma)), rel=1e-6)
    assert run(focal) == fresh(1.0)
    gamma[...] = 4.0
    assert run(focal) == fresh(4.0) != fresh(1.0)
