"""Commands that write pages: scoreboard, report, tour; and those that find or make others: open, api."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator

from xentlab import console
from xentlab.cli.writing import finish, folder_of
from xentlab.commands import Api, Open, Report, Scoreboard, Tour
from xentlab.contract import LabError


def run_scoreboard(command: Scoreboard) -> None:
    """The four doors."""
    from xentlab import runs
    from xentlab.catalogue import LOSSES, resolve_all
    from xentlab.scoreboard import REPLICATES, scoreboard
    from xentlab.scoreboard.reading import sentences
    from xentlab.sources import Text
    from xentlab.stages import run_stage, standard_stages

    begun = time.perf_counter()
    if command.all and command.losses != Scoreboard.losses:
        raise LabError(f"--all is every loss of the catalogue; leave it out, or --losses {' '.join(command.losses)}.")
    losses = resolve_all(tuple(LOSSES) if command.all else command.losses).values()
    stages = standard_stages(Text(command.text), command.seed, command.quick)
    replicates = 0 if command.quick else REPLICATES
    # What is coded takes its place with the rest, at the end.
    with runs.using(folder_of(command)) if command.out else contextlib.nullcontext(), tempfile.TemporaryDirectory() as kept:
        coded = pathlib.Path(kept) if command.out else None
        with console.progress() as tell:
            races = [run_stage(stage, losses, command.seed, command.quick, tell) for stage in stages]
            board = scoreboard(losses, races, command.seed, replicates, coded, tell)
        frames = {"scoreboard": board.table, "codes": board.codes}
        sources, rows = [stage.source.describe() for stage in stages], console.scoreboard_rows(board.table, board.codes)
        finish(command, frames, "scoreboard", begun, sources, rows, coded)
    if command.format == "table":
        for sentence in sentences(board.table, board.codes):
            print(f"- {sentence}")
        if command.quick:
            print("- A quick scoreboard shows that all works; its races are too short to mean anything.")


def run_report(command: Report) -> None:
    """The main job."""
    from xentlab import runs
    from xentlab.report import make_report
    from xentlab.sources import Text

    text = Text(command.text, command.tokenizer, command.bpe_vocab)
    with _as_a_whole("report"), runs.using(folder_of(command)) as folder, console.progress() as tell:
        report = make_report(command.losses, text, folder, command.seed, command.quick, tell)
    if command.format != "table":
        console.print_rows(report.table.to_dict("records"), command.format)
    else:
        console.print_table(console.summary(report.table))
        for sentence in itertools.chain(*report.said.values()):
            print(f"- {sentence}")
        if command.quick:
            print("- A quick report shows that all works; of the losses it says nothing.")
    print(f"Open {report.folder / 'report.html'} in a browser.", file=sys.stderr)


@contextlib.contextmanager
def _as_a_whole(what: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"A {what} is made as a whole: it begins anew the next time.") from None


def run_tour(command: Tour) -> None:
    """The argument, claim by claim."""
    from xentlab import runs
    from xentlab.tour.page import make_tour
    from xentlab.tour.station import check_rows

    with _as_a_whole("tour"), runs.using(folder_of(command)) as folder, console.progress() as tell:
        _, walked = make_tour(folder, command.quick, tell)
    stations = [station for each in walked for station in each.stations]
    rows = check_rows(stations)
    if command.format == "table":
        for station in stations:
            print(f"{'✓' if station.passed else '✗'} {station.claim:2d} {station.title}: {station.found}")
    else:
        console.print_rows(rows, command.format)
    failed = [row for row in rows if not row["pass"]]
    for row in failed:
        wanted = f"{row['relation']} {row['expected']:g} within {row['tolerance']:g}"
        print(f"claim {row['claim']}: {row['what']} is {row['measured']:g}, not {wanted}.", file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} numbers hold. `xentlab open {folder}` shows the page.", file=sys.stderr)
    if failed:
        sys.exit(1)


def run_open(command: Open) -> None:
    """A run's page."""
    from xentlab.runs import find_page

    found = find_page(command.run).resolve()
    print(found)
    if not command.print:
        import webbrowser

        if not webbrowser.open(found.as_uri()):
            raise LabError("no browser could be started here. Open the file above in one; --print stops after naming it.")


def run_api(command: Api) -> None:
    """The API's pages."""
    from xentlab.runs import new_folder

    try:
        import pdoc
    except ImportError:
        raise LabError("API pages are made by another package: pip install pdoc.") from None
    folder = new_folder("api", command.out)
    import pkgutil

    import xentlab

    # pdoc leaves out the modules that a package's __all__ does not name.
    modules = [found.name for found in pkgutil.walk_packages(xentlab.__path__, "xentlab.") if "experiments" not in found.name]
    with warnings.catch_warnings():  # of annotations that only a type checker resolves
        warnings.simplefilter("ignore", UserWarning)
        pdoc.pdoc("xentlab", *modules, output_directory=folder)
    print(f"Wrote {folder}. `xentlab open {folder}` shows it.", file=sys.stderr)
