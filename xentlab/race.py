"""A fair race: every loss trains the same model on the same tokens, at its own best learning rate, over several seeds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from xentlab import defaults
from xentlab.catalogue import is_catalogued, program_of, resolve_all
from xentlab.contract import LabError, Loss, check_link, link_of, name_of
from xentlab.examine import READINGS, TEST_METRICS, Examined, Predictor, examiner
from xentlab.layout import Layout
from xentlab.metrics import SMOOTHING, mean_and_interval
from xentlab.names import FUNCTIONS, is_own, unplaced
from xentlab.program import program, windows
from xentlab.recipe import Recipe
from xentlab.sources import Source, checked_source, identity
from xentlab.training import Trained, check_grid, joined, train

if TYPE_CHECKING:
    import pandas as pd

    from xentlab.checkpoints import Checkpoints

SEEDS = (0, 1, 2)
PAIRED = ("test_nll", "tempered_nll")  # what the losses of a seed are compared by
SHARES = ("accuracy", "calibration_error", "tempered_calibration_error")  # metrics that are at most 1


@dataclasses.dataclass(frozen=True, repr=False)
class Race:
    """A finished race.

    curves: one row a loss, rate, seed and block: source, loss, rate, seed, step, train_loss (the loss's own unit),
    validation_nll (nats, through its own link), diverged_at (-1 if never).
    table: one row a loss: source, loss, uniform_nll (log V, what a guess costs), best_rate, rate_at_edge (it is the grid's
    least or greatest, so a better one may lie outside), runs, diverged (runs of the whole grid), validation_nll, smoothing
    (the mean share of the uniform that validation chose), and each of `TEST_METRICS` with _low and _high, its 95% interval
    over seeds, cut to what the metric can be.
    tests: one row a loss and seed, at its best rate: source, loss, seed and each of `TEST_METRICS`. The same seed began with
    the same parameters and saw the same batches whatever the loss: rows of one seed are a pair.
    pairs: `paired` of the tests, by test_nll and by tempered_nll.
    reliability: how sure and how right, a row a loss, reading (raw, tempered) and bin of confidence, all seeds together:
    source, loss, reading, bin_low, bin_high, tokens, confidence, accuracy.
    frequency: where rare tokens make the difference, a row a loss, seed and half decade of its count in the training part:
    source, loss, seed, count_low, count_high, tokens, test_nll, tempered_nll.
    predictors: each loss's model at its best rate and first seed; a loss of which a run
    diverged at every rate has none.
    """

    curves: pd.DataFrame
    table: pd.DataFrame
    tests: pd.DataFrame
    pairs: pd.DataFrame
    reliability: pd.DataFrame
    frequency: pd.DataFrame
    predictors: dict[str, Predictor]

    def __repr__(self) -> str:
        return f"Race of {', '.join(self.table.loss)}: {', '.join(self.frames())}, predictors"

    def frames(self) -> dict[str, pd.DataFrame]:
        """The frames by name."""
        frames = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: frame for name, frame in frames.items() if name != "predictors"}


def race(
    losses: Iterable[str | Loss],
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = defaults.LEARNING_RATES,
    seeds: Sequence[int] = SEEDS,
    steps: int = defaults.STEPS,
    progress: Callable[[str, int, int], None] | None = None,
    mesh: Mesh | None = None,
    extensions: int = defaults.EXTENSIONS,
    checkpoints: Checkpoints | None = None,
    laid_out: Callable[[Layout], None] = lambda layout: None,
    **recipe: Any,
) -> Race:
    """Trains each loss at every rate and seed, takes its best rate by mean validation NLL, and tests that.

    A grid of rates grows past the edge on which the best one sits, so that no loss is held back by where it began.
    losses: names or callables. source: `MarkovSource`, `Text`, or an object with their members. model: a name with
    options, or a function (vocab, key) -> model. learning_rates, seeds: each loss trains with every pair of them, as
    `training.train` has it. steps: of each run. recipe: the other fields of `recipe.Recipe`. progress(loss, done,
    total) is called after every block, in steps of each run. mesh: of devices that take different runs or share each, as
    `training.train` has it. extensions: how many rates a grid of more than one may grow by, one step at a time. checkpoints:
    where runs are kept between blocks, so that the same call later goes on from there and finds the same. laid_out is told how
    each grid lies on the machine. Raises `LabError` for bad arguments.

    >>> from xentlab.sources import MarkovSource
    >>> result = race(["nll"], MarkovSource(vocab=4, tokens=2000), "bigram", [0.1], [0, 1], steps=20)
    >>> result.table[["loss", "best_rate", "runs", "diverged"]].values.tolist()
    [['nll', 0.1, 2, 0]]
    """
    found, plan = planned(losses, source, model, learning_rates, seeds, steps, mesh, extensions, **recipe)
    examine = examiner(source, plan.window, plan.validation_tokens)
    finished = []
    # As the losses' files are now, when they have been imported: one may be edited while another loss trains.
    all_made = {name: _made(loss, seeds, source, model, plan) if checkpoints else {} for name, loss in found.items()}
    for name, loss in found.items():
        report = (lambda done, name=name: progress(name, done, steps)) if progress else None
        compiled, grids, made = program(loss, source, model, plan, mesh), count(), all_made[name]
        link = link_of(loss)  # once: what is compiled of a link goes by its identity

        def at(rates, name=name, loss=loss, report=report, compiled=compiled, grids=grids, made=made):
            rated = made | {"learning rates": [float(rate) for rate in rates]}
            place = checkpoints.grid(name, next(grids), rated) if checkpoints else None
            return train(loss, source, model, rates, seeds, plan, report, mesh, compiled, place, laid_out)

        trained = _tuned(at, learning_rates, extensions)
        runs = np.flatnonzero(trained.rates == best_rate(trained)).tolist()
        chosen = [Predictor(trained.model(run), link, SMOOTHING[trained.smoothing[run]]) for run in runs]
        examined = []
        for predictor in chosen:
            if checkpoints:  # of a long text it takes a while
                checkpoints.stop_if_asked()
            examined.append(examine(predictor))
        # Without the models of all rates and seeds: those of all losses would pile up.
        finished.append(_Finished(name, dataclasses.replace(trained, models=None), runs, next(iter(chosen), None), examined))
    return _as_frames(finished, source.name, source.vocab)


def planned(
    losses: Iterable[str | Loss],
    source: Source,
    model: str | Callable,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    mesh: Mesh | None,
    extensions: int,
    **recipe: Any,
) -> tuple[dict[str, Loss], Recipe]:
    """The losses and the recipe of a `race` with these arguments. Raises `LabError` for all that shows without training."""
    found = resolve_all(losses, checked_source(source).vocab)
    for loss in found.values():
        if not is_catalogued(loss):
            check_link(loss, source.vocab)
    plan = Recipe(steps=steps, **_known(recipe))
    check_grid(learning_rates, seeds)
    for what, values in (("learning rates", learning_rates), ("seeds", seeds)):
        if len({np.float32(value) if what == "learning rates" else value for value in values}) != len(values):
            raise LabError(f"the {what} repeat: {list(values)}. Each counts once.")
    if extensions < 0:
        raise LabError(f"a grid grows by some rates or by none; got extensions={extensions}.")
    program(next(iter(found.values())), source, model, plan, mesh)  # does the model fit, do windows, do devices share a batch?
    windows(source.split("test"), plan.window)
    return found, plan


def _made(loss, seeds, source, model, plan):
    """What a loss's runs are trained with, besides their rates, as their checkpoints keep it."""
    made = {"seeds": [int(seed) for seed in seeds], "loss": program_of(loss, source.vocab)}
    functions = dict(zip(FUNCTIONS, (model, plan.optimizer, plan.schedule), strict=True))
    if any(callable(each) or is_own(each) for each in functions.values()):  # whose name says nothing
        made["functions"] = program(loss, source, model, plan).digest()
    made |= {"source": identity(source.describe())} | dataclasses.asdict(plan)
    made |= {what: unplaced(each) if isinstance(each, str) else each for what, each in functions.items()}
    return json.loads(json.dumps(made, default=lambda each: name_of(each) if callable(each) else str(each)))


@dataclasses.dataclass(frozen=True)
class _Finished:
    """One loss's runs, those at its best rate, the first one's predictor, if there is one, and what each is worth."""

    loss: str
    trained: Trained
    runs: list[int]
    predictor: Predictor | None
    examined: list[Examined]

    @property
    def seeds(self) -> list[int]:
        return [int(self.trained.seeds[run]) for run in self.runs]


def _as_frames(finished: list[_Finished], source: str, vocab: int) -> Race:
    import pandas as pd

    named = lambda each: {"source": source, "loss": each.loss}
    tests, reliabilities, frequencies = [], [], []
    for each in finished:
        for seed, found in zip(each.seeds, each.examined, strict=True):
            tests.append({**named(each), "seed": seed, **found.scores})
            frequencies += [{**named(each), "seed": seed, **row} for row in found.frequency]
        for reading in READINGS:
            rows = _pooled([row for found in each.examined for row in found.reliability[reading]])
            reliabilities += [{**named(each), "reading": reading, **row} for row in rows]
    keys = ["source", "loss"]
    frame = lambda rows, *columns: pd.DataFrame(rows, columns=[*keys, *columns])
    measured = frame(tests, "seed", *TEST_METRICS)
    return Race(
        curves=pd.concat([_curves(each.loss, source, each.trained) for each in finished], ignore_index=True),
        table=pd.DataFrame([{**named(each), **_summarised(each, vocab)} for each in finished]),
        tests=measured,
        pairs=pd.concat([paired(measured, metric) for metric in PAIRED], ignore_index=True),
        reliability=frame(reliabilities, "reading", "bin_low", "bin_high", "tokens", "confidence", "accuracy"),
        frequency=frame(frequencies, "seed", "count_low", "count_high", "tokens", "test_nll", "tempered_nll"),
        predictors={each.loss: each.predictor for each in finished if each.predictor},
    )


def _pooled(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """A reliability diagram's rows of several runs as one's: means weighted by tokens."""
    bins: dict[float, list[dict]] = {}
    for row in rows:
        bins.setdefault(row["bin_low"], []).append(row)
    pooled = []
    for low, here in sorted(bins.items()):
        tokens = sum(row["tokens"] for row in here)
        means = {name: sum(row["tokens"] * row[name] for row in here) / tokens for name in ("confidence", "accuracy")}
        pooled.append({"bin_low": low, "bin_high": here[0]["bin_high"], "tokens": tokens, **means})
    return pooled


def _tuned(at: Callable[[list[float]], Trained], rates: Sequence[float], extensions: int) -> Trained:
    """The grid, and further rates beyond its edge for as long as the best one sits there, by the grid's own step there.

    Where every rate has a run that diverged, smaller ones are tried.
    """
    found = at(rates)
    for _ in range(extensions):
        further = beyond(found.rates, best_rate(found))
        if further is None or _is_flat(found):
            break
        found = joined(found, at([further]))
    return found


def beyond(rates: Sequence[float] | np.ndarray, best: float) -> float | None:
    """The rate a step outside of a grid, at the end on which its best one sits; the lower end for NaN, None for any other.

    >>> beyond([1.0, 2.0, 4.0], 4.0), beyond([1.0, 2.0, 4.0], 2.0), beyond([1.0, 2.0, 4.0], float("nan"))
    (8.0, None, 0.5)

    None as well where float32, in which runs train, has no such rate.
    """
    grid = np.unique(rates)
    if len(grid) < 2 or grid[0] < best < grid[-1]:
        return None
    further = grid[-1] * (grid[-1] / grid[-2]) if best == grid[-1] else grid[0] * (grid[0] / grid[1])
    with np.errstate(over="ignore"):
        return float(f"{further:.6g}") if 0 < np.float32(further) < np.inf else None


def _is_flat(trained: Trained) -> bool:
    """Whether the best rate has a neighbour that is exactly as good: rates change nothing there, and none beyond will."""
    _, means = _means(trained)
    best = int(np.argmin(means))
    return bool(np.isfinite(means[best]) and (means[max(0, best - 1) : best + 2] == means[best]).sum() > 1)


def paired(tests: pd.DataFrame, metric: str = "test_nll") -> pd.DataFrame:
    """By how much each loss differs from the first one, seed by seed: a row a source and other loss.

    tests: source, loss, seed and the metric. Columns: source, loss, against ("nll" if it is there, else the first loss),
    metric, seeds (those that both have), difference (the mean), low and high (95%: percentiles of the bootstrap over seeds, or
    Student's t where that is wider; NaN for a single seed, and where a difference is not finite), tells_apart (whether the
    interval leaves out 0). Of few seeds the bootstrap alone draws too narrow an interval: of three it ends where they do, and
    leaves out 0 whenever their signs agree.

    >>> import pandas as pd
    >>> scores = {"loss": ["nll", "nll", "mae", "mae"], "seed": [0, 1, 0, 1], "test_nll": [1.0, 2.0, 2.0, 3.0]}
    >>> pairs = paired(pd.DataFrame(scores).assign(source="chain"))
    >>> pairs[["loss", "against", "difference", "low", "high", "tells_apart"]].values.tolist()  # by 1 each
    [['mae', 'nll', 1.0, 1.0, 1.0, True]]
    """
    import pandas as pd
    from scipy.stats import bootstrap

    rows = []
    for source, here in tests.groupby("source", sort=False):
        by_seed = here.pivot(index="seed", columns="loss", values=metric)
        against = "nll" if "nll" in by_seed else here.loss.iloc[0]
        for loss in dict.fromkeys(here.loss):
            if loss == against or not len(both := by_seed[[loss, against]].dropna()):
                continue
            with np.errstate(invalid="ignore"):  # of two infinite scores the difference is not known
                differences = np.subtract(*both.to_numpy().T)
                mean = float(differences.mean())
            row = {"source": source, "loss": loss, "against": against, "metric": metric, "seeds": len(differences)}
            low = high = float("nan")
            if len(differences) > 1 and np.isfinite(differences).all():
                drawn = bootstrap(
                    (differences,), np.mean, method="percentile", rng=np.random.default_rng(0)
                ).confidence_interval
                _, low, high = mean_and_interval(differences)
                low, high = min(low, float(drawn.low)), max(high, float(drawn.high))
            apart = low > 0 or high < 0
            rows.append(row | {"difference": mean, "low": low, "high": high, "tells_apart": apart})
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
    rates, means = _means(trained)
    return float(rates[np.argmin(means)]) if np.isfinite(means).any() else float("nan")


def _means(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Each rate, rising, and its mean validation NLL at the end; infinity where a run of it diverged."""
    final = np.where(trained.diverged_at >= 0, np.inf, trained.validation_nll[:, -1])
    final = np.where(np.isfinite(final), final, np.inf)
    rates = np.unique(trained.rates)
    return rates, np.array([final[trained.rates == rate].mean() for rate in rates])


def _summarised(finished: _Finished, vocab: int) -> dict[str, Any]:
    trained, runs = finished.trained, finished.runs
    best = best_rate(trained)
    row: dict[str, Any] = {
        "uniform_nll": float(np.log(vocab)),
        "best_rate": best,
        "rate_at_edge": len(np.unique(trained.rates)) > 1 and best in (trained.rates.min(), trained.rates.max()),
        "runs": len(runs),
        "diverged": int((trained.diverged_at >= 0).sum()),
        "validation_nll": trained.validation_nll[runs, -1].mean() if runs else float("nan"),
        "smoothing": np.mean([SMOOTHING[each] for each in trained.smoothing[runs]]) if runs else float("nan"),
    }
    for metric in TEST_METRICS:
        values = np.array([each.scores[metric] for each in finished.examined]) if runs else np.array([np.nan])
        row[metric], *interval = mean_and_interval(values)
        # Of two or three seeds Student's t reaches past what there can be; no metric is negative.
        ends = np.clip(interval, 0, 1 if metric in SHARES else np.inf)
        row[f"{metric}_low"], row[f"{metric}_high"] = ends.tolist()
    return row
