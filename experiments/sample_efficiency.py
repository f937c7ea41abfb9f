"""How many more tokens does a loss need than cross entropy, and do fits to samples agree with the theory?

Cross entropy is maximum likelihood: no consistent loss needs fewer tokens, in the limit (claim 10). By how much the others
fall short is a matter of the model: a softmax-linear one of 16 classes, 6 standard normal features and a bias, with normal
weights of scale 0.7. Losses whose own minimiser is not the truth have a bias, which no number of tokens removes. Scales 0.3
and 1 too, three draws of each, take minutes: `python experiments/sample_efficiency.py --all-scales --replicates 32`.
"""

import altair as alt
import pandas as pd

from xentlab import LOSSES, resolve
from xentlab.reading import words
from xentlab.scoreboard.efficiency import efficiency, make_truth, simulate, tokens_needed
from xentlab.tour import Check, Figure, Station, show

LOSS_NAMES = ("nll", "tsallis", "brier", "focal")


def run(losses=LOSS_NAMES, scales=(0.3, 0.7, 1.0), draws=(0, 1, 2), sizes=(4000, 16_000), replicates=32) -> pd.DataFrame:
    """A row a loss, scale and draw: tokens_needed or bias; at scale 0.7, draw 0, the trial too, with its 95% interval."""
    rows, reference = [], None
    for name in losses:
        for scale in scales:
            for draw in draws:
                truth, loss = make_truth(scale, draw), resolve(name)
                found = efficiency(loss, truth)
                row = {"loss": name, "scale": scale, "draw": draw, "bias": found.bias, "tokens_needed": found.tokens_needed}
                row |= dict.fromkeys(ends := ("simulated", "simulated_low", "simulated_high"), float("nan"))
                if scale == 0.7 and draw == 0 and replicates and found.tokens_needed == found.tokens_needed:
                    if reference is None:
                        reference = simulate(LOSSES["nll"], truth, truth.weights, sizes, replicates)
                    trials = simulate(loss, truth, found.weights, sizes, replicates)
                    # Maximum likelihood against its own theory, the rest against its fits to the same samples.
                    against = found.excess if name == "nll" else reference
                    row |= dict(zip(ends, tokens_needed(trials, against), strict=True))
                rows.append(row)
    return pd.DataFrame(rows)


def picture(frame: pd.DataFrame) -> alt.LayerChart:
    """Theory for every scale and draw, and the trials with their intervals."""
    y = alt.Y("tokens_needed:Q", title="tokens needed, relative to maximum likelihood").scale(zero=False)
    x = alt.X("loss:N", sort=list(dict.fromkeys(frame.loss)), title=None).axis(labelAngle=0)
    points = alt.Chart(frame.dropna(subset=["tokens_needed"])).mark_point(size=70, filled=True, opacity=0.7)
    trials = alt.Chart(tried := frame.dropna(subset=["simulated"]))
    bars = trials.mark_rule(strokeWidth=2, xOffset=16).encode(x, alt.Y("simulated_low:Q"), alt.Y2("simulated_high:Q"))
    middles = trials.mark_tick(thickness=3, width=14, xOffset=16, color="black").encode(x, alt.Y("simulated:Q"))
    scales = [f"{scale:g}" for scale in sorted(set(frame.scale))]
    below = "black: fits to samples at scale 0.7, with 95% interval" if len(tried) else ""
    title = alt.Title(f"Dots: theory, weights of scale {words(scales)}", subtitle=below)
    points = points.encode(x, y, alt.Color("scale:O", title="scale", legend=alt.Legend() if len(scales) > 1 else None))
    return alt.layer(points, *([bars, middles] if len(tried) else []), title=title)


def stations(losses: tuple[str, ...] = LOSS_NAMES, replicates: int = 16, all_scales: bool = False) -> list[Station]:
    """Claim 10. replicates: fits a size and loss; all_scales: three scales and draws of the truth, not one alone."""
    frame = run(losses, *(((0.3, 0.7, 1.0), (0, 1, 2)) if all_scales else ((0.7,), (0,))), replicates=replicates)
    first = frame[(frame.scale == 0.7) & (frame.draw == 0)].dropna(subset=["tokens_needed"]).set_index("loss")
    tried = first.assign(half=first.simulated_high - first.simulated).query("half <= 0.3")  # else any number holds
    checks = [Check("nll: tokens needed, by theory", first.tokens_needed["nll"], 1, 1e-6)]
    checks.append(Check("fewest of all, by theory", frame.tokens_needed.min(), 1, 1e-6, "at least"))
    checks += [Check(f"{r.Index}: tokens needed, by fits", r.simulated, r.tokens_needed, r.half) for r in tried.itertuples()]
    each = lambda rows, told: ", ".join(map(told.format, rows.itertuples())) + "."
    found = "Relative to maximum likelihood, for 16 classes, 6 standard normal features and a bias, one draw of weights of "
    found += f"scale 0.7, by theory: {each(first, '{0.Index} {0.tokens_needed:.2f}')}"
    interval = "{0.Index} {0.simulated:.2f} ({0.simulated_low:.2f} to {0.simulated_high:.2f})"
    found += f" By fits to samples, with 95% interval: {each(tried, interval)}" if len(tried) else ""
    loose = "The bound holds where the model can be right. "
    for row in frame[(frame.bias > 1e-6) & (frame.scale == 0.7) & (frame.draw == 0)].itertuples():
        loose += f"{row.loss}'s own optimum is not the truth: {row.bias:.2g} nats remain here at any number of tokens. "
    loose += "And where the model is wrong, maximum likelihood finds the nearest by KL, not the truth."
    told = "Maximising the log-probability is maximum likelihood."
    figure = Figure((picture(frame),), found)
    return [Station(10, "Nobody needs fewer tokens", told, found, loose, tuple(checks), (figure,), {"efficiency": frame})]


if __name__ == "__main__":
    show(stations, __file__, __doc__)
