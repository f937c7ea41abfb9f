"""A station: one claim, what a run measured beside what it must be, the figures, and where the usual telling is loose."""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, SupportsFloat

from xentlab.contract import LabError
from xentlab.runs import new_folder, write_frame

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd


@dataclasses.dataclass(frozen=True)
class Check:
    """A number that a run measured, beside the one it must be: equal within the tolerance, at least it, or at most it.

    The tolerance is absolute, in the number's own unit. inf equals inf and NaN equals NaN: some claims are about those.

    >>> Check("100 tokens at .1, in nats", -230.2586, -230.2585, 1e-3).passed
    True
    >>> Check("Paris against Tokyo", 9.0, 10.0, relation="at least").passed
    False
    """

    what: str
    measured: SupportsFloat
    expected: SupportsFloat
    tolerance: float = 0.0
    relation: Literal["equal", "at least", "at most"] = "equal"

    def __post_init__(self):
        for field in ("measured", "expected"):  # NumPy's numbers and truth values become plain ones
            object.__setattr__(self, field, float(getattr(self, field)))

    @property
    def passed(self) -> bool:
        """Whether it holds; never by a NaN, unless NaN is what is expected."""
        if math.isnan(self.expected) or math.isnan(self.measured):
            return math.isnan(self.expected) and math.isnan(self.measured)
        if math.isinf(self.expected) or math.isinf(self.measured):
            same = self.measured == self.expected
        else:
            same = abs(self.measured - self.expected) <= self.tolerance
        over = self.relation == "at least" and self.measured > self.expected
        return bool(same or over or (self.relation == "at most" and self.measured < self.expected))


@dataclasses.dataclass(frozen=True)
class Slider:
    """Positions for a reader to choose from, each computed by the library beforehand: a page only shows them.

    positions: a tidy frame whose column `at` numbers the positions from 0, one or more rows each; the other columns are
    shown. A figure's charts mark the position that their parameter `at` names (`charts.marked`). start: where it begins.
    """

    label: str
    positions: pd.DataFrame
    start: int = 0

    def __post_init__(self):
        places = sorted(set(self.positions["at"]))
        if places != list(range(len(places))) or self.start not in places:
            raise LabError(f"a slider's positions are numbered 0, 1, ... in a column `at`; got {places}, start {self.start}.")


@dataclasses.dataclass(frozen=True)
class Figure:
    """Charts side by side, what they show in words (for those who do not see them), and perhaps a slider that moves them."""

    charts: tuple[alt.Chart | alt.LayerChart, ...]
    words: str
    slider: Slider | None = None


@dataclasses.dataclass(frozen=True)
class Station:
    """One claim (its number in the argument) and what became of it.

    told: the usual telling. found: what the run says, in one paragraph or a line a finding. loose: where the telling does
    not hold as it stands.
    frames: tables by name, for the run's folder. tables: those that the page shows too, by their headings.
    """

    claim: int
    title: str
    told: str
    found: str
    loose: str
    checks: tuple[Check, ...]
    figures: tuple[Figure, ...]
    frames: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every check holds."""
        return all(check.passed for check in self.checks)


def check_rows(stations: Sequence[Station]) -> list[dict[str, Any]]:
    """All checks as rows: claim, what, expected, relation, measured, tolerance, pass."""
    return [
        {
            "claim": station.claim,
            "what": check.what,
            "expected": check.expected,
            "relation": check.relation,
            "measured": check.measured,
            "tolerance": check.tolerance,
            "pass": check.passed,
        }
        for station in stations
        for check in station.checks
    ]


def write_stations(stations: Sequence[Station], folder: pathlib.Path) -> None:
    """Each station's frames as CSV and its figures as PNG: <name>.csv, claim-<number>.png."""
    from xentlab import charts

    for station in stations:
        for name, frame in station.frames.items():
            write_frame(folder, name, frame)
        for i, figure in enumerate(station.figures):
            suffix = f"-{i + 1}" if len(station.figures) > 1 else ""
            charts.write_png(charts.grid(figure.charts), folder / f"claim-{station.claim}{suffix}.png")


def show(make: Callable[..., Sequence[Station]], file: str, question: str | None) -> None:
    """An experiment as a script: takes the arguments of `make` from the command line, prints what was found, writes it.

    Frames and pictures go to runs/<the script's name>. question: the script's docstring, which --help shows.
    """
    import tyro

    from xentlab.console import print_table

    stations = tyro.cli(make, description=question)
    folder = new_folder("experiment", pathlib.Path("runs") / pathlib.Path(file).stem)
    write_stations(stations, folder)
    for station in stations:
        print(f"\n{station.claim}. {station.title}\n\n{station.found}\n")
        print_table([{key: value for key, value in row.items() if key != "claim"} for row in check_rows([station])])
        for title, frame in station.tables.items():
            print(f"\n{title}\n")
            print_table(frame.to_dict("records"))
        print(f"\nWhere the telling is loose: {station.loose}")
    print(f"\nWrote {folder}.")
