"""Where does a product of probabilities vanish, and does the sum of logarithms?

The product of n tokens at p each is 0 from some n on, which depends on the number format; the sum never is (claim 4).
"""

import math

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab.tour import Check, Figure, Station, show

DTYPES = ("float16", "bfloat16", "float32", "float64")
GONE = -450  # where a product of 0 is drawn, below all that the sum of logarithms comes to
CLIFFS = {"float16": 8, "bfloat16": 41, "float32": 46, "float64": 324}


def jax_product(p: float, longest: int, dtype: str) -> np.ndarray:
    """The running product of n = 1 .. longest probabilities p on JAX's device, as float64."""
    with jax.enable_x64(dtype == "float64"):
        step = lambda carry, _: (carry * jnp.asarray(p, dtype),) * 2
        return np.asarray(jax.lax.scan(step, jnp.ones((), dtype), length=longest)[1]).astype(np.float64)


def numpy_product(p: float, longest: int, dtype: str) -> np.ndarray:
    """The same in NumPy, which keeps subnormal numbers; XLA flushes them to 0 on a CPU."""
    with np.errstate(under="ignore"):
        return np.multiply.accumulate(np.full(longest, p, jnp.dtype(dtype))).astype(np.float64)


def products(p: float = 0.1, longest: int = 400) -> pd.DataFrame:
    """The product of n tokens at p by NumPy and by JAX, for each dtype, and the sum of their logs in float32."""
    logs, tokens = np.cumsum(np.full(longest, math.log(p), np.float32)), np.arange(1, longest + 1)
    made = lambda dtype: {"numpy": numpy_product(p, longest, dtype), "jax": jax_product(p, longest, dtype)}
    frames = [pd.DataFrame({"dtype": dtype, "tokens": tokens, **made(dtype), "sum_of_logs": logs}) for dtype in DTYPES]
    return pd.concat(frames, ignore_index=True)


def run(frame: pd.DataFrame) -> pd.DataFrame:
    """The first n at which each dtype's product is 0, in NumPy and in JAX."""
    first = lambda column: frame[frame[column] == 0].groupby("dtype", sort=False).tokens.min()
    return pd.DataFrame({"numpy_first_zero": first("numpy"), "jax_first_zero": first("jax")}).reset_index()


def stations() -> list[Station]:
    """Claim 4."""
    frame = products()
    cliffs = run(frame).set_index("dtype")
    nats = float(frame[(frame.dtype == "float32") & (frame.tokens == 100)].sum_of_logs.iloc[0])
    checks = [Check(f"first zero, {d}, NumPy", cliffs.numpy_first_zero[d], at) for d, at in CLIFFS.items()]
    if jax.default_backend() == "cpu":  # others keep or flush subnormals in their own way
        checks.append(Check("first zero, float32, JAX on a CPU", cliffs.jax_first_zero["float32"], 38))
    checks += [
        Check("100 tokens at .1: sum of logs in float32, nats", nats, 100 * math.log(0.1), 1e-3),
        Check("the same in bits", nats / math.log(2), 100 * math.log2(0.1), 1e-3),
        Check("perplexity", math.exp(-nats / 100), 10, 1e-4),
    ]
    rows = frame.assign(log10=np.log10(frame["numpy"].clip(lower=5e-324)).where(frame["numpy"] > 0, GONE), what=frame.dtype)
    logs = rows[rows.dtype == "float32"].assign(what="sum of logs", log10=lambda f: f.sum_of_logs / math.log(10))
    y = alt.Y("log10:Q", title=f"log₁₀ of the product; where it is 0, {GONE}".replace("-", "−"))
    rows = pd.concat([rows, logs])[["tokens", "log10", "what"]]
    title = alt.Title("n tokens at p = 0.1", subtitle=["products by NumPy, which keeps subnormal numbers"])
    lines = alt.Chart(rows, title=title).mark_line(strokeWidth=2.5)
    lines = lines.encode(alt.X("tokens:Q", title="n, tokens").scale(type="log", nice=False), y, alt.Color("what:N", title=None))
    found = f"100 tokens at 0.1 are {nats:.2f} nats, summed in float32. The product is 0 from n = "
    found += ", ".join(f"{n} in {dtype}" for dtype, n in cliffs.numpy_first_zero.items()) + " (NumPy)."
    loose = "“The product underflows” depends on the number format: float64 holds 10⁻¹⁰⁰. In float32 JAX on this device is "
    loose += f"at 0 by {cliffs.jax_first_zero['float32']} (XLA on a CPU flushes what is below the normal range)."
    told = "The product of a hundred small probabilities is too small for a computer."
    figures, frames = (Figure((lines,), found),), {"products": frame}
    return [Station(4, "Where the product falls off the cliff", told, found, loose, tuple(checks), figures, frames)]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
