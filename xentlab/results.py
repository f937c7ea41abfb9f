"""What is found of finished runs: frames a row a loss, a seed or a block, and by how much the losses of a seed differ."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from xentlab.examine import READINGS, TEMPERATURES, TEST_METRICS, Examined, Predictor
from xentlab.metrics import SMOOTHING, mean_and_interval
from xentlab.reading import ROUNDING
from xentlab.training import Trained

if TYPE_CHECKING:
    import pandas as pd

PAIRED = ("test_nll", "tempered_nll")  # what the losses of a seed are compared by
SHARES = ("accuracy", "calibration_error", "tempered_calibration_error")
# What a metric can be; any other is from 0 up.
LIMITS = dict.fromkeys(SHARES, (0, 1)) | {"temperature": TEMPERATURES, "perplexity": (1, np.inf)}


@dataclasses.dataclass(frozen=True, repr=False)
class Race:
    """A finished race.

    curves: one row a loss, rate, seed and block: source, loss, rate, seed, step, train_loss (the loss's own unit),
    validation_nll (nats, through its own link), diverged_at (-1 if never).
    table: one row a loss: source, loss, uniform_nll (log V, what a guess costs), best_rate, rate_at_edge (it is the grid's
    least or greatest, so a better one may lie outside), runs, diverged (runs of the whole grid), validation_nll, smoothing
    (the mean share of the uniform that validation chose), and each of `TEST_METRICS` with _low and _high, its 95% interval
    over seeds, cut to what the metric can be (a temperature's mean is the geometric one), beyond_law (the most of any seed, by
    `examine.beyond`), and temperature_at_edge (a seed's is the least or the greatest that is tried).
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


@dataclasses.dataclass(frozen=True)
class Finished:
    """One loss's runs, those at its best rate, the first one's predictor, if there is one, and what each is worth."""

    loss: str
    trained: Trained
    runs: list[int]
    predictor: Predictor | None
    examined: list[Examined]

    @property
    def seeds(self) -> list[int]:
        return [int(self.trained.seeds[run]) for run in self.runs]


def as_frames(finished: list[Finished], source: str, vocab: int) -> Race:
    """The finished race of these losses on a source of that name and vocabulary."""
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


def _summarised(finished: Finished, vocab: int) -> dict[str, Any]:
    trained, runs = finished.trained, finished.runs
    best = best_rate(trained)
    row: dict[str, Any] = {
        "uniform_nll": float(np.log(vocab)),
        "best_rate": best,
        "rate_at_edge": _at_edge(trained, best),
        "runs": len(runs),
        "diverged": int((trained.diverged_at >= 0).sum()),
        "validation_nll": trained.validation_nll[runs, -1].mean(dtype=np.float64) if runs else float("nan"),
        "smoothing": np.mean([SMOOTHING[each] for each in trained.smoothing[runs]]) if runs else float("nan"),
    }
    for metric in TEST_METRICS:
        values = np.array([each.scores[metric] for each in finished.examined]) if runs else np.array([np.nan])
        # A temperature is a factor: of 64 and 1/64 the mean is 1.
        there, back = (np.log, np.exp) if metric == "temperature" else (np.asarray, np.asarray)
        row[metric], *interval = map(float, back(mean_and_interval(there(values))))
        # Of two or three seeds Student's t reaches past what there can be; no metric is negative.
        ends = np.clip(interval, *LIMITS.get(metric, (0, np.inf)))
        row[f"{metric}_low"], row[f"{metric}_high"] = ends.tolist()
    row["beyond_law"] = max((each.beyond_law for each in finished.examined), default=float("nan"))
    row["temperature_at_edge"] = any(each.scores["temperature"] in TEMPERATURES for each in finished.examined)
    return row


def _at_edge(trained: Trained, best: float) -> bool:
    """Whether a better rate may lie outside of the grid: the best one is one of its ends."""
    rates = np.unique(trained.rates)
    return len(rates) > 1 and best in (rates[0], rates[-1])


def best_rate(trained: Trained) -> float:
    """The rate with the least mean validation NLL at the end, or NaN if every rate has a run that diverged.

    Of rates that are equally good the one beyond which others may be better: the greatest where no run of theirs has moved, for
    the least of them are too small; else the least, for all of them are so large that they end alike.
    """
    rates, means = final_means(trained)
    if not np.isfinite(means).any():
        return float("nan")
    equal = rates[means == means.min()]
    curves = trained.validation_nll[np.isin(trained.rates, equal)]
    still = len(equal) > 1 and (curves == curves[:, :1]).all()
    return float(equal[-1 if still else 0])


def final_means(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Each rate, rising, and its mean validation NLL at the end, in float64; infinity where a run of it diverged."""
    final = np.where(trained.diverged_at >= 0, np.inf, trained.validation_nll[:, -1].astype(np.float64))
    final = np.where(np.isfinite(final), final, np.inf)
    rates = np.unique(trained.rates)
    return rates, np.array([final[trained.rates == rate].mean() for rate in rates])


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


def paired(tests: pd.DataFrame, metric: str = "test_nll") -> pd.DataFrame:
    """By how much each loss differs from one of them, seed by seed: a row a source and other loss.

    tests: source, loss, seed and the metric. Columns: source, loss, against ("nll" if it is there, else the first loss),
    metric, seeds (those that both have), difference (the mean), low and high (95%: percentiles of the bootstrap over seeds, or
    Student's t where that is wider; NaN for a single seed, and where a difference is not finite), tells_apart (whether the
    interval leaves out 0, by more than float32's rounding). Of few seeds the bootstrap alone draws too narrow an interval: of
    three it ends where they do, and leaves out 0 whenever their signs agree.

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
            rounding = ROUNDING * float(np.abs(both.to_numpy()).max())
            apart = low > rounding or high < -rounding
            rows.append(row | {"difference": mean, "low": low, "high": high, "tells_apart": apart})
    columns = ["source", "loss", "against", "metric", "seeds", "difference", "low", "high", "tells_apart"]
    return pd.DataFrame(rows, columns=columns)
