"""Do other strictly proper scores lose to cross entropy from scratch, and win once it has trained the model?

Reported by Shao et al. 2024 (Language generation with strictly proper scoring rules, arXiv:2405.18906, and the README of
github.com/shaochenze/ScoringRulesLM): the Brier and the spherical score do worse than cross entropy from scratch, and better
where they go on from a model that it trained, "without adjusting other hyperparameters". They measured translations, which are
decoded; the nearest here is accuracy, the tokens that greedy decoding gets. Of test NLL, cross entropy's own measure, only this
follows: the gap is smaller afterwards. All go on from the same models and for as long, nll too: each at its own best rate, and
all at nll's first one. tsallis(alpha=1.5), between nll and brier (alpha = 2), is asked the same.
"""

import pathlib

import pandas as pd
import tyro

from xentlab.defaults import quiet
from xentlab.results import paired
from xentlab.sources import Text
from xentlab.tour import reported

LOSS_NAMES = ("nll", "brier", "spherical", "tsallis")
MODEL = "mlp(context=6, width=16, inner=64, features=32)"
SCRATCH, AFTER = "from scratch", "after nll"
SAME = reported.at_one_rate(AFTER)


def run(losses=LOSS_NAMES, model=MODEL, rates=(1e-3, 3e-3, 1e-2, 3e-2), seeds=range(5), steps=400, further=200, tell=quiet):
    """A row a start, loss and seed: the test at the loss's best rates there, which are beside it."""
    text = Text()
    scratch = reported.trials(SCRATCH, tell, losses, text, model, rates, seeds, steps, blocks=4)
    best = scratch.set_index("loss").rate["nll"].iloc[0]
    start = reported.nll_trained(text, model, best, seeds, steps=steps, blocks=4)
    after = reported.trials(AFTER, tell, losses, text, start, rates, seeds, further, one_rate=best, blocks=4)
    return pd.concat([scratch, after], ignore_index=True)


def verdicts(frame: pd.DataFrame) -> list[str]:
    """What is reported beside what was found."""
    others = [loss for loss in dict.fromkeys(frame.loss) if loss != "nll"]
    accuracy = {(arm, loss): sign for arm, sign in ((SCRATCH, -1), (AFTER, 1), (SAME, 1)) for loss in others}
    change = paired(reported.gaps(frame, "test_nll"), "test_nll")
    return [
        *reported.verdicts(paired(frame, "test_nll"), {(SCRATCH, loss): 1 for loss in others}),
        *reported.verdicts(paired(frame, "accuracy"), accuracy),
        *reported.verdicts(change, {(loss, arm): -1 for arm in (AFTER, SAME) for loss in others}, reported.CHANGE),
    ]


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    """See the top of the file. quick: a first look, at sizes that show nothing."""
    few = {"losses": ("nll", "brier"), "rates": (0.01,), "seeds": (0, 1)}
    sizes = few | {"steps": 40, "further": 20} if quick else {}
    reported.main("from-scratch-or-fine-tuned", run, verdicts, ("test_nll", "accuracy"), sizes, [Text()], out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
