"""What the library and the command line both take where nothing else is asked for; it imports nothing of the lab."""

from collections.abc import Callable
from typing import Any

LOSSES = ("nll", "brier", "mse_logits", "hinge", "focal", "generalized_cross_entropy", "entmax15")
PROBABILITIES = (0.99, 0.9, 0.5, 0.1, 0.01, 1e-3, 1e-6, 1e-9, 1e-12)  # of a gradient profile

# Of a race: its grid of rates, how many steps that may grow by, and how each run is trained.
LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
EXTENSIONS = 6
STEPS, BATCH, WINDOW = 400, 16, 32
OPTIMIZER, SCHEDULE = "adamw", "cosine"
BPE_VOCAB = 1024

Progress = Callable[[str, int, int], None]  # is told (what, done, total)


def quiet(*_: Any) -> None:
    """What is told of progress where nobody listens."""
