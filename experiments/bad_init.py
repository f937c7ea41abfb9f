"""Is the square loss stuck where it starts badly, and better than cross entropy where it starts well?

Reported by Golik, Doetsch & Ney 2013 (Cross-entropy vs. squared error training, Interspeech): from random weights, the squared
error on softmax outputs finds no good optimum; a network that cross entropy trained first is improved by a few iterations of
it (word error rates from 30.9 to 30.5% and from 22.7 to 21.9%). Of test NLL they say nothing; it has a verdict at the starts
where the square loss is said to be stuck. A head scaled up begins confident, and so mostly wrong. All go on from nll's models,
nll too, each measure at the loss's own best rate. Theirs was stochastic gradient descent; adamw, which divides by the
gradient's own size, is tried as well.
"""

import pathlib

import equinox as eqx
import pandas as pd
import tyro

from xentlab.defaults import quiet
from xentlab.models import resolve_model
from xentlab.results import paired
from xentlab.sources import Text
from xentlab.tour import reported

LOSS_NAMES = ("nll", "brier")
MODEL = "mlp(context=4, width=16, inner=64, features=32)"
RATES = {"sgd": (0.3, 1.0, 3.0, 10.0), "adamw": (3e-3, 1e-2, 3e-2)}
AFTER = "after nll"


def scaled(model: str, factor: float):
    """A function (vocab, key) -> the model with its head times a factor."""

    def make(vocab, key):
        made = resolve_model(model)(vocab, key)
        return eqx.tree_at(lambda whole: whole.weight, made, made.weight * factor)

    return make


def run(losses=LOSS_NAMES, model=MODEL, scales=(1, 50, 200), rates=RATES, seeds=range(5), steps=400, further=200, tell=quiet):
    """A row an optimizer, start, loss and seed: the test at the loss's best rates there, which are beside it."""
    parts, text = [], Text()
    for optimizer, grid in rates.items():
        how = {"optimizer": optimizer, "blocks": 4}
        for scale in scales:
            arm, start = f"{optimizer}, head × {scale}", scaled(model, scale)
            parts.append(reported.trials(arm, tell, losses, text, start, grid, seeds, steps, **how))
        best = parts[-len(scales)].set_index("loss").rate["nll"].iloc[0]
        start = reported.nll_trained(text, scaled(model, scales[0]), best, seeds, steps=steps, **how)
        arm = f"{optimizer}, {AFTER}"
        parts.append(reported.trials(arm, tell, losses, text, start, grid, seeds, further, **how))
    return pd.concat(parts, ignore_index=True)


def verdicts(frame: pd.DataFrame) -> list[str]:
    """What is reported beside what was found."""
    arms = list(dict.fromkeys(frame.source))
    bad = {(arm, "brier"): 1 for arm in arms if not arm.endswith(AFTER)}
    accuracy = {(arm, "brier"): 1 if arm.endswith(AFTER) else -1 for arm in arms}
    return [*reported.verdicts(paired(frame, "accuracy"), accuracy), *reported.verdicts(paired(frame, "test_nll"), bad)]


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    """See the top of the file. quick: a first look, at sizes that show nothing."""
    sizes = {"scales": (1,), "rates": {"sgd": (1.0,)}, "seeds": (0, 1), "steps": 40, "further": 20} if quick else {}
    reported.main("bad-init", run, verdicts, ("accuracy", "test_nll"), sizes, [Text()], out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
