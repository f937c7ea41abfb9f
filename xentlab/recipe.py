"""How a run is trained, apart from its loss, source and model: steps, batches, optimizer, schedule, head."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from xentlab.catalogue import near_names, parse_call
from xentlab.contract import LabError

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "muon": optax.contrib.muon,
    "lion": optax.lion,
}


def _constant(steps: int) -> optax.Schedule:
    return optax.constant_schedule(1.0)


def _linear(steps: int, *, warmup: float = 0.05) -> optax.Schedule:
    up = max(1, round(warmup * steps))
    return optax.join_schedules([optax.linear_schedule(0, 1, up), optax.linear_schedule(1, 0, max(1, steps - up))], [up])


def _cosine(steps: int, *, warmup: float = 0.05, end: float = 0.05) -> optax.Schedule:
    up = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0, 1, up, max(up + 1, steps), end)


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is trained; every loss of a race gets the same.

    steps; batch: windows a step; window: predicted tokens a window; optimizer: one of `OPTIMIZERS` with its options,
    "adamw(weight_decay=0.1)", or a function learning_rate -> optax transformation; schedule: one of `SCHEDULES` with its
    options, scaled by the rate; clip: greatest length of the whole gradient, or None; blocks: how often it is measured;
    label_noise: the share of training targets that are another token, drawn once; what a model reads, and what it is tested on,
    stays clean; head: the loss by `linear_loss`, or of a batch's whole logits, to compare with (experiments/bench_training.py).
    """

    steps: int = 400
    batch: int = 16
    window: int = 32
    optimizer: str | Callable[[Any], optax.GradientTransformation] = "adamw"
    schedule: str = "cosine"
    clip: float | None = None
    blocks: int = 20
    validation_tokens: int = 4096
    label_noise: float = 0.0
    head: Literal["linear_loss", "naive"] = "linear_loss"

    def __post_init__(self):
        for field in ("steps", "batch", "window", "blocks", "validation_tokens"):
            if getattr(self, field) < 1:
                raise LabError(f"{field} must be at least 1; got {getattr(self, field)}.")
        if self.clip is not None and not self.clip > 0:
            raise LabError(f"clip is a positive length, or none; got {self.clip}.")
        if not 0 <= self.label_noise <= 1:
            raise LabError(f"label_noise is a share of the targets, from 0 to 1; got {self.label_noise}.")
        if self.head not in ("linear_loss", "naive"):
            raise LabError(f"a head is linear_loss or naive; got {self.head!r}.")
        with _told("schedule", self.schedule):
            jax.eval_shape(self._shape, jax.ShapeDtypeStruct((), jnp.int32))
        if not callable(self.optimizer):  # a function's own may want other parameters than these
            with _told("optimizer", self.optimizer):
                jax.eval_shape(self._first_step, jax.ShapeDtypeStruct((2, 2), jnp.float32))

    @property
    def steps_a_block(self) -> int:
        """How many steps lie between two measurements."""
        return -(-self.steps // self.blocks)

    @property
    def starts(self) -> range:
        """The number of each block's first step."""
        return range(0, self.steps, self.steps_a_block)

    def transformation(self, rate: Any) -> optax.GradientTransformation:
        """The optax transformation at one learning rate, which may be traced."""
        shape = self._shape
        make = self.optimizer if callable(self.optimizer) else _from_table(self.optimizer, "optimizer", OPTIMIZERS, skip=1)
        optimizer = make(lambda step: rate * shape(step))
        return optimizer if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), optimizer)

    @property
    def _shape(self) -> optax.Schedule:
        return _from_table(self.schedule, "schedule", SCHEDULES, skip=1)(self.steps)

    def _first_step(self, parameters: Any) -> Any:
        optimizer = self.transformation(0.1)
        return optimizer.update(parameters, optimizer.init(parameters), parameters)


@contextlib.contextmanager
def _told(what: str, text: str) -> Iterator[None]:
    """An option's value that optax cannot use fails where it is used, and says nothing of whose it is."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise LabError(
            f"the {what} {text} fails: {type(error).__name__}: {first}. Has each option a value of its kind?"
        ) from error


def _from_table(text: str, what: str, table: dict[str, Callable], skip: int) -> Callable:
    name, options = parse_call(text, what)
    if name not in table:
        raise LabError(f"no {what} named {name!r}; {near_names(name, table)}")
    known = list(inspect.signature(table[name]).parameters)[skip:]
    for key in options:
        if key not in known:
            raise LabError(f"{name} has no option {key!r}; its options: {', '.join(known) or 'none'}.")
    return functools.partial(table[name], **options)
