"""Races that are killed, stopped, or find their disk full, go on and end as if nothing had been."""

import errno
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import re
import resource
import signal
import subprocess
import sys
import time

import jax
import pytest

from xentlab import LabError
from xentlab.catalogue import own_files
from xentlab.checkpoints import Checkpoints, Grid, _sums
from xentlab.cli import main, writing
from xentlab.names import placed
from xentlab.resume import differences, has_begun

TRAINS = True
RACE = ("race", "--losses", "nll", "brier", "--markov", "8", "--model", "bigram", "--steps", "20", "--seeds", "0", "1")
RACE += ("--learning-rates", ".02", ".1", "--extensions", "1", "--batch", "4", "--window", "8", "--format", "json")
TEXT = "the quick brown fox jumps over the lazy dog; " * 400
FRAMES = ("curves", "table", "tests", "pairs", "reliability", "frequency")
KEPT = "checkpoints"
# A server that has imported everything forks each child: a real process, to really kill, without a start of seconds.
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["xentlab.cli", "xentlab.race", "orbax.checkpoint", "pandas", "altair", "scipy.stats"])


def child(arguments, pipe, limit=None):
    """The command; limit: bytes of the largest file, as on a full disk."""
    for stream in (1, 2):
        os.dup2(pipe.fileno(), stream)
    # They say nothing of the numbers, and take half of such a race's time.
    writing.pictures = lambda frames, folder: None
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(list(arguments))


def start(folder, *arguments, limit=None):
    """What it says comes through a pipe, which no full disk stops; `finish` keeps it beside the folder."""
    reader, writer = SPAWN.Pipe(duplex=False)
    process = SPAWN.Process(target=child, args=(arguments, writer, limit))
    process.start()
    writer.close()
    process.tells = reader, str(folder) + ".said"
    return process


def finish(process, seconds=120):
    process.join(seconds)
    assert process.exitcode is not None, "the race did not end"
    reader, said = process.tells
    with reader, open(said, "ab") as file:
        while some := os.read(reader.fileno(), 2**16):
            file.write(some)
    return process.exitcode


def said(folder):
    return pathlib.Path(str(folder) + ".said").read_text()


def checkpoints(folder):
    """The checkpoints of a race so far, newest last."""
    found = [path for path in (folder / KEPT).glob("*/*/*") if path.name.isdecimal()]
    return sorted(found, key=lambda path: (path.parent.stat().st_ctime, int(path.name)))


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the race ended before"
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.002)


def wait_for_a_save(folder, process):
    """Until a checkpoint begins to be written, or the race ends."""
    seen = lambda: {*(folder / KEPT).glob("*/*/*")}
    before = seen()
    while process.is_alive() and not seen() - before:
        time.sleep(0.001)


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """The children share what they compile, as a user's runs do, and nobody else reads what a killed one half wrote."""
    before, os.environ["XENTLAB_CACHE"] = os.environ.get("XENTLAB_CACHE"), str(tmp_path_factory.mktemp("compiled"))
    yield
    os.environ.pop("XENTLAB_CACHE") if before is None else os.environ.update(XENTLAB_CACHE=before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The race without an interruption."""
    folder = tmp_path_factory.mktemp("race") / "whole"
    assert finish(start(folder, *RACE, "--out", str(folder))) == 0, said(folder)
    assert not (folder / KEPT).exists()
    return folder


def assert_same(folder, whole):
    for name in FRAMES:
        assert (folder / f"{name}.csv").read_bytes() == (whole / f"{name}.csv").read_bytes(), name
    assert not (folder / KEPT).exists()
    assert not (folder / "begun.json").exists()


def test_killed_at_twenty_moments_it_ends_the_same(whole, tmp_path):
    """kill -9, at random and in the middle of a save, again and again; what is finished is the same to the last bit."""
    draw, kills, in_a_save, finished = random.Random(0), 0, 0, 0
    while kills < 20 or not finished:
        folder = tmp_path / f"race-{finished}"
        going_on = ("race", "--resume", str(folder)) if (folder / "begun.json").exists() else (*RACE, "--out", str(folder))
        process = start(folder, *going_on, "--checkpoint-every", "0")
        if kills < 20:
            if kills % 2:
                wait_for_a_save(folder, process)
            else:
                time.sleep(draw.uniform(0.2, 2.0))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                process.join()
                in_a_save += any((folder / KEPT).glob("*/*/*.orbax-checkpoint-tmp"))
                continue
        assert finish(process) == 0, said(folder)
        assert_same(folder, whole)
        finished += 1
    assert in_a_save


def test_ctrl_c_keeps_what_is_done_and_says_how_to_go_on(whole, tmp_path):
    folder = tmp_path / "stopped"
    process = start(folder, *RACE, "--out", str(folder), "--checkpoint-every", "0")
    wait_for(lambda: checkpoints(folder), process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    assert f"Go on with: xentlab race --resume {folder}" in said(folder)
    assert "Traceback" not in said(folder)
    assert checkpoints(folder)
    assert finish(start(folder, "race", "--resume", str(folder))) == 0, said(folder)
    assert_same(folder, whole)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A race that was killed in its second loss."""
    folder = tmp_path_factory.mktemp("race") / "killed"
    process = start(folder, *RACE, "--out", str(folder), "--checkpoint-every", "0")
    wait_for(lambda: any("brier" in str(path) and path.name == "5" for path in checkpoints(folder)), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    subprocess.run(["cp", "-r", stopped, tmp_path / "copy"], check=True)
    return tmp_path / "copy"


def refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main([str(each) for each in arguments])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    return told


def test_other_settings_are_refused_and_named(copy, capsys):
    told = refused(["race", "--resume", copy, "--steps", "21", "--batch", "4"], capsys)
    assert "steps: 20 there, 21 now" in told
    assert "batch" not in told
    record = json.loads((copy / "begun.json").read_text())
    assert record["arguments"]["steps"] == 20
    record["versions"]["jax"] = "0.1"
    record["sources"][0]["vocab"] = 9
    (copy / "begun.json").write_text(json.dumps(record))
    told = refused(["race", "--resume", copy], capsys)
    assert "versions.jax: 0.1 there" in told
    assert "sources.0.vocab: 9 there, 8 now" in told
    assert checkpoints(copy)


def test_told_to_go_on_anyway_it_does(copy, whole):
    record = json.loads((copy / "begun.json").read_text())
    record["versions"]["jax"] = "0.1"
    (copy / "begun.json").write_text(json.dumps(record))
    assert finish(start(copy, "race", "--resume", str(copy), "--anyway")) == 0, said(copy)
    assert "Going on although it began otherwise. versions.jax: 0.1 there" in said(copy)
    assert_same(copy, whole)


def test_runs_that_were_kept_at_other_rates_are_trained_anew(copy, tmp_path):
    """Shapes are the same: what was trained at .02 and .1 must not be shown as .5 and .9."""
    fresh, rates = tmp_path / "fresh", ("--learning-rates", ".5", ".9")
    assert finish(start(fresh, *RACE, *rates, "--out", str(fresh))) == 0, said(fresh)
    assert finish(start(copy, "race", "--resume", str(copy), "--anyway", *rates)) == 0, said(copy)
    for loss in ("nll", "brier"):
        assert f"{loss}: was kept with other learning rates, and is trained anew." in said(copy)
    assert_same(copy, fresh)
    record = json.loads((copy / "run.json").read_text())
    assert record["resumed_with"] == ["learning_rates: [0.02, 0.1] there, [0.5, 0.9] now"]
    assert "resumed_with" not in json.loads((fresh / "run.json").read_text())


OWN = """
import optax

def own(logits, targets):
    return {} * optax.softmax_cross_entropy_with_integer_labels(logits, targets)
"""


def test_a_loss_that_was_edited_meanwhile_is_no_part_of_the_race(tmp_path, capsys):
    file, folder = tmp_path / "own.py", tmp_path / "race"
    file.write_text(OWN.format(1))
    race = (*RACE, "--losses", "./own.py:own", "nll", "--steps", "20000", "--out", str(folder), "--checkpoint-every", "0")
    process = start(folder, *race)
    wait_for(lambda: len(checkpoints(folder)) > 1, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    ((name, was),) = json.loads((folder / "begun.json").read_text())["losses"].items()
    assert name == f"{file}:own"
    assert (was["file"], was["sha256"]) == ("own.py", hashlib.sha256(file.read_bytes()).hexdigest())
    file.write_text(OWN.format(2))
    told = refused(["race", "--resume", folder], capsys)
    assert "began otherwise: own.py:own computes something else now: it was edited since." in told
    # And one that is edited after it was read is not what the race says that it was.
    file.write_text(OWN.format(1))
    kept = checkpoints(folder)[-1]
    process = start(folder, "race", "--resume", str(folder))
    wait_for(lambda: kept not in checkpoints(folder), process)
    file.write_text(OWN.format(2))
    assert finish(process) == 0, said(folder)
    assert json.loads((folder / "run.json").read_text())["losses"] == {name: was}


HELPED = """
from helper_of_a_loss import scaled

own = scaled({})
"""


def test_a_loss_is_known_by_what_it_computes_wherever_that_stands(tmp_path, monkeypatch):
    """Through a helper's file, which stays, and wherever its own file lies."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "helper_of_a_loss.py").write_text("def scaled(by):\n    return lambda z, y: by * z[..., 0] + 0 * y\n")
    records = {}
    for folder, by in (("a", 1.0), ("b", "1.0)  # as it was, and a word beside it\n("), ("c", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(HELPED.format(by))
        name = placed(f"{tmp_path}/{folder}/mine.py:own")
        records[folder] = {"arguments": {"losses": ["nll", name]}, "losses": own_files(["nll", name])}
    assert differences(records["a"], records["b"]) == []
    # What the function stands in is the helper's file.
    assert differences(records["a"], records["c"]) == [
        "mine.py:own computes something else now: its file is the same, so what it holds, reads or imports is not"
    ]


def test_a_race_that_cannot_print_is_finished(whole, tmp_path):
    folder = tmp_path / "unread"
    line = [sys.executable, "-m", "xentlab", *RACE, "--out", folder]
    with open("/dev/full", "w") as full:
        subprocess.run(line, stdout=full, stderr=subprocess.DEVNULL, timeout=120, check=False)
    assert_same(folder, whole)


def test_an_unfinished_race_is_not_overwritten_and_a_finished_one_not_resumed(copy, whole, tmp_path, capsys):
    assert f"Go on with `xentlab race --resume {copy}`" in refused([*RACE, "--out", copy], capsys)
    assert "is finished" in refused(["race", "--resume", whole], capsys)
    assert f"{whole} holds a finished race" in refused([*RACE, "--out", whole], capsys)
    assert "holds no unfinished race" in refused(["race", "--resume", tmp_path / "nowhere"], capsys)
    for damaged in ("{", "[]", "null"):
        (copy / "begun.json").write_text(damaged)
        assert "cannot be read" in refused(["race", "--resume", copy], capsys)
    for edited in ({"sources": [None]}, {"sources": "x"}, {"losses": {"nll": 3}}, {"resumed_with": None}):
        (copy / "begun.json").write_text(json.dumps(json.loads((whole / "run.json").read_text()) | edited))
        assert f"its {next(iter(edited))} is {json.dumps(edited.popitem()[1])}. Delete it" in refused(
            ["race", "--resume", copy], capsys
        )


def test_a_mistake_begins_no_race(tmp_path, capsys):
    folder = tmp_path / "race"
    for mistake, message in (
        (("--losses", "nll", "breir"), "did you mean brier"),
        (("--learning-rates", ".1", "inf"), "finite"),
        (("--learning-rates", ".1", ".1"), "repeat"),
        (("--seeds", "0", "-1"), "seeds are whole numbers"),
        (("--seeds", "0"), "--seeds 1 --seed 7"),
        (("--extensions", "-1"), "extensions=-1"),
        (("--schedule", "sine"), "did you mean cosine"),
        (("--model", "transformer(features=3)"), "multiple of 2"),
        (("--window", "50000"), "shorter window"),
    ):
        assert message in refused([*RACE, *mistake, "--out", folder], capsys)
        assert not (folder / "begun.json").exists()


def test_a_race_that_kept_nothing_gives_way(copy, whole):
    subprocess.run(["rm", "-r", copy / KEPT], check=True)
    assert finish(start(copy, *RACE, "--out", str(copy))) == 0, said(copy)
    assert_same(copy, whole)


def damage(path):
    """Flips a bit in the middle of the largest files of a checkpoint, where its numbers are."""
    files = sorted((each for each in (path / "tree").rglob("*") if each.is_file()), key=lambda each: -each.stat().st_size)
    for each in files[:4]:
        content = bytearray(each.read_bytes())
        content[len(content) // 2] ^= 1
        each.write_bytes(content)


def test_numbers_that_changed_places_have_another_sum():
    assert _sums(jax.numpy.array([1, 2])) != _sums(jax.numpy.array([2, 1]))


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(copy, whole):
    newest = checkpoints(copy)[-1]
    damage(newest)
    assert finish(start(copy, "race", "--resume", str(copy))) == 0, said(copy)
    assert f"damaged, and left out: block {newest.name}" in said(copy)
    assert_same(copy, whole)


def test_what_a_killed_save_left_is_gone_before_the_next_one(tmp_path):
    """Much of it: Orbax, told to remove it, would be at it for the reading still when the writing begins and fails on it."""
    grid = Checkpoints(tmp_path).grid("nll", 0)
    for step in (1, 2):
        data = grid.folder / f"{step}.orbax-checkpoint-tmp" / "tree" / "d"
        data.mkdir(parents=True)
        for place in range(3000):
            (data / str(place)).touch()
    tree = {"numbers": jax.numpy.arange(3)}
    assert grid.load(tree) is None
    grid.after(1, True, lambda: tree)
    assert [path.name for path in grid.folder.iterdir()] == ["1"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES])
def test_what_cannot_be_read_just_now_is_not_damaged(copy, monkeypatch, number):
    """Too many open files, say: nothing is deleted, and nobody is told to."""
    grid = Checkpoints(copy / KEPT).grid("nll", 0)
    before, refuse = checkpoints(copy), lambda *_: (_ for _ in ()).throw(OSError(number, os.strerror(number)))
    monkeypatch.setattr(Grid, "_read", refuse)
    with pytest.raises(LabError, match=f"just now: .*{os.strerror(number)}.*try again"):
        grid.load(None)
    assert checkpoints(copy) == before


def test_it_goes_on_from_another_folder_with_its_text_elsewhere(tmp_path, monkeypatch):
    """A text is what is in it, not where it lies."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    (here / "book.txt").write_text(TEXT)
    monkeypatch.chdir(here)
    race = ("race", "--losses", "nll", "--text", "book.txt", "--model", "bigram", "--steps", "2000", "--seeds", "0", "1")
    process = start(here / "run", *race, "--learning-rates", ".1", "--out", "run", "--checkpoint-every", "0")
    wait_for(lambda: len(checkpoints(here / "run")) > 1, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 130
    (here / "book.txt").rename(there / "moved.txt")
    monkeypatch.chdir(there)
    assert finish(start(there / "on", "race", "--resume", "../here/run", "--text", "moved.txt")) == 0, said(there / "on")
    assert "otherwise" not in said(there / "on")
    assert "anew" not in said(there / "on")


def test_a_race_goes_on_where_it_is(copy, tmp_path, capsys):
    told = refused(["race", "--resume", copy, "--out", tmp_path / "elsewhere"], capsys)
    assert "goes on in that folder" in told
    assert not (tmp_path / "elsewhere").exists()


def test_where_all_are_damaged_it_says_what_to_delete(copy, whole):
    place = checkpoints(copy)[-1].parent
    for each in place.iterdir():
        largest = max((path for path in each.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:7])
        damage(each)
    assert finish(start(copy, "race", "--resume", str(copy))) == 2
    assert f"Delete {place}" in said(copy)
    assert "Traceback" not in said(copy)
    subprocess.run(["rm", "-r", place], check=True)
    assert finish(start(copy, "race", "--resume", str(copy))) == 0, said(copy)
    assert_same(copy, whole)


READING = """
import pathlib, sys
import jax.numpy as jnp
from xentlab import LabError
from xentlab.checkpoints import Checkpoints

tree, grid = {str(n): jnp.arange(200) + n for n in range(30)}, Checkpoints(pathlib.Path(sys.argv[1])).grid("nll", 0)
grid.after(1, True, lambda: tree)
for each in grid.folder.glob("*/tree/**/d/*"):
    content = bytearray(each.read_bytes())
    content[len(content) // 2] ^= 1
    each.write_bytes(content)
for _ in range(5):  # which arrays are read before the first one ends the reading is chance
    try:
        grid.load(tree)
    except LabError as error:
        print(error)
"""


def test_of_many_arrays_that_cannot_be_read_one_line_is_said(tmp_path):
    """The others' errors, which nobody awaits, asyncio tells when they go: at the latest as the process ends."""
    ended = subprocess.run([sys.executable, "-c", READING, tmp_path], capture_output=True, text=True, check=True)
    line = r"no checkpoint of nll .* block 1 \(.*checksum verification failed: expected=\d+, actual=\d+\)\. Delete .*"
    assert re.fullmatch(f"({line}\n){{5}}", ended.stdout), ended.stdout
    assert ended.stderr == ""


def test_a_full_disk_loses_nothing(whole, tmp_path):
    """The kernel refuses to let a file grow, as it does when no block is free."""
    folder = tmp_path / "full"
    for limit, begun, told in (
        (600, False, "cannot write"),
        (1900, True, "a checkpoint could not be written"),
        (5000, True, "cannot write"),
    ):
        going_on = ("race", "--resume", str(folder)) if (folder / "begun.json").exists() else (*RACE, "--out", str(folder))
        assert finish(start(folder, *going_on, limit=limit)) == 2, said(folder)
        assert (folder / "begun.json").exists() == begun
        assert told in said(folder).splitlines()[-1]
        assert not (folder / "run.json").exists()
    # A line each, and nothing of what is left of a failed write, which Orbax's threads report when they please.
    assert all(line.startswith("xentlab: ") for line in said(folder).splitlines()), said(folder)
    assert finish(start(folder, "race", "--resume", str(folder))) == 0, said(folder)
    assert_same(folder, whole)


HOLD = """
import filelock, sys
lock = filelock.FileLock(sys.argv[1] + "/.lock")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_in_use_is_left_alone(copy, tmp_path, capsys):
    for folder in (copy, tmp_path):
        holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdin=-1, stdout=-1, text=True)
        try:
            assert holder.stdout.readline() == "held\n"
            for arguments in (
                ["race", "--resume", copy],
                ["report", "--quick", "--out", tmp_path],
                ["tour", "--out", tmp_path],
            ):
                if folder in arguments:
                    assert f"{folder} is in use by another process" in refused(arguments, capsys)
        finally:
            holder.communicate("")


def test_whether_any_block_is_kept_is_known(tmp_path):
    assert not has_begun(tmp_path)
    (tmp_path / KEPT / "nll-0" / "0").mkdir(parents=True)
    (tmp_path / KEPT / "nll-0" / "0" / "3.orbax-checkpoint-tmp").mkdir()
    assert not has_begun(tmp_path)
    (tmp_path / KEPT / "nll-0" / "0" / "3").mkdir()
    assert has_begun(tmp_path)
