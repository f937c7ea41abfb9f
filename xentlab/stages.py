"""The report's two races, which its commands and the scoreboard run too: real text, and a chain whose law is known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from xentlab import defaults
from xentlab.contract import Loss
from xentlab.race import race
from xentlab.results import Race
from xentlab.sources import MarkovSource, Source, Text


@dataclasses.dataclass(frozen=True)
class Stage:
    """A source, the model that fits it, and the rates and steps that the model's losses may need."""

    source: Source
    model: str
    learning_rates: tuple[float, ...]
    steps: int


@dataclasses.dataclass(frozen=True)
class StagedRace:
    """A stage and the race that was run on it."""

    stage: Stage
    race: Race


def standard_stages(text: Text, seed: int = 0, quick: bool = False) -> list[Stage]:
    """The report's two races: real text, and a chain whose law is known. quick: tiny ones, to see that all works."""
    name = "markov chain" if text.name == "markov" else "markov"  # two sources, two names
    markov = MarkovSource(seed=seed, tokens=20_000 if quick else 200_000, name=name)
    if quick:
        return [
            Stage(text, "mlp(context=2, width=8, inner=16, features=16)", (0.01,), 12),
            Stage(markov, "bigram", (0.1,), 12),
        ]
    return [
        Stage(text, "mlp(context=6, width=24, inner=96, features=48)", (1e-3, 4e-3, 1.6e-2, 6.4e-2), 160),
        Stage(markov, "bigram", (1e-2, 4e-2, 0.16, 0.64), 240),
    ]


def run_stage(
    stage: Stage,
    losses: Iterable[str | Loss],
    seed: int = 0,
    quick: bool = False,
    progress: defaults.Progress = defaults.quiet,
) -> StagedRace:
    """Runs the race of one stage; progress(what, done, total) names the source and the loss."""
    tell = lambda loss, done, total: progress(f"{stage.source.name}: {loss}", done, total)
    seeds = tuple(range(seed, seed + (2 if quick else 3)))
    blocks = 4 if quick else 16
    rates = stage.learning_rates
    found = race(losses, stage.source, stage.model, rates, seeds, stage.steps, tell, blocks=blocks)
    return StagedRace(stage, found)
