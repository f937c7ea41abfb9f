"""What does it take to bring a loss of one's own?

One function. `cubic`, |1 - p|^3, in the script, is in no catalogue: from here it goes through gradients, a budget and a race.
The commands take it too: `xentlab report --losses nll experiments/new_loss.py:cubic`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import tyro

from xentlab import at_target, loss
from xentlab.gradients import gradient_budget, gradient_profile
from xentlab.race import race
from xentlab.sources import MarkovSource


@loss(source="this file; no one has asked for it", formula=r"(1 - p_y)^3")
def cubic(logits, targets, *, power: float = 3.0):
    """(1 - p_y)^power: logits [..., V], targets [...] -> [...]."""
    return (1 - at_target(jax.nn.softmax(logits), targets)) ** power


def run(steps: int = 300, seeds: int = 3, rates=(0.03, 0.1, 0.3)) -> dict[str, pd.DataFrame]:
    """Profile, budget and race of the new loss beside nll."""
    both = ["nll", cubic]
    rng = np.random.default_rng(0)
    logits, targets = 3 * rng.standard_normal((2000, 32)), rng.integers(0, 32, 2000)
    return {
        "profile": gradient_profile(both, [0.9, 0.5, 0.1, 1e-3, 1e-6]),
        "budget": gradient_budget(both, jnp.asarray(logits), targets, [0, 1e-3, 0.01, 0.1, 1]),
        "race": race(both, MarkovSource(), "bigram", rates, range(seeds), steps).table,
    }


def main(steps: int = 300, seeds: int = 3) -> None:
    """See the top of the file."""
    found = run(steps, seeds)
    found["race"] = found["race"][["loss", "best_rate", "test_nll", "test_nll_low", "test_nll_high", "kl_to_law"]]
    for name, frame in found.items():
        print(f"\n{name}\n{frame.to_string(index=False)}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
