"""What a race does with a folder: nothing of anybody else's is lost there, and nothing of its own before it must be."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import pytest
from scripts import in_process

from xentlab import LOSSES, LabError, contract, resume, runs
from xentlab.catalogue import program_of
from xentlab.checkpoints import Checkpoints, Grid
from xentlab.race import beyond

TRAINS = True
RACE = ("race", "--losses", "nll", "brier", "--markov", "8", "--model", "bigram", "--steps", "4", "--seeds", "0", "1")
RACE += ("--learning-rates", ".1", "--batch", "4", "--window", "8", "--format", "json")
FRAMES = ("curves", "table", "tests")


@pytest.fixture
def quick_pictures(monkeypatch):
    monkeypatch.setattr("xentlab.cli.writing.pictures", lambda frames, folder: None)


@pytest.fixture
def unwritten(tmp_path, capsys, quick_pictures):
    """A race whose runs are done, and which could not write what came out; and what it said."""

    def full(command, frames, *given, **more):
        raise LabError("cannot write table.csv: No space left on device.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("xentlab.cli.race.write", full)
        code, _, said = in_process(capsys, *RACE, "--out", tmp_path / "r")
    assert code == 2
    return tmp_path / "r", said


@pytest.mark.parametrize("name", ["checkpoints", "table.csv", "curves.png", "index.html", "data.json"])
def test_what_is_nobody_s_run_is_not_written_over(tmp_path, capsys, name):
    """A folder of checkpoints is deleted when a race ends: of another project's it must not be."""
    place = tmp_path / "project" / name
    place.parent.mkdir()
    place.mkdir() if name == "checkpoints" else place.write_text("mine")
    code, _, said = in_process(capsys, *RACE, "--out", tmp_path / "project")
    assert (code, said.count("\n")) == (2, 1)
    assert f"holds {name}, which race may write over. Move that away, or give another --out." in said
    assert [each.name for each in place.parent.iterdir()] == [name]


def test_a_folder_that_is_deleted_under_its_race_is_written_at_the_end(tmp_path, capsys, quick_pictures, monkeypatch):
    """Its checkpoints made it again, and are no stranger's."""
    real, folder = Grid.after, tmp_path / "r"

    def after(grid, done, last, everything):
        if done == 2:
            shutil.rmtree(folder)
        return real(grid, done, last, everything)

    monkeypatch.setattr(Grid, "after", after)
    code, _, _ = in_process(capsys, *RACE, "--out", folder, "--checkpoint-every", "0")
    assert code == 0
    assert {f"{name}.csv" for name in FRAMES} <= {each.name for each in folder.iterdir()}


def test_of_a_folder_of_checkpoints_only_the_race_s_own_are_removed(tmp_path):
    kept, own = tmp_path / "checkpoints", "nll-0123abcd"
    (kept / own / "0").mkdir(parents=True)
    (kept / "step_1000").mkdir()
    (kept / "best.pt").write_text("mine")
    resume.finish(tmp_path)
    assert sorted(path.name for path in kept.iterdir()) == ["best.pt", "step_1000"]
    (linked := tmp_path / "linked").mkdir()
    (linked / "checkpoints").symlink_to(kept)
    resume.finish(linked)
    assert sorted(path.name for path in kept.iterdir()) == ["best.pt", "step_1000"]


def test_what_cannot_be_written_is_kept_and_said_how_to_go_on(unwritten, capsys, tmp_path):
    folder, said = unwritten
    assert "No space left on device. All runs are done and kept: once it can be written, `xentlab race --resume" in said
    code, _, said = in_process(capsys, "race", "--resume", folder)
    assert (code, f"{folder} goes on from what is kept there." in said) == (0, True)
    assert in_process(capsys, *RACE, "--out", tmp_path / "whole")[0] == 0
    for name in FRAMES:
        assert (folder / f"{name}.csv").read_bytes() == (tmp_path / "whole" / f"{name}.csv").read_bytes()


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (None, "begun.json is gone, by which a race goes on. Put it back; else the race's own arguments with --out"),
        ("{}", "does not say what the race began with. Delete it: the race's own arguments with --out"),
        ('{"arguments": {}, "losses": []}', "its losses is []. Delete it: the race's own arguments with --out"),
        ('{"arg', "Delete it: the race's own arguments with --out"),
    ],
)
def test_checkpoints_outlive_the_record_of_their_race(unwritten, capsys, monkeypatch, record, told):
    folder, _ = unwritten
    (folder / "begun.json").unlink() if record is None else (folder / "begun.json").write_text(record)
    code, _, said = in_process(capsys, "race", "--resume", folder)
    assert (code, told in said) == (2, True)
    (folder / "begun.json").unlink(missing_ok=True)
    saved = []
    monkeypatch.setattr(Grid, "_save", lambda self, block, tree: saved.append(block))
    code, _, said = in_process(capsys, *RACE, "--out", folder)
    assert (code, saved) == (0, [])  # nothing was trained again
    assert "has checkpoints without their begun.json: what was trained alike is taken" in said


def test_a_record_that_goes_while_the_race_runs_is_not_missed(tmp_path, capsys, quick_pictures, monkeypatch):
    gone = lambda self, block, last, tree: (tmp_path / "r" / "begun.json").unlink(missing_ok=True)
    monkeypatch.setattr(Grid, "after", gone)
    assert in_process(capsys, *RACE, "--out", tmp_path / "r")[0] == 0
    assert (tmp_path / "r" / "run.json").is_file()


def test_ctrl_c_while_results_are_written_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def stopped(*given, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("xentlab.cli.race.write", stopped)
    code, _, said = in_process(capsys, *RACE, "--out", tmp_path / "r")
    assert code == 130
    assert "What is done is kept. Go on with: xentlab race --resume" in said


def test_a_run_takes_another_s_place_whole_or_not_at_all(tmp_path):
    (tmp_path / "run.json").write_text("old")
    (tmp_path / "table.csv").write_text("old")
    (tmp_path / "text-hinge.coded").write_text("old")
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / "left.csv").write_text("by one that was killed")

    def fails():
        with runs.replacing(tmp_path) as staged:
            assert not any(staged.iterdir())
            (staged / "table.csv").write_text("new")
            raise LabError("full")

    with pytest.raises(LabError, match="full"):
        fails()
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"run.json": "old", "table.csv": "old", "text-hinge.coded": "old"}
    with runs.replacing(tmp_path) as staged:
        for name in ("run.json", "table.csv"):
            (staged / name).write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "new", "table.csv": "new"}


def test_a_loss_s_link_is_of_what_it_is_known_by():
    """Models are validated through it: with another one, blocks before and after a stop would be of two readings."""
    linked = lambda scale: contract.loss(link=lambda z: jax.nn.softmax(scale * z))(lambda z, y: LOSSES["nll"](z, y))
    assert program_of(linked(1)) == program_of(linked(1)) != program_of(linked(3))


def test_devices_that_are_others_now_are_free_and_recorded(tmp_path):
    record = {"arguments": {"losses": ["nll"], "mesh": None}, "losses": {}, "sources": [], "device": {"count": 1}}
    before = record | {"device": {"count": 2}, "arguments": record["arguments"] | {"mesh": "runs=2"}}
    assert resume.differences(before, record) == []
    said = ["mesh: runs=2 there, None now", "device.count: 2 there, 1 now"]
    assert resume.moved(before, record) == said
    (tmp_path / "begun.json").write_text(json.dumps(before))
    _, record = resume.begin(tmp_path, record, True, False, 10.0)
    assert record["resumed_with"] == json.loads((tmp_path / "begun.json").read_text())["resumed_with"] == said


def test_a_process_that_is_lost_during_a_save_is_no_full_disk(tmp_path, monkeypatch):
    class Manager:
        def save(self, *given, **more):
            raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")

    monkeypatch.setattr(Grid, "_manager", lambda self: contextlib.nullcontext(Manager()))
    grid = Checkpoints(tmp_path).grid("nll", 0)
    with pytest.raises(LabError, match=r"could not be written .* Make room"):
        grid._save(0, {"a": jnp.zeros(1)})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
        grid._save(0, {"a": jnp.zeros(1)})


def test_a_checkpoint_whose_record_lacks_a_part_is_damaged(tmp_path, capsys):
    """Not one of other runs, for which those before it would be deleted too."""
    grid, tree = Checkpoints(tmp_path).grid("nll", 0, {"seeds": [0]}), {"a": jnp.arange(3.0)}
    grid._save(0, tree)
    grid._save(1, tree)
    (grid.folder / "1" / "sums" / "metadata").write_text("{}")
    assert grid.load(tree)[0] == 0
    assert "damaged, and left out: block 1" in capsys.readouterr().err


def test_what_is_no_folder_is_no_place_for_checkpoints(tmp_path):
    (tmp_path / "checkpoints").write_text("mine")
    with pytest.raises(LabError, match=r"checkpoints is no folder, where checkpoints are kept\. Move it away"):
        resume.kept(tmp_path, 10.0)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "checkpoints").symlink_to(tmp_path / "nowhere")
    with pytest.raises(LabError, match="is no folder"):
        resume.kept(tmp_path / "r", 10.0)


def test_a_grid_ends_where_rates_are_no_numbers():
    assert beyond([1e-30, 1e-3], 1e-30) is None  # 1e-57
    assert beyond([1.0, 1e30], 1e30) is None


@pytest.mark.parametrize(("rates", "best"), [([0.1, 0.1000001], 0.1000001), ([3e-3, 3.000004e-3], 3e-3)])
def test_a_grid_grows_by_no_rate_that_it_has(rates, best):
    """To six digits the next one is one of these."""
    assert beyond(rates, best) is None
