"""Is cross entropy's gradient the strongest at low probability?

In the probability it explodes like 1/p; in the logit, which is what a network moves, it is 1 - p and stays below 1, and
others keep up with it or pass it. What vanishes is the square loss on probabilities. Both ways in which p can become
small are shown, for any losses: `python experiments/low_probability.py --losses nll brier ./mine.py:my_loss`.
"""

import dataclasses
import pathlib

import numpy as np
import pandas as pd
import tyro

from xentlab import charts
from xentlab.gradients import PATHS, gradient_profile
from xentlab.reading import gradients as read
from xentlab.runs import new_folder, write_frame

LOSSES = ("nll", "brier", "mse_logits", "hinge", "focal", "generalized_cross_entropy", "entmax15")


def run(losses=LOSSES, vocab: int = 16, points: int = 49) -> pd.DataFrame:
    """Profiles on both paths, and each loss's gradient relative to nll's at the same p."""
    p = np.logspace(-12, -0.005, points)
    frame = pd.concat([gradient_profile(losses, p, vocab, path) for path in PATHS], ignore_index=True)
    nll = pd.concat([gradient_profile(["nll"], p, vocab, path) for path in PATHS])
    nll = nll.set_index(["rivals", "p"]).dvalue_dlogit.rename("nll")
    joined = frame.join(nll, on=["rivals", "p"])
    return frame.assign(times_nll=(joined.dvalue_dlogit / joined.nll).abs())


@dataclasses.dataclass
class Arguments:
    """See the top of the file."""

    losses: tuple[str, ...] = LOSSES
    vocab: int = 16
    out: pathlib.Path = pathlib.Path("runs/low_probability")


def main(arguments: Arguments) -> None:
    """Prints the answer, and writes the frame and the headline figure."""
    frame = run(arguments.losses, arguments.vocab)
    folder = new_folder("low_probability", arguments.out)
    write_frame(folder, "profiles", frame)
    names = list(dict.fromkeys(frame.loss))
    panels = [charts.profile(frame, names, space, path, legend=True) for path in PATHS for space in charts.SPACES]
    charts.write_png(charts.grid(panels), folder / "headline.png")
    low = frame[np.isclose(frame.p, frame.p.unique()[np.abs(np.log(frame.p.unique() / 1e-6)).argmin()])]
    print(low[["loss", "rivals", "p", "dvalue_dp", "dvalue_dlogit", "times_nll"]].to_string(index=False))
    print(*read(frame), f"Wrote {folder}.", sep="\n")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
