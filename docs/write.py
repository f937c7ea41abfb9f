"""Writes what the documents say of numbers, from a run: `xentlab tour --out runs/tour && python docs/write.py runs/tour`.

It copies the run's results to docs/results.json and its pictures beside it, and fills the blocks of README.md and
experiments/README.md that stand between <!-- begin NAME --> and <!-- end NAME -->. A test holds the blocks to the results.
"""

import ast
import json
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results.json"
PICTURES = {"cliff": "claim-4", "tokens": "claim-10", "rebuilt-city": "claim-15", "doors": "claim-19"}
LOOSE = (9, 5, 4, 7, 10, 12, 18, 19)  # the claims that the README's list of corrections shows
EXTRA = ("new_loss", "own_loss_at_scale", "wrong_start")  # scripts without a station


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


def index(results: dict) -> str:
    """The table of experiments: question, command, what it shows, time."""
    lines = ["| claim | question | command | what it shows | time |", "|---|---|---|---|---|"]
    rows = []
    for each in results["experiments"]:
        claims, found = ", ".join(map(str, each["claims"])), " ".join(each["found"]).splitlines()[0]
        rows.append((each["claims"][0], claims, each["question"], each["name"], found, each["seconds"]))
    for name, seconds in results["extra_seconds"].items():
        question, *rest = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{name}.py").read_text())).split("\n\n")
        rows.append((99, "", question, name, " ".join(rest[0].split()), seconds))
    for _, claims, question, name, found, seconds in sorted(rows):
        cell = found.replace("|", "\\|")
        lines.append(f"| {claims} | {question} | `python experiments/{name}.py` | {cell} | {_time(seconds)} |")
    whole = f"{results['seconds']:.0f} s"
    lines += [
        f"| 1–19 | Does every claim hold? | `python experiments/all.py` | All of these as one page | {whole} |",
        "| | The same as a notebook (jupytext) | `python experiments/tour.py` | Five stations, and a loss of your own | |",
        "| | What does the head cost? | `python experiments/bench_linear_loss.py` | Each plan, the naive head | |",
    ]
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return "a moment" if seconds < 1 else f"{seconds:.0f} s"


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
        command = [sys.executable, "-m", "xentlab.cli", "audit", "nll", "./mine.py:cubic"]
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


def documents(results: dict, audited: str | None = None) -> dict[pathlib.Path, str]:
    """Each document with its blocks filled; audited: the audit's output, made anew if it is not given."""
    readme, experiments = ROOT / "README.md", ROOT / "experiments" / "README.md"
    text = readme.read_text()
    blocks = {"doors": four_doors(results), "loose": loose(results), "audit": audited or own_loss(text)}
    return {readme: filled(text, blocks), experiments: filled(experiments.read_text(), {"index": index(results)})}


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
    found = collect(pathlib.Path(sys.argv[1]))
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    pictures(pathlib.Path(sys.argv[1]))
    for path, text in documents(found).items():
        path.write_text(text)
