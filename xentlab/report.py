"""The main job: profiles, budgets and a small race, and one page that holds them and needs no network."""

from __future__ import annotations

import base64
import dataclasses
import html
import importlib.resources
import json
import pathlib
import re
import string
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

import xentlab.runs as runs
from xentlab.catalogue import resolve_all
from xentlab.contract import Loss, facts_of
from xentlab.gradients import PATHS, gradient_budget, gradient_profile
from xentlab.models import logits
from xentlab.race import race
from xentlab.sources import MarkovSource, Source, Text
from xentlab.training import Recipe, train, windows

if TYPE_CHECKING:
    import pandas as pd

REPORT_LOSSES = ("nll", "brier", "mse_logits", "hinge", "focal", "generalized_cross_entropy", "entmax15")
PROFILE_VOCAB = 16
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One race of the report: a source, the model that fits it, and the rates that the model's losses may need."""

    source: Source
    model: str
    learning_rates: tuple[float, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report found, as tidy frames, and where it wrote them."""

    folder: pathlib.Path
    profiles: pd.DataFrame
    budgets: pd.DataFrame
    curves: pd.DataFrame
    table: pd.DataFrame
    reading: dict[str, list[str]]


def stages(text: Text, seed: int, quick: bool) -> list[Stage]:
    """The report's two races: real text, and a chain whose law is known."""
    markov = MarkovSource(seed=seed, tokens=20_000 if quick else 200_000)
    if quick:
        return [
            Stage(text, "mlp(context=2, width=8, inner=16, features=16)", (0.01,), 12),
            Stage(markov, "bigram", (0.1,), 12),
        ]
    return [
        Stage(text, "mlp(context=6, width=24, inner=96, features=48)", (1e-3, 4e-3, 1.6e-2, 6.4e-2), 160),
        Stage(markov, "bigram", (1e-2, 4e-2, 0.16, 0.64), 240),
    ]


def profile_points() -> np.ndarray:
    """Probabilities from 1e-12 to 0.99: four a decade, and closer where p is near 1."""
    return np.concatenate([np.logspace(-12, -1, 45), [0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]])


def make_report(
    losses: Iterable[str | Loss] = REPORT_LOSSES,
    text: Text | None = None,
    out: str | pathlib.Path | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compares losses by profiles, budgets and races on a text and on a Markov chain, and writes a run folder.

    The folder (`out`, or runs/report-<time>) gets run.json, profiles.csv, budgets.csv, curves.csv, table.csv, a PNG of
    each figure, and report.html, one file that opens without any network. quick: tiny races, to see that all works.
    """
    import pandas as pd

    from xentlab import reading

    begun = time.perf_counter()
    found = resolve_all(losses)
    text = text or Text()
    plan = stages(text, seed, quick)
    folder = runs.new_folder("report", out)
    tell = progress or (lambda *_: None)
    seeds = (seed, seed + 1) if quick else (seed, seed + 1, seed + 2)

    tell("profiles", 0, 1)
    profiles = pd.concat(
        [gradient_profile(found.values(), profile_points(), PROFILE_VOCAB, path) for path in PATHS], ignore_index=True
    )
    tell("profiles", 1, 1)
    budgets, curves, tables = [], [], []
    for stage in plan:
        name = stage.source.name
        tell(f"{name}: budget", 0, 1)
        budget = gradient_budget(found.values(), *_held_out_predictions(stage, seed))
        budgets.append(budget.assign(source=name)[["source", *budget.columns]])
        tell(f"{name}: budget", 1, 1)
        result = race(
            found.values(),
            stage.source,
            stage.model,
            stage.learning_rates,
            seeds,
            stage.steps,
            progress=lambda loss, done, total, name=name: tell(f"{name}: {loss}", done, total),
            blocks=4 if quick else 16,
        )
        curves.append(result.curves)
        tables.append(result.table)
    budgets, curves, table = (pd.concat(parts, ignore_index=True) for parts in (budgets, curves, tables))

    tell("pages and pictures", 0, 1)
    for name, frame in (("profiles", profiles), ("budgets", budgets), ("curves", curves), ("table", table)):
        runs.write_frame(folder, name, frame)
    said = {"headline": reading.gradients(profiles), "budgets": reading.budgets(budgets), "curves": reading.races(table)}
    arguments = {"losses": list(found), "seed": seed, "seeds": seeds, "quick": quick}
    made = runs.record(
        arguments,
        [stage.source.describe() for stage in plan],
        time.perf_counter() - begun,
        races=[{"source": s.source.name, "model": s.model, "rates": s.learning_rates, "steps": s.steps} for s in plan],
        reading=said,
    )
    report = Report(folder, profiles, budgets, curves, table, said)
    _write_pictures(report, list(found))
    runs.write_bytes(folder / "report.html", page(report, found, made).encode())
    made["seconds"] = round(time.perf_counter() - begun, 2)
    runs.write_record(folder, made)
    tell("pages and pictures", 1, 1)
    return report


def _held_out_predictions(stage: Stage, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets on validation text, of a model that nll trained for half of the race: right on much, not on all."""
    from xentlab import LOSSES

    recipe = Recipe(steps=max(1, stage.steps // 2), blocks=1)
    rate = stage.learning_rates[len(stage.learning_rates) // 2]
    model = train(LOSSES["nll"], stage.source, stage.model, [rate], [seed], recipe).model(0)
    held_out = jnp.asarray(windows(stage.source.split("validation"), recipe.window, recipe.validation_tokens))
    return np.asarray(jax.jit(lambda tokens: logits(model, tokens))(held_out[:, :-1])), np.asarray(held_out[:, 1:])


def figures(report: Report, losses: list[str], legend: bool = False) -> dict[str, list]:
    """The report's charts by figure: headline, budgets, curves, sweep."""
    from xentlab import charts

    sources = list(dict.fromkeys(report.table.source))
    return {
        "headline": [charts.profile(report.profiles, losses, space, path, legend) for path in PATHS for space in charts.SPACES],
        "budgets": [
            charts.budget(report.budgets[report.budgets.source == source], losses, f"Budget on {source}", legend)
            for source in sources
        ],
        "curves": [charts.curves(report.curves, report.table, losses, source, legend) for source in sources],
        "sweep": [charts.sweep(report.curves[report.curves.source == source], losses, source, legend) for source in sources],
    }


def _write_pictures(report: Report, losses: list[str]) -> None:
    from xentlab import charts

    for name, panels in figures(report, losses, legend=True).items():
        charts.write_png(charts.grid(panels), report.folder / f"{name}.png")


CAPTIONS = {
    "headline": (
        "What a loss teaches at each probability",
        "How hard each loss pulls when the right token had probability p: on the left in the logit, which is what a network "
        "moves; on the right in the probability. Where lines coincide, each shows as a rim around the next. Above: the "
        f"target's own logit falls. Below: one rival rises, which it can only do for p below 1/{PROFILE_VOCAB - 1}.",
        "profiles",
    ),
    "budgets": (
        "Where a real batch's gradient goes",
        "A half-trained model's predictions on held-out tokens, sorted by the probability that it gave the right one. "
        "Every loss sees the same predictions; the lines say which tokens it would learn from.",
        "budgets",
    ),
    "curves": (
        "How each loss trains",
        "The same model, tokens and seeds for every loss, each at its own best learning rate, scored by likelihood through "
        "its own link.",
        "curves",
    ),
    "sweep": (
        "Each loss at every learning rate",
        "Rates are tuned for each loss: the best for one may be far from the best for another.",
        "curves",
    ),
}
TABLE_COLUMNS = {
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


def page(report: Report, losses: dict[str, Loss], made: dict) -> str:
    """The report as one HTML file: charts with their data, scripts and styles inside."""
    import vl_convert

    from xentlab import charts

    names = list(losses)
    sections, specs = [], {}
    for figure, panels in figures(report, names).items():
        title, caption, data = CAPTIONS[figure]
        slots = []
        for i, chart in enumerate(panels):
            key = f"{figure}-{i}"
            chart = chart.properties(width="container", height=270)
            specs[key] = chart.to_dict()
            slots.append(f'<figure class="chart" id="{key}" aria-label="{html.escape(title)}, panel {i + 1}"></figure>')
        sections.append(
            f'<section id="{figure}"><h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>'
            f"{_sentences(report.reading.get(figure, []))}"
            f'<div class="panels">{"".join(slots)}</div>{_download(report.folder, data)}</section>'
        )
    bundle = vl_convert.javascript_bundle(vl_version=charts.vegalite_version())
    looks = {name: {"hue": hue, "dash": dash} for name, (hue, dash) in charts.look(names).items()}
    template = string.Template(importlib.resources.files("xentlab").joinpath("page.html").read_text())
    return template.substitute(
        quick='<p class="note">A quick run: the races are too short to mean anything.</p>'
        if made["arguments"]["quick"]
        else "",
        sections="".join(sections),
        tables=_tables(report.table) + _download(report.folder, "table"),
        formulas="".join(_formula(name, loss) for name, loss in losses.items()),
        record=html.escape(json.dumps(made, indent=2, default=str)),
        bundle=_code_in_script(bundle),
        specs=_json_in_script(specs),
        looks=_json_in_script(looks),
    )


def _json_in_script(content: dict) -> str:
    """JSON that may stand inside a script element, whatever names a user gave."""
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _code_in_script(code: str) -> str:
    """Code that may stand inside a script element: only `</script` would end it. (`</` alone also occurs in /</g.)"""
    return re.sub(r"</(script)", r"<\\/\1", code, flags=re.IGNORECASE)


def _sentences(sentences: list[str]) -> str:
    if not sentences:
        return ""
    return f'<ul class="reading">{"".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)}</ul>'


def _download(folder: pathlib.Path, name: str) -> str:
    content = base64.b64encode((folder / f"{name}.csv").read_bytes()).decode()
    return f'<p class="data"><a download="{name}.csv" href="data:text/csv;base64,{content}">Download {name}.csv</a></p>'


def _formula(name: str, loss: Loss) -> str:
    facts = facts_of(loss)
    source = html.escape(facts.source or "a loss of yours: no source is named")
    link = html.escape(facts.link_name)
    formula = _math(facts.formula) + "; " if facts.formula else ""
    return f"<dt>{html.escape(name)}</dt><dd>{formula}read through {link}. {source}.</dd>"


def _math(latex: str) -> str:
    """A formula as MathML, which browsers draw by themselves; as it was written, where it cannot be converted."""
    from latex2mathml.converter import convert

    try:
        return convert(latex)
    except Exception:  # a user's formula is shown as it stands rather than lost with the page
        return f"<code>{html.escape(latex)}</code>"


def _tables(table: pd.DataFrame) -> str:
    parts = []
    for source, rows in table.groupby("source", sort=False):
        shown = [c for c in TABLE_COLUMNS if not rows[c].isna().all()]
        head = "".join(f'<th scope="col">{html.escape(TABLE_COLUMNS[c])}</th>' for c in shown)
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
