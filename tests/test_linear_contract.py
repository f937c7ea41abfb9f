"""What the head finds out of a loss before it runs it: whether it keeps the contract, and whether its stream form is it."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from naive_heads import NLL, batch

from xentlab import LOSSES, LabError, facts_of, loss, resolve
from xentlab.linear import explain_plan, linear_log_probs, linear_loss
from xentlab.linear.costs import head_costs
from xentlab.linear.form import stream_of

HIDDEN, WEIGHT, TARGETS = batch(23, 5, 97)
both = pytest.mark.parametrize("plan", ["stream", "tokens"])


def formed(form, **facts):
    """nll with a stream form."""
    return loss(stream=form, **facts)(lambda logits, targets: NLL(logits, targets))


@both
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (formed(lambda rivals, target: jnp.sum(jax.nn.softplus(rivals - target))), r"one value a token, .*; it gave \[\]"),
        (formed(lambda rivals, target: 2 * jax.nn.softplus(rivals - target)), "is another loss: at logits .* the function"),
        (
            loss(shift=True, stream=lambda rivals, target: jnp.logaddexp(rivals, target) ** 2)(
                lambda logits, targets: jax.nn.logsumexp(logits, axis=-1) ** 2
            ),
            "is another loss.* Is a fact false, shift=True say",
        ),
        (formed(lambda rivals, target, *, gama: gama * rivals), "wants gama, which is no setting of the loss"),
    ],
)
def test_a_stream_form_that_is_another_loss_is_refused(plan, made, message):
    run = lambda hidden: linear_loss(hidden, WEIGHT, TARGETS, loss=made, plan=plan)
    for call in (run, jax.jit(run), jax.jit(jax.grad(run))):
        with pytest.raises(LabError, match=message):
            call(HIDDEN)


@both
def test_a_right_form_passes_and_what_cannot_be_tried_too(plan):
    right = formed(lambda rivals, target: jax.nn.softplus(rivals - target))
    run = lambda made: linear_loss(HIDDEN, WEIGHT, TARGETS, loss=made, plan=plan)
    np.testing.assert_allclose(run(right), run(NLL), rtol=1e-6)

    def learned(scale):
        scaled = loss(stream=lambda rivals, target: scale * jax.nn.softplus(rivals - target))
        return run(scaled(lambda logits, targets: scale * NLL(logits, targets)))

    np.testing.assert_allclose(jax.jit(learned)(jnp.float32(2)), 2 * run(NLL), rtol=1e-6)


@both
def test_no_form_is_believed_for_where_its_function_stands(plan):
    """What `functools.wraps` copies, or a partial is of, says nothing of the form."""
    form = lambda rivals, target: 7 * jax.nn.softplus(rivals - target)
    wrapped = loss(stream=form)(functools.wraps(NLL)(lambda logits, targets: NLL(logits, targets)))
    for made in (wrapped, loss(stream=form)(functools.partial(NLL))):
        with pytest.raises(LabError, match="is another loss"):
            linear_loss(HIDDEN, WEIGHT, TARGETS, loss=made, plan=plan)


def test_facts_of_a_partial_are_its_own_and_a_place_that_is_filled_has_no_form():
    form = lambda rivals, target, *, k: k * jax.nn.softplus(rivals - target)
    doubled = loss(stream=form)(functools.partial(lambda logits, targets, k: k * NLL(logits, targets), k=2.0))
    assert facts_of(doubled).stream is form
    np.testing.assert_allclose(
        linear_loss(HIDDEN, WEIGHT, TARGETS, loss=doubled, plan="stream"), 2 * linear_loss(HIDDEN, WEIGHT, TARGETS), rtol=1e-6
    )
    assert stream_of(functools.partial(loss(stream=form)(lambda k, logits, targets: k * NLL(logits, targets)), 2.0)) is None


class Scaled(eqx.Module):
    scale: jax.Array

    def __call__(self, logits, targets):
        return NLL(self.scale * logits, targets)


def test_what_takes_no_facts_says_so():
    with pytest.raises(LabError, match="Scaled takes no facts; give them to a function"):
        loss(source="here")(Scaled(jnp.ones(())))


@pytest.mark.parametrize("tokens", [2, 3, 4])
def test_factors_of_tokens_are_told_to_be_token_weights(tokens):
    """At two tokens it went through, and the second had the first one's."""
    hidden, weight, targets = batch(tokens, 5, 11)
    run = lambda factor: linear_loss(hidden, weight, targets, loss=lambda z, y: factor * NLL(z, y))
    for call in (run, jax.jit(run)):
        with pytest.raises(LabError, match="factors of tokens are linear_loss's token_weights"):
            call(jnp.arange(1.0, 1 + tokens))


def test_class_weights_of_any_vocabulary():
    weights = jnp.linspace(1, 2, 97)
    by_class = lambda logits, targets: weights[targets] * NLL(logits, targets)
    expected = jnp.mean(by_class(HIDDEN @ WEIGHT, TARGETS))
    np.testing.assert_allclose(linear_loss(HIDDEN, WEIGHT, TARGETS, loss=by_class), expected, rtol=1e-5)


def test_a_random_key_is_refused():
    noisy = lambda key: lambda logits, targets: NLL(logits + jax.random.normal(key, logits.shape), targets)
    run = lambda key: linear_loss(HIDDEN, WEIGHT, TARGETS, loss=noisy(key))
    for call in (run, jax.jit(run)):
        with pytest.raises(LabError, match="closes over a random key"):
            call(jax.random.key(0))


@pytest.mark.parametrize("sizes", [(-5, 3, 4), (5, -3, 4), (5, 3, -4)])
def test_sizes_are_counts(sizes):
    with pytest.raises(LabError, match="sizes are whole numbers"):
        explain_plan(*sizes, NLL)
    with pytest.raises(LabError, match="layout"):
        explain_plan(5, 3, 4, NLL, layout=(0, 1))


def test_sizes_of_numpy_are_counted_without_bounds(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user's run has no such checks
    plan = explain_plan(np.int32(30_000), np.int32(256), np.int32(32_768), NLL, layout=(np.int32(1), np.int64(1)))
    assert plan == explain_plan(30_000, 256, 32_768, NLL)
    assert plan.naive_bytes == 2 * 30_000 * 32_768 * 4


@pytest.mark.parametrize(
    "mistake",
    [
        *({"features": 0}, {"vocab": 0}, {"vocab": 3.0}, {"layout": 2}, {"layout": (2,)}, {"layout": (2, 2, 2)}),
        *({"dtype": "int8"}, {"dtype": jnp.int32}, {"dtype": "flt"}, {"dtype": jnp.float8_e4m3fn}),
    ],
)
def test_a_plan_of_no_head_is_refused(monkeypatch, mistake):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(
        LabError, match="one of float32, .*; got" if "dtype" in mistake else "sizes are whole numbers.*layout is two"
    ):
        explain_plan(**{"tokens": 1, "features": 3, "vocab": 4} | mistake)


@pytest.mark.parametrize(("tokens", "vocab"), [(2**31, 16), (4, 3 * 10**9)])
def test_more_than_int32_counts_is_refused(tokens, vocab):
    shapes = ((tokens, 8), jnp.float32), ((8, vocab), jnp.float32), ((tokens,), jnp.int32)
    shaped = [jax.ShapeDtypeStruct(*each) for each in shapes]
    for call in (
        lambda: jax.eval_shape(linear_loss, *shaped),
        lambda: jax.eval_shape(linear_log_probs, *shaped),
        lambda: explain_plan(tokens, 8, vocab),
        lambda: head_costs(tokens, 8, vocab),
    ):
        with pytest.raises(LabError, match="counted in int32, up to 2,147,483,647 of each"):
            call()


def test_a_chunk_more_than_fits_is_shared_out():
    """Of 520 tokens two chunks of 264: one of 512 and a second one for 8 more would do twice the work."""
    chunks = {tokens: explain_plan(tokens, 256, 16_384, NLL, plan="tokens").tiles[0] for tokens in (512, 520, 1032, 8192)}
    if jax.default_backend() == "cpu":
        assert chunks == {512: 512, 520: 264, 1032: 344, 8192: 512}
    assert all(chunk * -(-tokens // chunk) < 1.25 * tokens for tokens, chunk in chunks.items())


def test_other_types_and_other_remedies():
    narrow = [each.astype(jnp.float8_e4m3fn) for each in (HIDDEN, WEIGHT)]
    with pytest.raises(LabError, match="one of float32, bfloat16, float16, float64; got float8_e4m3fn"):
        linear_loss(*narrow, TARGETS)
    with pytest.raises(LabError, match=r"vocabulary change\?$"):
        linear_log_probs(HIDDEN, WEIGHT, TARGETS.at[0].set(-1))


@both
def test_one_class_costs_squentropy_nothing(plan):
    alone = linear_loss(jnp.ones((2, 3)), jnp.ones((3, 1)), jnp.zeros(2, jnp.int32), loss=LOSSES["squentropy"], plan=plan)
    assert float(alone) == 0


def centred(logits, targets):
    """Of the batch's mean logits: no token's own."""
    return NLL(logits - jnp.mean(logits, axis=tuple(range(logits.ndim - 1)), keepdims=True), targets)


def in_batch(logits, targets):
    """Each token against the batch, as a contrastive loss has it."""
    own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(own) - own


def shared_out(logits, targets):
    """By the number of tokens."""
    return NLL(logits, targets) / targets.size


def running(logits, targets):
    """Of what came before, which the first token does not see."""
    return jnp.cumsum(NLL(logits, targets), axis=-1)


def in_two_ways(logits, targets):
    """By the mean of the batch."""
    each = NLL(logits, targets)
    return jnp.where(jnp.mean(each) > 1, each, each**2)


@pytest.mark.parametrize("mixing", [centred, in_batch, shared_out, running, in_two_ways])
def test_a_loss_that_mixes_tokens_is_refused(mixing):
    """By chunks or tiles it would be another loss, without a word."""
    for made in (mixing, loss(stream=lambda rivals, target: rivals - target)(lambda z, y: mixing(z, y))):
        with pytest.raises(LabError, match=r"mixes tokens: beside others .* head cuts batches up"):
            jax.jit(lambda hidden, made=made: linear_loss(hidden, WEIGHT, TARGETS, loss=made))(HIDDEN)
    with pytest.raises(LabError, match="mixes tokens"):
        resolve(mixing, vocab=7)


def test_what_is_not_known_yet_is_no_mixing():
    """Within a function that JAX traces nothing is known of its values."""
    weights = jnp.linspace(0, 1, len(TARGETS))
    found = jax.jit(lambda w: resolve(lambda z, y: NLL(z, y) * w[0])(jnp.zeros((1, 5)), jnp.zeros(1, jnp.int32)))(weights)
    assert found == 0
