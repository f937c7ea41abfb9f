"""Frames and verdicts as HTML tables, for a page."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from xentlab.console import verdict_text

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
    "smoothing": "smoothing",
    "diverged": "diverged",
}


def sentences_list(sentences: Sequence[str]) -> str:
    """Sentences as a list, or nothing."""
    if not sentences:
        return ""
    return f'<ul class="reading">{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>'


def race_tables(table: pd.DataFrame) -> str:
    """A race's table for each source, best first."""
    parts = []
    for source, rows in table.groupby("source", sort=False):
        shown = [c for c in RACE_COLUMNS if not rows[c].isna().all()]
        head = "".join(f'<th scope="col">{html.escape(RACE_COLUMNS[c])}</th>' for c in shown)
        body = ""
        for _, row in rows.sort_values("test_nll").iterrows():
            body += "<tr>" + "".join(_cell(row, c) for c in shown) + "</tr>"
        parts.append(
            f"<h3>{html.escape(str(source))}</h3><div class='scroll' tabindex='0'><table>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
        )
    return "".join(parts)


def _cell(row: pd.Series, column: str) -> str:
    value = row[column]
    if column == "loss":
        return f'<th scope="row">{html.escape(value)}</th>'
    low, high = row.get(f"{column}_low"), row.get(f"{column}_high")
    text = "–" if value != value else f"{value:g}" if column in ("best_rate", "diverged") else f"{value:.4g}"
    if column == "best_rate" and row["rate_at_edge"]:
        text += ' <abbr title="the end of the grid: a better rate may lie outside">⇥</abbr>'
    if low is not None and low == low:
        text += f" <small>± {(high - low) / 2:.2g}</small>"
    return f"<td>{text}</td>"


def _number(value: Any, form: str = ".3g") -> str:
    if isinstance(value, str):
        return html.escape(value)
    if value is None or math.isnan(value):
        return "–"
    return "∞" if math.isinf(value) else format(value, form)


def _scroll(head: str, body: str, label: str) -> str:
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(label)}"><table>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def scoreboard_table(table: pd.DataFrame, codes: pd.DataFrame) -> str:
    """The four doors, every loss a row. A number that is no number is a dash; ∞ is an answer."""
    sources = list(dict.fromkeys(codes.source)) if len(codes) else []
    coded = codes.set_index(["source", "loss"]) if len(codes) else None
    doors = {
        "Probability": ["tokens needed", "simulated", "bias, nats"],
        "Information": [f"bits coded, {source}" for source in sources],
        "Numerics: worst error of value, gradient": ["float32", "bfloat16", "float16"],
        "Optimisation": ["pull left, even", "pull left, one rival", "order in p", "steps to escape"],
    }
    head = "<tr><td></td>" + "".join(
        f'<th scope="colgroup" colspan="{len(names)}">{html.escape(door)}</th>' for door, names in doors.items() if names
    )
    head += '</tr><tr><th scope="col">loss</th>'
    head += "".join(f'<th scope="col">{html.escape(name)}</th>' for names in doors.values() for name in names) + "</tr>"
    body = ""
    for row in table.itertuples():
        spread = f"<small>{row.tokens_needed_low:.3g}–{row.tokens_needed_high:.3g}</small>"
        trial = f"{_number(row.simulated)} <small>{_number(row.simulated_low)}–{_number(row.simulated_high)}</small>"
        cells = [
            "–" if math.isnan(row.tokens_needed) else f"{row.tokens_needed:.3g} {spread}",
            "–" if math.isnan(row.simulated) else trial,
            "0" if row.bias < 1e-6 else _number(row.bias),
        ]
        for source in sources:
            if (source, row.loss) not in coded.index:
                cells.append("–")
                continue
            one = coded.loc[(source, row.loss)]
            byte, unit = not math.isnan(one.bits_per_byte), "a token"
            size = one.bits_per_byte if byte else one.bits_per_token
            ideal = one.model_bits_per_token * size / one.bits_per_token
            cells.append(f"{size:.4f} {'a byte' if byte else unit} <small>model {ideal:.4f}</small>")
        for dtype in ("float32", "bfloat16", "float16"):
            pair = [_number(getattr(row, f"{kind}_{dtype}"), ".1e") for kind in ("error", "gradient_error")]
            broken = "" if getattr(row, f"finite_{dtype}") is True else ' <abbr title="not finite at extreme logits">✗</abbr>'
            cells.append(f"{pair[0]}, {pair[1]}{broken}")
        cells += [_number(row.low_p_even), _number(row.low_p_one), _number(row.low_p_order)]
        tried = f"never <small>rates to {row.escape_tried:.0e}</small>"
        cells.append(
            tried if math.isinf(row.escape_steps) else f"{row.escape_steps:.0f} <small>rate {row.escape_rate:.2g}</small>"
        )
        body += f'<tr><th scope="row">{html.escape(row.loss)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    return _scroll(head, body, "The scoreboard")


def audit_table(audits: Mapping[str, Audit]) -> str:
    """Every verdict of every loss; below it, each loss's evidence and witnesses, folded."""
    names = list(audits)
    verdicts = list(next(iter(audits.values())).verdicts)
    head = '<tr><th scope="col">verdict</th>' + "".join(f'<th scope="col">{html.escape(n)}</th>' for n in names) + "</tr>"
    short = [v for v in verdicts if not isinstance(audits[names[0]].verdicts[v].value, dict)]
    body = ""
    for verdict in short:
        cells = "".join(f"<td>{html.escape(verdict_text(audits[n].verdicts[verdict].value))}</td>" for n in names)
        body += f'<tr><th scope="row">{verdict.replace("_", " ")}</th>{cells}</tr>'
    folded = "".join(
        f"<details><summary>{html.escape(name)}: evidence and witnesses</summary><dl>"
        + "".join(_verdict(verdict, found) for verdict, found in audits[name].verdicts.items())
        + "</dl></details>"
        for name in names
    )
    return _scroll(head, body, "The audit") + folded


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
