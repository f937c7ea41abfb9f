"""Runs against optax by hand, and laws of the grid: pairs, neighbours, blocks, divergence."""

import dataclasses
import inspect
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scripts import unchecked

from xentlab import LOSSES, LabError
from xentlab.fit import fit_logits
from xentlab.layout import Layout
from xentlab.models import logits, resolve_model
from xentlab.program import program, windows
from xentlab.recipe import MOST_STEPS, OPTIMIZERS, SCHEDULES, Recipe
from xentlab.sources import MarkovSource, checked_source
from xentlab.training import train

TRAINS = True
SOURCE = MarkovSource(vocab=6, tokens=4000, seed=1)
RECIPE = Recipe(steps=7, batch=3, window=5, blocks=3, validation_tokens=100)


@pytest.fixture(scope="module")
def grid():
    calls = []
    trained = train(LOSSES["nll"], SOURCE, "bigram", [0.01, 0.1], [4, 5], RECIPE, calls.append)
    return trained, calls


def by_hand(rate, seed, recipe):
    """The same run as a plain Python loop over optax."""
    model = resolve_model("bigram")(SOURCE.vocab, jax.random.key(seed))
    optimizer = recipe.transformation(rate)
    state, stream = optimizer.init(model), jnp.asarray(SOURCE.split("train"))
    objective = lambda model, batch: LOSSES["nll"](logits(model, batch[:, :-1]), batch[:, 1:]).mean()
    descend, values = jax.jit(jax.value_and_grad(objective)), []
    drawn = np.random.default_rng(seed).integers(len(stream) - recipe.window, size=(recipe.steps, recipe.batch), dtype=np.int32)
    for starts in drawn:
        batch = stream[starts[:, None] + jnp.arange(recipe.window + 1)[None, :]]
        value, gradient = descend(model, batch)
        updates, state = optimizer.update(gradient, state, model)
        model = optax.apply_updates(model, updates)
        values.append(float(value))
    return model, values


def test_a_run_equals_a_plain_loop(grid):
    trained, _ = grid
    for run in (0, 3):
        model, values = by_hand(trained.rates[run], trained.seeds[run], RECIPE)
        np.testing.assert_allclose(trained.model(run).weight, model.weight, atol=1e-6)
        blocks = [np.mean(values[0:3]), np.mean(values[3:6]), values[6]]
        np.testing.assert_allclose(trained.train_loss[run], blocks, rtol=1e-5)


def test_blocks_report_their_steps(grid):
    trained, calls = grid
    assert calls == trained.steps.tolist() == [3, 6, 7]
    assert (trained.diverged_at == -1).all()
    assert trained.validation_nll.shape == (4, 3)


def test_the_grid_is_rates_by_seeds_and_runs_do_not_depend_on_their_neighbours(grid):
    trained, _ = grid
    assert list(zip(trained.rates, trained.seeds, strict=True)) == [(0.01, 4), (0.01, 5), (0.1, 4), (0.1, 5)]
    alone = train(LOSSES["nll"], SOURCE, "bigram", [0.1], [4], RECIPE)
    np.testing.assert_allclose(alone.validation_nll[0], trained.validation_nll[2], rtol=1e-6)


def test_runs_side_by_side_equal_runs_one_after_another(grid, monkeypatch):
    """GPU and TPU take all runs in one wide program; it is run here on the CPU."""
    monkeypatch.setattr("xentlab.training.preferred", lambda runs, mesh: Layout(runs, 1, False, "wide"))
    wide = train(LOSSES["nll"], SOURCE, "bigram", [0.01, 0.1], [4, 5], RECIPE)
    np.testing.assert_allclose(wide.validation_nll, grid[0].validation_nll, rtol=1e-5)


def test_divergence_is_caught_and_spoils_no_neighbour(grid):
    with np.errstate(all="ignore"):
        trained = train(LOSSES["nll"], SOURCE, "bigram", [0.01, 1e38], [4, 5], dataclasses.replace(RECIPE, optimizer="sgd"))
        calm = train(LOSSES["nll"], SOURCE, "bigram", [0.01], [4, 5], dataclasses.replace(RECIPE, optimizer="sgd"))
    assert (trained.diverged_at[:2] == -1).all()
    assert (trained.diverged_at[2:] >= 0).all()
    assert np.isnan(trained.validation_nll[2:, -1]).all()
    np.testing.assert_allclose(trained.validation_nll[:2], calm.validation_nll, rtol=1e-6)
    # A run that diverged kept what its block began with: here the first ones, which are small.
    assert all(np.abs(trained.model(run).weight).max() < 1 for run in range(4))


@pytest.mark.parametrize(("blocks", "at"), [(1, 1), (7, 0)])
def test_a_gradient_that_is_no_number_is_divergence_too(blocks, at):
    """Of a finite value: the classic root behind a `where`. It shows in the next step's loss, or as the block ends."""
    broken = lambda z, y: LOSSES["nll"](z, y) + jnp.where(z[..., 0] > jnp.inf, jnp.sqrt(z[..., 0] - z[..., 0]), 0)
    trained = train(broken, SOURCE, "bigram", [0.1], [4], dataclasses.replace(RECIPE, blocks=blocks))
    assert trained.diverged_at.tolist() == [at]
    first = resolve_model("bigram")(6, jax.random.key(4))
    np.testing.assert_allclose(trained.model(0).weight, first.weight, rtol=1e-6)
    assert np.isnan(trained.train_loss).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("adam", each) for each in ({}, {"b1": 0.5, "b2": 0.9, "eps": 0.1}, {"nesterov": True}, {"eps_root": 0.1})),
        *(("adamw", each) for each in ({}, {"weight_decay": 0.3}, {"mu_dtype": "bfloat16"})),
    ],
)
@pytest.mark.parametrize("rate", [0.01, lambda step: 0.1 / (1 + step)])
def test_adam_is_optaxs(name, options, rate):
    """In float64, where optax's own 1 - b2^t has its digits; state for state."""
    ours, theirs = OPTIMIZERS[name](rate, **options), getattr(optax, name)(rate, **options)
    drawn = np.random.default_rng(0)
    with jax.enable_x64(True):
        parameters = {"a": jnp.asarray(drawn.normal(size=(5, 3))), "b": jnp.ones(4)}
        states, updates = zip(*((each.init(parameters), jax.jit(each.update)) for each in (ours, theirs)), strict=True)
        for _ in range(30):
            gradient = jax.tree.map(lambda x: 10.0 ** drawn.integers(-12, 9) * drawn.normal(size=x.shape), parameters)
            steps, states = zip(
                *(each(gradient, at, parameters) for each, at in zip(updates, states, strict=True)), strict=True
            )
            jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-9), *steps)
        jax.tree.map(np.testing.assert_array_equal, *states)


def test_adam_s_options_may_be_injected():
    made = optax.inject_hyperparams(OPTIMIZERS["adam"])(learning_rate=0.1)
    theirs = optax.inject_hyperparams(optax.adam)(learning_rate=0.1)
    parameters, gradient = {"x": jnp.ones(2)}, {"x": jnp.array([1.0, -2.0])}
    (step, _), (right, _) = (jax.jit(each.update)(gradient, each.init(parameters), parameters) for each in (made, theirs))
    np.testing.assert_allclose(step["x"], right["x"])
    assert np.isfinite(
        OPTIMIZERS["adam"](0.1, 0.8).update(gradient, OPTIMIZERS["adam"](0.1, 0.8).init(parameters))[0]["x"]
    ).all()


def test_adams_first_steps_have_float32s_digits():
    """Of a steady gradient each step is the rate; optax's are up to 3e-5 off."""
    made, parameters = OPTIMIZERS["adam"](1.0), {"a": jnp.ones(3)}
    state = made.init(parameters)
    for _ in range(10):
        step, state = jax.jit(made.update)({"a": jnp.full(3, 0.3)}, state)
        np.testing.assert_allclose(step["a"], -1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("eps", [1e-7, 1e-8])
def test_adam_of_narrow_numbers_steps_nowhere_without_a_gradient(dtype, eps):
    """The one beside it, of 1, steps by the rate."""
    made, gradient = OPTIMIZERS["adam"](0.125, eps=eps), {"a": jnp.array([0, 1], dtype)}
    step, _ = made.update(gradient, made.init(gradient))
    assert step["a"].dtype == dtype
    np.testing.assert_allclose(np.float32(step["a"]), [0, -0.125], rtol=1e-2)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "sgd(momentum=.9)", "adamw(weight_decay=.1, b2=.99)"])
def test_every_optimizer_learns(optimizer):
    trained = train(LOSSES["nll"], SOURCE, "bigram(features=4)", [0.03], [0], Recipe(30, 8, 16, optimizer, blocks=2, clip=1.0))
    assert trained.validation_nll[0, -1] < trained.validation_nll[0, 0] < 1.82


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_scale_the_rate_between_0_and_1(schedule):
    shape = SCHEDULES[schedule](100)
    values = np.array([shape(step) for step in range(101)])
    assert values.max() == pytest.approx(1)
    assert (values[:-1] > 0).all()  # the first step too: of a rate of 0 it is lost, and some optimizers divide by it
    assert values[-1] == pytest.approx({"constant": 1, "linear": 0, "cosine": 0.05}[schedule])


def test_a_gradient_is_clipped_by_its_whole_length():
    """Of (3, 4) 5, whatever leaves it is made of."""
    made = Recipe(steps=1, optimizer="sgd", schedule="constant", clip=1.0).transformation(1.0)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    step, _ = made.update(gradient, made.init(gradient))
    np.testing.assert_allclose([*step["a"], *step["b"]], [-0.6, -0.8], rtol=1e-6)


def test_a_fit_comes_to_rest_on_a_kink_too():
    """Where steps of one length would go to and fro."""
    logits = fit_logits(lambda z, y: jnp.abs(z[..., 0] - z[..., 1] - 1), np.array([0.5, 0.5]))[-1]
    assert logits[0] - logits[1] == pytest.approx(1, abs=1e-3)


def test_a_rate_rises_for_the_share_of_steps_that_is_warmup():
    shape = Recipe(steps=20, schedule="linear(warmup=.2)")._shape
    np.testing.assert_allclose([shape(step) for step in range(6)], [0.25, 0.5, 0.75, 1, 1, 15 / 16])
    assert Recipe(steps=20, schedule="cosine(warmup=0)")._shape(0) == 1
    assert Recipe(steps=1)._shape(0) == 1


class Mine(eqx.Module):
    """A user's model with a leaf that is no array."""

    table: jax.Array
    weight: jax.Array
    activation: object = jnp.tanh

    def hidden(self, tokens):
        return self.activation(self.table[tokens])


def test_a_users_module_trains():
    make = lambda vocab, key: Mine(jax.random.normal(key, (vocab, 3)), jnp.zeros((3, vocab)))
    trained = train(LOSSES["brier"], SOURCE, make, [0.1], [0, 1], RECIPE)
    assert trained.model(1).activation is jnp.tanh
    assert np.isfinite(trained.validation_nll).all()


class Tied(eqx.Module):
    """One matrix for what comes in and what goes out."""

    embedding: jax.Array

    def hidden(self, tokens):
        return self.embedding[tokens]

    @property
    def weight(self):
        return self.embedding.T


def test_tied_embeddings_train():
    make = lambda vocab, key: Tied(0.1 * jax.random.normal(key, (vocab, 3)))
    trained = train(LOSSES["nll"], SOURCE, make, [0.1], [0], RECIPE)
    assert np.isfinite(trained.validation_nll).all()


class Odd:
    """A source of one's own, with a token in one part that its vocabulary does not hold."""

    name, vocab, order, token_bytes = "odd", 8, 0, None

    def __init__(self, where):
        self.where = where

    def split(self, part):
        tokens = np.tile(np.arange(8, dtype=np.int32), 100)
        tokens[77] += 5 * (part == self.where)
        return tokens

    def describe(self):
        return {"kind": "odd"}


def test_a_token_outside_of_the_vocabulary_is_refused_wherever_it_is():
    for part in ("train", "validation", "test"):
        with pytest.raises(LabError, match=rf"token 10 at place 77 of {part} \(1 such\), outside of its vocabulary of 8"):
            train(LOSSES["nll"], Odd(part), "bigram", [0.1], [0], RECIPE)
    assert np.isfinite(train(LOSSES["nll"], Odd(None), "bigram", [0.1], [0], RECIPE).validation_nll).all()
    with pytest.raises(LabError, match="a source has vocab, order, token_bytes, split, describe too; SimpleNamespace has not"):
        inspect.unwrap(checked_source)(types.SimpleNamespace(name="bare"))  # the tests' own check of types comes before it


def test_windows_cover_a_stream_without_overlap():
    tokens = np.arange(23)
    found = windows(tokens, 5)
    np.testing.assert_array_equal(found[:, 1:].reshape(-1), np.arange(1, 21))
    few = windows(np.arange(10_000), 5, 100)
    assert len(few) == 20
    assert few[-1, 0] > 9000  # from all of the stream
    with pytest.raises(LabError, match="fewer than one window of 33"):
        windows(tokens, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps is a whole number of at least 1"),
        ({"optimizer": "adan"}, "did you mean adam"),
        ({"optimizer": "adam(beta=1)"}, "no option 'beta'; its options: b1"),
        ({"schedule": "cosin"}, "did you mean cosine"),
        ({"clip": -1.0}, "positive and finite length"),
        (
            {"optimizer": "sgd(momentum='x')"},
            r"the optimizer sgd\(momentum='x'\) fails: .* Has each option a value of its kind",
        ),
        ({"optimizer": "adamw(weight_decay='x')"}, "the optimizer adamw.* fails"),
        ({"schedule": "cosine(warmup='x')"}, r"the schedule cosine\(warmup='x'\) fails"),
        ({"schedule": "cosine(end='x')"}, r"the schedule cosine\(end='x'\) fails"),
        ({"schedule": "cosine(warmup=5)"}, "warmup is a share of the steps, from 0 to 1; got 5"),
        ({"schedule": "linear(warmup=-1)"}, "warmup is a share"),
        ({"schedule": "cosine(end=2)"}, "end is the share of the rate"),
        ({"batch": True}, "batch is a whole number of at least 1; got True"),
        ({"optimizer": lambda rate: optax.scale(-rate)}, "the optimizer <lambda> fails: TypeError.* a schedule, a function"),
    ],
)
def test_recipes_refuse(arguments, message):
    with pytest.raises(LabError, match=message):
        Recipe(**arguments)


def test_recipes_refuse_what_is_of_another_kind():
    recipe = "__import__('xentlab.recipe').recipe.Recipe"
    given = ("optimizer=optax.adam(1e-3)", "schedule=optax.constant_schedule(1.0)", "clip='1'", "label_noise='a'")
    made, schedule, clip, noise = unchecked(*(f"{recipe}({each})" for each in given))
    assert made.startswith(
        "an optimizer is a name, or what makes one of a schedule: optimizer=optax.adam, not optax.adam(0.001)"
    )
    assert schedule.startswith("the schedule <lambda> makes float of the number of steps, no function of the step: lambda")
    nothing = "the optimizer <lambda> makes NoneType of a schedule, and no optax transformation. Does it return one?"
    assert unchecked(f"{recipe}(optimizer=lambda rate: None)") == [nothing]
    assert clip == "clip is a positive and finite length, or none; got '1'."
    assert noise == "label_noise is a share of the targets, from 0 to 1; got 'a'."
    check = "__import__('xentlab.training').training.check_grid"
    assert unchecked(f"{check}(['a'], [0])") == ["learning rates are positive and finite; got ['a']."]


def test_an_optimizer_that_asks_for_more_than_a_gradient_is_refused():
    with pytest.raises(
        LabError, match=r"the optimizer lbfgs fails: .*'value_fn'\. A step gives it \(gradient, state, parameters\)"
    ):
        program(LOSSES["nll"], SOURCE, "bigram", dataclasses.replace(RECIPE, optimizer=optax.lbfgs))


def test_what_promotes_no_dtype_says_so_itself():
    with (
        jax.numpy_dtype_promotion("strict"),
        pytest.raises(LabError, match=r"TypePromotionError: .*Optax leaves promotion") as said,
    ):
        Recipe()
    assert "of its kind" not in str(said.value)


def test_grids_refuse():
    refused = [
        ([], [0], "a list of each"),
        ([0.1], [], "a list of each"),
        ([-1.0], [0], "positive"),
    ]
    refused += [([0.1], seeds, "from 0 to 4294967295") for seeds in ([-1], [2**32])]
    for rates, seeds, message in refused:
        with pytest.raises(LabError, match=message):
            train(LOSSES["nll"], SOURCE, "bigram", rates, seeds, RECIPE)


def test_training_lowers_for_gpu_and_tpu():
    """Only lowered: no such device is here."""
    recipe = Recipe(steps=4, batch=2, window=8, blocks=2)
    for model, loss in (("mlp", "nll"), ("transformer(layers=1)", "entmax15"), ("bigram", "hinge")):
        made = program(LOSSES[loss], SOURCE, model, recipe)
        of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
        rates, places = of(jnp.float32, 3), of(jnp.int32, 3, *next(made.draws([0]))[1].shape[1:])
        states = jax.eval_shape(made.begin, rates, of(jnp.uint32, 3))
        for function, arguments in ((made.block, (rates, states, of(jnp.int32), places)), (made.measure, (states,))):
            exported = jax.export.export(jax.jit(function), platforms=["cuda", "tpu"])(*arguments)
            assert exported.platforms == ("cuda", "tpu")


def test_a_long_race_is_kept_and_stopped_in_between():
    """However long: a block is what a Ctrl-C waits for, and what a kill loses."""
    recipe = Recipe(steps=1_000_500)
    assert recipe.steps_a_block == MOST_STEPS
    assert len(recipe.starts) == 1001
    assert recipe.starts[-1] == 1_000_000
    assert Recipe(steps=400).steps_a_block == 20


def test_parameters_of_float16_may_be_long():
    """The norm of 65,792 ones is no float16; none of them is infinite."""

    class Long(eqx.Module):
        embedding: jax.Array
        weight: jax.Array

        def hidden(self, tokens):
            return self.embedding[tokens] / self.embedding.shape[-1]

    make = lambda vocab, key: Long(jnp.ones((vocab, 8224), jnp.float16), jnp.zeros((8224, vocab), jnp.float16))
    recipe = Recipe(steps=2, blocks=1, batch=2, window=8, optimizer="sgd")
    found = train(LOSSES["nll"], MarkovSource(vocab=8, tokens=2000), make, [1e-3], [0], recipe)
    assert found.diverged_at.tolist() == [-1]


def test_a_step_that_fails_is_told_in_a_line():
    def small(logits, targets):
        if len(targets) > 9:
            raise ValueError("too many tokens")
        return LOSSES["nll"](logits, targets)

    recipe = Recipe(steps=2, blocks=1, batch=2, window=8)
    with pytest.raises(
        LabError, match=r"step of small, 2 windows of 8 tokens, fails: ValueError: too many tokens \(.*in small"
    ):
        train(small, MarkovSource(vocab=8, tokens=2000), "bigram", [1e-3], [0], recipe)
