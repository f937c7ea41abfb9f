"""A race's model, optimizer and schedule by the name of a function in one's own file."""

import dataclasses
import json

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xentlab import LabError
from xentlab.cli import main
from xentlab.cli.race import run_race
from xentlab.cli.writing import record_of
from xentlab.commands import Race
from xentlab.models import checked_model, resolve_model
from xentlab.names import is_own, placed, unplaced
from xentlab.race import race
from xentlab.recipe import Recipe
from xentlab.resume import differences
from xentlab.sources import MarkovSource

TRAINS = True
MINE = """
import equinox, jax, optax
class Net(equinox.Module):
    table: jax.Array
    weight: jax.Array
    def __init__(self, vocab, *, width=8, key):
        self.table = jax.random.normal(key, (vocab, width))
        self.weight = self.table.T / 50
    def hidden(self, tokens):
        return self.table[tokens]
def net(n, seed, width=8):
    return Net(n, width=width, key=seed)
def still(rate, *, momentum=0.0):
    return optax.sgd(lambda step: 0 * rate(step), momentum)
def halved(steps):
    return lambda step: 0.5
def none(steps):
    return None
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


@pytest.mark.parametrize("name", ["Net", "net"])
def test_a_model_of_ones_own_is_made_with_its_options(mine, name):
    for options, width in (("", 8), ("(width=3)", 3)):
        assert resolve_model(f"{mine}:{name}{options}")(5, jax.random.key(0)).weight.shape == (width, 5)


def test_a_class_whose_key_goes_by_name_is_a_model(mine):
    by_name = lambda vocab, *, key: resolve_model(f"{mine}:net")(vocab, key)
    assert resolve_model(by_name)(5, jax.random.key(0)).weight.shape == (8, 5)


def test_optimizer_and_schedule_of_ones_own_make_the_steps(mine):
    def one_step(recipe):
        optimizer = recipe.transformation(0.1)
        return optimizer.update(np.float32(2), optimizer.init(np.float32(0)))[0]

    assert one_step(Recipe(optimizer="sgd", schedule=f"{mine}:halved")) == pytest.approx(-0.1)  # half of .1, times 2
    assert one_step(Recipe(optimizer=f"{mine}:still(momentum=.5)")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "{}:Net(depth=3)"}, r"Net has no option 'depth'; its options: width"),
        ({"model": "{}:net(seed=3)"}, r"net has no option 'seed'; its options: width"),
        ({"model": "{}:Nett"}, r"mine\.py has no function 'Nett'; did you mean Net"),
        ({"model": "gone.py:Net"}, r"no file gone\.py\. A model in a file is named \./file\.py:function"),
        ({"model": "{}:MISSING"}, "has no function 'MISSING'"),
        ({"model": "mpl"}, "no model named 'mpl'; did you mean mlp.* One of your own: ./file.py:function"),
        ({"optimizer": "{}:still(b=1)"}, "still has no option 'b'; its options: momentum"),
        (
            {"schedule": "{}:none"},
            r"the schedule .*mine\.py:none makes NoneType of the number of steps, no function of the",
        ),
        ({"schedule": "{}:halved(to=3)"}, "halved has no option 'to'; it has no options"),
    ],
)
def test_what_is_wrong_with_it_is_said(mine, arguments, message):
    with pytest.raises(LabError, match=message):
        race(["nll"], MarkovSource(vocab=4, tokens=500), **{what: each.format(mine) for what, each in arguments.items()})


def test_a_name_is_known_without_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = f"{tmp_path}/a(1)/mine.py:f(x='/b:c')"
    assert placed("a(1)/mine.py:f(x='/b:c')") == whole
    assert unplaced(whole) == "mine.py:f(x='/b:c')"
    for other in ("focal(gamma=1)", "package.module:f", "cosine(warmup='a/b.py:c')"):
        assert placed(other) == unplaced(other) == other
    assert [*map(is_own, [whole, "package.module:f", "focal(note='a:b')"])] == [True, True, False]


def test_a_race_tells_of_its_functions_and_goes_on_only_with_the_same(mine, tmp_path, capsys):
    (elsewhere := tmp_path / "elsewhere").mkdir()
    named = {"model": f"{mine}:Net(width=3)", "optimizer": f"{mine}:still", "schedule": "linear"}
    before = record_of(Race(losses=("nll",), **named), [], 0.0)
    assert {what: each["file"] for what, each in before["functions"].items()} == {"model": "mine.py", "optimizer": "mine.py"}
    (elsewhere / "mine.py").write_text(MINE)
    moved = {what: name.replace(str(tmp_path), str(elsewhere)) for what, name in named.items()}
    assert differences(before, record_of(Race(losses=("nll",), **moved), [], 0.0)) == []
    (elsewhere / "mine.py").write_text(MINE + "\n")
    edited = record_of(Race(losses=("nll",), **moved), [], 0.0)
    assert differences(before, edited) == [
        f"mine.py, which the {what} stands in, was edited since" for what in ("model", "optimizer")
    ]
    assert "functions" not in record_of(Race(losses=("nll",)), [], 0.0)


def test_a_race_of_ones_own_functions_is_repeated_from_its_record(mine, tmp_path, capsys):
    tiny = Race(losses=("nll",), markov=4, learning_rates=(0.1,), seeds=(1,), steps=4, batch=2, window=8, out=tmp_path / "run")
    run_race(dataclasses.replace(tiny, model=f"{mine}:Net", optimizer=f"{mine}:still", schedule=f"{mine}:halved"))
    main(["rerun", f"{tmp_path}/run", "--out", f"{tmp_path}/again"])
    assert "the same to the last bit" in capsys.readouterr().out
    record = json.loads((tmp_path / "again" / "run.json").read_text())
    assert set(record["functions"]) == {"model", "optimizer", "schedule"}


def test_a_model_that_reads_what_it_is_to_predict_is_refused():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Sees:
        weight: jax.Array
        back: int = dataclasses.field(metadata={"static": True})

        def hidden(self, tokens):
            return jax.nn.one_hot(jnp.roll(tokens, self.back, axis=-1), len(self.weight), dtype=jnp.float32)

    def of(back):
        make = lambda vocab, key: Sees(jax.random.normal(key, (vocab, vocab)), back)
        return race(["nll"], MarkovSource(vocab=4, tokens=500), make, [0.1], [0], steps=2, batch=2, window=8)

    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Opens:
        """Begins without its way to the next token, as a gate at 0 does, and has it in windows of training alone."""

        weight: jax.Array
        gate: jax.Array

        def hidden(self, tokens):
            one = lambda tokens: jax.nn.one_hot(tokens, len(self.weight), dtype=jnp.float32)
            ahead = self.gate * one(jnp.roll(tokens, -1, axis=-1))
            return one(tokens) + ahead if tokens.shape[-1] > 7 else one(tokens)

    gated = lambda vocab, key: Opens(jax.random.normal(key, (vocab, vocab)), jnp.zeros((), jnp.float32))
    with pytest.raises(LabError, match="the model reads the future"):
        race(["nll"], MarkovSource(vocab=4, tokens=500), gated, [0.1], [0], steps=2, batch=2, window=8)
    with pytest.raises(LabError, match=r"the model reads the future: .* Position i may read tokens 0\.\.i alone"):
        of(-1)
    assert len(of(0).table) == 1


def test_a_model_of_single_sequences_is_told_so():
    class One(equinox.Module):
        weight: jax.Array

        def hidden(self, tokens):
            (time,) = tokens.shape
            return jnp.zeros((time, 2))

    with pytest.raises(LabError, match=r"One's hidden fails on tokens \[2, 3\]: ValueError: too many .* jax\.vmap makes that"):
        checked_model(One(jnp.zeros((2, 4))), 4)


def test_a_schedule_is_a_function_too():
    recipe = Recipe(optimizer="sgd", schedule=lambda steps: optax.linear_schedule(1, 0, steps), steps=10)
    optimizer = recipe.transformation(0.1)
    state = optimizer.init(np.float32(0))
    steps = []
    for _ in range(3):
        step, state = optimizer.update(np.float32(1), state)
        steps.append(float(step))
    np.testing.assert_allclose(steps, [-0.1, -0.09, -0.08], rtol=1e-6)
