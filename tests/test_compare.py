"""Runs are read back, set side by side and done again: the same numbers to the last bit, or what differs."""

import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from xentlab import LabError
from xentlab.cli import main
from xentlab.cli.again import _side_by_side
from xentlab.compare import Run, differences, read_run, settings
from xentlab.runs import write_frame

TRAINS = True
RACE = ["race", "--losses", "nll", "brier", "--markov", "8", "--model", "bigram", "--steps", "6", "--seeds", "0", "1"]
RACE += ["--learning-rates", ".05", ".2", "--extensions", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("runs") / "one"
    main([*RACE, "--out", str(made)])
    return made


def test_a_rerun_is_the_same_to_the_last_bit(folder, tmp_path, capsys):
    main(["rerun", str(folder), "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out
    assert "numbers are the same to the last bit" in said
    assert "arguments." not in said
    for name in ("curves", "table", "tests", "pairs"):
        assert (tmp_path / "again" / f"{name}.csv").read_bytes() == (folder / f"{name}.csv").read_bytes()


def test_half_of_one_run_and_half_of_another_are_no_run(folder, tmp_path, monkeypatch):
    """A run that is written over one of before, and is cut short."""
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    frame = pd.DataFrame({"a": [1]})

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LabError, match="No space left"):
            write_frame(mixed, "curves", frame)
    assert (mixed / "curves.csv").read_bytes() == (folder / "curves.csv").read_bytes()
    assert read_run(mixed).record == read_run(folder).record  # what could not be replaced is whole
    write_frame(mixed, "curves", frame)
    with pytest.raises(LabError, match="is no run"):
        read_run(mixed)


def without_sums(folder):
    """A run whose frames may be edited, as one of before there were sums of them."""
    record = json.loads((folder / "run.json").read_text())
    del record["sums"]
    (folder / "run.json").write_text(json.dumps(record))


def test_a_frame_that_is_gone_or_not_what_was_written_is_told(folder, tmp_path, capsys):
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    (cut / "table.csv").write_bytes((cut / "table.csv").read_bytes()[:-9])
    with pytest.raises(LabError, match=r"table\.csv is not what the run wrote\. Was it cut short, or edited\?"):
        read_run(cut)
    (cut / "table.csv").unlink()
    with pytest.raises(LabError, match=r"table\.csv cannot be read: .*Was it deleted"):
        read_run(cut)
    assert "table" not in read_run(cut, lacking=True).frames
    for frame in cut.glob("*.csv"):
        frame.unlink()
    with pytest.raises(SystemExit) as end:  # its record alone is enough to do it again, with nothing to hold it to
        main(["rerun", str(cut), "--out", str(tmp_path / "again")])
    assert end.value.code == 1
    assert "The runs have no number in common" in capsys.readouterr().out
    assert (tmp_path / "again" / "table.csv").read_bytes() == (folder / "table.csv").read_bytes()


def test_a_number_that_differs_is_found_and_ends_with_1(folder, tmp_path, capsys):
    other = tmp_path / "edited"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    table = pd.read_csv(other / "table.csv", engine="python")
    table.loc[1, "test_nll"] = np.nextafter(table.test_nll[1], 9)
    table.to_csv(other / "table.csv", index=False)
    without_sums(other)
    main(["compare", str(folder), str(other), "--format", "json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["frame"], row["metric"]) == ("table", "test_nll")
    assert "brier" in row["where"]
    assert 0 < row["difference"] < 1e-14
    with pytest.raises(SystemExit) as end:
        main(["rerun", str(other), "--out", str(tmp_path / "again")])
    assert end.value.code == 1
    assert "1 of " in capsys.readouterr().out


def test_an_interval_is_a_measurement_and_a_bin_names_its_row(folder):
    """The same column name could be either: an interval's end that moved is one number that differs, not a row that is gone."""
    run = read_run(folder)
    moved = run.frames["pairs"].assign(low=run.frames["pairs"].low - 1)
    rows = differences(run, Run(folder, run.record, run.frames | {"pairs": moved}))
    rows = rows[rows.difference != 0]
    assert rows.metric.tolist() == ["low"] * len(moved)
    assert rows.difference.tolist() == pytest.approx([-1] * len(moved))
    fewer = run.frames["reliability"].iloc[1:]
    rows = differences(run, Run(folder, run.record, run.frames | {"reliability": fewer}))
    rows = rows[rows.difference != 0]
    assert rows["where"].nunique() == 1
    assert rows.second.isna().all()


def test_what_was_set_differently_is_said(folder, tmp_path, capsys):
    main([*RACE, "--batch", "8", "--out", str(tmp_path / "other")])
    capsys.readouterr()
    main(["compare", str(folder), str(tmp_path / "other")])
    said = capsys.readouterr().out
    assert "arguments.batch: 16 | 8" in said
    assert "numbers that both have differ" in said
    assert [row["what"] for row in settings(read_run(folder).record, read_run(tmp_path / "other").record)] == [
        "arguments.batch"
    ]
    both, said = ("compare", str(folder), str(tmp_path / "other")), {}
    for form, read in (("json", json.loads), ("csv", lambda text: pd.read_csv(io.StringIO(text)).to_dict("records"))):
        main([*both, "--format", form])
        first, *rest = said[form] = read(capsys.readouterr().out)
        assert (first["frame"], first["where"]) == ("settings", "arguments.batch")
        assert (float(first["first"]), float(first["second"])) == (16, 8)
        assert rest[0]["frame"] == "table"
    assert [[*row] for row in said["json"][:2]] == [["frame", "where", "metric", "first", "second", "difference"]] * 2
    assert len(said["json"]) == len(said["csv"])


def test_rows_that_one_run_lacks_are_there():
    frames = [pd.DataFrame({"loss": list(losses), "nll": [1.0, np.inf, np.nan][: len(losses)]}) for losses in ("abc", "ab")]
    one, other = (Run(pathlib.Path(), {}, {"table": frame}) for frame in frames)
    found = differences(one, other)
    assert found.difference.tolist() == [0, 0, 0]  # inf is inf, and what both lack is equal
    found = differences(one, Run(pathlib.Path(), {}, {"table": frames[1].assign(nll=[1.0, 2.0])}))
    assert found.difference.tolist()[:2] == [0, -np.inf]
    assert len(differences(one, Run(pathlib.Path(), {}, {}))) == 3


def test_a_frame_may_call_its_columns_what_the_comparison_calls_its_own():
    names = ["where", "metric", "value", "first", "second", "frame", "difference"]
    frame = pd.DataFrame({"loss": ["nll", "brier"]} | {name: [1.0, 2.0] for name in names})
    one = Run(pathlib.Path(), {}, {"table": frame})
    found = differences(one, dataclasses.replace(one, frames={"table": frame.assign(value=[1.0, 2.5])}))
    assert found.metric.tolist() == [name for name in names for _ in range(2)]
    assert found["where"].tolist() == ["nll", "brier"] * len(names)
    assert found[found.difference != 0][["metric", "where", "difference"]].values.tolist() == [["value", "brier", 0.5]]
    said = differences(*[Run(pathlib.Path(), {}, {"table": frame.assign(where="here", metric="m", value="v")})] * 2)
    assert said["where"].unique().tolist() == ["nll here m v", "brier here m v"]
    assert (said.difference == 0).all()


def test_profiles_are_repeated_and_compared(tmp_path, capsys):
    """Their frame has a column called value."""
    one = str(tmp_path / "one")
    main(["gradients", "--losses", "nll", "--quick", "--out", one])
    main(["rerun", one, "--out", str(tmp_path / "two")])
    main(["compare", one, str(tmp_path / "two")])
    assert capsys.readouterr().out.count("numbers are the same to the last bit") == 2


def test_numbers_of_one_run_alone_are_counted_and_shown_when_asked_for(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "cut")
    without_sums(tmp_path / "cut")
    frame = tmp_path / "cut" / "frequency.csv"
    frame.write_text("".join(frame.read_text().splitlines(True)[:-1]))
    said = {}
    for more in ((), ("--all",)):
        main(["compare", str(folder), str(tmp_path / "cut"), *more])
        said[more] = capsys.readouterr().out
    lacks = len(frame.read_text().splitlines()[0].split(",")) - 3  # numbers a row, without its source, loss and seed
    assert f" numbers that both have differ; {lacks - 1} are in one run alone (--all shows them too)." in said[()]
    assert "frequency" not in said[()]
    assert "frequency" in said["--all",]


def test_a_word_that_is_missing_names_a_row_too():
    frame = pd.DataFrame({"loss": ["nll", "hinge"], "proper_through": ["softmax", None], "bias": [0.0, 0.8]})
    one = Run(pathlib.Path(), {}, {"scoreboard": frame})
    assert (differences(one, one).difference == 0).all()
    assert differences(one, one)["where"].tolist()[1].startswith("hinge ")


def test_of_many_differences_a_table_shows_the_first(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "moved")
    without_sums(tmp_path / "moved")
    curves = pd.read_csv(folder / "curves.csv")
    rows = pd.concat([curves.assign(seed=curves.seed + 10 * turn) for turn in range(4)])
    rows.to_csv(tmp_path / "moved" / "curves.csv", index=False)
    shutil.copytree(tmp_path / "moved", tmp_path / "other")
    rows.assign(train_loss=rows.train_loss + 1).to_csv(tmp_path / "other" / "curves.csv", index=False)
    lines = {}
    for more in ((), ("--all",)):
        main(["compare", str(tmp_path / "moved"), str(tmp_path / "other"), *more])
        lines[more] = capsys.readouterr().out.splitlines()
    assert lines[()][-1] == f"And {len(rows) - 40} more: --all shows every number, --format csv each that differs."
    assert sum(line.startswith("curves") for line in lines[()]) == 40
    assert len(lines["--all",]) > len(rows)


def test_the_table_comes_first_and_steps_in_their_order():
    curves = pd.DataFrame({"loss": ["nll"] * 3, "step": [2, 10, 20], "train_loss": [3.0, 2.0, 1.0]})
    one = Run(pathlib.Path(), {}, {"curves": curves, "table": pd.DataFrame({"loss": ["nll"], "test_nll": [1.0]})})
    other = dataclasses.replace(one, frames=one.frames | {"curves": curves.assign(step=[1, 2, 10])})
    assert differences(one, other)["where"].tolist() == ["nll", "nll step 2", "nll step 10", "nll step 20", "nll step 1"]


@pytest.mark.parametrize("arguments", [["compare", "{}", "{}"], ["rerun", "{}"]])
def test_what_is_no_run_is_told(folder, tmp_path, capsys, arguments):
    def says(place):
        with pytest.raises(SystemExit) as end:
            main([each.format(place) for each in arguments])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "is no run: it has no run.json" in says(tmp_path)
    (tmp_path / "run.json").write_text((folder / "run.json").read_text()[:100])
    assert "run.json cannot be read" in says(tmp_path)
    for other in ("[]", "null"):
        (tmp_path / "run.json").write_text(other)
        assert "run.json cannot be read: it holds no table" in says(tmp_path)


@pytest.mark.parametrize("edited", [{"frames": None}, {"frames": "table"}, {"sums": None}, {"kind": ["race"]}, {"losses": []}])
def test_a_record_with_something_else_in_its_place_is_told(folder, tmp_path, edited):
    (tmp_path / "run.json").write_text(json.dumps(json.loads((folder / "run.json").read_text()) | edited))
    ((name, value),) = edited.items()
    with pytest.raises(LabError, match=re.escape(f"its {name} is {json.dumps(value)}. Was it cut short, or edited?")):
        read_run(tmp_path)


def test_a_rerun_refuses_what_it_cannot_repeat(folder, tmp_path, capsys):
    def says(**changed):
        record = json.loads((folder / "run.json").read_text()) | changed
        (tmp_path / "run.json").write_text(json.dumps(record))
        with pytest.raises(SystemExit) as end:
            main(["rerun", str(tmp_path)])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "does not say by which command it was made" in says(kind="party")
    assert "with speed, which this version does not have" in says(arguments={"speed": 3})
    made = json.loads((folder / "run.json").read_text())["arguments"]
    for name, value in (("losses", None), ("losses", "nll"), ("checkpoint_every", "often"), ("steps", True), ("text", 3)):
        assert f"{name} is {value!r}. Was it edited?" in says(arguments=made | {name: value})
    assert "steps is a whole number of at least 1" in says(arguments=made | {"steps": 0})
    assert not list(tmp_path.glob("runs/*"))  # a refused one leaves no folder
    for held in (folder, tmp_path):
        with pytest.raises(SystemExit):
            main(["rerun", str(folder), "--out", str(held)])
        assert f"{held} holds a run; a rerun would overwrite it" in capsys.readouterr().err
    with pytest.raises(LabError, match="no run"):
        read_run(tmp_path / "nowhere")


def run_of(**frames):
    return Run(pathlib.Path(), {}, {name: pd.DataFrame(rows) for name, rows in frames.items()})


def test_of_one_source_each_the_sources_are_compared():
    """Two races on two texts have nothing else in common; of several sources each keeps its name."""
    one, other = ([{"source": name, "loss": "nll", "test_nll": value}] for name, value in (("a", 1.0), ("b", 3.0)))
    frame = differences(run_of(table=one), run_of(table=other))
    assert frame[["first", "second", "difference"]].values.tolist() == [[1.0, 3.0, 2.0]]
    both = differences(run_of(table=[*one, *other]), run_of(table=other))
    assert both[["first", "second"]].notna().all(axis=1).sum() == 1


def test_runs_without_a_number_in_common_are_not_the_same(capsys):
    empty = run_of(table=[{"loss": "nll", "kl_to_law": np.nan}])
    assert _side_by_side(empty, empty, "table") == 1
    assert "no number in common" in capsys.readouterr().out


def test_what_no_run_has_is_not_counted_and_what_is_none_of_its_frames_not_read(folder, tmp_path, capsys):
    """A race on a text has no divergence from a law; and a folder may hold a table of somebody's own."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    table = pd.read_csv(copy / "table.csv", engine="python").assign(kl_to_law=np.nan)
    for each in (copy, shutil.copytree(copy, tmp_path / "twice")):
        write_frame(each, "table", table)
        shutil.copy(folder / "run.json", each)
        without_sums(each)
    pd.DataFrame({"mine": [1.0]}).to_csv(copy / "mine.csv", index=False)
    main(["compare", str(copy), str(tmp_path / "twice")])
    known = sum(pd.read_csv(path).select_dtypes("number").notna().sum().sum() for path in folder.glob("*.csv"))
    said = int(capsys.readouterr().out.split("All ")[1].split()[0])
    assert 0 < said < known  # keys are no measurements
    with pytest.raises(SystemExit):
        main(["compare", str(copy), str(tmp_path / "nothing")])
    capsys.readouterr()


def test_another_precision_is_said(folder):
    one = read_run(folder).record
    other = one | {"numerics": one["numerics"] | {"jax_enable_x64": "True"}}
    assert settings(one, other) == [{"what": "numerics.jax_enable_x64", "first": "False", "second": "True"}]


@pytest.mark.parametrize("what", ["commit", "device.kind", "arguments.seed"])
def test_another_making_is_said(what):
    part, _, key = what.partition(".")
    records = [{part: {key: value} if key else value} for value in ("0", "1")]
    assert settings(*records) == [{"what": what, "first": "0", "second": "1"}]


@pytest.mark.parametrize(("sha", "said"), [("a", []), ("b", ["sources.0.path", "sources.0.sha256"])])
def test_one_text_is_one_wherever_it_lies(sha, said):
    records = [{"sources": [{"path": path, "sha256": each}]} for path, each in (("here.txt", "a"), ("/there/here.txt", sha))]
    assert [row["what"] for row in settings(*records)] == said


@pytest.mark.parametrize(("vocab", "said"), [(12, ["losses.f.program"]), (16, ["sources.0.vocab"])])
def test_a_loss_is_not_called_edited_where_it_was_compiled_for_another_vocabulary(vocab, said):
    make = lambda vocab, program: {"sources": [{"vocab": vocab}], "losses": {"f": {"sha256": "a", "program": program}}}
    assert [row["what"] for row in settings(make(12, "x"), make(vocab, "y"))] == said


def test_a_race_that_is_stopped_is_told_to_go_on(tmp_path):
    (tmp_path / "begun.json").write_text("{}")
    with pytest.raises(LabError, match="xentlab race --resume"):
        read_run(tmp_path)


def test_bins_of_other_edges_are_not_set_against_each_other():
    first, second = ({"p_low": lows, "p_high": highs} for lows, highs in (([0.0, 0.2], [0.2, 1.0]), ([0.0, 0.2], [0.2, 0.5])))
    runs = [Run(pathlib.Path(), {}, {"budgets": pd.DataFrame(bins).assign(loss="nll", share=0.5)}) for bins in (first, second)]
    frame = differences(*runs)
    assert len(frame) == 3
    assert frame.difference.isna().sum() == 2


def test_a_verdict_that_is_undecided_hides_no_other_number():
    first = pd.DataFrame({"loss": ["nll", "mae"], "finite_float32": [True, True], "tokens_needed": [1.0, 2.0]})
    second = first.assign(finite_float32=pd.Series([False, "undecided"], dtype=object), tokens_needed=[1.5, 2.0])
    found = differences(run_of(scoreboard=first), run_of(scoreboard=second)).set_index(["where", "metric"])
    assert found.difference["nll", "tokens_needed"] == 0.5
    assert found.difference["nll", "finite_float32"] == -1
    assert found.difference["mae", "tokens_needed"] == 0
    assert np.isnan(found.second["mae", "finite_float32"])


def test_a_batch_is_known_by_what_it_holds(tmp_path, capsys):
    """Batches are dumped over one another."""
    rng, batch, made = np.random.default_rng(0), str(tmp_path / "batch.npz"), str(tmp_path / "made")
    for _ in range(2):
        np.savez(batch, logits=rng.normal(size=(20, 5)).astype(np.float32), targets=rng.integers(0, 5, 20))
        main(["budget", batch, "--losses", "nll", "--out", made]) if not os.path.exists(made) else None
    with pytest.raises(SystemExit):
        main(["rerun", made, "--out", str(tmp_path / "again")])
    assert "sources.0.sha256: " in capsys.readouterr().out
