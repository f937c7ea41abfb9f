"""The tour as one page, and as a run folder."""

from __future__ import annotations

import html
import json
import pathlib
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xentlab.runs as runs
from xentlab.defaults import Progress, quiet
from xentlab.markup import scroll, sentences_list
from xentlab.pages import fill, json_in_script
from xentlab.tour.station import Check, Figure, Station, check_rows, write_stations
from xentlab.tour.walk import Walked, walk

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("what", "measured", "expected", "tolerance", "holds")
RELATIONS = {"equal": "", "at least": "≥ ", "at most": "≤ "}


def make_tour(
    out: str | pathlib.Path | None = None,
    quick: bool = False,
    progress: Progress = quiet,
) -> tuple[pathlib.Path, list[Walked]]:
    """Runs every experiment and writes tour.html, tour.json, frames, pictures and run.json: (the folder, what was run).

    tour.json: a list of {claim, what, expected, relation, measured, tolerance, pass}. quick: small sizes for slow parts.
    """
    begun = time.perf_counter()
    folder = runs.new_folder("tour", out)
    walked = walk(quick, progress)
    stations = [station for each in walked for station in each.stations]
    arguments = {"quick": quick}
    experiments = [
        {
            "name": each.name,
            "question": each.question,
            "seconds": round(each.seconds, 1),
            "claims": [station.claim for station in each.stations],
            "titles": [station.title for station in each.stations],
            "found": [station.found for station in each.stations],
            "loose": [station.loose for station in each.stations],
        }
        for each in walked
    ]
    made = runs.record(arguments, [], time.perf_counter() - begun, kind="tour", experiments=experiments)
    with runs.replacing(folder) as staged:
        write_stations(stations, staged)
        runs.write_bytes(staged / "tour.json", json.dumps(as_json(check_rows(stations)), indent=1).encode())
        runs.write_bytes(staged / "tour.html", page(walked, made).encode())
        runs.write_record(staged, made)
    return folder, walked


def as_json(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that strict JSON can hold: NaN is null, infinities are "∞" and "-∞"."""
    return json.loads(json_in_script(list(rows)))


def page(walked: Sequence[Walked], made: dict[str, Any]) -> str:
    """The walk as one HTML file that needs no network."""
    stations = [(each, station) for each in walked for station in each.stations]
    specs, sliders, sections = {}, {}, []
    for i, (each, station) in enumerate(stations):
        after = stations[i + 1][1] if i + 1 < len(stations) else None
        sections.append(_station(each, station, after, specs, sliders))
    checks = [check for _, station in stations for check in station.checks]
    held, passed = sum(station.passed for _, station in stations), sum(check.passed for check in checks)
    summary = (
        f"{held} of {len(stations)} stations hold: {passed} of {len(checks)} numbers are what they must be, each within the "
        f"tolerance beside it. It took {made['seconds']:.0f} seconds on {made['device']['kind']}."
    )
    contents = "".join(
        f'<li><a href="#claim-{s.claim}"><span>{s.claim}</span><span>{html.escape(s.title)}</span>{_mark(s.passed)}</a></li>'
        for _, s in stations
    )
    own = _own_charts()
    specs |= own
    return fill(
        "tour",
        specs,
        count=str(len(stations)),
        contents=contents + '<li><a href="#own"><span></span><span>A loss of your own</span></a></li>',
        summary=html.escape(summary),
        quick='<p class="note">A quick walk: the slow experiments are too short to mean much.</p>'
        if made["arguments"]["quick"]
        else "",
        stations="".join(sections),
        own="".join(f'<div class="chart" id="{key}" role="group" aria-label="{_said(key)}"></div>' for key in own),
        sliders=json_in_script(sliders),
        formula=_script("formula.js"),
        record=html.escape(json.dumps(made, indent=2, default=str)),
    )


def _script(name: str) -> str:
    import importlib.resources

    return importlib.resources.files("xentlab.pages").joinpath(name).read_text().removeprefix('"use strict";\n')


def _mark(passed: bool) -> str:
    name, word, sign = ("pass", "holds", "✓") if passed else ("fail", "fails", "✗")
    return f'<span class="{name}" role="img" aria-label="{word}">{sign}</span>'


def _station(each: Walked, station: Station, after: Station | None, specs: dict, sliders: dict) -> str:
    key = f"claim-{station.claim}"
    text = {name: html.escape(getattr(station, name)) for name in ("title", "told", "found", "loose")}
    figures = "".join(_figure(f"{key}-{i}", figure, station, specs, sliders) for i, figure in enumerate(station.figures))
    rows = "".join(_check(check) for check in station.checks)
    tables = "".join(f"<h3>{html.escape(title)}</h3>{_frame(frame, title)}" for title, frame in station.tables.items())
    onward = (f"#claim-{after.claim}", html.escape(after.title)) if after else ("#own", "a loss of your own")
    return (
        f'<section class="station" id="{key}" aria-labelledby="{key}-title"><p class="number">Claim {station.claim}, '
        f"whose numbers {'hold' if station.passed else 'do not all hold'} {_mark(station.passed)}</p>"
        f'<h2 id="{key}-title">{text["title"]}</h2>'
        f'<p class="told">As it is told: {text["told"]}</p>{_found(station.found)}{figures}'
        f"{scroll(COLUMNS, rows, f'Claim {station.claim}: measured beside expected')}{tables}"
        f'<p class="loose"><b>Where the telling is loose</b>{text["loose"]}</p>'
        f"<details><summary>The code that made it: <code>python experiments/{each.name}.py</code></summary>"
        f'<pre tabindex="0" role="region" aria-label="Code of {each.name}">{html.escape(each.code)}</pre></details>'
        f'<p class="next"><span></span><a href="{onward[0]}">Next: {onward[1]} →</a></p></section>'
    )


def _found(found: str) -> str:
    lines = found.splitlines()
    return f"<p>{html.escape(found)}</p>" if len(lines) == 1 else sentences_list(lines)


def _check(check: Check) -> str:
    tolerance = f"{check.tolerance:.2g}" if check.tolerance else "–"
    return (
        f'<tr><th scope="row">{html.escape(check.what)}</th><td>{_number(check.measured)}</td>'
        f"<td>{RELATIONS[check.relation]}{_number(check.expected)}</td><td>{tolerance}</td><td>{_mark(check.passed)}</td></tr>"
    )


def _frame(frame: pd.DataFrame, label: str) -> str:
    cell = lambda value: html.escape(value) if isinstance(value, str) else _number(value)
    row = lambda first, *rest: (
        f'<tr><th scope="row">{cell(first)}</th>{"".join(f"<td>{cell(each)}</td>" for each in rest)}</tr>'
    )
    return scroll(
        [name.replace("_", " ") for name in frame.columns],
        "".join(row(*values) for values in frame.itertuples(index=False)),
        label,
    )


def _number(value: float) -> str:
    value = float(value)
    if value != value:
        return "NaN"
    return "∞" if value == float("inf") else f"{value:.6g}".replace("-", "−", 1) if value < 0 else f"{value:.6g}"


def _figure(key: str, figure: Figure, station: Station, specs: dict, sliders: dict) -> str:
    slots, names = [], []
    for i, chart in enumerate(figure.charts):
        names.append(name := f"{key}-chart-{i}")
        specs[name] = spec = chart.properties(width="container", height=260).to_dict()
        # As text of the page it wraps; inside a chart a long title would take the plot's width.
        head = "".join(f"<span>{html.escape(line)}</span>" for line in _without_title(spec))
        slots.append(f'<div class="framed"><p>{head}</p><div class="chart" id="{name}"></div></div>')
    one = " one" if len(slots) == 1 else ""
    control = ""
    if figure.slider:
        positions = figure.slider.positions
        columns = [column for column in positions.columns if column != "at"]
        by_place = positions.groupby("at", sort=True)
        # The first column that has one value a position names it; with several rows it stands beside the slider alone.
        named = next((column for column in columns if by_place[column].nunique().max() == 1), columns[0])
        columns.remove(named)
        columns = columns if by_place.size().max() > 1 else [named, *columns]
        groups = [rows[columns].values.tolist() for _, rows in by_place]
        sliders[key] = {"names": by_place[named].first().tolist(), "rows": groups, "charts": names}
        label = html.escape(figure.slider.label)
        said = f"{figure.words}: numbers at the chosen {figure.slider.label}"
        control = (
            f'<div class="slider"><label for="{key}-slider">{label}</label><input id="{key}-slider" type="range" min="0" '
            f'max="{len(groups) - 1}" step="1" value="{figure.slider.start}"><output for="{key}-slider"></output></div>'
            f'<div aria-live="polite">{scroll(columns, "", said)}</div>'
        )
    return (
        f'<figure id="{key}" aria-label="{html.escape(station.title)}: {html.escape(figure.words)}">'
        f'<div class="panels{one}">{"".join(slots)}</div>{control}</figure>'
    )


def _without_title(spec: dict) -> list[str]:
    """Takes the title off a chart, or off the layer that has it: its line, and the subtitle's, in one, if there is one."""
    title = spec.pop("title", "")
    text, under = (title, "") if isinstance(title, str) else (title["text"], title.get("subtitle", ""))
    lines = [text, under if isinstance(under, str) else "; ".join(under)]
    below = [line for layer in spec.get("layer", []) for line in _without_title(layer)]
    return [line for line in lines if line] or below


OWN = {"value": "the loss", "dp": "|dL/dp|, in the probability", "dz": "|∂L/∂z_y|, in the logit"}


def _said(key: str) -> str:
    return f"Your loss beside cross entropy: {OWN[key.removeprefix('own-')]}"


def _own_charts() -> dict[str, dict]:
    """Empty charts of the loss that a reader types, whose data the page makes."""
    import altair as alt

    specs = {}
    for column, title in OWN.items():
        y = alt.Y(f"{column}:Q", title=None)
        y = y if column == "value" else y.scale(type="log").axis(tickCount=6, format="~e")
        x = alt.X("p:Q", title="p").scale(type="log").axis(format="~e", tickCount=6)
        chart = alt.Chart(alt.NamedData("own"), title=title).mark_line(strokeWidth=2.5)
        color = alt.Color("loss:N", title=None).scale(domain=["cross entropy", "yours"])
        chart = chart.encode(
            x, y, color, strokeDash=alt.StrokeDash("loss:N", title=None).scale(domain=["cross entropy", "yours"])
        )
        specs[f"own-{column}"] = chart.properties(width="container", height=260).to_dict()
    return specs
