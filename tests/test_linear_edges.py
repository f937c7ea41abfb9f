"""What a head is given in practice: weights that cancel or are 0, masks, padding, scaled losses, targets of every type."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from naive_heads import BRIER, NLL, TOKENS, VOCAB, batch, both, close, reference

from xentlab import LOSSES, LabError, at_target, loss
from xentlab.contract import facts_of
from xentlab.linear import explain_plan, linear_log_probs, linear_loss
from xentlab.products import quickly
from xentlab.targets import off_target

TRAINS = True  # NumPy's float64 meets float32 in the references
TILES = (7, 13)
PERCEPTRON = LOSSES["perceptron"]


@both
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_weights_that_cancel_are_no_empty_batch(plan, reduction):
    """Advantages less their mean, say: their sum is 0, and the loss is not."""
    hidden, weight, targets = batch(6)
    token_weights = jnp.array([1.0, -1.0, 2.0, -2.0, 0.5, -0.5])
    head = lambda w: linear_loss(hidden, w, targets, token_weights=token_weights, reduction=reduction, plan=plan, tiles=TILES)
    value, slope = jax.jit(jax.value_and_grad(head))(weight)
    if reduction == "mean":
        assert not np.isfinite(value)
        return
    right, exact = jax.value_and_grad(lambda w: jnp.sum(NLL(hidden @ w, targets) * token_weights))(weight)
    close((value, slope), (np.asarray(right, np.float64), np.asarray(exact, np.float64)))


@both
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_weights_own_gradient(plan, reduction):
    """The naive head's, and 0 for a token that is out, whose loss nobody has asked for."""
    hidden, weight, targets = batch(6)
    token_weights = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0, 3.0])
    head = lambda weights: linear_loss(hidden, weight, targets, token_weights=weights, reduction=reduction, plan=plan)
    each = np.asarray(NLL(hidden @ weight, targets), np.float64)
    total = 1.0 if reduction == "sum" else float(token_weights.sum())
    mean = 0.0 if reduction == "sum" else np.average(each, weights=np.asarray(token_weights))
    close(jax.jit(jax.grad(head))(token_weights), np.where(token_weights == 0, 0, (each - mean) / total))


@both
@pytest.mark.parametrize("name", ["nll", "exponential", "hinge"])
def test_a_token_of_weight_0_spoils_no_gradient(plan, name):
    """Neither by a hidden state that is not a number nor by one whose loss overflows."""
    hidden, weight, targets = batch(6)
    spoilt = hidden.at[2].set(jnp.nan).at[4].set(1e6)
    token_weights = jnp.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    head = functools.partial(linear_loss, targets=targets, token_weights=token_weights, loss=LOSSES[name], plan=plan)
    run = jax.jit(jax.value_and_grad(lambda h, w: head(h, w, tiles=TILES), (0, 1)))
    value, (to_hidden, to_weight) = run(spoilt, weight)
    right, (_, exact) = run(hidden, weight)
    close((value, to_weight), (np.asarray(right), np.asarray(exact)))
    assert not np.asarray(to_hidden)[[2, 4]].any()


@pytest.mark.parametrize(
    ("name", "plan"),
    [(name, plan) for name in ("nll", "spherical") for plan in ("tokens", "stream")]
    + [("entmax15", "tokens"), ("hinge", "stream")],
)
def test_a_mask_put_over_per_token_results(name, plan):
    """Padding as torch has it, -100, masked afterwards: the gradient is that of the tokens that are left."""
    hidden, weight, targets = batch(6)
    padded = targets.at[2].set(-100)
    run = functools.partial(linear_loss, loss=LOSSES[name], plan=plan, tiles=TILES, reduction="none")
    masked = lambda w: jnp.where(padded >= 0, run(hidden, w, padded), 0).sum()
    kept = jnp.array([0, 1, 3, 4, 5])
    left = lambda w: run(hidden[kept], w, targets[kept]).sum()
    found, right = jax.jit(lambda w: (jax.grad(masked)(w), jax.grad(left)(w)))(weight)
    close(found, np.asarray(right))


@both
@pytest.mark.parametrize("name", ["nll", "brier", "focal", "mae", "hinge", "spherical"])
def test_classes_that_a_bias_forbids(plan, name):
    """All rivals at -inf: certain, and no gradient."""
    hidden, weight = jnp.ones((1, 2)), jnp.ones((2, 3))
    head = lambda bias: linear_loss(hidden, weight, jnp.array([0]), bias=bias, loss=LOSSES[name], plan=plan)
    plain = lambda bias: jnp.mean(LOSSES[name](hidden @ weight + bias[None], jnp.array([0])))
    value, slope = jax.jit(jax.value_and_grad(head))(jnp.array([0.0, -jnp.inf, -jnp.inf]))
    right, exact = jax.jit(jax.value_and_grad(plain))(jnp.array([0.0, -jnp.inf, -jnp.inf]))
    assert float(value) == pytest.approx(float(right), abs=1e-6)
    np.testing.assert_allclose(slope, exact, atol=1e-6)


@both
def test_a_common_level_costs_no_gradient_its_digits(plan):
    """Of a loss that asks for the level, z_loss; and the shares of rivals for one that is not known to be free of it."""
    run = lambda loss: jax.jit(jax.grad(lambda w: linear_loss(jnp.ones((1, 1)), w, jnp.array([3]), loss=loss, plan=plan)))
    rivals = loss(stream=lambda rivals: rivals)(lambda z, y: jax.nn.logsumexp(off_target(z, y, -jnp.inf), axis=-1))
    at_3, by_z_loss, by_rivals = np.arange(11) == 3, run(LOSSES["z_loss"]), run(rivals)
    for level in (1e3, 1e4, -1e3):
        weight = np.full((1, 11), level, np.float32)
        pinned = (1 + 2e-4 * (level + np.log(11))) / 11 - at_3  # p (1 + 2 c lse) - e
        np.testing.assert_allclose(by_z_loss(weight)[0], pinned, rtol=1e-6)
        np.testing.assert_allclose(by_rivals(weight)[0], np.where(at_3, 0, 0.1), rtol=1e-6)


def test_a_form_that_asks_for_the_level_asks_for_nothing_that_has_one():
    made = loss(stream=lambda level, top: level + top)(lambda z, y: 2 * jnp.max(off_target(z, y, -jnp.inf), axis=-1))
    with pytest.raises(LabError, match="beside level its stream form may ask for target, rivals"):
        linear_loss(*batch(), loss=made)


def test_log_probs_of_a_target_that_a_bias_forbids():
    bias = jnp.array([-jnp.inf, 0.0, 0.0])
    log_p, entropy = jax.jit(linear_log_probs)(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.array([0]), bias=bias)
    assert float(log_p[0]) == -np.inf
    assert float(entropy[0]) == pytest.approx(np.log(2), rel=1e-6)


@both
@pytest.mark.parametrize(("dtype", "scales"), [(jnp.float16, (1.0, 2.0**10, 2.0**16)), (jnp.bfloat16, (1.0, 1 / 3))])
def test_a_loss_that_is_scaled(plan, dtype, scales):
    """By what float16 needs elsewhere, and by a third: the gradient is as many times as large, to the type's own rounding.

    Without a scale a share of this vocabulary in a mean is 1e-7: float16 has two numbers below that, and the head lifts it.
    """
    hidden, weight, targets = batch(2048, 8, 4096, scale=0.1, dtype=dtype)
    run = jax.jit(jax.grad(lambda h, w, scale: scale * linear_loss(h, w, targets, plan=plan), (0, 1)))
    exact = reference(NLL, targets, hidden, weight)[1]
    for scale in scales:
        for found, right in zip(run(hidden, weight, jnp.float32(scale)), exact, strict=True):
            assert np.linalg.norm(np.asarray(found, np.float64) / scale - right) < 4e-3 * np.linalg.norm(right)


@both
def test_in_float16_all_rivals_may_push_at_once(plan):
    """The target's share of the gradient is minus all others' together, of which float16 holds 65,504."""
    name = "hinge_weston_watkins"
    hidden, weight, targets = batch(8, 4, 70_000, scale=0.1, dtype=jnp.float16)
    exact = reference(LOSSES[name], targets, hidden, weight)[1]
    found = jax.jit(jax.grad(lambda h, w: linear_loss(h, w, targets, loss=LOSSES[name], plan=plan), (0, 1)))(hidden, weight)
    for each, right in zip(found, exact, strict=True):
        assert np.linalg.norm(np.asarray(each, np.float64) - right) < 2e-3 * np.linalg.norm(right)


def test_in_float16_weights_may_be_negative():
    hidden, weight, targets = batch(2048, 8, 4096, scale=0.1, dtype=jnp.float16)
    weights = jnp.full(2048, -1 / 2048)
    run = lambda h: linear_loss(h, weight, targets, token_weights=weights, reduction="sum", plan="tokens")
    found, (right, _) = jax.jit(jax.grad(run))(hidden), reference(NLL, targets, hidden, weight)[1]
    assert np.linalg.norm(np.asarray(found, np.float64) + right) < 4e-3 * np.linalg.norm(right)


@both
def test_tokens_that_are_out_do_no_harm_to_a_loss_without_a_derivative_at_0(plan):
    normed = lambda z, y: NLL(z / jnp.linalg.norm(z, axis=-1, keepdims=True), y)
    streamed = loss(stream=lambda squares, target, rivals: rivals / jnp.sqrt(squares + target**2) - target)(
        lambda z, y: jnp.log(jnp.sum(off_target(jnp.exp(z), y), axis=-1)) / jnp.linalg.norm(z, axis=-1) - at_target(z, y)
    )
    hidden, weight, targets = batch()
    weights = jnp.ones(len(hidden)).at[2].set(0)
    hidden = hidden.at[2].set(jnp.nan)
    used = normed if plan == "tokens" else streamed
    found = jax.jit(jax.grad(lambda w: linear_loss(hidden, w, targets, loss=used, token_weights=weights, plan=plan)))(weight)
    assert np.isfinite(found).all()


@both
@pytest.mark.parametrize("name", ["nll", "brier", "focal", "confidence_penalty", "exponential"])
def test_classes_may_be_masked_by_the_least_number(plan, name):
    """Of finfo.min, as masks are written: all rivals, and the first tiles."""
    hidden, weight, _ = batch(6, 4, 40)
    least, targets = jnp.finfo(jnp.float32).min, jnp.full(6, 30)
    head = lambda w, bias: linear_loss(hidden, w, targets, loss=LOSSES[name], bias=bias, plan=plan, tiles=(4, 8))
    plain = lambda w, bias: jnp.mean(LOSSES[name](hidden @ w + bias[None], targets))
    run, naive = jax.jit(jax.value_and_grad(head)), jax.jit(jax.value_and_grad(plain))
    log_probs = jax.jit(functools.partial(linear_log_probs, tiles=(4, 8)))
    for bias in (jnp.full(40, least).at[30].set(0.0), jnp.where(jnp.arange(40) < 20, least, 0.0)):
        close(run(weight, bias), naive(weight, bias))
        log_p, entropy = log_probs(hidden, weight, targets, bias=bias)
        exact = jax.nn.log_softmax(hidden @ weight + bias[None])
        close((log_p, entropy), (exact[:, 30], -jnp.sum(jnp.where(exact > -1e30, jnp.exp(exact) * exact, 0), -1)))


@both
def test_a_function_around_a_loss_is_another_loss(plan):
    """functools.wraps copies a loss's facts, and with them its stream form."""

    @functools.wraps(NLL)
    def doubled(logits, targets):
        return 2 * NLL(logits, targets)

    hidden, weight, targets = batch()
    assert facts_of(doubled).stream is None
    found = linear_loss(hidden, weight, targets, loss=doubled, plan="auto" if plan == "stream" else plan)
    close(found, 2 * reference(NLL, targets, hidden, weight)[0])
    compiled = jax.jit(NLL)  # the same one
    assert facts_of(compiled) is facts_of(NLL)
    close(linear_loss(hidden, weight, targets, loss=compiled, plan=plan), reference(NLL, targets, hidden, weight)[0])
    assert facts_of(loss(source="here")(doubled)).source == "here"


@both
def test_wide_targets_are_not_wrapped(plan):
    with jax.enable_x64(True):
        hidden, weight, targets = batch()
        for dtype in (jnp.int64, jnp.uint64, jnp.int8):
            given = targets.astype(dtype)
            given = given if dtype == jnp.int8 else given.at[5].set(2**32 + 3)
            run = jax.jit(lambda y: (linear_loss(hidden, weight, y, plan=plan, reduction="none"), NLL(hidden @ weight, y)))
            bad = [] if dtype == jnp.int8 else [5]
            assert [np.flatnonzero(np.isnan(each)).tolist() for each in run(given)] == [bad, bad]


def test_a_stream_form_with_a_setting_of_its_own():
    @loss(stream=lambda rivals, target, *, factor=2.0: factor * jax.nn.softplus(rivals - target))
    def twice(logits, targets):
        return 2 * NLL(logits, targets)

    hidden, weight, targets = batch()
    close(linear_loss(hidden, weight, targets, loss=twice, plan="stream"), 2 * reference(NLL, targets, hidden, weight)[0])


def test_mistakes_are_told(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's run has no such checks
    hidden, weight, targets = batch()
    head = functools.partial(linear_loss, hidden, weight)
    for mistake, said in (
        (lambda: head(targets.at[3].set(-100)), "got -100 at token 3"),
        (lambda: head(np.full(TOKENS, 2**40)), f"got {2**40} at token 0"),
        (lambda: head(targets.astype(jnp.float32)), "targets are class indices, integers; got float32"),
        (lambda: head(targets > 3), "integers; got bool"),
        (lambda: jax.jit(head)(jnp.full(TOKENS, jnp.nan)), "integers; got float32"),
        (lambda: head(targets, loss="nll"), "xentlab.resolve makes one"),
        (lambda: head(targets, softcap=float("inf")), "softcap is a positive number"),
        (lambda: head(targets, softcap=float("nan")), "softcap is a positive number"),
        (lambda: head(targets, softcap=True), "softcap is a positive number or None; got True"),
        (lambda: head(targets, bias=np.full(VOCAB, 1j)), "a bias: real numbers are wanted; got complex128"),
        (lambda: head(targets, token_weights=jnp.full(TOKENS, 1j)), "token_weights: real numbers are wanted; got complex64"),
        (lambda: head(targets, token_weights=np.full(TOKENS, "1")), "token_weights: real numbers are wanted; got <U1"),
        (lambda: head(targets, tiles=3), "tiles are two counts"),
        (lambda: head(targets, tiles=(3.0, 4)), "tiles are two counts"),
        (lambda: linear_loss(hidden, weight[0], targets), "hidden is .*, D. and a weight"),
        (lambda: linear_loss(hidden, weight[None], targets), "hidden is .*, D. and a weight"),
        (lambda: linear_loss(jnp.float32(1), weight, targets), "hidden is .*, D. and a weight"),
        (lambda: linear_loss(hidden.astype(int), weight.astype(int), targets), "one of float32, .*; got int"),
        (lambda: explain_plan(8, 8, 8, "nll"), "xentlab.resolve makes one"),
    ):
        with pytest.raises(LabError, match=said):
            mistake()
    assert explain_plan(8, 8, VOCAB, BRIER, plan="tokens", tiles=(np.int64(3), np.int64(4))).tiles == (3, 4)
    close(head(targets, softcap=np.float64(3.0)), np.asarray(head(targets, softcap=3.0)))
    close(head(targets, loss=lambda z, y: at_target(z, y)), reference(lambda z, y: at_target(z, y), targets, hidden, weight)[0])


@both
def test_integers_are_cast_and_no_targets_have_any_type(monkeypatch, plan):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    hidden, weight, targets = batch()
    head = functools.partial(linear_loss, plan=plan)
    bias, weights = np.arange(VOCAB) % 3, np.arange(TOKENS) % 2
    found = head(hidden, weight, targets, bias=bias, token_weights=weights)
    close(found, head(hidden, weight, targets, bias=bias.astype(np.float32), token_weights=weights.astype(np.float32)))
    slope = jax.grad(lambda w: head(hidden, w, targets, bias=bias))(weight)
    close(slope, jax.grad(lambda w: head(hidden, w, targets, bias=bias.astype(np.float32)))(weight))
    assert head(hidden[:0], weight, []) == 0
    with pytest.raises(LabError, match="goes with targets"):
        head(hidden, weight, [])


@pytest.mark.parametrize(
    ("name", "setting"), [("label_smoothing", "epsilon"), ("generalized_cross_entropy", "q"), ("poly1", "epsilon")]
)
def test_a_setting_may_be_traced(monkeypatch, name, setting):
    """Annealed, say: compiled once, right at every value."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # annotated as the number that it mostly is
    hidden, weight, targets = batch()
    run = jax.jit(lambda value: linear_loss(hidden, weight, targets, loss=functools.partial(LOSSES[name], **{setting: value})))
    for value in (0.25, 0.5):
        right = reference(functools.partial(LOSSES[name], **{setting: value}), targets, hidden, weight)[0]
        close(run(jnp.float32(value)), right)


def test_a_multiple_that_is_traced_is_refused():
    hidden, weight, targets = batch()
    head = lambda alpha: linear_loss(hidden, weight, targets, loss=functools.partial(LOSSES["tsallis"], alpha=alpha))
    with pytest.raises(LabError, match="alpha is traced"):
        jax.jit(head)(1.5)


@pytest.mark.parametrize(("name", "plan"), [("nll", "tokens"), ("nll", "stream"), ("hinge", "stream"), ("entmax15", "tokens")])
def test_within_a_shard_map_of_the_callers(name, plan):
    """JAX keeps account there of what varies over the mesh, in loops and derivatives; one device is enough for that."""
    mesh, split, whole = jax.sharding.Mesh(jax.devices()[:1], ("data",)), P("data"), P()
    hidden, weight, targets = batch()

    def head(h, w, y):
        more = {"loss": LOSSES[name], "plan": plan, "tiles": TILES}
        mean, each = linear_loss(h, w, y, **more), linear_loss(h, w, y, reduction="none", **more)
        return jax.lax.pmean(mean + jnp.mean(each) + jnp.mean(LOSSES[name](h @ w, y)), "data")

    spread = lambda w: jax.shard_map(head, mesh=mesh, in_specs=(split, whole, split), out_specs=whole)(hidden, w, targets)
    value, slope = jax.jit(jax.value_and_grad(spread))(weight)
    inside = jax.shard_map(
        lambda h, w, y: jax.grad(head, 1)(h, w, y), mesh=mesh, in_specs=(split, whole, split), out_specs=whole
    )
    right, (_, exact) = reference(LOSSES[name], targets, hidden, weight)
    close((value, slope, jax.jit(inside)(hidden, weight, targets)), (3 * right, 3 * exact, 3 * exact))
    log_p = jax.shard_map(linear_log_probs, mesh=mesh, in_specs=(split, whole, split), out_specs=(split, split))
    assert jax.jit(log_p)(hidden, weight, targets)[0].shape == (TOKENS,)


@both
@pytest.mark.parametrize("options", [None, quickly(0)])
def test_the_greatest_rival_is_known_by_its_class(plan, options):
    """Logits that are made anew are equal to what they were, or a rounding away from it, by what XLA fuses."""
    rng = np.random.default_rng(0)
    hidden, weight, bias = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((257, 1), (1, 3), (3,)))
    targets = jnp.asarray(rng.integers(0, 3, 257), jnp.int32)
    head = lambda bias: linear_loss(
        hidden, weight, targets, loss=PERCEPTRON, bias=bias, reduction="sum", plan=plan, tiles=TILES
    )
    exact = jax.grad(lambda bias: jnp.sum(PERCEPTRON(hidden @ weight + bias[None], targets)))(bias)
    assert jnp.array_equal(jax.jit(jax.grad(head), compiler_options=options)(bias), exact)
    # Whole numbers, of which many tie: they share the slope.
    whole = functools.partial(linear_loss, weight=jnp.eye(3, 5), targets=targets, loss=PERCEPTRON, reduction="sum", plan=plan)
    draws = jnp.asarray(rng.integers(-1, 2, (257, 3)), jnp.float32)
    slopes = jax.jit(jax.grad(lambda hidden: whole(hidden, tiles=(7, 2))))(draws)
    close(slopes, np.asarray(jax.grad(lambda hidden: jnp.sum(PERCEPTRON(hidden @ jnp.eye(3, 5), targets)))(draws), np.float64))


def test_a_loss_without_any_derivative_has_its_value():
    hidden, weight, targets = batch(6)

    def called_back(logits, targets):
        shape = jax.ShapeDtypeStruct(targets.shape, logits.dtype)
        return jax.pure_callback(lambda z: np.asarray(z).max(-1), shape, logits, vmap_method="expand_dims")

    run = lambda h: linear_loss(h, weight, targets, loss=called_back, tiles=TILES)
    close(jax.jit(run)(hidden), np.asarray(jnp.max(hidden @ weight, axis=-1).mean(), np.float64))
    with pytest.raises(ValueError, match="Pure callbacks"):
        jax.jit(jax.grad(run))(hidden)


@pytest.mark.parametrize("softcap", [1e39, 1e-39, 1.7e308])
def test_a_cap_that_float32_cannot_hold_is_refused(softcap):
    with pytest.raises(LabError, match="None caps nothing"):
        linear_loss(*batch(6), softcap=softcap)
