"""The walk: every experiment's stations, in the order of their claims, one experiment after another."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import pathlib
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from xentlab.contract import LabError
from xentlab.defaults import Progress, quiet
from xentlab.tour.station import Station

# What a first look leaves out: the slow parts, and nothing of any claim but its size.
QUICK = {
    "four_doors": {"losses": ("nll", "brier"), "quick": True},
    "low_probability": {"sizes": (4, 64, 1024, 16_384, 262_144)},
    "sample_efficiency": {"losses": ("nll", "brier", "focal"), "replicates": 0},
}


@dataclasses.dataclass(frozen=True)
class Walked:
    """An experiment that was run: its script's name, its question, its code, its stations, and how long it took."""

    name: str
    question: str
    code: str
    stations: tuple[Station, ...]
    seconds: float


def experiments_folder() -> pathlib.Path:
    """Where the experiments lie: beside the package in a checkout, inside it where it is installed as a wheel."""
    package = pathlib.Path(__file__).parent.parent
    for folder in (package / "experiments", package.parent / "experiments"):
        if (folder / "four_doors.py").is_file():
            return folder
    raise LabError(f"no experiments beside {package}. Install xentlab from its wheel or a checkout, where they lie.")


def load(path: pathlib.Path) -> ModuleType:
    """A script as a module, without running its main part."""
    name = f"xentlab_experiment_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def walk(quick: bool = False, progress: Progress = quiet, only: Sequence[str] = ()) -> list[Walked]:
    """Runs every experiment that has stations, and gives them in the order of their claims.

    quick: small sizes for the slow ones. only: names of scripts, for all. progress(name, done, total) is called before
    each. Raises `LabError` for a name that is no experiment's.
    """
    scripts = {path.stem: path for path in sorted(experiments_folder().glob("*.py"))}
    scripts = {name: path for name, path in scripts.items() if "\ndef stations(" in path.read_text()}
    for name in only:
        if name not in scripts:
            raise LabError(f"no experiment {name!r}; there are {', '.join(scripts)}.")
    chosen = {name: path for name, path in scripts.items() if not only or name in only}
    walked = []
    for done, (name, path) in enumerate(chosen.items()):
        progress(name, done, len(chosen))
        begun, module = time.perf_counter(), load(path)
        stations = tuple(module.stations(**(QUICK.get(name, {}) if quick else {})))
        question = inspect.getdoc(module).splitlines()[0]
        walked.append(Walked(name, question, path.read_text(), stations, time.perf_counter() - begun))
    progress("done", len(chosen), len(chosen))
    return sorted(walked, key=lambda each: each.stations[0].claim)
