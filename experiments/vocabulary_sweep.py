"""Does the square loss fall behind cross entropy as the vocabulary grows, and does rescaling it mend that?

Reported: the accuracy of the square loss falls off with the number of classes, and more weight on the right class brings much
of it back (Demirkaya, Chen & Oymak 2020, Exploring the role of loss functions in multiclass classification). With k = 15 and
M = 30, which Hui & Belkin 2021 (arXiv:2006.07322) take for a thousand classes, it is as good as cross entropy or better in most
of their tasks. Both speak of accuracy; of the KL to the law, known here, the first two are asked as well. brier stands beside.
Is it V, or that the features stay few while V grows, as in a language model? With 32 features a square loss has to make the
table of probabilities of rank 32, cross entropy one of their logarithms. A full table, a weight a pair of tokens, ends that.
"""

import pathlib

import pandas as pd
import tyro

from xentlab.defaults import quiet
from xentlab.results import paired
from xentlab.sources import MarkovSource
from xentlab.tour import reported

SQUARE, RESCALED = "mse_logits", "mse_logits(k=15, M=30)"
LOSS_NAMES = ("nll", SQUARE, RESCALED, "brier")
VOCABULARIES = (8, 64, 512)
MODELS = {"32 features": "bigram(features=32)", "table": "bigram"}
RATES = (1e-2, 3e-2, 0.1)


def chain(vocab: int) -> MarkovSource:
    """A chain whose likeliest next token takes more than half, on average over the contexts."""
    return MarkovSource(vocab=vocab, exponent=2.0, tokens=100_000)


def run(losses=LOSS_NAMES, vocabularies=VOCABULARIES, models=MODELS, rates=RATES, seeds=range(5), steps=200, tell=quiet):
    """A row a model, vocabulary, loss and seed: the test at the loss's best rates there, which are beside it."""
    parts = [
        reported.trials(f"{name}, V = {v}", tell, losses, chain(v), model, rates, seeds, steps, blocks=4)
        for name, model in models.items()
        for v in vocabularies
    ]
    return pd.concat(parts, ignore_index=True)


def verdicts(frame: pd.DataFrame) -> list[str]:
    """What is reported beside what was found."""
    said = []
    for _, part in frame.groupby(frame.source.str.split(",").str[0], sort=False):
        largest, squares = part.source.iloc[-1], part[part.loss.isin((SQUARE, RESCALED))]
        for metric, worse in (("accuracy", -1), ("kl_to_law", 1)):
            change = paired(reported.gaps(part, metric), metric)
            there = {(largest, SQUARE): worse} | ({(largest, RESCALED): 1} if metric == "accuracy" else {})
            said += reported.verdicts(paired(part, metric), there)
            said += reported.verdicts(change, {(SQUARE, largest): worse}, reported.CHANGE)
            said += reported.verdicts(paired(squares, metric), {(largest, RESCALED): -worse})
    return said


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    """See the top of the file. quick: a first look, at sizes that show nothing."""
    few = {"models": {"32 features": MODELS["32 features"]}, "vocabularies": (8, 64)}
    sizes = few | {"rates": (0.1,), "seeds": (0, 1), "steps": 40} if quick else {}
    sources = [chain(vocab) for vocab in sizes.get("vocabularies", VOCABULARIES)]
    reported.main("vocabulary-sweep", run, verdicts, ("accuracy", "kl_to_law"), sizes, sources, out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
