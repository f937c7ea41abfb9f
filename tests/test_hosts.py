"""Runs spread over devices and real processes: the same numbers to rounding; where one is lost, an end in bounded time."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from xentlab import LabError, hosts
from xentlab.checkpoints import Checkpoints, Grid

RACE = ("race", "--losses", "nll", "--markov", "8", "--model", "bigram", "--steps", "20", "--seeds", "0", "1", "2")
RACE += ("--learning-rates", ".02", ".1", "--extensions", "1", "--batch", "4", "--window", "8", "--format", "json")


def start(*arguments):
    command = [sys.executable, "-m", "xentlab", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process, code=0, seconds=200):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == code, err[-3000:]
    return out, err


def pair():
    """The arguments of two processes that meet at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [("--hosts", f"127.0.0.1:{port},2,{index}") for index in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("race") / "alone"
    finish(start(*RACE, "--out", folder))
    return folder


def assert_near(folder, other):
    for name in ("curves", "table", "tests"):
        one, two = (pd.read_csv(each / f"{name}.csv") for each in (folder, other))
        numbers = one.select_dtypes("number").columns
        # The same sums in another order: as many runs a call, another program.
        np.testing.assert_allclose(one[numbers], two[numbers], rtol=2e-4, atol=2e-5)


def test_devices_share_runs_and_each_run(alone, tmp_path):
    """Six runs, which four do not divide, on twice as many devices."""
    _, err = finish(start(*RACE, "--out", tmp_path / "spread", "--mesh", "runs=4,model=2", "--verbose"))
    assert "4 runs a call" in err
    assert_near(tmp_path / "spread", alone)


def test_two_processes_race_as_one(alone, tmp_path):
    first, second = (start(*RACE, "--out", tmp_path / "both", *each) for each in pair())
    said, _ = finish(first)
    nothing, _ = finish(second)
    assert '"loss": "nll"' in said
    assert nothing == ""
    assert_near(tmp_path / "both", alone)


def test_what_the_first_process_refuses_the_others_hear_of(alone):
    """A finished race in the folder, which only the first one looks at."""
    both = [start(*RACE, "--out", alone, *each) for each in pair()]
    said = [finish(process, code=2, seconds=90)[1] for process in both]
    assert "holds a finished race" in said[0]
    assert "the first process refuses" in said[1]
    assert not any("Traceback" in each for each in said)


def test_processes_that_were_started_unlike_are_refused(tmp_path):
    """With other data or steps each would take its part of another race; without a common folder they would wait for ever."""
    there = [tmp_path / "a", tmp_path / "b"]
    different = ([("--seed", 0), ("--seed", 7)], [("--out", there[0]), ("--out", there[1])])
    for options, named in zip(different, ("seed, source", "the folder"), strict=True):
        both = [start(*RACE, *option, *each) for option, each in zip(options, pair(), strict=True)]
        said = [finish(process, code=2, seconds=90)[1] for process in both]
        assert all(f"started unlike: {named} differ" in each for each in said), said


def test_a_process_that_is_told_to_end_ends(tmp_path):
    """JAX's own notifier would keep SIGTERM to itself."""
    process = start(*RACE, "--steps", "200000", "--out", tmp_path / "told", "--hosts", f"{pair()[0][1].rsplit(',', 2)[0]},1,0")
    end = time.monotonic() + 90
    while not list((tmp_path / "told").glob("begun.json")):
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def lose(lost, folder):
    """Kills one of two processes in the middle of a race; the other ends in bounded time, and says why."""
    both = [start(*RACE, "--out", folder, "--checkpoint-every", "0", *each) for each in pair()]
    end = time.monotonic() + 120
    while not any(path.name.isdecimal() and int(path.name) > 2 for path in folder.glob("checkpoints/*/*/*")):
        assert time.monotonic() < end
        assert all(process.poll() is None for process in both), [process.communicate() for process in both]
        time.sleep(0.01)
    os.kill(both[lost].pid, signal.SIGKILL)
    begun = time.monotonic()
    _, err = both[1 - lost].communicate(timeout=90)
    assert both[1 - lost].returncode != 0
    assert time.monotonic() - begun < 3 * hosts.HEARTBEAT
    assert re.search("lost|unavailable|UNAVAILABLE|heartbeat|closed", err), err[-2000:]
    both[lost].communicate()


def test_where_the_first_process_is_lost_the_other_ends(tmp_path):
    lose(0, tmp_path / "half")


def test_a_lost_process_ends_the_first_and_the_race_goes_on_without_it(alone, tmp_path):
    lose(1, tmp_path / "half")
    finish(start("race", "--resume", tmp_path / "half"))
    assert_near(tmp_path / "half", alone)


def test_processes_that_see_different_checkpoints_are_refused(tmp_path, monkeypatch):
    """Each would go on from another block, and wait for the others at it."""
    (tmp_path / "nll-0" / "0" / "20").mkdir(parents=True)
    grid = Grid(Checkpoints(tmp_path), tmp_path / "nll-0" / "0", "nll")
    seen = []
    monkeypatch.setattr(hosts, "unlike", lambda what: seen.append(what) or ["steps"])
    with pytest.raises(LabError, match="see different checkpoints of nll"):
        grid.load({})
    assert seen == [{"steps": ["20"]}]


@pytest.mark.parametrize("text", ["here", "host:1,2", "host:1,2,2", "host:1,2,-1", "host,2,0"])
def test_processes_are_named_one_way(text):
    with pytest.raises(LabError, match="HOST:PORT,COUNT,INDEX"):
        hosts.join(text)
