"""Losses and links of one's own that break the contract in ways that a glance does not show, and what they are told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xentlab import LOSSES, LabError, loss, resolve
from xentlab.audit import audit
from xentlab.checks import check_alone
from xentlab.cli import main
from xentlab.contract import facts_of
from xentlab.gradients import gradient_profile
from xentlab.race import race
from xentlab.sources import MarkovSource

TRAINS = True
NLL = LOSSES["nll"]
PRIOR = np.log(np.array([0.1, 0.2, 0.3, 0.4]))  # float64, as NumPy has it


def by_prior(logits, targets):
    return NLL(logits + PRIOR, targets)


@pytest.mark.parametrize(
    "link",
    [
        lambda z: jax.nn.sigmoid(z) / jnp.sum(jax.nn.sigmoid(z)),
        lambda z: jax.nn.softmax(z, axis=0),
        lambda z: jax.nn.softmax(z * (1 + jnp.mean(z) ** 2)),
    ],
)
def test_a_link_that_mixes_tokens_is_refused(link):
    """A race would read test tokens by one another, and believe it."""
    made = loss(link=link)(lambda logits, targets: NLL(logits, targets))
    with pytest.raises(LabError, match=r"link mixes tokens: .* does a sum in it lack axis=-1, keepdims=True\?"):
        race([made], MarkovSource(vocab=8, tokens=500), "bigram", learning_rates=[0.1], seeds=[0], steps=2)


def test_no_loss_of_the_catalogue_mixes_tokens():
    for each in LOSSES.values():
        check_alone(each)


def test_a_link_without_a_name_is_no_softmax():
    def halved(z):
        return jax.nn.softmax(z / 2)

    made = [loss(link=link)(lambda logits, targets: NLL(logits, targets)) for link in (halved, lambda z: halved(z))]
    assert [facts_of(each).link_name for each in made] == ["a link of its own, halved", "a link of its own"]


def test_a_float64_array_of_numpy_s_may_be_closed_over():
    """Traced in float32 first, JAX had it fail in float64."""
    with jax.numpy_rank_promotion("allow"):
        profile = gradient_profile(["nll", resolve(by_prior, vocab=4)], [0.5], vocab=4)
        verdicts = audit(by_prior, vocab=4).verdicts
    assert np.isfinite(profile.value).all()
    assert verdicts["convex"].value is True


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (optax.losses.poly_loss_cross_entropy, r"takes one-hot targets: wrap it, loss\(logits, jax\.nn\.one_hot\("),
        (lambda z, y: NLL(z, y)[..., None], r"Take the last axis away: \[\.\.\., 0\]"),
        (lambda z, y: jnp.argmax(z, axis=-1) != y, "Cast it, and mind that what only compares has no gradient"),
        (by_prior, r"vocabulary of its own\? It was tried at V = 5; ask at its own, by --vocab"),
    ],
)
def test_each_is_told_what_it_lacks(function, said):
    with pytest.raises(LabError, match=said):
        resolve(function)


def test_a_class_with_settings_is_told_to_be_made_in_its_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "class Call:\n"
        "    def __init__(self, power=2): self.power = power\n"
        "    def __call__(self, logits, targets): return logits[..., 0]\n"
    )
    with pytest.raises(LabError, match=r"Call is a class: make the loss in the file, call = Call\(\.\.\.\), and name that"):
        resolve(f"{tmp_path}/mine.py:Call(power=3)")


def test_a_form_that_is_another_loss_is_refused_before_the_first_is_trained():
    wrong = loss(stream=lambda rivals, target: 2 * jax.nn.softplus(rivals - target))(lambda z, y: NLL(z, y))
    told = []
    with pytest.raises(LabError, match="stream form is another loss"):
        race(["nll", wrong], MarkovSource(vocab=8, tokens=500), "bigram", steps=2, progress=lambda *seen: told.append(seen))
    assert not told


OWN = """
import functools
import jax.numpy as jnp
from xentlab import LOSSES, at_target
PRIOR = jnp.zeros(4)
def by_prior(logits, targets): return LOSSES["nll"](logits + PRIOR[(None,) * (logits.ndim - 1)], targets)
part = functools.partial(by_prior)
class Call:
    def __call__(self, logits, targets): return by_prior(logits, targets)
obj = Call()
"""


def test_a_loss_that_knows_its_vocabulary_is_shown_there(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(SystemExit):
        main(["show", f"{tmp_path}/mine.py:by_prior"])
    assert "It was tried at V = 5; ask at its own, by --vocab" in capsys.readouterr().err
    main(["show", f"{tmp_path}/mine.py:by_prior", "--vocab", "4"])
    assert "mine.py:6" in capsys.readouterr().out


def test_what_a_file_has_is_what_stands_in_it(tmp_path):
    """Its own functions, partials and objects, and not what it imports."""
    (tmp_path / "mine.py").write_text(OWN)
    with pytest.raises(LabError, match=r"no function 'zzz'; known: Call, by_prior, obj, part\."):
        resolve(f"{tmp_path}/mine.py:zzz")
