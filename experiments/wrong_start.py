"""How long does a loss take to leave a start that is confident and wrong?

Two classes, gradient flow on the margin: cross entropy's time grows like the margin, the square loss's on probabilities like
its exponential. Then gradient descent from an output bias of -20 on the frequent tokens, each loss at its own best rate: a
better rate does not save those whose pull vanishes. Hinge is the control: cross entropy is not alone in getting out.
"""

import dataclasses
import pathlib

import altair as alt
import numpy as np
import pandas as pd
import tyro

from xentlab import resolve
from xentlab.charts import write_png
from xentlab.runs import new_folder, write_frame
from xentlab.scoreboard.escape import escape_time, wrong_start

LOSS_NAMES = ("nll", "focal", "hinge", "mse_logits", "brier", "generalized_cross_entropy")


def flow(losses=LOSS_NAMES, margins=tuple(range(1, 13))) -> pd.DataFrame:
    """Time from each margin to 0; exponent: the growth of log(time) a unit of margin, over the greatest margins."""
    frames = []
    for name in losses:
        time = escape_time(resolve(name), list(margins))
        frames.append(
            pd.DataFrame({"loss": name, "margin": margins, "time": time, "exponent": np.gradient(np.log(time), margins)})
        )
    return pd.concat(frames, ignore_index=True)


def run(losses=LOSS_NAMES, steps: int = 2000) -> pd.DataFrame:
    """Steps out of the wrong start at each loss's best rate; inf where none of the rates tried got out."""
    return pd.DataFrame([{"loss": name, **dataclasses.asdict(wrong_start(resolve(name), steps=steps))} for name in losses])


@dataclasses.dataclass
class Arguments:
    """See the top of the file."""

    losses: tuple[str, ...] = LOSS_NAMES
    out: pathlib.Path = pathlib.Path("runs/wrong_start")


if __name__ == "__main__":
    arguments = tyro.cli(Arguments, description=__doc__)
    times = flow(arguments.losses)
    write_frame(folder := new_folder("wrong_start", arguments.out), "escape_times", times)
    write_frame(folder, "escape_steps", found := run(arguments.losses))
    chart = alt.Chart(times[np.isfinite(times.time)], title="Time to escape against the margin; a straight line is exponential")
    chart = chart.mark_line(point=True).encode(x="margin:Q", y=alt.Y("time:Q").scale(type="log"), color="loss:N")
    write_png(chart.properties(width=520, height=320), folder / "escape.png")
    print(times[times.margin == times.margin.max()].to_string(index=False), found.to_string(index=False), sep="\n")
    print(f"Wrote {folder}.")
