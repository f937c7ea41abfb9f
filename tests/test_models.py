"""Every model reads the past alone, and fits any head."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import unchecked

from xentlab import LOSSES, LabError
from xentlab.models import MODELS, checked_model, logits, model_shapes, resolve_model
from xentlab.program import program
from xentlab.sources import MarkovSource

NAMES = ["bigram", "bigram(features=3)", "mlp(context=3)", "transformer(features=16, layers=2, heads=2)"]
every_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def made():
    return {name: resolve_model(name)(11, jax.random.key(0)) for name in NAMES}


def test_every_model_is_tried():
    assert {name.split("(")[0] for name in NAMES} == set(MODELS)


@every_model
def test_the_future_is_not_read_and_the_present_is(made, name):
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 11)
    run = eqx.filter_jit(made[name].hidden)
    for place in (0, 4, 8):
        moved = tokens.at[:, place].set((tokens[:, place] + 1) % 11)
        before, after = np.asarray(run(tokens)), np.asarray(run(moved))
        np.testing.assert_allclose(before[:, :place], after[:, :place], atol=1e-6)
        assert np.abs(before[:, place] - after[:, place]).max() > 1e-3


@every_model
def test_rows_of_a_batch_do_not_mix(made, name):
    tokens = jax.random.randint(jax.random.key(2), (3, 5), 0, 11)
    run = eqx.filter_jit(logits)
    whole = run(made[name], tokens)
    np.testing.assert_allclose(whole[1], run(made[name], tokens[1]), atol=1e-5)
    assert whole.shape == (3, 5, 11)
    assert np.abs(np.asarray(whole)).max() < 1


@every_model
def test_no_parameter_begins_as_another(made, name):
    """Nor do two layers: the same numbers, drawn twice, would go together whatever their scale."""
    leaves = [np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(eqx.filter(made[name], eqx.is_inexact_array))]
    for one, other in itertools.combinations([leaf for leaf in leaves if leaf.any()], 2):
        shared = min(len(one), len(other))
        assert abs(np.corrcoef(one[:shared], other[:shared])[0, 1]) < 0.5


@every_model
def test_members_fit_a_head(made, name):
    assert checked_model(made[name], 11) is made[name]


def test_mlp_reads_exactly_its_context():
    model = resolve_model("mlp(context=3)")(7, jax.random.key(0))
    tokens = jnp.array([1, 2, 3, 4, 5, 6])
    run = eqx.filter_jit(model.hidden)
    at_last = lambda place: run(tokens.at[place].set(0))[-1]
    assert [bool(jnp.allclose(at_last(place), run(tokens)[-1])) for place in range(6)] == [True] * 3 + [False] * 3


def test_attention_equals_jax_own():
    from xentlab.models import Block, _rms_norm, _rotary

    block = Block(16, 2, 1, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 6, 16))

    @jax.jit
    def plain(x):
        q, k, v = (jnp.einsum("btd,dhs->bths", _rms_norm(x), block.qkv[:, i]) for i in range(3))
        attended = jax.nn.dot_product_attention(_rotary(q), _rotary(k), v, is_causal=True)
        y = x + jnp.einsum("bths,hsd->btd", attended, block.out)
        return y + jax.nn.gelu(_rms_norm(y) @ block.up) @ block.down

    np.testing.assert_allclose(eqx.filter_jit(block)(x), plain(x), atol=1e-5)


def test_gelu_is_jax_own_to_rounding():
    """And its derivatives, also where an exponential overflows. Against float64: jax.nn.gelu rounds what is near 0 to it."""
    from xentlab.models import _gelu

    x = jnp.concatenate([jnp.linspace(-6, 6, 97), jnp.array([-1e6, -60.0, -11.0, 11.0, 60.0, 1e6])])
    derivatives = lambda f: jax.jit(jax.vmap(lambda x: (f(x), jax.grad(f)(x), jax.grad(jax.grad(f))(x), jax.jacfwd(f)(x))))
    found = derivatives(_gelu)(x)
    with jax.enable_x64(True):
        exact = derivatives(jax.nn.gelu)(np.asarray(x, np.float64))
        for ours, right in zip(found, exact, strict=True):
            np.testing.assert_allclose(ours, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
def test_dense_has_the_plain_products_derivatives(shape):
    """By both operands, over seeds, twice, and forward over reverse."""
    from xentlab.models import _dense

    x, matrices = jax.random.normal(jax.random.key(0), shape), jax.random.normal(jax.random.key(1), (2, 4, 5))

    def derivatives(product):
        total = lambda x, matrix: jnp.sum(jnp.tanh(product(x, matrix)) ** 3)
        gradient = jax.grad(total, argnums=(0, 1))
        length = lambda x, matrix: sum(jnp.sum(part**2) for part in gradient(x, matrix))
        every = lambda matrix: (gradient(x, matrix), jax.grad(length, argnums=1)(x, matrix), jax.hessian(total, 1)(x, matrix))
        return jax.jit(jax.vmap(every))(matrices)

    for ours, plain in zip(*map(jax.tree.leaves, map(derivatives, (_dense, jnp.matmul))), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5)


def test_default_transformer_has_a_few_hundred_thousand_parameters():
    model = jax.eval_shape(lambda key: resolve_model("transformer")(256, key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == 458_752


class NoWeight(eqx.Module):
    def hidden(self, tokens):
        return jnp.zeros((*tokens.shape, 4))


class Mine(NoWeight):
    weight: jax.Array


def test_mistakes():
    for name, message in (
        ("transfomer", "did you mean transformer"),
        ("mlp(depth=3)", "its options: context, width, inner, features"),
        ("bigram(4)", "cannot read the model"),
        ("mlp(width=-3)", "mlp's width is a whole number from 1 on; got -3"),
        ("mlp(width=1.5)", "mlp's width is a whole number from 1 on; got 1.5"),
        ("bigram(features='4')", "bigram's features is a whole number from 1 on; got '4'"),
        ("transformer(heads=0)", "transformer's heads is a whole number from 1 on; got 0"),
        ("transformer(layers=-1)", "transformer's layers is a whole number from 0 on; got -1"),
    ):
        with pytest.raises(LabError, match=message):
            resolve_model(name)
    assert resolve_model("bigram(features=None)")(5, jax.random.key(0)).weight.shape == (5, 5)
    assert resolve_model("transformer(features=8, layers=0)")(5, jax.random.key(0)).blocks == ()
    with pytest.raises(LabError, match=r"2 \* heads"):
        resolve_model("transformer(features=18)")(5, jax.random.key(0))
    with pytest.raises(LabError, match=r"needs \.hidden"):
        checked_model(NoWeight(), 5)
    with pytest.raises(LabError, match=r"\[4, 6\]; they should be \[2, 3, D\] and \[D, 5\]"):
        checked_model(Mine(jnp.zeros((4, 6))), 5)
    assert checked_model(Mine(jnp.zeros((4, 5))), 5)


class Plain:
    def __init__(self, vocab, key):
        self.weight = jax.random.normal(key, (vocab, vocab))

    def hidden(self, tokens):
        return jax.nn.one_hot(tokens, len(self.weight), dtype=jnp.float32)


def test_a_function_that_makes_no_model_is_told_why():
    def swapped(key, vocab):
        return resolve_model("bigram")(vocab, key)

    with pytest.raises(
        LabError, match=r"Plain is no pytree, .* an equinox\.Module, say, or by jax\.tree_util\.register_dataclass"
    ):
        model_shapes(Plain, 5)
    with pytest.raises(LabError, match=r"the model's function fails: .* called with \(vocab, key\), in this order") as said:
        model_shapes(swapped, 5)
    assert "\n" not in str(said.value)
    with pytest.raises(LabError, match=r"the model's function fails: ZeroDivisionError"):
        model_shapes(lambda vocab, key: 1 // 0, 5)
    expected = ["a model is a name, one of bigram, mlp, transformer, or a function (vocab, key) -> model; got NoneType."]
    assert unchecked("__import__('xentlab.models').models.resolve_model(None)") == expected


def test_a_function_that_makes_another_kind_of_model_each_time_is_told():
    def make(vocab, key):
        class Own(eqx.Module):
            embedding: jax.Array
            weight: jax.Array

            def hidden(self, tokens):
                return self.embedding[tokens]

        return Own(jax.random.normal(key, (vocab, 3)), jax.random.normal(key, (3, vocab)))

    with pytest.raises(LabError, match="Is a class or a lambda made inside it"):
        model_shapes(make, 5)


class Shuffled(eqx.Module):
    """Beside its weight, what no training moves."""

    order: jax.Array
    weight: jax.Array

    def hidden(self, tokens):
        return jax.nn.one_hot(self.order[tokens], len(self.weight), dtype=self.weight.dtype)


@jax.numpy_dtype_promotion("standard")  # optax's schedules
def test_what_is_not_trained_is_the_same_for_every_seed_or_refused():
    source, weight = MarkovSource(vocab=8, tokens=2000), jnp.zeros((8, 8))
    drawn = lambda vocab, key: Shuffled(jax.random.permutation(key, vocab), weight)
    with pytest.raises(LabError, match=r"they differ from seed to seed. .* a key of their own, jax\.random\.key\(0\)"):
        program(LOSSES["nll"], source, drawn)
    fixed = lambda vocab, key: drawn(vocab, jax.random.key(0))
    assert program(LOSSES["nll"], source, fixed).rest.order.tolist() == fixed(8, None).order.tolist()


def test_a_model_without_a_parameter_is_told_so():
    class Fixed(eqx.Module):
        def hidden(self, tokens):
            return jax.nn.one_hot(tokens, 5)

        @property
        def weight(self):
            return jnp.eye(5)

    with pytest.raises(LabError, match="Fixed has no parameter"):
        checked_model(Fixed(), 5)
