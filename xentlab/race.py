"""A fair race: every loss trains the same model on the same tokens, at its own best learning rate, over several seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from xentlab.catalogue import resolve_all
from xentlab.contract import LabError, Loss, link_of
from xentlab.metrics import SMOOTHING, bits_per_byte, expected_calibration_error, mean_and_interval, score, smooth
from xentlab.models import logits
from xentlab.recipe import Recipe
from xentlab.sources import MarkovSource, Source, Text
from xentlab.training import Trained, joined, program, train, windows

if TYPE_CHECKING:
    import pandas as pd

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
EXTENSIONS = 6  # of a grid of rates, a step of the grid each
# What is measured on the test part, for each run of the best rate; the table gives mean and interval of each.
TEST_METRICS = ("test_nll", "bits_per_byte", "accuracy", "calibration_error", "kl_to_law")


@dataclasses.dataclass(frozen=True)
class Race:
    """A finished race.

    curves: one row a loss, rate, seed and block: source, loss, rate, seed, step, train_loss (the loss's own unit),
    validation_nll (nats, through its own link), diverged_at (-1 if never).
    table: one row a loss: source, loss, best_rate, rate_at_edge (the best rate is the grid's least or greatest, so a
    better one may lie outside), runs, diverged (runs of the whole grid), validation_nll, smoothing (the mean share of
    the uniform that validation chose), and each of `TEST_METRICS` with _low and _high, its 95% interval over seeds.
    tests: one row a loss and seed, at its best rate: source, loss, seed and each of `TEST_METRICS`. The same seed began with
    the same parameters and saw the same batches whatever the loss: rows of one seed are a pair.
    pairs: `paired` of the tests.
    predictors: each loss's model at its best rate and first seed; a loss that diverged everywhere has none.
    """

    curves: pd.DataFrame
    table: pd.DataFrame
    tests: pd.DataFrame
    pairs: pd.DataFrame
    predictors: dict[str, Predictor]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained model as its loss means it to be read: through the loss's link, mixed with a share of the uniform.

    Called with tokens [..., T], it gives the probability of what follows each position [..., T, V].
    """

    model: Any
    link: Callable
    smoothing: float

    def __call__(self, tokens):
        return _predict(self.link, self.model, jnp.float32(self.smoothing), jnp.asarray(tokens))


@eqx.filter_jit
def _predict(link, model, share, tokens):
    return smooth(link(logits(model, tokens)), share)


def race(
    losses: Iterable[str | Loss],
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = LEARNING_RATES,
    seeds: Sequence[int] = SEEDS,
    steps: int = 400,
    progress: Callable[[str, int, int], None] | None = None,
    mesh: Mesh | None = None,
    extensions: int = EXTENSIONS,
    **recipe: Any,
) -> Race:
    """Trains each loss at every rate and seed, takes its best rate by mean validation NLL, and tests that.

    A grid of rates grows past the edge on which the best one sits, so that no loss is held back by where it began.
    losses: names or callables. source: `MarkovSource`, `Text`, or an object with their members. model: a name with
    options, or a function (vocab, key) -> model. recipe: the other fields of `recipe.Recipe`. progress(loss, done,
    total) is called after every block, in steps of each run. mesh: of devices that share each run, as `training.train` has
    it. extensions: how many rates a grid of more than one may grow by, one step at a time. Raises `LabError` for bad arguments.

    >>> from xentlab.sources import MarkovSource
    >>> result = race(["nll"], MarkovSource(vocab=4, tokens=2000), "bigram", [0.1], [0, 1], steps=20)
    >>> result.table[["loss", "best_rate", "runs", "diverged"]].values.tolist()
    [['nll', 0.1, 2, 0]]
    """
    import pandas as pd

    found = resolve_all(losses)
    plan = Recipe(steps=steps, **_known(recipe))
    for what, values in (("learning rates", learning_rates), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise LabError(f"the {what} repeat: {list(values)}. Each counts once.")
    if extensions < 0:
        raise LabError(f"a grid grows by some rates or by none; got extensions={extensions}.")
    examine = _examiner(source, plan.window)
    curves, rows, tests, predictors = [], [], [], {}
    for name, loss in found.items():
        report = (lambda done, name=name: progress(name, done, steps)) if progress else None
        compiled = program(loss, source, model, plan, mesh)
        at = lambda rates, loss=loss, report=report, compiled=compiled: train(
            loss, source, model, rates, seeds, plan, report, mesh, compiled
        )
        trained = _tuned(at, learning_rates, extensions)
        curves.append(_curves(name, source.name, trained))
        runs = np.flatnonzero(trained.rates == best_rate(trained)).tolist()
        chosen = [Predictor(trained.model(run), link_of(loss), SMOOTHING[trained.smoothing[run]]) for run in runs]
        tested = [examine(predictor) for predictor in chosen]
        rows.append({"source": source.name, "loss": name, **_summarised(trained, runs, chosen, tested)})
        each = zip(runs, tested, strict=True)
        tests += [{"source": source.name, "loss": name, "seed": int(trained.seeds[run]), **scores} for run, scores in each]
        predictors.update({name: chosen[0]} if chosen else {})
    measured = pd.DataFrame(tests, columns=["source", "loss", "seed", *TEST_METRICS])
    return Race(pd.concat(curves, ignore_index=True), pd.DataFrame(rows), measured, paired(measured), predictors)


def _tuned(at: Callable[[list[float]], Trained], rates: Sequence[float], extensions: int) -> Trained:
    """The grid, and further rates beyond its edge for as long as the best one sits there, by the grid's own step there.

    Where every rate has a run that diverged, smaller ones are tried.
    """
    found = at(rates)
    for _ in range(extensions):
        grid, best = np.unique(found.rates), best_rate(found)
        if len(grid) < 2 or grid[0] < best < grid[-1]:
            break
        further = grid[-1] * (grid[-1] / grid[-2]) if best == grid[-1] else grid[0] * (grid[0] / grid[1])
        found = joined(found, at([float(f"{further:.6g}")]))
    return found


def paired(tests: pd.DataFrame, metric: str = "test_nll") -> pd.DataFrame:
    """By how much each loss differs from the first one, seed by seed: a row a source and other loss.

    tests: source, loss, seed and the metric. Columns: source, loss, against ("nll" if it is there, else the first loss),
    metric, seeds (those that both have), difference (the mean), low and high (95%, bootstrap over seeds, percentiles; NaN for
    a single seed), tells_apart (whether the interval leaves out 0).

    >>> import pandas as pd
    >>> scores = {"loss": ["nll", "nll", "mae", "mae"], "seed": [0, 1, 0, 1], "test_nll": [1.0, 2.0, 2.0, 4.0]}
    >>> pairs = paired(pd.DataFrame(scores).assign(source="chain"))
    >>> pairs[["loss", "against", "difference", "low", "high", "tells_apart"]].values.tolist()  # by 1 and by 2
    [['mae', 'nll', 1.5, 1.0, 2.0, True]]
    """
    import pandas as pd
    from scipy.stats import bootstrap

    rows = []
    for source, here in tests.groupby("source", sort=False):
        by_seed = here.pivot(index="seed", columns="loss", values=metric)
        against = "nll" if "nll" in by_seed else here.loss.iloc[0]
        for loss in dict.fromkeys(here.loss):
            differences = (by_seed[loss] - by_seed[against]).dropna().to_numpy()
            if loss == against or not len(differences):
                continue
            row = {"source": source, "loss": loss, "against": against, "metric": metric, "seeds": len(differences)}
            low = high = float("nan")
            if len(differences) > 1:
                drawn = bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
                low, high = map(float, drawn.confidence_interval)
            apart = low > 0 or high < 0
            rows.append(row | {"difference": float(differences.mean()), "low": low, "high": high, "tells_apart": apart})
    columns = ["source", "loss", "against", "metric", "seeds", "difference", "low", "high", "tells_apart"]
    return pd.DataFrame(rows, columns=columns)


def _known(recipe: dict[str, Any]) -> dict[str, Any]:
    allowed = {field.name for field in dataclasses.fields(Recipe)} - {"steps"}
    for key in recipe:
        if key not in allowed:
            raise LabError(f"a race has no option {key!r}; a recipe's options: {', '.join(sorted(allowed))}.")
    return recipe


def _curves(name: str, source: str, trained: Trained) -> pd.DataFrame:
    import pandas as pd

    runs, blocks = trained.train_loss.shape
    return pd.DataFrame(
        {
            "source": source,
            "loss": name,
            "rate": np.repeat(trained.rates, blocks),
            "seed": np.repeat(trained.seeds, blocks),
            "step": np.tile(trained.steps, runs),
            "train_loss": trained.train_loss.reshape(-1),
            "validation_nll": trained.validation_nll.reshape(-1),
            "diverged_at": np.repeat(trained.diverged_at, blocks),
        }
    )


def best_rate(trained: Trained) -> float:
    """The rate with the least mean validation NLL at the end, or NaN if every rate has a run that diverged."""
    final = np.where(trained.diverged_at >= 0, np.inf, trained.validation_nll[:, -1])
    final = np.where(np.isfinite(final), final, np.inf)
    rates = np.unique(trained.rates)
    means = np.array([final[trained.rates == rate].mean() for rate in rates])
    return float(rates[np.argmin(means)]) if np.isfinite(means).any() else float("nan")


def _summarised(trained: Trained, runs: list[int], chosen: list[Predictor], tested: list[dict]) -> dict[str, Any]:
    best = best_rate(trained)
    row: dict[str, Any] = {
        "best_rate": best,
        "rate_at_edge": len(np.unique(trained.rates)) > 1 and best in (trained.rates.min(), trained.rates.max()),
        "runs": len(runs),
        "diverged": int((trained.diverged_at >= 0).sum()),
        "validation_nll": trained.validation_nll[runs, -1].mean() if len(runs) else float("nan"),
        "smoothing": np.mean([each.smoothing for each in chosen]) if chosen else float("nan"),
    }
    for metric in TEST_METRICS:
        values = np.array([result[metric] for result in tested]) if tested else np.array([np.nan])
        row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = mean_and_interval(values)
    return row


def _examiner(source: Source, window: int) -> Callable[..., dict[str, float]]:
    """A function (predictor) -> the metrics of the test part; it compiles once a link and kind of model."""
    held_out = jnp.asarray(windows(source.split("test"), window))
    targets = np.asarray(held_out[:, 1:]).reshape(-1)

    def of_windows(link, model, share, batch):
        predictions = _predict(link, model, share, batch[:, :-1])
        return score(predictions, batch[:, 1:], _law(source, batch[:, :-1]))

    @eqx.filter_jit
    def scores(link, model, share):
        # A few windows at a time: [all tokens, V] of a large vocabulary would not fit.
        one = lambda each: jax.tree.map(lambda leaf: leaf[0], of_windows(link, model, share, each[None]))
        return jax.lax.map(one, held_out, batch_size=min(64, len(held_out)))

    def examine(predictor):
        found = scores(predictor.link, predictor.model, jnp.float32(predictor.smoothing))
        each = {key: np.asarray(value).reshape(-1) for key, value in found.items()}
        known = ~np.isnan(each["kl"])
        return {
            "test_nll": float(each["nll"].mean(dtype=np.float64)),
            "bits_per_byte": np.nan
            if source.token_bytes is None
            else bits_per_byte(each["nll"], np.asarray(source.token_bytes)[targets]),
            "accuracy": float(each["correct"].mean()),
            "calibration_error": expected_calibration_error(each["confidence"], each["correct"]),
            "kl_to_law": float(each["kl"][known].mean()) if known.any() else np.nan,
        }

    return examine


def _law(source: Source, tokens):
    """The true law after each position of windows [W, T], NaN where a window has not shown a whole context yet."""
    if getattr(source, "law", None) is None:
        return None
    time, order = tokens.shape[1], source.order
    if time < order:
        return None
    contexts = jnp.stack([tokens[:, place : time - order + place + 1] for place in range(order)], axis=-1)
    law = source.law(contexts)
    unknown = jnp.full((*law.shape[:1], order - 1, law.shape[-1]), jnp.nan, law.dtype)
    return jnp.concatenate([unknown, law], axis=1)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A source, the model that fits it, and the rates and steps that the model's losses may need."""

    source: Source
    model: str
    learning_rates: tuple[float, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class StagedRace:
    """A stage and the race that was run on it."""

    stage: Stage
    race: Race

    @property
    def source(self) -> Source:
        """The stage's source."""
        return self.stage.source


def standard_stages(text: Text, seed: int = 0, quick: bool = False) -> list[Stage]:
    """The report's two races: real text, and a chain whose law is known. quick: tiny ones, to see that all works."""
    markov = MarkovSource(seed=seed, tokens=20_000 if quick else 200_000)
    if quick:
        return [
            Stage(text, "mlp(context=2, width=8, inner=16, features=16)", (0.01,), 12),
            Stage(markov, "bigram", (0.1,), 12),
        ]
    return [
        Stage(text, "mlp(context=6, width=24, inner=96, features=48)", (1e-3, 4e-3, 1.6e-2, 6.4e-2), 160),
        Stage(markov, "bigram", (1e-2, 4e-2, 0.16, 0.64), 240),
    ]


def run_stage(
    stage: Stage,
    losses: Iterable[str | Loss],
    seed: int = 0,
    quick: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> StagedRace:
    """Runs the race of one stage; progress(what, done, total) names the source and the loss."""
    tell = (lambda loss, done, total: progress(f"{stage.source.name}: {loss}", done, total)) if progress else None
    seeds = tuple(range(seed, seed + (2 if quick else 3)))
    blocks = 4 if quick else 16
    rates = stage.learning_rates
    found = race(losses, stage.source, stage.model, rates, seeds, stage.steps, tell, blocks=blocks)
    return StagedRace(stage, found)
