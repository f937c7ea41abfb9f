"""Commands on runs that are finished: compare, rerun."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from typing import Any

from xentlab import console
from xentlab.commands import COMMANDS, Compare, Rerun
from xentlab.contract import LabError
from xentlab.names import expanded

MOST_ROWS = 40  # of a table, unless all are asked for


def run_compare(command: Compare) -> None:
    """Two runs side by side."""
    from xentlab.compare import read_run

    _side_by_side(read_run(command.first), read_run(command.second), command.format, command.all)


def run_rerun(command: Rerun) -> None:
    """A run again, from its record."""
    from xentlab import runs
    from xentlab.cli import run
    from xentlab.compare import read_run

    found = read_run(command.run, lacking=True)
    again = _recorded(found)
    if command.out and (expanded(command.out) / "run.json").exists():
        raise LabError(f"{command.out} holds a run; a rerun would overwrite it. Give another folder with --out.")
    with runs.using(runs.new_folder("rerun", command.out)) as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            run(dataclasses.replace(again, out=folder))
        differ = _side_by_side(found, read_run(folder), command.format)
    if differ:
        sys.exit(1)


def _recorded(run: Any) -> Any:
    """The command of a run, as its record has it. Raises `LabError` for a record of another kind or version."""
    from xentlab.resume import as_command
    from xentlab.runs import REPEATED

    kind = run.record.get("kind")
    if kind not in REPEATED:
        made = f"was made by {kind}" if kind in COMMANDS else "does not say by which command it was made"
        raise LabError(f"{run.folder} {made}; a rerun takes {', '.join(REPEATED)}.")
    return as_command(run.record, COMMANDS[kind])


def _side_by_side(first: Any, second: Any, form: str, every: bool = False) -> int:
    """Prints two runs side by side; how many numbers differ."""
    from xentlab.compare import differences, settings

    frame = differences(first, second)
    differ = frame[frame.difference != 0]
    shown = frame if every else differ
    made = settings(first.record, second.record)
    if form != "table":
        rows = [{"frame": "settings", "where": row["what"], "metric": None, "difference": None} | row for row in made]
        console.print_rows([{key: row[key] for key in frame.columns} for row in [*rows, *shown.to_dict("records")]], form)
        return len(differ)
    if made:
        print("set differently, first | second:")
    for row in made:
        print(f"{row['what']}: {console.text(row['first'])} | {console.text(row['second'])}")
    has = frame[["first", "second"]].notna()  # what neither has, a text's divergence from its law say, is no number
    alone, count = has.any(axis=1) & ~has.all(axis=1), has.all(axis=1).sum()
    single = alone.sum()
    beside = f"{single} are in one run alone{'' if every else ' (--all shows them too)'}"
    if not count:
        print(f"The runs have no number in common; {beside}.")
    elif len(differ):
        print(f"{len(differ) - single} of {count} numbers that both have differ{f'; {beside}' if single else ''}.")
    else:
        print(f"All {count} numbers are the same to the last bit.")
    shown = frame if every else differ[~alone[differ.index]]
    if len(shown):
        console.print_table(shown[: None if every else MOST_ROWS].to_dict("records"))
    if not every and len(shown) > MOST_ROWS:
        print(f"And {len(shown) - MOST_ROWS} more: --all shows every number, --format csv each that differs.")
    return len(differ) or int(not count)
