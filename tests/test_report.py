"""The report's folder, its words, and its page in a real browser."""

import json
import os
import pathlib
import re
from types import MappingProxyType

import numpy as np
import pandas as pd
import pytest
from browser import cut_on_paper, luminance

from xentlab import charts, reading
from xentlab.audit import Audit, Verdict
from xentlab.catalogue import resolve_all
from xentlab.program import windows
from xentlab.recipe import Recipe
from xentlab.report import _held_out_logits, _warnings, make_report
from xentlab.report import page as page_of
from xentlab.scoreboard import Scoreboard
from xentlab.scoreboard.reading import _numerics
from xentlab.sources import MarkovSource, Text
from xentlab.stages import Stage, run_stage, standard_stages

TRAINS = True
LOSSES = ["nll", "brier"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "mine.py").write_text(
        "import jax.numpy as jnp\n"
        "def odd(logits, targets):\n"
        "    return jnp.abs(logits).sum(-1) - 2 * jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]\n"
    )
    losses = {name: name for name in LOSSES} | {"</script><b>odd": f"{folder}/mine.py:odd"}
    return make_report(losses, out=folder / "made", quick=True)


def test_the_folder_holds_everything(report):
    names = {path.name for path in report.folder.iterdir()}
    coded = {name for name in names if name.endswith(".coded")}
    assert len(coded) == 2 * 3
    assert names - coded == {
        *("scoreboard.csv", "codes.csv", "audits.json"),
        *(
            ".lock",
            "run.json",
            "report.html",
            "profiles.csv",
            "budgets.csv",
            "curves.csv",
            "table.csv",
            "tests.csv",
            "pairs.csv",
        ),
        *("reliability.csv", "frequency.csv"),
        *("headline.png", "budgets.png", "curves.png", "sweep.png", "reliability.png", "rarity.png"),
    }
    for path in report.folder.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000
    record = json.loads((report.folder / "run.json").read_text())
    assert {"command", "versions", "commit", "device", "sources", "seconds"} <= record.keys()
    assert record["device"]["cores"] == len(os.sched_getaffinity(0))
    assert record["kind"] == "report"
    assert [source["kind"] for source in record["sources"]] == ["text", "markov"]


def test_frames_on_disk_are_the_frames(report):
    for name, frame in {"profiles": report.profiles, "budgets": report.budgets, **report.raced}.items():
        pd.testing.assert_frame_equal(pd.read_csv(report.folder / f"{name}.csv"), frame, check_dtype=False)


def test_a_page_offers_its_tables_and_says_of_a_quick_run_that_it_is_one(report):
    quick = (report.folder / "report.html").read_text()
    assert "A quick run" in quick
    assert "A quick run" not in page_of(report, resolve_all(LOSSES), {"arguments": {"quick": False}})
    for name in ("profiles", "budgets", "curves", "reliability", "frequency", "table", "pairs", "scoreboard"):
        assert f'download="{name}.csv"' in quick


@pytest.fixture(scope="module")
def staged():
    return run_stage(Stage(MarkovSource(vocab=4, tokens=2000), "bigram", (0.1,), 2), ["nll"], seed=5, quick=True)


def test_a_budget_is_of_held_out_tokens(staged):
    scores, targets = _held_out_logits(staged, 5)
    held_out = windows(staged.stage.source.split("validation"), Recipe().window, Recipe().validation_tokens)
    np.testing.assert_array_equal(targets, held_out[:, 1:])
    assert scores.shape == (*targets.shape, 4)


def test_a_stage_s_seeds_begin_at_its_own_and_a_chain_is_drawn_by_it(staged):
    assert set(staged.race.frames()["curves"].seed) == {5, 6}
    assert standard_stages(Text(), 5)[1].source.seed == 5


def profiles(**sizes):
    """A profile frame with |dL/dz_y| at p = 1e-3 and 1e-6 on both paths."""
    rows = [
        {"loss": loss, "rivals": rivals, "p": p, "dvalue_dlogit": -size, "dvalue_dp": -size / p}
        for loss, pair in sizes.items()
        for rivals in ("even", "one")
        for p, size in zip((1e-3, 1e-6), pair, strict=True)
    ]
    return pd.DataFrame(rows)


def test_the_reading_follows_the_numbers():
    """The same function says opposite things of opposite numbers: no sentence is canned."""
    said = " ".join(reading.gradients(profiles(nll=(1, 1), brier=(2e-3, 2e-6), mse_logits=(10, 24))))
    assert re.search(r"holds for nll \(1\).*0 with p for brier \(2e-06\).*grows for mse_logits \(24\)", said)
    assert "mse_logits pulls harder" in said
    said = " ".join(reading.gradients(profiles(nll=(2e-3, 2e-6), brier=(1, 1))))
    assert re.search(r"holds for brier.*0 with p for nll", said)
    assert "brier pulls harder" in said
    assert "not true" not in " ".join(reading.gradients(profiles(nll=(1, 1), mae=(1e-3, 1e-6))))
    assert "goes to 0 with p for clipped (0)" in " ".join(reading.gradients(profiles(nll=(1, 1), clipped=(0, 0))))
    bins = {"source": "s", "loss": "nll", "p_low": [0.0, 0.05], "p_high": [0.05, 1.0], "tokens": [3, 7]}
    budget = pd.DataFrame(bins | {"share_of_tokens": [0.3, 0.7], "share_of_gradient": [0.6, 0.4]})
    assert "30% of the tokens had p below 0.05. They get 60%" in reading.budgets(budget)[0]


def table(**nll):
    rows = [
        {
            **{"source": "s", "loss": loss, "test_nll": mean, "test_nll_low": mean - half, "test_nll_high": mean + half},
            **{
                "uniform_nll": 5.5,
                "tempered_nll": float("nan"),
                "best_rate": mean / 10,
                "bits_per_byte": float("nan"),
                "beyond_law": float("nan"),
                "rate_at_edge": False,
                "diverged": 0,
                "smoothing": 0.0,
            },
        }
        for loss, (mean, half) in nll.items()
    ]
    return pd.DataFrame(rows)


def test_the_winner_is_told_and_what_pairs_tell_is_left_to_them():
    """Seeds that are far from one another may be paired, and tell what their own intervals would not."""
    clear = reading.races(table(nll=(2.0, 0.1), brier=(1.0, 0.1)))[0]
    assert "brier's, 1.000" in clear
    assert "nll itself is 1.000 behind" in clear
    assert reading.races(table(nll=(1.0, 0.1), brier=(1.1, 0.1), mae=(3, 0.1))) == [
        "On s the least test NLL is nll's, 1.000 nats a token. The most is mae's, 3.000."
    ]


def test_what_learned_nothing_is_told():
    said = " ".join(reading.races(table(nll=(2.0, 0.1), lazy=(5.499, 0.1)).assign(rate_at_edge=True)))
    assert "lazy (5.499) ended hardly better than a uniform guess, 5.500 nats" in said
    assert "the end of the grid (⇥) for nll:" in said


def test_what_learned_nothing_for_want_of_a_rate_or_of_anything_to_learn_is_not_laid_on_the_loss():
    rows, ended = table(nll=(2.0, 0.1), lazy=(5.5, 0.1)), "On s lazy ended no better than a uniform guess, 5.500 nats: "
    one, two = (pd.DataFrame({"source": "s", "rate": rates}) for rates in ([0.2, 0.2], [0.1, 0.2]))
    ask = "does it pull towards the target? `xentlab audit` says where it does not."
    others = f", so try others first. If they end there too: {ask}"
    assert reading.races(rows, two)[0] == ended + ask
    at_edge = rows.assign(rate_at_edge=[False, True])
    assert reading.races(at_edge, two)[0] == ended + "the best rate tried lies at the end of the grid (⇥)" + others
    said = reading.races(rows, one)
    assert said[0] == ended + "only one rate was tried" + others
    assert said[2] == "On s one rate was tried, 0.2, so no loss is tuned: compare them at several."
    assert reading.races(table(nll=(5.5, 0.1), lazy=(5.5, 0.1)), two)[0] == (
        "On s nll and lazy ended no better than a uniform guess, 5.500 nats: with nll among them the race was too short, its "
        "rates do not suit, its targets are noise, or nothing can be learnt from that source."
    )


def test_of_whose_gradient_is_another_s_than_its_value_s_nothing_is_said_without_a_warning():
    def board(**honest):
        verdicts = lambda value: {"honest_autodiff": Verdict(value, ""), "permutation_equivariant": Verdict(True, "")}
        audits = {name: Audit(name, MappingProxyType(verdicts(value))) for name, value in honest.items()}
        return Scoreboard(pd.DataFrame(), pd.DataFrame(), audits)

    assert _warnings(board(nll=True, odd="undecided")) == []
    (said,) = _warnings(board(nll=True, detached=False))
    assert said.startswith("The gradient that autodiff gives of detached is not the slope of its value")


def test_what_is_called_finite_is_not_called_stable():
    """margin's error in float16 is 1: that its numbers are finite says nothing of their digits."""
    said = _numerics(pd.DataFrame({"loss": ["margin"], "finite_float32": [True], "finite_float16": [True]}))
    assert said == ["Finite in float32 and float16, at extreme logits too: margin. How many digits are right, the table says."]


def test_what_diverged_at_every_rate_is_told_and_what_the_mark_of_the_grids_end_means():
    nan = float("nan")
    gone = (
        "diverged at every rate, which leaves nothing to test. Try smaller rates; of a loss that is no number from the start "
    )
    gone += "`xentlab audit` says where."
    assert reading.races(table(nll=(nan, 0.1))) == [f"On s nll {gone}"]
    assert reading.races(table(nll=(nan, 0.1), brier=(nan, 0.1))) == [f"On s every loss {gone}"]
    rows = table(nll=(1.0, 0.1), brier=(nan, 0.1), mae=(nan, 0.1)).assign(diverged=[0, 6, 6], rate_at_edge=[True, False, False])
    assert reading.races(rows) == [
        f"On s brier and mae {gone}",
        "On s the test NLL of nll is 1.000 nats a token.",
        "On s the best rate tried lies at the end of the grid (⇥) for nll: "
        "a better one may lie outside, so read their numbers as upper bounds.",
        "Runs that diverged on s: brier (6) and mae (6).",
    ]


def test_both_ends_of_an_interval_are_in_one_notation():
    rows = {"source": "s", "loss": "brier", "against": "nll", "metric": "test_nll", "seeds": 3, "difference": 2e-3}
    frame = pd.DataFrame([rows | {"low": low, "high": 4e-3, "tells_apart": True} for low in (3.7e-4, 1e-3)])
    assert reading.pairs(frame) == [
        "On s test NLL against nll's, seed by seed, in nats with intervals of 95% over 3 seeds: behind it "
        "brier (+2.0e-03, [+3.7e-04, +4.0e-03]) and brier (+0.002, [+0.001, +0.004]).",
        "On s these are 2 intervals: where nothing differs, one in twenty still says that it does.",
    ]


def test_what_was_mixed_in_is_said_for_what_it_is():
    rows = table(nll=(1.0, 0.1), brier=(2.0, 0.1)).assign(smoothing=[1e-6, 0.1])
    assert "mixed with a share of the uniform, the one that is best on validation: brier (0.1)." in reading.races(rows)[-1]


def test_what_is_equal_as_printed_has_no_least_and_no_most():
    counts = [{"count_low": low, "count_high": high, "tokens": 500} for low, high in ((0, 0), (1000, 2999))]
    rows = [{"source": "s", "loss": loss, **each} for loss in ("nll", "brier") for each in counts]
    said = reading.rarity(pd.DataFrame(rows).assign(test_nll=[5.0, 2.001, 6.0, 2.002]))
    assert said == [
        "On s tokens that never occur in the training part (500 of the test's) cost from 5.00 (nll) to 6.00 nats (brier); "
        "those that occur 1,000 times and up, 2.00 nats by every loss."
    ]


def test_rare_tokens_are_pooled_until_they_are_enough():
    """1, 13 and 48 of them: what occurs at most 99 times are all 62, each by its number."""
    bins = [(0, 0, 1), (10, 29, 13), (30, 99, 48), (1000, 2999, 500)]
    rows = [{"source": "s", "loss": "nll", "count_low": low, "count_high": high, "tokens": n} for low, high, n in bins]
    frame = pd.DataFrame(rows).assign(test_nll=[64.0, 2.0, 1.0, 1.0])
    both = pd.concat([frame, frame.assign(loss="brier", test_nll=[0.0, 2.0, 1.0, 1.0])])
    assert reading.rarity(both) == [
        f"On s tokens that occur at most 99 times in the training part (62 of the test's) cost from {74 / 62:.2f} (brier) to "
        f"{138 / 62:.2f} nats (nll); those that occur 1,000 times and up, 1.00 nats by every loss."
    ]


def test_looks_stay_apart_for_the_whole_catalogue():
    from xentlab import LOSSES as ALL

    assert len(set(charts.look(list(ALL)).values())) == len(ALL)


@pytest.fixture(scope="module")
def html(report):
    return report.folder / "report.html"


def lines(page, chart):
    """How many lines a chart draws."""
    return page.evaluate(f"document.querySelectorAll('#{chart} svg g.mark-line path').length")


# Each width and each scheme once: where things lie does not hang on colours.
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_every_chart_has_marks_and_the_page_fits(opened, width, scheme):
    page = opened(width, scheme)
    figures = page.locator("figure.chart").evaluate_all("all => all.map(each => each.id)")
    assert len(figures) == 16
    for figure in figures:
        # A quick report tries one rate, so that the sweep has points and no lines.
        marks = lines(page, figure) or page.locator(f"#{figure} svg g.mark-symbol path").count()
        assert marks >= 3, figure
        box = page.locator(f"#{figure} svg").first.bounding_box()
        assert box["width"] > 0.7 * page.locator(f"#{figure}").bounding_box()["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width > 1000:  # of a table that is cut the last columns are not seen
        cut = "[...document.querySelectorAll('.scroll')].filter(each => each.scrollWidth > each.clientWidth + 1).length"
        assert page.evaluate(cut) == 0
    assert (luminance(page) < 200) == (scheme == "dark")
    drawn = page.evaluate("[theme().background, theme().font, theme().range.category]")
    assert drawn == [{"light": "#ffffff", "dark": "#1c1f23"}[scheme], "system-ui, sans-serif", list(charts.HUES)]


def test_on_paper_charts_and_tables_are_whole(opened):
    page = opened(1280)
    assert page.locator(".chart svg.marks").count() == 16
    assert cut_on_paper(page) == 0


def test_what_gets_the_focus_is_not_under_the_legend(page):
    link = page.get_by_role("link", name="Download curves.csv").first
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    link.evaluate("each => each.focus()")
    covered = "document.getElementById('legend').getBoundingClientRect().bottom"
    assert link.evaluate("each => each.getBoundingClientRect().top") >= page.evaluate(covered)


def test_a_legend_click_hides_and_shows_a_loss_everywhere(page):
    button = page.get_by_role("button", name="brier")
    before = {chart: lines(page, chart) for chart in ("headline-0", "budgets-1", "curves-0")}
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    page.wait_for_function(f"document.querySelectorAll('#headline-0 svg g.mark-line path').length < {before['headline-0']}")
    assert {chart: lines(page, chart) for chart in before} == {chart: count - 1 for chart, count in before.items()}
    button.click()
    page.wait_for_function(f"document.querySelectorAll('#headline-0 svg g.mark-line path').length == {before['headline-0']}")


def test_a_chart_is_saved_by_its_name_with_its_legend_as_it_is_seen(page):
    def saved():
        with page.expect_download() as caught:
            page.locator("#headline-0 .vega-actions a", has_text="SVG").dispatch_event("click")
        assert caught.value.suggested_filename == "headline-0.svg"
        return pathlib.Path(caught.value.path()).read_text()

    assert all(f">{name}</text>" in saved() for name in ("nll", "brier", "&lt;/script&gt;&lt;b&gt;odd"))
    lines = lambda svg: svg.count('aria-roledescription="line mark"')
    page.get_by_role("button", name="brier").click()
    fewer = lines(saved())
    page.get_by_role("button", name="brier").click()
    assert lines(saved()) == fewer + 1


def test_scoreboard_and_audit_can_be_read_and_witnesses_unfold(opened):
    page = opened(400)
    doors = page.locator("#scoreboard h3").all_inner_texts()
    assert [door.split(":")[0] for door in doors] == ["Probability", "Information", "Numerics", "Optimisation"]
    assert page.locator("#scoreboard tbody tr").count() == 4 * 3
    assert "never" in page.locator("#scoreboard").inner_text()
    folded = page.locator("#audit details").nth(1)
    witness = folded.locator("ul.witness").first
    assert not witness.is_visible()
    folded.locator("summary").press("Enter")
    assert witness.is_visible()
    assert "logits" in folded.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_hover_gives_values(page):
    page.locator("#curves-0 svg g.mark-symbol path").last.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "step" in page.locator("#vg-tooltip-element").inner_text()


def test_downloads_are_the_files(page, report):
    with page.expect_download() as caught:
        page.get_by_role("link", name="Download profiles.csv").click()
    assert pathlib.Path(caught.value.path()).read_bytes() == (report.folder / "profiles.csv").read_bytes()
    assert page.get_by_text("</script><b>odd").count() >= 1
