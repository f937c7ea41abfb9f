"""A race that may be stopped, by Ctrl-C or by a power cut, and go on: what it began with, its checkpoints, its end."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import signal
import sys
import threading
import typing
from collections.abc import Iterator
from typing import Any

from xentlab import runs
from xentlab.checkpoints import Checkpoints, is_grid_folder
from xentlab.compare import settings
from xentlab.contract import LabError
from xentlab.names import FUNCTIONS, unplaced
from xentlab.runs import BEGUN, KEPT

# What a race may go on with differently, besides what is no part of a run's making: its devices.
FREE = ("mesh",)


def started(folder: pathlib.Path) -> dict[str, Any]:
    """What an unfinished race began with. Raises `LabError` where there is none, or it is damaged."""
    path, here = folder / BEGUN, runs.quoted(folder)
    anew = f"the race's own arguments with --out {here} take up what was kept there"
    if not path.is_file():
        if (folder / "run.json").is_file():
            raise LabError(f"{folder} is finished: nothing is left to resume. `xentlab rerun {here}` does it again.")
        if has_begun(folder):
            raise LabError(f"{path} is gone, by which a race goes on. Put it back; else {anew}.")
        raise LabError(f"{folder} holds no unfinished race. `xentlab race` with --out and a folder begins one.")
    record = runs.read_record(path, f"Delete it: {anew}.")
    if not {"arguments", "losses"} <= set(record):
        raise LabError(f"{path} does not say what the race began with. Delete it: {anew}.")
    return record


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would be otherwise: arguments, losses, texts, versions, commit."""
    texts = [[each.get("sha256") for each in record.get("sources") or []] for record in (before, now)]
    names = ("arguments.losses",)
    if texts[0] == texts[1] and all(texts[0]):  # the same text, wherever it lies
        names += ("arguments.text", *(f"sources.{place}.{key}" for place in range(len(texts[0])) for key in ("path", "name")))
    beside = {"losses": {}, "functions": {}, "resumed_with": None}
    apart = lambda record: record | beside | {"arguments": unplaced_arguments(record)}
    rows = settings(apart(before), apart(now))
    said = _said([row for row in rows if row["what"] not in names and not _is_free(row["what"])])
    (named, own), (named_now, own_now) = losses_of(before), losses_of(now)
    if named != named_now:
        said.insert(0, f"losses: {', '.join(named)} there, {', '.join(named_now)} now")
    changed = [name for name in own_now if name in own and own[name] != own_now[name]]
    of_files = lambda record: {unplaced(name): each.get("sha256") for name, each in record["losses"].items()}
    for name in changed:
        same = of_files(before).get(name) == of_files(now)[name] is not None
        why = "its file is the same, so what it holds, reads or imports is not" if same else "it was edited since"
        said.append(f"{name} computes something else now: {why}")
    files, files_now = (record.get("functions", {}) for record in (before, now))
    edited = [what for what in files_now if what in files and files[what] != files_now[what]]
    return [*said, *(f"{files_now[what]['file']}, which the {what} stands in, was edited since" for what in edited)]


def moved(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is otherwise of that on which a race may go on: its devices, and how they share it."""
    return _said([row for row in settings(before, now) if _is_free(row["what"])])


def _is_free(what: str) -> bool:
    return what.startswith("device") or what.removeprefix("arguments.") in FREE


def _said(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['what'].removeprefix('arguments.')}: {row['first']} there, {row['second']} now" for row in rows]


def unplaced_arguments(record: dict[str, Any]) -> dict[str, Any]:
    """A record's arguments with its model, optimizer and schedule wherever their files lie."""
    arguments = record.get("arguments", {})
    return arguments | {what: unplaced(arguments[what]) for what in FUNCTIONS if isinstance(arguments.get(what), str)}


def losses_of(record: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What a record says of its losses, wherever their files lie: their names; and, of one's own, what they compute.

    By its program a loss is the same one if no more than a comment beside it was changed.
    """
    own = {unplaced(name): each.get("program") or each.get("sha256") for name, each in record.get("losses", {}).items()}
    return [*map(unplaced, record.get("arguments", {}).get("losses", ()))], own


def begin(
    folder: pathlib.Path, record: dict[str, Any], resume: bool, anyway: bool, every: float
) -> tuple[Checkpoints, dict[str, Any]]:
    """The checkpoints of a race that begins in a folder, or goes on there; and its record, with what it went on with.

    One that kept nothing yet gives way to another. What was kept by a race whose record is gone stays, for this one may be it:
    runs that were made otherwise are told as they are read. Raises `LabError` for a race that is there and unfinished without
    resume, and, but for anyway, for a finished one, and for other settings with resume.
    """
    if resume:
        before = started(folder)
        differ = differences(before, record)
        if differ and not anyway:
            raise LabError(
                f"{folder} began otherwise: {'; '.join(differ)}. Put that back, or go on with --anyway: runs that were kept "
                "with another loss, model, source, rates, seeds or recipe are trained anew, all others stay as they are."
            )
        for said in differ:
            print(f"Going on although it began otherwise. {said}", file=sys.stderr)
        # What was kept under other versions, and on other devices, stays: the finished race has to say so.
        if differ := [*before.get("resumed_with", []), *differ, *moved(before, record)]:
            record = record | {"resumed_with": differ}
        whence = "goes on from what is kept there" if has_begun(folder) else "had kept no block yet, and begins anew"
        print(f"xentlab: {folder} {whence}.", file=sys.stderr)
    elif (folder / BEGUN).is_file() and has_begun(folder):
        raise LabError(
            f"{folder} holds an unfinished race. Go on with `xentlab race --resume {runs.quoted(folder)}`, or give another "
            "--out."
        )
    elif (folder / "run.json").exists():
        if not anyway:
            raise LabError(f"{folder} holds a finished race. Give another one with --out, or replace it with --anyway.")
        _clear(folder / KEPT)  # what the finished one may have left
    elif has_begun(folder):
        print(f"{folder} has checkpoints without their {BEGUN}: what was trained alike is taken.", file=sys.stderr)
    runs.write_json(folder / BEGUN, record)
    return kept(folder, every), record


def kept(folder: pathlib.Path, every: float) -> Checkpoints:
    """A run folder's checkpoints. Raises `LabError` where something else has their place."""
    place = folder / KEPT
    if not place.is_dir() and (place.exists() or place.is_symlink()):
        raise LabError(f"{place} is no folder, where checkpoints are kept. Move it away, or give another --out.")
    return Checkpoints(place, every)


def has_begun(folder: pathlib.Path) -> bool:
    """Whether any block of a race is kept."""
    return any(path.name.isdecimal() for path in (folder / KEPT).glob("*/*/*"))


def finish(folder: pathlib.Path) -> None:
    """Once all results are written: nothing is left to resume."""
    (folder / BEGUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _clear(folder / KEPT)


def _clear(folder: pathlib.Path) -> None:
    """Removes what a race kept, and the folder, if it is no link and nobody has anything else there."""
    for inside in folder.iterdir() if folder.is_dir() else ():
        if is_grid_folder(inside.name) and inside.is_dir():
            shutil.rmtree(inside)
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()


@contextlib.contextmanager
def stopping(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Within, the first Ctrl-C lets the block in hand end and be kept; the second one stops at once.

    Also where the process was begun to ignore it, in a script's background say: `kill -INT` stops it there.
    """
    if checkpoints is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        if checkpoints.stop.is_set():
            signal.default_int_handler(signal.SIGINT, None)
        checkpoints.stop.set()
        print("xentlab: stopping after this block, to keep it. Ctrl-C once more stops at once.", file=sys.stderr)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def as_command(record: dict[str, Any], command: type) -> Any:
    """A recorded command again. Raises `LabError` for arguments that this version does not have."""
    arguments = record.get("arguments")
    kinds = typing.get_type_hints(command)
    if not isinstance(arguments, dict):
        raise LabError("the run's record does not say with which arguments it was made.")
    if unknown := sorted(set(arguments) - set(kinds)):
        raise LabError(f"the run was made with {', '.join(unknown)}, which this version does not have.")
    whole = {}
    for name, value in arguments.items():
        if not runs.of_type(value, kinds[name]):
            raise LabError(f"the run's record is not what was written: {name} is {value!r}. Was it edited?")
        if isinstance(value, str) and pathlib.Path in (kinds[name], *typing.get_args(kinds[name])):
            value = pathlib.Path(value)
        whole[name] = tuple(value) if isinstance(value, list) else value
    return command(**whole)
