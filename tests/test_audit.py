"""The audit against the literature's table, against other people's losses, and against faults that were planted."""

import dataclasses
import functools
import json
from types import MappingProxyType

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

from xentlab import LOSSES, LabError, at_target, audit, facts_of, loss, name_of
from xentlab.audit import VERDICTS, as_json, claims, decisions, disagreements, minimisers
from xentlab.audit.limits import LOW, fit
from xentlab.audit.probe import make_probe

# The audit's own arithmetic promotes as users' losses do.
TRAINS = True


@functools.cache
def audited(name):
    return audit(name)


@pytest.mark.parametrize("name", LOSSES)
def test_the_audit_agrees_with_every_claim(name):
    found = audited(name)
    assert list(found.verdicts) == list(VERDICTS)
    assert disagreements(found, LOSSES[name]) == []
    assert (found.verdicts["finite"].value["float32"] is False) == bool(facts_of(LOSSES[name]).infinite)
    assert found.verdicts["rejects_bad_targets"].value is True
    assert found.verdicts["conservative"].value is True


def right_tokens(z, y):
    return at_target(jax.nn.softmax(z), y)


def ridged(z, y):
    """Whose gradient is greatest where two probabilities are alike, which a ray meets at one distance or another."""
    return jnp.sum((jax.nn.softmax(z) - jax.nn.one_hot(y, z.shape[-1], dtype=z.dtype)) ** 4, axis=-1)


def dented(z, y):
    """Not convex next to 0 alone."""
    return nll(z, y) - 0.01 * jnp.exp(-100 * jnp.var(z, axis=-1) * z.shape[-1])


def sum_of_hinges(z, y, *, margin):
    """Of centred logits: its minimiser is margin (V e - 1), e of the likeliest class."""
    centred = z - jnp.mean(z, axis=-1, keepdims=True)
    each = jax.nn.relu(margin + centred)
    return jnp.sum(each, axis=-1) - at_target(each, y)


nll, brier = LOSSES["nll"], LOSSES["brier"]
OF_T = {"low_p_order": 0, "lipschitz": True, "convex": True, "zero_at_certainty": True, "monotone": True, "bounded": False}
OF_T |= {"calibrated": True, "strictly_proper": False}
BY_HAND = {
    **{f"nll(z / {t})": (lambda z, y, t=t: nll(z / t, y), OF_T | {"low_p_limit": 1 / t}) for t in (0.01, 3, 10, 100)},
    "200 nll": (lambda z, y: 200 * nll(z, y), {"convex": True, "low_p_limit": 200, "same_gradient_as": "nll"}),
    "nll + 1e4": (lambda z, y: nll(z, y) + 1e4, {"bounded": False, "lipschitz": True, "zero_at_certainty": False}),
    "-nll": (lambda z, y: -nll(z, y), {"bounded": False, "convex": False, "monotone": False}),
    "brier - 3": (lambda z, y: brier(z, y) - 3, {"bounded": True, "low_p_limit": 0}),
    "log(1 + nll)": (lambda z, y: jnp.log1p(nll(z, y)) + 10, {"bounded": False, "low_p_limit": 0}),
    "log(1 + log(1 + nll))": (lambda z, y: jnp.log1p(jnp.log1p(nll(z, y))), {"bounded": False}),
    "p^.01": (functools.partial(LOSSES["tsallis"], alpha=1.01), {"low_p_limit": 0, "low_p_order": 0.01, "lipschitz": True}),
    "z_loss": (functools.partial(LOSSES["z_loss"], coefficient=0.03), {"convex": False, "low_p_limit": 1}),
    "clipped": (
        lambda z, y: -jnp.log(jnp.clip(right_tokens(z, y), 1e-7, 1 - 1e-7)),
        {"bounded": True, "convex": False, "same_gradient_as": None},
    ),
    "nll(z / 50)": (
        loss(link=lambda z: jax.nn.softmax(z / 50))(lambda z, y: nll(z / 50, y)),
        {"proper_through": "its own", "calibrated": True},
    ),
    "mse_logits(M=1000)": (
        functools.partial(LOSSES["mse_logits"], M=1000.0),
        {"proper_through": "its own", "calibrated": True},
    ),
    **{
        f"Lee, Lin & Wahba, margin {margin}": (functools.partial(sum_of_hinges, margin=margin), {"calibrated": True})
        for margin in (1.0, 100.0)
    },
    "ridged": (ridged, {"bounded": True, "lipschitz": True, "low_p_order": 1}),
    "dented": (dented, {"convex": False}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_verdicts_that_are_known_by_hand(name):
    judged, expected = BY_HAND[name]
    found = {verdict: each.value for verdict, each in audit(judged).verdicts.items()}
    found["low_p_limit"] = found["low_p_limit"]["even"]
    found["same_gradient_as"] = (found["same_gradient_as"] or {}).get("loss")
    for verdict, value in expected.items():
        assert found[verdict] == (pytest.approx(value, rel=1e-6, abs=2e-3) if type(value) in (int, float) else value), verdict


def test_a_loss_that_makes_float32_of_float64_is_not_judged_by_its_rounding():
    found = audit(lambda z, y: nll(z.astype(jnp.float32), y)).verdicts
    assert {verdict.value for verdict in found.values()} == {"undecided"}
    assert "of float64 logits it makes float32" in found["elementwise"].evidence
    assert found["elementwise"].evidence.endswith(
        "Let the cast only widen: logits.astype(jnp.promote_types(logits.dtype, jnp.float32))"
    )


def test_a_token_keeps_its_value_in_another_place():
    found = audit(lambda z, y: nll(z, y) * (1 + jnp.arange(len(z)).astype(z.dtype).reshape(-1, *[1] * (z.ndim - 2))))
    assert found.verdicts["elementwise"].value is False


# Columns of the table that facts do not hold: the link by name, 0 at certainty, the order at low p.
LINKS = {
    **dict.fromkeys(("nll", "z_loss", "brier", "spherical", "tsallis", "unlikelihood"), "softmax"),
    **{"mse_logits": "identity", "one_vs_rest": "sigmoid", "exponential": "softmax(2z)", "sparsemax": "sparsemax"},
    **{"entmax15": "entmax15", "generalized_cross_entropy": "its own", "logit_adjusted": "its own"},
}
ORDERS = {
    **{"brier": 1, "spherical": 1, "mae": 1, "jensen_shannon": 1},
    **{"tsallis": 0.5, "generalized_cross_entropy": 0.7, "exponential": -1},
}
KIN = {
    "mixce": {"loss": "poly1", "factor": 0.5},
    "poly1": {"loss": "mixce", "factor": 2.0},
    "brier": {"loss": "tsallis(alpha=2)", "factor": 1.0},
    "mae": {"loss": "generalized_cross_entropy(q=1)", "factor": 2.0},
}


@pytest.mark.parametrize("name", LOSSES)
def test_links_orders_and_kinships(name):
    verdicts = audited(name).verdicts
    assert verdicts["proper_through"].value == LINKS.get(name)
    assert verdicts["low_p_order"].value == pytest.approx(ORDERS.get(name, 0), abs=0.01)
    assert verdicts["same_gradient_as"].value == KIN.get(name)
    assert verdicts["honest_autodiff"].value == (name != "mixce")
    assert verdicts["permutation_equivariant"].value == (name != "logit_adjusted")


def test_certainty_and_growth():
    at_zero = {name for name in LOSSES if audited(name).verdicts["zero_at_certainty"].value}
    assert set(LOSSES) - at_zero == {"label_smoothing", "z_loss", "mse_logits", "one_vs_rest", "squentropy"}
    smooth = {name for name in LOSSES if audited(name).verdicts["lipschitz"].value}
    assert set(LOSSES) - smooth == {"squared_hinge", "exponential", "z_loss", "squentropy", "mse_logits"}
    rising = {name for name in LOSSES if not audited(name).verdicts["monotone"].value}
    assert rising == {"label_smoothing", "z_loss", "mse_logits", "confidence_penalty"}


def test_every_no_has_a_witness_that_holds():
    """Recomputed here from the witness alone, with the plain loss."""
    for name in LOSSES:
        verdicts, function = audited(name).verdicts, LOSSES[name]
        with jax.enable_x64(True):
            value = lambda z, y, function=function: float(function(jnp.asarray(z), jnp.asarray(y)))
            for verdict in ("shift_invariant", "permutation_equivariant", "local"):
                if verdicts[verdict].value is False:
                    w = verdicts[verdict].witness
                    assert value(w["logits"], w["target"]) == pytest.approx(w["value"], rel=1e-6)
                    assert value(w["other_logits"], w["other_target"]) == pytest.approx(w["other_value"], rel=1e-6)
                    assert w["value"] != pytest.approx(w["other_value"], rel=1e-8)
            for verdict in ("strictly_proper", "calibrated"):
                if verdicts[verdict].value is False:
                    w = verdicts[verdict].witness
                    if facts_of(function).stops_gradient:
                        assert w["potential"] < w["potential_at_log_P"]
                        continue
                    mean = sum(p * value(w["logits"], y) for y, p in enumerate(w["P"]))
                    assert mean == pytest.approx(w["expected_loss"], rel=1e-5, abs=1e-9)
                    at_log_p = sum(p * value(np.log(w["P"]), y) for y, p in enumerate(w["P"]))
                    assert mean <= at_log_p + 1e-9


def test_a_tie_is_called_a_tie_and_a_potential_a_potential():
    flat = audit(lambda logits, targets: 0 * logits[..., 0] + 1).verdicts["strictly_proper"]
    assert flat.evidence.startswith("the expected loss is as small elsewhere")
    assert flat.witness["expected_loss"] == flat.witness["expected_loss_at_log_P"] == 1

    def focal(logits, targets):
        log_p = at_target(jax.nn.log_softmax(logits), targets)
        return -jax.lax.stop_gradient((1 - jnp.exp(log_p)) ** 2) * log_p

    held = audit(focal).verdicts["strictly_proper"]
    assert held.evidence.startswith("the potential of the field, its integral from 0 and not the loss's value, is least")
    assert held.witness["potential"] < held.witness["potential_at_log_P"]


def test_certainty_is_asked_of_every_target():
    blind = audit(lambda logits, targets: -jax.nn.log_softmax(logits)[..., 0]).verdicts
    assert blind["zero_at_certainty"].value is False
    assert blind["zero_at_certainty"].witness["target"] == 1
    assert "of target 0 |dL/dz_y|" in blind["low_p_limit"].evidence


def test_weston_watkins_by_hand():
    """P = (.4, .3, .2, .1): expected loss 2.2 at the tie z = (1, 1, 0, 0), and no less anywhere."""
    probe = make_probe(LOSSES["hinge_weston_watkins"])
    law = np.array([[0.4, 0.3, 0.2, 0.1]])
    assert minimisers.expected(probe, np.array([[1.0, 1, 0, 0]]), law)[0][0] == pytest.approx(2.2)
    assert minimisers._program(probe, law[0], None)[0] == pytest.approx(2.2)


def log_p(logits):
    return jax.nn.log_softmax(logits)


def naive(logits, targets):
    return -jnp.log(at_target(jnp.exp(logits) / jnp.exp(logits).sum(-1, keepdims=True), targets))


def wrong_sign(logits, targets):
    return at_target(log_p(logits), targets)


def mixes_the_batch(logits, targets):
    each = -at_target(log_p(logits), targets)
    return each + 0.01 * each.mean()


def one_value_a_class(logits, targets):
    return -log_p(logits)


def wrong_index(logits, targets):
    return -at_target(log_p(logits), (targets + 1) % logits.shape[-1])


def hidden_stop(logits, targets):
    chosen = at_target(log_p(logits), targets)
    return -((1 - jax.lax.stop_gradient(jnp.exp(chosen))) ** 2) * chosen


def gathers(logits, targets):
    return -jnp.take_along_axis(log_p(logits), targets[..., None], -1)[..., 0]


def nan_at_extremes(logits, targets):
    p = jax.nn.softmax(logits)
    return -at_target(log_p(logits), targets) - 0.1 * -(p * jnp.log(p)).sum(-1)


def miss(logits, targets):
    return (jnp.argmax(logits, axis=-1) != targets).astype(logits.dtype)


def fined_when_right(logits, targets):
    """Its gradient is nll's wherever it has one."""
    return -at_target(log_p(logits), targets) + 3 * (jnp.argmax(logits, axis=-1) == targets)


def own_temperature(logits, targets):
    return -at_target(log_p(logits / (1 + jnp.linalg.norm(logits, axis=-1, keepdims=True))), targets)


@pytest.mark.parametrize(
    ("fault", "verdict"),
    [
        (naive, "finite"),
        (wrong_sign, "monotone"),
        (wrong_sign, "strictly_proper"),
        (mixes_the_batch, "elementwise"),
        (one_value_a_class, "elementwise"),
        (wrong_index, "strictly_proper"),
        (hidden_stop, "honest_autodiff"),
        (gathers, "rejects_bad_targets"),
        (nan_at_extremes, "finite"),
        (own_temperature, "shift_invariant"),
        (miss, "convex"),
        (fined_when_right, "monotone"),
        (fined_when_right, "convex"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_planted_faults_are_caught_with_a_witness(fault, verdict):
    found = audited(fault).verdicts[verdict]
    value = found.value["float32"] if verdict == "finite" else found.value
    assert value is False
    assert found.witness


def test_a_question_that_breaks_does_not_take_the_rest_with_it():
    def only_float64(logits, targets):
        if logits.dtype != jnp.float64:
            raise ValueError("float64 only")
        return -at_target(log_p(logits), targets)

    verdicts = audit(only_float64).verdicts
    assert verdicts["elementwise"].value == "undecided"
    assert "float64 only" in verdicts["elementwise"].evidence


def test_a_loss_that_fails_in_a_type_is_no_exact_one():
    def no_bfloat16(logits, targets):
        if logits.dtype == jnp.bfloat16:
            raise ValueError("not in bfloat16")
        return nll(logits, targets)

    found = audit(no_bfloat16).verdicts
    assert found["finite"].value == {"float32": True, "bfloat16": False, "float16": True}
    assert found["max_error"].value["bfloat16"] == {"value": np.inf, "gradient": np.inf}


def test_what_is_undecided_is_no_claim_and_a_seed_is_a_number():
    undecided = dataclasses.replace(audited("mae").verdicts["proper_through"], value="undecided")
    found = dataclasses.replace(
        audited("mae"), verdicts=MappingProxyType({**audited("mae").verdicts, "proper_through": undecided})
    )
    assert disagreements(found, LOSSES["mae"]) == ["proper_through: claimed False, found undecided"]
    with pytest.raises(LabError, match="seed is a whole number of at least 0; got -1"):
        audit("nll", seed=-1)


def test_what_is_no_number_is_undecided_and_no_infinity():
    """-log of a softmax that has become 0: its gradient is NaN far out, where the right one is bounded."""
    verdicts = audit(lambda logits, targets: -jnp.log(at_target(jax.nn.softmax(logits), targets))).verdicts
    assert verdicts["lipschitz"].value == "undecided"
    assert "NaN at logits [1000.0, 0.0, 0.0, 0.0], target 1" in verdicts["lipschitz"].evidence
    nowhere = audit(lambda logits, targets: jnp.sqrt(at_target(log_p(logits), targets))).verdicts
    assert {verdict.value for verdict in nowhere.values()} == {"undecided"}
    assert "the value is NaN at logits" in nowhere["elementwise"].evidence
    assert nowhere["elementwise"].evidence.endswith("Are logits taken for probabilities? Take jax.nn.log_softmax of them first")


def test_what_nobody_claimed_is_not_denied():
    own = lambda logits, targets: jax.lax.stop_gradient(at_target(logits, targets))
    assert not claims(own)
    assert disagreements(audit(own), own) == []
    assert claims(LOSSES["nll"])


def flat(theirs):
    """A loss of [N, V] for any leading axes."""
    return lambda logits, targets: theirs(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)).reshape(targets.shape)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (optax.softmax_cross_entropy_with_integer_labels, "nll"),
        (jnp.vectorize(optax.losses.multiclass_hinge_loss, signature="(v),()->()"), "hinge"),
        (jnp.vectorize(optax.losses.multiclass_perceptron_loss, signature="(v),()->()"), "perceptron"),
        (flat(optax.losses.multiclass_sparsemax_loss), "sparsemax"),
    ],
    ids=lambda x: x if isinstance(x, str) else "optax",
)
def test_optax_losses_are_known_by_their_gradient(theirs, ours):
    verdicts = audit(theirs).verdicts
    assert verdicts["same_gradient_as"].value == {"loss": ours, "factor": 1.0}
    for name in ("strictly_proper", "proper_through", "calibrated", "convex", "low_p_limit"):
        assert verdicts[name].value == audited(ours).verdicts[name].value


def test_the_same_seed_gives_the_same_audit_and_json_is_plain():
    def plain(found):
        return json.dumps(as_json([found]), allow_nan=False)

    assert plain(audit("focal", seed=3)) == plain(audit("focal", seed=3))
    assert plain(audited("exponential"))


PROPER = ["nll", "brier", "spherical", "tsallis", "unlikelihood"]


@settings(max_examples=5)
@given(weights=st.lists(st.floats(0.1, 1), min_size=5, max_size=5))
def test_mixtures_of_proper_losses_stay_proper(weights):
    def mixture(logits, targets):
        return sum(w * LOSSES[name](logits, targets) for w, name in zip(weights, PROPER, strict=True))

    probe = make_probe(mixture)
    assert decisions.decide(probe, True, True)["strictly_proper"].value is True


@settings(max_examples=5)
@given(temperature=st.sampled_from([0.25, 0.6, 1.5, 3.0]))
def test_a_temperature_is_proper_through_itself_alone(temperature):
    @loss(link=lambda z: jax.nn.softmax(z / temperature))
    def tempered(logits, targets):
        return LOSSES["nll"](logits / temperature, targets)

    found = decisions.decide(make_probe(tempered), True, True)
    assert found["strictly_proper"].value is False
    assert found["proper_through"].value == "its own"
    assert found["calibrated"].value is True


@pytest.mark.parametrize("factor", [0.02, 0.5, 1.7])
def test_a_link_that_nobody_declared_is_found(factor):
    """In whatever units the loss measures its logits."""
    of = LOSSES["generalized_cross_entropy"] if factor == 0.5 else lambda z, y, q: nll(factor * z, y)
    found = audit(lambda logits, targets: of(logits, targets, q=0.5)).verdicts
    assert found["strictly_proper"].value is False
    assert found["proper_through"].value == f"softmax({factor}z)"


@given(order=st.floats(-1, 2), k=st.floats(-1, 2))
def test_the_fit_tells_powers_from_logarithms(order, k):
    found = fit(3 * LOW**order * np.log(1 / LOW) ** k)
    assert found[:2] == (pytest.approx(order, abs=1e-8), pytest.approx(k, abs=1e-6))


def test_names():
    assert audited("nll").loss == "nll"
    assert audit("focal(gamma=1)").loss == name_of(functools.partial(LOSSES["focal"], gamma=1))


def test_where_one_search_came_to_no_end_the_others_still_speak():
    probe, found = make_probe(LOSSES["nll"]), minimisers.laws(0, 4)
    ends = [minimisers.Minimiser(law, np.log(law)[None], 0.0, place != 5, False) for place, law in enumerate(found)]
    reads_back = functools.partial(decisions._reads_back, minimisers.potential(probe, True), True, found=ends)
    said = reads_back(jax.nn.softmax)
    assert (said.value, said.evidence[:27]) == ("undecided", "no zero of the field was re")
    assert reads_back(jax.nn.sigmoid).value is False
