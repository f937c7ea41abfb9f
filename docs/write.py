"""Writes what the documents say of numbers, from a run: `xentlab tour --out runs/tour && python docs/write.py runs/tour`.

It takes runs of the benchmarks too, `python experiments/bench_linear_loss.py && python docs/write.py runs/bench_linear_loss`,
bench_race alike, and of the scripts whose verdicts are about the literature, `python experiments/label_noise.py --out
runs/label_noise` and the others. `collect.py` takes the run's results and pictures into docs/; then the blocks of README.md
and experiments/README.md between <!-- begin NAME --> and <!-- end NAME --> are filled. A test holds them to the results.
"""

import ast
import functools
import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable

from collect import BENCHMARKS, REPORTED, RESULTS, ROOT, collect

from xentlab.reading import words

LOOSE = (9, 5, 4, 7, 10, 12, 18, 19)  # the claims that the README's list of corrections shows
BOTH = ("xentlab", "naive JAX")
TORCH_BARE = "three bare products, torch, [V, D]"


def counted(verdicts: list[str]) -> str:
    """How many differences went as reported, against it, or neither way."""
    kinds = {"as expected": "As expected", "against what is reported": "Against", "not told apart": "Not told apart"}
    numbers = {said: sum(each.startswith(start) for each in verdicts) for said, start in kinds.items()}
    return f"Of {len(verdicts)} differences " + ", ".join(f"{number} {said}" for said, number in numbers.items())


def tried(reported: dict[str, dict]) -> str:
    """What is reported of other losses, a line a script, and every sentence that goes against it."""
    lines = []
    for name, found in reported.items():
        lines.append(f"- **{_docstring(name)[0]}** {counted(found['verdicts'])} (`python experiments/{name}.py`).")
        lines += [f"  - {each}" for each in found["verdicts"] if each.startswith("Against")]
    return "\n".join(lines)


def index(results: dict, benchmarks: dict[str, dict], reported: dict[str, dict]) -> str:
    """The table of experiments: question, command, what it shows, time."""
    lines = ["| claim | question | command | what it shows | time |", "|---|---|---|---|---|"]
    rows = []
    for each in results["experiments"]:
        claims, found = ", ".join(map(str, each["claims"])), " ".join(each["found"]).splitlines()[0]
        rows.append((each["claims"][0], claims, each["question"], each["name"], found, each["seconds"]))
    for name, seconds in results["extra_seconds"].items():
        question, shown = _docstring(name)
        rows.append((99, "", question, name, shown, seconds))
    for name, found in reported.items():
        rows.append((99, "", _docstring(name)[0], name, f"{counted(found['verdicts'])}.", found["seconds"]))
    for _, claims, question, name, found, seconds in sorted(rows):
        cell = found.replace("|", "\\|")
        lines.append(f"| {claims} | {question} | `python experiments/{name}.py` | {cell} | {_time(seconds)} |")
    whole = f"{results['seconds']:.0f} s"
    lines += [
        f"| 1–19 | Does every claim hold? | `python experiments/all.py` | All of these as one page | {whole} |",
        "| | The same as a notebook (jupytext) | `python experiments/tour.py` | Five stations, and a loss of your own | |",
    ]
    said = {"heads": ahead, "race": fastest, "chip": on_chip}
    measured = {BENCHMARKS[name]: (said[name](each), _time(each["seconds"])) for name, each in benchmarks.items()}
    for path in sorted((ROOT / "experiments").glob("bench_*.py")):
        question, about = _docstring(path.stem)
        shown, seconds = measured.get(path.stem, (about, ""))
        lines.append(f"| | {question} | `python experiments/{path.name}` | {shown} | {seconds} |")
    return "\n".join(lines)


def _docstring(name: str) -> tuple[str, str]:
    """An experiment's question, and the paragraph that follows it."""
    question, *rest = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{name}.py").read_text())).split("\n\n")
    return question, " ".join(rest[0].split())


def _time(seconds: float) -> str:
    return "a moment" if seconds < 1 else f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _shape(shape: str) -> str:
    return " × ".join(f"{int(size):,}" for size in shape.split(" x "))


def _grouped(rows: Iterable[dict], name: str) -> dict[str, list[dict]]:
    """The rows by their value of this name."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def _table(rows: list[dict], column: Callable, beside: str, cell: Callable, corner: str = "") -> list[str]:
    """A line a contestant: its cell in every column, and what stands beside it."""
    columns = dict.fromkeys(map(column, rows))
    head = " | ".join([corner, *(f"{each} | {beside}" for each in columns)]).lstrip()
    lines = [f"| {head} |", "|---|" + "--:|--:|" * len(columns)]
    for what, own in _grouped(rows, "what").items():
        found = {column(row): row for row in own}
        lines.append(f"| {what} | {' | '.join(cell(found.get(each)) for each in columns)} |")
    return lines


def _cell(row: dict | None, name: str = "ratio", beside: str = "peak_mb", form: str = ",.0f") -> str:
    """A median with its quartiles, and what stands beside it."""
    if row is None or row[name] is None:
        return "– | –"
    second = "–" if row[beside] is None else format(row[beside], form)
    return f"{row[name]:.2f} ({row[f'{name}_q1']:.2f}–{row[f'{name}_q3']:.2f}) | {second}"


def _versions(benchmark: dict) -> str:
    versions = {"jax": benchmark["versions"]["jax"], **benchmark["peers"]}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def on_chip(benchmark: dict) -> str:
    """How long a grid of runs takes on a GPU or TPU, and laid out otherwise."""
    said = []
    for grid, rows in _grouped(benchmark["grids"], "grid").items():
        own = next(row for row in rows if row["what"] == "xentlab")
        times = "; ".join(f"{row['what']}, {row['times']:.3g}" for row in rows if row is not own)
        said.append(f"{grid}, {own['runs']} runs of {own['steps']} steps: {own['seconds']:.3f} s. Times as long: {times}.")
    return f"On an {benchmark['device']['kind']}, all runs in one program: {' '.join(said)}"


def chip(benchmark: dict) -> str:
    """The benchmark on a GPU or TPU: the heads as a table, and the grids of runs."""
    column, cell = lambda row: f"{_shape(row['shape'])}, {row['dtype']}", functools.partial(_cell, beside="temporary_mb")
    lines = _table(benchmark["rows"], column, "MB", cell, benchmark["device"]["kind"])
    foot = (
        f"nll, value and gradients: times the first row's in the same round, the median of {benchmark['rounds']} rounds with "
        "the quartiles. Products of float32 are TF32, as XLA has them by default, and torch here. MB: held beside arguments "
        f"and gradients, by XLA's count or torch's. jax {benchmark['versions']['jax']}, {benchmark['finished'][:10]}."
    )
    return "\n".join([on_chip(benchmark), "", *lines, "", foot])


def _where(found: dict[str, str]) -> str:
    """What was found at each shape, shapes of one finding together."""
    together: dict[str, list[str]] = {}
    for shape, what in found.items():
        together.setdefault(what, []).append(shape)
    if len(together) == 1:
        return next(iter(together)) + (" at every shape" if len(found) > 1 else "")
    return "; ".join(f"{what} at {' and '.join(map(_shape, shapes))}" for what, shapes in together.items())


def _numbers(values: list[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def ahead(benchmark: dict) -> str:
    """Who is ahead for nll in time, level where quartiles overlap, and in memory; what each loss gains on the naive head."""
    first, leanest, own, gains = {}, {}, [], {}
    for shape, rows in _grouped((row for row in benchmark["rows"] if row["ratio"] is not None), "shape").items():
        nll = sorted((row for row in rows if row["loss"] == "nll"), key=lambda row: row["ratio"])
        level = [_short(row["what"]) for row in nll if row["ratio_q1"] <= nll[0]["ratio_q3"]]
        first[shape] = words(level) + " level" * (len(level) > 1)
        own.append(min(row["ratio"] for row in nll if row["group"] == "xentlab") / nll[0]["ratio"])
        if all(row["peak_mb"] is not None for row in nll):
            leanest[shape] = _short(min(nll, key=lambda row: row["peak_mb"])["what"])
        for loss in dict.fromkeys(row["loss"] for row in rows if row["loss"]):
            best = {group: min(row["ratio"] for row in rows if row["group"] == group and row["loss"] == loss) for group in BOTH}
            gains.setdefault(loss, []).append(best["xentlab"] / best["naive JAX"])
    times = _numbers(own, ".2f")
    told = f"Fastest for nll: {_where(first)}; the faster of xentlab's plans takes {times} times the first's time."
    told += f" Least memory: {_where(leanest)}." if leanest else ""
    told += " Of the naive JAX head's time the faster plan takes "
    return told + "; ".join(f"{_numbers(each, '.2f')} for {loss}" for loss, each in gains.items()) + "."


def _short(what: str) -> str:
    """A contestant without how it was set."""
    return what.split(",")[0]


def heads(benchmark: dict) -> str:
    """The benchmark as a table, with what was tried and who is ahead."""
    rows = benchmark["rows"]
    tries = {what: [int(row["block"]) for row in own if row["block"]] for what, own in _grouped(rows, "what").items()}
    blocks = "; ".join(f"{_short(what)} {_numbers(each, 'd')}" for what, each in tries.items() if each)
    foot = (
        f"Tokens × features × vocabulary; value and gradients, float32, {benchmark['threads']} threads for everyone. Time is a "
        f"multiple of the first row's in the same round: the median of {benchmark['rounds']} rounds, each in another order, "
        "with the quartiles; one round alone for heads that are far slower. MB: the most that the process held beside the "
        "gradients. The weight is [D, V] for JAX and xentlab, and [V, D] where it says so and for others, who take it so. "
        f"Block sizes found by trying: {blocks}. {_versions(benchmark)}."
    )
    if theirs := [row["ratio"] for row in rows if row["what"] == TORCH_BARE and row["ratio"] is not None]:
        foot += f" Products alone: torch's take {_numbers(theirs, '.2f')} of XLA's."
    lines = _table(rows, lambda row: _shape(row["shape"]), "MB", _cell)
    notes = dict.fromkeys(f"{row['what']} {row['note']}." for row in rows if row["note"])
    return "\n".join([ahead(benchmark), "", *lines, "", " ".join([foot, *notes])])


def fastest(benchmark: dict) -> str:
    """How many times as long the others take for the same grid, and how far xentlab is from its matrix products."""
    said = []
    for grid, rows in _grouped(_raced(benchmark), "grid").items():
        own = next(row for row in rows if row["what"] == "xentlab")
        others = [row for row in rows if row["group"] == "by hand" and row["seconds"]]
        times = "; ".join(f"{row['what']}, {row['seconds'] / own['seconds']:.1f}" for row in others)
        said.append(
            f"{grid}, {own['runs']} runs of {own['steps']} steps: {own['seconds']:.2f} s, {own['to_floor']:.2f} times its "
            f"matrix products alone. Times as long: {times}."
        )
    return " ".join(said)


def _raced(benchmark: dict) -> list[dict]:
    """The rows of the grids that everyone trained."""
    return [row for row in benchmark["rows"] if not row["grid"].endswith("scaled")]


def races(benchmark: dict) -> str:
    """The race's benchmark as a table a grid, and how it scales."""
    cell = functools.partial(_cell, name="seconds", beside="to_floor", form=".2f")
    lines = _table(_raced(benchmark), lambda row: f"{row['grid']}, seconds", "to its products", cell)
    scaled = [row for row in benchmark["rows"] if row["grid"].endswith("scaled")]
    runs = [f"{row['runs']}: {1e3 * row['seconds'] / row['runs']:.0f}" for row in scaled if row["what"] == "xentlab"]
    devices = [f"{row['devices']}: {row['seconds']:.2f}" for row in scaled if row["what"] != "xentlab"]
    shared = next(row for row in scaled if row["what"] != "xentlab")
    foot = (
        f"Seconds of the whole grid: medians of {benchmark['rounds']} rounds in which all took turns, with quartiles, on "
        f"{benchmark['machine']['cores']} cores; compiled beforehand unless it says so. Of shorter runs of the mlp, "
        f"{shared['steps']} steps each: milliseconds a run, by the number of runs, {', '.join(runs)}; seconds of "
        f"{shared['runs']} runs on a mesh, by the number of virtual devices on these cores, {', '.join(devices)}. "
        f"{_versions(benchmark)}."
    )
    return "\n".join([fastest(benchmark), "", *lines, "", foot])


def four_doors(results: dict) -> str:
    """The four doors as a table."""
    head = ("loss", "tokens needed", "bits a byte, coded", "gradient error, bfloat16", "pull as p → 0", "steps to escape")
    lines = [f"| {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|"]
    for row in results["four_doors"]:
        needed = "biased" if row["tokens_needed"] == "inf" else f"{row['tokens_needed']:.2f}"
        steps = "never" if row["escape_steps"] == "inf" else f"{row['escape_steps']:.0f}"
        numbers = f"{row['bits_per_byte']:.2f} | {row['gradient_error_bfloat16']:.1e} | {row['pull_low_p']:.2g}"
        lines.append(f"| `{row['loss']}` | {needed} | {numbers} | {steps} |")
    return "\n".join(lines)


def loose(results: dict) -> str:
    """Where the usual telling is loose, in the words of the results."""
    told = {
        claim: f"- **{title}.** {text}"
        for each in results["experiments"]
        for claim, title, text in zip(each["claims"], each["titles"], each["loose"], strict=True)
    }
    return "\n".join(told[claim] for claim in LOOSE)


def own_loss(readme: str) -> str:
    """What the audit prints of the README's own example."""
    example = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "mine.py").write_text(example)
        command = [sys.executable, "-m", "xentlab", "audit", "nll", "./mine.py:cubic"]
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = "\n".join(line.rstrip() for line in shown.splitlines())
    return f"```text\n$ xentlab audit nll ./mine.py:cubic\n{lines}\n```"


def filled(text: str, blocks: dict[str, str]) -> str:
    """The text with each block's content between its markers."""
    for name, content in blocks.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"no block {name!r}")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    return text


def read_benchmarks() -> dict[str, dict]:
    """The results of the benchmarks that were taken, by the frame that each writes."""
    return {name: json.loads((ROOT / "docs" / f"{file}.json").read_text()) for name, file in BENCHMARKS.items()}


def documents(results: dict, benchmarks: dict, reported: dict, audited: str | None = None) -> dict[pathlib.Path, str]:
    """Each document with its blocks filled; audited: the audit's output, made anew if it is not given."""
    readme, experiments = ROOT / "README.md", ROOT / "experiments" / "README.md"
    text = readme.read_text()
    blocks = {"doors": four_doors(results), "loose": loose(results), "audit": audited or own_loss(text)}
    blocks |= {"heads": heads(benchmarks["heads"]), "races": races(benchmarks["race"]), "chip": chip(benchmarks["chip"])}
    blocks |= {"reported": tried(reported)}
    indexed = {"index": index(results, benchmarks, reported)}
    return {readme: filled(text, blocks), experiments: filled(experiments.read_text(), indexed)}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    collect(pathlib.Path(sys.argv[1]))
    results, reported = (json.loads(path.read_text()) for path in (RESULTS, REPORTED))
    for path, text in documents(results, read_benchmarks(), reported).items():
        path.write_text(text)
