"""The main job: profiles, budgets and a small race, and one page that holds them and needs no network."""

from __future__ import annotations

import base64
import dataclasses
import html
import inspect
import json
import pathlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import jax
import numpy as np

import xentlab.runs as runs
from xentlab import defaults
from xentlab.audit import as_json
from xentlab.catalogue import own_files, resolve_all
from xentlab.contract import Loss, facts_of, unwrapped
from xentlab.defaults import Progress, quiet
from xentlab.gradients import PATHS, gradient_budget, gradient_profile, profile_points
from xentlab.markup import audit_table, pairs_table, race_tables, scoreboard_tables, sentences_list
from xentlab.models import logits
from xentlab.pages import fill, json_in_script
from xentlab.program import windows
from xentlab.race import race
from xentlab.recipe import Recipe
from xentlab.scoreboard import REPLICATES, Scoreboard, scoreboard
from xentlab.scoreboard.reading import sentences
from xentlab.sources import Text
from xentlab.stages import Stage, StagedRace, run_stage, standard_stages

if TYPE_CHECKING:
    import pandas as pd

PROFILE_VOCAB = 16


@dataclasses.dataclass(frozen=True)
class Report:
    """What a report found, as tidy frames, and where it wrote them.

    raced: the frames of `results.Race`, of all sources. said: sentences, by the figure that they stand at.
    """

    folder: pathlib.Path
    profiles: pd.DataFrame
    budgets: pd.DataFrame
    raced: dict[str, pd.DataFrame]
    board: Scoreboard
    said: dict[str, list[str]]

    @property
    def table(self) -> pd.DataFrame:
        """The races' tables."""
        return self.raced["table"]


def make_report(
    losses: Iterable[str | Loss] = defaults.LOSSES,
    text: Text | None = None,
    out: str | pathlib.Path | None = None,
    seed: int = 0,
    quick: bool = False,
    progress: Progress = quiet,
) -> Report:
    """Compares losses by profiles, budgets and races on a text and on a Markov chain, and writes a run folder.

    The folder (`out`, or runs/report-<time>) gets run.json; as CSV profiles and budgets, the races' curves, table, tests,
    pairs, reliability and frequency, and the scoreboard and its codes; audits.json, a .coded file of each source and loss,
    a PNG of each figure, and report.html, one file that opens without any network. quick: tiny races, to see that all
    works.
    """
    begun = time.perf_counter()
    found = resolve_all(losses)
    files = own_files(found.values())  # now: they may be edited while it runs
    text = text or Text()
    stages = standard_stages(text, seed, quick)
    folder = runs.new_folder("report", out)

    with runs.replacing(folder) as staged:
        profiles, budgets, raced, board = _measured(found.values(), stages, seed, quick, staged, progress)
        progress("pages and pictures", 0, 1)
        frames = {"profiles": profiles, "budgets": budgets, **raced, "scoreboard": board.table, "codes": board.codes}
        for name, frame in frames.items():
            runs.write_frame(staged, name, frame)
        runs.write_bytes(staged / "audits.json", json.dumps(as_json(list(board.audits.values())), indent=1).encode())
        said = _said(profiles, budgets, raced, board)
        made = runs.record(
            {"losses": list(found), "seed": seed, "quick": quick},
            [stage.source.describe() for stage in stages],
            time.perf_counter() - begun,
            kind="report",
            losses=files,
            races=[{"source": s.source.name, "model": s.model, "rates": s.learning_rates, "steps": s.steps} for s in stages],
            reading=said,
        )
        report = Report(staged, profiles, budgets, raced, board, said)
        _write_pictures(report, list(found))
        runs.write_bytes(staged / "report.html", page(report, found, made).encode())
        made["seconds"] = round(time.perf_counter() - begun, 2)
        runs.write_record(staged, made)
    progress("pages and pictures", 1, 1)
    return dataclasses.replace(report, folder=folder)


def _measured(
    losses: Iterable[Loss], stages: list[Stage], seed: int, quick: bool, folder: pathlib.Path, progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, pd.DataFrame], Scoreboard]:
    """A report's profiles, budgets, frames of its races, and scoreboard; folder: where texts that are coded are kept."""
    import pandas as pd

    progress("profiles", 0, 1)
    profiles = gradient_profile(losses, profile_points(), PROFILE_VOCAB, "both")
    progress("profiles", 1, 1)
    budgets, races = [], []
    for stage in stages:
        name = stage.source.name
        races.append(run_stage(stage, losses, seed, quick, progress))
        progress(f"{name}: budget", 0, 1)
        budget = gradient_budget(losses, *_held_out_logits(races[-1], seed))
        budgets.append(budget.assign(source=name)[["source", *budget.columns]])
        progress(f"{name}: budget", 1, 1)
    frames = [each.race.frames() for each in races]
    raced = {part: pd.concat([each[part] for each in frames], ignore_index=True) for part in frames[0]}
    board = scoreboard(losses, races, seed, replicates=0 if quick else REPLICATES, folder=folder, progress=progress)
    return profiles, pd.concat(budgets, ignore_index=True), raced, board


# What a reader of the profiles is told of losses that the audit finds not to be so.
WARNINGS = {
    "permutation_equivariant": "The right token is class 0 here, which to {} is not as any other: of another class the pull "
    "differs.",
    "honest_autodiff": "The gradient that autodiff gives of {} is not the slope of its value (the audit below has a witness): "
    "pulls, budgets and training are of that gradient, and the value says nothing of them.",
}


def _warnings(board: Scoreboard) -> list[str]:
    """By what the profiles of some losses mislead."""
    from xentlab.reading import words

    found = {what: [name for name, each in board.audits.items() if each.verdicts[what].value is False] for what in WARNINGS}
    return [WARNINGS[what].format(words(names)) for what, names in found.items() if names]


def _said(
    profiles: pd.DataFrame, budgets: pd.DataFrame, raced: dict[str, pd.DataFrame], board: Scoreboard
) -> dict[str, list[str]]:
    """What there is to read in a report's frames, by figure."""
    from xentlab import reading

    table = raced["table"]
    return {
        "headline": [*reading.gradients(profiles), *_warnings(board)],
        "budgets": reading.budgets(budgets),
        "curves": [*reading.races(table, raced["curves"]), *reading.pairs(raced["pairs"])],
        "reliability": reading.temperatures(table),
        "rarity": reading.rarity(raced["frequency"]),
        "scoreboard": sentences(board.table, board.codes),
    }


def _held_out_logits(finished: StagedRace, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits and targets on validation tokens, of the model that nll trained, in a race of its own if need be."""
    stage = finished.stage
    predictors = finished.race.predictors
    if "nll" not in predictors:
        rate = stage.learning_rates[len(stage.learning_rates) // 2]
        predictors = race(["nll"], stage.source, stage.model, [rate], [seed], stage.steps).predictors
    model, recipe = predictors["nll"].model, Recipe()
    held_out = np.asarray(windows(stage.source.split("validation"), recipe.window, recipe.validation_tokens))
    return np.asarray(jax.jit(lambda tokens: logits(model, tokens))(held_out[:, :-1])), held_out[:, 1:]


def figures(report: Report, losses: list[str]) -> dict[str, list]:
    """The report's charts by figure, each with its legend."""
    from xentlab import charts
    from xentlab.examine import READINGS

    curves, table, sources = report.raced["curves"], report.table, list(dict.fromkeys(report.table.source))
    return {
        "headline": [charts.profile(report.profiles, losses, space, path) for path in PATHS for space in charts.SPACES],
        "budgets": [
            charts.budget(report.budgets[report.budgets.source == source], losses, f"Budget on {source}") for source in sources
        ],
        "curves": [charts.curves(curves, table, losses, source) for source in sources],
        "reliability": [
            charts.reliability(report.raced["reliability"], losses, source, each) for source in sources for each in READINGS
        ],
        "rarity": [charts.rarity(report.raced["frequency"], losses, source) for source in sources],
        "sweep": [charts.sweep(curves[curves.source == source], losses, source) for source in sources],
    }


def _write_pictures(report: Report, losses: list[str]) -> None:
    from xentlab import charts

    for name, panels in figures(report, losses).items():
        charts.write_png(charts.grid(panels), report.folder / f"{name}.png")


CAPTIONS = {
    "headline": (
        "What a loss teaches at each probability",
        "How hard each loss pulls when the right token had probability p: first in the logit, which is what a network "
        "moves; then in the probability. Where lines coincide, each shows as a rim around the next. Above: the "
        f"target's own logit falls. Below: one rival rises, which it can only do for p below 1/{PROFILE_VOCAB - 1}.",
        "profiles",
    ),
    "budgets": (
        "Where a real batch's gradient goes",
        "The predictions of a model that nll trained, on held-out tokens, by the probability that it gave the right one. "
        "Every loss sees the same predictions; the lines say which tokens it would learn from.",
        "budgets",
    ),
    "curves": (
        "How each loss trains",
        "The same model, tokens and seeds for every loss, each at the best learning rate that was tried, scored by likelihood "
        "through its own link.",
        "curves",
    ),
    "reliability": (
        "How sure, and how right",
        "Each model's greatest probability, and how often that token was the right one: on the diagonal a model knows what it "
        "knows. First as its loss trained it, then after one temperature.",
        "reliability",
    ),
    "rarity": (
        "Rare tokens and frequent ones",
        "Test NLL by how often training saw the token. What a loss gives up on shows on the left.",
        "frequency",
    ),
    "sweep": (
        "Each loss at every learning rate",
        "Every rate that was tried: the best for one loss may be far from the best for another.",
        "curves",
    ),
}


def page(report: Report, losses: dict[str, Loss], made: dict) -> str:
    """The report as one HTML file: charts with their data, scripts and styles inside."""
    from xentlab import charts

    names = list(losses)
    sections, specs = [], {}
    for figure, panels in figures(report, names).items():  # with legends, which a chart that is saved needs
        title, caption, data = CAPTIONS[figure]
        slots = []
        for i, chart in enumerate(charts.level(panels)):
            key = f"{figure}-{i}"
            chart = chart.properties(width="container", height=270)
            specs[key] = chart.to_dict()
            slots.append(f'<figure class="chart" id="{key}" aria-label="{html.escape(title)}, panel {i + 1}"></figure>')
        sections.append(
            f'<section id="{figure}"><h2>{html.escape(title)}</h2><p>{html.escape(caption)}</p>'
            f"{sentences_list(report.said.get(figure, []))}"
            f'<div class="panels">{"".join(slots)}</div>{_download(report.folder, data)}</section>'
        )
    looks = {name: {"hue": hue, "dash": dash} for name, (hue, dash) in charts.look(names).items()}
    return fill(
        "report",
        specs,
        quick='<p class="note">A quick run: the races are too short to mean anything.</p>'
        if made["arguments"]["quick"]
        else "",
        sections="".join(sections),
        tables=race_tables(report.table)
        + pairs_table(report.raced["pairs"])
        + _download(report.folder, "table")
        + _download(report.folder, "pairs"),
        scoreboard=scoreboard_tables(report.board.table, report.board.codes)
        + sentences_list(report.said.get("scoreboard", []))
        + _download(report.folder, "scoreboard")
        + _download(report.folder, "codes"),
        audit=audit_table(report.board.audits),
        formulas="".join(_formula(name, loss) for name, loss in losses.items()),
        record=html.escape(json.dumps(made, indent=2, default=str)),
        looks=json_in_script(looks),
    )


def _download(folder: pathlib.Path, name: str) -> str:
    content = base64.b64encode((folder / f"{name}.csv").read_bytes()).decode()
    return f'<p class="data"><a download="{name}.csv" href="data:text/csv;base64,{content}">Download {name}.csv</a></p>'


def _formula(name: str, loss: Loss) -> str:
    facts = facts_of(loss)
    said = (inspect.getdoc(unwrapped(loss)[0]) or "no source is named").splitlines()[0].rstrip(".")
    source = html.escape(facts.source or f"A loss of yours: {said}")
    link = html.escape(facts.link_name)
    formula = f'<span class="formula">{_math(facts.formula)}</span>; ' if facts.formula else ""
    return f"<dt>{html.escape(name)}</dt><dd>{formula}read through {link}. {source}.</dd>"


def _math(latex: str) -> str:
    """A formula as MathML, which browsers draw by themselves; as it was written, where it cannot be converted."""
    from latex2mathml.converter import convert

    try:
        return convert(latex)
    except Exception:  # a user's formula is shown as it stands rather than lost with the page
        return f"<code>{html.escape(latex)}</code>"
