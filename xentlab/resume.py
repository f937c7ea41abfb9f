"""A race that may be stopped, by Ctrl-C or by a power cut, and go on: what it began with, its checkpoints, its end."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from xentlab import runs
from xentlab.checkpoints import Checkpoints
from xentlab.compare import settings_of_records
from xentlab.contract import LabError
from xentlab.runs import BEGUN

KEPT = "checkpoints"
# What a race may go on with differently, besides what is no part of a run's making: its devices.
FREE = ("mesh",)


def started(folder: pathlib.Path) -> dict[str, Any]:
    """What an unfinished race began with. Raises `LabError` where there is none, or it is damaged."""
    path = folder / BEGUN
    if not path.is_file():
        if (folder / "run.json").is_file():
            raise LabError(
                f"{folder} is finished: nothing is left to resume. `xentlab rerun {runs.quoted(folder)}` does it again."
            )
        raise LabError(f"{folder} holds no unfinished race. `xentlab race --out {runs.quoted(folder)}` begins one.")
    return runs.read_json(path, "Begin again in another folder.")


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What would be otherwise: arguments, losses, texts, versions, commit."""
    texts = [[each.get("sha256") for each in record.get("sources") or []] for record in (before, now)]
    names = ("arguments.losses",)
    if texts[0] == texts[1] and all(texts[0]):  # the same text, wherever it lies
        names += ("arguments.text", *(f"sources.{place}.{key}" for place in range(len(texts[0])) for key in ("path", "name")))
    rows = settings_of_records({**before, "losses": {}}, {**now, "losses": {}})
    kept = [row for row in rows if row["what"] not in names and not row["what"].startswith("device")]
    kept = [row for row in kept if row["what"].removeprefix("arguments.") not in FREE]
    said = [f"{row['what'].removeprefix('arguments.')}: {row['first']} there, {row['second']} now" for row in kept]
    (named, own), (named_now, own_now) = losses_of(before), losses_of(now)
    if named != named_now:
        said.insert(0, f"losses: {', '.join(named)} there, {', '.join(named_now)} now")
    changed = [name for name in own_now if name in own and own[name] != own_now[name]]
    return [*said, *(f"{name} was edited since, and computes something else now" for name in changed)]


def losses_of(record: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """What a record says of its losses, wherever their files lie: their names; and, of one's own, what they compute.

    By its program a loss is the same one if no more than a comment beside it was changed.
    """
    last = lambda name: pathlib.PurePath(name).name
    own = {last(name): each.get("program") or each.get("sha256") for name, each in record.get("losses", {}).items()}
    return [*map(last, record.get("arguments", {}).get("losses", ()))], own


def begin(folder: pathlib.Path, record: dict[str, Any], resume: bool, anyway: bool, every: float) -> Checkpoints:
    """The checkpoints of a race that begins in a folder, or goes on there.

    One that kept nothing yet gives way to another. Raises `LabError` for a race that is there and unfinished without resume,
    and, but for anyway, for a finished one, and for other settings with resume.
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
        # What was kept under other versions stays: the finished race has to say so.
        if differ := [*before.get("resumed_with", []), *differ]:
            record = record | {"resumed_with": differ}
    elif (folder / BEGUN).is_file() and has_begun(folder):
        raise LabError(
            f"{folder} holds an unfinished race. Go on with `xentlab race --resume {runs.quoted(folder)}`, or give another "
            "--out."
        )
    elif (folder / "run.json").exists() and not anyway:
        raise LabError(f"{folder} holds a finished race. Give another one with --out, or replace it with --anyway.")
    elif (folder / KEPT).is_dir():  # the race that these were of is finished, or never came to its first checkpoint
        _clear(folder / KEPT)
    runs.write_json(folder / BEGUN, record)
    return kept(folder, every)


def kept(folder: pathlib.Path, every: float) -> Checkpoints:
    """A run folder's checkpoints."""
    return Checkpoints(folder / KEPT, every)


def has_begun(folder: pathlib.Path) -> bool:
    """Whether any block of a race is kept."""
    return any(path.name.isdecimal() for path in (folder / KEPT).glob("*/*/*"))


def finish(folder: pathlib.Path) -> None:
    """Once all results are written: nothing is left to resume."""
    (folder / BEGUN).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _clear(folder / KEPT)


def _clear(folder: pathlib.Path) -> None:
    """Removes a folder, or what is in it, if it is a link to another disk."""
    for inside in folder.iterdir() if folder.is_symlink() else ():
        shutil.rmtree(inside) if inside.is_dir() and not inside.is_symlink() else inside.unlink()
    if not folder.is_symlink():
        shutil.rmtree(folder)


@contextlib.contextmanager
def stopping(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Within, the first Ctrl-C lets the block in hand end and be kept; the second one stops at once."""
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
    fields = {field.name: str(field.type) for field in dataclasses.fields(command)}
    if not isinstance(arguments, dict):
        raise LabError("the run's record does not say with which arguments it was made.")
    if unknown := sorted(set(arguments) - set(fields)):
        raise LabError(f"the run was made with {', '.join(unknown)}, which this version does not have.")
    whole = {}
    for name, value in arguments.items():
        if isinstance(value, str) and ("Path" in fields[name] or name == "out"):
            value = pathlib.Path(value)
        whole[name] = tuple(value) if isinstance(value, list) else value
    return command(**whole)
