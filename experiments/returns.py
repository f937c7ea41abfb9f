"""Are sums of logarithms like an investor's sums of percentages?

Like, and not the same (claim 6): returns of +5 %, -3 % and +12 % multiply to 14.072 %, their logarithms add up to exactly the
logarithm of that, their percentages to 14 %. The slider makes the years wilder: the gap grows with the square of the returns.
"""

import decimal
import math

import altair as alt
import numpy as np
import pandas as pd

from xentlab.tour import Check, Figure, Slider, Station, show

YEARS = ("0.05", "-0.03", "0.12")


def run(returns=YEARS) -> dict[str, float]:
    """The product of the factors (exact decimals), the sum of their logarithms, and the sum of the percentages."""
    factors = [1 + decimal.Decimal(each) for each in returns]
    logs = sum(math.log(factor) for factor in factors)
    return {
        "product": float(math.prod(factors)),
        "sum of logs": logs,
        "sum of per cent": float(sum(map(decimal.Decimal, returns))),
    }


def wilder(scales=tuple(range(1, 9))) -> pd.DataFrame:
    """The three gains, as shares, where every return is so many times as large; a row a scale and road."""
    rows = []
    for at, scale in enumerate(scales):
        found = run([str(decimal.Decimal(each) * scale) for each in YEARS])
        gains = {"true gain": found["product"] - 1, "by logs": math.expm1(found["sum of logs"])}
        gains["by percentages"] = found["sum of per cent"]
        rows += [{"at": at, "times": scale, "road": road, "gain": gain} for road, gain in gains.items()]
    return pd.DataFrame(rows)


def stations() -> list[Station]:
    """Claim 6."""
    found, frame = run(), wilder()
    checks = (
        Check("1.05 · 0.97 · 1.12", found["product"], 1.14072, 1e-12),
        Check("sum of the logs", found["sum of logs"], math.log(1.14072), 1e-12),
        Check("sum of the logs, to five digits", found["sum of logs"], 0.13166, 5e-6),
        Check("sum of the percentages", found["sum of per cent"], 0.14, 1e-12),
    )
    wildest = frame[frame["at"] == frame["at"].max()].set_index("road")
    said = (
        f"The product is {found['product']:.5f}, the logs sum to {found['sum of logs']:.5f} = log {found['product']:.5f}, the "
        f"percentages to {found['sum of per cent']:.2f}."
    )
    loose = "Percentage points are not logs: they are their first term. For small returns nobody sees it; at "
    loose += f"{wildest.times.iloc[0]} times the size they say {wildest.gain['by percentages']:+.0%} where "
    loose += f"{wildest.gain['true gain']:+.0%} is true. A loss of 100 % has no logarithm, as a p of 0 has none."
    bars = alt.Chart(frame, title="three years, by three roads").mark_bar().transform_filter("datum.at == at")
    least, most = np.floor(frame.gain.min() * 10) / 10, np.ceil(frame.gain.max() * 10) / 10
    x = alt.X("gain:Q", title="gain after three years").scale(domain=[min(0, least), most]).axis(format="+%")
    bars = bars.encode(x, alt.Y("road:N", sort=None, title=None), alt.Color("road:N", legend=None))
    figure = Figure((bars.add_params(alt.param("at", value=0)),), said, Slider("returns, times", frame, 0))
    told = "Adding logs instead of multiplying is what investors do with returns."
    return [Station(6, "Sums for products, as with returns", told, said, loose, checks, (figure,), {"returns": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
