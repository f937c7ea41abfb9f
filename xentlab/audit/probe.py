"""What every verdict is found with: a loss's value and gradient at any points, in float64, from one compiled program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from xentlab.contract import Loss, value_and_gradient
from xentlab.products import quickly

VOCAB = 4  # where all is asked that nobody asks elsewhere
CHUNK = 64  # points of one call, a class. One shape, so that one compilation serves every question.
STEP = 1e-5  # of the central differences
Both = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

YES, NO, UNDECIDED = True, False, "undecided"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What was found of one property: the value, how it was found, and for a "no" a witness to check by hand.

    value: True, False, "undecided", or what the property is (a number, a name, None). witness: plain numbers and lists.
    """

    value: Any
    evidence: str
    witness: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Probe:
    """A loss under study: `both(z [N, V], y [N]) -> value [N], gradient [N, V]`, a seed for all that is drawn, and V."""

    loss: Loss
    both: Both
    seed: int
    vocab: int

    @functools.cached_property
    def unit(self) -> float:
        """The gradient's middle size where it is not 0, to a power of 2: what tolerances are relative to."""
        size = np.abs(self.field(*self.points((0.3, 1.0, 3.0), each=20, salt=50))).max(axis=1)
        size = size[np.isfinite(size) & (size > 0)]
        return float(2.0 ** np.round(np.log2(np.median(size)))) if len(size) else 1.0

    def in_units(self) -> Probe:
        """The same loss over its `unit`."""
        return dataclasses.replace(self, both=lambda z, y: tuple(each / self.unit for each in self.both(z, y)))

    def value(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Values [N] at logits [N, V] and targets [N]."""
        return self.both(z, y)[0]

    def field(self, z: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Gradients [N, V]."""
        return self.both(z, y)[1]

    def jacobian(self, z: np.ndarray, y: np.ndarray, step: float = STEP) -> np.ndarray:
        """The field's derivative [N, V, V] by central differences: a second autodiff would take a stop_gradient for 0."""
        return np.swapaxes(central_differences(self.field, z, y, step), 1, 2)

    def points(self, scales=(0.3, 1.0, 3.0, 8.0, 20.0), each: int = 40, salt: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Random logits at several scales, and random targets; `each` of a scale, and more where there are more classes."""
        rng, each = np.random.default_rng((self.seed, salt)), each * max(1, self.vocab // 4)  # as many whose target leads
        z = np.concatenate([scale * rng.uniform(-1, 1, (each, self.vocab)) for scale in scales])
        return z, rng.integers(0, self.vocab, len(z))


def make_probe(loss: Loss, seed: int = 0, vocab: int = VOCAB) -> Probe:
    """A probe of a loss; compiles on first use."""

    compiled, chunk = jax.jit(functools.partial(value_and_gradient, loss), compiler_options=quickly(0)), CHUNK * vocab

    def both(z, y):
        points, rest = len(z), len(z) % chunk
        # Filled with the points themselves: beside rows of 0 a loss that looks at its batch would see those alone.
        last = points - rest + np.resize(np.arange(rest), chunk if rest else 0)
        order = np.concatenate([np.arange(points - rest), last])
        z, y = np.asarray(z, np.float64)[order], np.asarray(y).astype(np.int32)[order]
        with jax.enable_x64(True):  # and NumPy's arrays as they are: jnp.asarray would take as long as the loss does
            found = [compiled(z[start : start + chunk], y[start : start + chunk]) for start in range(0, len(z), chunk)]
        wide = lambda parts: np.concatenate([np.asarray(each, np.float64) for each in parts])[:points]
        values, gradients = map(wide, zip(*found, strict=True))
        return values, gradients

    return Probe(loss, both, seed, vocab)


@np.errstate(invalid="ignore")  # of two infinities
def central_differences(of: Callable, z: np.ndarray, y: np.ndarray, step: float) -> np.ndarray:
    """How each logit moves what a function of logits [N, V] and targets [N] gives, [N, ...] -> [N, V, ...]."""
    nudges = step * np.eye(z.shape[-1])
    moved = np.concatenate([z[:, None, :] + nudges, z[:, None, :] - nudges], axis=1).reshape(-1, z.shape[-1])
    found = of(moved, np.repeat(y, 2 * z.shape[-1]))
    found = found.reshape(len(z), 2, z.shape[-1], *found.shape[1:])
    return (found[:, 0] - found[:, 1]) / (2 * step)


def plain(value: Any) -> Any:
    """Numbers and lists that JSON and a reader take: arrays as lists, to ten digits."""
    if isinstance(value, np.ndarray):
        return [plain(each) for each in value]
    if isinstance(value, np.integer | int) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, np.floating | float):
        return float(f"{value:.10g}")
    return value


def no(evidence: str, **witness: Any) -> Verdict:
    """A "no" with what shows it."""
    return Verdict(NO, evidence, {key: plain(value) for key, value in witness.items()})
