"""Do bounded losses keep their accuracy where labels are wrong, and cross entropy not?

Reported: under symmetric noise, mae's expected loss has the minimiser that it has without noise (Ghosh, Kumar & Sastry 2017,
arXiv:1712.09482), and networks trained with it keep more of their accuracy than with cross entropy, which comes to fit the
noise; mae itself learns slowly, and generalized_cross_entropy, between the two, does better (Zhang & Sabuncu 2018,
arXiv:1805.07836). brier is bounded as well. In those reports all losses train long and at one rate: the first half here. The
second, where the same is asked, gives each loss its own best rate by a clean validation part: a small one stops early.
The noise is drawn once, so it can be learnt by heart: the text is short, and the model reads eight tokens where one would do.
"""

import dataclasses
import pathlib

import pandas as pd
import tyro

from xentlab.defaults import quiet
from xentlab.results import paired
from xentlab.sources import MarkovSource
from xentlab.tour import reported

MIDDLE = "generalized_cross_entropy"
LOSS_NAMES = ("nll", "mae", MIDDLE, "brier")
MODEL = "mlp(context=8, width=16, inner=128, features=32)"
SHARES = (0.0, 0.2, 0.4, 0.6)
RATE = 0.01


@dataclasses.dataclass(frozen=True)
class ShortChain(MarkovSource):
    """A chain of which training sees little, and validation and test much."""

    vocab: int = 16
    exponent: float = 3.0
    tokens: int = 40_000
    trained: int = 1500

    def split(self, part):
        """The tokens of one part."""
        return super().split(part)[: self.trained if part == "train" else None]


def run(losses=LOSS_NAMES, shares=SHARES, model=MODEL, rates=(3e-4, 1e-3, 3e-3, RATE), seeds=range(5), steps=500, tell=quiet):
    """A row a share of noise, loss and seed: the test, which is clean, at the loss's best rates there, and at `RATE`."""
    same = {"one_rate": RATE, "batch": 8, "blocks": 4}
    parts = [
        reported.trials(f"noise {share:g}", tell, losses, ShortChain(), model, rates, seeds, steps, label_noise=share, **same)
        for share in shares
    ]
    frame = pd.concat(parts, ignore_index=True)
    tuned = frame.source.isin([f"noise {share:g}" for share in shares])
    return pd.concat([frame[~tuned], frame[tuned]], ignore_index=True)


def verdicts(frame: pd.DataFrame) -> list[str]:
    """What is reported beside what was found."""
    others = [loss for loss in dict.fromkeys(frame.loss) if loss != "nll"]
    said, one_rate = [], frame.source.str.endswith(reported.at_one_rate(""))
    for part in (frame[one_rate], frame[~one_rate]):
        arms = list(dict.fromkeys(part.source))
        change = paired(reported.gaps(part, "accuracy"), "accuracy")
        said += reported.verdicts(paired(part, "accuracy"), {(arm, loss): 1 for arm in arms[1:] for loss in others})
        slow = paired(part[part.loss != "nll"], "accuracy")  # against mae
        said += reported.verdicts(slow, {(arm, MIDDLE): 1 for arm in arms[1:] if {"mae", MIDDLE} <= set(others)})
        said += reported.verdicts(change, {(loss, arms[-1]): 1 for loss in others}, reported.CHANGE)
    return said


def main(quick: bool = False, out: pathlib.Path | None = None) -> None:
    """See the top of the file. quick: a first look, at sizes that show nothing."""
    sizes = {"losses": ("nll", MIDDLE), "shares": (0.0, 0.4), "rates": (RATE,), "seeds": (0, 1), "steps": 40} if quick else {}
    reported.main("label-noise", run, verdicts, ("accuracy", "test_nll"), sizes, [ShortChain()], out)


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
