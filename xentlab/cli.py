"""The command line: list, show, gradients, budget, race, report. Heavy imports wait until a command needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from xentlab.contract import LabError

if TYPE_CHECKING:
    import pandas as pd

Format = Literal["table", "csv", "json"]
Losses = Annotated[
    tuple[str, ...], arg(help='names, with settings if need be: nll "focal(gamma=1)" ./mine.py:my_loss package.module:loss')
]
Out = Annotated[pathlib.Path | None, arg(help="folder to write into; made if need be")]
DEFAULT = ("nll", "brier", "mse_logits", "hinge", "focal", "generalized_cross_entropy", "entmax15")


@dataclasses.dataclass(frozen=True)
class List:
    """Every loss of the catalogue and of installed packages, with what is known of it.

    Example: xentlab list --format csv
    """

    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Show:
    """One loss: formula, gradient, source, facts, and where its code is.

    Example: xentlab show focal
    """

    loss: Positional[str]
    """a name of the list, or ./mine.py:my_loss"""
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Each loss's value and gradient at chosen probabilities of the right token, in float64.

    Example: xentlab gradients --losses nll brier --probabilities .9 .1 .01 --rivals one
    """

    losses: Losses = DEFAULT
    probabilities: tuple[float, ...] = (0.99, 0.9, 0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-9, 1e-12)
    """each strictly between 0 and 1"""
    vocab: int = 16
    """size of the vocabulary"""
    rivals: Literal["even", "one", "both"] = "even"
    """how p becomes small: the target's logit falls (even), or one rival rises (one)"""
    out: Out = None
    format: Format = "table"
    seed: int = 0
    """has no effect here: a profile draws nothing"""
    quick: bool = False
    """three probabilities only"""


@dataclasses.dataclass(frozen=True)
class Budget:
    """Where a real batch's gradient goes, by the probability that your model gave each right token.

    FILE is an .npz with arrays logits [..., V] and targets [...], or a .npy of logits with --targets.
    Example: xentlab budget batch.npz --losses nll focal
    """

    file: Positional[pathlib.Path]
    """.npz with logits and targets, or .npy of logits"""
    targets: pathlib.Path | None = None
    """.npy of targets, where FILE holds logits alone"""
    losses: Losses = DEFAULT
    bins: tuple[float, ...] = ()
    """rising edges of p from 0 to 1; by default 0 1e-4 1e-3 .01 .1 .25 .5 .75 .9 .99 1"""
    out: Out = None
    format: Format = "table"


@dataclasses.dataclass(frozen=True)
class Race:
    """Train a model with each loss, at each loss's own best learning rate, and compare on held-out tokens.

    With --out it writes curves.csv, table.csv, run.json and pictures.
    Example: xentlab race --losses nll brier --text book.txt --steps 500 --seeds 0 1 2 --out runs/book
    """

    losses: Losses = DEFAULT
    text: pathlib.Path | None = None
    """a UTF-8 file or folder; without it, the English that comes with Python"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    bpe_vocab: int = 1024
    """tokens of the BPE vocabulary that is trained on the text"""
    markov: int | None = None
    """race on a Markov chain over this many tokens instead, whose law is known"""
    order: int = 1
    """how many tokens the Markov chain's law reads"""
    model: str = "mlp"
    """bigram, mlp or transformer, with options: "transformer(layers=3)" """
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    steps: int = 400
    seeds: tuple[int, ...] = ()
    """by default three, from --seed on"""
    batch: int = 16
    """windows a step"""
    window: int = 32
    """predicted tokens a window"""
    optimizer: str = "adamw"
    """sgd, adam, adamw, muon or lion, with options: "sgd(momentum=.9)" """
    schedule: str = "cosine"
    """constant, linear or cosine, with options: "cosine(warmup=.1)" """
    clip: float | None = None
    """greatest length of the gradient"""
    out: Out = None
    seed: int = 0
    format: Format = "table"
    quick: bool = False
    """20 steps, one rate, two seeds: only to see that all works"""


@dataclasses.dataclass(frozen=True)
class Report:
    """The main job: gradients, budgets and races of several losses, as one page that opens without a network.

    Writes report.html, pictures, CSVs and run.json into --out (by default runs/report-<time>).
    Example: xentlab report --losses nll focal ./mine.py:my_loss --text book.txt
    """

    losses: Losses = DEFAULT
    text: pathlib.Path | None = None
    """a UTF-8 file or folder; without it, the English that comes with Python"""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    bpe_vocab: int = 1024
    out: Out = None
    seed: int = 0
    format: Format = "table"
    quick: bool = False
    """tiny races: only to see that all works"""


COMMANDS = {"list": List, "show": Show, "gradients": Gradients, "budget": Budget, "race": Race, "report": Report}


def main(arguments: list[str] | None = None) -> None:
    """The `xentlab` command. A user's mistake is one line on stderr and exit code 2."""
    run = {List: _list, Show: _show, Gradients: _gradients, Budget: _budget, Race: _race, Report: _report}
    try:
        command = _parse(sys.argv[1:] if arguments is None else arguments)
        run[type(command)](command)
        sys.stdout.flush()
    except LabError as error:
        _fail(str(error))
    except BrokenPipeError:  # the reader of a pipe, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("xentlab: stopped.", file=sys.stderr)
        sys.exit(130)


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
        _print_table([{column: row[column] for column in columns} for row in rows])
        print("low_p: the limit of |dL/dz_y| as p -> 0 (V = 16), with even rivals, and with one that rises.")
        print("More on one of them: xentlab show LOSS. A loss of your own: ./file.py:function, wherever a name may stand.")
        for name, value in others.items():
            print(f"installed: {name} ({value})")
    else:
        _print_rows([*rows, *({"loss": name, "family": value} for name, value in others.items())], command.format)


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
        _print_rows([row], command.format)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in row.items():
        if value not in ("", None):
            table.add_row(f"[bold]{key}[/bold]", _escaped(_text(value)))
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    console.print(table)
    if function.__doc__:
        console.print("\n" + _escaped(inspect.getdoc(function)), highlight=False)


def _facts(name: str, loss: Any) -> dict[str, Any]:
    from xentlab.contract import facts_of, settings_of, unwrapped

    facts, function = facts_of(loss), unwrapped(loss)[0]
    parameters = list(inspect.signature(function).parameters.values())[2:]
    bound = settings_of(loss)

    def limit(claim):
        if not callable(claim):
            return claim
        known = inspect.signature(claim).parameters
        return claim(16, **{key: value for key, value in bound.items() if key in known})

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
        "low_p_even": limit(facts.low_p_even),
        "low_p_one": limit(facts.low_p_one),
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


def _race(command: Race) -> None:
    from xentlab.race import race
    from xentlab.sources import MarkovSource, Text

    begun = time.perf_counter()
    if command.markov is not None and command.text is not None:
        raise LabError("--text and --markov exclude each other: a race has one source.")
    source = (
        Text(command.text, command.tokenizer, command.bpe_vocab)
        if command.markov is None
        else MarkovSource(command.markov, command.order, seed=command.seed)
    )
    with _progress() as tell:
        result = race(
            command.losses,
            source,
            command.model,
            command.learning_rates[:1] if command.quick else command.learning_rates,
            command.seeds or tuple(range(command.seed, command.seed + (2 if command.quick else 3))),
            20 if command.quick else command.steps,
            progress=tell,
            batch=command.batch,
            window=command.window,
            optimizer=command.optimizer,
            schedule=command.schedule,
            clip=command.clip,
        )
    frames = {"curves": result.curves, "table": result.table}
    _finish(command, frames, "table", begun, [source.describe()])


def _report(command: Report) -> None:
    from xentlab.report import make_report
    from xentlab.sources import Text

    text = Text(command.text, command.tokenizer, command.bpe_vocab)
    with _progress() as tell:
        report = make_report(command.losses, text, command.out, command.seed, command.quick, tell)
    if command.format != "table":
        _print_rows(report.table.to_dict("records"), command.format)
    else:
        _print_table(_summary(report.table))
        for sentence in itertools.chain(*report.reading.values()):
            print(f"- {sentence}")
    print(f"Open {report.folder / 'report.html'} in a browser.", file=sys.stderr)


def _finish(command: Any, frames: dict[str, Any], shown: str, begun: float, sources: list[dict] | None = None) -> None:
    """Writes a command's frames into --out, if there is one, and prints the one that is asked for."""
    if command.out:
        from xentlab import runs

        folder = runs.new_folder(shown, command.out)
        for name, frame in frames.items():
            runs.write_frame(folder, name, frame)
        arguments = {key: value for key, value in dataclasses.asdict(command).items() if key != "format"}
        runs.write_record(folder, runs.record(arguments, sources or [], time.perf_counter() - begun))
        _pictures(frames, folder)
        print(f"Wrote {folder}.", file=sys.stderr)
    frame = frames[shown]
    if command.format == "table":
        _print_table(_summary(frame) if shown == "table" else frame.to_dict("records"))
    else:
        _print_rows(frame.to_dict("records"), command.format)


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


def _summary(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The table's columns that fit a terminal, means with half of their interval."""
    rows = []
    for _, row in table.iterrows():
        entry = {"source": row.source, "loss": row.loss, "best rate": f"{row.best_rate:g}{' ⇥' * row.rate_at_edge}"}
        for column, title in (
            ("test_nll", "test NLL"),
            ("bits_per_byte", "bits/byte"),
            ("accuracy", "accuracy"),
            ("calibration_error", "calibration"),
            ("kl_to_law", "KL to law"),
        ):
            half = (row[f"{column}_high"] - row[f"{column}_low"]) / 2
            spread = f" ± {half:.2g}" if half == half else ""
            entry[title] = "" if row[column] != row[column] else f"{row[column]:.4f}{spread}"
        entry["smoothing"] = f"{row.smoothing:.2g}"
        entry["diverged"] = row.diverged
        rows.append(entry)
    return rows


@contextlib.contextmanager
def _progress():
    """A function (what, done, total) that moves a bar on stderr if that is a terminal, and else is silent."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting (the first steps compile)", total=None)

        def tell(what, done, total):
            bar.update(task, description=what, completed=done, total=total)

        yield tell


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return "∞" if value == float("inf") else f"{value:.6g}"
    return "" if value is None else str(value)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print_table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in rows[0]:
        table.add_column(column, no_wrap=True, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(_escaped(_text(value)) for value in row.values()))
    # A pipe or file has no width: nothing is cut off there.
    Console(width=None if sys.stdout.isatty() else 400).print(table, highlight=False)


def _print_rows(rows: list[dict[str, Any]], form: Format) -> None:
    if form == "csv":
        import pandas as pd

        sys.stdout.write(pd.DataFrame(rows).to_csv(index=False))
    else:
        json.dump([{key: _plain(value) for key, value in row.items()} for row in rows], sys.stdout, indent=1, default=_item)
        print()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null, and the words inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _item(value: Any) -> Any:
    return value.item()


if __name__ == "__main__":
    main()
