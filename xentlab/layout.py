"""How a grid of runs lies on the machine: runs a call, calls at a time, devices, and memory as the compiled program has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xentlab.contract import LabError
from xentlab.memory import machine_memory, usable_cores
from xentlab.products import on_cpu

USED = 0.8  # of the memory that is free: the rest is for what XLA does not count


@dataclasses.dataclass(frozen=True)
class Layout:
    """width: runs that one call takes; at_a_time: calls side by side; parked: runs that wait do so in the host's memory."""

    width: int
    at_a_time: int
    parked: bool
    why: str


def preferred(runs: int, mesh: Mesh | None = None) -> Layout:
    """What is fastest on this backend, whatever it takes.

    A CPU does best with one run a core: a wide batch of small matrix products leaves its cache. On GPU and TPU one wide program
    takes all runs at once. A mesh's axis runs gets its share of them each; a mesh without one has every run on all devices.
    """
    if mesh is not None:
        axis = mesh.shape.get("runs", 1)
        at_once = axis if on_cpu() else -(-runs // axis) * axis
        return Layout(at_once if axis > 1 else 1, 1, False, f"a mesh of {mesh.size} devices, {axis} of them for different runs")
    if on_cpu():
        return Layout(1, min(runs, usable_cores()), False, "a run a core: a batch of runs would leave the CPU's cache")
    return Layout(runs, 1, False, "all runs in one program, as wide as the chip likes it")


def fitted(runs: int, wanted: Layout, needs: Callable[[int], tuple[int, int]], limit: int | None, step: int = 1) -> Layout:
    """The wanted layout, or as much of it as memory holds.

    needs(width) -> bytes that a call's runs stand in, and that it takes besides, as compiled. Fewer calls at a time come first,
    narrower ones then, in multiples of `step`; runs that wait are parked on the host where all of them would not fit. Raises
    `LabError` where a single call is too large.

    >>> fitted(8, Layout(8, 1, False, ""), lambda width: (width, 10 * width), limit=50).width
    4
    """
    found = wanted
    while limit is not None:
        standing, besides = needs(found.width)
        every, at_work = -(-runs // found.width) * standing, found.at_a_time * besides
        if every + at_work <= limit:
            return found
        if found.at_a_time > 1:
            found = dataclasses.replace(
                found, at_a_time=found.at_a_time - 1, why=f"memory holds {found.at_a_time - 1} at a time"
            )
        elif found.width > step:
            narrower = max(step, found.width // 2 // step * step)
            found = dataclasses.replace(found, width=narrower, why=f"memory holds {narrower} runs a call")
        elif standing + besides <= limit and not on_cpu():
            return dataclasses.replace(found, parked=True, why=f"{found.why}; those that wait do so on the host")
        else:
            raise LabError(
                f"{runs} runs take {(every + at_work) / 1e9:.3g} GB, of which {besides / 1e9:.3g} in one step, and there are "
                f"{limit / 1e9:.3g}. Take fewer seeds or rates, a smaller model or batch, or a mesh of more devices."
            )
    return found


def memory_limit() -> int | None:
    """Bytes that a grid may take: most of what is free on the device, or for this process on a CPU; None where neither says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(USED * (stats["bytes_limit"] - stats.get("bytes_in_use", 0)))
    return int(USED * machine_memory()[1]) if on_cpu() else None


@dataclasses.dataclass(frozen=True)
class Spread:
    """Where runs lie on a mesh: runs over the axis runs, a batch's windows over data, all that is [..., V] over model."""

    mesh: Mesh | None
    windows: int
    vocab: int

    def __post_init__(self):
        devices = self.mesh.shape.get("data", 1) if self.mesh else 1
        if self.windows % devices:
            raise LabError(
                f"{devices} devices cannot share a batch of {self.windows} windows evenly; take a multiple of {devices}."
            )
        devices = self.mesh.shape.get("model", 1) if self.mesh else 1
        if self.vocab % devices:
            raise LabError(f"{devices} devices cannot share {self.vocab} classes evenly; take a divisor of it as model's size.")

    @property
    def within(self) -> Mesh | None:
        """The mesh, if devices share a run."""
        return self.mesh if self.mesh is not None and {"data", "model"} & set(self.mesh.axis_names) else None

    @property
    def across(self) -> str | None:
        """The axis that runs are spread over, if there is one."""
        return "runs" if self.mesh is not None and "runs" in self.mesh.axis_names else None

    def batch(self, batch):
        """A run's windows [windows, ...]."""
        return self._constrained(batch, "data")

    def states(self, states):
        """Runs [runs, ...]: weight, its moments, and whatever else ends in the vocabulary; the rest is everywhere."""
        if self.mesh is None:
            return states

        def place(leaf):
            if not leaf.ndim:
                return ()
            last = ("model",) if leaf.ndim > 1 and leaf.shape[-1] == self.vocab else (None,) * (leaf.ndim > 1)
            return "runs", *[None] * (leaf.ndim - 2), *last

        return jax.tree.map(lambda leaf: self._constrained(leaf, *place(leaf)), states)

    def everywhere(self, arrays):
        """Whole on every device."""
        return jax.tree.map(lambda leaf: self._constrained(leaf), arrays)

    def _constrained(self, array, *axes):
        if self.mesh is None:
            return array
        known = [axis if axis in self.mesh.axis_names else None for axis in axes]
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*known)))
