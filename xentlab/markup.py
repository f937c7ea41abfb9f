"""Frames and verdicts as HTML tables, for a page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xentlab.audit.numerics import DTYPES
from xentlab.console import LONG, half_interval, verdict_text
from xentlab.reading import all_seen, covered

if TYPE_CHECKING:
    import pandas as pd

    from xentlab.audit import Audit, Verdict

RACE_COLUMNS = {
    "loss": "loss",
    "best_rate": "best rate",
    "test_nll": "test NLL, nats",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "calibration_error": "calibration error",
    "kl_to_law": "KL to the law, nats",
    "temperature": "temperature",
    "tempered_nll": "NLL at it, nats",
    "smoothing": "smoothing",
    "diverged": "diverged",
}


def sentences_list(sentences: Sequence[str]) -> str:
    """Sentences as a list, or nothing."""
    if not sentences:
        return ""
    return f'<ul class="reading">{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>'


def scroll(names: Sequence[str], body: str, label: str) -> str:
    """A table that scrolls by itself where the page is narrow: its columns' names, and its rows as HTML."""
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def race_tables(table: pd.DataFrame) -> str:
    """A race's table for each source, best first."""
    parts = []
    for source, rows in table.groupby("source", sort=False):
        shown = [c for c in RACE_COLUMNS if not rows[c].isna().all()]
        body = ""
        for _, row in rows.sort_values("test_nll").iterrows():
            body += "<tr>" + "".join(_cell(row, c) for c in shown) + "</tr>"
        parts.append(
            f"<h3>{html.escape(str(source))}</h3>{scroll([RACE_COLUMNS[c] for c in shown], body, f'Races on {source}')}"
        )
    return "".join(parts)


def pairs_table(pairs: pd.DataFrame) -> str:
    """Each loss beside the one it is compared with, over seeds: the difference and its interval, raw and tempered."""
    rows = pairs[pairs.seeds > 1]
    if not len(rows):
        return ""
    # Where one has no test on a source, others stand beside another there.
    return "".join(_pairs_beside(str(against), part) for against, part in rows.groupby("against", sort=False))


def _pairs_beside(against: str, rows: pd.DataFrame) -> str:
    body = ""
    for (source, loss), both in rows.groupby(["source", "loss"], sort=False):
        cells = f'<th scope="row">{html.escape(str(loss))}</th><td>{html.escape(str(source))}</td>'
        for metric in dict.fromkeys(rows.metric):
            one = both[both.metric == metric].iloc[0]
            mean, low, high = all_seen(one.difference, one.low, one.high)
            interval = f"[{low}, {high}] {covered(one)}".rstrip()
            cells += f"<td>{mean} <small>{'no interval' if math.isnan(one.low) else interval}</small></td>"
        body += f"<tr>{cells}</tr>"
    title = f"Test NLL beside {html.escape(against)}'s, seed by seed"
    about = f"<h3>{title}</h3><p>Mean difference over seeds, and its 95% interval: the bootstrap's or, where it is wider, "
    about += "Student's t.</p>"
    return about + scroll(["loss", "source", "as trained, nats", "each at its temperature"], body, title)


def _cell(row: pd.Series, column: str) -> str:
    value = row[column]
    if column == "loss":
        return f'<th scope="row">{html.escape(value)}</th>'
    text = "–" if value != value else f"{value:g}" if column in ("best_rate", "diverged") else f"{value:.4g}"
    if column == "best_rate" and row["rate_at_edge"]:
        text += ' <abbr title="the end of the grid: a better rate may lie outside">⇥</abbr>'
    if spread := half_interval(row, column):
        text += f" <small>{spread}</small>"
    return f"<td>{text}</td>"


def _number(value: Any, form: str = ".3g") -> str:
    if isinstance(value, str):
        return html.escape(value)
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else format(value, form)


def scoreboard_tables(table: pd.DataFrame, codes: pd.DataFrame) -> str:
    """The four doors, a table each, every loss a row. A number that is no number is a dash; ∞ is an answer."""
    sources = list(dict.fromkeys(codes.source)) if len(codes) else []
    doors = {
        "Probability": (["tokens needed", "range", "simulated", "95% interval", "bias, nats"], _probability_cells),
        "Information": (
            [f"{what}, {source}" for source in sources for what in ("bits coded", "model's cross entropy")],
            lambda row: _information_cells(codes[codes.loss == row.loss], sources),
        ),
        "Numerics: worst error of value and of gradient": (
            [f"{dtype}, {what}" for dtype in DTYPES for what in ("value", "gradient")],
            _numerics_cells,
        ),
        "Optimisation": (
            ["pull left, even rivals", "pull left, one rival", "order in p", "steps to escape from −20 in logits", "at rate"],
            _optimisation_cells,
        ),
    }
    parts = []
    for door, (names, cells) in doors.items():
        if not names:
            continue
        body = "".join(
            f'<tr><th scope="row">{html.escape(row.loss)}</th>{"".join(f"<td>{cell}</td>" for cell in cells(row))}</tr>'
            for row in table.itertuples()
        )
        parts.append(f"<h3>{door}</h3>{scroll(['loss', *names], body, door)}")
    return "".join(parts)


def _range(low: float, high: float) -> str:
    return "–" if math.isnan(low) or low == high else f"{low:.3g} to {high:.3g}"


def _probability_cells(row: Any) -> list[str]:
    needed = [_number(row.tokens_needed), _range(row.tokens_needed_low, row.tokens_needed_high)]
    trial = [_number(row.simulated), _range(row.simulated_low, row.simulated_high)]
    return [*needed, *trial, "0" if row.bias < 1e-6 else _number(row.bias)]


def _information_cells(codes: pd.DataFrame, sources: Sequence[str]) -> list[str]:
    cells = []
    for source in sources:
        found = codes[codes.source == source]
        if not len(found):
            cells += ["–", "–"]
            continue
        one = found.iloc[0]
        byte = not math.isnan(one.bits_per_byte)
        size = one.bits_per_byte if byte else one.bits_per_token
        cells += [f"{size:.4f} a {'byte' if byte else 'token'}", f"{one.model_bits_per_token * size / one.bits_per_token:.4f}"]
    return cells


def _numerics_cells(row: Any) -> list[str]:
    cells = []
    for dtype in DTYPES:
        finite = getattr(row, f"finite_{dtype}")
        broken = "" if finite is True else ' <abbr title="not finite at extreme logits">✗</abbr>'
        broken = ' <abbr title="not settled: the audit says why">?</abbr>' if finite == "undecided" else broken
        cells += [
            _number(getattr(row, f"error_{dtype}"), ".1e") + broken,
            _number(getattr(row, f"gradient_error_{dtype}"), ".1e"),
        ]
    return cells


def _optimisation_cells(row: Any) -> list[str]:
    pull = [_number(row.low_p_even), _number(row.low_p_one), _number(row.low_p_order)]
    if math.isinf(row.escape_steps):
        return [*pull, "never", f"any up to {row.escape_tried:.0e}"]
    return [*pull, f"{row.escape_steps:.0f}", f"{row.escape_rate:.2g}"]


def audit_table(audits: Mapping[str, Audit]) -> str:
    """Every verdict of every loss; below it, each loss's evidence and witnesses, folded."""
    names = list(audits)
    verdicts = list(next(iter(audits.values())).verdicts)
    body = ""
    for verdict in (each for each in verdicts if each not in LONG):
        cells = "".join(f"<td>{html.escape(verdict_text(audits[n].verdicts[verdict].value))}</td>" for n in names)
        body += f'<tr><th scope="row">{verdict.replace("_", " ")}</th>{cells}</tr>'
    folded = "".join(
        f"<details><summary>{html.escape(name)}: evidence and witnesses</summary><dl>"
        + "".join(_verdict(verdict, found) for verdict, found in audits[name].verdicts.items())
        + "</dl></details>"
        for name in names
    )
    return scroll(["verdict", *names], body, "The audit") + folded


def _verdict(name: str, verdict: Verdict) -> str:
    witness = "".join(
        f"<li><b>{html.escape(str(key).replace('_', ' '))}</b>: {html.escape(_witness(value))}</li>"
        for key, value in (verdict.witness or {}).items()
    )
    witness = f'<ul class="witness">{witness}</ul>' if witness else ""
    said = html.escape(verdict_text(verdict.value))
    return f"<dt>{name.replace('_', ' ')}: {said}</dt><dd>{html.escape(verdict.evidence)}{witness}</dd>"


def _witness(value: Any) -> str:
    """Numbers to five digits: enough to check by hand, short enough to read."""
    if isinstance(value, list):
        return f"({', '.join(_witness(each) for each in value)})"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_witness(each)}" for key, each in value.items())
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value) if not isinstance(value, str) else value
