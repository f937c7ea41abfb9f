"""Every experiment: its stations hold, its numbers are right at a small size too, and the walk's page in a real browser."""

import json
import math
import os
import subprocess
import sys

import altair as alt
import numpy as np
import pandas as pd
import pytest
from browser import cut_on_paper, luminance
from scripts import documents

from xentlab import LabError, cli
from xentlab.gradients import gradient_profile
from xentlab.tour import Check, Figure, Slider
from xentlab.tour.page import as_json, make_tour
from xentlab.tour.station import check_rows
from xentlab.tour.walk import experiments_folder, load, walk

TRAINS = True
FOLDER = experiments_folder()
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("bench_") and path.stem != "tour")
CLAIMS = range(1, 20)
EXAMPLES = ["-log(p)", "(1-p)^2", "-log(p) * (1-p)^2", "1/p - 1", "sqrt(1-p) + tanh(p)/2", "max(1-2*p, exp(-3*p)) + 2^-p", "3"]


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The walk at its quick sizes: the folder and what was run."""
    return make_tour(tmp_path_factory.mktemp("tour"), quick=True)


@pytest.fixture(scope="module")
def stations(tour):
    return {station.claim: station for each in tour[1] for station in each.stations}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_asks_one_question(path):
    text = path.read_text()
    assert text.splitlines()[0].endswith("?")
    assert len(text.splitlines()) < 80
    assert any(each in text for each in ("show(stations", "tyro.cli(", "main(["))  # --help tells its options


def test_the_notebook_runs_under_jupyter_and_shows_charts(tmp_path):
    import jupytext
    import nbclient

    notebook = jupytext.read(FOLDER / "tour.py")
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 4
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output.data.keys() for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/svg+xml" in kinds for kinds in shown) >= 5
    assert any("text/html" in kinds for kinds in shown)


def test_every_claim_has_its_station_in_order(tour):
    assert [station.claim for each in tour[1] for station in each.stations] == list(CLAIMS)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_station_holds_and_says_so(stations, claim):
    station = stations[claim]
    assert [row for row in check_rows([station]) if not row["pass"]] == []
    assert station.figures
    for text in (station.title, station.told, station.found, station.loose, *(figure.words for figure in station.figures)):
        assert len(text) > 5
        assert "nan" not in text.lower().replace("gradient of nan", "").split()


def test_the_four_doors_are_measured_again(stations):
    """What the documents say of them, where it is deterministic to three digits; bits, by a race, are test_readme.py's."""
    kept = {row["loss"]: row for row in json.loads(documents().RESULTS.read_text())["four_doors"]}
    found = stations[19].frames["four_doors"].set_index("loss")
    assert list(found.index) == ["nll", "brier"]
    for name, row in found.iterrows():
        assert row.tokens_needed == pytest.approx(kept[name]["tokens_needed"], rel=1e-3)
        assert row.gradient_error_bfloat16 == pytest.approx(kept[name]["gradient_error_bfloat16"], rel=0.3)
        assert row.escape_steps == pytest.approx(float(kept[name]["escape_steps"]), rel=0.1)


def test_a_station_has_its_tables_on_the_page(page, stations):
    doors, board = stations[19].tables.values()
    for place, table in ((-2, doors), (-1, board)):
        shown = page.locator("#claim-19 > .scroll table").nth(place)
        assert shown.locator("tbody tr").count() == len(table)
        assert shown.locator("thead th").all_inner_texts() == [name.replace("_", " ") for name in table.columns]
    assert f"{doors.bits_per_byte_low[0]:.6g}" in page.locator("#claim-19").inner_text()
    assert f"{board.gradient_error_bfloat16[0]:.6g}" in page.locator("#claim-19").inner_text()


def test_the_folder_has_the_numbers_as_json(tour):
    rows = json.loads((tour[0] / "tour.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert {row["claim"] for row in rows} == set(CLAIMS)
    assert all({"claim", "what", "expected", "measured", "tolerance", "pass"} <= row.keys() for row in rows)
    assert (tour[0] / "tour.html").stat().st_size < 6e6
    assert {f"claim-{claim}.png" for claim in CLAIMS if claim != 9} <= {path.name for path in tour[0].iterdir()}


def test_a_check_fails_where_it_should():
    assert not Check("off", 1.1, 1, 0.05).passed
    assert not Check("nan", math.nan, 1, 10).passed
    assert not Check("inf", math.inf, 1, 10).passed
    assert not Check("minus inf", -math.inf, math.inf, 10).passed
    assert not Check("nan at least", math.nan, 1, relation="at least").passed
    assert Check("inf at least", math.inf, 1, relation="at least").passed
    assert not Check("above", 2, 1, relation="at most").passed
    assert as_json([{"a": math.nan, "b": math.inf}]) == [{"a": None, "b": "∞"}]


def test_a_fit_that_could_not_fail_is_no_check():
    """Of two fits the interval, by Student's t, would hold whatever they gave: such a loss has its theory alone."""
    script, same = load(FOLDER / "sample_efficiency.py"), {"loss": ["nll", "brier"], "scale": 0.7, "draw": 0, "bias": 0.0}
    trial = {"simulated": [1.03, 2.06], "simulated_low": [0.9, -1.5], "simulated_high": [1.16, 5.62]}
    script.run = lambda *_, **__: pd.DataFrame(same | {"tokens_needed": [1.0, 1.67]} | trial)
    (station,) = script.stations()
    assert [each.what for each in station.checks if "by fits" in each.what] == ["nll: tokens needed, by fits"]
    assert station.found.endswith(
        "by theory: nll 1.00, brier 1.67. By fits to samples, with 95% interval: nll 1.03 (0.90 to 1.16)."
    )


def test_no_check_of_the_tour_holds_whatever_is_measured(stations):
    for station in stations.values():
        for check in station.checks:
            if check.relation == "equal" and math.isfinite(check.expected):
                assert check.tolerance <= 0.1 * max(1, abs(check.expected)), check


def test_a_slider_without_all_its_positions_is_refused():
    with pytest.raises(LabError, match="numbered 0, 1"):
        Slider("p", pd.DataFrame({"at": [0, 2], "p": [0.1, 0.2]}))
    with pytest.raises(LabError, match="start 5"):
        Slider("p", pd.DataFrame({"at": [0, 1], "p": [0.1, 0.2]}), 5)


def test_an_unknown_experiment_is_refused():
    with pytest.raises(LabError, match=r"no experiment 'averges'; there are averages"):
        walk(only=["averges"])


def test_a_claim_that_fails_is_told_and_ends_with_1(monkeypatch, capsys, tmp_path):
    """The command on a station whose number is wrong: no story, exit code 1."""
    from xentlab.tour import Station
    from xentlab.tour import walk as package_walk
    from xentlab.tour.walk import Walked

    chart = alt.Chart(pd.DataFrame({"x": [1]})).mark_point().encode(x="x:Q")
    wrong = Station(4, "A cliff", "told", "found", "loose", (Check("n", 9, 8),), (Figure((chart,), "words"),))
    monkeypatch.setattr("xentlab.tour.page.walk", lambda *_: [Walked("underflow", "Why?", "code", (wrong,), 0.1)])
    with pytest.raises(SystemExit) as end:
        cli.main(["tour", "--out", str(tmp_path / "t"), "--format", "json"])
    out = capsys.readouterr()
    assert end.value.code == 1
    assert json.loads(out.out)[0]["pass"] is False
    assert "claim 4: n is 9, not equal 8" in out.err
    assert "✗" in (tmp_path / "t" / "tour.html").read_text()
    assert package_walk


def test_low_probability_for_any_losses():
    frame = load(FOLDER / "low_probability.py").run(["nll", "brier", "mse_logits"])
    low = frame[frame.p < 1.1e-12].set_index(["loss", "rivals"])
    assert low.times_nll["nll", "even"] == 1
    assert low.times_nll["brier", "even"] < 1e-10
    assert low.times_nll["mse_logits", "even"] > 40
    assert low.times_nll["mse_logits", "one"] == pytest.approx(2)
    assert (low.dvalue_dp["nll"] * low.p["nll"]).tolist() == pytest.approx([-1, -1])


def test_every_name_is_there(stations):
    names = {check.what for check in stations[1].checks}
    assert {"nll", "optax", "log perplexity"} <= names
    if os.environ.get("CI"):
        assert "torch cross_entropy" in names, "CI installs the extra bench"


def test_new_loss():
    found = load(FOLDER / "new_loss.py").run(steps=20, seeds=2, rates=(0.1,))
    assert all({"nll", "cubic"} == set(frame.loss) for frame in found.values())
    cubic = found["profile"].set_index(["loss", "p"]).loc["cubic"]
    assert cubic.dvalue_dp[0.5] == pytest.approx(-3 * 0.5**2)


def test_wrong_start():
    """Linear for nll, exponential for brier: the growth of log(time) a unit of margin goes to 0, and to 1."""
    experiment = load(FOLDER / "wrong_start.py")
    flow = experiment.flow(["nll", "brier"], margins=(8, 9, 10, 11, 12)).set_index(["loss", "margin"])
    assert np.diff(flow.time["nll"]) == pytest.approx([1] * 4, abs=0.001)
    assert flow.exponent["brier", 12] == pytest.approx(1, abs=0.01)
    steps = experiment.run(["nll", "brier"], steps=500).set_index("loss").steps
    assert steps["nll"] < 50
    assert np.isinf(steps["brier"])


def test_huffman_on_halves():
    assert load(FOLDER / "questions.py").huffman([0.5, 0.25, 0.125, 0.125]) == [1, 2, 3, 3]


def test_a_script_runs_from_the_command_line(tmp_path):
    command = [sys.executable, FOLDER / "returns.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "1.14072" in done.stdout
    assert (tmp_path / "runs" / "returns" / "claim-6.png").stat().st_size > 5_000


@pytest.fixture(scope="module")
def html(tour):
    return tour[0] / "tour.html"


def move(page, figure, at):
    """Sets a figure's slider as a reader would, and waits for the table."""
    page.locator(f"#{figure}-slider").evaluate(
        "(input, at) => { input.value = at; input.dispatchEvent(new Event('input')); }", at
    )


def dots(page, chart):
    """Where the marks of a chart lie."""
    return page.evaluate(
        "id => [...document.querySelectorAll(`#${id} svg .mark-symbol.role-mark path, #${id} svg .mark-rect.role-mark path`)]"
        ".map(each => each.getAttribute('transform') + each.getAttribute('d'))",
        chart,
    )


# Each width and each scheme once: where things lie does not hang on colours.
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_the_page_fits_and_has_marks_and_no_serious_violation(opened, width, scheme):
    from axe_playwright_python.sync_playwright import Axe

    page = opened(width, scheme)
    charts = page.locator(".chart").evaluate_all("all => all.map(each => each.id)")
    assert len(charts) >= 25
    for chart in charts:
        assert page.evaluate(f"document.querySelectorAll('#{chart} svg [class*=mark-] path').length") >= 1, chart
        wide = lambda what, chart=chart: page.evaluate(
            f"document.querySelector('#{chart}{what}').getBoundingClientRect().width"
        )
        assert wide(" svg .background") > 0.45 * wide(""), chart  # a long title or label would squeeze the plot
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (luminance(page) < 200) == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = Axe().run(page).response["violations"]
    serious = [(each["id"], each["nodes"][0]["target"]) for each in found if each["impact"] in ("serious", "critical")]
    assert serious == []


@pytest.mark.parametrize("width", [390, 800])
def test_no_legend_is_cut_where_the_page_is_narrow(opened, width):
    page = opened(width)
    cut = """[...document.querySelectorAll('.chart svg .role-legend')].filter(legend => {
        const chart = legend.closest('.chart').getBoundingClientRect(), own = legend.getBoundingClientRect();
        return own.right > chart.right || own.left < chart.left;
    }).map(legend => legend.closest('.chart').id)"""
    assert page.locator(".chart svg .role-legend").count() >= 10
    assert page.evaluate(cut) == []


def test_sliders_move_marks_and_show_the_librarys_numbers(page, stations):
    sliders = [(f"claim-{c}-{i}", f) for c, s in stations.items() for i, f in enumerate(s.figures) if f.slider]
    assert len(sliders) >= 9
    for key, figure in sliders:
        frame = figure.slider.positions
        last, before = int(frame["at"].max()), None
        for at in (1, last // 2 + 1, last):
            move(page, key, at)
            shown = page.evaluate(
                f"[...document.querySelectorAll('#{key} td, #{key} tbody th')].map(e => Number(e.dataset.value))"
            )
            rows = frame[frame["at"] == at].drop(columns="at").select_dtypes("number").to_numpy().ravel()
            for number in rows[np.isfinite(rows)]:
                near = np.isclose(shown, number, rtol=1e-6, atol=1e-300)
                assert near.any() or len(frame[frame["at"] == at]) > 1, (key, at, number)
            page.wait_for_timeout(30)
            now = dots(page, f"{key}-chart-0")
            assert now != before, (key, at)
            before = now


def test_the_slider_of_p_agrees_with_a_fresh_profile(page, stations):
    slider = stations[9].figures[0].slider
    for at in (3, 20, 40):
        move(page, "claim-9-0", at)
        p = float(slider.positions.query("at == @at").p.iloc[0])
        fresh = gradient_profile(load(FOLDER / "low_probability.py").LOSSES, [p])
        shown = page.evaluate(
            "[...document.querySelectorAll('#claim-9-0 tbody tr')]"
            ".map(row => [...row.cells].slice(1).map(cell => Number(cell.dataset.value)))"
        )
        np.testing.assert_allclose(shown, fresh[["value", "dvalue_dp", "dvalue_dlogit"]], rtol=1e-6)


def test_what_is_said_of_a_slider_has_no_digits_of_its_own(page):
    """To four digits, and no fifth one: 10^-4.25 is 5.623e-5 and not 5.6230e-5."""
    assert page.evaluate("[10 ** -4.25, 1e-6, 1234567, 0.123456].map(brief)") == ["5.623e-5", "1e-6", "1234567", "0.1235"]


def test_the_curve_of_a_typed_loss_has_every_decade_and_what_is_flat(page):
    page.locator("#formula").fill("min(1,-log(p))")
    rows = page.evaluate("curves().filter(row => row.loss === 'yours')")
    p = np.array([row["p"] for row in rows])
    assert (np.diff(np.log10(p)) < 0.15).all()
    assert p[0] == pytest.approx(1e-6)
    assert all(row["value"] == 1 and row["dp"] is None for row in rows if row["p"] < 0.3)
    assert all(row["dp"] > 0 for row in rows if row["p"] > 0.4)


def test_on_paper_charts_and_tables_are_whole(opened):
    page = opened(1280)
    assert cut_on_paper(page) == 0


def test_a_slider_goes_by_keyboard(page):
    slider = page.locator("#claim-14-0-slider")
    move(page, "claim-14-0", 1)
    before = page.locator("#claim-14-0 output").inner_text()
    slider.focus()
    slider.press("ArrowRight")
    assert page.locator("#claim-14-0 output").inner_text() != before
    assert slider.get_attribute("aria-valuetext") == page.locator("#claim-14-0 output").inner_text()


@pytest.mark.parametrize("formula", EXAMPLES)
def test_a_typed_loss_has_the_librarys_gradients(page, formula, tmp_path):
    """The page's numbers against the library's, of the file that the page writes for the same formula."""
    page.locator("#formula").fill(formula)
    (tmp_path / "mine.py").write_text(page.locator("#own-code").inner_text())
    rows = page.evaluate(
        "[...document.querySelectorAll('#own-table tbody tr')].map(r => [...r.cells].map(c => Number(c.dataset.value)))"
    )
    profile = gradient_profile([f"{tmp_path}/mine.py:mine", "nll"], [row[0] for row in rows])
    for name, columns in (("mine", slice(1, 4)), ("nll", slice(4, 7))):
        expected = profile[profile.loss.str.contains(name)][["value", "dvalue_dp", "dvalue_dlogit"]]
        np.testing.assert_allclose(np.array(rows)[:, columns], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("(1-p^0.3)/0.3", "vanishes"),
        ("(1-p^0.1)/0.1", "vanishes"),
        ("sqrt(-log(p))", "vanishes"),
        ("(-log(p))^0.9", "vanishes"),
        ("(1-p)^2", "vanishes"),
        ("(-log(p))^1.2", "grows"),
        ("-log(p) * log(1-log(p))", "grows"),
        ("1/p - 1", "grows"),
        ("1/p^3", "grows"),
        ("p^-3", "grows"),
        ("min(1,-log(p))", "is 0 at"),
        ("-log(p) * (1-p)^2", "holds as p goes to 0, near 1 "),
        ("-log(p^3)", "holds as p goes to 0, near 3 "),
        ("-log(p) + sqrt(-log(p))", "settles as p goes to 0: 1.04 at"),
    ],
)
def test_a_typed_loss_is_told_what_becomes_of_its_pull(page, formula, said):
    """By hand: with L = -log p the pull goes like the loss's derivative by L: p^.3, p^.1, .5 / sqrt(L), .9 / L^.1 and so on."""
    page.locator("#formula").fill(formula)
    assert f"its pull in the logit {said}" in page.locator("#said").inner_text()


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        ("-log(p", "missing before the end"),
        ("-log(q)", "“q” at character 6 is not known"),
        ("2p", "An operator is missing before “p” at character 2"),
        ("alert(1)", "“alert” at character 1 is not known"),
        ("constructor", "is not known"),
        ("p.constructor", "“.” at character 2 has no meaning"),
        ("min(p)", "min takes 2 numbers; got 1"),
        ("log", "“(” after log is missing"),
        ("", "Write a loss of p"),
        ("((((" * 40, "nested too deep"),
        ("1/(p-p)", "no finite number"),
    ],
)
def test_a_wrong_formula_gets_a_clear_message(page, formula, said):
    kept = page.locator("#own-code").inner_text()
    page.locator("#formula").fill(formula)
    assert said in page.locator("#said").inner_text()
    if "finite" not in said:
        assert page.locator("#formula").get_attribute("aria-invalid") == "true"
        assert page.locator("#own-code").inner_text() == kept
    page.locator("#formula").fill("-log(p)")
    assert page.locator("#formula").get_attribute("aria-invalid") == "false"


def test_narrow_logits():
    """Written plainly Brier's gradient is several times further off than the head's; the catalogue's is as near."""
    script = load(FOLDER / "narrow_logits.py")
    frame = script.run(("nll", "brier"), (64, 2048), tokens=16, features=32)
    error = frame.set_index(["loss", "vocab", "head"]).error
    assert (error[:, :, "linear_loss"] < 3e-3).all()
    assert (error[:, :, "catalogue"] < 3e-3).all()
    assert error["brier", 2048, "written plainly"] > 3 * error["nll", 2048, "written plainly"]
    assert error["brier", 2048, "written plainly"] > 3 * error["brier", 2048, "linear_loss"]
    assert "At V = 2,048 a gradient written plainly is off" in script.told(frame)
    assert script.chart(frame).to_dict()


def test_theorems():
    """The audit finds what is proved of losses that nobody told it of; of the others or their like test_audit*.py tells."""
    script = load(FOLDER / "theorems.py")
    told = ("pairwise logistic", "one-vs-rest hinge", "one-vs-rest exponential", "one-vs-rest Savage", "ranked probability")
    frame = script.run((*told, "pseudospherical"))
    assert frame[~frame.agrees].to_dict("records") == []
    assert len(frame) == 12
    assert set(script.LOSSES_OF_OTHERS) == set(script.PROVED)


def test_own_loss_at_scale():
    """Small here: the three heads agree, and the streamed one holds least."""
    frame = load(FOLDER / "own_loss_at_scale.py").run(tokens=1024, features=32, vocab=5000).set_index("head")
    assert frame.before.to_numpy() == pytest.approx(frame.before["naive"], rel=1e-6)
    assert frame.after.to_numpy() == pytest.approx(frame.after["naive"], rel=1e-6)
    assert frame.temporary_mb["stream"] < frame.temporary_mb["tokens"] < frame.temporary_mb["naive"]
    assert (frame.after < frame.before).all()
