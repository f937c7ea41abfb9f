"""Races on a mesh equal those on one device; the head that training uses holds less than the naive one."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from xentlab import LOSSES
from xentlab.program import program
from xentlab.recipe import Recipe
from xentlab.training import train

TRAINS = True


def race(*arguments):
    """What the command says, in a process of its own: JAX counts a CPU's devices once."""
    tiny = ("--markov", "32", "--steps", "6", "--learning-rates", ".05", "--seeds", "0", "1", "--losses", "entmax15")
    command = [sys.executable, "-c", "from xentlab.cli import main; main()", "race", *tiny, "--format", "json", *arguments]
    return subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})


def test_a_race_on_a_mesh_equals_one_without():
    both = race(), race("--mesh", "data=4,model=2")
    (alone, _), (spread, said) = (each.communicate(timeout=240) for each in both)
    assert [each.returncode for each in both] == [0, 0], said[-2000:]
    for one, other in zip(json.loads(alone), json.loads(spread), strict=True):
        assert one["loss"] == other["loss"]
        for key in ("test_nll", "validation_nll", "kl_to_law", "accuracy"):
            # The same sums in another order.
            assert other[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--mesh", "data=3"), "3 devices cannot share a batch of 16 windows evenly"),
        (("--mesh", "model=5"), "5 devices cannot share 32 classes evenly"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told(arguments, said):
    done = race(*arguments)
    _, told = done.communicate(timeout=240)
    assert done.returncode == 2
    assert said in told
    assert told.count("\n") == 1


@dataclasses.dataclass(frozen=True)
class Noise:
    """Tokens drawn evenly from a large vocabulary."""

    vocab: int = 2048
    name: str = "noise"
    order: int = 0
    token_bytes: None = None

    def describe(self):
        return {"kind": "noise"}

    def split(self, part):
        return np.random.default_rng(len(part)).integers(0, self.vocab, 2000).astype(np.int32)


def test_training_never_holds_a_batchs_logits():
    source = Noise()
    logits = 4 * 16 * 32 * source.vocab

    def temporary(head):
        parts = program(LOSSES["nll"], source, "bigram(features=16)", Recipe(validation_tokens=32, head=head))
        return parts.compiled(1)[0].memory_analysis().temp_size_in_bytes

    assert temporary("linear_loss") < logits < temporary("naive")


@pytest.mark.parametrize("name", ["nll", "entmax15"])
def test_both_heads_train_alike(name):
    recipe = Recipe(steps=6, batch=4, window=8, blocks=2, validation_tokens=64)
    one, other = (
        train(LOSSES[name], Noise(64), "mlp(features=8)", [0.05], [0], dataclasses.replace(recipe, head=head))
        for head in ("linear_loss", "naive")
    )
    np.testing.assert_allclose(one.train_loss, other.train_loss, rtol=1e-5)
    np.testing.assert_allclose(one.validation_nll, other.validation_nll, rtol=1e-5)
