"""What the literature reports of a loss, tried again: what experiments of that kind share.

A race picks rates by validation NLL. Most reports are of accuracy, and the rate that is best for the one is not for the other:
so each measure here is taken at the rate that is best by itself, on validation.
"""

from __future__ import annotations

import inspect
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from xentlab import defaults
from xentlab.catalogue import resolve
from xentlab.charts import HUES, write_png
from xentlab.console import progress
from xentlab.contract import link_of
from xentlab.examine import law_after, predict
from xentlab.metrics import SMOOTHING, score
from xentlab.program import programs, windows
from xentlab.race import beyond
from xentlab.recipe import Recipe
from xentlab.results import paired
from xentlab.runs import new_folder, record, write_frame, write_record
from xentlab.sources import Source
from xentlab.training import Trained, train

if TYPE_CHECKING:
    import altair as alt
    import pandas as pd


SAID = {1: "As expected", -1: "Against what is reported", 0: "Not told apart at these seeds"}
METRICS = {"test_nll": "test NLL", "accuracy": "accuracy", "kl_to_law": "KL to the law"}
DIFFERENCE = "{loss}'s {metric} minus {against}'s ({source})"
CHANGE = "the change of {source}'s {metric} minus nll's from ({against}) to ({loss})"  # of the paired `gaps`


def trials(
    arm: str,
    tell: defaults.Progress,
    losses: Sequence[str],
    source: Source,
    model: str | Callable,
    rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    one_rate: float | None = None,
    **recipe: Any,
) -> pd.DataFrame:
    """A row a loss and seed: test_nll and kl_to_law at the rate of least validation NLL, accuracy at that of most accuracy.

    Columns: source (the arm), loss, seed, the three, rate, rate_for_accuracy, at_edge (whether either of them is an end of the
    grid, which grows as a race's does). Seeds are paired as in a race. A loss that diverged at every rate has no rows. The law
    is asked for of chains of order 1 alone. one_rate: has further rows, `at_one_rate` of the arm, where all losses run at it.
    recipe: as of a race.
    """
    import pandas as pd

    whole_recipe = Recipe(steps=steps, **recipe)
    training_of, measured = programs(source, model, whole_recipe), _measurer(source, whole_recipe.window)

    def tried(name):
        loss = resolve(name)
        compiled, link = training_of(loss), link_of(loss)
        told = lambda done: tell(f"{arm}: {name}", done, steps)
        at = lambda rates: measured(link, train(loss, source, model, rates, seeds, whole_recipe, told, compiled=compiled))
        runs = _grown(at, sorted({*rates, one_rate} - {None}))
        chosen = {arm: _best(runs), at_one_rate(arm): one_rate and _best(runs[runs.rate == one_rate])}
        for place, best in chosen.items():
            if best:
                by_nll, by_accuracy = (runs[runs.rate == rate].set_index("seed") for rate in best)
                frame = by_nll[["test_nll", "kl_to_law", "rate"]].assign(
                    accuracy=by_accuracy.accuracy,
                    rate_for_accuracy=best[1],
                    at_edge=place == arm and _beyond(runs, best) != set(),
                )
                yield frame.reset_index().assign(source=place, loss=name)

    frames = [frame for name in losses for frame in tried(name)]
    # An arm's rows together, as a picture has them.
    return pd.concat(sorted(frames, key=lambda frame: frame.source.iloc[0] != arm), ignore_index=True)


def at_one_rate(arm: str) -> str:
    """The name of an arm where all losses run at one rate."""
    return f"{arm}, one rate"


def _measurer(source: Source, window: int) -> Callable[[Callable, Trained], pd.DataFrame]:
    """A function of a link and runs -> a row each: validation_nll, validation_accuracy, test_nll, accuracy, kl_to_law."""
    import pandas as pd

    parts = {part: jax.device_put(windows(source.split(part), window)) for part in ("validation", "test")}

    def of_windows(link, model, share, tokens):
        found = score(jnp.log(predict(link, model, share, tokens[:, :-1])), tokens[:, 1:], law_after(source, tokens[:, :-1]))
        return {name: jnp.mean(found[name]) for name in ("nll", "correct", "kl")}

    @eqx.filter_jit
    def of_run(link, model, share):
        return {part: of_windows(link, model, share, tokens) for part, tokens in parts.items()}

    def measured(link, trained):
        rows = []
        for run, (rate, seed) in enumerate(zip(trained.rates, trained.seeds, strict=True)):
            found = of_run(link, trained.model(run), jnp.float32(SMOOTHING[trained.smoothing[run]]))
            held, test = ({name: float(x) for name, x in found[part].items()} for part in parts)
            row = {"rate": rate, "seed": seed, "diverged": trained.diverged_at[run] >= 0}
            row |= {"validation_nll": held["nll"], "validation_accuracy": held["correct"]}
            rows.append(row | {"test_nll": test["nll"], "accuracy": test["correct"], "kl_to_law": test["kl"]})
        return pd.DataFrame(rows)

    return measured


def _best(runs: pd.DataFrame) -> tuple[float, float] | None:
    """The rates of least validation NLL and of most validation accuracy among those at which no run diverged."""
    whole = runs[~runs.groupby("rate").diverged.transform("any") & np.isfinite(runs.validation_nll)]
    # By NLL first: where rates have the same accuracy, the earliest row of them is taken.
    means = whole.groupby("rate")[["validation_nll", "validation_accuracy"]].mean().sort_values("validation_nll")
    return (float(means.validation_nll.idxmin()), float(means.validation_accuracy.idxmax())) if len(means) else None


def _beyond(runs: pd.DataFrame, best: tuple[float, float] | None) -> set[float]:
    """The rates a step outside of the grid at the ends on which a best one sits; below it where all diverged."""
    return {further for each in best or (float("nan"),) if (further := beyond(runs.rate.to_numpy(), each)) is not None}


def _grown(at: Callable[[Sequence[float]], pd.DataFrame], rates: Sequence[float]) -> pd.DataFrame:
    import pandas as pd

    runs = at(rates)
    for _ in range(defaults.EXTENSIONS):
        if not (further := _beyond(runs, _best(runs))):
            break
        runs = pd.concat([runs, at(sorted(further))], ignore_index=True)
    return runs


def verdicts(pairs: pd.DataFrame, reported: Mapping[tuple[str, str], int], what: str = DIFFERENCE) -> list[str]:
    """Whether differences go the way that is reported of them: a sentence each, which the interval decides.

    pairs: `results.paired`. reported: by source and loss, the sign of the difference that is reported, +1 or -1. what: the
    difference in words, from the columns of pairs. Each interval is a 95% one by itself: of twenty, one may miss by chance.

    >>> import pandas as pd
    >>> row = {"source": "text", "loss": "mae", "against": "nll", "metric": "test_nll", "seeds": 5}
    >>> pairs = pd.DataFrame([row | {"difference": 0.25, "low": 0.1, "high": 0.4}])
    >>> verdicts(pairs, {("text", "mae"): 1})[0]
    "As expected: mae's test NLL minus nll's (text) is +0.25, [+0.1, +0.4] over 5 seeds; above 0 is reported."
    >>> verdicts(pairs, {("text", "mae"): -1})[0][:24]
    'Against what is reported'
    """
    rows = {(row["source"], row["loss"]): row for row in pairs.to_dict("records")}
    sentences = []
    for (source, loss), sign in reported.items():
        row = rows.get((source, loss))
        if row is None:  # `paired` leaves out what has no finished runs
            sentences.append(f"Not measured: {loss} ({source}). Every rate had a run that diverged.")
            continue
        found = (row["low"] > 0) - (row["high"] < 0)
        named = what.format(**row | {"metric": METRICS.get(row["metric"], row["metric"])})
        numbers = f"{row['difference']:+.3g}, [{row['low']:+.3g}, {row['high']:+.3g}] over {row['seeds']} seeds"
        sentences.append(f"{SAID[found * sign]}: {named} is {numbers}; {'above' if sign > 0 else 'below'} 0 is reported.")
    return sentences


def gaps(tests: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Each loss's distance from nll as tests of their own, whose `results.paired` says how it changes from source to source.

    tests: source, loss, seed and the metric. Returns the same columns with their parts exchanged: the source is the loss,
    the loss is where it was tested, the metric is its own less nll's at the same seed.

    >>> import pandas as pd
    >>> tests = pd.DataFrame({"source": "text", "loss": ["nll", "mae"], "seed": 0, "accuracy": [0.5, 0.25]})
    >>> gaps(tests, "accuracy").values.tolist()
    [['mae', 'text', 0, -0.25]]
    """
    base = tests[tests.loss == "nll"].set_index(["source", "seed"])[metric]
    rest = tests[tests.loss != "nll"]
    there = base.reindex(list(zip(rest.source, rest.seed, strict=True))).to_numpy()
    return rest.assign(source=rest.loss, loss=rest.source, **{metric: rest[metric].to_numpy() - there})[
        ["source", "loss", "seed", metric]
    ]


def nll_trained(source: Source, model: str | Callable, rate: float, seeds: Sequence[int], **recipe: Any) -> Callable:
    """A function (vocab, key) -> the model that nll trained from the seed of that key, so that losses are paired by seeds.

    Of the key of another seed, all NaN.
    """
    models = train(resolve("nll"), source, model, [rate], seeds, Recipe(**recipe)).models
    arrays, rest = eqx.partition(models, eqx.is_inexact_array)
    keys = jax.vmap(lambda seed: jax.random.key_data(jax.random.key(seed)))(np.asarray(seeds, np.uint32))

    def make(vocab, key):
        own = jnp.all(keys == jax.random.key_data(key)[None], axis=-1)
        return eqx.combine(jax.tree.map(lambda leaf: jnp.where(own.any(), leaf[jnp.argmax(own)], jnp.nan), arrays), rest)

    return make


def picture(pairs: pd.DataFrame, title: str) -> alt.FacetChart:
    """Each paired difference with its interval, by source, in the order of the rows: a panel a metric."""
    import altair as alt

    losses, sources = list(dict.fromkeys(pairs.loss)), list(dict.fromkeys(pairs.source))
    named = {metric: f"{METRICS[metric]} minus {pairs.against.iloc[0]}'s" for metric in dict.fromkeys(pairs.metric)}
    dots = alt.Chart().encode(
        x=alt.X("source:N", sort=sources, title=None).axis(labelAngle=-25),
        xOffset=alt.XOffset("loss:N", sort=losses),
        color=alt.Color("loss:N", title=None, legend=alt.Legend(orient="bottom", symbolOpacity=1)).scale(
            domain=losses, range=HUES[1 : 1 + len(losses)]
        ),
    )
    layers = alt.layer(
        alt.Chart().mark_rule(strokeDash=[3, 3], color="#777777").encode(y=alt.datum(0)),
        dots.mark_rule(strokeWidth=3, opacity=0.6).encode(y=alt.Y("low:Q"), y2="high:Q"),
        dots.mark_circle(size=60, opacity=1).encode(y=alt.Y("difference:Q", title="mean and 95% interval")),
        data=pairs.assign(metric=pairs.metric.map(named)),
    ).properties(width=max(240, 24 * len(sources) * len(losses)), height=230)
    panels = alt.Facet("metric:N", sort=list(named.values()), title=None, header=alt.Header(labelFontSize=12))
    return layers.facet(facet=panels, columns=1 if len(sources) > 4 else 2, title=title).resolve_scale(y="independent")


def main(
    kind: str,
    run: Callable[..., pd.DataFrame],
    verdicts: Callable[[pd.DataFrame], list[str]],
    metrics: Sequence[str],
    arguments: dict[str, Any],
    sources: Sequence[Source],
    out: pathlib.Path | None,
) -> None:
    """Runs an experiment, writes tests, differences, picture and record into a folder, prints means and verdicts.

    arguments: of run, where they are not its defaults. sources: what it trains on.
    """
    import pandas as pd

    every = {name: parameter.default for name, parameter in inspect.signature(run).parameters.items() if name != "tell"}
    begun = time.perf_counter()
    with progress() as tell:
        frame = run(**arguments, tell=tell)
    folder = new_folder(kind, out)
    pairs = pd.concat([paired(frame, metric) for metric in metrics], ignore_index=True)
    write_frame(folder, "tests", frame)
    write_frame(folder, "pairs", pairs)
    write_png(picture(pairs, kind.replace("-", " ")), folder / "differences.png")
    said = verdicts(frame)
    described = [each.describe() for each in sources]
    write_record(folder, record(every | arguments, described, time.perf_counter() - begun, verdicts=said))
    means = frame.groupby(["source", "loss"], sort=False)[[*metrics, "rate", "rate_for_accuracy", "at_edge"]].mean()
    note = ["These are not the full sizes: the verdicts show nothing."] if arguments else []
    print(means.round(4).to_string(), *said, *note, f"Wrote {folder}.", sep="\n")
