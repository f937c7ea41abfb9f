"""The four doors against published figures, closed forms and their own theory."""

import contextlib
import functools
import io
import json
import math
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from xentlab import LOSSES, LabError, at_target, console, resolve
from xentlab.audit import Audit
from xentlab.audit.numerics import numerics
from xentlab.audit.probe import make_probe
from xentlab.cli import main
from xentlab.scoreboard import Scoreboard, code_lengths, scoreboard
from xentlab.scoreboard.efficiency import CONSISTENT, efficiency, make_truth, simulate, tokens_needed
from xentlab.scoreboard.escape import BIAS, CHAIN, FREQUENT, escape_time, wrong_start
from xentlab.scoreboard.reading import sentences
from xentlab.sources import MarkovSource, Text
from xentlab.stages import standard_stages

TRAINS = True
COMPILED_WELL = True
TRUTH = make_truth()


@functools.cache
def judged(name):
    return efficiency(LOSSES[name], TRUTH)


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


# Reference values, from a sketch independent of this code: softmax-linear, 16 classes, 6 normal features and a bias,
# over three draws of the weights; two hundredths are left for other draws and features.
REFERENCE = {
    ("tsallis", 0.3): (1.06, 1.06),
    ("tsallis", 0.7): (1.16, 1.19),
    ("tsallis", 1.0): (1.21, 1.24),
    ("brier", 0.3): (1.24, 1.29),
    ("brier", 0.7): (1.58, 1.72),
    ("spherical", 0.7): (1.60, 1.71),
    ("exponential", 0.3): (1.09, 1.09),
    ("exponential", 0.7): (1.39, 1.50),
    ("exponential", 1.0): (1.75, 2.02),
}


@pytest.mark.parametrize(("name", "scale"), list(REFERENCE))
def test_tokens_needed_equal_the_reference(name, scale):
    low, high = REFERENCE[name, scale]
    assert low - 0.02 <= efficiency(LOSSES[name], make_truth(scale)).tokens_needed <= high + 0.02


def test_maximum_likelihood_needs_one_and_nothing_needs_less():
    """Cramer-Rao: nll is exactly 1, its excess rank / 2; every consistent loss of the catalogue lies above."""
    nll = judged("nll")
    assert nll.tokens_needed == pytest.approx(1, abs=1e-9)
    assert nll.excess == pytest.approx(7 * 15 / 2)
    for name in ("logit_adjusted", "unlikelihood", "generalized_cross_entropy"):
        assert judged(name).tokens_needed >= 1 - 1e-6
    # It pulls logsumexp to 0 a little: a bias of 1e-8 nats, and so a hair less variance than the bound.
    assert judged("z_loss").tokens_needed == pytest.approx(1, abs=1e-3)


def test_twice_a_loss_needs_as_much_and_a_mixture_lies_between():
    twice = efficiency(lambda z, y: 2 * LOSSES["brier"](z, y), TRUTH).tokens_needed
    brier = judged("brier").tokens_needed
    mixed = efficiency(lambda z, y: LOSSES["brier"](z, y) + LOSSES["nll"](z, y), TRUTH).tokens_needed
    assert twice == pytest.approx(brier, rel=1e-6)
    assert 1 < mixed < brier


def test_a_loss_that_is_not_proper_has_a_bias_instead():
    for name in ("label_smoothing", "focal", "hinge", "mse_logits"):
        found = judged(name)
        assert found.bias > CONSISTENT
        assert math.isnan(found.tokens_needed)


def test_a_loss_that_teaches_nothing_or_is_no_number_has_no_number():
    """It stays where the search began, which is the truth: that is no consistency, and needs no fewer tokens than any."""
    nothing = lambda logits, targets: (jnp.argmax(logits, axis=-1) != targets).astype(logits.dtype)
    no_number = lambda logits, targets: jnp.sqrt(at_target(jax.nn.log_softmax(logits), targets))
    for loss in (nothing, no_number):
        found = efficiency(loss, make_truth(points=64))
        assert np.isnan([found.bias, found.tokens_needed, found.excess]).all()


def test_a_truth_that_is_a_maximum_or_a_saddle_is_no_minimiser():
    """There the gradient is 0, and the curvature has full rank: its sign tells."""
    maximum = lambda logits, targets: -LOSSES["nll"](logits, targets)
    turned = lambda logits, targets: LOSSES["nll"](
        logits.at[..., 0].set(2 * jax.lax.stop_gradient(logits[..., 0]) - logits[..., 0]), targets
    )
    for loss in (maximum, turned):
        found = efficiency(loss, make_truth(points=64))
        assert np.isnan([found.bias, found.tokens_needed, found.excess]).all()


def test_a_field_whose_derivative_is_not_symmetric_still_has_a_minimum():
    """Twice the pull in one class: descent ends at the truth as before, and the sandwich is nll's own."""

    def bent(logits, targets):
        once = logits[..., :1]
        return LOSSES["nll"](jnp.concatenate([20 * once - jax.lax.stop_gradient(19 * once), logits[..., 1:]], -1), targets)

    found = efficiency(bent, make_truth(points=64))
    assert found.bias == 0
    assert found.tokens_needed == pytest.approx(1)


def test_a_stop_gradient_is_judged_by_its_field():
    """mixce(.5) has half the gradient of poly1(1), whatever its value says."""
    assert judged("mixce").bias == pytest.approx(judged("poly1").bias, rel=1e-6)


def test_the_bias_of_label_smoothing_by_an_independent_solver():
    """Its minimiser is maximum likelihood for the smoothed law: solved here by another method, from another start."""
    from scipy.optimize import minimize

    target = 0.9 * TRUTH.law + 0.1 / 16

    def risk(flat):
        z = TRUTH.features @ flat.reshape(TRUTH.weights.shape)
        log_q = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        slope = TRUTH.features.T @ (np.exp(log_q) - target) / len(z)
        return -(target * log_q).sum(1).mean(), slope.reshape(-1)

    found = minimize(risk, np.zeros(TRUTH.weights.size), jac=True, method="BFGS", options={"gtol": 1e-8})
    z = TRUTH.features @ found.x.reshape(TRUTH.weights.shape)
    log_q = z - np.log(np.exp(z).sum(1, keepdims=True))
    by_hand = (TRUTH.law * (np.log(TRUTH.law) - log_q)).sum(1).mean()
    assert judged("label_smoothing").bias == pytest.approx(by_hand, rel=1e-4)


def test_where_it_helps_the_uniform_is_mixed_in():
    """A sparse loss calls impossible what can happen; nll's minimiser is the truth."""
    small = make_truth(points=64)
    assert efficiency(LOSSES["sparsemax"], small).smoothing > 0
    assert efficiency(LOSSES["nll"], small).smoothing == 0


def test_a_seed_is_a_sample_of_its_own():
    fit = lambda seed: simulate(LOSSES["nll"], TRUTH, TRUTH.weights, sizes=(4000,), replicates=1, seed=seed).excess_kl[0]
    once, again, other = map(fit, (0, 0, 1))
    assert once == again != other
    assert len(TRUTH.features) == 1024  # as many as the figures were found with


@pytest.fixture(scope="module")
def maximum_likelihood():
    return simulate(LOSSES["nll"], TRUTH, TRUTH.weights, replicates=12)


@pytest.mark.parametrize("name", ["nll", "brier"])
def test_fits_to_samples_bear_the_theory_out(name, maximum_likelihood):
    """The experiment sample_efficiency does this at its full size; here the interval is wider, and covers too."""
    found = judged(name)
    trials = simulate(LOSSES[name], TRUTH, found.weights, replicates=12) if name != "nll" else maximum_likelihood
    assert (trials.residual < 1e-5).all()
    _, low, high = tokens_needed(trials, found.excess if name == "nll" else maximum_likelihood)
    assert low < found.tokens_needed < high
    assert high - low < 0.6


def test_the_slope_is_told_from_the_next_order():
    """KL = a/n + b/n^2 exactly: the slope is a, whatever b."""
    made = lambda a, b: pd.DataFrame(
        [{"tokens": n, "replicate": r, "excess_kl": a / n + b / n**2} for n in (1000, 4000) for r in range(3)]
    )
    assert tokens_needed(made(150.0, 9e4), made(50.0, -3e4)) == pytest.approx((3, 3, 3))
    assert tokens_needed(made(150.0, 9e4), 50.0) == pytest.approx((3, 3, 3))


ESCAPE = {
    "nll": (2.86, 5.99, 9.0, 13.0),
    "brier": (3.87, 41.5, 752, 40_700),
    "generalized_cross_entropy": (7.3, 51, 390.5, 6357),
    "focal": (3.1, 5.8, 8.8, 12.8),
}


@pytest.mark.parametrize("name", list(ESCAPE))
def test_escape_times_equal_the_reference(name):
    assert escape_time(LOSSES[name], [2, 5, 8, 12]) == pytest.approx(ESCAPE[name], rel=0.01)


def test_escape_time_in_closed_form():
    margins = np.array([0.5, 3.0, 20.0])
    np.testing.assert_allclose(escape_time(LOSSES["nll"], margins), margins + 1 - np.exp(-margins), rtol=1e-9)
    np.testing.assert_allclose(escape_time(LOSSES["hinge"], margins), margins, rtol=1e-9)
    assert escape_time(lambda z, y: -LOSSES["nll"](z, y), [1.0])[0] == np.inf
    with pytest.raises(LabError, match="positive"):
        escape_time(LOSSES["nll"], [0.0])


def test_the_chain_of_the_wrong_start_has_a_goal_that_all_can_reach():
    assert (CHAIN.table.max(axis=1) > 0.5).all()


def test_no_best_rate_lies_at_the_end_of_its_grid():
    for name in ("nll", "hinge", "mse_logits", "focal"):
        found = wrong_start(LOSSES[name])
        assert found.low < found.rate < found.high
        assert found.steps < 300


def test_a_pull_that_vanishes_leaves_no_way_out_and_from_zero_there_is_one():
    stuck = wrong_start(LOSSES["brier"])
    assert math.isinf(stuck.steps)
    assert stuck.high >= 1e6
    assert wrong_start(LOSSES["brier"], bias=0.0).steps < 100


def test_the_wrong_start_is_confident_and_wrong():
    frequent = np.sort(CHAIN.stationary @ CHAIN.table)[-FREQUENT:].sum()
    assert frequent > 0.4
    assert float(jax.nn.softmax(jnp.array([0.0, BIAS]))[1]) < 1e-8


def test_of_rates_that_are_as_quick_the_least_counts(monkeypatch):
    monkeypatch.setattr("xentlab.scoreboard.escape.settled", lambda reached: np.array([9.0, 3, 3, 3, 9]))
    monkeypatch.setattr("xentlab.scoreboard.escape.ROUNDS", 0)
    found = wrong_start(LOSSES["nll"], steps=2)
    assert (found.steps, found.rate) == (3, pytest.approx(10**-0.5))


def test_a_multiple_of_a_loss_takes_as_many_steps():
    """Its best rate lies elsewhere between two of the grid's: by these alone nll took 8, 18, 13 or 11."""
    taken = [wrong_start(lambda z, y, c=c: c * LOSSES["nll"](z, y), steps=100).steps for c in (1, 1.5, 2, 2.5)]
    assert max(taken) <= min(taken) + 1


def test_even_logits_are_a_guess_and_no_way_out():
    assert wrong_start(lambda z, y: 0 * z.sum(axis=-1), bias=0.0, steps=20).steps == np.inf


def test_a_multiple_of_a_loss_has_the_same_error():
    """Relative to 1 at least, what is small would be exact. Float16's range a multiple may leave, an error of its own."""
    multiple = lambda c: lambda z, y: c * LOSSES["nll"](z, y)
    errors = [numerics(make_probe(multiple(c)))["max_error"].value for c in (2.0**-13, 1, 2.0**13)]
    for dtype in ("float32", "bfloat16"):
        for part in ("value", "gradient"):
            assert max(each[dtype][part] for each in errors) < 3 * min(each[dtype][part] for each in errors)


def test_a_loss_without_a_slope_has_no_error_by_a_division_of_nothing():
    flat = numerics(make_probe(lambda z, y: jnp.ones_like(z[..., 0])))["max_error"].value
    assert flat == {dtype: {"value": 0, "gradient": 0} for dtype in flat}


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
