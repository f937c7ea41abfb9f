"""A run's folder: whole files or none, nobody else's run overwritten, a record of how it was made."""

import datetime
import json
import subprocess
import sys
from importlib import metadata

import jax
import optax
import pandas as pd
import pytest
from scripts import in_process

from xentlab import LOSSES, LabError, runs
from xentlab.models import resolve_model
from xentlab.race import _made
from xentlab.recipe import Recipe
from xentlab.sources import MarkovSource

TRAINS = True


@pytest.mark.parametrize(
    ("held", "command", "told"),
    [
        ('{"kind": "race"}', "gradients", "holds a run of race, which gradients would overwrite. Give another folder"),
        ('{"kind": "race"}', "report --quick", "holds a run of race, which report would overwrite"),
        ('{"kind": "race"}', "tour --quick", "holds a run of race, which tour would overwrite"),
        ('{"kind": "report"}', "scoreboard --quick", "holds a run of report, which scoreboard would overwrite"),
        ('{"kind": "report"}', "race --quick", "holds a run of report, which race would overwrite. Give another"),
        ('{"command": ["xentlab", "report"]}', "race --quick", "holds a run of another kind, which race would overwrite"),
        ('{"kind": "race", "argu', "race --quick", "cannot be read"),
        ("[]", "race --quick", "or replace it with --anyway"),
        ('{"kind": "race"}', "race --quick", "holds a finished race. Give another one with --out, or replace it"),
    ],
)
def test_a_run_of_another_kind_is_not_overwritten(tmp_path, capsys, held, command, told):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "run.json").write_text(held)
    code, out, err = in_process(capsys, *command.split(), "--out", "held")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert told in err
    assert (tmp_path / "held" / "run.json").read_text() == held


def test_nothing_is_written_into_an_unfinished_race(tmp_path, capsys):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "begun.json").write_text('{"kind": "race"}')
    code, out, err = in_process(capsys, "gradients", "--quick", "--out", "held")
    assert (code, out) == (2, "")
    assert "held holds an unfinished race, which gradients would write into" in err
    assert [path.name for path in (tmp_path / "held").iterdir()] == ["begun.json"]


@pytest.mark.parametrize(("made", "left"), [([], False), (["frame.csv"], True)])
def test_a_run_that_ended_before_it_made_anything_leaves_no_folder(tmp_path, made, left):
    def stopped():
        with runs.using(runs.new_folder("report", tmp_path / "run")) as folder:
            for name in made:
                (folder / name).write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / "run").exists() == left


def test_what_writes_into_its_folder_may_do_so_again(tmp_path):
    """An experiment's has no record."""
    for _ in range(2):
        runs.write_frame(runs.new_folder("experiment", tmp_path / "run"), "found", pd.DataFrame({"x": [1]}))
    (tmp_path / "run" / ".lock").unlink()
    with pytest.raises(LabError, match=r"found\.csv, which experiment may write over\. Move that away, or give another"):
        runs.new_folder("experiment", tmp_path / "run")


@pytest.mark.parametrize("command", ["race", "report", "scoreboard"])
def test_no_run_is_written_into_its_own_text(tmp_path, capsys, command):
    """It would be another text the next time, and the race would never go on."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "one.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    for out in ("book", "book/run", tmp_path / "book" / "run"):
        code, _, err = in_process(capsys, command, "--text", "book", "--quick", "--out", out)
        assert (code, err.count("\n")) == (2, 1)
        assert "lies in --text book" in err
    assert [path.name for path in (tmp_path / "book").iterdir()] == ["one.txt"]


@pytest.mark.parametrize("held", ["null", '{"kind": "report"}'])
def test_told_to_a_race_replaces_what_is_there(tmp_path, capsys, held):
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "run.json").write_text(held)
    line = ("race", "--losses", "nll", "--markov", 5, "--model", "bigram", "--quick", "--out", "held")
    code, _, err = in_process(capsys, *line, "--anyway")
    assert code == 0, err
    assert json.loads((tmp_path / "held" / "run.json").read_text())["kind"] == "race"


def test_a_run_from_sources_keeps_its_record(monkeypatch):
    """A benchmark of minutes must not end without one because no package of that name is installed."""

    def unknown(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", unknown)
    assert runs.record({}, [], 0.0)["versions"]["xentlab"] == "not installed"


def test_a_record_says_when_in_a_time_that_is_everywhere_the_same():
    assert datetime.datetime.fromisoformat(runs.record({}, [], 0.0)["finished"]).utcoffset() == datetime.timedelta(0)


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "kept.csv"
    path.write_text("before")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(LabError, match=r"No space left\. Nothing half-written is left"):
        runs.write_bytes(path, b"after")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.csv"]


def test_who_may_read_a_file_is_the_users_to_say(tmp_path):
    code = "import pathlib, sys; from xentlab import runs; runs.write_bytes(pathlib.Path(sys.argv[1]), b'')"
    for mask, mode in (("077", 0o600), ("022", 0o644)):
        subprocess.run(["sh", "-c", f'umask {mask}; "$@"', "sh", sys.executable, "-c", code, tmp_path / mask], check=True)
        assert (tmp_path / mask).stat().st_mode & 0o777 == mode


def test_the_commit_of_somebody_elses_checkout_is_not_told(tmp_path, monkeypatch):
    """An environment may lie in another project, which may have a folder of that name."""
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *words], check=True)
    for folder in ("xentlab", "venv/xentlab"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "venv" / "xentlab" / "runs.py").write_text("")
    git("init", "-q")
    git("commit", "-qm", "first", "--allow-empty")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "venv" / "xentlab" / "runs.py"))
    assert runs.commit() is None


def test_a_commit_tells_of_files_that_git_does_not_know_yet(tmp_path, monkeypatch):
    git = lambda *words: subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *words], check=True)
    (tmp_path / "xentlab" / "losses").mkdir(parents=True)
    (tmp_path / "xentlab" / "runs.py").write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "xentlab" / "runs.py"))
    said = [runs.commit()]
    for content in ("one", "another"):
        (tmp_path / "xentlab" / "losses" / "fresh.py").write_text(content)
        said.append(runs.commit())
    assert len(set(said)) == 3
    assert all(each.startswith(said[0]) for each in said)


def test_runs_are_kept_as_of_all_that_makes_them():
    scaled = lambda by: lambda logits, targets: by * LOSSES["nll"](logits, targets)
    usual = {"loss": scaled(1.0), "seeds": [0, 1], "source": MarkovSource(vocab=8), "model": "bigram", "recipe": Recipe()}
    others = {
        "loss": [scaled(2.0)],
        "seeds": [[0, 2]],
        "source": [
            *(MarkovSource(vocab=8, **other) for other in ({"seed": 1}, {"exponent": 2.0}, {"order": 2}, {"tokens": 10_000})),
            MarkovSource(vocab=9),
        ],
        "model": ["mlp"],
        "recipe": [
            *(Recipe(**{name: 3}) for name in ("steps", "batch", "window", "blocks", "validation_tokens")),
            *(
                Recipe(optimizer="sgd"),
                Recipe(schedule="linear"),
                Recipe(clip=1.0),
                Recipe(label_noise=0.1),
                Recipe(head="naive"),
            ),
        ],
    }
    kept = _made(**usual)
    assert kept == _made(**usual | {"loss": scaled(1.0)})
    for name, values in others.items():
        for value in values:
            assert _made(**usual | {name: value}) != kept, (name, value)


def test_functions_are_known_by_what_they_compute():
    """Of two lambdas the names are one."""
    with jax.numpy_dtype_promotion("standard"):
        model = lambda by: lambda vocab, key: jax.tree.map(lambda leaf: by * leaf, resolve_model("bigram")(vocab, key))
        sgd = lambda momentum: lambda rate: optax.sgd(rate, momentum=momentum)
        usual = {"loss": LOSSES["nll"], "seeds": [0], "source": MarkovSource(vocab=8)}
        made = lambda by, momentum: _made(**usual, model=model(by), recipe=Recipe(optimizer=sgd(momentum)))
        assert made(1.0, 0.5) == made(1.0, 0.5)
        assert made(2.0, 0.5) != made(1.0, 0.5) != made(1.0, 0.25)


def test_a_folder_of_its_own_choice_is_none_in_the_text(tmp_path, capsys):
    """Without --out: its tables would be read as text by the next one, its pictures be called no UTF-8."""
    (tmp_path / "one.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    code, _, err = in_process(capsys, "report", "--text", ".", "--quick")
    assert (code, err.count("\n")) == (2, 1)
    assert "runs lies in --text ." in err
    assert "by --out" in err
    assert not (tmp_path / "runs").exists()
