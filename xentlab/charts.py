"""Pictures of tidy frames, by altair. They know nothing of losses but their names.

Every chart is one view, so that a page can fit it to its width; `grid` puts several side by side for a picture file.
Each filters its rows by the parameter `shown`, the list of losses to show, which a page's legend sets.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import altair as alt

from xentlab.reading import ENOUGH
from xentlab.runs import write_bytes

if TYPE_CHECKING:
    import pandas as pd

# Hues that stay apart for the colour-blind and on light and dark ground (after Tol 2021, "bright" and "vibrant").
HUES = ("#4477AA", "#EE6677", "#228833", "#CC9911", "#33AACC", "#AA3377", "#EE7733", "#888888")
DASHES = ((1, 0), (6, 3), (2, 2), (8, 2, 2, 2))
# A power of ten, plain where that is short.
POWERS = "datum.value >= .01 && datum.value < 1e4 ? format(datum.value, ',~g') : replace(format(datum.value, '~e'), '+', '')"
SPACES = {"dvalue_dlogit": "|∂L/∂z_y|, in the target's logit", "dvalue_dp": "|dL/dp|, in its probability"}
PATHS = {"even": "the target's logit falls, rivals even", "one": "one rival rises"}


def look(losses: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Each loss's hue and dash; past eight losses the hues come again with another dash."""
    return {name: (HUES[i % len(HUES)], DASHES[i // len(HUES) % len(DASHES)]) for i, name in enumerate(losses)}


def _legend(losses: Sequence[str]) -> alt.Legend:
    wide = max(map(len, losses), default=0) > 34
    stroke = {"symbolType": "stroke", "symbolStrokeWidth": 4, "symbolSize": 300, "symbolOpacity": 1}
    whole = {"columns": 1 if wide else 3, "labelLimit": 800}  # a long name cut short may be another's, cut short
    return alt.Legend(title=None, orient="bottom", **stroke, **whole)


def colours(losses: Sequence[str]) -> dict:
    """Encodings of `loss` as hue and dash, the same for a loss in every chart."""
    looks = look(losses)
    key = _legend(losses)
    return {
        "color": alt.Color("loss:N", legend=key).scale(domain=list(losses), range=[hue for hue, _ in looks.values()]),
        "strokeDash": alt.StrokeDash("loss:N", legend=key).scale(
            domain=list(losses), range=[list(dash) for _, dash in looks.values()]
        ),
    }


def _powers(values: pd.Series, most: int) -> list[float]:
    """Powers of ten for an axis over these values, about so many at most and evenly apart, 1 among them."""
    if values.empty:
        return [1.0]
    low, high = math.floor(math.log10(values.min())), math.ceil(math.log10(values.max()))
    step = max(1, -(-(high - low) // most))
    return [10.0**power for power in range(low, high + 1) if power % step == 0]


def _widths(losses: Sequence[str], widest: float = 7) -> alt.StrokeWidth:
    """The first loss widest and beneath: where losses agree, each still shows as a rim around the next."""
    widths = [widest - (widest - 1.5) * i / max(1, len(losses) - 1) for i in range(len(losses))]
    return alt.StrokeWidth("loss:O", legend=_legend(losses)).scale(type="ordinal", domain=list(losses), range=widths)


def _shown(chart: alt.Chart, losses: Sequence[str]) -> alt.Chart:
    return chart.add_params(alt.param(name="shown", value=list(losses))).transform_filter("indexof(shown, datum.loss) >= 0")


def profile(frame: pd.DataFrame, losses: Sequence[str], space: str, rivals: str) -> alt.Chart:
    """A gradient against the probability p, both axes logarithmic. A gradient of 0 or infinity has no place on such an axis."""
    rows = frame[(frame.rivals == rivals) & (frame[space].abs() < math.inf)]
    rows = rows.assign(size=rows[space].abs())[["loss", "p", "size", "value"]]
    # What has all but vanished would stretch the axis over thirty decades and flatten the rest.
    whole, rows = rows["size"], rows[rows["size"] > 1e-9]
    cut = ["0, or below 1e-9, not drawn" if (whole == 0).any() else "below 1e-9 not drawn"] if len(rows) < len(whole) else []
    return _shown(
        alt.Chart(rows, title=alt.Title(SPACES[space], subtitle=[PATHS[rivals], *cut]))
        .mark_line(strokeCap="round", point={"size": 70, "opacity": 0, "filled": True})
        .encode(
            x=alt.X("p:Q", title="p, the probability of the right token")
            .scale(type="log")
            .axis(values=_powers(rows.p, 5), labelExpr=POWERS, grid=True),
            y=alt.Y("size:Q", title=None).scale(type="log").axis(values=_powers(rows["size"], 7), labelExpr=POWERS),
            tooltip=[
                "loss:N",
                alt.Tooltip("p:Q", format=".3~g"),
                alt.Tooltip("size:Q", title="gradient", format=".4~g"),
                alt.Tooltip("value:Q", title="loss value", format=".4~g"),
            ],
            strokeWidth=_widths(losses),
            **colours(losses),
        ),
        losses,
    )


def budget(frame: pd.DataFrame, losses: Sequence[str], title: str) -> alt.LayerChart:
    """The share of the gradient that each bin of p gets, beside the share of the tokens that lie in it (bars)."""
    rows = frame.copy()
    rows["bin"] = [f"{low:g}–{high:g}" for low, high in zip(rows.p_low, rows.p_high, strict=True)]
    order = list(dict.fromkeys(rows["bin"]))
    x = alt.X("bin:O", sort=order, title="p, which the model gave the right token").axis(labelAngle=-40)
    bars = (
        alt.Chart(rows[rows.loss == rows.loss.iloc[0]])
        .mark_bar(color="#999999", opacity=0.28)
        .encode(
            x=x,
            y=alt.Y("share_of_tokens:Q", title="share").axis(format="%"),
            tooltip=[
                alt.Tooltip("bin:O", title="p"),
                "tokens:Q",
                alt.Tooltip("share_of_tokens:Q", title="share of tokens", format=".2%"),
            ],
        )
    )
    lines = (
        alt.Chart(rows)
        .mark_line(strokeWidth=2.2, point={"size": 45, "filled": True})
        .encode(
            x=x,
            y=alt.Y("share_of_gradient:Q", title="share"),
            tooltip=[
                "loss:N",
                alt.Tooltip("bin:O", title="p"),
                alt.Tooltip("share_of_gradient:Q", title="share of gradient", format=".2%"),
                alt.Tooltip("gradient:Q", title="mean |∂L/∂z|", format=".3~g"),
            ],
            **colours(losses),
        )
        .transform_filter("indexof(shown, datum.loss) >= 0")
    )
    shown = alt.param(name="shown", value=list(losses))
    subtitle = ["lines: share of the gradient", "bars: share of the tokens"]
    return alt.layer(bars, lines, title=alt.Title(title, subtitle=subtitle)).add_params(shown)


def _bands(
    rows: pd.DataFrame,
    losses: Sequence[str],
    x: alt.X,
    x_tip: alt.Tooltip,
    title: alt.Title,
    measured: str = "validation NLL, nats a token",
) -> alt.LayerChart:
    """Means over seeds as lines, with a band from the least seed to the greatest."""
    # Of one value alone the axis has one number, which Vega would round to a whole one.
    y = alt.Y("mean:Q", title=measured).scale(zero=False).axis(format=".6~g")
    band = alt.Chart(rows).mark_area(opacity=0.18).encode(x=x, y=alt.Y("low:Q").scale(zero=False), y2="high:Q")
    band = band.encode(color=colours(losses)["color"])
    tips = ["loss:N", x_tip, *[alt.Tooltip(f"{name}:Q", format=".4f") for name in ("mean", "low", "high")]]
    line = alt.Chart(rows).mark_line(point={"size": 40, "filled": True})
    line = line.encode(x=x, y=y, tooltip=tips, strokeWidth=_widths(losses, 5), **colours(losses))
    keep = "indexof(shown, datum.loss) >= 0"
    layers = alt.layer(band.transform_filter(keep), line.transform_filter(keep), title=title)
    return layers.add_params(alt.param(name="shown", value=list(losses)))


def _over_seeds(frame: pd.DataFrame, by: list[str], metric: str = "validation_nll") -> pd.DataFrame:
    grouped = frame.dropna(subset=[metric]).groupby(by, sort=False)[metric]
    return grouped.agg(mean="mean", low="min", high="max").reset_index()


def curves(frame: pd.DataFrame, table: pd.DataFrame, losses: Sequence[str], source: str) -> alt.LayerChart:
    """Validation NLL against steps, each loss at its best rate; the band spans its seeds."""
    best = table[table.source == source].set_index("loss").best_rate
    rows = frame[(frame.source == source) & (frame.rate == frame.loss.map(best))]
    tried = frame[frame.source == source].rate.unique()
    each = "each loss at its own best rate" if len(tried) > 1 else f"every loss at the rate {tried[0]:g}"
    return _bands(
        _over_seeds(rows, ["loss", "step"]),
        losses,
        alt.X("step:Q", title="step").scale(nice=False),
        alt.Tooltip("step:Q"),
        alt.Title(f"Learning on {source}", subtitle=[each, "bands span the seeds"]),
    )


def sweep(frame: pd.DataFrame, losses: Sequence[str], source: str) -> alt.LayerChart:
    """Validation NLL at the end against the learning rate; a rate of which a run diverged is out of the race, and not drawn."""
    rows = frame[(frame.source == source) & (frame.step == frame.step.max())]
    ended = (rows.diverged_at < 0) & (rows.validation_nll.abs() < math.inf)
    rows = rows[ended.groupby([rows.loss, rows.rate]).transform("all")]
    return _bands(
        _over_seeds(rows, ["loss", "rate"]),
        losses,
        alt.X("rate:Q", title="learning rate").scale(type="log").axis(values=sorted(frame.rate.unique()), format="~g"),
        alt.Tooltip("rate:Q", format="~g"),
        alt.Title(
            f"The rate sweep on {source}", subtitle=["final validation NLL where no seed diverged", "bands span the seeds"]
        ),
    )


def reliability(frame: pd.DataFrame, losses: Sequence[str], source: str, reading: str) -> alt.LayerChart:
    """How often a model was right, against how sure it was; calibrated on the diagonal; bins of few tokens are left out."""
    rows = frame[(frame.source == source) & (frame.reading == reading)]
    # A handful of tokens says nothing of a bin, and would draw the eye.
    rows = rows[rows.tokens >= 0.001 * rows.groupby("loss").tokens.transform("sum")]
    axis = alt.Scale(domain=[0, 1])
    x = alt.X("confidence:Q", title="how sure: the greatest probability").scale(axis)
    y = alt.Y("accuracy:Q", title="how often right").scale(axis)
    diagonal = alt.Chart().mark_rule(strokeDash=[3, 3], color="#777777", aria=False)
    diagonal = diagonal.encode(alt.XDatum(0).scale(axis), alt.YDatum(0).scale(axis), x2=alt.datum(1), y2=alt.datum(1))
    tips = ["loss:N", *[alt.Tooltip(f"{name}:Q", format=".3f") for name in ("confidence", "accuracy")], "tokens:Q"]
    line = alt.Chart(rows).mark_line(strokeWidth=2.2, point={"size": 40, "filled": True})
    line = line.encode(x=x, y=y, order="bin_low:Q", tooltip=tips, **colours(losses))
    said = ["as trained" if reading == "raw" else "after one temperature, fitted on validation"]
    layers = alt.layer(diagonal, line.transform_filter("indexof(shown, datum.loss) >= 0"))
    layers = layers.properties(title=alt.Title(f"Reliability on {source}", subtitle=said))
    return layers.add_params(alt.param(name="shown", value=list(losses)))


def rarity(frame: pd.DataFrame, losses: Sequence[str], source: str) -> alt.LayerChart:
    """Test NLL against how often training saw the token; the band spans the seeds. Bins of a few test tokens are left out."""
    rows = frame[(frame.source == source) & (frame.tokens >= ENOUGH)]
    rows = rows.assign(seen=[_decade(*each) for each in zip(rows.count_low, rows.count_high, strict=True)])
    order = list(dict.fromkeys(rows.sort_values("count_low").seen))
    return _bands(
        _over_seeds(rows, ["loss", "seen"], "test_nll"),
        losses,
        alt.X("seen:O", sort=order, title="how often training saw the token").axis(labelAngle=0, labelOverlap=True),
        alt.Tooltip("seen:O"),
        alt.Title(f"Rare tokens on {source}", subtitle=["the models that are tested", "bands span the seeds"]),
        "test NLL, nats a token",
    )


def _decade(low: int, high: int) -> str:
    return "never" if not high else f"{low:,}+"


def _dots(rows: pd.DataFrame, order: Sequence[str], value: str, axis: alt.X, form: str, labels: bool) -> alt.LayerChart:
    """A dot a row on an axis, with its number beside it, and a bar across its spread (value_q1, value_q3) if it has one."""
    y = alt.Y("what:N", sort=list(order), title=None).axis(labels=labels, labelLimit=300, ticks=False, domain=False, grid=True)
    base, groups = alt.Chart(rows).encode(y=y), list(dict.fromkeys(rows.group))
    key = alt.Legend(title=None, orient="bottom", symbolSize=120, symbolOpacity=1)
    # The yardstick grey, then apart from each other.
    hues = alt.Color("group:N", legend=key).scale(domain=groups, range=[HUES[i] for i in (7, 3, 0, 1)][: len(groups)])
    layers = [base.mark_circle(size=60, opacity=1).encode(axis, hues)]
    if f"{value}_q1" in rows:
        span = base.mark_rule(strokeWidth=3, opacity=0.6).encode(alt.X(f"{value}_q1:Q"), alt.X2(f"{value}_q3:Q"), hues)
        one = alt.Chart().mark_rule(strokeDash=[3, 3], color="#777777").encode(x=alt.datum(1))
        layers = [*layers, one, span]
        # Beside the bar, which may reach beyond the dot.
        axis = alt.X(f"{value}_q3:Q")
    return alt.layer(*layers, *beside(base, axis, alt.Text(f"{value}:Q", format=form)))


def beside(base: alt.Chart, x: alt.X, text: alt.Text) -> list[alt.Chart]:
    """A number to the right of a mark: two layers, for it has a rim, so that no line runs through it."""
    looks = {"stroke": "white", "strokeWidth": 3}, {"color": "#333333"}
    return [base.mark_text(align="left", dx=7, fontSize=10, **look).encode(x, text=text) for look in looks]


def heads(frame: pd.DataFrame) -> alt.VConcatChart:
    """What heads cost, a column a shape: above, time relative to bare products, with its quartiles; below, memory.

    Columns: shape, what, group, ratio, ratio_q1, ratio_q3, peak_mb. Rows without a time have no dot.
    """
    rows, made = frame.dropna(subset=["ratio"]).assign(memory=frame.peak_mb.clip(lower=1)), []
    for value, title, form, ticks in (
        ("ratio", "time / three bare products", ".2f", [0.5, 1, 2, 4, 8, 16]),
        ("memory", "memory, MB", ",.0f", [1, 10, 100, 1000, 10_000]),
    ):
        if rows[value].isna().all():  # memory is read from Linux alone
            continue
        span = [0.7 * rows[value].min(), 5 * rows[value].max()]  # one for all shapes, with room for the last number
        axis = alt.X(f"{value}:Q", title=title).scale(type="log", domain=span, nice=False).axis(values=ticks, format=",~g")
        columns = []
        for shape, part in rows.groupby("shape", sort=False):
            one = _dots(part, list(dict.fromkeys(frame.what)), value, axis, form, labels=not columns)
            name = " × ".join(f"{int(size):,}" for size in str(shape).split(" x ")) if value == "ratio" else ""
            columns.append(
                one.properties(title=alt.Title(name, fontSize=12, frame="group"), width=200, height=17 * frame.what.nunique())
            )
        made.append(alt.hconcat(*columns, spacing=12, bounds="flush"))
    return alt.vconcat(*made).configure_view(strokeOpacity=0.3).configure_title(anchor="start")


def marked(chart: alt.Chart | alt.LayerChart, rows: pd.DataFrame, x: str, y: str, start: int) -> alt.LayerChart:
    """A chart with a dot on each of the rows whose column `at` is the parameter `at`, which a page's slider sets."""
    # One grey for all: a second encoding of the losses' colour would fight with the chart's own legend.
    dots = alt.Chart(rows).mark_point(size=110, filled=True, opacity=1, color="#777777", stroke="white", strokeWidth=1.2)
    dots = dots.encode(alt.X(f"{x}:Q"), alt.Y(f"{y}:Q")).transform_filter("datum.at == at")
    return alt.layer(chart, dots).add_params(alt.param(name="at", value=start))


def _title(chart: alt.Chart | alt.LayerChart) -> alt.Title:
    """A chart's title, of no text if it has none, with the lines under it as a list."""
    given = chart.title
    title = given.copy() if isinstance(given, alt.TitleParams) else alt.Title("" if given is alt.Undefined else given)
    below = title.subtitle
    title.subtitle = [] if below is alt.Undefined else [below] if isinstance(below, str) else [*below]
    return title


def level(charts: Sequence[alt.Chart | alt.LayerChart]) -> list[alt.Chart | alt.LayerChart]:
    """The charts with as many lines under one title as under another, so that side by side they are level."""
    titles = [_title(chart) for chart in charts]
    most = max(len(title.subtitle) for title in titles)
    for title in titles:
        title.subtitle += [" "] * (most - len(title.subtitle))
    return [chart.properties(title=title) if title.text else chart for chart, title in zip(charts, titles, strict=True)]


def grid(
    charts: Sequence[alt.Chart | alt.LayerChart], columns: int = 2, width: int = 430, height: int = 280
) -> alt.ConcatChart:
    """Charts side by side at a fixed size, for a picture file."""
    sized = [chart.properties(width=width, height=height) for chart in level(charts)]
    placed = alt.concat(*sized, columns=columns).configure_view(strokeOpacity=0.3)
    # A number at the end of an axis would lift the title.
    return placed.configure_title(anchor="start", frame="group").configure_axisY(labelFlush=True)


def write_png(chart: alt.TopLevelMixin, path: pathlib.Path, scale: float = 1.5) -> pathlib.Path:
    """A chart as a PNG file, rendered in this process."""
    import vl_convert

    png = vl_convert.vegalite_to_png(chart.to_dict(), vl_version=vegalite_version(), scale=scale)
    return write_bytes(path, png)


def vegalite_version() -> str:
    """The Vega-Lite version that altair writes, as vl-convert names it: "6.4"."""
    return ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
