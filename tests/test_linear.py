"""The head against the naive one in float64: every loss, both plans, awkward shapes, derivatives."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from naive_heads import (
    BRIER,
    CASES,
    NLL,
    TOKENS,
    VOCAB,
    batch,
    both,
    close,
    every_head,
    every_naive_head,
    every_plan,
    naive,
    reference,
    weighted_batch,
)

from xentlab import LOSSES, LabError, at_target, loss, name_of, resolve
from xentlab.linear import explain_plan, linear_log_probs, linear_loss
from xentlab.linear import plan as planning
from xentlab.targets import off_target

TRAINS = True  # the losses are tested strictly elsewhere; here NumPy's float64 meets float32 in the references


@every_plan
def test_value_and_gradients_equal_the_naive_heads(loss, plan):
    arrays, targets = weighted_batch()
    losses, run = every_head(plan)
    found = lambda targets: run(arrays, targets)[losses.index(loss)]
    close(found(targets), every_naive_head()[CASES.index(loss)])
    for bad in (-1, VOCAB, 2**31 - 1):  # nothing can raise in there: NaN, never another class's loss
        assert np.isnan(found(targets.at[5].set(bad))[0])


@both
@pytest.mark.parametrize("name", ["nll", "hinge", "hinge_weston_watkins", "squared_hinge", "perceptron"])
def test_a_nan_among_many_shows(plan, name):
    """That of a bad target, or of one class's logits: in vector code, whose maximum loses a NaN on a CPU."""
    vocab = 4 * 320
    hidden, weight, targets = batch(320, vocab=vocab)
    head = functools.partial(linear_loss, loss=LOSSES[name], plan=plan, tiles=(320, 320))
    run, mean = jax.jit(functools.partial(head, reduction="none")), jax.jit(head)
    assert np.flatnonzero(np.isnan(run(hidden, weight, targets.at[5].set(vocab)))).tolist() == [5]
    for place in (0, vocab // 2, vocab - 1):  # in the first tile, and in later ones
        broken = weight.at[:, place].set(jnp.nan)
        assert np.isnan(run(hidden, broken, targets)).all()
        assert np.isnan(mean(hidden, broken, targets))


@both
@pytest.mark.parametrize("shape", [(1, 3, 5), (7, 2, 1), (8, 3, 26), (3, 1, 11), (14, 4, 13)])
def test_awkward_shapes(plan, shape):
    """N and V prime, one token, one class, multiples of the tiles, V below a tile."""
    hidden, weight, targets = batch(*shape)
    head = lambda hidden, weight: linear_loss(hidden, weight, targets, loss=BRIER, plan=plan, tiles=(7, 13))
    close(jax.jit(jax.value_and_grad(head, (0, 1)))(hidden, weight), reference(BRIER, targets, hidden, weight))


@both
def test_no_tokens_cost_nothing(plan):
    hidden, weight, targets = batch(0)
    value, gradient = jax.value_and_grad(lambda w: linear_loss(hidden, w, targets, plan=plan))(weight)
    assert value == 0
    assert not np.asarray(gradient).any()
    assert linear_loss(hidden, weight, targets, plan=plan, reduction="none").shape == (0,)


@both
@pytest.mark.parametrize("name", ["nll", "brier", "hinge", "confidence_penalty", "exponential"])
def test_huge_logits(plan, name):
    """Spread over +-1e4: finite where the loss in float32 is, and right."""
    hidden, weight, targets = batch(scale=3e3)
    targets = targets.at[:4].set(jnp.argmax(hidden @ weight, axis=-1)[:4].astype(jnp.int32))
    loss = LOSSES[name]
    head = lambda h, w: linear_loss(h, w, targets, loss=loss, plan=plan, tiles=(7, 13), reduction="none")
    found, plain = map(np.asarray, jax.jit(lambda h, w: (head(h, w), loss(h @ w, targets)))(hidden, weight))
    # The logits themselves differ by rounding of 1e4 between two orders of summing: 1e4 * 6e-8 * a few.
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(plain))
    finite = np.isfinite(plain)
    np.testing.assert_allclose(found[finite], plain[finite], rtol=1e-5, atol=0.02)


@both
@pytest.mark.parametrize("loss", [NLL, LOSSES["squared_hinge"]], ids=name_of)  # one that reads the target ahead
def test_layouts_leading_axes_and_softcap(plan, loss):
    hidden, weight, targets = batch(24)
    more = {"softcap": 2.0, "plan": plan, "tiles": (7, 13)}
    right, (_, right_slope) = reference(loss, targets, hidden, weight, softcap=2.0)
    close(jax.jit(lambda w: linear_loss(hidden, w, targets, loss=loss, **more))(weight), right)
    shaped = lambda w: linear_loss(
        hidden.reshape(2, 3, 4, -1), w, targets.reshape(2, 3, 4), loss=loss, vocab_first=True, **more
    )
    value, slope = jax.jit(jax.value_and_grad(shaped))(weight.T)
    close((value, slope.T), (right, right_slope))


@both
def test_reductions_agree(plan):
    hidden, weight, targets = batch()
    token_weights = jnp.arange(TOKENS, dtype=jnp.float32)
    run = jax.jit(
        lambda reduction: linear_loss(
            hidden, weight, targets, plan=plan, reduction=reduction, token_weights=token_weights, tiles=(7, 13)
        ),
        static_argnums=0,
    )
    each = run("none")
    assert each.shape == (TOKENS,)
    close(each, np.asarray(NLL(hidden @ weight, targets) * token_weights, np.float64))
    assert run("sum") == pytest.approx(float(each.sum()), rel=1e-6)
    assert run("mean") == pytest.approx(float(each.sum() / token_weights.sum()), rel=1e-6)


@both
def test_a_token_of_weight_0_is_out_whatever_its_target(plan):
    hidden, weight, targets = batch()
    kept = np.arange(TOKENS) % 3 > 0
    bad = jnp.where(kept, targets, 10**6)
    head = lambda h, w, y, weights: linear_loss(h, w, y, token_weights=weights, plan=plan, tiles=(7, 13))
    run = jax.jit(jax.value_and_grad(head, (0, 1)))
    value, (to_hidden, to_weight) = run(hidden, weight, bad, jnp.asarray(kept, jnp.float32))
    right, (_, right_weight) = run(hidden[kept], weight, targets[kept], jnp.ones(kept.sum()))
    close((value, to_weight), (np.asarray(right), np.asarray(right_weight)))
    assert not np.asarray(to_hidden)[~kept].any()
    value, gradients = run(hidden, weight, bad, jnp.zeros(TOKENS))
    assert value == 0
    assert not any(np.asarray(each).any() for each in gradients)


@both
def test_a_bad_target_is_nan_for_its_token_alone(plan):
    hidden, weight, targets = batch()
    run = jax.jit(lambda y: linear_loss(hidden, weight, y, plan=plan, tiles=(7, 13), reduction="none"))
    for bad in (-1, VOCAB, 2**31 - 1, -(2**31)):
        assert np.flatnonzero(np.isnan(run(targets.at[5].set(bad)))).tolist() == [5]


@both
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_accumulates_wide(plan, dtype):
    """Against float64 of the same rounded inputs, logits of scale 8: gradients to 2e-3, and nearer than the naive head's."""
    hidden, weight, targets = batch(256, 64, 1000, scale=8 / 64**0.5, dtype=dtype)
    head = lambda h, w: linear_loss(h, w, targets, plan=plan, tiles=(100, 256))
    value, gradients = jax.jit(jax.value_and_grad(head, (0, 1)))(hidden, weight)
    assert value.dtype == jnp.float32
    assert [each.dtype for each in gradients] == [dtype, dtype]
    right, exact = reference(NLL, targets, hidden, weight)
    assert float(value) == pytest.approx(float(right), rel=1e-5)
    plain = jax.jit(jax.grad(lambda h, w: jnp.mean(NLL(h @ w, targets)), (0, 1)))(hidden, weight)
    for mine, theirs, truth in zip(gradients, plain, exact, strict=True):
        error = lambda found, truth=truth: np.linalg.norm(np.asarray(found, np.float64) - truth) / np.linalg.norm(truth)
        # What is left is rounding the logits' gradient and the result to the type: 2^-9 each in bfloat16.
        assert error(mine) < 2e-3
        assert error(mine) < error(theirs)


@both
@pytest.mark.parametrize(("name", "dtype"), [("brier", jnp.float32), ("brier", jnp.bfloat16), ("squared_hinge", jnp.float32)])
def test_second_order_forward_over_reverse(plan, name, dtype):
    hidden, weight, targets = batch(9, 3, 31, dtype=dtype)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=weight.shape), dtype)
    head = lambda w: linear_loss(hidden, w, targets, loss=LOSSES[name], plan=plan, tiles=(4, 13))
    product = jax.jit(lambda w: jax.jvp(jax.grad(head), (w,), (direction,))[1])(weight)
    with jax.enable_x64(True):
        wide = lambda each: jnp.asarray(np.asarray(each), jnp.float64)
        slope = jax.grad(lambda w: naive(LOSSES[name], jnp.asarray(np.asarray(targets)), wide(hidden), w))
        exact = np.asarray(jax.jit(lambda w, along: jax.jvp(slope, (w,), (along,))[1])(wide(weight), wide(direction)))
    close(product, exact, 2e-5 if dtype == jnp.float32 else 2e-2)


@both
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_hessian_is_the_naive_head_s(plan, backend, monkeypatch):
    """Which is a vmap of second derivatives, whose first one is the same for all."""
    hidden, weight, targets = batch(9, 3, 7)
    heads = [
        lambda h, w: linear_loss(h, w, targets, loss=LOSSES["brier"], plan=plan, tiles=(4, 3)),
        lambda h, w: naive(LOSSES["brier"], targets, h, w),
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found, right = (jax.jit(jax.jacfwd(jax.grad(head, (0, 1)), (0, 1)))(hidden, weight) for head in heads)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        close(one, np.asarray(other), 2e-5)


def test_a_broken_multiple_has_a_second_derivative():
    """A root of a share that is 0 has none: such a multiple is an exponential of its own."""

    @loss(stream=lambda rivals_power, target, *, power: rivals_power - power * target)
    def rooted(logits, targets, *, power=0.5):
        return jax.nn.logsumexp(off_target(power * logits, targets, -jnp.inf), axis=-1) - power * at_target(logits, targets)

    hidden, weight, targets = batch(9, 3, 31)
    direction = jnp.asarray(np.random.default_rng(2).normal(size=weight.shape), jnp.float32)
    heads = [
        lambda w: linear_loss(hidden, w, targets, loss=rooted, plan="stream", tiles=(4, 13)),
        lambda w: naive(rooted, targets, hidden, w),
    ]
    one, other = (np.asarray(jax.jit(lambda w, f=f: jax.jvp(jax.grad(f), (w,), (direction,))[1])(weight)) for f in heads)
    close(one, other)


@both
def test_inside_vmap_scan_and_checkpoint(plan):
    hidden, weight, targets = batch(12)
    head = lambda w: linear_loss(hidden, w, targets, plan=plan, tiles=(5, 40))
    weights, slope = jnp.stack([weight, 2 * weight]), jax.grad(head)
    one = np.stack([jax.jit(slope)(each) for each in weights])
    scanned = lambda weights: jax.lax.scan(lambda _, w: (0, slope(w)), 0, weights)[1]
    kept = lambda weights: jax.grad(jax.checkpoint(head))(weights[1])
    mapped, scanned, again = jax.jit(lambda weights: (jax.vmap(slope)(weights), scanned(weights), kept(weights)))(weights)
    close((mapped, scanned, again), (one, one, one[1]))


def test_log_probs_and_entropy():
    hidden, weight, targets = batch(24, scale=2)
    run = jax.jit(functools.partial(linear_log_probs, tiles=(7, 13)))
    log_p, entropy = run(hidden.reshape(4, 6, -1), weight, targets.reshape(4, 6))
    z = np.asarray(hidden, np.float64) @ np.asarray(weight, np.float64)
    exact = z - np.logaddexp.reduce(z, axis=-1, keepdims=True)
    close(log_p.reshape(-1), exact[np.arange(24), np.asarray(targets)])
    right = -(np.exp(exact) * exact).sum(-1)
    close(entropy.reshape(-1), right)
    slope = jax.jit(jax.grad(lambda w: linear_log_probs(hidden, w, targets, tiles=(7, 13))[1].sum()))(weight)
    close(slope, np.asarray(hidden, np.float64).T @ (-np.exp(exact) * (exact + right[:, None])))  # dH / dz = -p (log p + H)
    turned = functools.partial(linear_log_probs, tiles=(7, 13), softcap=3.0, vocab_first=True)
    capped = jax.nn.log_softmax(3 * np.tanh(z / 3))
    log_p, entropy = jax.jit(turned)(hidden, weight.T, targets)
    close((log_p, entropy), (capped[np.arange(24), np.asarray(targets)], -(np.exp(capped) * capped).sum(-1)))
    one = run(jnp.ones((1, 2)), jnp.ones((2, 1)), jnp.array([0]))
    assert [float(each[0]) for each in one] == [0, 0]  # one class: certain


@both
def test_against_optax_and_torch(plan):
    torch = pytest.importorskip("torch")
    hidden, weight, targets = batch()
    run = lambda h, w: linear_loss(h, w, targets, plan=plan, tiles=(7, 13))
    value, gradients = jax.jit(jax.value_and_grad(run, (0, 1)))(hidden, weight)
    assert float(value) == pytest.approx(
        float(optax.softmax_cross_entropy_with_integer_labels(hidden @ weight, targets).mean()), rel=1e-6
    )
    tensors = [torch.tensor(np.asarray(each), dtype=torch.float64, requires_grad=True) for each in (hidden, weight)]
    labels = torch.tensor(np.asarray(targets), dtype=torch.int64)
    theirs = torch.nn.functional.cross_entropy(tensors[0] @ tensors[1], labels)
    theirs.backward()
    close((value, *gradients), (theirs.detach().numpy(), *[each.grad.numpy() for each in tensors]))


def test_auto_takes_what_explain_plan_says(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")  # these tests run on a GPU too, which may have the room
    memory = lambda total: monkeypatch.setattr(planning, "machine_memory", lambda: (total, total))
    memory(8 * 10**9 * jax.local_device_count())
    big, small = explain_plan(8192, 2304, 256_000, NLL), explain_plan(1024, 256, 32_768, NLL)
    assert (big.name, big.products) == ("stream", 4)
    assert (small.name, small.products) == ("tokens", 3)
    assert "under 1/16 of the memory" in small.why
    for plan in ("auto", "tokens"):  # four products either way
        each = explain_plan(1024, 256, 32_768, NLL, plan=plan, per_token=True)
        assert (each.name, each.products) == ("stream" if plan == "auto" else plan, 4)
    with monkeypatch.context() as several:  # whose memories may differ, and plans may not
        several.setattr(jax, "process_count", lambda: 2)
        assert explain_plan(1024, 256, 32_768, NLL).name == "stream"
    many = explain_plan(65_536, 4096, 128_256, NLL, jnp.bfloat16)  # of which stream sums the hidden states' gradients wide
    assert (many.name, "holds no more than that" in many.why) == ("tokens", True)
    assert many.temporary_bytes < explain_plan(65_536, 4096, 128_256, NLL, jnp.bfloat16, "stream").temporary_bytes
    without = explain_plan(8192, 2304, 256_000, LOSSES["entmax15"])
    assert (without.name, without.products, without.why) == ("tokens", 3, "entmax15 has no stream form")
    assert explain_plan(8192, 2304, 256_000, NLL, plan="tokens").why == "it was asked for"
    assert explain_plan(512, 64, 32_768, NLL).name == "stream"  # a batch of one chunk: all of its logits
    hidden, weight, targets = batch(1024, 8, 16_384)
    run = lambda plan: jax.jit(lambda w: linear_loss(hidden, w, targets, plan=plan)).lower(weight).as_text()
    assert run("auto") == run("tokens") != run("stream")
    memory(0)
    assert run("auto") == run("stream")


def test_a_chunk_has_no_more_logits_than_an_index_counts():
    """What lies beyond would be read where others are: gradients were off by a twentieth, without a word."""
    chunk, tile = explain_plan(70_001, 1, 32_768, plan="tokens", tiles=(70_001, 512)).tiles
    assert (chunk, tile) == (65_535, 512)
    assert chunk * 32_768 < 2**31 <= (chunk + 1) * 32_768
    assert explain_plan(70_001, 1, 32_768, plan="tokens", tiles=(70_001, 512), layout=(1, 2)).tiles[0] % 2 == 0


def test_a_loss_of_ones_own_goes_through_either_way():
    def cubic(logits, targets, *, power=3.0):
        return (1 - at_target(jax.nn.softmax(logits), targets)) ** power

    hidden, weight, targets = batch()
    close(linear_loss(hidden, weight, targets, loss=cubic), reference(cubic, targets, hidden, weight)[0])
    each = linear_loss(hidden, weight, targets, loss=cubic, reduction="none", tiles=(7, 13))
    close(each.mean(), reference(cubic, targets, hidden, weight)[0])
    slope = jax.grad(lambda w: linear_loss(hidden, w, targets, loss=cubic, reduction="none", tiles=(7, 13)).mean())(weight)
    close(slope, reference(cubic, targets, hidden, weight)[1][1])


def test_mistakes_are_told(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's run has no such checks
    hidden, weight, targets = batch()
    for mistake, said in (
        (lambda: linear_loss(hidden, weight.T, targets), "Is the weight .V, D., vocab_first=True"),
        (lambda: linear_loss(hidden, weight, targets[:-1]), "goes with targets"),
        (lambda: linear_loss(hidden, weight, targets.at[3].set(VOCAB)), r"must lie in \[0, 97\); got 97 at token 3"),
        (lambda: linear_loss(hidden, weight, np.full(TOKENS, 2**32 + 3)), "must lie in"),
        (lambda: linear_loss(hidden, weight, targets, bias=jnp.ones(3)), "a bias is one number a class"),
        (lambda: linear_loss(hidden, weight, targets, softcap=-1.0), "softcap is a positive number"),
        (lambda: linear_loss(hidden, weight, targets, softcap="x"), "softcap is a positive number or None; got 'x'"),
        (lambda: jax.jit(lambda c: linear_loss(hidden, weight, targets, softcap=c))(3.0), "static_argnames"),
        (lambda: linear_loss(hidden, weight, targets, mesh="data=2"), "mesh is a jax.sharding.Mesh; got 'data=2'"),
        (lambda: linear_loss(hidden, weight, targets, reduction="avg"), "mean, sum or none"),
        (lambda: linear_loss(hidden, weight, targets, plan="fast"), "a plan is one of auto, stream, tokens"),
        (lambda: linear_loss(hidden, weight, targets, tiles=(0, 4)), "tiles are two counts"),
        (lambda: linear_loss(hidden, weight, targets, token_weights=jnp.ones(3)), "one a token"),
        (lambda: linear_loss(hidden, weight.astype(jnp.bfloat16), targets), "cast one of them"),
        (lambda: linear_loss(hidden, weight, targets, loss=LOSSES["entmax15"], plan="stream"), "plan 'tokens' takes any loss"),
        (lambda: linear_loss(hidden, weight, targets, loss=lambda z, y: NLL(z, y).mean()), "one floating value a token"),
        (lambda: linear_loss(hidden, weight, targets, loss=resolve("tsallis(alpha=0.5)", check=False)), "alpha above 1"),
    ):
        with pytest.raises(LabError, match=said):
            mistake()
