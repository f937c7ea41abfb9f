"""Names, settings, files and packages, and what a user reads when one of them is wrong."""

import functools
import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys

import equinox
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from scripts import unchecked

import xentlab.losses
from xentlab import LOSSES, LabError, facts_of, linear_loss, link_of, loss, name_of, resolve
from xentlab.catalogue import resolve_all
from xentlab.cli import main


def test_nll_is_cross_entropy_whoever_is_called_so():
    with pytest.raises(LabError, match="nll is cross entropy here"):
        resolve_all({"nll": "focal"})
    assert [*resolve_all({"nll": jax.jit(LOSSES["nll"])})] == ["nll"]


def test_a_link_has_the_loss_s_own_defaults():
    z = jnp.array([4.0, 0.0])
    cooled = loss(link=lambda z, *, t=1.0: jax.nn.softmax(z / t))(lambda z, y, *, t=4.0: LOSSES["nll"](z / t, y))
    assert float(link_of(cooled)(z)[0]) == pytest.approx(float(jax.nn.sigmoid(1.0)))
    assert float(link_of(functools.partial(cooled, t=2.0))(z)[0]) == pytest.approx(float(jax.nn.sigmoid(2.0)))
    every = loss(link=lambda z, **given: jax.nn.softmax(z / given["t"]))(lambda z, y, *, t=4.0: LOSSES["nll"](z / t, y))
    assert float(link_of(every)(z)[0]) == pytest.approx(float(jax.nn.sigmoid(1.0)))
    # Else the same function, for what is compiled of it goes by its identity.
    assert link_of(resolve("generalized_cross_entropy(q=.7)")) is facts_of(LOSSES["generalized_cross_entropy"]).link
    half = link_of(resolve("generalized_cross_entropy(q=1)"))
    np.testing.assert_allclose(half(z), jax.nn.softmax(z))  # of mae's half


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("focal(gamma='a')", r"gamma of at least 0; got a\..* A setting is one number"),
        ("focal(gamma=(1, 2))", "A setting is one number"),
        ("focal(gamma=1e999)", "gamma of at least 0; got inf"),
        ("poly1(epsilon=1e999)", "a finite number; got inf"),
        ("logit_adjusted(prior=(-1, 1, 1, 1, 1))", "shares, finite ones of at least 0"),
        ("logit_adjusted(prior=(0, 0, 0, 0, 0))", "not all of them 0"),
    ],
)
def test_settings_that_no_loss_has_are_refused(name, said, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match=said):
        resolve(name)


@pytest.mark.parametrize("name", ["nll", "brier", "tsallis", "jensen_shannon", "logit_adjusted", "sparsemax"])
def test_integer_logits_are_refused(name, monkeypatch):
    """The result would be cut to whole numbers."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(LabError, match="logits are floating numbers; got int32"):
        LOSSES[name](jnp.array([[1, 2, 4]]), jnp.array([0]))


def test_files_of_one_name_beside_two_losses_are_two(tmp_path):
    """And one that is edited is read again."""
    for folder, scale in (("one", 1), ("two", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sized.py").write_text(f"SCALE = {scale}.0\n")
        text = "from sized import SCALE\ndef of(z, y):\n    return SCALE * z.max(-1)\n"
        (tmp_path / folder / "mine.py").write_text(text)
    value = lambda folder: float(resolve(f"{tmp_path}/{folder}/mine.py:of", check=False)(jnp.array([1.0]), 0))
    assert (value("one"), value("two")) == (1, 2)
    (tmp_path / "two" / "sized.py").write_text("SCALE = 10.0  # edited\n")
    os.utime(tmp_path / "two" / "sized.py", ns=(1, 1))
    assert (value("one"), value("two")) == (1, 10)


MINE = """
import numpy as np
import jax, jax.numpy as jnp
def my_loss(logits, targets, *, power=1.0):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] ** power
def averaged(logits, targets):
    return my_loss(logits, targets).mean()
def needs_three(logits, targets, prior):
    return my_loss(logits, targets)
def by_numpy(logits, targets):
    return jnp.asarray(np.asarray(my_loss(logits, targets)))
def branches(logits, targets):
    return my_loss(logits, targets) if logits.mean() > 0 else 0 * my_loss(logits, targets)
def other_way_too(targets, logits):
    from xentlab import at_target
    return -at_target(jax.nn.log_softmax(logits), targets)
def other_way(targets, logits):
    return my_loss(logits, targets)
def centred(logits, targets):
    return my_loss(logits - logits.mean(tuple(range(logits.ndim - 1)), keepdims=True), targets)
def loops(logits, targets):
    return jax.lax.while_loop(lambda value: value.sum() < 0, lambda value: 2 * value, my_loss(logits, targets))
CONSTANT = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_every_decorated_function_of_the_folder_is_in_the_catalogue_under_its_own_name():
    folder = pathlib.Path(inspect.getfile(xentlab.losses)).parent
    decorated = sum(path.read_text().count("\n@loss(") for path in folder.glob("*.py"))
    assert decorated == len(LOSSES)
    assert all(name == function.__name__ for name, function in LOSSES.items())
    with pytest.raises(TypeError):
        LOSSES["nll"] = None


def test_decoration_hands_back_the_same_function():
    def plain(logits, targets): ...

    assert xentlab.loss(source="x")(plain) is plain


def test_settings_in_the_name_equal_settings_by_keyword():
    z, y = jnp.array([[0.1, 2.0, -1.0]]), jnp.array([1])
    np.testing.assert_array_equal(resolve("focal(gamma=1)")(z, y), LOSSES["focal"](z, y, gamma=1))
    assert name_of(resolve("tsallis(alpha=3.0)")) == "tsallis(alpha=3.0)"


def test_a_link_gets_the_settings_of_its_loss():
    tempered = link_of(resolve("generalized_cross_entropy(q=.5)"))(jnp.array([2.0, 0.0]))
    np.testing.assert_allclose(tempered, np.exp([1.0, 0]) / np.exp([1.0, 0]).sum(), rtol=1e-6)


def test_a_link_is_that_of_the_facts():
    scaled = xentlab.loss(link=lambda z: jax.nn.softmax(3 * z))(functools.partial(LOSSES["nll"]))
    np.testing.assert_allclose(link_of(scaled)(jnp.array([0.0, 1.0]))[1], 1 / (1 + np.exp(-3)), rtol=1e-6)


def test_a_link_gives_probabilities():
    for link in (jax.nn.log_softmax, lambda z: 2 * jax.nn.softmax(z), lambda z: z[..., :1]):
        made = xentlab.loss(link=link)(functools.partial(LOSSES["nll"]))
        with pytest.raises(LabError, match=r"through no probabilities|link fails"):
            xentlab.checks.check_link(made)
    for each in LOSSES.values():
        xentlab.checks.check_link(each)


def test_targets_are_integers():
    """In a process of its own, in which no annotation is checked."""
    code = (
        "import jax.numpy as jnp; from xentlab import LOSSES, LabError\n"
        "for name, loss in LOSSES.items():\n"
        "    try: loss(jnp.zeros((2, 3)), jnp.ones(2))\n"
        "    except LabError as error: print(name, error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [f"{name} targets are integers, a class each; got float32." for name in LOSSES]


def test_a_file_a_module_and_a_callable(mine):
    z, y = jnp.array([[0.1, 2.0, -1.0]]), jnp.array([1])
    expected = LOSSES["nll"](z, y)
    for name in (f"{mine}:my_loss", "xentlab.losses.likelihood:nll", LOSSES["nll"]):
        np.testing.assert_allclose(resolve(name)(z, y), expected, rtol=1e-6)
    squared = resolve(f"{mine}:my_loss(power=2)")
    assert name_of(squared) == "my_loss(power=2)"
    np.testing.assert_allclose(resolve(optax.softmax_cross_entropy_with_integer_labels)(z, y), expected, rtol=1e-6)


def test_an_edited_file_is_read_again(mine):
    first = resolve(f"{mine}:my_loss")
    mine.write_text(MINE.replace("** power", "* 2 ** power"))
    assert resolve(f"{mine}:my_loss") is not first


def test_an_installed_package_offers_a_loss(monkeypatch):
    point = importlib.metadata.EntryPoint("theirs", "xentlab.losses.squared:brier", "xentlab.losses")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "xentlab.losses" else [])
    theirs = resolve("theirs")
    assert name_of(theirs) == "theirs"
    assert facts_of(theirs) is facts_of(LOSSES["brier"])


def test_an_installed_loss_that_the_catalogue_hides_is_told(monkeypatch, capsys):
    point = importlib.metadata.EntryPoint("focal", "theirs:focal", "xentlab.losses")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point] if group == "xentlab.losses" else [])
    main(["list"])
    assert "installed, and hidden by the catalogue's own: focal (theirs:focal)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("entmax", "did you mean .*entmax15"),
        ("fokal", "did you mean focal"),
        ("cross_entropy", r"did you mean nll\?"),
        ("Cross-Entropy", r"did you mean nll\?"),
        ("log_loss", r"did you mean nll\?"),
        ("NLL", r"did you mean nll\?"),
        ("focal(gamma=1, gamma=2)", "settings by keyword, each once"),
        ("qqqqqq", "known: .*nll"),
        ("focal(gama=1)", "no setting 'gama'; its settings: gamma"),
        ("nll(gamma=1)", "it has no settings"),
        ("focal(1)", "settings by keyword"),
        ("focal(gamma=1", "settings by keyword"),
        ("focal(gamma=open)", "settings by keyword"),
        ("tsallis(alpha=1)", "alpha above 1"),
        ("focal(gamma=-1)", "gamma of at least 0; got -1. At 0 it is nll"),
        ("z_loss(coefficient=-1)", "coefficient of at least 0"),
        ("confidence_penalty(beta=-0.1)", "beta of at least 0"),
        ("mixce(eta=1.5)", r"eta in \[0, 1\]"),
        ("./none.py:f", "no file none.py"),
        ("no.such.module:f", "cannot import no.such.module: ModuleNotFoundError"),
        ("mine.py:my_los", "did you mean my_loss"),
        ("mine.py:CONSTANT", "int, not a function"),
        ("mine.py:averaged", r"returned float32 of shape \[\].*leave the mean to the lab"),
        ("mine.py:needs_three", "TypeError.*prior"),
        ("mine.py:other_way_too", r"works with the two the other way round: a loss takes \(logits, targets\)"),
        ("mine.py:by_numpy", "TracerArrayConversionError.*Take jax.numpy where it takes NumPy"),
        ("mine.py:branches", r"TracerBoolConversionError.*take jnp\.where in place of an if"),
        ("mine.py:loops", r"loops has no gradient: ValueError: Reverse-mode .* lax\.scan for a while_loop say"),
        ("mine.py:other_way", r"works with the two the other way round: a loss takes \(logits, targets\)"),
        ("broken.py:f", "broken.py fails to import: ZeroDivisionError"),
        ("exits.py:f", "exits.py fails to import: SystemExit: 0"),
        ("exits:f", "cannot import exits: SystemExit: 0"),
        ("packed.py:f", "relative import .* A file alone is in no package: import what lies beside it by its name"),
        (":f", "':f' names no file: a loss of your own is ./file.py:function"),
        ("nll,brier", "is 2 losses in one name; give them apart: nll brier"),
        ("mine.py:centred", r"centred mixes tokens: beside others a token's loss is .* of its logits and target alone"),
    ],
)
def test_each_mistake_has_one_clear_line(mine, monkeypatch, name, message):
    (mine.parent / "broken.py").write_text("1 / 0")
    (mine.parent / "packed.py").write_text("from .helper import f")
    (mine.parent / "exits.py").write_text("import sys; sys.exit(0)")
    monkeypatch.syspath_prepend(mine.parent)
    with pytest.raises(LabError, match=message) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


def test_another_loss_that_is_called_nll_is_refused():
    """Sentences and pairs go by that name."""

    def twice(logits, targets):
        return 2 * LOSSES["nll"](logits, targets)

    with pytest.raises(LabError, match="nll is cross entropy here"):
        resolve_all({"nll": twice})
    assert [*resolve_all({"nll": "nll", "twice": twice})] == ["nll", "twice"]


def test_two_losses_of_one_name_are_refused(mine):
    (mine.parent / "other.py").write_text(MINE)
    with pytest.raises(LabError, match="two different losses"):
        resolve_all([f"{mine}:my_loss", f"{mine.parent}/other.py:my_loss"])
    with pytest.raises(LabError, match="no losses"):
        resolve_all([])
    priors = [np.full(1200, 1 / 1200), np.full(1200, 1 / 1200)]
    priors[1][600:602] = 0.5 / 1200, 1.5 / 1200
    found = resolve_all([functools.partial(LOSSES["logit_adjusted"], prior=prior) for prior in priors], 1200)
    assert len(found) == 2
    assert all(re.fullmatch(r"logit_adjusted\(prior=float64\[1200\]#[0-9a-f]{8}\)", name) for name in found)
    assert list(resolve_all(["nll", "nll", functools.partial(LOSSES["focal"], gamma=1)])) == ["nll", "focal(gamma=1)"]


def test_a_dict_names_its_losses():
    by = lambda weights: lambda logits, targets: weights[targets] * LOSSES["nll"](logits, targets)
    light, heavy = by(jnp.ones(5)), by(2 * jnp.ones(5))
    found = resolve_all({"light": light, "heavy": heavy, "nll": "nll", "mild": "focal(gamma=1)"})
    assert list(found) == [name_of(loss) for loss in found.values()] == ["light", "heavy", "nll", "mild"]
    assert float(found["heavy"](jnp.zeros(5), jnp.int32(0))) == pytest.approx(2 * np.log(5))
    assert found["nll"] is LOSSES["nll"]
    assert name_of(functools.partial(found["mild"], gamma=2)) == "mild(gamma=2)"
    with pytest.raises(LabError, match="a loss's name is a text; got ''"):
        resolve_all({"": "nll"})


def test_an_object_of_arrays_has_a_hash_and_its_own_name(mine):
    class Smooth(equinox.Module):
        share: jax.Array

        def __call__(self, logits, targets):
            return (1 - self.share) * LOSSES["nll"](logits, targets)

    loss = resolve(Smooth(jnp.float32(0.5)))
    assert hash(loss)
    assert name_of(loss) == "Smooth"
    assert jax.jit(linear_loss, static_argnames="loss")(jnp.ones((2, 3)), jnp.ones((3, 4)), jnp.zeros(2, int), loss=loss) == (
        pytest.approx(np.log(4) / 2)
    )


def test_a_number_in_a_name_is_short():
    at = lambda value: name_of(functools.partial(LOSSES["focal"], gamma=value))
    assert {at(each) for each in (0.3, jnp.float32(0.3), np.float64(0.3))} == {"focal(gamma=0.3)"}


def test_what_has_no_name_goes_by_that_in_its_file(mine):
    code = """
one = lambda logits, targets: my_loss(logits, targets)
two = lambda logits, targets: 2 * my_loss(logits, targets)
class Scaled:
    def __init__(self, scale): self.scale = scale
    def __call__(self, logits, targets): return self.scale * my_loss(logits, targets)
three, four = Scaled(3.0), Scaled(4.0)
class Frozen(Scaled):
    def __setattr__(self, name, value):
        if name != "scale": raise AttributeError(name)
        object.__setattr__(self, name, value)
five = Frozen(5.0)
"""
    mine.write_text(MINE + code)
    names = ["one", "two", "three", "four", "five"]
    assert list(resolve_all([f"{mine}:{name}" for name in names])) == names
    assert resolve(f"{mine}:five") is resolve(f"{mine}:five")


def test_settings_by_place_are_settings():
    @xentlab.loss(link=lambda z, gamma=1.0: jax.nn.softmax(gamma * z), low_p_even=lambda vocab, gamma=1.0: gamma)
    def first(gamma, logits, targets):
        return gamma * LOSSES["nll"](gamma * logits, targets)

    two, five = functools.partial(first, 2.0), functools.partial(first, 5.0)
    assert list(resolve_all([two, five, functools.partial(first, 2.0)])) == ["first(2.0)", "first(5.0)"]
    np.testing.assert_allclose(link_of(two)(jnp.array([1.0, 0.0])), np.exp([2.0, 0]) / np.exp([2.0, 0]).sum(), rtol=1e-6)
    assert xentlab.contract.low_p_claim(five, "even", 4) == 5
    # A partial with facts is not merged with the one around it: what is within comes first.
    inner = xentlab.loss(source="here")(functools.partial(lambda a, b, logits, targets: a * first(b, logits, targets), 3.0))
    assert xentlab.contract.settings_of(functools.partial(inner, 4.0)) == {"a": 3.0, "b": 4.0}


def test_a_claim_that_fails_is_told():
    """Of a setting the loss has a default, and the claim has none."""
    claimed = xentlab.loss(low_p_one=lambda vocab, *, gamma: gamma)(
        lambda logits, targets, *, gamma=1.0: gamma * logits[..., 0]
    )
    with pytest.raises(LabError, match=r"low_p_one fails at a vocabulary of 4: TypeError: .*'gamma'\. It is a number, or"):
        xentlab.contract.low_p_claim(claimed, "one", 4)


def test_targets_of_the_wrong_shape_say_so():
    with pytest.raises(LabError, match="class indices, not one-hot"):
        xentlab.at_target(jnp.zeros((2, 3)), jnp.zeros((2, 3), jnp.int32))


def test_what_is_no_loss_has_no_facts():
    named = "a loss is a function of (logits, targets); got 'nll'. It is what resolve('nll') makes of a name."
    assert unchecked("facts_of('nll')", "link_of('nll')", "name_of('nll')") == [named] * 3
    assert unchecked("facts_of(None)") == ["a loss is a function of (logits, targets); got NoneType."]


def test_what_is_neither_name_nor_function_is_refused():
    profile = "__import__('xentlab.gradients').gradients.gradient_profile"
    said = "a loss is a name, 'nll' say, or a function of (logits, targets); got"
    expected = [f"{said} {kind}." for kind in ("int", "NoneType", "list", "int")]
    assert unchecked("resolve(5)", "resolve(None)", "audit(['nll'])", f"{profile}([3], [.5])") == expected
    assert unchecked(f"{profile}(None, [.5])") == ["losses are names or functions, a list of them; got NoneType."]


def test_a_list_is_an_array_to_what_reads_a_target():
    given = [f"{name}([[1., 2.], [3., 4.]], [0, 1]).tolist()" for name in ("at_target", "off_target")]
    assert unchecked(*given) == ["[1.0, 4.0]", "[[0.0, 2.0], [3.0, 0.0]]"]
    said = "logits [..., V] have a vocabulary as their last axis; got a single number."
    assert unchecked(*(f"{name}(jnp.array(1.), jnp.array(0))" for name in ("at_target", "off_target"))) == [said] * 2


def test_facts_are_of_their_kinds():
    given = {
        "link='softmax'": "link is a function, logits [..., V] -> probabilities [..., V]; got 'softmax'",
        "proper='maybe'": "proper is softmax, link, no, or None where nobody has said; got 'maybe'",
        "calibrated='yes'": "calibrated is True, False, or None where nobody has said; got 'yes'",
        "stream='x'": "stream is a function of reductions of the logits; got 'x'",
        "source=1999": "source is a text; got 1999",
        "low_p_one='0'": "low_p_one is a number, or a function of vocab and the settings; got '0'",
        "stops_gradient=None": "stops_gradient is True or False; got None",
        "infinite='large gaps'": 'infinite is a tuple of "large gaps" and "-inf rival"; got \'large gaps\'',
        "settings={}": "settings is a tuple of dictionaries, keywords of the loss; got {}",
    }
    expected = [f"a loss's {said}." for said in given.values()]
    assert unchecked(*(f"Facts({each})" for each in given)) == unchecked(*(f"loss({each})" for each in given)) == expected
    with pytest.raises(LabError, match=r"no fact is called 'sauce'; the facts: source, formula, "):
        xentlab.loss(sauce="x")
    marked = xentlab.loss(source="shared")
    inner = marked(lambda logits, targets: ...)
    outer = marked(functools.wraps(inner)(lambda logits, targets: ...))
    assert xentlab.facts_of(outer).source == "shared"


def test_an_installed_loss_that_is_no_function_is_named(monkeypatch):
    point = importlib.metadata.EntryPoint(name="number", value="math:pi", group="xentlab.losses")
    monkeypatch.setattr("xentlab.catalogue.installed_losses", lambda: {"number": point})
    with pytest.raises(LabError, match=r"the installed loss number \(math:pi\) is no function; it is float"):
        resolve("number")
