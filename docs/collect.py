"""Takes what the documents need of a run's folder into docs/: its results as JSON, and its pictures."""

import json
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import pandas as pd

from xentlab import charts
from xentlab.tour.walk import load

ROOT = pathlib.Path(__file__).parent.parent
RESULTS, REPORTED = ROOT / "docs" / "results.json", ROOT / "docs" / "reported.json"
BENCHMARKS = {"heads": "bench_linear_loss", "race": "bench_race", "chip": "bench_chip"}  # by the frame that each writes
PICTURES = {"cliff": "claim-4", "tokens": "claim-10", "rebuilt-city": "claim-15", "doors": "claim-19"}
EXTRA = ("narrow_logits", "new_loss", "own_loss_at_scale", "theorems", "wrong_start")  # scripts without a station


def collect(run: pathlib.Path) -> None:
    """Writes into docs/ what there is in the folder: a benchmark, what is reported, tried again, or a tour."""
    made = json.loads((run / "run.json").read_text())
    if found := [name for name in BENCHMARKS if (run / f"{name}.csv").is_file()]:
        (name,) = found
        results = {"heads": heads, "race": race, "chip": chip}[name](run, made)
        _write(ROOT / "docs" / f"{BENCHMARKS[name]}.json", results, allow_nan=False)
        if (picture := run / f"{name}.png").is_file():
            shutil.copyfile(picture, ROOT / "docs" / picture.name)
    elif "verdicts" in made:
        earlier = json.loads(REPORTED.read_text()) if REPORTED.is_file() else {}
        _write(REPORTED, earlier | reported(run, made))
    else:
        _write(RESULTS, tour(run, made))
        pictures(run)


def heads(run: pathlib.Path, made: dict) -> dict:
    """The benchmark of the heads: how it was made, and a row a shape and contestant."""
    _refuse_quick(made, "benchmark", "python experiments/bench_linear_loss.py")
    if "nll" not in made["arguments"]["losses"]:
        raise SystemExit("the peers have nll alone; run `python experiments/bench_linear_loss.py` with it.")
    return _shortened(made, _frame(run, "heads"))


def race(run: pathlib.Path, made: dict) -> dict:
    """The benchmark of the race: how it was made, and a row a grid and contestant."""
    _refuse_quick(made, "benchmark", "python experiments/bench_race.py")
    return _shortened(made, _frame(run, "race"))


def chip(run: pathlib.Path, made: dict) -> dict:
    """The benchmark on a GPU or TPU: nll and what has no loss, and the grids of runs."""
    if made["arguments"]["quick"] or made["device"]["platform"] == "cpu":
        raise SystemExit("to be quoted, run `python experiments/bench_chip.py` whole and on a GPU or TPU.")
    frame = _frame(run, "chip", {"temporary_mb": [""]})
    found = _shortened(made, frame[frame.loss.isin(["", "nll"])])
    return found | {"grids": _shortened(made, _frame(run, "chip_race"))["rows"]}


def reported(run: pathlib.Path, made: dict) -> dict:
    """What is reported, tried again by one script: the verdicts on the frame that its run wrote, and the time it took."""
    name = pathlib.Path(made["command"][0]).stem
    _refuse_quick(made, "run", f"python experiments/{name}.py")
    verdicts = load(ROOT / "experiments" / f"{name}.py").verdicts(pd.read_csv(run / "tests.csv"))
    return {name: {"finished": made["finished"], "seconds": made["seconds"], "verdicts": verdicts}}


def tour(run: pathlib.Path, made: dict) -> dict:
    """A tour's results, and the time that the other scripts take."""
    _refuse_quick(made, "tour", "xentlab tour")
    extra = {}
    for name in EXTRA:
        begun = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "experiments" / f"{name}.py"], check=True, capture_output=True)
        extra[name] = round(time.perf_counter() - begun, 1)
    doors = pd.read_csv(run / "four_doors.csv").replace(float("inf"), "inf").to_dict("records")
    found = {key: made[key] for key in ("finished", "versions", "machine", "seconds", "experiments")}
    return found | {"extra_seconds": extra, "four_doors": doors}


def pictures(run: pathlib.Path) -> None:
    """The headline from a tour's profiles, and the gallery's pictures."""
    profiles = pd.read_csv(run / "profiles.csv")
    names = list(dict.fromkeys(profiles.loss))
    panels = [charts.profile(profiles, names, space, path) for path in charts.PATHS for space in charts.SPACES]
    charts.write_png(charts.grid(panels), ROOT / "docs" / "headline.png")
    for name, figure in PICTURES.items():
        shutil.copyfile(run / f"{figure}.png", ROOT / "docs" / f"{name}.png")


def _refuse_quick(made: dict, what: str, command: str) -> None:
    if made["arguments"].get("quick") or "--quick" in made["command"]:
        raise SystemExit(f"a quick {what} is too short to be quoted; run `{command}` whole.")


def _frame(run: pathlib.Path, name: str, missing: Any = ("",)) -> pd.DataFrame:
    return pd.read_csv(run / f"{name}.csv", keep_default_na=False, na_values=missing)


def _shortened(made: dict, frame: pd.DataFrame) -> dict:
    """The record and the frame of a benchmark; numbers to four decimals, and what a row lacks is None."""
    rows = [
        {key: None if value != value else round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for row in frame.to_dict("records")
    ]
    named = made | made["arguments"]
    keys = ("finished", "seconds", "versions", "peers", "machine", "device", "rounds", "threads")
    return {key: named[key] for key in keys if key in named} | {"rows": rows}


def _write(path: pathlib.Path, results: dict, **settings: bool) -> None:
    path.write_text(json.dumps(results, indent=1, **settings) + "\n")
