"""How a run is trained, apart from its loss, source and model: steps, batches, optimizer, schedule, head."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from xentlab import defaults
from xentlab.adam import adam, adamw
from xentlab.contract import LabError, in_short, name_of, whole
from xentlab.names import from_table, is_own, with_settings

MOST_STEPS = 1000  # of a block: only between blocks is anything kept, and stopped

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adam": adam,
    "adamw": adamw,
    "muon": optax.contrib.muon,
    "lion": optax.lion,
}


def _constant(steps: int) -> optax.Schedule:
    return optax.constant_schedule(1.0)


def _linear(steps: int, *, warmup: float = 0.05) -> optax.Schedule:
    up = _warmed(steps, warmup)
    return _after(up, optax.linear_schedule(1, 0, max(1, steps - up)))


def _cosine(steps: int, *, warmup: float = 0.05, end: float = 0.05) -> optax.Schedule:
    up = _warmed(steps, warmup)
    if not 0 <= end <= 1:
        raise LabError(f"end is the share of the rate that is left, from 0 to 1; got {end}.")
    return _after(up, optax.cosine_decay_schedule(1, max(1, steps - up), end))


def _warmed(steps, warmup):
    if not 0 <= warmup <= 1:
        raise LabError(f"warmup is a share of the steps, from 0 to 1; got {warmup}.")
    return round(warmup * steps)


def _after(up, schedule):
    """The schedule once the rate has risen for `up` steps, from the first of them on: of a rate of 0 a step is lost."""
    return optax.join_schedules([optax.linear_schedule(1 / up, 1, up - 1), schedule], [up]) if up else schedule


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {"constant": _constant, "linear": _linear, "cosine": _cosine}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a run is trained; every loss of a race gets the same.

    steps; batch: windows a step; window: predicted tokens a window; optimizer: one of `OPTIMIZERS` with its options,
    "adamw(weight_decay=0.1)", or a function, or the name of one, "./mine.py:function", that makes an optax transformation of a
    schedule (step -> rate), which optax takes for a learning rate; schedule: one of `SCHEDULES` with its options, or a
    function, or the name of one, that makes a schedule of the number of steps, to be scaled by the rate; clip: greatest length
    of the whole gradient, or None; blocks: how often it is measured, at least once in `MOST_STEPS` steps; label_noise: the
    share of training targets that are another token, drawn once; what a model reads, and what it is tested on, stays clean;
    head: the loss by `linear_loss`, or of a batch's whole logits, to compare with (experiments/bench_training.py).
    """

    steps: int = defaults.STEPS
    batch: int = defaults.BATCH
    window: int = defaults.WINDOW
    optimizer: str | Callable[[Any], optax.GradientTransformation] = defaults.OPTIMIZER
    schedule: str | Callable[[int], optax.Schedule] = defaults.SCHEDULE
    clip: float | None = None
    blocks: int = 20
    validation_tokens: int = 4096
    label_noise: float = 0.0
    head: Literal["linear_loss", "naive"] = "linear_loss"

    def __post_init__(self):
        for field in ("steps", "batch", "window", "blocks", "validation_tokens"):
            given = getattr(self, field)
            value = whole(given, 1, f"{field} is a whole number of at least 1; got {given}.")
            if value >= 2**31:
                raise LabError(f"{field} is counted in 32 bits, up to {2**31 - 1}; got {value}.")
            object.__setattr__(self, field, value)  # one of JAX's would be traced
        if self.clip is not None and not (hasattr(self.clip, "__float__") and 0 < self.clip < math.inf):
            raise LabError(f"clip is a positive and finite length, or none; got {self.clip!r}.")
        if not (hasattr(self.label_noise, "__float__") and 0 <= self.label_noise <= 1):
            raise LabError(f"label_noise is a share of the targets, from 0 to 1; got {self.label_noise!r}.")
        if self.head not in ("linear_loss", "naive"):
            raise LabError(f"a head is linear_loss or naive; got {self.head!r}.")
        if not callable(self.schedule) and not isinstance(self.schedule, str):
            raise LabError(
                f"a schedule is a name, one of {', '.join(SCHEDULES)}, or what makes one of the number of steps; got "
                f"{type(self.schedule).__name__}."
            )
        if not callable(self.optimizer) and not isinstance(self.optimizer, str):
            raise LabError(
                f"an optimizer is a name, or what makes one of a schedule: optimizer=optax.adam, not optax.adam(0.001); got "
                f"{type(self.optimizer).__name__}."
            )
        with _told("schedule", _shown(self.schedule), "Has each option a value of its kind?"):
            if not callable(shape := self._shape):
                raise LabError(
                    f"the schedule {_shown(self.schedule)} makes {type(shape).__name__} of the number of steps, no function of "
                    "the step: lambda steps: optax.linear_schedule(1, 0, steps) does."
                )
            jax.eval_shape(shape, jax.ShapeDtypeStruct((), jnp.int32))
        if not self.has_own_optimizer:  # which may want other parameters than these
            with _told("optimizer", self.optimizer, "Has each option a value of its kind?"):
                jax.eval_shape(self._first_step, jax.ShapeDtypeStruct((2, 2), jnp.float32))
        else:
            with _told("optimizer", _shown(self.optimizer), "It is given a schedule, a function of the step, and no number."):
                made = self.transformation(0.1)
            if not (hasattr(made, "init") and hasattr(made, "update")):
                raise LabError(
                    f"the optimizer {_shown(self.optimizer)} makes {type(made).__name__} of a schedule, and no optax "
                    "transformation. Does it return one?"
                )

    @property
    def steps_a_block(self) -> int:
        """How many steps lie between two measurements."""
        return min(-(-self.steps // self.blocks), MOST_STEPS)

    @property
    def starts(self) -> range:
        """The number of each block's first step."""
        return range(0, self.steps, self.steps_a_block)

    def transformation(self, rate: Any) -> optax.GradientTransformation:
        """The optax transformation at one learning rate, which may be traced."""
        shape = self._shape
        optimizer = _named(self.optimizer, "optimizer", OPTIMIZERS)(lambda step: rate * shape(step))
        return optimizer if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), optimizer)

    @property
    def _shape(self) -> Any:
        return _named(self.schedule, "schedule", SCHEDULES)(self.steps)

    @property
    def has_own_optimizer(self) -> bool:
        """Whether the optimizer is a function of the user's own, by itself or by name."""
        return callable(self.optimizer) or is_own(self.optimizer)

    def check_optimizer(self, parameters: Any) -> None:
        """Raises `LabError` for an optimizer that makes no step of these parameters, given as shapes."""
        remedy = "A step gives it (gradient, state, parameters) alone: neither the loss's value nor its function."
        with _told("optimizer", _shown(self.optimizer), remedy):
            jax.eval_shape(self._first_step, parameters)

    def _first_step(self, parameters: Any) -> Any:
        optimizer = self.transformation(0.1)
        return optimizer.update(parameters, optimizer.init(parameters), parameters)


@contextlib.contextmanager
def _told(what: str, text: str, remedy: str) -> Iterator[None]:
    """What optax cannot use fails where it is used, and says nothing of whose it is."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        if isinstance(error, jax.dtypes.TypePromotionError):
            remedy = 'Optax leaves promotion to JAX: with jax.numpy_dtype_promotion("standard"), say.'
        raise LabError(f"the {what} {text} fails: {in_short(error)}. {remedy}") from error


def _named(function: str | Callable, what: str, table: dict[str, Callable]) -> Callable:
    return function if callable(function) else with_settings(*from_table(function, what, table), 1, "option")


def _shown(function: str | Callable) -> str:
    return function if isinstance(function, str) else name_of(function)
