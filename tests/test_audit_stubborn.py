"""Losses that were once judged wrongly: each is a law that the audit had to learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab import LOSSES, at_target, audit
from xentlab.audit import VERDICTS, autodiff, decisions, kinship, limits, minimisers, shape
from xentlab.audit.probe import make_probe

# The audit's own arithmetic promotes as users' losses do.
TRAINS = True
nll, brier = LOSSES["nll"], LOSSES["brier"]


def gradient_of(theirs, value=nll):
    """The field of one loss under the value of another."""
    stop = jax.lax.stop_gradient
    return lambda z, y: stop(value(z, y)) + theirs(z, y) - stop(theirs(z, y))


@pytest.mark.parametrize("spread", [1.0, 30.0, 1e3, 1e6])
def test_a_potential_is_the_value_whose_gradient_the_field_is(spread):
    """However far out, where the field lives within a few units of 0."""
    law, z = np.array([[0.9, 0.05, 0.03, 0.02]]), spread * np.array([[0.6, -0.1, -0.2, -0.4]])
    found = minimisers.potential(make_probe(gradient_of(brier)), False)(z, law)
    value = minimisers.expected(make_probe(brier), np.stack([z[0], 0 * z[0]]), np.repeat(law, 2, axis=0))[0]
    assert found[0] == pytest.approx(value[0] - value[1], abs=1e-8)


def test_a_field_is_judged_alike_under_any_value():
    found = decisions.decide(make_probe(gradient_of(brier)), False, True)
    assert found["strictly_proper"].value is True
    assert found["calibrated"].value is True


@pytest.mark.parametrize("of_batch", [jnp.median, lambda n: jnp.quantile(n, 0.3)])
def test_a_token_that_is_measured_by_its_batch_is_not_elementwise(of_batch):
    def relative(z, y):
        return nll(z, y) - of_batch(nll(z, y))

    assert autodiff.elementwise(make_probe(relative)).value is False


def of_the_wrong_axis(z, y):
    return -at_target(jax.nn.log_softmax(z, axis=1), y)


def of_its_sequence(z, y):
    return nll(z, y) if y.ndim < 2 else nll(z, y) / jnp.mean(nll(z, y), axis=-1, keepdims=True)


@pytest.mark.parametrize("loss", [of_the_wrong_axis, of_its_sequence])
def test_a_token_of_a_batch_is_worth_what_it_is_among_tokens(loss):
    found = autodiff.elementwise(make_probe(loss))
    assert (found.value, found.evidence[:24]) == (False, "a token of a batch [B, T")


@pytest.mark.parametrize("scale", [1e-9, 1e6])
@pytest.mark.parametrize("name", ["brier", "hinge"])
def test_what_a_loss_is_measured_in_changes_no_verdict(name, scale):
    scaled = audit(lambda z, y: scale * LOSSES[name](z, y)).verdicts
    assert scaled["same_gradient_as"].value == {"loss": name, "factor": pytest.approx(scale)}
    plain = audit(name).verdicts
    for verdict in set(VERDICTS) - {"low_p_limit", "finite", "max_error", "same_gradient_as"}:
        assert scaled[verdict].value == plain[verdict].value, verdict
    if name == "hinge":
        witness = scaled["calibrated"].witness
        assert witness["expected_loss"] == pytest.approx(scale * plain["calibrated"].witness["expected_loss"])


def for_target_2(other):
    return lambda z, y: jnp.where(y == 2, other(nll(z, y)), nll(z, y))


def test_no_target_hides_another():
    capped = shape.bounded(make_probe(for_target_2(lambda n: jnp.minimum(1000 * n, 1e7))))
    assert (capped.value, capped.witness["target"] != 2) == (False, True)
    steep = shape.lipschitz(make_probe(lambda z, y: jnp.where(y == 2, 1e4 * nll(z, y), 1e-3 * nll(z, y) ** 2)))
    assert (steep.value, steep.witness["target"] != 2) == (False, True)


def sum_of_hinges(z, y):
    """Of centred logits; its minimiser is V e - 1, e of the likeliest class."""
    each = jax.nn.relu(1 + z - jnp.mean(z, axis=-1, keepdims=True))
    return jnp.sum(each, axis=-1) - at_target(each, y)


def test_a_program_is_of_the_field_and_not_of_the_value():
    held, plain = make_probe(gradient_of(sum_of_hinges)), make_probe(sum_of_hinges)
    z, law = np.array([[-1.0, 3, -1, -1], [0.3, -2, 0.5, 7]]), np.tile([0.05, 0.45, 0.06, 0.44], (2, 1))
    value = minimisers.expected(plain, np.concatenate([z, np.zeros((1, 4))]), np.concatenate([law, law[:1]]))[0]
    assert minimisers._of_pieces(held)(z, law) == pytest.approx(value[:2] - value[2], abs=1e-9)
    assert decisions.decide(held, False, True, True)["calibrated"].value is True


def second_rival(z, y):
    """A hinge against the second greatest rival: pieces that are flat, and not convex."""
    rivals = jnp.where(jax.nn.one_hot(y, z.shape[-1], dtype=bool), -jnp.inf, z)
    return jax.nn.relu(1 + jnp.sort(rivals, axis=-1)[..., -2] - at_target(z, y))


@pytest.mark.parametrize("seed", [0, 1])
def test_programs_are_for_convex_losses(seed):
    found = audit(second_rival, seed=seed).verdicts
    assert found["convex"].value is False
    assert found["calibrated"].value == "undecided"


def test_what_a_shift_changes_is_not_local():
    for loss in (lambda z, y: nll(jnp.clip(z, -10, 10), y), lambda z, y: nll(z, y) + jax.nn.relu(jnp.max(jnp.abs(z), -1) - 5)):
        assert shape.local(make_probe(loss)).value is False
        assert shape.shift_invariant(make_probe(loss)).value is False


@pytest.mark.parametrize("seed", range(4))
def test_a_slope_that_turns_far_out_is_found_by_every_seed(seed):
    """At z = (-5, -20, -20, -20) its slope is .005."""
    assert shape.monotone(make_probe(lambda z, y: nll(z, y) - 5e-4 * jnp.sum(z * z, axis=-1), seed)).value is False


@pytest.mark.parametrize("seed", range(2))
def test_logits_that_are_clipped_have_other_minimisers(seed):
    found = decisions.decide(make_probe(lambda z, y: nll(jnp.clip(z, -10, 10), y), seed), True, True)
    assert found["strictly_proper"].value is False


def capped(z, y):
    return jnp.minimum(nll(z, y), 50)


def rises_at_a_lead(z, y):
    return nll(z, y) + 0.2 * jax.nn.relu(at_target(z, y) - jnp.mean(z, axis=-1) - 12)


@pytest.mark.parametrize("loss", [capped, rises_at_a_lead])
def test_kin_are_alike_far_out_too(loss):
    assert kinship.same_gradient_as(make_probe(loss)).value is None


@pytest.mark.parametrize("cap", [1e-7, 1e-10, np.exp(-20), 1e-14, np.exp(-50)])
def test_a_gradient_that_is_cut_off_has_the_limit_0_and_no_order(cap):
    found = limits.low_p(make_probe(lambda z, y: jnp.minimum(nll(z, y), -jnp.log(cap))))
    assert (found["low_p_limit"].value, found["low_p_order"].value) == ({"even": 0, "one": 0}, None)


def test_infinity_after_what_stays_is_no_limit():
    """-log(1 - p) of the next class: its gradient is a third, until 1 - p has become 0."""

    def of_another(z, y):
        return -jnp.log1p(-jnp.exp(at_target(jax.nn.log_softmax(z), (y + 1) % z.shape[-1])))

    found = limits.low_p(make_probe(of_another))["low_p_limit"]
    assert found.value["one"] == "undecided"
    exponential = limits.low_p(make_probe(lambda z, y: jnp.expm1(2 * nll(z, y))))["low_p_limit"]
    assert exponential.value == {"even": np.inf, "one": np.inf}


def test_the_usual_mark_of_a_token_that_is_left_out_is_asked():
    ignores = lambda z, y: jnp.where(y == -100, 0, nll(z, y))
    assert autodiff.rejects_bad_targets(make_probe(ignores)).witness["target"] == -100


@pytest.mark.parametrize(
    "almost", [lambda z, y: LOSSES["poly1"](z, y, epsilon=2e-3), functools.partial(LOSSES["label_smoothing"], epsilon=1e-4)]
)
def test_what_is_almost_proper_is_not(almost):
    """Nor through a temperature of .9995."""
    found = decisions.decide(make_probe(almost), True, True)
    assert (found["strictly_proper"].value, found["proper_through"].value) == (False, None)


def test_a_lower_point_answers_for_a_search_without_end():
    def soft_hinge(z, y):
        rivals = jnp.where(jax.nn.one_hot(y, z.shape[-1], dtype=bool), -jnp.inf, z)
        return jax.nn.softplus(1 + jnp.max(rivals, axis=-1) - at_target(z, y))

    found = decisions.decide(make_probe(soft_hinge), True, True, True, True)["strictly_proper"]
    assert (found.value, found.evidence) == (False, "the expected loss is less elsewhere")
    assert found.witness["expected_loss"] < found.witness["expected_loss_at_log_P"]


@pytest.mark.parametrize("vocab", [3, 4])
def test_who_leads_at_infinity_is_undecided_where_it_makes_no_difference(vocab):
    """Normalised cross entropy: for P = (.4, .3, .2, .1) it is .1000007 at (0, 1, 0, -1e6), and .1 at the end."""

    def normalised(z, y):
        return nll(z, y) / -jnp.sum(jax.nn.log_softmax(z), axis=-1)

    assert decisions.decide(make_probe(normalised, 0, vocab), True, True)["calibrated"].value == "undecided"
    assert decisions.decide(make_probe(LOSSES["mae"], 0, vocab), True, True)["calibrated"].value is True


def under_a_rule(scale):
    """nll, whose gradient is told scale(z, y) times as great."""
    told = jax.custom_vjp(nll)
    told.defvjp(
        lambda z, y: (nll(z, y), (z, y)),
        lambda kept, g: (
            (g * scale(*kept))[..., None] * jax.vjp(lambda z: nll(z, kept[1]), kept[0])[1](jnp.ones_like(g))[0],
            None,
        ),
    )
    return told


@pytest.mark.parametrize(
    "scale",
    [lambda z, y: jnp.exp(-nll(z, y)) > 1e-4, lambda z, y: jnp.where(jnp.max(jnp.abs(z), axis=-1) > 6.5, 3.0, 1.0)],
)
def test_a_rule_that_lies_far_out_is_found(scale):
    assert autodiff.honest_autodiff(make_probe(under_a_rule(scale))).value is False


@pytest.mark.parametrize("name", ["hinge_weston_watkins", "sparsemax", "exponential", "squared_hinge"])
def test_a_kink_is_no_lie(name):
    for seed in range(6):
        assert autodiff.honest_autodiff(make_probe(LOSSES[name], seed)).value is True


def test_a_gradient_without_end_next_to_0_is_found():
    """LogitNorm, whose gradient is as 1 / |z|."""
    found = shape.lipschitz(make_probe(lambda z, y: nll(5 * z / jnp.linalg.norm(z, axis=-1, keepdims=True), y)))
    assert (found.value, found.evidence) == (False, "the gradient grows without end along a ray towards 0")
    assert found.witness["other_gradient_norm"] == pytest.approx(10 * found.witness["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("vocab", [3, 4, 8])
def test_a_logarithm_of_a_multiple_is_no_power(vocab):
    """Normalised cross entropy: its pull is as 1 / (log(1/p) + c)^2."""

    def normalised(z, y):
        return nll(z, y) / -jnp.sum(jax.nn.log_softmax(z), axis=-1)

    assert limits.low_p(make_probe(normalised, 0, vocab))["low_p_order"].value == 0
    assert limits.low_p(make_probe(functools.partial(LOSSES["tsallis"], alpha=1.01), 0, vocab))["low_p_order"].value == 0.01


@pytest.mark.parametrize("name", ["focal(gamma=1)", "focal(gamma=2)", "focal"])
def test_a_loss_is_not_kin_to_itself_however_it_is_written(name):
    assert audit(name).verdicts["same_gradient_as"].value is None


def test_what_has_no_infimum_and_what_swings_are_told():
    away = decisions.decide(make_probe(lambda z, y: -nll(z, y)), True, True)
    assert (away["strictly_proper"].value, away["calibrated"].value) == (False, False)
    assert shape.lipschitz(make_probe(lambda z, y: nll(z, y) + 1e-3 * jnp.sin(z[..., 0]))).value is True


def test_what_is_rounded_to_0_is_not_cut_off():
    """The pull of nll(-z) is 1 - p' for a p' near 1, that of a soft cap 1 - tanh^2, as p^(1/15)."""
    assert limits.low_p(make_probe(lambda z, y: nll(-z, y)))["low_p_order"].value == 1
    soft = limits.low_p(make_probe(lambda z, y: nll(30 * jnp.tanh(z / 30), y)))["low_p_order"]
    assert soft.value == pytest.approx(1 / 15, abs=0.01)


def test_what_is_infinite_far_out_is_kin_to_none_without_a_warning():
    assert kinship.same_gradient_as(make_probe(lambda z, y: jnp.expm1(4 * nll(z, y)))).value is None


@pytest.mark.parametrize("seed", [0, 1])
def test_a_least_at_infinity_is_reached_by_the_readmes_loss(seed):
    """Newton ends where what is left of the field is rounding of the value."""
    cubic = lambda z, y: (1 - at_target(jax.nn.softmax(z), y)) ** 3
    assert audit(cubic, seed=seed).verdicts["calibrated"].value is True


@pytest.mark.parametrize("seed", range(4))
def test_a_loss_of_the_hard_tokens_alone_is_not_elementwise(seed):
    def mined(z, y):
        return jnp.where(nll(z, y) >= jnp.quantile(nll(z, y), 0.3), nll(z, y), 0)

    assert autodiff.elementwise(make_probe(mined, seed)).value is False


def hellinger(z, y):
    """The squared distance of the roots of p and of the one-hot target."""
    roots = jnp.sqrt(jax.nn.softmax(z)) - jax.nn.one_hot(y, z.shape[-1])
    return jnp.sum(roots**2, axis=-1)


def alpha_loss(z, y):
    """Sypherd et al. 2022, A tunable loss function for robust classification, arXiv:1906.02314, at alpha = 3."""
    return 1.5 * (1 - at_target(jax.nn.softmax(z), y) ** (2 / 3))


def reverse_and_cross(z, y):
    """Wang et al. 2019, Symmetric cross entropy, arXiv:1908.06112: log 0 stands for -4."""
    return nll(z, y) + 4 * (1 - at_target(jax.nn.softmax(z), y))


@pytest.mark.parametrize("vocab", [3, 4, 9])
@pytest.mark.parametrize(
    ("loss", "name", "factor"),
    [
        (hellinger, "generalized_cross_entropy(q=0.5)", 1),
        (alpha_loss, "generalized_cross_entropy(q=0.666666667)", 1),
        (reverse_and_cross, "poly1(epsilon=4)", 1),
        (functools.partial(LOSSES["mixce"], eta=0.9), "poly1(epsilon=0.111111111)", 0.9),
        (lambda z, y: 3 * LOSSES["tsallis"](z, y, alpha=1.001), "tsallis(alpha=1.001)", 3),
        (
            lambda z, y: LOSSES["generalized_cross_entropy"](z, y, q=0.7227102896736061),
            "generalized_cross_entropy(q=0.72271029",
            1,
        ),
        (lambda z, y: LOSSES["label_smoothing"](z, y, epsilon=0.9), "label_smoothing(epsilon=0.9)", 1),
    ],
)
def test_kin_at_settings_that_nobody_listed(loss, name, factor, vocab):
    found = kinship.same_gradient_as(make_probe(loss, 0, vocab)).value
    assert found["factor"] == pytest.approx(factor)
    assert found["loss"].startswith(name)


@pytest.mark.parametrize("setting", [1.2, -0.4])
def test_a_setting_that_a_loss_refuses_makes_no_kin(setting):
    """(1 - p^q) / q is convex in p above 1, and infinite at 0 below it."""
    power = lambda z, y: (1 - jnp.exp(-setting * nll(z, y))) / setting
    assert kinship.same_gradient_as(make_probe(power)).value is None
