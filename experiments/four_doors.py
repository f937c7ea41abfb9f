"""Do four independent reasons lead to cross entropy, and to it alone?

Every loss through four doors (claim 19): likelihood (tokens needed), code length (files of a range coder), numerics (errors
by dtype), training signal (the pull at low p; steps out of a wrong start). A rival that wins is named.
"""

import math

import altair as alt
import numpy as np
import pandas as pd

from xentlab.scoreboard import Scoreboard, scoreboard
from xentlab.scoreboard.reading import front, sentences
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
    table = board.table.assign(pull_low_p=board.table[["low_p_even", "low_p_one"]].min(axis=1))
    table["tokens_needed"] = table.tokens_needed.where(table.bias < 1e-6, np.inf)
    frame = table[["loss", "tokens_needed", "bias", "gradient_error_bfloat16", "pull_low_p", "escape_steps"]]
    raced = raced[["loss", "best_rate", "bits_per_byte_low", "bits_per_byte_high"]]
    return frame.assign(bits_per_byte=frame.loss.map(coded)).merge(raced, how="left")


def panel(frame: pd.DataFrame, door: str) -> alt.LayerChart:
    """A loss's bar at a door, and where there is one the race's 95% interval over seeds."""
    rows = frame[["loss"]].assign(number=frame[door], low=frame.get(f"{door}_low"), high=frame.get(f"{door}_high"))
    y = alt.Y("loss:N", sort=list(frame.loss), title=None)
    bars = alt.Chart(rows[np.isfinite(rows.number)]).mark_bar().encode(alt.X("number:Q", title=None), y)
    without = alt.Chart(rows[np.isinf(rows.number)]).mark_text(align="left", dx=4, text=WITHOUT.get(door, ""))
    line = alt.Chart(rows.dropna()).mark_rule(size=3, color="gray").encode(alt.X("low:Q", title=None), x2="high:Q", y=y)
    lines, said = ([line], "bar: one seed's file; line: 95% over seeds") if rows.low.notna().any() else ([], "")
    return alt.layer(bars, *lines, without.encode(y, x=alt.value(0)), title=alt.Title(door.replace("_", " "), subtitle=said))


def stations(losses: tuple[str, ...] = LOSSES, quick: bool = False) -> list[Station]:
    """Claim 19. quick: tiny races."""
    board, raced = run(losses, quick=quick)
    frame, codes = doors(board, raced), board.codes
    nll, fewest = frame.set_index("loss").loc["nll"], frame.tokens_needed[frame.loss != "nll"].min()
    slack = (codes.bits_per_token / codes.model_bits_per_token - 1).max()
    above = (codes.bits_per_token - codes.floor_bits_per_token)[codes.loss == "nll"].max()
    checks = [
        Check("probability: tokens nll needs", nll.tokens_needed, 1, 1e-6),
        Check("probability: fewest of the others", fewest, 1, 1e-6, "at least"),
        Check("information: file / cross entropy - 1, at worst", slack, 0.01, relation="at most"),
        Check("numerics: nll finite in float32", board.audits["nll"].verdicts["finite"].value["float32"], 1),
        Check("optimisation: nll's pull as p goes to 0", nll.pull_low_p, 1, 1e-3),
    ]
    checks += [] if quick else [Check("information: nll above the chain's entropy, bits", above, 0, 0.15)]
    if "brier" in losses:
        brier = frame.set_index("loss").loc["brier"]
        checks.append(Check("probability: tokens brier needs, of nll's", brier.tokens_needed, 1.65, 0.07))
        checks.append(Check("optimisation: brier's pull as p goes to 0", brier.pull_low_p, 0, 1e-3))
        checks.append(Check("optimisation: brier escapes a wrong start", brier.escape_steps, math.inf))
    said, told = sentences(board.table, codes), "Four roads lead to cross entropy: likelihood, code length, numerics, training."
    frames, figures = {"four_doors": frame, "codes": codes}, (Figure(tuple(panel(frame, door) for door in DOORS), said[0]),)
    tables = {"In numbers (∞ tokens: biased; ∞ steps: never out)": frame.filter(regex="^loss$|needed|byte|steps")}
    tables["Errors by number format; pull as p goes to 0"] = board.table.filter(regex="^loss$|error_|low_p_")
    return [Station(19, "Four doors", told, "\n".join(said), front(frame, DOORS), tuple(checks), figures, frames, tables)]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
