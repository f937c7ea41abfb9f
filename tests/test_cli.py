"""The command as a user runs it: a process of its own, its exit code, stdout and stderr."""

import io
import json
import os
import pathlib
import platform
import pty
import re
import subprocess
import sys
from hashlib import sha256
from importlib import metadata

import jax
import numpy as np
import pandas as pd
import pytest
from scripts import in_process, process

from xentlab import LOSSES
from xentlab.cache import JAXS_OWN, keep_compiled, tidy
from xentlab.cache import folder as cache_folder
from xentlab.cli import COMMANDS, main
from xentlab.console import print_table

TRAINS = True
MINE = """
import jax, jax.numpy as jnp
def my_loss(logits, targets):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
def averaged(logits, targets):
    return my_loss(logits, targets).mean()
def scaled(logits, targets, *, by=1.0):
    return by * my_loss(logits, targets)
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(0)\n")


def test_gradients_say_where_a_loss_is_no_number(mine, tmp_path, capsys):
    (tmp_path / "bent.py").write_text(
        "import jax.numpy as jnp\nfrom xentlab import LOSSES\n"
        "def bent(logits, targets):\n"
        "    nll = LOSSES['nll'](logits, targets)\n"
        "    return nll + jnp.where(nll < 0.2, jnp.nan, 0)\n"
    )
    code, out, err = in_process(
        capsys, "gradients", "--losses", "bent.py:bent", "--quick", "--probabilities", 0.95, 0.9, 0.5, "--format", "csv"
    )
    assert (code, len(out.splitlines())) == (0, 4)
    assert "bent is no number at p = 0.95, 0.9: `xentlab audit` says more." in err


def test_a_budget_says_why_a_loss_has_no_shares(capsys):
    np.savez("masked.npz", logits=np.array([[0, -np.inf], [0, 3]]), targets=np.array([0, 1]))
    line = ("budget", "masked.npz", "--losses", "nll", "mse_logits", "--bins", 0, 0.5, 0.99, 1, "--format", "csv")
    err = in_process(capsys, *line)[2]
    assert "mse_logits has no shares: its gradient is infinite or no number in the bins from p = 0.99, as a" in err
    assert "nll" not in err


def test_gradients_say_what_one_rival_cannot_reach_and_only_then(capsys):
    for p, said in ((0.06, False), (0.07, True)):
        line = ("gradients", "--losses", "nll", "--rivals", "one", "--vocab", 16, "--probabilities", p, "--format", "csv")
        assert ("p cannot reach 1/(V - 1)" in in_process(capsys, *line)[2]) == said


def test_an_audit_of_what_needs_more_classes_says_so(tmp_path, capsys):
    (tmp_path / "top.py").write_text(
        "import jax\ndef top(logits, targets):\n    return -jax.lax.top_k(logits, 5)[0].sum(axis=-1) + 0 * targets\n"
    )
    _, out, _ = in_process(capsys, "audit", "nll", "top.py:top")
    assert re.search(
        r"top: the question failed: .*Has it a vocabulary of its own\? It was tried at V = 4; ask at its own, by --vocab",
        out,
    )
    assert "What is claimed of nll is what was found." in out
    assert re.search(r"^finite +float32 yes, bfloat16 yes, float16 yes", out, re.MULTILINE)


def test_a_plan_says_where_the_naive_head_holds_less(capsys):
    _, out, _ = in_process(capsys, "plan", "--tokens", 64, "--features", 8, "--vocab", 64)
    assert "The naive head holds less here" in out
    assert out.count(" 0.000197") == 2  # three products of 2 * 64 * 8 * 64, where stream has four


def test_a_mesh_that_cannot_share_is_refused_before_it_is_made(capsys, monkeypatch):
    monkeypatch.setattr("xentlab.mesh.make_mesh", lambda axes: pytest.fail("so many devices take minutes"))
    code, _, err = in_process(capsys, "plan", "--tokens", 8, "--features", 4, "--vocab", 8, "--mesh", "data=100000")
    assert (code, "8 tokens cannot lie evenly on 100000 devices" in err) == (2, True)


def test_list_names_every_loss_and_needs_no_heavy_import():
    done = process("list")
    assert done.returncode == 0
    assert all(f"\n{name} " in "\n" + done.stdout for name in LOSSES)
    for code, heavy in (
        ("import xentlab.cli; xentlab.cli.main(['list'])", "altair pandas orbax optax"),
        ("import xentlab", "altair pandas orbax tyro"),
    ):
        code += f"; import sys; print([name for name in {heavy.split()} if name in sys.modules])"
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert said.splitlines()[-1] == "[]"


def test_gradients_print_csv_and_nothing_else():
    done = process("gradients", "--losses", "nll", "brier", "hinge", "mse_logits", "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    frame = pd.read_csv(io.StringIO(done.stdout)).set_index(["loss", "p"])
    for p, pull in ((0.9, 0.1), (0.1, 0.9), (0.01, 0.99)):
        assert -frame.dvalue_dlogit["nll", p] == pytest.approx(pull, rel=1e-12)
    assert frame.dvalue_dlogit["brier", 1e-6] / frame.dvalue_dlogit["brier", 1e-9] == pytest.approx(1000, rel=1e-4)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    code, out, _ = in_process(capsys, command, "--help")
    assert code == 0
    assert "Example: xentlab " + command in " ".join(out.replace("│", " ").split())


def test_it_says_its_version_and_its_packages(capsys):
    code, out, _ = in_process(capsys, "--version")
    assert code == 0
    assert out.splitlines()[:2] == [f"xentlab {metadata.version('xentlab')}", f"python {platform.python_version()}"]
    assert f"jax {jax.__version__}" in out.splitlines()


def test_no_command_shows_the_help(capsys):
    code, out, _ = in_process(capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("race --stps 3", "race has no option --stps; did you mean --steps?"),
        ("race --lr 3", "did you mean --learning-rates?"),
        ("race nll", "losses come after --losses: xentlab race --losses nll."),
        ("audit --losses nll brier", "audit takes losses as they are: xentlab audit nll brier."),
        ("race --bpe-vocab 900", "--bpe-vocab is a BPE's: give --tokenizer bpe"),
        ("race --checkpoint-every -5", "--checkpoint-every is a number of seconds"),
        ("race --anyway", "--anyway is for a folder that is there"),
        ("race --steps x", "Error parsing --steps"),
        ("show", "Missing from xentlab show"),
        ("rase --quick", "no command 'rase'; did you mean race"),
        ("show entmax", "did you mean entmax15"),
        ("show mine.py", "as in mine.py:FUNCTION"),
        ("show mine.py:nothing", "no function 'nothing'"),
        ("gradients --losses", "no losses given"),
        ("gradients --losses mine.py:averaged", "leave the mean to the lab"),
        ("gradients --probabilities 2", "strictly between 0 and 1"),
        ("gradients --out mine.py", "cannot make the folder"),
        ("budget none.npz", "no file none.npz"),
        ("race --text none.txt", "no file or folder none.txt"),
        ("race --text mine.py", "too few to train"),
        ("race --markov 5 --text mine.py", "exclude each other"),
        ("race --model mpl", "did you mean mlp"),
        ("race --order 3", "--order is a Markov chain's: give --markov"),
        ("race --markov 8 --bpe-vocab 300", "--bpe-vocab is a text's: leave --markov out"),
        ("race --optimizer adan", "did you mean adam"),
        ("race --seeds 1 1", "repeat"),
        ("race --losses nll brier nll", "each loss is named once; nll repeats"),
        ("audit nll nll", "each loss is named once; nll repeats"),
        ("race --markov 8 --seed -1", "a seed is a whole number from 0"),
        ("race --markov 8 --seed 99999999999999999999", "a seed is a whole number from 0"),
        ("race --model mlp(width=-3)", "mlp's width is a whole number from 1 on; got -3"),
        ("race --optimizer sgd(momentum='x')", "the optimizer sgd(momentum='x') fails: "),
        ("show exits.py:f", "exits.py fails to import: SystemExit: 0"),
        ("report --losses fokal", "did you mean focal"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(mine, capsys, line, message):
    code, out, err = in_process(capsys, *line.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert "Traceback" not in err


def test_show_tells_facts_and_place(mine, capsys):
    code, out, _ = in_process(capsys, "show", "tsallis(alpha=2)")
    assert code == 0
    assert "Gneiting" in out
    assert "squared.py:" in out
    assert "alpha=2" in out
    facts = json.loads(in_process(capsys, "show", "focal", "--format", "json")[1])[0]
    assert (facts["family"], facts["proper"], facts["convex"]) == ("robust", "no", False)
    code = "import functools\nfrom mine import my_loss\nloss = functools.partial(lambda a, z, y: a * my_loss(z, y), 2.0)"
    pathlib.Path("first.py").write_text(code)
    assert json.loads(in_process(capsys, "show", "first.py:loss", "--format", "json")[1])[0]["settings"] == "a=2.0"
    pathlib.Path("open.py").write_text("from mine import my_loss\ndef loss(z, y, *, a=1, **more): return my_loss(z, y)")
    for name, settings in (("open.py:loss", "a=1"), ("open.py:loss(b=3)", "a=1, b=3")):
        assert json.loads(in_process(capsys, "show", name, "--format", "json")[1])[0]["settings"] == settings
    own = in_process(capsys, "show", "./mine.py:my_loss")[1]
    assert "mine.py:3" in own
    assert "default settings" not in in_process(capsys, "show", "./mine.py:scaled(by=2.0)")[1]  # none were declared
    assert "default settings" in in_process(capsys, "show", "focal(gamma=3)")[1]
    assert "xentlab_user" not in own  # a module's name that is nobody's business


def test_list_formats_agree(capsys):
    rows = json.loads(in_process(capsys, "list", "--format", "json")[1])
    frame = pd.read_csv(io.StringIO(in_process(capsys, "list", "--format", "csv")[1]))
    assert [row["loss"] for row in rows] == list(frame.loss) == list(LOSSES)
    assert {row["loss"]: row["low_p_even"] for row in rows}["exponential"] == "inf"


def test_a_loss_of_ones_own_through_gradients_budget_and_race(mine, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "batch.npz", logits=rng.standard_normal((50, 7)), targets=rng.integers(0, 7, 50))
    losses = ("--losses", "nll", "./mine.py:my_loss")
    tiny = ("--markov", 6, "--model", "bigram", "--steps", 10, "--learning-rates", 0.1)
    for command in (
        ("gradients", *losses),
        ("budget", "batch.npz", *losses),
        ("race", *losses, *tiny, "--seeds", 2, "--seed", 5),
    ):
        folder = tmp_path / "made" / command[0]
        code, out, err = in_process(capsys, *command, "--format", "json", "--out", folder)
        assert code == 0, err
        rows = json.loads(out)
        by_loss = {name: [row for row in rows if row["loss"] == name] for name in ("nll", "my_loss")}
        assert len(by_loss["nll"]) == len(by_loss["my_loss"]) > 0
        for ours, theirs in zip(by_loss["nll"], by_loss["my_loss"], strict=True):
            for key, value in ours.items():
                if isinstance(value, float):
                    assert theirs[key] == pytest.approx(value, rel=1e-4, abs=1e-9)
        record = json.loads((folder / "run.json").read_text())
        name = f"{tmp_path}/mine.py:my_loss"  # to be found from any folder
        assert record["arguments"]["losses"] == ["nll", name]
        assert record["losses"][name].pop("program")
        assert record["losses"] == {name: {"file": "mine.py", "sha256": sha256(MINE.encode()).hexdigest()}}
    made = {path.parent.name: {each.name for each in path.parent.iterdir()} for path in tmp_path.glob("made/*/run.json")}
    assert made == {
        "gradients": {"profiles.csv", "profiles.png", "run.json", ".lock"},
        "budget": {"budgets.csv", "budgets.png", "run.json", ".lock"},
        "race": {
            *("curves.csv", "curves.png", "table.csv", "tests.csv", "pairs.csv", "run.json", ".lock"),
            *("reliability.csv", "frequency.csv", "predictions.png"),
        },
    }
    assert record["sources"][0]["kind"] == "markov"
    assert list(pd.read_csv(folder / "tests.csv").seed) == [5, 6] * 2


def test_a_command_writes_into_its_own_folder_again(tmp_path, capsys):
    for _ in range(2):
        assert in_process(capsys, "gradients", "--losses", "nll", "--quick", "--out", "again")[0] == 0


def test_race_on_a_text_writes_its_folder(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 100)
    code, out, err = in_process(capsys, "race", "--losses", "nll", "--text", "book.txt", "--quick", "--out", "r")
    assert code == 0
    assert "Wrote r." in err
    assert "nll" in out
    curves, table = (pd.read_csv(tmp_path / "r" / f"{name}.csv") for name in ("curves", "table"))
    assert set(curves.seed) == {0, 1}
    assert table.bits_per_byte.notna().all()
    assert len(json.loads((tmp_path / "r" / "run.json").read_text())["sources"][0]["sha256"]) == 64


def piped(command):
    line = f"set -o pipefail; {sys.executable} -m xentlab {command}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)


def test_a_closed_pipe_is_no_traceback():
    done = piped("gradients --losses nll --format csv | head -1")
    assert done.stdout.startswith("loss,rivals")
    assert (done.stderr, done.returncode) == ("", 0)


@pytest.mark.parametrize("line", ["list", "list --format csv", "race --help"])
def test_an_output_that_fails_is_one_line_and_one_that_is_closed_none(line):
    for where in ("| true", ">&-"):
        done = piped(f"{line} {where}")
        assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    done = piped(f"{line} >/dev/full")
    assert done.stderr.startswith("xentlab: cannot write the output: No space left on device.")
    assert (done.stderr.count("\n"), done.returncode) == (1, 1)
    done = piped(f"{line}x 2>&-")  # what is said of a mistake goes nowhere, and not into the output
    assert (done.stdout, done.returncode) == ("", 2)


def test_a_bar_moves_on_a_terminal_and_elsewhere_each_loss_is_a_line():
    arguments = ["race", "--losses", "nll", "brier", "--markov", "5", "--model", "bigram", "--quick"]
    logged = process(*arguments, "--format", "csv")
    assert logged.stderr == "xentlab: nll\nxentlab: brier\n"
    assert logged.stdout.startswith("source,loss")
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "xentlab", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=child,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    ) as running:
        os.close(child)
        said = b""
        while True:
            try:
                said += os.read(parent, 4096)
            except OSError:  # the terminal's other end is gone
                break
        assert running.wait(120) == 0
    os.close(parent)
    assert b"nll" in said
    assert b"20/20" in said


@pytest.mark.parametrize("width", [30, 60, 80, 100, 300])
def test_no_number_is_cut_however_narrow_the_terminal(capsys, monkeypatch, width):
    numbers = [f"{n}.{n}8765 ± 0.00{n}" for n in range(1, 8)]
    rows = [{"loss": f"loss_of_some_length_{i}", "said": "as it is"} | {f"no {n}": n for n in numbers} for i in range(3)]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(rows)
    lines = re.sub("\x1b.*?m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= width
    said = "\n".join(lines)
    assert "…" not in said
    for each in [*numbers, "as it is", "loss_of_some_length_"]:
        assert said.count(each) >= 3 or (width == 30 and each not in numbers)
    upright = [line for line in lines if line.startswith("no 1.1")]
    assert bool(upright) == (width < 200)
    assert len(upright) in {30: [3], 60: [3, 2], 80: [2, 1], 100: [1]}.get(width, [0])


def test_where_the_widest_column_can_give_way_a_table_stays_one(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table([{"loss": "nll", "note": "of so many words that they fill two lines", "n": 0.123456}])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "0.123456" in lines[1]


def test_open_finds_the_page(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main(["open", "--print"])
    assert "no run with a page under runs/" in capsys.readouterr().err
    for name, page in (("old", "report.html"), ("new", "tour.html")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / page).write_text("<p>")
        os.utime(tmp_path / "runs" / name / page, (1e9 + len(name) * (name == "new"),) * 2)
    for arguments, found in ((["open", "--print"], "new/tour.html"), (["open", "runs/old", "--print"], "old/report.html")):
        main(arguments)
        assert capsys.readouterr().out.strip().endswith(found)
    shown = []
    monkeypatch.setattr("webbrowser.open", lambda url: shown.append(url) or True)
    main(["open", "runs/old"])
    assert shown == [(tmp_path / "runs" / "old" / "report.html").as_uri()]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main(["open", "empty"])
    assert "has no page" in capsys.readouterr().err


def test_what_was_used_last_of_the_compiled_stays(tmp_path):
    for age, (name, size) in enumerate({"new": 40, "read": 40, "old": 40, "empty": 0, "older": 40}.items()):
        kept = tmp_path / f"{name}-cache"
        kept.write_bytes(bytes(size))
        used = 2e9 - 100 * age  # seconds
        os.utime(kept, (2e9, used) if name == "read" else (used, used))
    for _ in range(2):
        tidy(tmp_path, limit=100)
        assert {path.name for path in tmp_path.iterdir()} == {"new-cache", "read-cache"}


def test_what_jax_did_not_write_is_left_alone(tmp_path, monkeypatch):
    for name, size in {"notes": 0, "results.csv": 400, "pip-cache": 0, "compiled/mine": 0, "compiled/old-cache": 0}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    monkeypatch.setenv("XENTLAB_CACHE", str(tmp_path))
    tidy(cache_folder(), limit=0)
    assert {path.name for path in tmp_path.iterdir()} == {"notes", "results.csv", "pip-cache", "compiled"}
    assert [path.name for path in (tmp_path / "compiled").iterdir()] == ["mine"]


def test_the_cache_is_turned_on_and_off_and_moved_by_words(monkeypatch):
    said = {}
    for word in ("", "1", "on", "TRUE", "yes", "0", "Off", "elsewhere"):
        monkeypatch.setenv("XENTLAB_CACHE", word)
        said[word] = cache_folder()
    usual = said[""]
    assert usual.name == "compiled"
    assert [said[word] for word in ("1", "on", "TRUE", "yes")] == [usual] * 4
    assert (said["0"], said["Off"], said["elsewhere"]) == (None, None, pathlib.Path("elsewhere/compiled"))


def test_where_jax_keeps_its_programs_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XENTLAB_CACHE", str(tmp_path / "ours"))
    before, own = jax.config.jax_compilation_cache_dir, str(tmp_path / "own")
    try:
        jax.config.update("jax_compilation_cache_dir", own)
        assert keep_compiled() is None
        assert jax.config.jax_compilation_cache_dir == own
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_half_a_program_in_the_cache_is_compiled_again_without_a_word(tmp_path):
    line = ("gradients", "--losses", "mae", "--format", "csv")
    first = process(*line, env=os.environ | {"XENTLAB_CACHE": str(tmp_path)})
    for path in (tmp_path / "compiled").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    again = process(*line, env=os.environ | {"XENTLAB_CACHE": str(tmp_path)})
    assert (again.stdout, again.stderr, again.returncode) == (first.stdout, "", 0)


def test_api_pages_hold_every_module(tmp_path):
    subprocess.run([sys.executable, "-m", "xentlab", "api", "--out", tmp_path / "api"], check=True)
    made = {path.stem for path in (tmp_path / "api").rglob("*.html")}
    assert {"xentlab", "gradients", "audit", "station", "likelihood", "race"} <= made
    assert "brier" in (tmp_path / "api" / "xentlab" / "losses" / "squared.html").read_text()


def test_what_was_compiled_is_kept_unless_it_is_turned_off(tmp_path):
    def run(*arguments, **environment):
        command = [
            sys.executable,
            "-m",
            "xentlab",
            "gradients",
            "--losses",
            "mae",
            "--quick",
            "--format",
            "csv",
            *arguments,
        ]
        environment = os.environ | {"JAX_LOG_COMPILES": "1", "JAX_EXPLAIN_CACHE_MISSES": "1"} | environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return (
            done.stdout,
            done.stderr.count("Persistent compilation cache hit"),
            done.stderr.count("to persistent compilation cache"),
        )

    place = tmp_path / "compiled"
    first, _, misses = run(XENTLAB_CACHE=str(tmp_path))
    made = {path.name for path in place.iterdir()}
    assert made
    assert all(name.endswith(JAXS_OWN) for name in made)
    assert misses
    again, hits, misses = run(XENTLAB_CACHE=str(tmp_path))
    assert again == first
    assert hits
    assert misses == 0
    assert {path.name for path in place.iterdir()} == made
    for switch in (run("--no-cache", XENTLAB_CACHE=str(tmp_path / "none")), run(XENTLAB_CACHE="off", HOME=str(tmp_path))):
        assert switch == (first, 0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["compiled"]
