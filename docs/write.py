"""Writes what the documents say of numbers, from a run: `xentlab tour --out runs/tour && python docs/write.py runs/tour`.

It takes runs of the benchmarks too, `python experiments/bench_linear_loss.py && python docs/write.py runs/bench_linear_loss`,
bench_race alike, and of the scripts whose verdicts are about the literature, `python experiments/label_noise.py --out
runs/label_noise` and the others. It copies the run's results into docs/, its pictures beside them, and fills the blocks of
README.md and experiments/README.md that stand between <!-- begin NAME --> and <!-- end NAME -->. A test holds the blocks to
the results.
"""

import ast
import json
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, REPORTED = ROOT / "docs" / "results.json", ROOT / "docs" / "reported.json"
BENCHMARKS = {"heads": "bench_linear_loss", "race": "bench_race", "chip": "bench_chip"}  # by the frame that each writes
PICTURES = {"cliff": "claim-4", "tokens": "claim-10", "rebuilt-city": "claim-15", "doors": "claim-19"}
LOOSE = (9, 5, 4, 7, 10, 12, 18, 19)  # the claims that the README's list of corrections shows
EXTRA = ("narrow_logits", "new_loss", "own_loss_at_scale", "wrong_start")  # scripts without a station
BOTH = ("xentlab", "naive JAX")
TORCH_BARE = "three bare products, torch, [V, D]"


def collect(run: pathlib.Path) -> dict:
    """A tour's results as the documents need them, and the time that the other scripts take."""
    import pandas as pd

    made = json.loads((run / "run.json").read_text())
    if made["arguments"]["quick"]:
        raise SystemExit("a quick tour is too short to be quoted; run `xentlab tour` whole.")
    extra = {}
    for name in EXTRA:
        begun = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "experiments" / f"{name}.py"], check=True, capture_output=True)
        extra[name] = round(time.perf_counter() - begun, 1)
    doors = pd.read_csv(run / "four_doors.csv").replace(float("inf"), "inf").to_dict("records")
    seconds = made["seconds"]
    kept = {key: made[key] for key in ("finished", "versions", "machine")}
    return {**kept, "seconds": seconds, "experiments": made["experiments"], "extra_seconds": extra, "four_doors": doors}


def collect_heads(run: pathlib.Path) -> dict:
    """A benchmark's results as the documents need them: how it was made, and a row a shape and contestant."""
    import pandas as pd

    made = json.loads((run / "run.json").read_text())
    if made["arguments"]["quick"]:
        raise SystemExit("a quick benchmark is too short to be quoted; run `python experiments/bench_linear_loss.py` whole.")
    if "nll" not in made["arguments"]["losses"]:
        raise SystemExit("the peers have nll alone; run `python experiments/bench_linear_loss.py` with it.")
    return kept(made, pd.read_csv(run / "heads.csv", keep_default_na=False, na_values=[""]))


def kept(made: dict, frame) -> dict:
    """The record and the frame of a benchmark, shortened; numbers to four decimals, and what a row lacks is None."""
    rows = [
        {key: None if value != value else round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
    named = made | made["arguments"]
    keys = ("finished", "seconds", "versions", "peers", "machine", "device", "rounds", "threads")
    return {key: named[key] for key in keys if key in named} | {"rows": rows}


def collect_races(run: pathlib.Path) -> dict:
    """The benchmark of the race as the documents need it."""
    import pandas as pd

    made = json.loads((run / "run.json").read_text())
    if made["arguments"]["quick"]:
        raise SystemExit("a quick benchmark is too short to be quoted; run `python experiments/bench_race.py` whole.")
    return kept(made, pd.read_csv(run / "race.csv", keep_default_na=False, na_values=[""]))


def collect_chip(run: pathlib.Path) -> dict:
    """The benchmark on a GPU or TPU as the documents need it: nll and what has no loss, and the grids of runs."""
    import pandas as pd

    made = json.loads((run / "run.json").read_text())
    if made["arguments"]["quick"] or made["device"]["platform"] == "cpu":
        raise SystemExit("to be quoted, run `python experiments/bench_chip.py` whole and on a GPU or TPU.")
    frame = pd.read_csv(run / "chip.csv", keep_default_na=False, na_values={"temporary_mb": [""]})
    found = kept(made, frame[frame.loss.isin(["", "nll"])])
    return found | {"grids": kept(made, pd.read_csv(run / "chip_race.csv"))["rows"]}


def collect_reported(run: pathlib.Path, made: dict) -> dict:
    """What is reported, tried again by one script: the verdicts on the frame that its run wrote, and the time it took."""
    import pandas as pd

    from xentlab.tour.walk import load

    name = pathlib.Path(made["command"][0]).stem
    if "--quick" in made["command"]:
        raise SystemExit(f"a quick run is too short to be quoted; run `python experiments/{name}.py` whole.")
    verdicts = load(ROOT / "experiments" / f"{name}.py").verdicts(pd.read_csv(run / "tests.csv"))
    return {name: {"finished": made["finished"], "seconds": made["seconds"], "verdicts": verdicts}}


def counted(verdicts: list[str]) -> str:
    """How many differences went as reported, against it, or neither way."""
    kinds = {"as expected": "As expected", "against what is reported": "Against", "not told apart": "Not told apart"}
    numbers = {said: sum(each.startswith(start) for each in verdicts) for said, start in kinds.items()}
    return f"Of {len(verdicts)} differences " + ", ".join(f"{number} {said}" for said, number in numbers.items())


def tried(reported: dict[str, dict]) -> str:
    """What is reported of other losses, a line a script, and every sentence that goes against it."""
    lines = []
    for name, found in reported.items():
        question, _ = _docstring(name)
        lines.append(f"- **{question}** {counted(found['verdicts'])} (`python experiments/{name}.py`).")
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
    measured = {
        BENCHMARKS[name]: (said[name](benchmark), _time(benchmark["seconds"])) for name, benchmark in benchmarks.items()
    }
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


def _shape(row: dict) -> str:
    return " × ".join(f"{int(size):,}" for size in row["shape"].split(" x "))


def on_chip(benchmark: dict) -> str:
    """How long a grid of runs takes on a GPU or TPU, and laid out otherwise."""
    grids: dict[str, dict[str, dict]] = {}
    for row in benchmark["grids"]:
        grids.setdefault(row["grid"], {})[row["what"]] = row
    said = []
    for grid, rows in grids.items():
        own = rows.pop("xentlab")
        times = "; ".join(f"{what}, {row['times']:.3g}" for what, row in rows.items())
        said.append(f"{grid}, {own['runs']} runs of {own['steps']} steps: {own['seconds']:.3f} s. Times as long: {times}.")
    return f"On an {benchmark['device']['kind']}, all runs in one program: {' '.join(said)}"


def chip(benchmark: dict) -> str:
    """The benchmark on a GPU or TPU: the heads as a table, and the grids of runs."""
    shapes = dict.fromkeys((row["shape"], row["dtype"]) for row in benchmark["rows"])
    cells: dict[str, dict[tuple, dict]] = {}
    for row in benchmark["rows"]:
        cells.setdefault(row["what"], {})[row["shape"], row["dtype"]] = row
    heads = " | ".join(f"{_shape({'shape': shape})}, {dtype} | MB" for shape, dtype in shapes)
    lines = [f"| {benchmark['device']['kind']} | {heads} |", "|---|" + "--:|--:|" * len(shapes)]
    for what, found in cells.items():
        lines.append(f"| {what} | {' | '.join(_cell(found.get(shape), 'temporary_mb') for shape in shapes)} |")
    foot = (
        f"nll, value and gradients: times the first row's in the same round, the median of {benchmark['rounds']} rounds with "
        "the quartiles. Products of float32 are TF32, as XLA has them by default, and torch here. MB: held beside arguments "
        f"and gradients, by XLA's count or torch's. jax {benchmark['versions']['jax']}, {benchmark['finished'][:10]}."
    )
    return "\n".join([on_chip(benchmark), "", *lines, "", foot])


def _by_shape(benchmark: dict) -> dict[str, list[dict]]:
    """The rows of each shape that ran."""
    shapes = dict.fromkeys(_shape(row) for row in benchmark["rows"])
    return {shape: [row for row in benchmark["rows"] if _shape(row) == shape and row["ratio"] is not None] for shape in shapes}


def _where(found: dict[str, str]) -> str:
    """What was found at each shape, shapes of one finding together."""
    together: dict[str, list[str]] = {}
    for shape, what in found.items():
        together.setdefault(what, []).append(shape)
    if len(together) == 1:
        return next(iter(together)) + (" at every shape" if len(found) > 1 else "")
    return "; ".join(f"{what} at {' and '.join(shapes)}" for what, shapes in together.items())


def _numbers(values: list[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def ahead(benchmark: dict) -> str:
    """Who is ahead for nll in time, level where quartiles overlap, and in memory; what each loss gains on the naive head."""
    from xentlab.reading import words

    fastest, leanest, own, gains = {}, {}, {}, {}
    for shape, rows in _by_shape(benchmark).items():
        heads = sorted((row for row in rows if row["loss"] == "nll"), key=lambda row: row["ratio"])
        level = [_short(row["what"]) for row in heads if row["ratio_q1"] <= heads[0]["ratio_q3"]]
        fastest[shape] = words(level) + " level" * (len(level) > 1)
        own[shape] = min(row["ratio"] for row in heads if row["group"] == "xentlab") / heads[0]["ratio"]
        if all(row["peak_mb"] is not None for row in heads):
            leanest[shape] = _short(min(heads, key=lambda row: row["peak_mb"])["what"])
        for loss in dict.fromkeys(row["loss"] for row in rows if row["loss"]):
            best = {group: min(row["ratio"] for row in rows if row["group"] == group and row["loss"] == loss) for group in BOTH}
            gains.setdefault(loss, []).append(best["xentlab"] / best["naive JAX"])
    times = _numbers(list(own.values()), ".2f")
    told = f"Fastest for nll: {_where(fastest)}; the faster of xentlab's plans takes {times} times the first's time."
    told += f" Least memory: {_where(leanest)}." if leanest else ""
    told += " Of the naive JAX head's time the faster plan takes "
    return told + "; ".join(f"{_numbers(each, '.2f')} for {loss}" for loss, each in gains.items()) + "."


def _short(what: str) -> str:
    """A contestant without how it was set."""
    return what.split(",")[0]


def heads(benchmark: dict) -> str:
    """The benchmark as a table, with what was tried and who is ahead."""
    shapes = list(_by_shape(benchmark))
    cells: dict[str, dict[str, dict]] = {}
    for row in benchmark["rows"]:
        cells.setdefault(row["what"], {})[_shape(row)] = row
    lines = [f"| | {' | '.join(f'{shape} | MB' for shape in shapes)} |", "|---|" + "--:|--:|" * len(shapes)]
    for what, found in cells.items():
        lines.append(f"| {what} | {' | '.join(_cell(found.get(shape)) for shape in shapes)} |")
    tried = {what: [int(row["block"]) for row in found.values() if row["block"]] for what, found in cells.items()}
    blocks = "; ".join(f"{_short(what)} {_numbers(each, 'd')}" for what, each in tried.items() if each)
    versions = {"jax": benchmark["versions"]["jax"], **benchmark["peers"]}
    foot = (
        f"Tokens × features × vocabulary; value and gradients, float32, {benchmark['threads']} threads for everyone. Time is a "
        f"multiple of the first row's in the same round: the median of {benchmark['rounds']} rounds, each in another order, "
        "with the quartiles; one round alone for heads that are far slower. MB: the most that the process held beside the "
        "gradients. The weight is [D, V] for JAX and xentlab, and [V, D] where it says so and for others, who take it so. "
        f"Block sizes found by trying: {blocks}. {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    theirs = [found["ratio"] for rows in _by_shape(benchmark).values() for found in rows if found["what"] == TORCH_BARE]
    if theirs:
        foot += f" Products alone: torch's take {_numbers(theirs, '.2f')} of XLA's."
    notes = dict.fromkeys(f"{row['what']} {row['note']}." for row in benchmark["rows"] if row["note"])
    return "\n".join([ahead(benchmark), "", *lines, "", " ".join([foot, *notes])])


def _cell(row: dict | None, memory: str = "peak_mb") -> str:
    if row is None or row["ratio"] is None:
        return "– | –"
    held = "–" if row[memory] is None else f"{row[memory]:,.0f}"
    return f"{row['ratio']:.2f} ({row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}) | {held}"


def fastest(benchmark: dict) -> str:
    """How many times as long the others take for the same grid, and how far xentlab is from its matrix products."""
    said = []
    for grid, rows in _by_grid(benchmark).items():
        own = next(row for row in rows if row["what"] == "xentlab")
        others = [row for row in rows if row["group"] == "by hand" and row["seconds"]]
        times = "; ".join(f"{row['what']}, {row['seconds'] / own['seconds']:.1f}" for row in others)
        said.append(
            f"{grid}, {own['runs']} runs of {own['steps']} steps: {own['seconds']:.2f} s, {own['to_floor']:.2f} times its "
            f"matrix products alone. Times as long: {times}."
        )
    return " ".join(said)


def _by_grid(benchmark: dict) -> dict[str, list[dict]]:
    """The rows of each grid that was raced."""
    grids: dict[str, list[dict]] = {}
    for row in benchmark["rows"]:
        if not row["grid"].endswith("scaled"):
            grids.setdefault(row["grid"], []).append(row)
    return grids


def races(benchmark: dict) -> str:
    """The race's benchmark as a table a grid, and how it scales."""
    lines = [fastest(benchmark), ""]
    grids = _by_grid(benchmark)
    cells: dict[str, list[str]] = {}
    for rows in grids.values():
        for row in rows:
            found = "–" if row["seconds"] is None else f"{row['seconds']:.2f} ({row['seconds_q1']:.2f}–{row['seconds_q3']:.2f})"
            floor = "–" if row["to_floor"] is None else f"{row['to_floor']:.2f}"
            cells.setdefault(row["what"], []).append(f"{found} | {floor}")
    lines.append(f"| | {' | '.join(f'{grid}, seconds | to its products' for grid in grids)} |")
    lines.append("|---|" + "--:|--:|" * len(grids))
    lines += [f"| {what} | {' | '.join(each)} |" for what, each in cells.items()]
    scaled = [row for row in benchmark["rows"] if row["grid"].endswith("scaled")]
    alone, spread = ([row for row in scaled if (row["what"] == "xentlab") == whole] for whole in (True, False))
    runs = [f"{row['runs']}: {1e3 * row['seconds'] / row['runs']:.0f}" for row in alone]
    devices = [f"{row['devices']}: {row['seconds']:.2f}" for row in spread]
    versions = {"jax": benchmark["versions"]["jax"], **benchmark["peers"]}
    foot = (
        f"Seconds of the whole grid: medians of {benchmark['rounds']} rounds in which all took turns, with quartiles, on "
        f"{benchmark['machine']['cores']} cores; compiled beforehand unless it says so. Milliseconds a run, by the number of "
        f"runs: {', '.join(runs)}. Seconds, by the number of virtual devices that share the runs on these cores: "
        f"{', '.join(devices)}. "
    )
    foot += f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    return "\n".join([*lines, "", foot])


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
    said = {claim: text for each in results["experiments"] for claim, text in zip(each["claims"], each["loose"], strict=True)}
    titles = {
        claim: text for each in results["experiments"] for claim, text in zip(each["claims"], each["titles"], strict=True)
    }
    return "\n".join(f"- **{titles[claim]}.** {said[claim]}" for claim in LOOSE)


def own_loss(readme: str) -> str:
    """What the audit prints of the README's own example."""
    import tempfile

    example = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "mine.py").write_text(example)
        command = [sys.executable, "-m", "xentlab", "audit", "nll", "./mine.py:cubic"]
        shown = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    lines = [line.rstrip() for line in shown.splitlines()]
    return "```text\n$ xentlab audit nll ./mine.py:cubic\n" + "\n".join(lines) + "\n```"


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
    places = {name: ROOT / "docs" / f"{file}.json" for name, file in BENCHMARKS.items()}
    return {name: json.loads(place.read_text()) for name, place in places.items()}


def documents(
    results: dict, benchmarks: dict[str, dict], reported: dict[str, dict], audited: str | None = None
) -> dict[pathlib.Path, str]:
    """Each document with its blocks filled; audited: the audit's output, made anew if it is not given."""
    readme, experiments = ROOT / "README.md", ROOT / "experiments" / "README.md"
    text = readme.read_text()
    blocks = {"doors": four_doors(results), "loose": loose(results), "audit": audited or own_loss(text)}
    blocks |= {"heads": heads(benchmarks["heads"]), "races": races(benchmarks["race"]), "chip": chip(benchmarks["chip"])}
    blocks |= {"reported": tried(reported)}
    indexed = {"index": index(results, benchmarks, reported)}
    return {readme: filled(text, blocks), experiments: filled(experiments.read_text(), indexed)}


def pictures(run: pathlib.Path) -> None:
    """The headline from the run's profiles, and the gallery's pictures."""
    import pandas as pd

    from xentlab import charts

    profiles = pd.read_csv(run / "profiles.csv")
    names = list(dict.fromkeys(profiles.loss))
    panels = [charts.profile(profiles, names, space, path, legend=True) for path in charts.PATHS for space in charts.SPACES]
    charts.write_png(charts.grid(panels), ROOT / "docs" / "headline.png")
    for name, figure in PICTURES.items():
        (ROOT / "docs" / f"{name}.png").write_bytes((run / f"{figure}.png").read_bytes())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    run = pathlib.Path(sys.argv[1])
    collected = {"heads": collect_heads, "race": collect_races, "chip": collect_chip}
    if found := [name for name in BENCHMARKS if (run / f"{name}.csv").is_file()]:
        (name,) = found
        written = json.dumps(collected[name](run), indent=1, allow_nan=False)
        (ROOT / "docs" / f"{BENCHMARKS[name]}.json").write_text(f"{written}\n")
        if (picture := run / f"{name}.png").is_file():
            (ROOT / "docs" / picture.name).write_bytes(picture.read_bytes())
    elif "verdicts" in (made := json.loads((run / "run.json").read_text())):
        reported = json.loads(REPORTED.read_text()) if REPORTED.is_file() else {}
        REPORTED.write_text(json.dumps(reported | collect_reported(run, made), indent=1) + "\n")
    else:
        RESULTS.write_text(json.dumps(collect(run), indent=1) + "\n")
        pictures(run)
    reported = json.loads(REPORTED.read_text())
    for path, text in documents(json.loads(RESULTS.read_text()), read_benchmarks(), reported).items():
        path.write_text(text)
