"""The command race: begun or resumed, alone or with other processes."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from xentlab import console
from xentlab.cli.writing import folder_of, record_of, show, write
from xentlab.commands import Race
from xentlab.contract import LabError
from xentlab.names import expanded

LEGEND = """±: 95% over seeds. calibration: the expected error of how sure it was. smoothing: the share of the uniform that
validation mixed in. at T: test NLL after one temperature, in brackets. ⇥: the end of the
grid of rates, or of the temperatures."""


def run_race(command: Race) -> None:
    """A race, begun or resumed, alone or with other processes."""
    from xentlab import hosts, resume, runs
    from xentlab.mesh import AXES, make_mesh, parse_mesh
    from xentlab.race import planned, race

    axes, processes = parse_mesh(command.mesh, tuple(AXES)), hosts.join(command.hosts)
    mesh = make_mesh(axes, processes) or _all_devices()
    begun = time.perf_counter()
    command = _as_quick(command)
    _refuse_contradictions(command)
    source = _source(command)
    command = dataclasses.replace(command, out=command.resume or command.out)
    asked = _asked(command) | {"source": source, "mesh": mesh}
    planned(**asked)  # a mistake must not leave a race begun
    said: set[str] = set()

    def laid_out(layout):
        if command.verbose and layout.why not in said:
            said.add(layout.why)
            print(f"{layout.width} runs a call, {layout.at_a_time} calls at a time: {layout.why}.", file=sys.stderr)

    taken = _taken(command, source, processes)
    with _in_a_line(processes), taken as (folder, checkpoints, record), _told_how_to_go_on(folder):
        with resume.stopping(checkpoints), console.progress() as tell:
            result = race(**asked, progress=tell, checkpoints=checkpoints, laid_out=laid_out)
        if folder and hosts.first():
            # As it began: a loss's file that was edited meanwhile is not what was raced.
            kept = {key: value for key, value in record.items() if key in ("losses", "functions", "resumed_with")}
            try:
                write(command, result.frames(), begun, [source.describe()], **kept)
            except LabError as error:
                raise LabError(
                    f"{error} All runs are done and kept: once it can be written, `xentlab race --resume "
                    f"{runs.quoted(folder)}` does so at once."
                ) from error
            resume.finish(folder)  # before anything is printed, for what reads it may be gone
    if hosts.first():
        _tell(command, result)


def _refuse_contradictions(command: Race) -> None:
    if command.markov is not None and command.text is not None:
        raise LabError("--text and --markov exclude each other: a race has one source.")
    if not 0 <= command.checkpoint_every < float("inf"):
        raise LabError(f"--checkpoint-every is a number of seconds, 0 for every block; got {command.checkpoint_every:g}.")
    if command.anyway and not (command.out or command.resume):
        raise LabError("--anyway is for a folder that is there: give it with --out or --resume.")
    if command.resume and command.out:
        raise LabError(
            f"--resume {command.resume} goes on in that folder, and --out {command.out} gives a folder too. Leave --out out."
        )


@contextlib.contextmanager
def _taken(command: Race, source: Any, processes: int) -> Iterator[tuple[pathlib.Path | None, Any, dict[str, Any]]]:
    """The race's folder, if it has one, held by the first process; its checkpoints; and its record, which that one has.

    Raises `LabError` in every process where one of them cannot begin, or is another command's.
    """
    from xentlab import hosts, resume, runs

    folder, checkpoints, record, refusal = command.out, None, {}, None
    with contextlib.ExitStack() as held:
        if folder and hosts.first():
            try:
                folder = held.enter_context(runs.using(folder_of(command)))
                record = record_of(command, [source.describe()], 0.0)
                options = (command.resume is not None, command.anyway, command.checkpoint_every)
                checkpoints, record = resume.begin(folder, record, *options)
            except LabError as error:  # the others wait, and are to hear of it
                refusal = error
        elif folder:
            checkpoints = resume.kept(folder, command.checkpoint_every)
        if not hosts.gathered(refusal is None).all():
            raise refusal or LabError("the first process refuses; what it says, says why.")
        if processes > 1 and (differ := hosts.unlike({"COUNT": processes} | _shared(command, source, folder))):
            raise LabError(
                f"the processes were started unlike: {', '.join(differ)} differ. Start each by the same command but for its "
                "INDEX in --hosts, with the same text, losses and versions, and an --out that all of them see."
            )
        yield folder, checkpoints, record


def _tell(command: Race, result: Any) -> None:
    """Prints a race's table, as it is asked for, and what there is to read in it."""
    from xentlab import reading

    show(command, result.table, console.summary(result.table))
    if command.format != "table":
        return
    print(LEGEND)
    said = [*reading.races(result.table, result.curves), *reading.pairs(result.pairs)]
    for sentence in [*said, *reading.temperatures(result.table), *reading.rarity(result.frequency)]:
        print(f"- {sentence}")
    if command.quick:
        print("- A quick race shows that all works; of the losses it says nothing.")


@contextlib.contextmanager
def _told_how_to_go_on(folder: pathlib.Path | None) -> Iterator[None]:
    """Whoever stops a race that has a folder hears what is kept there."""
    from xentlab import resume, runs

    try:
        yield
    except KeyboardInterrupt:
        if not folder:
            raise
        what = "What is done is kept" if resume.has_begun(folder) else "No block was done yet that could be kept"
        raise KeyboardInterrupt(f"{what}. Go on with: xentlab race --resume {runs.quoted(folder)}") from None


@contextlib.contextmanager
def _in_a_line(processes: int) -> Iterator[None]:
    """What ends a race from without, a full memory or the loss of another process, is a `LabError`."""
    import jax

    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise LabError(
                f"the memory is full: {error}. Take fewer seeds, a smaller batch or window, or more devices by --mesh."
            ) from error
        if processes == 1:
            raise
        raise LabError(
            f"the other processes are lost: {error}. What is kept is whole; --resume goes on, on as many devices as there are."
        ) from error


def _shared(command: Race, source: Any, folder: pathlib.Path | None) -> dict[str, Any]:
    """What must be the same in all processes of a race; where texts and folders lie need not be."""
    from xentlab.resume import losses_of, unplaced_arguments
    from xentlab.runs import BEGUN
    from xentlab.sources import identity

    record = record_of(command, [source.describe()], 0.0)
    begun = folder / BEGUN if folder else None
    places = ("text", "out", "losses")
    return {
        **{key: value for key, value in unplaced_arguments(record).items() if key not in places},
        "losses": losses_of(record),
        "functions": record.get("functions"),
        "source": identity(record["sources"][0]),
        "versions": [record["versions"][name] for name in ("xentlab", "jax", "jaxlib", "optax")],
        "the folder": begun and (begun.read_text() if begun.is_file() else "not there"),
    }


def _asked(command: Race) -> dict[str, Any]:
    """The arguments of `race.race` that a command holds."""
    names = ("losses", "model", "learning_rates", "steps", "extensions", "batch", "window", "optimizer", "schedule", "clip")
    same = {name: getattr(command, name) for name in (*names, "label_noise")}
    return same | {"seeds": _seeds(command)}


def _seeds(command: Race) -> tuple[int, ...]:
    """The seeds themselves, which one number alone counts."""
    if len(command.seeds) > 1:
        return command.seeds
    (count,) = command.seeds or (3,)
    if count < 1:
        raise LabError(
            f"--seeds {count} is no seed at all: a number alone says how many, from --seed on. For one seed, 7 say, give "
            "--seeds 1 --seed 7."
        )
    return tuple(range(command.seed, command.seed + count))


def _as_quick(command: Race) -> Race:
    """With --quick, and where nothing else is asked for: 20 steps, one rate, two seeds."""
    if not command.quick:
        return command
    asked = {name: getattr(command, name) != getattr(Race, name) for name in ("steps", "learning_rates", "seeds")}
    quick = {"steps": 20, "learning_rates": command.learning_rates[:1], "seeds": (command.seed, command.seed + 1)}
    return dataclasses.replace(command, **{name: value for name, value in quick.items() if not asked[name]})


def _source(command: Race) -> Any:
    from xentlab.sources import MarkovSource, Text

    if command.markov is None and command.tokenizer != "bpe" and command.bpe_vocab != Race.bpe_vocab:
        raise LabError("--bpe-vocab is a BPE's: give --tokenizer bpe, or leave it out.")
    without = ("order",) if command.markov is None else ("tokenizer", "bpe_vocab")
    if ignored := [name for name in without if getattr(command, name) != getattr(Race, name)]:
        whose = "a Markov chain's: give --markov" if command.markov is None else "a text's: leave --markov out"
        raise LabError(f"--{ignored[0].replace('_', '-')} is {whose}, or leave it out.")
    if command.markov is None:
        return Text(command.text, command.tokenizer, command.bpe_vocab)
    return MarkovSource(command.markov, command.order, seed=command.seed)


def _all_devices() -> Any:
    """Of several accelerators, or several processes, every device takes its share of the runs."""
    import jax

    from xentlab.mesh import make_mesh
    from xentlab.products import on_cpu

    alone = jax.process_count() == 1 and (on_cpu() or jax.device_count() == 1)
    return None if alone else make_mesh({"runs": jax.device_count()}, jax.process_count())


def as_begun(arguments: list[str]) -> Race | None:
    """The race that `--resume FOLDER` goes on with, as it was begun, on whatever devices it is given now."""
    from xentlab.resume import as_command, started

    for place, each in enumerate(arguments):
        name, _, folder = each.partition("=")
        if name == "--resume" and (folder := folder or "".join(arguments[place + 1 : place + 2])):
            return dataclasses.replace(as_command(started(expanded(folder)), Race), out=None, mesh=None)
    return None
