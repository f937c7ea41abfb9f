"""What charts draw and tables print, on a page and on a terminal: the values themselves, read back."""

import math
import re
import types

import altair as alt
import pandas as pd
import pytest
import vl_convert

from xentlab import charts, console, markup
from xentlab.audit.probe import Verdict

NAN = math.nan


def drawn(chart):
    """The rows of a chart that has one set of them; its reference line has none."""
    [rows] = [rows for rows in chart.to_dict()["datasets"].values() if any(rows)]
    return rows


def trained(**columns):
    """Losses' validation NLL by rate and step, none diverged."""
    rest = {"source": "s", "loss": "nll", "rate": 0.1, "step": 1, "diverged_at": -1}
    return pd.DataFrame(columns).assign(**{name: value for name, value in rest.items() if name not in columns})


def test_a_curve_draws_the_best_rate_alone_its_mean_and_its_extremes_over_seeds():
    frame = trained(validation_nll=[1.0, 2.0, 9.0, 5.0], rate=[0.1, 0.1, 0.1, 1.0])
    table = pd.DataFrame({"source": ["s"], "loss": ["nll"], "best_rate": [0.1]})
    assert drawn(charts.curves(frame, table, ["nll"], "s")) == [{"loss": "nll", "step": 1, "mean": 4, "low": 1, "high": 9}]


def test_a_curve_says_how_many_rates_its_own_source_had():
    frame = pd.concat([trained(validation_nll=[1.0], source=[name], rate=[rate]) for name, rate in (("s", 0.1), ("t", 1.0))])
    table = pd.DataFrame({"source": ["s", "t"], "loss": ["nll"] * 2, "best_rate": [0.1, 1.0]})
    said = lambda frame: charts.curves(frame, table, ["nll"], "s").to_dict()["title"]["subtitle"][0]
    assert said(frame) == "every loss at the rate 0.1"
    assert said(pd.concat([frame, trained(validation_nll=[2.0], rate=[1.0])])) == "each loss at its own best rate"


def test_a_rate_of_which_a_seed_diverged_is_not_drawn_by_its_survivors():
    frame = trained(rate=[0.1, 0.1, 0.2, 0.2], validation_nll=[2.0, 2.0, 9.0, 1.0], diverged_at=[-1, -1, 0, -1])
    assert [row["rate"] for row in drawn(charts.sweep(frame, ["nll"], "s"))] == [0.1]


def test_a_sweep_draws_the_last_step_alone_of_what_did_not_diverge():
    frame = trained(validation_nll=[5.0, 1.0, 7.0, 8.0], rate=[0.1, 0.1, 1.0, 1.0], step=[1, 2] * 2, diverged_at=[-1, -1, 2, 2])
    assert drawn(charts.sweep(frame, ["nll"], "s")) == [{"loss": "nll", "rate": 0.1, "mean": 1, "low": 1, "high": 1}]


@pytest.mark.parametrize(
    ("read", "accuracy", "said"),
    [("raw", 0.5, "as trained"), ("tempered", 0.7, "after one temperature, fitted on validation")],
)
def test_reliability_draws_the_reading_that_it_names(read, accuracy, said):
    frame = pd.DataFrame({"reading": ["raw", "tempered"], "accuracy": [0.5, 0.7]})
    frame = frame.assign(source="s", loss="nll", bin_low=0.6, confidence=0.65, tokens=100)
    chart = charts.reliability(frame, ["nll"], "s", read)
    assert [(row["reading"], row["accuracy"]) for row in drawn(chart)] == [(read, accuracy)]
    assert chart.to_dict()["title"]["subtitle"] == [said]


def test_a_budget_s_lines_are_shares_of_the_gradient_and_its_bars_of_the_tokens():
    rows = {"loss": "nll", "p_low": [0.0, 0.1], "p_high": [0.1, 1.0], "tokens": [3, 7], "gradient": [1.0, 0.5]}
    rows |= {"share_of_tokens": [0.3, 0.7], "share_of_gradient": [0.6, 0.4]}
    bars, lines = charts.budget(pd.DataFrame(rows), ["nll"], "t").to_dict()["layer"]
    assert bars["encoding"]["y"]["field"] == "share_of_tokens"
    assert lines["encoding"]["y"]["field"] == "share_of_gradient"


@pytest.mark.parametrize(("path", "said"), [("even", "the target's logit falls, rivals even"), ("one", "one rival rises")])
def test_a_profile_draws_the_path_that_it_names(path, said):
    rows = {"rivals": ["even", "one"], "dvalue_dlogit": [-1.0, -2.0], "dvalue_dp": [-10.0, -20.0]}
    chart = charts.profile(pd.DataFrame(rows).assign(loss="nll", p=0.1, value=1.0), ["nll"], "dvalue_dlogit", path)
    assert [row["size"] for row in drawn(chart)] == [{"even": 1, "one": 2}[path]]
    assert chart.to_dict()["title"]["subtitle"] == [said]


def test_a_profile_says_what_it_does_not_draw():
    rows = {"loss": ["nll", "nll", "flat"], "p": [0.1, 1e-3, 0.1], "dvalue_dlogit": [-1.0, -1e-12, -1.0]}
    chart = lambda **more: charts.profile(pd.DataFrame(rows | more).assign(rivals="one", value=1.0), [], "dvalue_dlogit", "one")
    said = lambda chart: chart.to_dict()["title"]["subtitle"][1:]
    assert said(chart()) == ["below 1e-9 not drawn"]
    assert said(chart(dvalue_dlogit=[-1.0, -1e-12, 0.0])) == ["0, or below 1e-9, not drawn"]
    assert said(chart(dvalue_dlogit=[-1.0, -1.0, -1.0])) == []


def test_one_value_alone_is_written_on_its_axis_as_it_is():
    svg = vl_convert.vegalite_to_svg(charts.sweep(trained(validation_nll=[1.8355892]), ["nll"], "s").to_dict())
    assert ">1.83559</text>" in svg


def test_long_names_stand_whole_in_a_legend():
    names = ["a_very_long_name_of_a_loss_that_" + end * 40 for end in "ab"]
    frame = pd.concat([trained(validation_nll=[each], loss=[name]) for each, name in enumerate(names)])
    svg = vl_convert.vegalite_to_svg(charts.sweep(frame, names, "s").to_dict())
    assert all(svg.count(f">{name}</text>") == 1 for name in names)


def test_panels_are_level_whatever_their_titles_are():
    """None, a line, a title without lines under it, a string for them, and several: all the same height above the plot."""
    one = alt.Chart(pd.DataFrame({"x": [1.0], "y": [1.0]})).mark_point().encode(x="x", y="y")
    titles = ["a line", alt.Title("alone"), alt.Title("t", subtitle="below"), alt.Title("t", subtitle=["below", "and more"])]
    drawn = charts.grid([one, *(one.properties(title=title) for title in titles)]).to_dict()["concat"]
    assert "title" not in drawn[0]
    assert [each["title"]["subtitle"] for each in drawn[1:]] == [[" "] * 2, [" "] * 2, ["below", " "], ["below", "and more"]]
    assert charts.grid([one]).to_dict()["concat"]


@pytest.mark.parametrize("names", [["nll", "other"], ["other", "nll"]])
def test_an_audit_s_rows_do_not_hang_on_who_is_first(names):
    """Of the one a verdict is a table, a word or nothing, of the other it could not be settled."""
    values = {"max_error": {"float32": 1e-7}, "finite": True, "same_gradient_as": {"nll": 2.0}, "convex": True}
    found = {"nll": values, "other": values | {"same_gradient_as": None, "max_error": "undecided"}}
    audits = {
        name: types.SimpleNamespace(verdicts={what: Verdict(value, "") for what, value in found[name].items()})
        for name in names
    }
    rows = re.findall('<tr><th scope="row">([^<]*)', markup.audit_table(audits))
    assert rows == ["finite", "same gradient as", "convex"]


def raced(**columns):
    """A race's table, a row a loss, with no interval but those that are given."""
    rest = {"source": "s", "loss": "nll", "test_nll": 1.0, "best_rate": 0.1, "rate_at_edge": False, "diverged": 0}
    means = ("test_nll", "bits_per_byte", "accuracy", "calibration_error", "kl_to_law")
    rest |= dict.fromkeys([*means[1:], *(f"{mean}_{end}" for mean in means for end in ("low", "high"))], NAN)
    rest |= {"temperature": NAN, "temperature_at_edge": False, "tempered_nll": NAN, "smoothing": 0.0, "beyond_law": NAN}
    rest = {name: value for name, value in rest.items() if name not in columns}
    return pd.DataFrame({name: value if isinstance(value, list) else [value] for name, value in columns.items()}).assign(**rest)


@pytest.mark.parametrize(
    ("mean", "low", "high", "half"),
    [
        (0.5, 0.3, 0.7, "± 0.2"),
        (0.1, 0.0, 0.9, "± 0.8"),
        (0.9, 0.1, 1.0, "± 0.8"),
        (0.5, NAN, NAN, None),
        (0.5, 0.5, 0.5 + 1e-9, None),
    ],
)
def test_the_page_and_the_terminal_show_the_longer_half_of_an_interval(mean, low, high, half):
    table = raced(accuracy=mean, accuracy_low=low, accuracy_high=high)
    assert console.summary(table)[0]["accuracy"] == f"{mean:.4f}" + (f" {half}" if half else "")
    assert (f"<td>{mean:g}" + (f" <small>{half}</small>" if half else "") + "</td>") in markup.race_tables(table)


@pytest.mark.parametrize(("edge", "mark"), [(False, ""), (True, " ⇥")])
def test_a_best_rate_is_marked_at_the_end_of_the_grid_alone(edge, mark):
    table = raced(rate_at_edge=edge)
    assert console.summary(table)[0]["best rate"] == f"0.1{mark}"
    assert ("⇥" in markup.race_tables(table)) == edge


def test_beside_a_temperature_stands_the_nll_at_it():
    for edge, said in ((False, "1.5000 (2)"), (True, "1.5000 (2 ⇥)")):
        table = raced(test_nll=1.7, tempered_nll=1.5, temperature=2.0, temperature_at_edge=edge)
        assert console.summary(table)[0]["at T"] == said


def test_a_race_s_table_begins_with_the_best():
    page = markup.race_tables(raced(loss=["b", "c", "a"], test_nll=[2.0, 3.0, 1.0]))
    assert re.findall(r'<th scope="row">(\w)</th>', page) == ["a", "b", "c"]


@pytest.mark.parametrize("apart", [True, False])
def test_an_interval_covers_0_where_the_seeds_tell_nothing_apart(apart):
    row = {"source": "s", "loss": "brier", "against": "nll", "metric": "test_nll", "seeds": 3, "tells_apart": apart}
    page = markup.pairs_table(pd.DataFrame([row | {"difference": 0.2, "low": 0.1 if apart else -0.1, "high": 0.3}]))
    assert "+0.200 <small>" in page
    assert ("covers 0" in page) != apart
    small = markup.pairs_table(pd.DataFrame([row | {"difference": 2e-5, "low": 1e-5, "high": 3e-5}]))
    assert "<td>+2.0e-05 <small>[+1.0e-05, +3.0e-05]" in small
    mixed = markup.pairs_table(pd.DataFrame([row | {"difference": 5e-3, "low": 2e-4, "high": 9e-3}]))
    assert "<td>+5.0e-03 <small>[+2.0e-04, +9.0e-03]" in mixed  # all in the one notation


def board(**columns):
    """A scoreboard's table of one loss that is the same through every door."""
    row = {"loss": "nll", "bias": 0.0, "escape_steps": 9.0, "escape_rate": 0.1, "escape_tried": 1.0}
    row |= {f"low_p_{name}": 1.0 for name in ("even", "one", "order")}
    row |= {f"{name}{end}": 1.0 for name in ("tokens_needed", "simulated") for end in ("", "_low", "_high")}
    for dtype in ("float32", "bfloat16", "float16"):
        row |= {f"error_{dtype}": 1e-7, f"gradient_error_{dtype}": 1e-7, f"finite_{dtype}": True}
    return pd.DataFrame([row | columns])


def test_bits_are_a_byte_s_where_bytes_are_known():
    code = {"source": "s", "loss": "nll", "bits_per_byte": 1.0, "bits_per_token": 2.0, "model_bits_per_token": 1.9}
    for changed, coded, model in (({}, "1.0000 a byte", "0.9500"), ({"bits_per_byte": NAN}, "2.0000 a token", "1.9000")):
        codes = pd.DataFrame([code | changed])
        assert f"<td>{coded}</td><td>{model}</td>" in markup.scoreboard_tables(board(), codes)
        assert console.scoreboard_rows(board(), codes)[0]["bits, s"] == coded.split()[0]


@pytest.mark.parametrize(("finite", "mark"), [(True, ""), (False, "✗"), ("undecided", "?")])
def test_what_is_not_finite_has_a_cross_and_what_is_not_settled_a_question_mark(finite, mark):
    page = markup.scoreboard_tables(board(finite_float16=finite), pd.DataFrame())
    assert re.findall("<abbr[^>]*>(.)</abbr>", page) == list(mark)


def test_each_is_set_beside_the_one_that_it_is_compared_with():
    """Where a loss has no test on a source, the others stand beside another one there."""
    rows = [("text", "c", "b", 0.5), ("markov", "b", "a", 1.0)]
    pairs = pd.DataFrame(rows, columns=["source", "loss", "against", "difference"])
    pairs = pairs.assign(metric="test_nll", seeds=3, low=0.1, high=2.0, tells_apart=True)
    beside = markup.pairs_table(pairs).split("<h3>")[1:]
    assert [(table.split("'s,")[0], table.count('<th scope="row"')) for table in beside] == [
        ("Test NLL beside b", 1),
        ("Test NLL beside a", 1),
    ]
    assert ">b</th><td>markov" in beside[1]


def test_a_header_stands_as_it_is(capsys):
    console.print_table([{"loss": "nll", "bits, [draft] book.txt": 1.0, "kind='[/x]'": 2.0}])
    assert "bits, [draft] book.txt" in capsys.readouterr().out
