"""What a loss closes over, under either plan: class weights that jit traces, temperatures and settings that are learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from naive_heads import TOKENS, VOCAB, batch, close, cpus_alone

from xentlab import LOSSES, LabError
from xentlab.linear import linear_loss
from xentlab.linear import plan as plan_module
from xentlab.linear.scored import scored

TRAINS = True  # as in test_linear.py
BIAS = jnp.linspace(-1, 1, VOCAB, dtype=jnp.float32)
SMOOTHED = LOSSES["label_smoothing"]


def by_rows(learned):
    """A user's own: it sees whole rows. One number, one array a class, and one that is no float."""
    temperature, class_weights, ignored = learned

    def loss(logits, targets):
        each = LOSSES["nll"](logits / temperature, targets) * class_weights[targets]
        return jnp.where(targets == ignored, 0, each)

    return loss


def by_reductions(learned):
    """One of the catalogue, with a stream form: it takes its setting with it."""
    return functools.partial(SMOOTHED, epsilon=learned[0] / 8)


def learned_values():
    rng = np.random.default_rng(1)
    return jnp.float32(1.6), jnp.asarray(rng.random(VOCAB), jnp.float32), jnp.int32(40)


def floats(learned):
    return learned[:2]


def total(make, plan, reduction, learned, hidden, weight, targets):
    more = {"plan": plan, "reduction": reduction, "tiles": (7, 13), "bias": BIAS}
    each = linear_loss(hidden, weight, targets, loss=make(learned), **more)
    return jnp.sum(each * jnp.cos(jnp.arange(each.size)).reshape(each.shape))


def naive(make, reduction, learned, hidden, weight, targets):
    each = make(learned)(hidden @ weight + BIAS[None], targets)
    return jnp.mean(each) if reduction == "mean" else jnp.sum(each * jnp.cos(jnp.arange(TOKENS)))


def slopes(head, learned, hidden, weight, targets):
    """Value and gradients by the floats among what is closed over, hidden states and weight."""
    of = lambda free, *arrays: head((*free, learned[2]), *arrays, targets)
    return jax.value_and_grad(of, (0, 1, 2))(floats(learned), hidden, weight)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("make", "plan"), [(by_rows, "tokens"), (by_reductions, "tokens"), (by_reductions, "stream")])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_it_has_the_naive_heads_gradient(monkeypatch, make, plan, backend, reduction):
    """In the form of each backend, with several chunks and tiles, the last of which overlap."""
    hidden, weight, targets = batch()
    right = jax.jit(functools.partial(slopes, functools.partial(naive, make, reduction)))(
        learned_values(), hidden, weight, targets
    )
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    head = functools.partial(total, make, plan, reduction)
    # Float32 on both sides: of one number the terms cancel to a thousandth of their size.
    close(jax.jit(functools.partial(slopes, head))(learned_values(), hidden, weight, targets), right, 1e-4)


@cpus_alone
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_with_blocks_of_rows_that_overlap(monkeypatch, reduction):
    """Four rows at once of a chunk's seven: the last block has one that the first has had, and whose logits are gone."""
    hidden, weight, targets = batch()
    right = slopes(functools.partial(naive, by_rows, reduction), learned_values(), hidden, weight, targets)
    monkeypatch.setattr(plan_module, "ROWS_BYTES", 4 * VOCAB * 4)
    assert plan_module.rows_at_once(7, VOCAB, 4) == 4
    head = functools.partial(total, by_rows, "tokens", reduction)
    close(jax.jit(functools.partial(slopes, head))(learned_values(), hidden, weight, targets), right, 1e-4)


@cpus_alone
def test_no_loss_is_shown_a_gradient_for_logits(monkeypatch):
    """A token that is out leaves a gradient of zeros where its logits were: of a norm of that there is no derivative."""
    hidden, weight, targets = batch()
    counted = jnp.ones(TOKENS).at[3].set(0)  # the one that two blocks have
    normed = lambda t: lambda z, y: LOSSES["nll"](t * z / jnp.linalg.norm(z, axis=-1, keepdims=True), y)
    monkeypatch.setattr(plan_module, "ROWS_BYTES", 4 * VOCAB * 4)
    head = lambda t: linear_loss(
        hidden, weight, targets, loss=normed(t), plan="tokens", tiles=(7, 13), token_weights=counted, reduction="sum"
    )
    right = jax.grad(lambda t: jnp.sum(counted * normed(t)(hidden @ weight, targets)))(jnp.float32(5))
    assert jax.jit(jax.grad(head))(jnp.float32(5)) == pytest.approx(float(right), rel=1e-4)


def test_a_complex_number_is_refused():
    """Of which the gradient would be 0 without a word."""
    hidden, weight, targets = batch()
    turned = lambda t: lambda z, y: LOSSES["nll"](jnp.real(z * t), y)
    head = jax.jit(lambda t: linear_loss(hidden, weight, targets, loss=turned(t), plan="tokens"))
    with pytest.raises(LabError, match="real and imaginary parts apart"):
        head(jnp.complex64(0.8 + 0.3j))


TRANSFORMED = {
    "checkpoint": lambda head: lambda learned, *arrays: slopes(jax.checkpoint(head), learned, *arrays),
    "scan": lambda head: (
        lambda learned, *arrays: jax.lax.scan(lambda _, t: (None, at(head, t, learned, *arrays)), None, TWO)[1]
    ),
    "vmap": lambda head: lambda learned, *arrays: jax.vmap(lambda t: at(head, t, learned, *arrays))(TWO),
}
TWO = jnp.array([0.7, 1.6], jnp.float32)


def at(head, temperature, learned, *arrays):
    return slopes(head, (temperature, *learned[1:]), *arrays)


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.parametrize("eager", [True, False])
def test_under_every_transformation(transform, eager):
    """An integer that is closed over goes through as well; of two temperatures each has its own result."""
    arrays = (learned_values(), *batch())
    plainly = functools.partial(naive, by_rows, "mean")
    run = TRANSFORMED[transform](functools.partial(total, by_rows, "tokens", "mean"))
    found = (run if eager else jax.jit(run))(*arrays)
    right = slopes(plainly, *arrays)
    if transform != "checkpoint":
        right = jax.tree.map(lambda *each: jnp.stack(each), *(at(plainly, t, *arrays) for t in TWO))
    close(found, right)


def test_forward_over_reverse():
    """A Hessian-vector product by a learned temperature."""
    learned, *arrays = (learned_values(), *batch())
    slope = lambda head: lambda t: jax.grad(lambda t: head((t, *learned[1:]), *arrays))(t)
    second = lambda head: jax.jit(lambda t: jax.jvp(slope(head), (t,), (jnp.float32(1),)))(learned[0])
    close(second(functools.partial(total, by_rows, "tokens", "mean")), second(functools.partial(naive, by_rows, "mean")))


def test_a_narrow_ones_gradient_is_summed_wide():
    """Of twelve chunks' shares in bfloat16 the sum is rounded once."""
    hidden, weight, targets = batch()
    tempered = lambda t: lambda z, y: LOSSES["nll"](z / t.astype(jnp.float32), y)
    right = jax.grad(lambda t: jnp.mean(tempered(t)(hidden @ weight, targets)))(jnp.float32(1.6015625))
    head = lambda t: linear_loss(hidden, weight, targets, loss=tempered(t), plan="tokens", tiles=(2, 13))
    found = jax.jit(jax.grad(head))(jnp.bfloat16(1.6))
    assert found.dtype == jnp.bfloat16
    assert abs(float(found) - float(right)) <= 2.0**-8 * abs(float(right))


def test_only_what_jax_traces_is_taken_out():
    """Else a loss is called as it is: no batched copy of it, and nothing to carry through a loop."""
    shares, like = jnp.linspace(0.5, 2, VOCAB, dtype=jnp.float32), (None, VOCAB, jnp.float32)
    own = lambda shares: lambda z, y: LOSSES["nll"](z, y) * shares[y]
    assert scored(own(shares), *like)[1] == []
    assert jax.jit(lambda shares: len(scored(own(shares), *like)[1]))(shares) == 1


def test_in_the_callers_own_shard_map():
    """JAX keeps account there of what varies: values and gradients by hidden and weight; with check_vma=False, by all."""
    mesh, split, whole = jax.sharding.Mesh(jax.devices()[:1], ("data",)), jax.P("data"), jax.P()
    learned, hidden, weight, targets = learned_values(), *batch()
    right = slopes(functools.partial(naive, by_rows, "mean"), learned, hidden, weight, targets)

    def run(argnums, **more):
        def head(free, h, w, y):
            return jax.lax.pmean(total(by_rows, "tokens", "mean", (*free, learned[2]), h, w, y), "data")

        mapped = jax.shard_map(head, mesh=mesh, in_specs=(whole, split, whole, split), out_specs=whole, **more)
        return jax.jit(jax.value_and_grad(mapped, argnums))(floats(learned), hidden, weight, targets)

    close(run((1, 2)), (right[0], right[1][1:]))
    close(run((0, 1, 2), check_vma=False), right, 1e-4)


def test_with_a_mesh_in_the_context():
    """A number that jit is given from elsewhere may be closed over, also under jax.set_mesh."""
    mesh = jax.make_mesh((1, 1), ("data", "model"), devices=jax.devices()[:1], axis_types=(jax.sharding.AxisType.Auto,) * 2)
    hidden, weight, targets = batch()
    with jax.set_mesh(mesh):
        found = jax.jit(lambda t: linear_loss(hidden, weight, targets, loss=lambda z, y: LOSSES["nll"](z / t, y), mesh=mesh))(
            1.6
        )
    close(found, jnp.mean(LOSSES["nll"](hidden @ weight / 1.6, targets)))


@pytest.mark.parametrize("plan", ["tokens", "stream"])
def test_a_number_of_pythons_is_learned_too(plan):
    """As in a notebook: `jax.grad` of a float, outside of jit."""
    hidden, weight, targets = batch()
    of = lambda value: total(by_reductions, plan, "mean", (value,), hidden, weight, targets)
    close(jax.grad(of)(1.6), jax.grad(of)(jnp.float32(1.6)))
