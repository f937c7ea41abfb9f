"""How good a model's predictions are: likelihood, code length, accuracy, calibration, divergence from a known law."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer, Shaped

from xentlab.contract import AnyArray, LabError, whole
from xentlab.products import accumulator
from xentlab.targets import at_target

# Shares of the uniform that a prediction may be mixed with. A sparse link gives some tokens probability 0, where a code
# length is infinite, and so does a softmax in float32 below exp(-87): every loss's model is mixed by the share that its own
# validation part likes best. Not 0: one such token that validation has not shown would outweigh all others on test.
SMOOTHING = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.3)

Predictions = Float[AnyArray, "*tokens vocab"]


def smoothed_nll(p_target: Float[Array, "*tokens"], vocab: int) -> Float[Array, " shares"]:
    """Mean NLL in nats under each share of `SMOOTHING`, from the probabilities of the right tokens: [...] -> [S].

    >>> print(f"{smoothed_nll(jnp.array([0.0, 1.0]), vocab=2)[0]:.3f}")  # half of -log(1e-6 / 2)
    7.254
    """
    p_target = p_target.astype(accumulator(p_target.dtype))
    shares = jnp.asarray(SMOOTHING, p_target.dtype).reshape(-1, *[1] * p_target.ndim)
    mixed = (1 - shares) * p_target[None] + shares / vocab
    return -jnp.mean(jnp.log(mixed), axis=tuple(range(1, mixed.ndim)))


def smooth(predictions: Predictions, share: Float[Array, ""]) -> Predictions:
    """Predictions [..., V] mixed with `share` of the uniform.

    >>> smooth(jnp.array([1.0, 0.0]), jnp.array(0.5))
    Array([0.75, 0.25], dtype=float32)
    """
    return (1 - share) * predictions + share / predictions.shape[-1]


def temper(predictions: Predictions, temperature: Float[Array, ""]) -> Predictions:
    """The logarithms of predictions [..., V] to the power 1/temperature, normalised: above 1 they are less sure, below surer.

    Logarithms, as a power of a small probability may be too small for its dtype. What is 0 stays so.

    >>> jnp.exp(temper(jnp.array([0.8, 0.2]), jnp.array(0.5)))  # .64 : .04
    Array([0.9411765 , 0.05882353], dtype=float32)
    """
    return jax.nn.log_softmax(jnp.log(predictions) / temperature, axis=-1)


def temperature_slope(
    predictions: Predictions, targets: Integer[Array, "*tokens"], inverse: Float[Array, ""]
) -> Float[Array, "*tokens"]:
    """Each token's derivative of its tempered NLL by the inverse temperature: what log p is expected to be, less what it was.

    >>> temperature_slope(jnp.array([[0.5, 0.5]]), jnp.array([0]), jnp.array(1.0))  # even: no temperature changes it
    Array([0.], dtype=float32)
    """
    predictions = jnp.asarray(predictions)
    # What has no probability keeps none, and counts for nothing.
    log_p = jnp.where(predictions > 0, jnp.log(predictions), 0)
    expected = jnp.sum(jnp.exp(temper(predictions, 1 / inverse)) * log_p, axis=-1)
    return jnp.where(at_target(predictions, targets) == 0, 0, expected - at_target(log_p, targets))


def score(
    log_p: Predictions, targets: Integer[Array, "*tokens"], law: Predictions | None = None
) -> dict[str, Float[Array, "*tokens"]]:
    """From log-probabilities [..., V]: each token's `nll` in nats, `correct` (1 or 0), `confidence`, `kl` to a law, `law_nll`.

    The last two are NaN without a law; law_nll is what the law itself says of the target, as nll is what log_p does.
    confidence: the greatest probability. correct: NaN where nll is.
    """
    nll = -at_target(log_p, targets)
    correct = (jnp.argmax(log_p, axis=-1).astype(targets.dtype) == targets).astype(nll.dtype)
    correct = jnp.where(jnp.isnan(nll), nll, correct)
    kl = law_nll = jnp.full_like(nll, jnp.nan)
    if law is not None:
        law = jnp.asarray(law)
        present = law != 0  # a law that is not known, NaN, is none that has no class
        kl = jnp.sum(jnp.where(present, law * (jnp.log(jnp.where(present, law, 1)) - log_p), 0), axis=-1)
        law_nll = -jnp.log(at_target(law, targets))
    return {"nll": nll, "correct": correct, "confidence": jnp.exp(jnp.max(log_p, axis=-1)), "kl": kl, "law_nll": law_nll}


def reliability(
    confidence: Float[np.ndarray, "*tokens"],
    correct: Shaped[np.ndarray, "*tokens"],
    bins: int = 15,
) -> list[dict[str, float]]:
    """A reliability diagram's rows, by equal bins of confidence: bin_low, bin_high, tokens, and means of both.

    Empty bins have no row, and confidences that are NaN are in none. Raises `LabError` for less than one bin, and for
    two numbers of tokens.

    >>> reliability(np.array([0.9, 0.92]), np.array([1.0, 0.0]), bins=2)
    [{'bin_low': 0.5, 'bin_high': 1.0, 'tokens': 2, 'confidence': 0.91, 'accuracy': 0.5}]
    """
    bins = whole(bins, 1, f"bins are a whole number of at least 1; got {bins!r}.")
    confidence, correct = np.ravel(np.asarray(confidence, np.float64)), np.ravel(np.asarray(correct, np.float64))
    if confidence.shape != correct.shape:
        raise LabError(f"confidence and correct are of the same tokens; got {confidence.size} and {correct.size}.")
    known = ~np.isnan(confidence)
    confidence, correct = confidence[known], correct[known]
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for each in np.unique(place).tolist():
        here = place == each
        means = {"confidence": float(confidence[here].mean()), "accuracy": float(correct[here].mean())}
        rows.append({"bin_low": each / bins, "bin_high": (each + 1) / bins, "tokens": int(here.sum()), **means})
    return rows


def expected_calibration_error(
    confidence: Float[np.ndarray, "*tokens"],
    correct: Shaped[np.ndarray, "*tokens"],
    bins: int = 15,
) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence, weighted by tokens. Guo et al. 2017, eq. 3.

    NaN where a confidence is. Raises `LabError` where there are none.

    >>> expected_calibration_error(np.array([0.9, 0.9]), np.array([1.0, 0.0]))  # 0.9 sure, half right
    0.4
    """
    if np.isnan(confidence).any():
        return float("nan")
    rows = reliability(confidence, correct, bins)
    if not rows:
        raise LabError("a calibration error is a mean over tokens, at least one; got none.")
    return sum(row["tokens"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / np.size(confidence)


def bits_per_byte(nll: Float[np.ndarray, " tokens"], bytes_of_tokens: Integer[np.ndarray, " tokens"]) -> float:
    """Total NLL in bits over the bytes that the tokens stand for.

    >>> bits_per_byte(np.log([4.0, 16.0]), np.array([1, 2]))  # (2 + 4) / 3
    2.0
    """
    return float(np.sum(nll, dtype=np.float64) / np.log(2) / np.sum(bytes_of_tokens))


def mean_and_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean over seeds and its 95% interval by Student's t; the interval is NaN for a single seed.

    >>> mean_and_interval(np.array([1.0, 3.0]))[0]
    2.0
    """
    from scipy.special import stdtrit

    values = np.asarray(values, np.float64)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half
