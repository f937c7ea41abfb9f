"""The audit at vocabularies other than four: of losses that know their own, and of the catalogue."""

import functools
import json

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from scripts import in_process

from xentlab import LOSSES, LabError, at_target, audit
from xentlab.audit import as_json, disagreements, kinship, minimisers, numerics, shape
from xentlab.audit.probe import make_probe

# The audit's own arithmetic promotes as users' losses do.
TRAINS = True
WEIGHTS = np.linspace(0.5, 2, 8)


def weighted(logits, targets):
    """Weights for 8 classes: it is least where the model says w P, and P may be read back through no link."""
    weights = jnp.broadcast_to(jnp.asarray(WEIGHTS, logits.dtype), logits.shape)
    return at_target(weights, targets) * LOSSES["nll"](logits, targets)


@pytest.mark.parametrize(("given", "said"), [({"vocab": 4.0}, "2 to 32.* got 4.0"), ({"seed": 0.5}, "number.* got 0.5")])
def test_what_is_no_whole_number_is_refused(given, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=said):
        audit("mae", **given)


def test_a_loss_that_knows_its_vocabulary_is_judged_there_alone():
    at_four, at_eight = audit(weighted), audit(weighted, vocab=8)
    assert {verdict.value for verdict in at_four.verdicts.values()} == {"undecided"}
    assert at_four.verdicts["elementwise"].evidence.endswith(
        "Has it a vocabulary of its own? It was tried at V = 4; ask at its own, by --vocab or vocab= where there is one."
    )
    found = {name: verdict.value for name, verdict in at_eight.verdicts.items()}
    assert "undecided" not in found.values()
    yes = ("elementwise", "honest_autodiff", "conservative", "convex", "lipschitz", "zero_at_certainty", "monotone")
    assert all(found[name] is True for name in yes)
    assert not any(found[name] for name in ("strictly_proper", "proper_through", "calibrated", "permutation_equivariant"))
    assert found["low_p_limit"] == {"even": 0.5, "one": 0.5}
    witness = at_eight.verdicts["calibrated"].witness
    expected = WEIGHTS * witness["P"] / np.sum(WEIGHTS * witness["P"])
    assert np.exp(witness["logits"]) / np.exp(witness["logits"]).sum() == pytest.approx(expected, abs=1e-6)


def test_a_prior_is_judged_at_its_own_length():
    own = functools.partial(LOSSES["logit_adjusted"], prior=(0.3, 0.25, 0.2, 0.15, 0.1))
    found = audit(own, vocab=5)
    assert disagreements(found, own) == []
    assert found.verdicts["proper_through"].value == "its own"


# Whose minimiser, limit or curvature knows how many classes there are.
@pytest.mark.parametrize("name", ["hinge_weston_watkins", "unlikelihood", "label_smoothing", "squared_hinge", "mse_logits"])
def test_claims_hold_at_eight_classes(name):
    found = audit(name, vocab=8)
    assert disagreements(found, LOSSES[name]) == []


def test_a_claim_is_of_the_vocabulary_that_was_asked():
    found = audit("hinge_weston_watkins", vocab=3)
    assert found.verdicts["low_p_limit"].value == {"even": 2, "one": 2}
    assert disagreements(found, LOSSES["hinge_weston_watkins"]) == []


def test_what_is_denied_of_three_classes_may_hold_of_two():
    found = audit("hinge", vocab=2)
    assert found.verdicts["calibrated"].value is True
    assert disagreements(found, LOSSES["hinge"]) == []


def test_json_tells_the_vocabulary(capsys):
    _, out, _ = in_process(capsys, "audit", "perceptron", "--vocab", 5, "--format", "json")
    (told,) = json.loads(out)
    assert told["vocab"] == 5
    assert len(told["verdicts"]["calibrated"]["witness"]["P"]) == 5
    assert told == json.loads(json.dumps(as_json([audit("perceptron", vocab=5)])))[0]


@pytest.mark.parametrize("vocab", [-1, 1, 33])
def test_a_vocabulary_that_would_take_hours_is_refused(vocab):
    with pytest.raises(LabError, match=rf"at a vocabulary of 2 to 32, .*; got {vocab}\. Give a loss"):
        audit("nll", vocab=vocab)


@pytest.mark.parametrize("vocab", [2, 3, 5, 16, 32])
def test_laws_are_distributions_with_one_likeliest_class(vocab):
    found = minimisers.laws(0, vocab)
    assert found.shape == (12, vocab)
    assert found.sum(axis=1) == pytest.approx(np.ones(12))
    assert (found > 0).all()
    first, second = np.sort(found)[:, :-3:-1].T
    assert (first > second + 1e-4).all()
    assert len(set(found.argmax(axis=1))) > 1
    assert (first < 0.5).any() or vocab == 2


def test_extreme_logits_of_many_classes_lead_trail_and_tie():
    z = numerics.batches(0, 16)["extreme"]
    assert z.shape == (128, 16)
    assert set(z.ravel()) == {-1e4, 0, 1e4}
    target, rivals = z[:, 0], z[:, 1:].max(axis=1)
    assert all(np.count_nonzero(each) > 5 for each in (target > rivals, target < rivals, target == rivals))


def test_a_hinge_of_many_classes_is_no_perceptron():
    """They differ where the target leads, which is seldom so of many classes."""
    assert kinship.same_gradient_as(make_probe(LOSSES["hinge"], 0, 32)).value is None


def test_the_error_of_differences_is_no_curvature():
    assert shape.convex(make_probe(LOSSES["entmax15"], 0, 16)).value is True


def test_the_hinge_of_sixteen_classes_is_minimised_to_the_end():
    """It is convex: where no step along a logit makes it less and the programs come to an end, there is no less."""
    probe, law = make_probe(LOSSES["hinge_weston_watkins"], 0, 16), minimisers.laws(0, 16)[8]
    least, where, settled, cuts = minimisers._program(probe, law, None)
    assert settled
    again = minimisers._program(probe, law, None, cuts=cuts)
    assert again[0] == pytest.approx(least, abs=1e-8)
    tried = where + np.concatenate([0.01 * np.eye(16), -0.01 * np.eye(16)])
    assert (minimisers.expected(probe, tried, np.tile(law, (32, 1)))[0] >= least - 1e-9).all()


def test_a_cast_that_only_widens_is_judged():
    def widened(logits, targets):
        return LOSSES["brier"](logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), targets)

    found = audit(widened).verdicts
    assert found["strictly_proper"].value is True
    assert found["same_gradient_as"].value == {"loss": "brier", "factor": 1.0}
