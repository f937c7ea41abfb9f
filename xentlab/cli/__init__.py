"""The command line: runs the commands of `commands`. Heavy imports wait until one needs them."""

from __future__ import annotations

import _thread
import codecs
import contextlib
import dataclasses
import difflib
import importlib
import io
import os
import re
import sys
import threading
from typing import Any

import tyro

from xentlab import console, hosts
from xentlab.cache import keep_compiled
from xentlab.cli.race import as_begun
from xentlab.cli.writing import kind_of
from xentlab.commands import COMMANDS, Race
from xentlab.contract import LabError
from xentlab.names import near_names
from xentlab.runs import versions

# Where each command's `run_<command>` stands.
PLACES = {
    "losses": ("list", "show", "gradients", "budget", "plan", "audit"),
    "race": ("race",),
    "pages": ("scoreboard", "report", "tour", "open", "api"),
    "again": ("compare", "rerun"),
}
NO_CACHE = "--no-cache"
PLAIN = {"–": "-", "−": "-", "∞": "inf", "±": "+-", "×": "x", "⇥": "->|", "→": "->", "≥": ">=", "≤": "<=", "²": "^2"}


def main(arguments: list[str] | None = None) -> None:
    """The `xentlab` command. A user's mistake is one line on stderr and exit code 2; a stdout that fails, one and code 1."""
    is_process = arguments is None
    _open_closed()
    if is_process:
        sys.unraisablehook = _again
    try:
        _do(list(sys.argv[1:] if is_process else arguments))
    except LabError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of a pipe, head for one, has had enough
        _drop_output()
    except OSError as error:
        if error.filename is not None:  # a file's; who writes one says so by a LabError
            _fail(f"{error.filename}: {error.strerror}. Is the path right, and may you read and write there?")
        _drop_output()
        _fail(
            f"cannot write the output: {error.strerror or error}. Send it to a place with room, or write files with --out.", 1
        )
    except KeyboardInterrupt as stopped:
        print(f"xentlab: stopped. {stopped}".strip(), file=sys.stderr, flush=True)
        if is_process:
            os._exit(130)  # Python's own end, while XLA's threads compile, may be a segmentation fault
        sys.exit(130)


def _do(arguments: list[str]) -> None:
    try:
        rest = [each for each in arguments if each != NO_CACHE]
        if rest == ["--version"]:
            print("\n".join(f"{name} {version}" for name, version in versions().items()))
            return
        command = _parse(rest)
        _each_once(getattr(command, "losses", ()))
        if NO_CACHE not in arguments:
            keep_compiled()
        run(command)
    finally:
        sys.stdout.flush()  # what fails here would else fail as Python ends, help too, where nobody can catch it


def _each_once(losses: tuple[str, ...]) -> None:
    if again := [name for name in dict.fromkeys(losses) if losses.count(name) > 1]:
        raise LabError(f"each loss is named once; {', '.join(again)} repeat{'s' * (len(again) == 1)}.")


def _open_closed() -> None:
    """Python has None for a stream that was closed before it began (`>&-`): nobody listens there.

    And one that knows few characters, a pipe of another encoding, gets plain ones for the rest: "?" alone is a verdict's.
    """
    codecs.register_error("plainly", _plainly)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        with contextlib.suppress(AttributeError, OSError):  # no text stream of Python's, or one whose end was exchanged
            getattr(sys, name).reconfigure(errors="plainly")


def _plainly(error: UnicodeError) -> tuple[str, int]:
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


def _again(lost: Any) -> None:
    """A Ctrl-C that came within a callback of the garbage collector, JAX's say, which can raise nothing, comes once more."""
    if lost.exc_type is KeyboardInterrupt:
        threading.Timer(0.05, _thread.interrupt_main).start()  # once the callback has ended
    else:
        sys.__unraisablehook__(lost)


def _drop_output() -> None:
    """What is still to be written goes nowhere, so that Python's own end does not try again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(command: Any) -> None:
    """Does what a command says.

    Where data is asked for, what else is printed, by a loss of one's own say, goes to stderr.
    """
    name = kind_of(command)
    place = next(place for place, names in PLACES.items() if name in names)
    does = getattr(importlib.import_module(f"xentlab.cli.{place}"), f"run_{name}")
    if getattr(command, "hosts", None):
        hosts.own_stdout()
    with console.data_alone() if getattr(command, "format", "table") != "table" else contextlib.nullcontext():
        does(command)


def _fail(message: str, code: int = 2) -> None:
    print(f"xentlab: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


ABOUT = (
    "A differentiable loss lab for next-token models. `xentlab COMMAND --help` tells more, `xentlab --version` what is "
    "installed. What JAX compiles is kept in your cache folder for the next time, or in FOLDER/compiled with "
    "XENTLAB_CACHE=FOLDER; --no-cache, with any command, or XENTLAB_CACHE=off turns that off."
)


def _parse(arguments: list[str]) -> Any:
    if empty := [each for each in arguments if not each or re.fullmatch("--[a-z-]+=", each)]:
        what = f" ({empty[0]})" if empty[0] else ""
        raise LabError(f"an argument is empty{what}: is a shell's variable unset?")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if arguments[:1] == ["race"] and (default := as_begun(arguments)):
                # What is not given is as it was begun; what is given otherwise is then seen.
                return tyro.cli(Race, default=default, prog="xentlab race", args=arguments[1:])
            if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
                raise LabError(f"no command {arguments[0]!r}; {near_names(arguments[0], COMMANDS)}")
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="xentlab", description=ABOUT, args=arguments or ["--help"]
            )
    except SystemExit as end:
        if end.code != 2:
            raise
        if hint := _hint(arguments):
            _fail(hint)
        # tyro draws a box under a title, in plain characters where the terminal has no others; one line says the same.
        _, *lines = said.getvalue().strip().splitlines()
        parts = re.split(r"[─-]{4,}", " ".join(line.strip("│╰╯ ") for line in lines))
        text = "; ".join(part.strip(" .") for part in parts if part.strip(" .")) + "."
        _fail(re.sub("(run|see) xentlab --help", rf"\1 xentlab {' '.join(arguments[:1])} --help", text))


def _hint(arguments: list[str]) -> str | None:
    """What a command was given that it does not have, and what it has instead; None where that is not the mistake."""
    name, *rest = arguments or ("",)
    if name not in COMMANDS:
        return None
    fields = {
        "--" + field.name.replace("_", "-"): "Positional" in str(field.type) for field in dataclasses.fields(COMMANDS[name])
    }
    options = [option for option, positional in fields.items() if not positional]
    more = f" `xentlab {name} --help` tells all."
    if rest and not rest[0].startswith("-") and "--losses" in options and not any(fields.values()):
        return (
            f"losses come after --losses: xentlab {name} --losses {' '.join(each for each in rest if each[:1] != '-')}.{more}"
        )
    for given in (each.partition("=")[0] for each in rest if re.match("--[a-z]", each)):
        if given in options or given in ("--help", NO_CACHE) or f"--{given[5:]}" in options:  # --no-quick is one too
            continue
        if given in ("--loss", "--losses") and any(fields.get(each) for each in ("--loss", "--losses")):
            return f"{name} takes losses as they are: xentlab {name} {' '.join(rest[rest.index(given) + 1 :][:3])}.{more}"
        short = [each for each in options if "".join(word[:1] for word in each[2:].split("-")) == given[2:]]
        near = short or difflib.get_close_matches(given, options, n=1)
        return f"{name} has no option {given}{f'; did you mean {near[0]}?' if near else '.'}{more}"
    return None
