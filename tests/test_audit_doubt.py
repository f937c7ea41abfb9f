"""What an audit must not say: a "no" that is rounding, a "yes" where it did not look."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab import LOSSES, at_target, audit
from xentlab.audit import autodiff, decisions, disagreements, has_facts, shape
from xentlab.audit.probe import make_probe
from xentlab.catalogue import resolve
from xentlab.contract import facts_of

TRAINS = True  # the audit's own arithmetic promotes as users' losses do
NLL = LOSSES["nll"]


def decided(loss, even=True):
    return decisions.decide(make_probe(loss), True, True, shift=True, even=even)


# Strictly proper, or so through the loss's own link; where the field is below what float64 tells from 0 at small p.
@pytest.mark.parametrize("name", ["tsallis(alpha=5)", "tsallis(alpha=10)", "tsallis(alpha=30)"])
def test_a_field_too_flat_to_tell_refutes_no_theorem(name):
    found = decided(resolve(name))
    assert [found[verdict].value for verdict in ("strictly_proper", "proper_through")] == ["undecided"] * 2
    assert found["calibrated"].value in (True, "undecided")


@pytest.mark.parametrize("q", [0.75, 0.9])
def test_nor_does_one_through_a_link_of_its_own(q):
    loss = resolve(f"generalized_cross_entropy(q={q})")
    found = decided(loss)
    assert found["proper_through"].value == "undecided"
    # But softmax does not read P back, as a point far below log P shows.
    witness = found["strictly_proper"].witness
    assert found["strictly_proper"].value is False
    assert witness["expected_loss"] < witness["expected_loss_at_log_P"] - 1e-6
    logits = np.log(np.asarray(witness["P"])) / (1 - q)
    assert facts_of(loss).link(jnp.asarray(logits, jnp.float32), q=q) == pytest.approx(np.asarray(witness["P"]), abs=1e-5)


def test_a_jacobian_that_is_rounding_is_not_called_asymmetric():
    assert autodiff.conservative(make_probe(resolve("tsallis(alpha=30)"))).value is not False


@pytest.mark.parametrize("inner", [NLL, LOSSES["brier"]], ids=["nll", "brier"])
def test_float32_inside_is_too_little_to_judge_by(inner):
    narrow = lambda z, y: inner(z.astype(jnp.float32), y).astype(z.dtype)
    found = autodiff.elementwise(make_probe(narrow))
    assert (found.value, "Let the cast only widen" in found.evidence) == ("undecided", True)
    assert (
        autodiff.elementwise(make_probe(lambda z, y: jnp.round(inner(z, y)))).value is True
    )  # whole numbers are few, and exact


def test_weights_of_classes_that_hardly_differ_change_which_leads():
    weights = np.array([1.03, 1, 1, 1])
    weighted = lambda z, y: jnp.asarray(weights, z.dtype)[y] * NLL(z, y)
    found = decided(weighted, even=False)
    law = np.asarray(found["calibrated"].witness["P"])
    assert found["calibrated"].value is False
    assert np.argmax(law) != np.argmax(weights * law)  # the minimiser's softmax, up to its sum
    assert decided(NLL, even=False)["calibrated"].value is True


@pytest.mark.parametrize("least", [1e-3, 1e-7])
def test_a_clipped_logarithm_is_not_proper(least):
    clipped = lambda z, y: -jnp.log(jnp.clip(at_target(jax.nn.softmax(z), y), least, 1 - least))
    found = decided(clipped)
    assert (found["strictly_proper"].value, found["proper_through"].value) == (False, None)
    witness = {name: np.asarray(value) for name, value in found["strictly_proper"].witness.items()}
    mean = lambda p: -np.sum(witness["P"] * np.log(np.clip(p, least, 1 - least)))
    reads = np.exp(witness["logits"]) / np.exp(witness["logits"]).sum()
    assert mean(reads) == pytest.approx(witness["expected_loss"], abs=1e-9)
    assert mean(reads) < mean(witness["P"]) - 0.1 * least


@pytest.mark.parametrize("temperature", [1e4, 1e5])
def test_a_minimum_further_out_than_the_search_went_is_not_at_infinity(temperature):
    found = decided(lambda z, y: NLL(z / temperature, y))
    assert (found["strictly_proper"].value, found["proper_through"].value) == (False, "undecided")
    assert "infinity" not in found["strictly_proper"].evidence
    assert shape.lipschitz(make_probe(lambda z, y: NLL(z / temperature, y))).value is True


def wrong(z, y):
    """1 where another class leads."""
    return (jnp.argmax(z, axis=-1) != y).astype(z.dtype)


@pytest.mark.parametrize("loss", [wrong, lambda z, y: NLL(z, y) + wrong(z, y)], ids=["0-1", "nll and a jump"])
def test_across_a_jump_no_slope_is_bounded(loss):
    found = shape.lipschitz(make_probe(loss))
    assert found.value is False
    a, b, target = (np.asarray(found.witness[name]) for name in ("a", "b", "target"))
    assert np.abs(a - b).max() < 1e-2
    assert wrong(jnp.asarray(a), target) != wrong(jnp.asarray(b), target)
    assert abs(found.witness["value_a"] - found.witness["value_b"]) > 0.9


@pytest.mark.parametrize("name", ["nll", "hinge", "brier", "tsallis(alpha=30)", "mae"])
def test_where_there_is_a_slope_halving_a_chord_comes_to_it(name):
    assert shape.lipschitz(make_probe(resolve(name))).value is True


def test_what_grows_ever_more_slowly_is_asked_further_out():
    def saturates(z, y):
        slow = jnp.log1p(NLL(z, y))
        return slow / (1 + slow)  # below 1

    assert shape.bounded(make_probe(saturates)).value is True
    assert shape.bounded(make_probe(lambda z, y: jnp.log1p(jnp.log1p(NLL(z, y))))).value is False


def test_claims_are_of_the_settings_that_they_name():
    curved = functools.partial(LOSSES["poly1"], epsilon=10.0)
    assert has_facts(LOSSES["poly1"])
    assert all(has_facts(functools.partial(LOSSES["poly1"], **each)) for each in facts_of(LOSSES["poly1"]).settings)
    assert not has_facts(curved)
    assert disagreements(audit(curved), curved) == []  # no longer convex, of which nobody said that it is


def test_a_loss_is_judged_by_what_it_reads_now():
    """JAX keeps what it compiles of a function; what that reads may be another number at the next audit."""
    factor = [1.0]
    heated = lambda z, y: LOSSES["nll"](z * factor[0], y)
    assert autodiff.elementwise(make_probe(heated)).value is True
    factor[0] = 2.0
    assert autodiff.elementwise(make_probe(heated)).value is True
