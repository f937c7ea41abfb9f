"""What the command prints: tables for people, csv and json for programs, a progress bar on a terminal."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from xentlab import defaults
from xentlab.reading import ROUNDING

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["table", "csv", "json"]
GAP = 2  # spaces between columns


def print_table(rows: list[dict[str, Any]]) -> None:
    """A table of rows; columns are the first row's keys. No number is cut, however narrow the terminal is.

    The widest column gives way, at its spaces; where that is not enough, each row stands upright, beside as many as there is
    room for.
    """
    from rich.console import Console
    from rich.table import Table

    # A pipe or file has no width: nothing is cut off there.
    out = Console(width=None if sys.stdout.isatty() else 400)
    names, lines = list(rows[0]), [[text(value) for value in row.values()] for row in rows]
    columns = list(zip(names, *lines, strict=True))
    widths = [_width(cells) for cells in columns]
    widest = widths.index(max(widths))
    longest = max(_width(cell.split()) for cell in columns[widest])
    if sum(widths) - widths[widest] + longest + GAP * len(widths) > out.width:
        for block in _upright(names, lines, out.width):
            _print(out, block)
        return
    table = Table(box=None, header_style="bold", padding=(0, GAP, 0, 0))
    for i, column in enumerate(names):
        table.add_column(escaped(column), no_wrap=i != widest, justify="left" if isinstance(rows[0][column], str) else "right")
    for line in lines:
        table.add_row(*map(escaped, line))
    _print(out, table)


def _print(out: Any, what: Any) -> None:
    """By way of stdout itself: of a broken pipe rich makes an exit code of 1, before anyone can catch it."""
    with out.capture() as said:
        out.print(what, highlight=False)
    sys.stdout.write(said.get())


def _width(cells: Iterable[str]) -> int:
    """How wide a column of these cells is."""
    from rich.cells import cell_len

    return max((cell_len(line) for cell in cells for line in cell.split("\n")), default=0)


def _upright(names: list[str], lines: list[list[str]], room: int) -> Iterator[Any]:
    """Tables with a row's cells below each other, beside their names; as many rows in one as fit, and an empty line between."""
    from rich.table import Table

    room -= _width(names) + GAP
    while lines:
        ends = itertools.accumulate(_width(line) + GAP for line in lines)
        taken = max(1, sum(end <= room for end in ends))
        block, lines = lines[:taken], lines[taken:]
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=True)
        table.add_column(no_wrap=True, style="bold")
        for _ in block:
            table.add_column(overflow="fold")
        for cells in zip(names, *block, strict=True):
            table.add_row(*(escaped(cell.replace("\n", " ")) for cell in cells))
        if lines:
            table.add_row()
        yield table


_DATA: list[Any] = []  # where `data_alone` has put the stdout that it found


@contextlib.contextmanager
def data_alone() -> Iterator[None]:
    """Within, what is printed goes to stderr, and to stdout what `print_rows` and `print_json` are given alone."""
    _DATA.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _DATA.pop()


def print_rows(rows: list[dict[str, Any]], form: Format) -> None:
    """Rows as csv or json on stdout, and nothing else."""
    if form == "csv":
        import pandas as pd

        _data().write(pd.DataFrame(rows).to_csv(index=False))
    else:
        print_json([{key: _plain(value) for key, value in row.items()} for row in rows])


def print_json(content: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(content, indent=1, default=lambda number: number.item()), file=_data())


def _data() -> Any:
    return _DATA[-1] if _DATA else sys.stdout


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and the words inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def text(value: Any) -> str:
    """A value in a table's cell."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "∞" if value == float("inf") else f"{value:.6g}"
    return "" if value is None else str(value)


def escaped(text: str) -> str:
    """Text that rich prints as it stands."""
    from rich.markup import escape

    return escape(text)


def half_interval(row: pd.Series, column: str) -> str:
    """The longer half of a mean's interval, for its other end may be cut at 0 or 1.

    Nothing where there is no interval, or none but rounding: that two seeds agree exactly does not make a mean certain.
    """
    mean, nan = row[column], math.nan
    half = max(row.get(f"{column}_high", nan) - mean, mean - row.get(f"{column}_low", nan))
    return f"± {half:.2g}" if half > ROUNDING * abs(mean) else ""


def summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's columns that fit a terminal, means with their intervals' halves; none that is empty."""
    rows = []
    for _, row in table.iterrows():
        none = row.best_rate != row.best_rate  # it diverged at every rate
        entry = {
            "source": row.source,
            "loss": row.loss,
            "best rate": "–" if none else f"{row.best_rate:g}{' ⇥' * row.rate_at_edge}",
        }
        for column, title in (
            ("test_nll", "test NLL"),
            ("bits_per_byte", "bits/byte"),
            ("accuracy", "accuracy"),
            ("calibration_error", "calibration"),
            ("kl_to_law", "KL to law"),
        ):
            spread = half_interval(row, column)
            entry[title] = "" if row[column] != row[column] else f"{row[column]:.4f}{spread and ' ' + spread}"
        edge = " ⇥" * row.temperature_at_edge
        entry["at T"] = "" if row.temperature != row.temperature else f"{row.tempered_nll:.4f} ({row.temperature:.2g}{edge})"
        entry["smoothing"] = "" if none else f"{row.smoothing:.2g}"
        entry["diverged"] = row.diverged
        rows.append(entry)
    return [{title: said for title, said in row.items() if any(each[title] != "" for each in rows)} for row in rows]


def scoreboard_rows(table: pd.DataFrame, codes: pd.DataFrame) -> list[dict[str, Any]]:
    """The scoreboard's columns that fit a terminal; a dash for what is not known."""
    rows, sources = [], dict.fromkeys(codes.source if len(codes) else ())
    for row in table.itertuples():
        unknown = row.tokens_needed != row.tokens_needed
        entry = {"loss": row.loss, "tokens needed": "–" if unknown else f"{row.tokens_needed:.3f}"}
        entry["simulated"] = "–" if row.simulated != row.simulated else f"{row.simulated:.2f}"
        entry["bias"] = "0" if row.bias < 1e-6 else "–" if row.bias != row.bias else f"{row.bias:.3g}"
        entry |= {f"bits, {source}": "–" for source in sources}
        for code in codes[codes.loss == row.loss].itertuples() if len(codes) else []:
            byte = code.bits_per_byte == code.bits_per_byte
            entry[f"bits, {code.source}"] = f"{code.bits_per_byte if byte else code.bits_per_token:.4f}"
        for dtype in ("float32", "bfloat16", "float16"):
            error = getattr(row, f"gradient_error_{dtype}")
            entry[dtype] = error if isinstance(error, str) else f"{error:.0e}"
        entry |= {"pull even": f"{row.low_p_even:.3g}", "one": f"{row.low_p_one:.3g}", "order": f"{row.low_p_order:.3g}"}
        entry["escape"] = "never" if row.escape_steps == math.inf else f"{row.escape_steps:.0f}"
        rows.append(entry)
    return rows


def print_facts(row: dict[str, Any], doc: str) -> None:
    """One loss's facts, a line each, and its docstring."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, GAP, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # a path longer than the line goes on in the next one
    for key, value in row.items():
        if value not in ("", None):
            table.add_row(f"[bold]{key}[/bold]", escaped(text(value)))
    out = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    _print(out, table)
    if doc:
        _print(out, "\n" + escaped(doc))


# Verdicts of several numbers each, which no cell of a table has room for: they are said of one loss at a time.
LONG = ("low_p_limit", "max_error")


def print_audit(found: Any) -> None:
    """One loss's audit: verdict, evidence, witness."""
    print(f"{found.loss}\n")
    together: dict[str, tuple[list[str], Any]] = {}  # those of which the same is said
    for name, verdict in found.verdicts.items():
        place = repr(verdict) if verdict.value == "undecided" else name
        together.setdefault(place, ([], verdict))[0].append(name)
    for names, verdict in together.values():
        print(f"{', '.join(names)}: {verdict_text(verdict.value)}\n    {verdict.evidence}")
        for key, value in (verdict.witness or {}).items():
            print(f"    {key} = {value}")


def verdict_text(value: Any) -> str:
    """A verdict's value in a table's cell."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {verdict_text(each)}" for key, each in value.items())
    if value is None:
        return "–"
    return "?" if value == "undecided" else text(value)


def _line_by_line() -> defaults.Progress:
    """What a log can hold: a line where another thing begins, and none for each step of it."""
    told: list[str] = []

    def tell(what, done, total):
        if told[-1:] != [what]:
            told.append(what)
            print(f"xentlab: {what}", file=sys.stderr, flush=True)

    return tell


@contextlib.contextmanager
def progress():
    """A function (what, done, total) that moves a bar on stderr if that is a terminal, and else has a line for each `what`."""
    if not sys.stderr.isatty():
        yield _line_by_line()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting (the first steps compile)", total=None)

        def tell(what, done, total):
            bar.update(task, description=what, completed=done, total=total)

        yield tell
