"""Where does a product of probabilities vanish, and is it the logarithm that saves training?

The product of n tokens at p each is 0 from some n on, the sum of logarithms never (claim 4). -log(softmax(z)) is infinite
with a NaN gradient long before log_softmax(z) errs: the remedy is the fused form, not the log alone (claim 5). And sums of
logarithms are not sums of percentages (claim 6).
"""

import decimal
import math

import altair as alt
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from xentlab import LOSSES
from xentlab.charts import write_png
from xentlab.runs import new_folder, write_frame

DTYPES = ("float16", "bfloat16", "float32", "float64")


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


def gaps(largest: float = 120.0) -> pd.DataFrame:
    """Loss and gradient at the target for logits (0, gap), naive and fused, in float32."""
    naive = lambda z, y: -jnp.log(jnp.exp(z) / jnp.exp(z).sum())[y]
    rows = []
    for gap in np.arange(0, largest + 1, 10.0):
        for form, loss in (("naive", naive), ("fused", LOSSES["nll"])):
            value, gradient = jax.value_and_grad(loss)(jnp.array([0, gap], jnp.float32), jnp.int32(0))
            rows.append({"gap": gap, "form": form, "value": float(value), "gradient": float(gradient[0])})
    return pd.DataFrame(rows)


def returns(factors=("1.05", "0.97", "1.12")) -> dict[str, float]:
    """An investment's years: the product, the sum of logs, and the sum of percentages."""
    factors = [decimal.Decimal(factor) for factor in factors]
    logs = sum(math.log(factor) for factor in factors)
    return {"product": float(math.prod(factors)), "sum of logs": logs, "sum of per cent": float(sum(factors) - len(factors))}


def run(p: float = 0.1, longest: int = 400) -> pd.DataFrame:
    """The first n at which each dtype's product is 0, in NumPy and in JAX."""
    frame = products(p, longest)
    first = lambda column: frame[frame[column] == 0].groupby("dtype", sort=False).tokens.min()
    return pd.DataFrame({"numpy_first_zero": first("numpy"), "jax_first_zero": first("jax")}).reset_index()


if __name__ == "__main__":
    write_frame(folder := new_folder("underflow", "runs/underflow"), "products", frame := products())
    logs = frame[frame.dtype == "float32"].assign(dtype="sum of logs, float32", log10=lambda f: f.sum_of_logs / math.log(10))
    fallen = frame.assign(log10=np.log10(frame["numpy"].clip(lower=5e-324)).where(frame["numpy"] > 0, -450))
    chart = alt.Chart(pd.concat([logs, fallen])).mark_line(strokeWidth=2.5).properties(width=520)
    chart = chart.encode(
        alt.X("tokens").scale(type="log"), alt.Y("log10", title="log10 of the product; bottom: 0"), color="dtype"
    )
    write_png(chart, folder / "cliff.png")
    print(run().to_string(index=False), gaps().to_string(index=False), returns(), f"Wrote {folder}.", sep="\n")
