"""What the numbers say, in plain words. Every sentence is made from the frames; none is there beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

LOW = 1e-6  # where "at low probability" is read off
HIGHER = 1e-3  # and where a limit is told from a trend
ROUNDING = 2.0**-20  # eight steps of float32: means over tokens that differ by less, relative to them, are equal
SLIGHT = 0.01  # a power of p that is none: what has a greater one goes to 0, however slowly
SLOW = 0.25  # a power of p by which a pull is still felt where it is read off: 1 / log(1/p) looks like one of .07
CHANCE = 50.0  # nats beyond the known law that no honest prediction has but with a probability of e^-50
ENOUGH = 30  # test tokens that a mean over them is quoted of


def words(items: Sequence[str]) -> str:
    """A list in a sentence.

    >>> words(["a", "b", "c"])
    'a, b and c'
    """
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def number(x: float) -> str:
    """Three digits, and plain where plain is short.

    >>> number(0.99996), number(1e6), number(2.47e-6)
    ('1', '1,000,000', '2.47e-06')
    """
    if x and not 1e-3 <= abs(x) < 1e7:
        return f"{x:.3g}"
    return f"{float(f'{x:.3g}'):,.10g}"


def _at(profiles: pd.DataFrame, rivals: str, p: float, column: str) -> dict[str, float]:
    rows = profiles[profiles.rivals == rivals]
    nearest = rows.p[(rows.p / p).map(math.log).abs().idxmin()] if not rows.empty else p
    rows = rows[rows.p == nearest]
    return dict(zip(rows.loss, rows[column].abs(), strict=True))


def _order(low: float, higher: float) -> float:
    """The power of p that a pull goes with between `HIGHER` and `LOW`: 0 where it holds."""
    if not low or math.isinf(low) or not higher:
        return -math.inf if low else math.inf
    return math.log(low / higher) / math.log(LOW / HIGHER)


def gradients(profiles: pd.DataFrame) -> list[str]:
    """Which losses still teach at low probability, in the logit and in the probability."""
    low, higher = (_at(profiles, "even", p, "dvalue_dlogit") for p in (LOW, HIGHER))
    kinds: dict[str, list[str]] = {"falls": [], "fades": [], "grows": [], "holds": []}
    no_number = [name for name, size in low.items() if math.isnan(size)]
    for name, size in low.items():
        if name in no_number:
            continue
        order = _order(size, higher[name])
        kind = "falls" if order > SLOW else "fades" if order > SLIGHT else "grows" if order < -SLIGHT else "holds"
        kinds[kind].append(f"{name} ({number(size)})")
    said = []
    if kinds["holds"]:
        said.append(f"it holds for {words(kinds['holds'])}")
    if kinds["falls"]:
        said.append(f"goes to 0 with p for {words(kinds['falls'])}")
    if kinds["fades"]:
        said.append(f"falls slowly with p for {words(kinds['fades'])}")
    if kinds["grows"]:
        said.append(f"still grows for {words(kinds['grows'])}")
    if no_number:
        said.append(f"is no number for {words(no_number)}")
    sentences = [f"The pull on the target's logit when the right token had p = {LOW:g}: {'; '.join(said)}."]
    in_p = _at(profiles, "even", LOW, "dvalue_dp")
    if "nll" in low:
        # In p too: from one to the other is a factor that all losses share.
        stronger = [name for name, size in low.items() if size > 1.01 * low["nll"]]
        clause = (
            f"nll's slope in p is {number(in_p['nll'])} there, which is 1/p and explodes; in the logit it is "
            f"{number(low['nll'])}, which is 1 − p and cannot pass 1."
        )
        if stronger:
            pulls = "pulls" if len(stronger) == 1 else "pull"
            clause += " “Cross entropy has the strongest gradient” is therefore not true here: "
            clause += f"{words(stronger)} {pulls} harder, in p too."
        equal = [n for n, size in low.items() if n != "nll" and abs(size / low["nll"] - 1) <= 0.01]
        if equal:
            clause += f" {words(equal)} {'pulls' if len(equal) == 1 else 'pull'} just as hard."
        sentences.append(clause)
    one = _at(profiles, "one", LOW, "dvalue_dlogit")
    apart = [
        f"{name} ({number(low[name])} against {number(one[name])})"
        for name in low
        if name in one and max(low[name], one[name]) > 1e-3 and not 0.8 < low[name] / max(one[name], 1e-300) < 1.25
    ]
    if apart:
        sentences.append(
            f"How p became small matters for {words(apart)}: the first figure is for a target logit that fell, "
            "the second for one rival that rose."
        )
    return sentences


def budgets(frame: pd.DataFrame, edge: float = 0.1) -> list[str]:
    """How much of a real batch's gradient goes to the tokens that the model thought unlikely."""
    sentences = []
    for source, rows in frame.groupby("source", sort=False):
        below = rows[rows.p_high <= edge]
        unlikely = below.groupby("loss", sort=False)[["share_of_tokens", "share_of_gradient"]].sum()
        if unlikely.empty:
            continue
        # Of a loss that is no number no bin has a share.
        shares = unlikely.share_of_gradient[rows.groupby("loss").share_of_gradient.sum() > 0].sort_values(ascending=False)
        if shares.empty:
            continue
        if not unlikely.share_of_tokens.iloc[0] > 0:
            sentences.append(f"On {source} no token had p below {below.p_high.max():g}.")
            continue
        most, least = shares.index[0], shares.index[-1]
        sentence = (
            f"On {source}, {unlikely.share_of_tokens.iloc[0]:.0%} of the tokens had p below {below.p_high.max():g}. "
            f"They get {shares.iloc[0]:.0%} of {most}'s gradient"
        )
        if most != least:
            sentence += f" and {shares.iloc[-1]:.0%} of {least}'s"
        if "nll" in shares.index and "nll" not in (most, least):
            sentence += f" (nll: {shares['nll']:.0%})"
        sentences.append(sentence + ".")
    return sentences


def races(table: pd.DataFrame, curves: pd.DataFrame | None = None) -> list[str]:
    """Who has the least mean test NLL, and what fell short in the race itself; `pairs` says what the seeds tell apart.

    curves: those of the same races, which tell how many rates were tried.
    """
    sentences, tried = [], {} if curves is None else curves.groupby("source").rate.nunique().to_dict()
    for source, rows in table.groupby("source", sort=False):
        one_rate = tried.get(source) == 1
        ranked = rows.dropna(subset=["test_nll"]).sort_values("test_nll")
        if gone := list(rows[rows.best_rate.isna()].loss):
            who = "every loss" if len(gone) == len(rows) > 1 else words(gone)
            sentences.append(
                f"On {source} {who} diverged at every rate, which leaves nothing to test. Try smaller rates; of a loss that is "
                "no number from the start `xentlab audit` says where."
            )
        guesses = rows[rows.test_nll > rows.uniform_nll - 0.01]
        sentences += _no_better(source, guesses, one_rate)
        if ranked.empty:
            continue
        first = ranked.iloc[0]
        least, most = (_equal(ranked, end) for end in (first.test_nll, ranked.test_nll.iloc[-1]))
        whose = f"least test NLL is {_of(least)}," if len(least) < len(ranked) else f"test NLL of {words(least)} is"
        sentence = f"On {source} the {whose} {first.test_nll:.3f} nats a token"
        if first.bits_per_byte == first.bits_per_byte:
            sentence += f" ({first.bits_per_byte:.2f} bits a byte)"
        if "nll" in set(ranked.loss) - set(least):
            behind = ranked.set_index("loss").test_nll["nll"] - first.test_nll
            sentence += f"; nll itself is {seen(behind)} behind"
        if most != least and (most != ["nll"] or len(ranked) > 2):
            low, high = first.test_nll, ranked.test_nll.iloc[-1]
            by = f"by {seen(high - low)} more" if f"{low:.3f}" == f"{high:.3f}" else f"{high:.3f}"
            sentence += f". The most is {_of(most)}, {by}"
        sentences.append(sentence + ".")
        if one_rate:
            sentences.append(
                f"On {source} one rate was tried, {first.best_rate:g}, so no loss is tuned: compare them at several."
            )
        edge = list(rows[rows.rate_at_edge & ~rows.loss.isin(guesses.loss)].loss)
        if edge:
            sentences.append(
                f"On {source} the best rate tried lies at the end of the grid (⇥) for {words(edge)}: "
                "a better one may lie outside, so read their numbers as upper bounds."
            )
        diverged = [f"{r.loss} ({r.diverged})" for r in rows.itertuples() if r.diverged]
        if diverged:
            sentences.append(f"Runs that diverged on {source}: {words(diverged)}.")
        beyond = [f"{r.loss} (by {number(r.beyond_law)} nats in all)" for r in rows.itertuples() if r.beyond_law > CHANCE]
        if beyond:
            sentences.append(
                f"On {source} the test tokens cost less than the law that drew them asks, by more than chance gives: "
                f"{words(beyond)}. So does no prediction of what it has not seen: a model or a link of one's own reads what "
                "it is to predict, the test part is known to it, or the source's law is not the one that drew them."
            )
        smoothed = [f"{r.loss} ({r.smoothing:.2g})" for r in rows.itertuples() if r.smoothing > 1e-3]
        if smoothed:
            sentences.append(
                f"On {source} test NLL is of predictions mixed with a share of the uniform, the one that is best on "
                f"validation: {words(smoothed)}."
            )
    return sentences


def _equal(rows: pd.DataFrame, nll: float) -> list[str]:
    """The losses whose test NLL is this one but for rounding."""
    return [row.loss for row in rows.itertuples() if math.isclose(row.test_nll, nll, rel_tol=ROUNDING)]


def _of(names: list[str]) -> str:
    return words([f"{name}'s" for name in names])


def _no_better(source: str, guesses: pd.DataFrame, one_rate: bool) -> list[str]:
    """Of losses that ended no better than a uniform guess, or hardly, the likeliest cause."""

    def ended(rows):
        better = rows.test_nll < rows.uniform_nll
        who = words([f"{r.loss} ({r.test_nll:.3f})" if r.test_nll < r.uniform_nll else r.loss for r in rows.itertuples()])
        how = "hardly better" if better.all() else "no better, or hardly," if better.any() else "no better"
        return f"On {source} {who} ended {how} than a uniform guess, {rows.uniform_nll.iloc[0]:.3f} nats: "

    said, misread = [], guesses[guesses.tempered_nll < guesses.uniform_nll - 0.01]
    rest = guesses.drop(misread.index)
    if len(misread):
        cured = words([f"{r.loss} to {r.tempered_nll:.3f}" for r in misread.itertuples()])
        said.append(
            f"{ended(misread)}one temperature brings {cured}, so something was learnt, and is read too surely or too faintly: "
            "by a link that does not fit, or after too great a rate."
        )
    if "nll" in set(rest.loss):
        return [
            *said,
            f"{ended(rest)}with nll among them the race was too short, its rates do not suit, its targets are noise, or "
            "nothing can be learnt from that source.",
        ]
    untuned = rest if one_rate else rest[rest.rate_at_edge]
    others = rest.drop(untuned.index)
    ask = "does it pull towards the target? `xentlab audit` says where it does not."
    if len(untuned):
        why = "only one rate was tried" if one_rate else "the best rate tried lies at the end of the grid (⇥)"
        said.append(f"{ended(untuned)}{why}, so try others first. If they end there too: {ask}")
    if len(others):
        said.append(ended(others) + ask)
    return said


def seen(nats: float, sign: str = "") -> str:
    """To three digits after the point; what would be 0 there, and is not, to two of its own."""
    return f"{nats:{sign}.3f}" if nats == 0 or abs(nats) >= 5e-4 else f"{nats:{sign}.1e}"


def all_seen(*nats: float) -> list[str]:
    """With their signs, all in one notation, by powers of ten where one is small, and to digits that tell unlike ones apart.

    >>> all_seen(0.1, 0.2), all_seen(0.1588, 0.1585, 0.159), all_seen(0.1, 0.0002)
    (['+0.100', '+0.200'], ['+0.1588', '+0.1585', '+0.1590'], ['+1.0e-01', '+2.0e-04'])
    """
    kind = "e" if any(0 < abs(each) < 5e-4 for each in nats) else "f"
    for digits in range(1 if kind == "e" else 3, 8):
        shown = [f"{each:+.{digits}{kind}}" for each in nats]
        if len(set(shown)) == len(set(nats)):
            break
    return shown


def pairs(frame: pd.DataFrame) -> list[str]:
    """How each loss stands to the one it is compared with, seed by seed: ahead, behind, or not told from it."""
    sentences = []
    if alone := [source for source, here in frame.groupby("source", sort=False) if here.seeds.max() == 1]:
        sentences.append(f"On {words(alone)} each loss has one seed, which tells none from another: take more.")
    for source, here in frame[frame.seeds > 1].groupby("source", sort=False):
        tests, tempered = (here[here.metric == metric] for metric in ("test_nll", "tempered_nll"))
        against = here.against.iloc[0]
        if len(tests):
            over = " to ".join(dict.fromkeys(str(seeds) for seeds in (tests.seeds.min(), tests.seeds.max())))
            sentences.append(
                f"On {source} test NLL against {against}'s, seed by seed, in nats with intervals of 95% over {over} seeds: "
                f"{_standing(tests, _with_interval)}."
            )
        if len(tests) > 1:
            sentences.append(
                f"On {source} these are {len(tests)} intervals: where nothing differs, one in twenty still says that it does."
            )
        if len(tempered):
            sentences.append(
                f"On {source}, each after a temperature of its own, at the rate that was best without one, against {against}: "
                f"{_standing(tempered, _alone)}."
            )
    return sentences


def _standing(rows: pd.DataFrame, told: Callable[[Any], str]) -> str:
    """Losses by how they stand to the one they are compared with, each as `told` has it."""
    rows, apart = rows.sort_values("difference"), rows.tells_apart.astype(bool)
    kinds = {
        "ahead of it": apart & (rows.difference < 0),
        "not told from it": ~apart,
        "behind it": apart & (rows.difference > 0),
    }
    chosen = {kind: rows[which[rows.index]] for kind, which in kinds.items()}
    return "; ".join(f"{kind} {words([told(row) for row in each.itertuples()])}" for kind, each in chosen.items() if len(each))


def _alone(row: Any) -> str:
    return f"{row.loss} ({seen(row.difference, '+')})"


def _with_interval(row: Any) -> str:
    if math.isnan(row.low):
        return f"{row.loss} (an infinite test NLL leaves no interval)"
    difference, low, high = all_seen(row.difference, row.low, row.high)
    why = covered(row)
    return f"{row.loss} ({difference}, [{low}, {high}]{why and ', which ' + why})"


def covered(row: Any) -> str:
    """Why an interval tells nothing apart, or nothing if it does."""
    return "" if row.tells_apart else "covers 0" if row.low <= 0 <= row.high else "is float32's rounding"


def temperatures(table: pd.DataFrame) -> list[str]:
    """What one temperature, fitted on validation, makes of each loss's predictions."""
    sentences = []
    for source, rows in table.groupby("source", sort=False):
        rows = rows.dropna(subset=["test_nll"]).assign(gain=rows.test_nll - rows.tempered_nll).sort_values("gain")
        told = lambda r: f"{r.loss} ({r.test_nll:.3f} to {r.tempered_nll:.3f} nats at {r.temperature:.2g}{_tried(r)})"
        gained, lost = rows[rows.gain > 0.01].iloc[::-1], rows[rows.gain < -0.01]
        if len(gained):
            helped = words([told(row) for row in gained.itertuples()])
            sentences.append(f"On {source} one temperature, fitted on validation, helps {helped}.")
        if len(lost):  # what is best on validation need not be on test
            sentences.append(f"On {source} that temperature costs {words([told(row) for row in lost.itertuples()])} on test.")
        rest = list(rows.loss[rows.gain.abs() <= 0.01])
        if rest:
            sentences.append(f"On {source} one temperature changes the test NLL of {words(rest)} by no more than .01.")
    return sentences


def _tried(row: Any) -> str:
    return ", a seed at the end of what is tried" if row.temperature_at_edge else ""


def _costs(means: pd.Series) -> str:
    """The least and the most of the losses' means, and whose; neither where they print alike."""
    low, high = f"{means.min():.2f}", f"{means.max():.2f}"
    least, most = (words([name for name, mean in means.items() if f"{mean:.2f}" == end]) for end in (low, high))
    return f"{low} nats by every loss" if low == high else f"from {low} ({least}) to {high} nats ({most})"


def rarity(frequency: pd.DataFrame) -> list[str]:
    """How far the losses lie apart on rare tokens and on frequent ones."""
    sentences = []
    for source, here in frequency.groupby("source", sort=False):
        bins = here.drop_duplicates("count_low").sort_values("count_low")[["count_low", "count_high", "tokens"]]
        enough = bins.tokens.cumsum() >= ENOUGH
        if here.loss.nunique() < 2 or enough.sum() < 2 or bins.tokens.iloc[-1] < ENOUGH:
            continue
        low, tokens = int(bins.count_high[enough].iloc[0]), bins.tokens.cumsum()[enough].iloc[0]  # the rarest, pooled
        few = here[here.count_high <= low]
        summed = (few.test_nll * few.tokens).groupby(few.loss).sum()
        rare = summed / few.tokens.groupby(few.loss).sum()
        most = here[here.count_low == bins.count_low.iloc[-1]]
        frequent = most.groupby("loss").test_nll.mean()
        seen = "never occur" if low == 0 else f"occur at most {low:,} times"
        sentences.append(
            f"On {source} tokens that {seen} in the training part ({tokens:,} of the test's) cost {_costs(rare)}; those that "
            f"occur {int(bins.count_low.iloc[-1]):,} times and up, {_costs(frequent)}."
        )
    return sentences
