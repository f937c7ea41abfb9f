"""A fair race: every loss trains the same model on the same tokens, at its own best learning rate, over several seeds."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.sharding import Mesh

from xentlab import defaults
from xentlab.catalogue import is_catalogued, program_of, resolve_all
from xentlab.checks import check_link
from xentlab.contract import LabError, Loss, link_of, name_of, softmax_link, whole
from xentlab.examine import Predictor, examiner
from xentlab.layout import Layout
from xentlab.linear.form import check_form
from xentlab.metrics import SMOOTHING
from xentlab.models import check_causal, resolve_model
from xentlab.names import FUNCTIONS, is_own, unplaced
from xentlab.program import Program, program, programs, windows
from xentlab.recipe import Recipe
from xentlab.results import Finished, Race, as_frames, best_rate
from xentlab.sources import Source, checked_source, identity
from xentlab.training import Trained, check_grid, joined, train

if TYPE_CHECKING:
    from xentlab.checkpoints import Checkpoints

SEEDS = (0, 1, 2)


def race(
    losses: Iterable[str | Loss],
    source: Source,
    model: str | Callable = "mlp",
    learning_rates: Sequence[float] = defaults.LEARNING_RATES,
    seeds: Sequence[int] = SEEDS,
    steps: int = defaults.STEPS,
    progress: defaults.Progress = defaults.quiet,
    mesh: Mesh | None = None,
    extensions: int = defaults.EXTENSIONS,
    checkpoints: Checkpoints | None = None,
    laid_out: Callable[[Layout], None] = defaults.quiet,
    **recipe: Any,
) -> Race:
    """Trains each loss at every rate and seed, takes its best rate by mean validation NLL, and tests that.

    A grid of rates grows past the edge on which the best one sits, so that no loss is held back by where it began.
    losses: names or callables. source: `MarkovSource`, `Text`, or an object with their members. model: a name with
    options, or a function (vocab, key) -> model. learning_rates, seeds: each loss trains with every pair of them, as
    `training.train` has it. steps: of each run. recipe: the other fields of `recipe.Recipe`. progress(loss, done,
    total) is called after every block, in steps of each run. mesh: of devices that take different runs or share each, as
    `training.train` has it. extensions: how many rates a grid of more than one may grow by, one step at a time. checkpoints:
    where runs are kept between blocks, so that the same call later goes on from there and finds the same. laid_out is told how
    each grid lies on the machine. Raises `LabError` for bad arguments.

    >>> from xentlab.sources import MarkovSource
    >>> result = race(["nll"], MarkovSource(vocab=4, tokens=2000), "bigram", [0.1], [0, 1], steps=20)
    >>> result.table[["loss", "best_rate", "runs", "diverged"]].values.tolist()
    [['nll', 0.1, 2, 0]]
    """
    found, whole_recipe, training_of = planned(losses, source, model, learning_rates, seeds, steps, mesh, extensions, **recipe)
    examine = examiner(source, whole_recipe.window, whole_recipe.validation_tokens)
    # As the losses' files are now, when they have been imported: one may be edited while another loss trains.
    all_made = {name: _made(loss, seeds, source, model, whole_recipe) if checkpoints else {} for name, loss in found.items()}

    def raced(name, loss):
        compiled, grids = training_of(loss), count()
        link = link_of(loss)  # once: what is compiled of a link goes by its identity
        if not (link is softmax_link or is_catalogued(loss)):
            link = functools.partial(link)  # this race's: it may close over another value than in the one before

        def at(rates):
            made = all_made[name] | {"learning rates": [float(rate) for rate in rates]}
            place = checkpoints.grid(name, next(grids), made) if checkpoints else None
            tell = lambda done: progress(name, done, steps)
            return train(loss, source, model, rates, seeds, whole_recipe, tell, mesh, compiled, place, laid_out)

        trained = _tuned(at, learning_rates, extensions)
        runs = np.flatnonzero(trained.rates == best_rate(trained)).tolist()
        chosen = [Predictor(trained.model(run), link, SMOOTHING[trained.smoothing[run]]) for run in runs]
        examined = []
        for predictor in chosen:
            if checkpoints:  # of a long text it takes a while
                checkpoints.stop_if_asked()
            examined.append(examine(predictor))
        # Without the models of all rates and seeds: those of all losses would pile up.
        return Finished(name, dataclasses.replace(trained, models=None), runs, next(iter(chosen), None), examined)

    return as_frames([raced(name, loss) for name, loss in found.items()], source.name, source.vocab)


def planned(
    losses: Iterable[str | Loss],
    source: Source,
    model: str | Callable,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    mesh: Mesh | None,
    extensions: int,
    **recipe: Any,
) -> tuple[dict[str, Loss], Recipe, Callable[[Loss], Program]]:
    """Losses, recipe and `programs` of a `race` with these arguments. Raises `LabError` for all that shows without training."""
    found = resolve_all(losses, checked_source(source).vocab)
    whole_recipe = Recipe(steps=steps, **_known(recipe))
    for loss in found.values():
        if not is_catalogued(loss):
            check_link(loss, source.vocab)
            if whole_recipe.head != "naive":  # where the head would find it only once the losses before are trained
                check_form(loss, source.vocab)
    check_grid(learning_rates, seeds)
    for what, values in (("learning rates", learning_rates), ("seeds", seeds)):
        if len({np.float32(value) if what == "learning rates" else int(value) for value in values}) != len(values):
            raise LabError(f"the {what} repeat: {list(values)}. Each counts once.")
    whole(extensions, 0, f"a grid grows by some rates or by none; got extensions={extensions!r}.")
    # Does the model fit, do windows, do devices share a batch?
    training_of = programs(source, model, whole_recipe, mesh)
    if callable(model) or is_own(model):
        check_causal(resolve_model(model), source.vocab, whole_recipe.window)
    windows(source.split("test"), whole_recipe.window)
    return found, whole_recipe, training_of


def _made(loss, seeds, source, model, recipe):
    """What a loss's runs are trained with, besides their rates, as their checkpoints keep it."""
    made = {"seeds": [int(seed) for seed in seeds], "loss": program_of(loss, source.vocab)}
    functions = dict(zip(FUNCTIONS, (model, recipe.optimizer, recipe.schedule), strict=True))
    if any(callable(each) or is_own(each) for each in functions.values()):  # whose name says nothing
        made["functions"] = program(loss, source, model, recipe).digest()
    made |= {"source": identity(source.describe())} | dataclasses.asdict(recipe)
    made |= {what: unplaced(each) if isinstance(each, str) else each for what, each in functions.items()}
    return json.loads(json.dumps(made, default=lambda each: name_of(each) if callable(each) else str(each)))


def _tuned(at: Callable[[list[float]], Trained], rates: Sequence[float], extensions: int) -> Trained:
    """The grid, and further rates beyond its edge for as long as the best one sits there, by the grid's own step there.

    Where every rate has a run that diverged, smaller ones are tried.
    """
    found = at(rates)
    for _ in range(extensions):
        further = beyond(found.rates, best_rate(found))
        if further is None:
            break
        found = joined(found, at([further]))
    return found


def beyond(rates: Sequence[float] | np.ndarray, best: float) -> float | None:
    """The rate a step outside of a grid, at the end on which its best one sits; the lower end for NaN, None for any other.

    >>> beyond([1.0, 2.0, 4.0], 4.0), beyond([1.0, 2.0, 4.0], 2.0), beyond([1.0, 2.0, 4.0], float("nan"))
    (8.0, None, 0.5)

    None as well where float32, in which runs train, has no such rate, or none that is further than the grid.
    """
    grid = np.unique(rates)
    if len(grid) < 2 or grid[0] < best < grid[-1]:
        return None
    further = grid[-1] * (grid[-1] / grid[-2]) if best == grid[-1] else grid[0] * (grid[0] / grid[1])
    with np.errstate(over="ignore"):
        further, low, high = float(f"{further:.6g}"), np.float32(grid[0]), np.float32(grid[-1])
        return further if 0 < np.float32(further) < low or high < np.float32(further) < np.inf else None


def _known(recipe: dict[str, Any]) -> dict[str, Any]:
    allowed = {field.name for field in dataclasses.fields(Recipe)} - {"steps"}
    for key in recipe:
        if key not in allowed:
            raise LabError(f"a race has no option {key!r}; a recipe's options: {', '.join(sorted(allowed))}.")
    return recipe
