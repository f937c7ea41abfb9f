# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Why do large models train on cross entropy?
# The argument as a notebook: every claim measured, beside what is expected. It also runs as a script,
# `python experiments/tour.py`, and takes a minute. Each experiment is a file of its own beside this one.

# %%
import altair as alt
import jax
import pandas as pd

from xentlab import at_target
from xentlab.audit import audit
from xentlab.gradients import gradient_profile
from xentlab.tour.station import check_rows
from xentlab.tour.walk import walk

try:
    from IPython.display import Markdown, display
except ImportError:  # as a script
    Markdown, display = str, print

alt.renderers.enable("svg")  # drawn here, by vl-convert: no network

# %% [markdown]
# ## A few claims, whole
# `walk` runs experiments by their files' names, all of them if none is named, and gives their stations.

# %%
NAMES = ("nats_and_bits", "fused", "old_map", "simplest_form", "continuations")
stations = [station for each in walk(quick=True, only=NAMES) for station in each.stations]
for station in stations:
    display(Markdown(f"### {station.claim}. {station.title}\n\n*{station.told}*\n\n{station.found}"))
    for chart in station.figures[0].charts:
        display(chart)
    display(Markdown(f"Where the telling is loose: {station.loose}"))

# %% [markdown]
# ## Measured beside expected

# %%
table = pd.DataFrame(check_rows(stations))
display(table)
assert table["pass"].all()

# %% [markdown]
# ## A loss of your own, in six lines
# One plain function; nothing is registered.


# %%
def cubic(logits, targets, *, power=3.0):
    """(1 - p)^power."""
    return (1 - at_target(jax.nn.softmax(logits), targets)) ** power


display(gradient_profile(["nll", cubic], [0.9, 0.5, 0.1, 1e-3, 1e-6]))
display(pd.Series({name: verdict.value for name, verdict in audit(cubic).verdicts.items()}))
