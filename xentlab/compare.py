"""Two runs side by side: what was set differently, and what came out differently."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
from typing import TYPE_CHECKING, Any

from xentlab.contract import LabError
from xentlab.names import expanded
from xentlab.runs import BEGUN, UNRECORDED, quoted, read_record

if TYPE_CHECKING:
    import pandas as pd

# What names a row of a frame, where the frame has it; other text is no measurement either.
KEYS = ("source", "loss", "against", "rate", "seed", "step", "rivals", "p", "p_low", "p_high", "bin_low", "count_low")
FIRST = ("table", "pairs", "tests")  # what is looked at first
# The parts of a record that say how a run was made, and the arguments that are none of it.
MAKING = ("arguments", "losses", "functions", "sources", "versions", "commit", "numerics", "device", "resumed_with")
BESIDE = ("out", "checkpoint_every", *UNRECORDED)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder as read back: its record (run.json) and its frames by name."""

    folder: pathlib.Path
    record: dict[str, Any]
    frames: dict[str, pd.DataFrame]


def read_run(folder: str | pathlib.Path, lacking: bool = False) -> Run:
    """A run from its folder; lacking: without those of its frames that are gone, for its record is enough to repeat it.

    Raises `LabError` where there is none, or its files are not what the run wrote.
    """
    import pandas as pd

    folder = expanded(folder)
    if not (folder / "run.json").is_file():
        if (folder / BEGUN).is_file():
            raise LabError(f"{folder} holds an unfinished race. Go on with: xentlab race --resume {quoted(folder)}")
        raise LabError(f"{folder} is no run: it has no run.json. A command writes one into its --out.")
    record = read_record(folder / "run.json", "Was it cut short, or edited? Its command makes it anew.")
    names, sums = record.get("frames", [path.stem for path in sorted(folder.glob("*.csv"))]), record.get("sums", {})
    frames = {}
    for name in names:
        path = folder / f"{name}.csv"
        if lacking and not path.exists():
            continue
        try:
            content = path.read_bytes()
            # Exactly what was written: pandas' fast parser may be off by one in the last digit, Python's is not.
            frames[name] = pd.read_csv(io.BytesIO(content), engine="python")
        except (ValueError, OSError) as error:
            raise LabError(f"{path} cannot be read: {error}. Was it deleted, cut short, or edited?") from error
        if name in sums and sums[name] != hashlib.sha256(content).hexdigest():
            raise LabError(f"{path} is not what the run wrote. Was it cut short, or edited? Its command makes it anew.")
    return Run(folder, record, frames)


def settings(one: dict[str, Any], other: dict[str, Any]) -> list[dict[str, Any]]:
    """What two records, written yet or not, say differently of how the runs were made: rows of what, first, second."""
    rows = []
    read = lambda record: json.loads(json.dumps({key: record.get(key) for key in MAKING}, default=str))
    first, second = _flat(read(one)), _flat(read(other))
    vocabularies_differ = any(first.get(what) != second.get(what) for what in first if what.endswith(".vocab"))
    for what in dict.fromkeys([*first, *second]):
        file, _, part = what.rpartition(".")
        if part == "path" and first.get(f"{file}.sha256", "") == second.get(f"{file}.sha256"):
            continue  # one text, wherever it lies
        if part == "program" and first.get(f"{file}.sha256", "") == second.get(f"{file}.sha256") and vocabularies_differ:
            continue  # one file's loss, as JAX compiles it for each
        if what.removeprefix("arguments.") not in BESIDE and first.get(what) != second.get(what):
            rows.append({"what": what, "first": first.get(what), "second": second.get(what)})
    return rows


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested tables as one, its keys joined by dots."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(i): each for i, each in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    inside = (_flat(each, f"{name}.{key}" if name else key) for key, each in value.items())
    return {key: each for part in inside for key, each in part.items()}


def differences(one: Run, other: Run) -> pd.DataFrame:
    """Every measurement of both runs: frame, where (what names the row), metric, first, second, difference.

    A row that only one run has is there with NaN for the other; what both lack is equal. Infinities of one sign are equal too.
    """
    import pandas as pd

    parts = [pd.DataFrame(columns=["frame", "where", "metric", "first", "second"])]
    names = sorted({*one.frames, *other.frames}, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    for name in names:
        both = _of_one_source(one.frames.get(name), other.frames.get(name))
        naming = {key for each in both if each is not None for key in each.columns if _is_word(each[key])}
        naming = {key for key in naming if key in KEYS or not any(_has_numbers(each, key) for each in both)}
        first, second = (_measurements(each, naming) for each in both)
        # In the order of the files: an outer join would sort the rows by their names' letters, step 10 before step 2.
        on = ["where", "metric"]
        joined = pd.concat([first, second])[on].drop_duplicates()
        for column, values in (("first", first), ("second", second)):
            joined = joined.merge(values.rename(columns={"value": column}), how="left", on=on)
        parts.append(joined.assign(frame=name)[parts[0].columns])
    frame = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    same = (frame["first"] == frame["second"]) | (frame["first"].isna() & frame["second"].isna())
    return frame.assign(difference=(frame["second"] - frame["first"]).mask(same, 0.0))


def _of_one_source(first: pd.DataFrame | None, second: pd.DataFrame | None) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Both frames; where each has one source, and another one, the second's has the first one's name: there is nothing else."""
    if first is None or second is None or not all("source" in each and each.source.nunique() == 1 for each in (first, second)):
        return first, second
    return first, second.assign(source=first.source.iloc[0])


def _is_word(column: pd.Series) -> bool:
    """Whether a column of a frame names its rows rather than measures something."""
    import pandas as pd

    return column.name in KEYS or not pd.api.types.is_numeric_dtype(column)


def _has_numbers(frame: pd.DataFrame | None, key: str) -> bool:
    """Whether a column has numbers or truth values, beside words such as "undecided" perhaps."""
    return frame is not None and key in frame and bool(_numbers(frame[key]).notna().any())


def _numbers(column: pd.Series) -> pd.Series:
    """A column's numbers and truth values; NaN for words."""
    import pandas as pd

    truth = {"True": 1.0, "False": 0.0}
    return pd.to_numeric(column.map(lambda each: truth.get(each, each)), errors="coerce").astype(float)


def _measurements(frame: pd.DataFrame | None, naming: set[str]) -> pd.DataFrame:
    """A frame's numbers, one a row: where, metric, value. naming: the columns that name a row, where the frame has them."""
    import numpy as np
    import pandas as pd

    if frame is None or not len(frame):
        return pd.DataFrame(
            {"where": pd.Series(dtype=object), "metric": pd.Series(dtype=object), "value": pd.Series(dtype=float)}
        )
    keys = [key for key in frame.columns if key in naming]
    # A word says what it is; a number does not.
    named = {key: f"{key} " if pd.api.types.is_numeric_dtype(frame[key]) else "" for key in keys}
    parts = [named[key] + frame[key].map(str) for key in keys]  # what is missing too, which astype leaves as it is
    where = pd.concat(parts, axis=1).agg(" ".join, axis=1) if keys else pd.Series("", frame.index)
    # Rows that nothing names are told apart by their order.
    again = where.groupby(where).cumcount()
    where = where.where(again == 0, where + " #" + again.astype(str))
    numbers = frame.drop(columns=keys).apply(_numbers)
    # By hand: pandas' melt fails where a frame has a column called value itself, as the profiles do.
    return pd.DataFrame(
        {
            "where": np.tile(where, numbers.shape[1]),
            "metric": np.repeat(numbers.columns, len(numbers)),
            "value": numbers.to_numpy().ravel(order="F"),
        }
    )
