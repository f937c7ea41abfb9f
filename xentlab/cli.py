"""The command line: runs the commands of `commands`. Heavy imports wait until one needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import os
import pathlib
import re
import sys
import time
from typing import Any

import tyro

from xentlab import console
from xentlab.commands import (
    COMMANDS,
    Api,
    Audit,
    Budget,
    Compare,
    Gradients,
    List,
    Open,
    Plan,
    Race,
    Report,
    Rerun,
    Scoreboard,
    Show,
    Tour,
)
from xentlab.contract import LabError


def main(arguments: list[str] | None = None) -> None:
    """The `xentlab` command. A user's mistake is one line on stderr and exit code 2."""
    try:
        _run(_parse(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except LabError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of a pipe, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("xentlab: stopped.", file=sys.stderr)
        sys.exit(130)


def _run(command: Any) -> None:
    functions = {
        **{List: _list, Show: _show, Gradients: _gradients, Budget: _budget, Plan: _plan},
        **{Audit: _audit, Race: _race, Scoreboard: _scoreboard, Report: _report},
        **{Tour: _tour, Compare: _compare, Rerun: _rerun, Open: _open, Api: _api},
    }
    functions[type(command)](command)


def _fail(message: str) -> None:
    print(f"xentlab: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _parse(arguments: list[str]) -> Any:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,
                prog="xentlab",
                description="A differentiable loss lab for next-token models. `xentlab COMMAND --help` tells more.",
                args=arguments or ["--help"],
            )
    except SystemExit as end:
        if end.code != 2:
            raise
        # tyro draws a box under a title, in plain characters where the terminal has no others; one line says the same.
        _, *lines = said.getvalue().strip().splitlines()
        parts = re.split(r"[─-]{4,}", " ".join(line.strip("│╰╯ ") for line in lines))
        _fail("; ".join(part.strip(" .") for part in parts if part.strip(" .")) + ".")


def _list(command: List) -> None:
    from xentlab.catalogue import LOSSES, installed_losses

    rows = [_facts(name, loss) for name, loss in LOSSES.items()]
    others = {name: point.value for name, point in installed_losses().items() if name not in LOSSES}
    if command.format == "table":
        columns = ("loss", "family", "settings", "proper", "calibrated", "convex", "bounded", "low_p_even", "low_p_one")
        console.print_table([{column: row[column] for column in columns} for row in rows])
        print("low_p: the limit of |dL/dz_y| as p -> 0 (V = 16), with even rivals, and with one that rises.")
        print("More on one of them: xentlab show LOSS. A loss of your own: ./file.py:function, wherever a name may stand.")
        for name, value in others.items():
            print(f"installed: {name} ({value})")
    else:
        console.print_rows([*rows, *({"loss": name, "family": value} for name, value in others.items())], command.format)


def _show(command: Show) -> None:
    from xentlab.catalogue import resolve
    from xentlab.contract import name_of, unwrapped

    loss = resolve(command.loss)
    function = inspect.unwrap(unwrapped(loss)[0])
    row = _facts(name_of(loss), loss)
    try:
        row["code"] = f"{inspect.getsourcefile(function)}:{inspect.getsourcelines(function)[1]}"
    except (OSError, TypeError):
        row["code"] = "not known"
    if command.format != "table":
        console.print_rows([row], command.format)
        return
    console.print_facts(row, inspect.getdoc(function) or "")


def _facts(name: str, loss: Any) -> dict[str, Any]:
    from xentlab.contract import facts_of, low_p_claim, settings_of, unwrapped

    facts, function = facts_of(loss), unwrapped(loss)[0]
    parameters = list(inspect.signature(function).parameters.values())[2:]
    bound = settings_of(loss)

    return {
        "loss": name,
        "family": getattr(function, "__module__", "").rpartition(".")[2],
        "settings": ", ".join(f"{p.name}={bound.get(p.name, p.default)}" for p in parameters),
        "formula": facts.formula,
        "gradient": facts.gradient,
        "link": facts.link_name,
        "proper": facts.proper,
        "calibrated": facts.calibrated,
        "convex": facts.convex,
        "bounded": facts.bounded,
        "shift": facts.shift,
        "local": facts.local,
        "low_p_even": low_p_claim(loss, "even", 16),
        "low_p_one": low_p_claim(loss, "one", 16),
        "stream": ", ".join(inspect.signature(facts.stream).parameters) if facts.stream else "",
        "infinite_at": ", ".join(facts.infinite),
        "source": facts.source,
        "note": facts.note,
    }


def _gradients(command: Gradients) -> None:
    import pandas as pd

    from xentlab.gradients import PATHS, gradient_profile

    begun = time.perf_counter()
    probabilities = command.probabilities[:3] if command.quick else command.probabilities
    paths = PATHS if command.rivals == "both" else (command.rivals,)
    frame = pd.concat([gradient_profile(command.losses, probabilities, command.vocab, path) for path in paths])
    _finish(command, {"profiles": frame.reset_index(drop=True)}, "profiles", begun)


def _budget(command: Budget) -> None:
    from xentlab.gradients import BINS, gradient_budget

    begun = time.perf_counter()
    frame = gradient_budget(command.losses, command.file, command.targets, command.bins or BINS)
    _finish(command, {"budgets": frame}, "budgets", begun)


def _plan(command: Plan) -> None:
    from xentlab.catalogue import resolve
    from xentlab.linear import explain_plan
    from xentlab.linear.costs import head_costs
    from xentlab.linear.mesh import make_mesh, parse_mesh

    axes, loss = parse_mesh(command.mesh), resolve(command.loss)
    shape = (command.tokens, command.features, command.vocab)
    begun = lambda head: print(f"compiling: {head}", file=sys.stderr)
    costs = head_costs(*shape, loss, command.dtype, make_mesh(axes), begun)
    if command.format != "table":
        console.print_rows([dataclasses.asdict(cost) for cost in costs], command.format)
        return
    kinds = sorted({kind for cost in costs for kind in cost.sent})
    megabytes = lambda count: f"{count / 1e6:,.3g}" if count < 1e3 * 1e6 else f"{count / 1e6:,.0f}"
    rows = []
    for cost in costs:
        row = {"head": cost.head, "temporary MB": megabytes(cost.temporary_bytes), "output MB": megabytes(cost.output_bytes)}
        row |= {"products": str(cost.products), "GFLOP": f"{cost.flops / 1e9:,.3g}"}
        rows.append(row | {f"{kind} MB": megabytes(cost.sent.get(kind, 0)) for kind in kinds})
    console.print_table(rows)
    layout = (axes.get("data", 1), axes.get("model", 1))
    taken = explain_plan(*shape, loss, command.dtype, layout=layout)
    print(f"auto takes {taken.name}: {taken.why}; {taken.tiles[0]} tokens a chunk, {taken.tiles[1]} classes a tile.")
    import jax

    print(f"One device's share of value and gradient, as compiled for {jax.default_backend()}; nothing was run.")


def _audit(command: Audit) -> None:
    from xentlab.audit import as_json, audit, disagreements
    from xentlab.catalogue import LOSSES, resolve

    names = tuple(LOSSES) if command.all else command.losses
    if not names:
        raise LabError("no losses given; name some, or take --all.")
    losses = [resolve(name, check=False) for name in names]
    audits = []
    with console.progress() as tell:
        for i, (name, loss) in enumerate(zip(names, losses, strict=True)):
            if tell:
                tell(f"audit of {name}", i, len(losses))
            audits.append(audit(loss, command.seed))
    if command.format == "json":
        json.dump(as_json(audits), sys.stdout, indent=1)
        print()
        return
    if command.format == "csv" or len(audits) > 1:
        rows = [
            {"loss": each.loss, **{name: console.verdict_text(verdict.value) for name, verdict in each.verdicts.items()}}
            for each in audits
        ]
        if command.format == "csv":
            console.print_rows(rows, "csv")
            return
        columns = [name for name in rows[0] if name not in ("max_error", "finite", "low_p_limit")]
        if len(rows) > 4:
            console.print_table([{name.replace("_", "\n"): row[name] for name in columns} for row in rows])
        else:
            console.print_table([{"verdict": name, **{row["loss"]: row[name] for row in rows}} for name in columns[1:]])
        differ = {each.loss: said for each, loss in zip(audits, losses, strict=True) if (said := disagreements(each, loss))}
        print(f"{len(audits) - len(differ)} of {len(audits)} agree with every claim that is made of them.")
        for name, said in differ.items():
            print(f"{name}: {'; '.join(said)}")
        print('Evidence, witnesses, limits and errors: one loss at a time, or --format json. "?" is undecided.')
        return
    console.print_audit(audits[0])


def _race(command: Race) -> None:
    from xentlab.linear.mesh import make_mesh, parse_mesh
    from xentlab.race import race
    from xentlab.sources import MarkovSource, Text

    mesh = make_mesh(parse_mesh(command.mesh))
    begun = time.perf_counter()
    if command.markov is not None and command.text is not None:
        raise LabError("--text and --markov exclude each other: a race has one source.")
    source = (
        Text(command.text, command.tokenizer, command.bpe_vocab)
        if command.markov is None
        else MarkovSource(command.markov, command.order, seed=command.seed)
    )
    with console.progress() as tell:
        result = race(
            command.losses,
            source,
            command.model,
            command.learning_rates[:1] if command.quick else command.learning_rates,
            command.seeds or tuple(range(command.seed, command.seed + (2 if command.quick else 3))),
            20 if command.quick else command.steps,
            progress=tell,
            mesh=mesh,
            extensions=command.extensions,
            batch=command.batch,
            window=command.window,
            optimizer=command.optimizer,
            schedule=command.schedule,
            clip=command.clip,
        )
    frames = {"curves": result.curves, "table": result.table, "tests": result.tests, "pairs": result.pairs}
    _finish(command, frames, "table", begun, [source.describe()], console.summary(result.table))
    if command.format == "table":
        from xentlab import reading

        for sentence in reading.pairs(result.pairs):
            print(f"- {sentence}")


def _scoreboard(command: Scoreboard) -> None:
    from xentlab import reading
    from xentlab.catalogue import LOSSES, resolve_all
    from xentlab.race import run_stage, standard_stages
    from xentlab.scoreboard import REPLICATES, scoreboard
    from xentlab.sources import Text

    begun = time.perf_counter()
    losses = resolve_all(tuple(LOSSES) if command.all else command.losses).values()
    stages = standard_stages(Text(command.text), command.seed, command.quick)
    folder = None
    if command.out:
        from xentlab import runs

        folder = runs.new_folder("scoreboard", command.out)
    with console.progress() as tell:
        races = [run_stage(stage, losses, command.seed, command.quick, tell) for stage in stages]
        board = scoreboard(losses, races, command.seed, 0 if command.quick else REPLICATES, folder, tell)
    frames = {"scoreboard": board.table, "codes": board.codes}
    sources = [stage.source.describe() for stage in stages]
    _finish(command, frames, "scoreboard", begun, sources, console.scoreboard_rows(board.table, board.codes))
    if command.format == "table":
        for sentence in reading.scoreboard(board.table, board.codes):
            print(f"- {sentence}")


def _report(command: Report) -> None:
    from xentlab.report import make_report
    from xentlab.sources import Text

    text = Text(command.text, command.tokenizer, command.bpe_vocab)
    with console.progress() as tell:
        report = make_report(command.losses, text, command.out, command.seed, command.quick, tell)
    if command.format != "table":
        console.print_rows(report.table.to_dict("records"), command.format)
    else:
        console.print_table(console.summary(report.table))
        for sentence in itertools.chain(*report.reading.values()):
            print(f"- {sentence}")
    print(f"Open {report.folder / 'report.html'} in a browser.", file=sys.stderr)


def _tour(command: Tour) -> None:
    from xentlab.tour.page import make_tour
    from xentlab.tour.station import check_rows

    with console.progress() as tell:
        folder, walked = make_tour(command.out, command.quick, tell)
    stations = [station for each in walked for station in each.stations]
    rows = check_rows(stations)
    if command.format == "table":
        for station in stations:
            print(f"{'✓' if station.passed else '✗'} {station.claim:2d} {station.title}: {station.found}")
    else:
        console.print_rows(rows, command.format)
    failed = [row for row in rows if not row["pass"]]
    for row in failed:
        wanted = f"{row['relation']} {row['expected']:g} within {row['tolerance']:g}"
        print(f"claim {row['claim']}: {row['what']} is {row['measured']:g}, not {wanted}.", file=sys.stderr)
    print(f"{len(rows) - len(failed)} of {len(rows)} numbers hold. `xentlab open {folder}` shows the page.", file=sys.stderr)
    if failed:
        sys.exit(1)


def _compare(command: Compare) -> None:
    from xentlab.compare import read_run

    _side_by_side(read_run(command.first), read_run(command.second), command.format, command.all)


def _rerun(command: Rerun) -> None:
    from xentlab import runs
    from xentlab.compare import read_run

    found = read_run(command.run)
    again = _recorded(found)
    folder = runs.new_folder("rerun", command.out)
    if folder.resolve() == found.folder.resolve():
        raise LabError(f"a rerun of {command.run} would overwrite it. Give another folder with --out.")
    with contextlib.redirect_stdout(io.StringIO()):
        _run(dataclasses.replace(again, out=folder))
    if _side_by_side(found, read_run(folder), command.format):
        sys.exit(1)


def _recorded(run: Any) -> Any:
    """The command of a run, as its record has it. Raises `LabError` for a record of another kind or version."""
    kind, arguments = run.record.get("kind"), run.record.get("arguments")
    if kind not in COMMANDS or not isinstance(arguments, dict):
        raise LabError(
            f"{run.folder} does not say by which command it was made; a rerun takes race, gradients, budget, scoreboard."
        )
    fields = {field.name: str(field.type) for field in dataclasses.fields(COMMANDS[kind])}
    if unknown := sorted(set(arguments) - set(fields)):
        raise LabError(f"{run.folder} was made by a {kind} with {', '.join(unknown)}, which this version does not have.")
    whole = {}
    for name, value in arguments.items():
        if isinstance(value, str) and ("Path" in fields[name] or name == "out"):
            value = pathlib.Path(value)
        whole[name] = tuple(value) if isinstance(value, list) else value
    return COMMANDS[kind](**whole)


def _side_by_side(first: Any, second: Any, form: str, every: bool = False) -> int:
    """Prints two runs side by side; how many numbers differ."""
    from xentlab.compare import differences, settings

    frame = differences(first, second)
    differ = frame[frame.difference != 0]
    shown = frame if every else differ
    if form != "table":
        console.print_rows(shown.to_dict("records"), form)
        return len(differ)
    for row in settings(first, second):
        print(f"{row['what']}: {console.text(row['first'])} | {console.text(row['second'])}")
    if len(differ):
        print(f"{len(differ)} of {len(frame)} numbers differ.")
    else:
        print(f"All {len(frame)} numbers are the same to the last bit.")
    if len(shown):
        console.print_table(shown.to_dict("records"))
    return len(differ)


def _open(command: Open) -> None:
    from xentlab.runs import find_page

    found = find_page(command.run).resolve()
    print(found)
    if not command.print:
        import webbrowser

        if not webbrowser.open(found.as_uri()):
            raise LabError("no browser could be started here. Open the file above in one; --print stops after naming it.")


def _api(command: Api) -> None:
    from xentlab.runs import new_folder

    try:
        import pdoc
    except ImportError:
        raise LabError("API pages are made by pdoc, in the extra: pip install 'xentlab[docs]'.") from None
    folder = new_folder("api", command.out)
    import pkgutil

    import xentlab

    # pdoc leaves out the modules that a package's __all__ does not name.
    modules = [found.name for found in pkgutil.walk_packages(xentlab.__path__, "xentlab.") if "experiments" not in found.name]
    pdoc.pdoc("xentlab", *modules, output_directory=folder)
    print(f"Wrote {folder}. `xentlab open {folder}` shows it.", file=sys.stderr)


def _finish(
    command: Any,
    frames: dict[str, Any],
    shown: str,
    begun: float,
    sources: list[dict] | None = None,
    rows: list[dict] | None = None,
) -> None:
    """Writes a command's frames into --out, if there is one, and prints the one that is asked for, as `rows` in a table."""
    if command.out:
        from xentlab import runs

        folder = runs.new_folder(shown, command.out)
        for name, frame in frames.items():
            runs.write_frame(folder, name, frame)
        arguments = {key: value for key, value in dataclasses.asdict(command).items() if key != "format"}
        kind = next(name for name, each in COMMANDS.items() if each is type(command))
        runs.write_record(folder, runs.record(arguments, sources or [], time.perf_counter() - begun, kind=kind))
        _pictures(frames, folder)
        print(f"Wrote {folder}.", file=sys.stderr)
    frame = frames[shown]
    if command.format == "table":
        console.print_table(rows or frame.to_dict("records"))
    else:
        console.print_rows(frame.to_dict("records"), command.format)


def _pictures(frames: dict[str, Any], folder: pathlib.Path) -> None:
    from xentlab import charts

    shown = next(iter(frames.values()))
    losses = list(dict.fromkeys(shown.loss))
    if "profiles" in frames:
        paths = dict.fromkeys(shown.rivals)
        panels = [charts.profile(shown, losses, space, path, legend=True) for path in paths for space in charts.SPACES]
        charts.write_png(charts.grid(panels), folder / "profiles.png")
    if "budgets" in frames:
        charts.write_png(charts.grid([charts.budget(shown, losses, "Budget", legend=True)]), folder / "budgets.png")
    if "curves" in frames:
        for source in dict.fromkeys(shown.source):
            panels = [charts.curves(shown, frames["table"], losses, source, True), charts.sweep(shown, losses, source, True)]
            charts.write_png(charts.grid(panels), folder / "curves.png")


if __name__ == "__main__":
    main()
