"""Laws that every loss of the catalogue keeps, at each of its settings. A new loss enters by existing."""

import ast
import functools
import inspect
import itertools

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from xentlab import LOSSES, LabError, facts_of, link_of, name_of
from xentlab.contract import low_p_claim, settings_of, value_and_gradient
from xentlab.names import with_settings

VOCAB, TOKENS = 5, 7
CASES = [with_settings(loss, setting) for loss in LOSSES.values() for setting in facts_of(loss).settings]
every_loss = pytest.mark.parametrize("loss", CASES, ids=name_of)


def batch(seed=0, scale=3.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (scale * rng.standard_normal((TOKENS, VOCAB))).astype(dtype), rng.integers(0, VOCAB, TOKENS).astype(np.int32)


@jax.jit
def everything(logits, targets):
    """All losses in one program of one shape: XLA takes a third of the time that it takes for one a loss."""
    return [value_and_gradient(loss, logits, targets) for loss in CASES]


KEPT = {}  # by its bytes, what the losses are at a batch that several tests ask about


def call(loss, logits, targets, what="value"):
    """One loss's values [N] or gradient [N, V], compiled, in the logits' own dtype."""
    logits, targets = np.asarray(logits), np.asarray(targets)
    which = ("value", "gradient").index(what)
    with jax.enable_x64(logits.dtype == np.float64):
        if loss not in CASES:
            return np.asarray(jax.jit(functools.partial(value_and_gradient, loss))(logits, targets)[which])
        key = tuple((each.dtype, each.shape, each.tobytes()) for each in (logits, targets))
        if key not in KEPT:
            rows = np.resize(np.arange(len(logits)), (-(-len(logits) // TOKENS), TOKENS))
            parts = [jax.device_get(everything(logits[some], targets[some])) for some in rows]
            KEPT[key] = jax.tree.map(lambda *each: np.concatenate(each)[: len(logits)], *parts)
    return KEPT[key][CASES.index(loss)][which]


def test_the_batch_is_not_degenerate():
    logits, targets = batch()
    assert len(np.unique(targets)) > 2
    hit = np.argmax(logits, -1) == targets
    assert 0 < hit.sum() < TOKENS
    assert np.ptp(logits) > 6


@every_loss
def test_values_are_one_a_token_and_in_the_input_dtype(loss):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        logits = jax.ShapeDtypeStruct((2, 3, VOCAB), dtype)
        targets = jax.ShapeDtypeStruct((2, 3), jnp.int32)
        value = jax.eval_shape(loss, logits, targets)
        assert (value.shape, value.dtype) == ((2, 3), dtype)


@every_loss
def test_batching_equals_one_at_a_time(loss):
    logits, targets = batch()
    with jax.enable_x64(True):
        singles = [loss(jnp.asarray(z), jnp.asarray(y)) for z, y in zip(logits, targets, strict=True)]
    np.testing.assert_allclose(call(loss, logits, targets), singles, rtol=1e-12, atol=1e-14)


@every_loss
def test_gradient_reads_its_own_token_alone(loss):
    logits, targets = batch()
    moved = logits.copy()
    moved[1:] += 0.7 * np.arange(VOCAB)
    here, there = call(loss, logits, targets, "gradient"), call(loss, moved, targets, "gradient")
    np.testing.assert_array_equal(here[0], there[0])
    assert not np.array_equal(here[1:], there[1:])


@every_loss
def test_gradient_equals_finite_differences(loss):
    logits, targets = batch(seed=3)
    gradient = call(loss, logits, targets, "gradient")
    step = 1e-6
    for c in range(VOCAB):
        nudge = step * np.eye(VOCAB)[c]
        difference = _field(loss, logits, targets, nudge)
        # Central differences in float64 err by step^2 plus 1e-16 * |L| / step: 1e-8 with room for both.
        np.testing.assert_allclose(gradient[:, c], difference / (2 * step), rtol=1e-6, atol=2e-8 * (1 + np.abs(gradient).max()))


def _field(loss, logits, targets, nudge):
    """L(z + nudge) - L(z - nudge), with what the loss does not differentiate held at z."""
    if facts_of(loss).stops_gradient:
        held = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))[np.arange(TOKENS), targets]
        eta = getattr(loss, "keywords", {}).get("eta", 0.5)
        log_p = lambda z: (z - np.logaddexp.reduce(z, -1, keepdims=True))[np.arange(TOKENS), targets]
        return (eta + (1 - eta) * held) * (log_p(logits - nudge) - log_p(logits + nudge))
    return call(loss, logits + nudge, targets) - call(loss, logits - nudge, targets)


@every_loss
def test_renaming_the_classes_changes_nothing(loss):
    if "prior" in inspect.signature(loss).parameters:
        prior = getattr(loss, "keywords", {}).get("prior")
        prior = np.asarray(prior) if prior else 1 / np.arange(1, VOCAB + 1) / np.sum(1 / np.arange(1, VOCAB + 1))
        renamed = lambda order: functools.partial(loss, prior=tuple(prior[order]))
    else:
        renamed = lambda order: loss
    logits, targets = batch()
    order = np.array([3, 0, 4, 1, 2])
    place = np.argsort(order)
    np.testing.assert_allclose(
        call(renamed(order), logits[:, order], place[targets].astype(np.int32)), call(loss, logits, targets), rtol=1e-9
    )


@every_loss
def test_settings_have_an_effect(loss):
    logits, targets = batch()
    if getattr(loss, "keywords", {}):
        assert not np.allclose(call(loss, logits, targets), call(loss.func, logits, targets), rtol=1e-3)


@every_loss
def test_the_target_is_what_the_target_says(loss):
    """Raising the target's own logit, far from the margin, lowers the loss; a wrong class's does not."""
    z = np.zeros((TOKENS, VOCAB))
    targets = np.arange(TOKENS, dtype=np.int32) % VOCAB
    z[np.arange(TOKENS), (targets + 1) % VOCAB] = 0.3
    gradient = call(loss, z, targets, "gradient")
    assert (gradient[np.arange(TOKENS), targets] < 0).all()
    assert (gradient[np.arange(TOKENS), (targets + 1) % VOCAB] > 0).all()


@every_loss
def test_shift_fact(loss):
    logits, targets = batch()
    same = np.allclose(call(loss, logits + 1.7, targets), call(loss, logits, targets), rtol=1e-9, atol=1e-11)
    assert same == facts_of(loss).shift


@every_loss
def test_local_fact(loss):
    """A local loss does not see how the wrong classes share the rest."""
    logits, targets = batch()
    rest = np.ones((TOKENS, VOCAB), bool)
    rest[np.arange(TOKENS), targets] = False
    rolled = logits.copy()
    log_rest = np.logaddexp.reduce(np.where(rest, logits, -np.inf), axis=-1, keepdims=True)
    rolled = np.where(rest, log_rest - np.log(VOCAB - 1), logits) + 0.9
    same = np.allclose(call(loss, rolled, targets), call(loss, logits, targets), rtol=1e-9, atol=1e-11)
    assert same == facts_of(loss).local


@every_loss
def test_convex_fact_along_random_chords(loss):
    """Where convexity is claimed, no chord lies below the curve; where it is denied, a chord that does is found."""
    if facts_of(loss).stops_gradient:
        _field_is_monotone_on_chords(loss)
        return
    worst = -np.inf
    for seed, scale in itertools.product(range(40), (1.0, 4.0, 12.0)):
        (a, targets), (b, _) = batch(seed, scale), batch(seed + 1000, scale)
        ends = (call(loss, a, targets) + call(loss, b, targets)) / 2
        middle = call(loss, (a + b) / 2, targets)
        worst = max(worst, ((middle - ends) / (1e-9 + np.abs(ends) + np.abs(middle))).max())
    if facts_of(loss).convex:
        assert worst < 1e-10
    else:
        # confidence_penalty is non-convex by the third digit at most.
        assert worst > 1e-6 or _two_class_gap_is_concave(loss)


def _field_is_monotone_on_chords(loss):
    for seed in range(40):
        (a, targets), (b, _) = batch(seed, 4.0), batch(seed + 1000, 4.0)
        along = np.sum((call(loss, a, targets, "gradient") - call(loss, b, targets, "gradient")) * (a - b), -1)
        assert (along >= -1e-10).all() == facts_of(loss).convex


def _two_class_gap_is_concave(loss):
    gap = np.linspace(2, 20, 400)
    z = np.stack([gap, np.zeros_like(gap)], -1)
    with jax.enable_x64(True):
        value = np.asarray(loss(jnp.asarray(z), jnp.ones(len(gap), jnp.int32)))
    return np.diff(value, 2).min() < -1e-9


@every_loss
def test_bounded_fact(loss):
    logits = np.zeros((TOKENS, VOCAB))
    targets = np.zeros(TOKENS, np.int32)
    logits[:, 1] = [0, 1, 3, 10, 100, 300, 600]
    value = call(loss, logits, targets)
    assert (value[-1] < 1.01 * value[-2]) == facts_of(loss).bounded


@every_loss
def test_low_probability_facts(loss):
    """|dL/dz_y| at p = e^-200 is at its stated limit on both paths; an infinite limit is passing 4 and still rising."""
    for path in ("even", "one"):
        limit = low_p_claim(loss, path, VOCAB)
        found = []
        for gap in (20.0, 40.0, 200.0):
            z = np.zeros((TOKENS, VOCAB))
            z[:, 0 if path == "even" else 1] = -gap if path == "even" else gap
            found.append(abs(call(loss, z, np.zeros(TOKENS, np.int32), "gradient")[0, 0]))
        if limit == np.inf:
            assert 4 < found[0] < found[1] < found[2]
        else:
            assert found[-1] == pytest.approx(limit, abs=1e-6)


@every_loss
def test_proper_fact_at_a_known_law(loss):
    """Where the loss is proper, its expected gradient vanishes at the logits whose link is P, and not at a neighbour.

    P is taken *from* logits, so that no link needs to be inverted.
    """
    facts = facts_of(loss)
    z = np.log(np.array([0.4, 0.25, 0.2, 0.1, 0.05]))
    if facts.proper == "link" and not facts.shift:
        z = np.exp(z) if "sigmoid" not in facts.link_name else np.array([-0.2, -0.7, -1.1, -1.9, -2.5])
    with jax.enable_x64(True):
        link = link_of(loss)
        law = np.asarray(link(jnp.asarray(z)))
        if "sigmoid" in facts.link_name:  # the classes' own probabilities must already sum to 1
            z = np.log(law / (1 - law))
            law = np.asarray(link(jnp.asarray(z)))
        if facts.link_name.startswith("z /"):
            k, m = (getattr(loss, "keywords", {}).get(name, 1.0) for name in ("k", "M"))
            z = k * m * law / (1 - law + k * law)
        if name_of(loss).startswith("z_loss"):
            z = z - np.logaddexp.reduce(z)

        def expected_gradient(logits):
            rows = np.broadcast_to(logits, (VOCAB, VOCAB))
            return np.abs(law @ call(loss, rows, np.arange(VOCAB, dtype=np.int32), "gradient")).max()

        at_law = expected_gradient(z)
        off_law = expected_gradient(z + np.array([0.2, -0.1, 0, 0.05, 0]))
    if facts.proper == "no":
        assert at_law > 1e-3
    else:
        assert at_law < 1e-12
        assert off_law > 1e-3


compiled = functools.cache(jax.jit)  # most losses have the same link


@every_loss
def test_link_gives_a_distribution(loss):
    logits, _ = batch(scale=4.0, dtype=np.float32)
    with jax.numpy_dtype_promotion("standard"):
        p = np.asarray(compiled(link_of(loss))(jnp.asarray(logits)))
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(-1), 1, rtol=2e-6)


def _hostile():
    """float32 rows at +-1e4 in every arrangement of sign, with each class as the target, and the same with a -inf rival."""
    signs = np.array(list(itertools.product((-1e4, 1e4, 0.0), repeat=VOCAB)), np.float32)
    targets = np.arange(len(signs), dtype=np.int32) % VOCAB
    masked = signs.copy()
    masked[np.arange(len(signs)), (targets + 1) % VOCAB] = -np.inf
    ordinary = np.random.default_rng(0).standard_normal(signs.shape).astype(np.float32)
    all_masked = np.full_like(signs, -np.inf)
    all_masked[np.arange(len(signs)), targets] = ordinary[:, 0]
    only = ordinary.copy()
    only[np.arange(len(signs)), (targets + 1) % VOCAB] = -np.inf
    return signs, masked, only, all_masked, targets


@every_loss
def test_finite_at_huge_logits_and_beside_a_masked_class(loss):
    huge, masked, ordinary_masked, all_masked, targets = _hostile()
    infinite = facts_of(loss).infinite
    exempt = {"large gaps": (huge, masked), "-inf rival": (masked, ordinary_masked, all_masked)}
    excused = [id(rows) for fact in infinite for rows in exempt[fact]]
    for rows in (huge, masked, ordinary_masked, all_masked):
        v = call(loss, rows, targets)
        if id(rows) in excused:
            assert np.isposinf(v).any(), "declared infinite, and is not: drop the fact"
            assert not np.isnan(v).any()
        else:
            assert np.isfinite(v).all()
            assert np.isfinite(call(loss, rows, targets, "gradient")).all()


@every_loss
def test_a_bad_target_is_nan_for_its_token_alone(loss):
    logits, targets = batch(dtype=np.float32)
    for bad in (-1, VOCAB, VOCAB + 300, -VOCAB, 2**31 - 1, -(2**31)):
        spoiled = targets.copy()
        spoiled[2] = bad
        value = call(loss, logits, spoiled)
        assert np.isnan(value[2])
        np.testing.assert_array_equal(np.delete(value, 2), np.delete(call(loss, logits, targets), 2))


@functools.cache
def values_by_dtype():
    """Each loss's values [N] by each type of targets."""
    logits, targets = batch(dtype=np.float32)
    every = [targets.astype(dtype) for dtype in (np.int32, np.int8, np.uint8, np.int16, np.uint32)]
    return jax.jit(lambda logits, every: [[loss(logits, targets) for targets in every] for loss in CASES])(logits, every)


@every_loss
def test_target_dtypes_agree(loss):
    logits, targets = batch(dtype=np.float32)
    values = values_by_dtype()[CASES.index(loss)]
    for value in values:
        np.testing.assert_array_equal(value, values[0])
    # Another program: a GPU's sums may go in another order there.
    np.testing.assert_allclose(values[0], call(loss, logits, targets), rtol=1e-6 if jax.default_backend() != "cpu" else 0)


@every_loss
def test_a_nan_shows_in_a_batch_large_enough_for_vector_code(loss):
    """A bad target's, all logits', one rival's: on a CPU a vectorised maximum loses it, which small batches do not show."""
    run, vocab = jax.jit(loss), len(settings_of(loss).get("prior") or range(320))
    logits, targets = jnp.zeros((16, vocab), jnp.float32), jnp.full(16, vocab + 3, jnp.int32)
    assert np.isnan(run(logits, targets)).all()
    assert np.isnan(run(logits + jnp.nan, targets * 0)).all()
    for place in (1, vocab // 2, vocab - 1):
        assert np.isnan(run(logits.at[:, place].set(jnp.nan), targets * 0)).all()


@every_loss
def test_numpy_arrays_are_taken_and_a_64_bit_target_does_not_wrap(loss):
    logits, targets = batch(dtype=np.float32)
    wide = targets.astype(np.int64)
    np.testing.assert_allclose(loss(logits, wide), call(loss, logits, targets), rtol=1e-5, atol=1e-6)
    wide[2] += 2**32
    assert np.isnan(loss(logits, wide)[2])


@functools.cache
def hessians():
    """Each loss's second derivatives [V, V] at the first token."""
    logits, targets = batch()
    with jax.enable_x64(True):
        of = lambda loss, target: jax.hessian(lambda logits: loss(logits, target))
        return jax.device_get(jax.jit(lambda z, y: [of(loss, y)(z) for loss in CASES])(logits[0], targets[0]))


@every_loss
def test_second_derivatives_exist_and_are_finite(loss):
    hessian = hessians()[CASES.index(loss)]
    assert np.isfinite(hessian).all()
    if facts_of(loss).stops_gradient:  # its field's own derivative is not what a second autodiff gives
        return
    logits, targets = batch()
    step = 1e-5
    gradient = lambda nudge: call(loss, logits + nudge, targets, "gradient")[0]
    by_difference = np.stack([(gradient(step * e) - gradient(-step * e)) / (2 * step) for e in np.eye(VOCAB)], 1)
    # Hinges have no curvature between their kinks, and a difference may straddle one: sizes are compared, not exact zeros.
    np.testing.assert_allclose(hessian, by_difference, rtol=1e-4, atol=1e-6 * (1 + np.abs(hessian).max()))


@every_loss
def test_gradients_work_in_bfloat16(loss):
    logits, targets = batch(dtype=np.float32)
    low = logits.astype(jnp.bfloat16)
    exact = call(loss, low.astype(np.float32), targets, "gradient")
    rounded = call(loss, low, targets, "gradient")
    assert rounded.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; some thirty roundings of the largest intermediate, the exponential's sum apart.
    scale = np.abs(exact).max(axis=-1, keepdims=True) + 1
    assert (np.abs(np.asarray(rounded, np.float32) - exact) / scale).max() < 0.15


@every_loss
@given(
    logits=hnp.arrays(np.float64, (TOKENS, VOCAB), elements=st.floats(-30, 30, allow_subnormal=False)),
    targets=hnp.arrays(np.int32, TOKENS, elements=st.integers(0, VOCAB - 1)),
)
def test_losses_are_finite_and_agree_with_float32(loss, logits, targets):
    logits = logits.astype(np.float32)
    exact = call(loss, logits.astype(np.float64), targets)
    rough = call(loss, logits, targets)
    assert np.isfinite(exact).all()
    # Errors of size eps * |z|^2 come with squares of logits, and eps * exp(gap) with the exponential: relative to the value.
    np.testing.assert_allclose(rough, exact, rtol=2e-4, atol=1e-4)


@every_loss
def test_facts_are_complete(loss):
    facts = facts_of(loss)
    for field in ("source", "formula", "gradient", "link_name"):
        assert getattr(facts, field), field
    for field in ("proper", "calibrated", "convex", "bounded", "shift", "local", "low_p_even", "low_p_one"):
        assert getattr(facts, field) is not None, field
    assert any(character.isdigit() for character in facts.source), "a source has a year"
    settings = [name for name in inspect.signature(loss).parameters if name not in ("logits", "targets")]
    parameters = inspect.signature(loss).parameters
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in settings)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in settings)


@every_loss
def test_docstring_has_an_example_that_is_not_the_function_itself(loss):
    function = getattr(loss, "func", loss)
    doc = inspect.getdoc(function)
    assert ">>>" in doc
    assert "[..., V]" in doc
    example = doc.split(">>>")[1]
    assert function.__name__ in example
    ast.parse(example.split("\n")[0].strip())


def test_tsallis_keeps_digits_at_certainty_and_is_never_below_0():
    z = np.random.default_rng(0).normal(size=(20, 40))
    z[:, 0] = z[:, 1:].max(axis=1) + np.repeat([6, 10, 14, 18], 5)
    found = LOSSES["tsallis"](jnp.asarray(z, jnp.float32), jnp.zeros(20, jnp.int32))
    p = np.exp(z - np.logaddexp.reduce(z.astype(np.float32).astype(np.float64), axis=1, keepdims=True))
    missed, powers = p[:, 1:].sum(axis=1), (p[:, 1:] ** 1.5).sum(axis=1)
    lost = -np.expm1(0.5 * np.log1p(-missed))
    np.testing.assert_allclose(found, lost - 0.5 * missed * (1 - lost) + 0.5 * powers, rtol=1e-2)
    assert (found >= 0).all()


@pytest.mark.parametrize("name", ["focal", "generalized_cross_entropy", "mixce", "tsallis", "label_smoothing", "z_loss"])
def test_a_setting_may_be_a_jax_array(name):
    """Known, and yet none that JAX could compare within a trace. Unwrapped: the tests' check of types wants a float."""
    loss = inspect.unwrap(LOSSES[name])
    (key, value), *_ = {
        k: p.default for k, p in inspect.signature(LOSSES[name]).parameters.items() if k not in ("logits", "targets")
    }.items()
    logits, targets = jnp.asarray([[0.5, -1.0, 2.0]]), jnp.asarray([1])
    array = functools.partial(loss, **{key: jnp.float32(value)})
    np.testing.assert_allclose(jax.jit(array)(logits, targets), LOSSES[name](logits, targets), rtol=1e-6)
    with pytest.raises(LabError, match=f"{name} needs"):
        jax.jit(functools.partial(loss, **{key: jnp.float32(-3)}))(logits, targets)


WITHOUT_PRIOR = [loss for loss in CASES if not any(np.ndim(each) for each in settings_of(loss).values())]  # it has a length


@functools.cache
def in_both_types(vocab):
    """Value and gradient of all losses in bfloat16, and in float32 at the same logits: a program a type."""
    z, y = jnp.asarray(3 * np.random.default_rng(0).standard_normal((4, vocab)), jnp.bfloat16), jnp.arange(4)
    run = jax.jit(lambda z: [value_and_gradient(loss, z, y) for loss in WITHOUT_PRIOR])
    return run(z), run(z.astype(jnp.float32))


@pytest.mark.parametrize("loss", WITHOUT_PRIOR, ids=name_of)
@pytest.mark.parametrize("vocab", [50, 4096])
def test_bfloat16_costs_the_rounding_of_its_result(loss, vocab):
    """Of the gradient at its largest entry: everything within is float32's."""
    (narrow, slope), (value, right) = (each[WITHOUT_PRIOR.index(loss)] for each in in_both_types(vocab))
    assert narrow.dtype == slope.dtype == jnp.bfloat16
    wide = lambda each: np.asarray(each, np.float64)
    np.testing.assert_allclose(wide(narrow), wide(value), rtol=2**-8, atol=2**-9)
    assert np.abs(wide(slope) - wide(right)).max() <= 2**-8 * np.abs(wide(right)).max()
