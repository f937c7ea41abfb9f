"""What a scoreboard says, door by door, in plain words made from its frames."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from xentlab.reading import SLOW, number, words

if TYPE_CHECKING:
    import pandas as pd


def sentences(table: pd.DataFrame, codes: pd.DataFrame) -> list[str]:
    """Which claims of the usual telling hold on this board, which do not, and what is left of cross entropy's case."""
    return [*_probability(table), *_information(codes), *_numerics(table), *_optimisation(table), *_combination(table)]


def least(numbers: pd.Series, low: pd.Series | None = None, high: pd.Series | None = None) -> list[str]:
    """Whose number is least, and after it all that are not told from it.

    numbers: by name. low, high: an interval for each; level is what begins below the end of the first one's. Without them
    level is what comes within a tenth of it.

    >>> import pandas as pd
    >>> least(pd.Series({"brier": 1.95, "nll": 1.94, "focal": 3.86}))
    ['nll', 'brier']
    """
    first = numbers.idxmin()
    level = numbers <= 1.1 * numbers[first] if low is None or high is None else low <= high[first]
    return [first, *numbers.index[level & (numbers.index != first)]]


def front(frame: pd.DataFrame, doors: list[str]) -> str:
    """Who is first at each door, a column of the frame with perhaps a _low and _high, and at how many of them nll is."""
    named = frame.set_index("loss")
    first = {door: least(named[door], named.get(f"{door}_low"), named.get(f"{door}_high")) for door in doors}
    said = [f"{door.replace('_', ' ')} {words(names)}{' level' * (len(names) > 1)}" for door, names in first.items()]
    alone = sum(names == ["nll"] for names in first.values())
    level = sum("nll" in names for names in first.values()) - alone
    shared = f", level with others at {level}" if level else ""
    return (
        f"First at each door, as far as intervals or a tenth tell: {', '.join(said)}. Cross entropy is first alone at {alone} "
        f"of the {len(doors)}{shared}."
    )


def _probability(table: pd.DataFrame) -> list[str]:
    said = []
    for row in table[table.read_through == "softmax(z)"].itertuples():
        if isinstance(row.proper_through, str) and row.proper_through not in ("softmax", "undecided"):
            through = f"{row.proper_through}{', divided by its sum' * (row.proper_through == 'sigmoid')}"
            said.append(
                f"{row.loss} is read through softmax(z) here, but is least at the truth through {through}: give it "
                "that link, @xentlab.loss(link=...), before its numbers are believed."
            )
    steady, biased = table[table.tokens_needed.notna()], table[table.tokens_needed.isna() & (table.bias > 0)]
    if len(steady):
        needs = [f"{row.loss} {number(row.tokens_needed)}" for row in steady.sort_values("tokens_needed").itertuples()]
        said.append(f"Tokens needed for the same divergence from the truth, relative to maximum likelihood: {words(needs)}.")
    tried = steady[steady.simulated.notna()]
    if len(tried):
        covers = (tried.simulated_low <= tried.theory) & (tried.theory <= tried.simulated_high)
        if covers.any():
            said.append(f"Fits to samples agree: the interval covers the theory for {words(list(tried.loss[covers]))}.")
        if not covers.all():
            off = [f"{r.loss} ({number(r.simulated)}, not {number(r.theory)})" for r in tried[~covers].itertuples()]
            said.append(f"At these sample sizes the simulation is off the theory for {words(off)}.")
    if len(biased):
        off = [f"{row.loss} {number(row.bias)}" for row in biased.sort_values("bias").itertuples()]
        said.append(f"With endless tokens these still end away from the truth, by so many nats: {words(off)}.")
    nowhere = table[table.tokens_needed.isna() & table.bias.isna()]
    unsettled = nowhere.strictly_proper == "undecided"
    if unsettled.any():
        said.append(f"Nothing is known of tokens for {words(list(nowhere.loss[unsettled]))}: `xentlab audit` says why.")
    if not unsettled.all():
        missing = words(list(nowhere.loss[~unsettled]))
        said.append(f"No single minimiser was found for {missing}, so nothing is known of tokens.")
    return said


def _information(codes: pd.DataFrame) -> list[str]:
    said = []
    for source, rows in codes.groupby("source", sort=False) if len(codes) else []:
        best, worst = rows.loc[rows.bits.idxmin()], rows.loc[rows.bits.idxmax()]
        equal, longest = (list(rows.loss[rows.bits == end.bits]) for end in (best, worst))
        finite = rows[rows.model_bits.abs() < math.inf]
        cost = 100 * (finite.bits / finite.model_bits - 1).abs().max()
        floor = rows.floor_bits_per_token.iloc[0]
        known = "" if floor != floor else f" (the chain's own entropy: {floor:.4f})"
        who = f"{words(equal)} wrote" + " the least," * (len(equal) < len(rows))
        most = f", {words(longest)} the most, {worst.bits_per_token:.4f}" if worst.bits > best.bits else ""
        said.append(
            f"On {source} every file decoded to the same {rows.tokens.iloc[0]} tokens; {who} "
            f"{best.bits_per_token:.4f} bits a token{known}{most}. Each loss's model is that of its first seed."
        )
        if len(finite):
            said[-1] += f" Coded size and cross entropy differ by at most {cost:.2g}%: a cross entropy is a file size."
    return said


def _numerics(table: pd.DataFrame) -> list[str]:
    open_to_question = list(table.loss[(table.finite_float32 == "undecided") | (table.finite_float16 == "undecided")])
    table = table[~table.loss.isin(open_to_question)]
    bad = {dtype: list(table.loss[table[f"finite_{dtype}"].map(lambda x: x is not True)]) for dtype in ("float32", "float16")}
    where = {words(names): [each for each in bad if bad[each] == names] for names in bad.values() if names}
    said = [
        f"Not finite in {words(each)} at extreme logits or beside a masked class: {names}." for names, each in where.items()
    ]
    fine = list(table.loss[~table.loss.isin(bad["float32"] + bad["float16"])])
    if fine:
        said.append(
            f"Finite in float32 and float16, at extreme logits too: {words(fine)}. How many digits are right, the table says."
        )
    if open_to_question:
        said.append(f"Not settled for {words(open_to_question)}: `xentlab audit` says why.")
    return said


def _optimisation(table: pd.DataFrame) -> list[str]:
    said = []
    none = (table.low_p_even == 0) & (table.low_p_one == 0)
    fades = none & (table.low_p_order.abs() <= SLOW)  # where there is no order it is exactly 0 from some p on
    gone, slowly = list(table.loss[none & ~fades]), list(table.loss[fades])
    grows = list(table.loss[(table.low_p_even == math.inf)])
    holds = list(table.loss[(table.low_p_even > 0) & (table.low_p_even < math.inf) & (table.low_p_one > 0)])
    if gone:
        said.append(f"The claim that a confident mistake teaches nothing holds for {words(gone)}: the pull goes to 0 with p.")
    if slowly:
        said.append(f"For {words(slowly)} it holds in the limit alone: the pull falls slowly with p, see its order.")
    others = [name for name in holds if name != "nll"]
    if others and "nll" in holds:
        verb = "keeps" if len(others) == 1 else "keep"
        said.append(f"That cross entropy alone keeps its pull does not hold: {words(others)} {verb} it too.")
    if grows:
        strongest = "Nor is its pull the strongest: that" if others and "nll" in holds else "The pull"
        said.append(f"{strongest} of {words(grows)} grows without bound.")
    out = table[table.escape_steps < math.inf].sort_values("escape_steps")
    if len(out):
        steps = [f"{row.loss} {row.escape_steps:.0f}" for row in out.itertuples()]
        said.append(f"Steps out of a confidently wrong start, each at its best rate: {words(steps)}.")
    stuck = table[table.escape_steps == math.inf]
    astray = stuck.calibrated.map(lambda x: x is False)
    unsettled = stuck.calibrated.map(lambda x: x not in (True, False))
    inside = stuck.loss[~astray & ~unsettled]
    if len(inside):
        said.append(f"At no rate that was tried did {words(list(inside))} get out.")
    if astray.any():
        said.append(
            f"At no rate that was tried did {words(list(stuck.loss[astray]))} come to 95% of the best accuracy and stay. Not "
            "calibrated, such a loss may have its own optimum below that, and may have got out."
        )
    if unsettled.any():
        said.append(
            f"At no rate that was tried did {words(list(stuck.loss[unsettled]))} come to 95% of the best accuracy and stay. "
            "Whether it is calibrated is not settled: `xentlab audit` says why."
        )
    return said


def _combination(table: pd.DataFrame) -> list[str]:
    settled = table[["lipschitz", "convex", "strictly_proper", "local"]].map(lambda x: x != "undecided").all(axis=1)
    table = table[settled & table.low_p_even.notna() & table.low_p_one.notna()]
    if len(table) < 2:  # nothing to compare
        return []
    alive = (table.low_p_even > 0) & (table.low_p_one > 0)
    true = lambda column: table[column].map(lambda x: x is True)
    has = {
        "does not vanish at low p": alive,
        "has a bounded gradient": true("lipschitz"),
        "is convex in the logits": true("convex"),
        "is strictly proper": true("strictly_proper"),
        "is local": true("local"),
    }
    whole = list(table.loss[[all(each) for each in zip(*has.values(), strict=True)]])
    together = words(list(has))
    if whole == ["nll"]:
        alone = [name for name, each in has.items() if each.sum() == 1]
        shared = "Each of these it shares with others" if not alone else f"It alone {words(alone)}"
        if 0 < len(alone) < len(has):
            shared += "; the rest it shares with others"
        return [f"What cross entropy alone on this board combines: it {together}. {shared}."]
    if not whole:
        return [f"No loss on this board has all of this: that it {together}."]
    return [f"On this board {words(whole)} {'has' if len(whole) == 1 else 'have'} all of this: {together}."]
