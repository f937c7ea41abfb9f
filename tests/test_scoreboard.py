"""The board as a whole: what the command writes, a row a loss, texts coded and read back, and the sentences on it."""

import contextlib
import io
import json
import math
from types import MappingProxyType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from scripts import in_process

from xentlab import LabError, console, resolve
from xentlab.audit import Audit
from xentlab.cli import main
from xentlab.scoreboard import Scoreboard, code_lengths, scoreboard
from xentlab.scoreboard.reading import sentences
from xentlab.sources import MarkovSource, Text
from xentlab.stages import standard_stages

TRAINS = True


@pytest.fixture(scope="module")
def commanded(tmp_path_factory):
    """A scoreboard as the command makes it: what it found, what it printed, and its folder."""
    folder, found, real = tmp_path_factory.mktemp("board") / "s", [], scoreboard
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr("xentlab.scoreboard.scoreboard", lambda *given: found.append(real(*given)) or found[0])
        main(["scoreboard", "--losses", "nll", "brier", "hinge", "--quick", "--out", str(folder), "--format", "json"])
    return found[0], said.getvalue(), folder


@pytest.fixture(scope="module")
def board(commanded) -> Scoreboard:
    return commanded[0]


def test_the_command_prints_data_and_writes_its_folder(commanded):
    _, said, folder = commanded
    rows = json.loads(said)
    assert [row["loss"] for row in rows] == ["nll", "brier", "hinge"]
    assert rows[0]["tokens_needed"] == pytest.approx(1)
    assert rows[2]["tokens_needed"] is None
    coded = {f"{source}-{row['loss']}.coded" for source in ("text", "markov") for row in rows}
    assert {path.name for path in folder.iterdir()} == {".lock", "scoreboard.csv", "codes.csv", "run.json"} | coded


def test_one_that_is_stopped_leaves_the_folder_as_it_was(commanded, capsys, monkeypatch):
    def stopped(losses, races, seed, replicates, folder, tell):
        (folder / "text-nll.coded").write_bytes(b"of another seed")
        raise KeyboardInterrupt

    folder = commanded[2]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr("xentlab.scoreboard.scoreboard", stopped)
    monkeypatch.setattr("xentlab.stages.run_stage", lambda *_: None)
    code, _, _ = in_process(capsys, "scoreboard", "--quick", "--out", folder)
    assert code == 130
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_loss_is_a_row_and_every_door_a_number(board):
    table = board.table.set_index("loss")
    assert list(table.index) == list(board.audits) == ["nll", "brier", "hinge"]
    assert table.tokens_needed["brier"] > table.tokens_needed["nll"] == pytest.approx(1)
    assert table.bias["hinge"] > 0.1
    assert (table[[f"error_{dtype}" for dtype in ("float32", "bfloat16", "float16")]] > 0).all(axis=None)
    assert table.low_p_order["brier"] == pytest.approx(1)
    assert table.escape_steps["nll"] < table.escape_steps["hinge"] < table.escape_steps["brier"] == np.inf


def test_a_row_keeps_the_range_over_the_draws_and_the_first_draw_s_theory(monkeypatch):
    needed, seeds = iter([3.0, 1.0, 8.0]), []
    stub = lambda loss, truth: SimpleNamespace(bias=0.0, tokens_needed=next(needed))
    monkeypatch.setattr("xentlab.scoreboard.efficiency", stub)
    escape = SimpleNamespace(steps=9.0, rate=2.0, low=0.1, high=1e6)
    monkeypatch.setattr("xentlab.scoreboard.wrong_start", lambda loss: escape)
    nothing = Audit("nll", MappingProxyType({}))
    monkeypatch.setattr("xentlab.scoreboard.audit", lambda loss, seed=0: seeds.append(seed) or nothing)
    monkeypatch.setattr("xentlab.scoreboard._from_audit", lambda found: {})
    row = scoreboard(["nll"], seed=7).table.iloc[0]
    assert seeds == [7]
    assert (row.tokens_needed_low, row.tokens_needed, row.tokens_needed_high, row.theory) == (1, 4, 8, 3)
    assert (row.escape_steps, row.escape_rate, row.escape_tried) == (9, 2, 1e6)


def test_coded_bits_are_the_model_s_cross_entropy(board):
    codes = board.codes
    assert len(codes) == 6
    known = codes[codes.floor_bits_per_token.notna()]
    assert set(known.source) == {"markov"}
    # Two thousand tokens of a draw stray from the rate by a few hundredths.
    assert (known.bits_per_token > known.floor_bits_per_token - 0.1).all()
    finite = codes[np.isfinite(codes.model_bits)]
    assert ((finite.bits - finite.model_bits).abs() < 0.002 * finite.bits + 64).all()


def test_a_loss_that_coded_nothing_still_has_its_row(board, capsys):
    for gone in ("nll", "hinge"):
        rows = console.scoreboard_rows(board.table, board.codes[board.codes.loss != gone])
        assert len({tuple(row) for row in rows}) == 1
        assert [row["bits, markov"] == "–" for row in rows] == [row["loss"] == gone for row in rows]
        console.print_table(rows)
    assert console.scoreboard_rows(board.table.assign(bias=np.nan), board.codes)[0]["bias"] == "–"
    assert "bits, markov" in capsys.readouterr().out


def test_bits_are_per_token_and_per_byte_of_the_text():
    """A uniform guess of four takes two bits a token, and of two bytes each one bit a byte."""
    source = SimpleNamespace(name="s", vocab=4, order=0, token_bytes=np.full(4, 2), describe=dict)
    source.split = lambda part: np.arange(2000) % 4
    [row] = code_lengths({"uniform": lambda tokens: jnp.full((*tokens.shape, 4), 0.25)}, source).itertuples()
    assert row.model_bits_per_token == pytest.approx(2, rel=1e-3)
    assert row.bits_per_token == pytest.approx(2, rel=0.1)
    assert row.bits_per_byte == row.bits_per_token / 2


def test_a_text_that_does_not_come_back_is_an_error(monkeypatch):
    source = MarkovSource(vocab=4, tokens=2000)
    uniform = lambda tokens: jnp.full((*tokens.shape, 4), 0.25)
    assert code_lengths({"uniform": uniform}, source).bits_per_token[0] == pytest.approx(2, abs=0.35)
    monkeypatch.setattr("xentlab.scoreboard.decode", lambda predict, file: np.zeros(200, np.int32))
    with pytest.raises(LabError, match="did not come back"):
        code_lengths({"uniform": uniform}, source)


def test_two_sources_have_two_names(tmp_path):
    (tmp_path / "markov").write_text("some text or other " * 100)
    assert [stage.source.name for stage in standard_stages(Text(tmp_path / "markov"), quick=True)] == ["markov", "markov chain"]


def test_the_reading_follows_the_table(board):
    said = " ".join(sentences(board.table, board.codes))
    assert "brier" in said
    assert "cross entropy alone keeps its pull does not hold: hinge keeps it too" in said
    assert "What cross entropy alone on this board combines" in said
    other = board.table.assign(low_p_even=[1.0, 1.0, 0.0], low_p_one=[1.0, 1.0, 0.0])
    assert "does not hold: brier keeps it too" in " ".join(sentences(other, board.codes))
    turned = board.table.assign(low_p_even=0.0, low_p_one=0.0, convex=False)
    said = " ".join(sentences(turned, board.codes))
    assert "alone keeps" not in said
    assert "No loss on this board" in said


def test_a_loss_of_one_s_own_comes_through(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import jax\nfrom xentlab import at_target\n"
        "def cubic(logits, targets):\n    return (1 - at_target(jax.nn.softmax(logits), targets)) ** 3\n"
    )
    row = scoreboard(["./mine.py:cubic"]).table.iloc[0]
    assert row.bias > 0.01
    assert math.isinf(row.escape_steps)
    assert resolve("./mine.py:cubic").__name__ == "cubic"
