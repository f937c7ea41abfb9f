"""Do four independent reasons lead to cross entropy, and to it alone?

Every loss through four doors (claim 19): likelihood (tokens needed), code length (files of a range coder), numerics (errors
by dtype), training signal (the pull at low p; steps out of a wrong start). A rival that wins is named.
"""

import math

import altair as alt
import numpy as np
import pandas as pd

from xentlab.scoreboard import Scoreboard, scoreboard
from xentlab.scoreboard.reading import sentences
from xentlab.sources import Text
from xentlab.stages import run_stage, standard_stages
from xentlab.tour import Check, Figure, Station, show

LOSSES = ("nll", "focal", "entmax15", "brier", "hinge", "mse_logits", "generalized_cross_entropy")
DOORS = ["tokens_needed", "bits_per_byte", "gradient_error_bfloat16", "escape_steps"]
WITHOUT = {"tokens_needed": "biased", "escape_steps": "never"}  # what a number that is infinite means


def run(losses=LOSSES, replicates: int = 0, quick: bool = False) -> tuple[Scoreboard, pd.DataFrame]:
    """The scoreboard, with the report's two races to have models to code with; and the race's table on text."""
    races = [run_stage(stage, losses, quick=quick) for stage in standard_stages(Text(), quick=quick)]
    return scoreboard(losses, races, replicates=replicates), races[0].race.table


def doors(board: Scoreboard, raced: pd.DataFrame) -> pd.DataFrame:
    """A loss's number at each door; tokens_needed is inf where it has a bias; bits_per_byte_low, _high: the race's."""
    coded = board.codes.dropna(subset=["bits_per_byte"]).set_index("loss").bits_per_byte
    table = board.table.assign(pull_low_p=lambda t: t[["low_p_even", "low_p_one"]].min(axis=1))
    frame = table[["loss", "tokens_needed", "bias", "gradient_error_bfloat16", "pull_low_p", "escape_steps"]].copy()
    frame["tokens_needed"] = frame.tokens_needed.where(frame.bias < 1e-6, np.inf)
    raced = raced.set_index("loss")[["best_rate", "bits_per_byte_low", "bits_per_byte_high"]]
    return frame.assign(bits_per_byte=frame.loss.map(coded)).join(raced, on="loss")


def stations(losses: tuple[str, ...] = LOSSES, quick: bool = False) -> list[Station]:
    """Claim 19. quick: tiny races."""
    board, raced = run(losses, quick=quick)
    frame, codes = doors(board, raced), board.codes
    nll, rest = frame.set_index("loss").loc["nll"], frame[frame.loss != "nll"]
    slack = (codes.bits_per_token / codes.model_bits_per_token - 1).max()
    chain = codes[codes.floor_bits_per_token.notna()].set_index("loss")
    checks = [
        Check("probability: tokens nll needs", nll.tokens_needed, 1, 1e-6),
        Check("probability: fewest of the others", rest.tokens_needed.min(), 1, 1e-6, "at least"),
        Check("information: file / cross entropy - 1, at worst", slack, 0.01, relation="at most"),
        Check("numerics: nll finite in float32", board.audits["nll"].verdicts["finite"].value["float32"], 1),
        Check("optimisation: nll's pull as p goes to 0", nll.pull_low_p, 1, 1e-3),
    ]
    if not quick:
        above = chain.bits_per_token["nll"] - chain.floor_bits_per_token["nll"]
        checks.append(Check("information: nll above the chain's entropy, bits", above, 0, 0.15))
    if "brier" in losses:
        brier = frame.set_index("loss").loc["brier"]
        checks.append(Check("probability: tokens brier needs, of nll's", brier.tokens_needed, 1.65, 0.07))
        checks.append(Check("optimisation: brier's pull as p goes to 0", brier.pull_low_p, 0, 1e-3))
        checks.append(Check("optimisation: brier escapes a wrong start", brier.escape_steps, math.inf))
    said = sentences(board.table, codes)
    first = {door: frame.loc[frame[door].idxmin()].loss for door in DOORS}
    least = [f"{door.replace('_', ' ')} is least for {name}" for door, name in first.items()]
    alone = "Of these losses alone" if set(first.values()) == {"nll"} else "The doors do not all single it out"
    loose = f"{alone}: {', '.join(least)}. Cross entropy is first at {[*first.values()].count('nll')} of the {len(first)}."
    charts = []
    for door, rows in frame.melt("loss", DOORS, "door", "number").groupby("door", sort=False):
        y, x = alt.Y("loss:N", sort=list(losses), title=None), alt.X("number:Q", title=None)
        bars = alt.Chart(rows[np.isfinite(rows.number)]).mark_bar().encode(x, y)
        without = alt.Chart(rows[np.isinf(rows.number)]).mark_text(align="left", dx=4, text=WITHOUT.get(door, ""))
        charts.append(alt.layer(bars, without.encode(y, x=alt.value(0)), title=door.replace("_", " ")))
    told = "Four roads lead to cross entropy: likelihood, code length, numerics, training signal."
    figures, frames = (Figure(tuple(charts), said[0]),), {"four_doors": frame, "codes": codes}
    return [Station(19, "Four doors", told, "\n".join(said), loose, tuple(checks), figures, frames)]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
