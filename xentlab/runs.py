"""A run's folder: tidy frames, pictures, and a record of how they were made. Every file is whole or absent."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import json
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TYPE_CHECKING, Any

from xentlab.contract import LabError
from xentlab.memory import usable_cores
from xentlab.names import expanded

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "equinox", "pandas", "altair", "scipy", "orbax-checkpoint", "tokenizers")

NUMERICS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl", "jax_threefry_partitionable")

# The commands that a rerun takes: all their records say their kind, an experiment's or an old report's does not.
REPEATED = ("race", "gradients", "budget", "scoreboard")
# What a command was asked to print, and how it came to its end: arguments that no record has, but old ones some.
UNRECORDED = ("format", "verbose", "resume", "anyway", "hosts")
PAGES = ("tour.html", "report.html", "index.html")
LOCK = ".lock"  # in every folder that was ever a run's
BEGUN, KEPT = "begun.json", "checkpoints"  # what an unfinished race began with, and how far it came
# What a record's entries are, in a file that somebody may have edited.
RECORD = {
    "kind": str,
    "arguments": dict[str, Any],
    "losses": dict[str, dict[str, Any]],
    "functions": dict[str, dict[str, Any]],
    "sources": list[dict[str, Any]],
    "resumed_with": list[str],
    "frames": list[str],
    "sums": dict[str, str],
}
WRITTEN = (".csv", ".png", ".html", ".json")
STAGED = ".new"


def new_folder(kind: str, out: str | pathlib.Path | None = None, replace: bool = False) -> pathlib.Path:
    """The folder for a run's files, made if need be: `out`, or runs/<kind>-<time>.

    Raises `LabError` if it is no folder, holds files that are no run's and that one could write over, holds another command's
    unfinished race, or, but for replace, holds a run of another kind, or one that cannot be read.
    """
    folder = expanded(out) if out else pathlib.Path("runs") / f"{kind}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if folder.is_symlink() and not folder.exists():
            raise LabError(f"{folder} is a link to nothing. Give another folder with --out.") from error
        raise LabError(f"cannot make the folder {folder}: {error.strerror}. Give another one with --out.") from error
    if not os.access(folder, os.W_OK):
        raise LabError(f"cannot write into {folder}. Give another folder with --out.")
    if not any((folder / ours).exists() for ours in (LOCK, BEGUN, "run.json")) and (others := _in_the_way(folder)):
        raise LabError(
            f"{folder} holds {', '.join(others)}, which {kind} may write over. Move that away, or give another --out."
        )
    if (folder / BEGUN).exists() and kind != "race":
        raise LabError(f"{folder} holds an unfinished race, which {kind} would write into. Give another folder with --out.")
    if (folder / "run.json").exists() and not replace:
        remedy = "Give another folder with --out" + (", or replace it with --anyway." if kind == "race" else ".")
        held = read_json(folder / "run.json", remedy).get("kind", "another kind" if kind in REPEATED else kind)
        if held != kind:
            raise LabError(f"{folder} holds a run of {held}, which {kind} would overwrite. {remedy}")
    (folder / LOCK).touch()  # a run's from now on, whatever comes of it
    return folder


def _in_the_way(folder: pathlib.Path) -> list[str]:
    """What somebody else has in a folder, of the kinds that runs leave there."""
    from xentlab.checkpoints import is_grid_folder

    # A race whose folder was deleted while it ran has made it again by the next block that it kept.
    kept = [each.name for each in (folder / KEPT).iterdir()] if (folder / KEPT).is_dir() else []
    ours = bool(kept) and all(map(is_grid_folder, kept))
    inside = folder.iterdir()
    return sorted(each.name for each in inside if each.suffix in WRITTEN or (each.name == KEPT and not ours))


def quoted(folder: pathlib.Path) -> str:
    """A folder as a shell takes it."""
    return shlex.quote(str(folder))


@contextlib.contextmanager
def using(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Holds a run's folder against other processes; a process that dies lets go. Raises `LabError` where another has it."""
    import filelock

    # Of one process a lock may be taken again: a command holds the folder that what it calls writes into.
    lock = filelock.FileLock(folder / LOCK, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise LabError(f"{folder} is in use by another process. Wait for it, or give another folder with --out.") from None
    except OSError as error:
        raise LabError(f"cannot write into {folder}: {error.strerror}. Give another folder with --out.") from error
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            if [each.name for each in folder.iterdir()] == [LOCK]:  # nothing was made: no folder is left either
                (folder / LOCK).unlink()
                folder.rmdir()
        raise
    finally:
        lock.release()


def write_bytes(path: pathlib.Path, content: bytes, before: Callable[[], None] = lambda: None) -> pathlib.Path:
    """Writes a whole file or nothing: into a neighbour first, which then takes the name. Raises `LabError` where it cannot.

    before: what is to happen once it is written, just before it takes the name.
    """
    neighbour = None
    try:
        handle, neighbour = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # what it replaces, and checkpoints, may be gone before the system would have written it
        os.chmod(neighbour, 0o666 & ~_umask())
        before()
        os.replace(neighbour, path)
    except BaseException as error:
        if neighbour:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(neighbour)
        if isinstance(error, OSError):
            raise LabError(
                f"cannot write {path}: {error.strerror}. Nothing half-written is left; make room, or give another --out."
            ) from error
        raise
    return path


@contextlib.contextmanager
def replacing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder for a run's files, which take their places together at the end: until then, and on an error, all is as it was.

    The record of a run that was there goes first: half of it and half of another are no run. So do the texts that it coded,
    whose names are those of its losses.
    """
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed
    try:
        staged.mkdir()
    except OSError as error:
        raise LabError(f"cannot write into {folder}: {error.strerror}. Make room, or give another --out.") from error
    try:
        yield staged
        for each in (folder / "run.json", *folder.glob("*.coded")):
            each.unlink(missing_ok=True)
        for each in sorted(staged.iterdir(), key=lambda path: path.name == "run.json"):
            os.replace(each, folder / each.name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@functools.cache
def _umask() -> int:
    """What this process leaves out of a new file's permissions; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_frame(folder: pathlib.Path, name: str, frame: pd.DataFrame) -> pathlib.Path:
    """A frame as folder/<name>.csv. The record of a run that was there goes: half of it and half of another are no run."""
    forget = functools.partial((folder / "run.json").unlink, missing_ok=True)
    return write_bytes(folder / f"{name}.csv", frame.to_csv(index=False).encode(), forget)


def record(arguments: dict[str, Any], sources: list[dict[str, Any]], seconds: float, **more: Any) -> dict[str, Any]:
    """How a run was made: command, arguments, versions, commit, device, sources with the hashes of their texts, time."""
    import jax

    device = jax.devices()[0]
    return {
        "command": [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]],
        "arguments": arguments,
        "sources": sources,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "versions": versions(),
        "commit": commit(),
        "numerics": {name: str(getattr(jax.config, name)) for name in NUMERICS},
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "cores": usable_cores(),
        },
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        **more,
    }


def versions() -> dict[str, str]:
    """xentlab's, Python's, and those of the packages that a run's numbers are made with."""
    own, *others = ((package, _version(package)) for package in ("xentlab", *PACKAGES))
    return dict([own, ("python", platform.python_version()), *others])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its sources, say: what it found is no less worth keeping
        return "not installed"


def write_record(folder: pathlib.Path, content: dict[str, Any]) -> pathlib.Path:
    """The record as folder/run.json, with the check sums of the run's frames, by which one that was cut short is known.

    frames: what `content` calls so, or all that are in the folder.
    """
    names = content.get("frames") or sorted(path.stem for path in folder.glob("*.csv"))
    sums = {name: hashlib.sha256((folder / f"{name}.csv").read_bytes()).hexdigest() for name in names}
    return write_json(folder / "run.json", content | {"frames": [*names], "sums": sums})


def write_json(path: pathlib.Path, content: dict[str, Any]) -> pathlib.Path:
    """A table as JSON; what JSON does not know as text."""
    return write_bytes(path, (json.dumps(content, indent=2, default=str) + "\n").encode())


def read_json(path: pathlib.Path, remedy: str) -> dict[str, Any]:
    """A table from its file. Raises `LabError`, with what is then to be done, where it cannot be read or is none."""
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise LabError(f"{path} cannot be read: {error}. {remedy}") from error
    if not isinstance(content, dict):
        raise LabError(f"{path} cannot be read: it holds no table. {remedy}")
    return content


def read_record(path: pathlib.Path, remedy: str) -> dict[str, Any]:
    """A run's record. Raises `LabError` as `read_json` does, and for an entry that is not what `RECORD` says."""
    record = read_json(path, remedy)
    for name, kind in RECORD.items():
        if name in record and not of_type(record[name], kind):
            said = json.dumps(record[name], default=str)[:60]
            raise LabError(f"{path} is not what was written: its {name} is {said}. {remedy}")
    return record


def of_type(value: Any, kind: Any) -> bool:
    """Whether a value, of a file or a record, is of an annotation's type: a class, one of several, a list or a table of some.

    >>> of_type(["nll"], tuple[str, ...]), of_type("nll", tuple[str, ...]), of_type(None, int | None), of_type(True, int)
    (True, False, True, False)
    """
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return value in inside
    if origin in (tuple, list):
        return isinstance(value, (tuple, list)) and all(of_type(each, inside[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(of_type(each, inside[1]) for each in value.values())
    if inside:
        return any(of_type(value, each) for each in inside)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind is Any or isinstance(value, str if kind is pathlib.Path else kind)


def find_page(run: str | pathlib.Path | None = None) -> pathlib.Path:
    """The page of a run: of a folder or page that is named, or of the newest run under runs/.

    Raises `LabError` where there is none.
    """
    if run is None:
        pages = [page for page in pathlib.Path("runs").glob("*/*.html") if page.name in PAGES]
        if not pages:
            raise LabError("no run with a page under runs/. Make one with `xentlab report` or `xentlab tour`.")
        return max(pages, key=lambda page: page.stat().st_mtime)
    run = expanded(run)
    if run.is_file():
        return run
    for name in PAGES:
        if (run / name).is_file():
            return run / name
    if not run.is_dir():
        raise LabError(f"there is no {run}.")
    pictures = [picture.name for picture in sorted(run.glob("*.png"))]
    there = f" There are pictures: {', '.join(pictures)}." if pictures else ""
    raise LabError(f"{run} has no page. `xentlab report` and `xentlab tour` write one into their --out.{there}")


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, with "+" and a hash of what differs; None outside of one."""
    here = pathlib.Path(__file__).parent
    try:
        run = lambda *words: subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        top = pathlib.Path(run("rev-parse", "--show-toplevel"))
        if not (top / "xentlab" / "runs.py").is_file():  # a site-packages folder inside some other project's checkout
            return None
        changes = run("diff", "HEAD", "--", str(here))
        for name in run("ls-files", "--others", "--exclude-standard", "--full-name", "--", str(here)).splitlines():
            changes += f"{name}\n{(top / name).read_text(errors='replace')}"
        return run("rev-parse", "HEAD") + (f"+{hashlib.sha256(changes.encode()).hexdigest()[:12]}" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None
