"""What the command makes of what a shell gives it, and of streams that know few characters."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scripts import in_process, process

from xentlab.cli import main
from xentlab.cli.race import _as_quick, _asked
from xentlab.commands import Race


@pytest.mark.parametrize("given", [["--out", ""], ["--out="], ["--losses", ""]])
def test_a_shells_unset_variable_is_told(given, capsys):
    with pytest.raises(SystemExit) as end:
        main(["gradients", "--quick", "--losses", "nll", *given])
    assert end.value.code == 2
    assert "is a shell's variable unset?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--checkpoint-every", "nan"), "--checkpoint-every is a number of seconds"),
        (("--checkpoint-every", "inf"), "--checkpoint-every is a number of seconds"),
        (("--clip", "inf"), "clip is a positive and finite length"),
        (("--steps", str(10**12)), "steps is counted in 32 bits"),
    ],
)
def test_a_number_that_is_none_is_told(given, said, capsys):
    code, _, told = in_process(capsys, "race", "--losses", "nll", "--markov", "4", *given)
    assert (code, told.count("\n")) == (2, 1)
    assert said in told


def test_a_plan_s_cells_are_numbers(capsys):
    main(["plan", "--tokens", "8", "--features", "4", "--vocab", "16", "--format", "csv"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert "sent" not in head.split(",")
    assert len(rows) == 3
    assert not any("{" in row for row in rows)


def test_a_narrow_stream_gets_plain_characters_and_no_other_verdict():
    said = subprocess.run(
        [sys.executable, "-c", "from xentlab.cli import _open_closed; _open_closed(); print('– ∞ ± ⇥ −1 ä')"],
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "- inf +- ->| -1 ?\n"


def test_a_record_has_the_probabilities_that_were_asked(tmp_path, capsys):
    main(["gradients", "--quick", "--losses", "nll", "--out", str(tmp_path / "run"), "--format", "json"])
    asked = {row["p"] for row in json.loads(capsys.readouterr().out)}
    assert asked == set(json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["probabilities"])


OWN = """
import jax
import jax.numpy as jnp
import numpy as np
from xentlab import at_target

WEIGHTS = jnp.linspace(0.5, 1, 64)  # JAX starts as this file is imported


def weighted(logits, targets):
    return -at_target(jax.nn.log_softmax(logits), targets) * WEIGHTS[targets]


def helper(logits):
    return [logits][1]


def deep(logits, targets):
    return helper(logits)


def branches(logits, targets):
    return logits[..., 0] if logits.sum() > 0 else logits[..., 1]
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)


def test_a_plan_has_its_devices_before_a_losss_file_starts_jax(own):
    """In a process of its own, for in this one JAX has started."""
    line = "plan --tokens 64 --features 8 --vocab 64 --mesh data=2 --loss ./own.py:weighted --format json"
    said = process(*line.split())
    assert (said.returncode, {row["head"] for row in json.loads(said.stdout)}) == (0, {"tokens", "naive"})


def test_where_a_users_own_code_failed_is_told(own, capsys):
    code, _, err = in_process(capsys, "gradients", "--quick", "--losses", "./own.py:deep")
    assert (code, "IndexError: list index out of range (own.py:15, in helper)" in err) == (2, True)
    code, out, _ = in_process(capsys, "audit", "./own.py:deep")
    assert (code, "(own.py:15, in helper)" in out, "a vocabulary of its own" in out) == (1, True, False)


def test_an_audit_that_can_ask_nothing_says_why(own, capsys):
    code, out, _ = in_process(capsys, "audit", "./own.py:branches")
    assert (code, "take jnp.where in place of an if" in out, "a vocabulary of its own" in out) == (1, True, False)


PRINTS = """
import jax

print("as it is imported")


def prints(logits, targets):
    jax.debug.print("as it runs {}", logits.sum())
    return -jax.numpy.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
"""


@pytest.mark.parametrize("command", ["gradients --quick --losses ./own.py:prints", "audit ./own.py:prints"])
def test_what_a_users_own_code_prints_is_in_no_data(tmp_path, capsys, command):
    (tmp_path / "own.py").write_text(PRINTS)
    _, out, err = in_process(capsys, *command.split(), "--format", "json")
    assert len(json.loads(out))
    assert "as it is imported" in err
    assert "as it runs" in err


def test_an_audit_s_cells_hold_one_value_each(capsys):
    (row,) = pd.read_csv(io.StringIO(in_process(capsys, "audit", "squared_hinge", "--format", "csv")[1])).to_dict("records")
    assert (row["elementwise"], row["bounded"], row["low_p_limit_even"]) == (True, False, np.inf)
    assert row["finite_float16"] is False
    assert 0 < row["max_error_bfloat16_value"] < 0.02
    assert np.isnan(row["proper_through"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("audit hinge ./own.py:weighted --all", "catalogue; leave it out, or hinge, ./own.py:weighted."),
        ("scoreboard --all --losses hinge", "leave it out, or --losses hinge."),
        ("show ./own:weighted", "give it one that ends in .py."),
        ("show ./empty.py:f", "./empty.py has no function 'f'; none is there."),
        ("show ~nosuchuser/own.py:f", "no home of that user is known here."),
        ("gradients --out ~nosuchuser/r", "no home of that user is known here."),
        (f"compare {'a' * 300} b", "File name too long. Is the path right, and may you read and write there?"),
        ("budget both.npz --targets targets.npy", "both.npz holds targets too, beside those that are given."),
        ("show --vocab 1.5 nll", "see xentlab show --help."),
    ],
)
def test_what_was_not_meant_is_a_line(own, tmp_path, capsys, line, said):
    (tmp_path / "own").write_text(OWN)
    (tmp_path / "empty.py").write_text("")
    np.savez(tmp_path / "both.npz", logits=np.zeros((3, 4)), targets=np.zeros(3, int))
    np.save(tmp_path / "targets.npy", np.zeros(3, int))
    code, _, err = in_process(capsys, *line.split())
    assert (code, err.count("\n")) == (2, 1)
    assert said in err


def test_a_version_is_told_whatever_else_is_off(capsys):
    assert in_process(capsys, "--no-cache", "--version")[1].startswith("xentlab ")


@pytest.mark.parametrize(
    ("rows", "said"), [([[0.25] * 4] * 3, True), ([[0.5, 0.5, 0.5, 0.5]] * 3, False), ([[1, -1, 2, 3.0]], False)]
)
def test_probabilities_are_no_logits(rows, said, tmp_path, capsys):
    np.savez(tmp_path / "batch.npz", logits=np.array(rows), targets=np.zeros(len(rows), int))
    _, _, err = in_process(capsys, "budget", tmp_path / "batch.npz", "--losses", "nll")
    assert ("Are these probabilities?" in err) == said


# A Ctrl-C that comes while the garbage collector calls back; then there is nothing but to wait.
LATE = """
import gc, signal, sys, threading
from xentlab import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has not
def late(phase, info):
    gc.callbacks.remove(late)
    signal.raise_signal(signal.SIGINT)
def run(command):
    gc.callbacks.append(late)
    gc.collect()
    threading.Event().wait(60)
    print("ran on")
cli.run, sys.argv = run, ["xentlab", "list"]
cli.main()
"""


def test_a_ctrl_c_that_nothing_could_raise_stops_all_the_same():
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "xentlab: stopped.\n")


def test_seeds_are_three_or_so_many_from_the_one_that_is_named_or_those_given():
    assert _asked(Race(seed=3))["seeds"] == (3, 4, 5)
    assert _asked(Race(seed=3, seeds=(2,)))["seeds"] == (3, 4)
    assert _asked(Race(seed=3, seeds=(2, 9)))["seeds"] == (2, 9)


def test_what_is_quick_is_what_was_not_asked_for():
    quick = _as_quick(Race(quick=True, seed=3))
    assert (quick.steps, quick.learning_rates, quick.seeds) == (20, Race.learning_rates[:1], (3, 4))
    asked = Race(quick=True, steps=7, learning_rates=(0.1, 0.2), seeds=(5,))
    assert _as_quick(asked) == asked
    assert _as_quick(Race(steps=7)) == Race(steps=7)


def test_a_pipe_that_knows_few_characters_gets_plain_ones_for_the_rest():
    at_the_edge = ("--learning-rates", "1e-3", "2e-3", "--extensions", "0")
    done = process(
        *("race", "--losses", "nll", "--quick", "--markov", 8, *at_the_edge),
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        encoding="latin-1",
    )
    assert done.returncode == 0, done.stderr
    assert "(->|)" in done.stdout
