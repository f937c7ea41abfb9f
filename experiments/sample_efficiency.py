"""How many more tokens does a loss need than cross entropy, and do fits to samples agree with the theory?

Cross entropy is maximum likelihood: no consistent loss needs fewer tokens, in the limit (claim 10). By how much the others
fall short is a matter of the model: a softmax-linear one of 16 classes, 6 standard normal features and a bias, with normal
weights of scale 0.3, 0.7 and 1. Losses whose own minimiser is not the truth have a bias, which no number of tokens removes.
"""

import altair as alt
import pandas as pd

from xentlab import LOSSES, resolve
from xentlab.scoreboard.efficiency import efficiency, make_truth, simulate, tokens_needed
from xentlab.tour import Check, Figure, Station, show

LOSS_NAMES = ("nll", "tsallis", "exponential", "spherical", "brier", "focal")


def run(losses=LOSS_NAMES, scales=(0.3, 0.7, 1.0), draws=(0, 1, 2), sizes=(4000, 16_000), replicates=32) -> pd.DataFrame:
    """A row a loss, scale and draw: tokens_needed or bias; at scale 0.7, draw 0, the trial too, with its 95% interval."""
    rows, reference = [], None
    for name in losses:
        for scale in scales:
            for draw in draws:
                truth, loss = make_truth(scale, draw), resolve(name)
                found = efficiency(loss, truth)
                row = {"loss": name, "scale": scale, "draw": draw, "bias": found.bias, "tokens_needed": found.tokens_needed}
                if scale == 0.7 and draw == 0 and replicates and found.tokens_needed == found.tokens_needed:
                    if reference is None:
                        reference = simulate(LOSSES["nll"], truth, truth.weights, sizes, replicates)
                    trials = simulate(loss, truth, found.weights, sizes, replicates)
                    # Maximum likelihood against its own theory, the rest against its fits to the same samples.
                    against = found.excess if name == "nll" else reference
                    names = ("simulated", "simulated_low", "simulated_high")
                    row |= dict(zip(names, tokens_needed(trials, against), strict=True))
                rows.append(row)
    return pd.DataFrame(rows)


def picture(frame: pd.DataFrame) -> alt.LayerChart:
    """Theory for every scale and draw, and the trials with their intervals."""
    y = alt.Y("tokens_needed:Q", title="tokens needed, relative to maximum likelihood").scale(zero=False)
    x = alt.X("loss:N", sort=list(dict.fromkeys(frame.loss)), title=None).axis(labelAngle=0)
    points = alt.Chart(frame.dropna(subset=["tokens_needed"])).mark_point(size=70, filled=True, opacity=0.7)
    trials = alt.Chart(frame.dropna(subset=["simulated"]) if "simulated" in frame else frame[:0])
    bars = trials.mark_rule(strokeWidth=2, xOffset=16).encode(x, alt.Y("simulated_low:Q"), alt.Y2("simulated_high:Q"))
    middles = trials.mark_tick(thickness=3, width=14, xOffset=16, color="black").encode(x, alt.Y("simulated:Q"))
    title = alt.Title(
        "Dots: theory, by scale of the weights", subtitle="black: fits to samples at scale 0.7, with 95% interval"
    )
    return alt.layer(points.encode(x, y, alt.Color("scale:O", title="scale")), bars, middles, title=title)


def stations(losses: tuple[str, ...] = LOSS_NAMES, replicates: int = 32, all_scales: bool = True) -> list[Station]:
    """Claim 10. replicates: fits a size and loss; all_scales: three scales and draws of the truth, or one alone."""
    some = {} if all_scales else {"scales": (0.7,), "draws": (0,)}
    frame = run(losses, **some, replicates=replicates)
    tried = frame.dropna(subset=["simulated"]).set_index("loss")
    checks = [Check("nll: tokens needed, by theory", tried.tokens_needed["nll"], 1, 1e-6)]
    for row in tried.itertuples():
        half = max(row.simulated - row.simulated_low, row.simulated_high - row.simulated)
        checks.append(Check(f"{row.Index}: tokens needed, fits to samples", row.simulated, row.tokens_needed, half))
    astray = frame[frame.bias > 1e-6].groupby("loss").bias.mean()
    found = "Relative to maximum likelihood, theory (fits): "
    found += ", ".join(f"{row.Index} {row.tokens_needed:.2f} ({row.simulated:.2f})" for row in tried.itertuples()) + "."
    loose = "The bound holds where the model can be right. " + "".join(
        f"{name}'s own optimum is not the truth: a bias of {bias:.2g} nats that no number of tokens removes. "
        for name, bias in astray.items()
    )
    loose += "And where the model is wrong, maximum likelihood finds the nearest by KL, not the truth."
    told = "Maximising the log-probability is maximum likelihood."
    figure = Figure((picture(frame),), found)
    return [Station(10, "Nobody needs fewer tokens", told, found, loose, tuple(checks), (figure,), {"efficiency": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
