"""What a trained model is worth on tokens that it has not seen: through its loss's link, raw and after one temperature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from xentlab.metrics import bits_per_byte, expected_calibration_error, reliability, score, smooth, temper, temperature_slope
from xentlab.models import logits
from xentlab.program import windows
from xentlab.sources import Source

# What a temperature changes, by its name and by that of the raw measurement; accuracy stays.
TEMPERED = {"nll": "test_nll", "calibration_error": "calibration_error", "kl_to_law": "kl_to_law"}
# What is measured on the test part, for each run of the best rate; the table gives mean and interval of each.
TEST_METRICS = (
    *("test_nll", "perplexity", "bits_per_byte", "accuracy", "calibration_error", "kl_to_law", "temperature"),
    *(f"tempered_{name}" for name in TEMPERED),
)
TEMPERATURES = (1 / 64, 64.0)
READINGS = ("raw", "tempered")
AT_ONCE = 2**22  # predictions' numbers, some dozen arrays of which are held


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A trained model as its loss means it to be read: through the loss's link, mixed with a share of the uniform.

    Called with tokens [..., T], it gives the probability of what follows each position [..., T, V].
    """

    model: Any
    link: Callable
    smoothing: float

    def __call__(self, tokens):
        return predict(*self.parts, jnp.asarray(tokens))

    @property
    def parts(self) -> tuple[Callable, Any, Any]:
        """Link, model, and share of the uniform, as `predict` takes them."""
        return self.link, self.model, jnp.float32(self.smoothing)


@eqx.filter_jit
def predict(link: Callable, model: Any, share: Any, tokens: Any) -> Any:
    """The probabilities of what follows each position: tokens [..., T] -> [..., T, V], `share` of them the uniform's."""
    return smooth(link(logits(model, tokens)), share)


@dataclasses.dataclass(frozen=True)
class Examined:
    """scores: each of `TEST_METRICS`. reliability: of each reading (raw, tempered), rows as `metrics.reliability` has them.

    frequency: rows of count_low, count_high (how often the training part has the token), tokens, test_nll, tempered_nll.
    beyond_law: as `beyond` has it.
    """

    scores: dict[str, float]
    reliability: dict[str, list[dict[str, float]]]
    frequency: list[dict[str, float]]
    beyond_law: float = np.nan


def examiner(source: Source, window: int, validation_tokens: int) -> Callable[[Predictor], Examined]:
    """A function of a predictor, which fits its temperature on validation and measures on test; it compiles once a link.

    The temperature is the one of least NLL between the `TEMPERATURES`; scaling the logits (Guo et al. 2017, sec. 4.2) where the
    link is a softmax.
    """
    parts = windows(source.split("test"), window), windows(source.split("validation"), window, validation_tokens)
    targets = np.asarray(parts[0][:, 1:]).reshape(-1)
    held_out, validation = jax.device_put(parts)
    seen = np.bincount(np.asarray(source.split("train")), minlength=source.vocab)[targets]

    def of_window(link, model, share, temperature, window):
        batch = window[None]
        predictions = predict(link, model, share, batch[:, :-1])
        scored = lambda log_p: score(log_p, batch[:, 1:], law_after(source, batch[:, :-1]))
        raw, tempered = scored(jnp.log(predictions)), scored(temper(predictions, temperature))
        # Who leads stays, but for rounding, which may make two of them alike.
        found = dict(zip(READINGS, (raw, tempered | {"correct": raw["correct"]}), strict=True))
        return jax.tree.map(lambda leaf: leaf[0], found)

    # A few windows at a time: [all tokens, V] of a large vocabulary would not fit.
    few = max(1, min(64, AT_ONCE // (window * source.vocab)))
    over = lambda one, all_windows: jax.lax.map(one, all_windows, batch_size=min(few, len(all_windows)))

    @eqx.filter_jit
    def scores(link, model, share, temperature):
        one = functools.partial(of_window, link, model, share, temperature)
        return jax.tree.map(lambda leaf: leaf.reshape(-1), over(one, held_out))

    @eqx.filter_jit
    def slope(link, model, share, inverse):
        def one(window):
            return temperature_slope(predict(link, model, share, window[None, :-1]), window[None, 1:], inverse)[0]

        return jnp.mean(over(one, validation))

    def fitted(predictor):
        from scipy.optimize import brentq

        # The NLL is convex in the inverse: one root, which its slope finds to more digits than its flat bottom would.
        at = lambda log: float(slope(*predictor.parts, jnp.float32(np.exp(-log))))
        low, high = np.log(TEMPERATURES)
        hottest, coldest = at(high), at(low)
        if max(abs(hottest), abs(coldest)) < 1e-6:  # even predictions, which no temperature changes
            return 1.0
        if not (hottest < 0 < coldest):
            return TEMPERATURES[0] if coldest <= 0 else TEMPERATURES[1]
        return float(np.exp(brentq(at, low, high, xtol=1e-5)))

    def examine(predictor):
        temperature = fitted(predictor)
        found = jax.tree.map(np.asarray, scores(*predictor.parts, jnp.float32(temperature)))
        raw, tempered = (found[reading] for reading in READINGS)
        also = _scores(tempered, source, targets)
        also = {f"tempered_{name}": also[key] for name, key in TEMPERED.items()}
        return Examined(
            scores=_scores(raw, source, targets) | {"temperature": temperature} | also,
            reliability={name: reliability(each["confidence"], each["correct"]) for name, each in found.items()},
            frequency=_by_frequency(seen, raw["nll"], tempered["nll"]),
            beyond_law=beyond(raw["nll"], raw["law_nll"]),
        )

    return examine


def beyond(nll: np.ndarray, law_nll: np.ndarray) -> float:
    """By how many nats tokens cost less in all than the law that drew them asks, a token counted as one nat less at most.

    Each [tokens], in nats; law_nll is NaN or infinite where the law does not hold, and NaN comes back where it nowhere does.
    Predictions of what is not seen yet are s nats beyond with a probability of e^-s at most: the mean of likelihood over the
    law's likelihood is 1 (Markov's inequality), and less where a ratio is cut. Cut, for where one chain of tokens ends and
    another begins the law does not hold.

    >>> beyond(np.array([2.0, 0.5, 0.0]), np.array([1.0, 1.0, 9.0]))  # -1 + .5 + 1
    0.5
    """
    known = np.isfinite(law_nll)
    less = np.minimum(np.subtract(law_nll, nll, where=known, out=np.zeros_like(nll)), 1)
    return float(less.sum(dtype=np.float64)) if known.any() else np.nan


def _scores(each, source, targets):
    known, nll = ~np.isnan(each["kl"]), each["nll"].mean(dtype=np.float64)
    with np.errstate(over="ignore"):  # of 710 nats and more it is infinite
        perplexity = float(np.exp(nll))
    return {
        "test_nll": float(nll),
        "perplexity": perplexity,
        "bits_per_byte": np.nan
        if source.token_bytes is None
        else bits_per_byte(each["nll"], np.asarray(source.token_bytes)[targets]),
        "accuracy": float(each["correct"].mean()),
        "calibration_error": expected_calibration_error(each["confidence"], each["correct"]),
        "kl_to_law": float(each["kl"][known].mean()) if known.any() else np.nan,
    }


def _by_frequency(seen, nll, tempered):
    """Rows by how often the training part has a token, two a decade: never, 1 or 2, 3 to 9, 10 to 29, and so on."""
    edges = [0, *(base * 10**power for power in range(10) for base in (1, 3))]
    place, rows = np.searchsorted(edges, seen, side="right") - 1, []
    for each in np.unique(place).tolist():
        here = place == each
        bounds = {"count_low": edges[each], "count_high": max(0, edges[each + 1] - 1), "tokens": int(here.sum())}
        means = {
            "test_nll": float(nll[here].mean(dtype=np.float64)),
            "tempered_nll": float(tempered[here].mean(dtype=np.float64)),
        }
        rows.append(bounds | means)
    return rows


def law_after(source: Source, tokens: Any) -> Any:
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
