"""What a command leaves: frames, pictures and a record in its folder, and what it prints."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
import time
from typing import Any

from xentlab import console
from xentlab.commands import COMMANDS
from xentlab.contract import LabError
from xentlab.names import FUNCTIONS, expanded, file_of, is_own, own, placed
from xentlab.runs import UNRECORDED


def arguments_of(command: Any) -> dict[str, Any]:
    """A command's arguments as a record has them: those that tell how to do it again; what is read, from any folder."""
    found = {key: value for key, value in dataclasses.asdict(command).items() if key not in UNRECORDED}
    read = [key for key, value in found.items() if isinstance(value, pathlib.Path) and key != "out"]
    found |= {"losses": tuple(map(placed, found["losses"]))} if "losses" in found else {}
    found |= {what: placed(found[what]) for what in FUNCTIONS if what in found}
    return found | {key: expanded(found[key]).absolute() for key in read}


def finish(
    command: Any,
    frames: dict[str, Any],
    shown: str,
    begun: float,
    sources: list[dict] | None = None,
    rows: list[dict] | None = None,
    beside: pathlib.Path | None = None,
) -> None:
    """Writes a command's frames into --out, if there is one, and prints the one that is asked for, as `rows` in a table."""
    write(command, frames, begun, sources, beside)
    show(command, frames[shown], rows)


def write(
    command: Any,
    frames: dict[str, Any],
    begun: float,
    sources: list[dict] | None = None,
    beside: pathlib.Path | None = None,
    **more: Any,
) -> None:
    """Writes a command's frames, their pictures and its record, with what else is to be in it, into --out, if there is one.

    beside: a folder whose files go there too.
    """
    if not command.out:
        return
    from xentlab import runs

    with runs.using(folder_of(command)) as folder, runs.replacing(folder) as staged:
        for each in beside.iterdir() if beside else ():
            runs.write_bytes(staged / each.name, each.read_bytes())
        for name, frame in frames.items():
            runs.write_frame(staged, name, frame)
        pictures(frames, staged)
        runs.write_record(staged, record_of(command, sources or [], time.perf_counter() - begun) | more | {"frames": [*frames]})


def record_of(command: Any, sources: list[dict], seconds: float) -> dict[str, Any]:
    """A command's record: how it was made, with the files of the losses, and other functions, that are not this package's."""
    from xentlab import runs
    from xentlab.catalogue import own_files

    arguments = arguments_of(command)
    vocab = [source["vocab"] for source in sources if "vocab" in source]
    more = {"kind": kind_of(command), "losses": own_files(arguments["losses"], *vocab[:1])}
    named = {what: arguments[what] for what in FUNCTIONS if is_own(arguments.get(what, ""))}
    more |= {"functions": {what: file_of(own(name, what)[0]) for what, name in named.items()}} if named else {}
    return runs.record(arguments, sources, seconds, **more)


def folder_of(command: Any) -> pathlib.Path:
    """The folder of a command's run, made if need be. Raises `LabError` as `runs.new_folder` does, and for one in the text."""
    from xentlab import runs

    text = getattr(command, "text", None)
    whole, out = lambda path: expanded(path).resolve(), command.out or pathlib.Path("runs")
    if text and text.is_dir() and whole(out).is_relative_to(whole(text)):
        raise LabError(
            f"{out} lies in --text {text}: what is written would be read as text. Give a folder outside of it by --out."
        )
    # A race that goes on has its folder already, whatever is there besides.
    replace = getattr(command, "anyway", False) or getattr(command, "resume", None) is not None
    return runs.new_folder(kind_of(command), command.out, replace)


def kind_of(command: Any) -> str:
    """A command's name."""
    return next(name for name, each in COMMANDS.items() if each is type(command))


def show(command: Any, frame: Any, rows: list[dict] | None = None) -> None:
    """Says where a command wrote, and prints a frame as it asks for, in a table as `rows`."""
    if command.out:
        print(f"Wrote {command.out}.", file=sys.stderr)
    if command.format == "table":
        console.print_table(rows or frame.to_dict("records"))
    else:
        console.print_rows(frame.to_dict("records"), command.format)


def pictures(frames: dict[str, Any], folder: pathlib.Path) -> None:
    """The pictures of the frames that have some."""
    from xentlab import charts
    from xentlab.examine import READINGS

    shown = next(iter(frames.values()))
    losses = list(dict.fromkeys(shown.loss))
    if "profiles" in frames:
        paths = dict.fromkeys(shown.rivals)
        panels = [charts.profile(shown, losses, space, path) for path in paths for space in charts.SPACES]
        charts.write_png(charts.grid(panels), folder / "profiles.png")
    if "budgets" in frames:
        charts.write_png(charts.grid([charts.budget(shown, losses, "Budget")]), folder / "budgets.png")
    if "curves" in frames:
        for source in dict.fromkeys(shown.source):
            panels = [charts.curves(shown, frames["table"], losses, source), charts.sweep(shown, losses, source)]
            charts.write_png(charts.grid(panels), folder / "curves.png")
            panels = [charts.reliability(frames["reliability"], losses, source, each) for each in READINGS]
            panels.append(charts.rarity(frames["frequency"], losses, source))
            charts.write_png(charts.grid(panels), folder / "predictions.png")
