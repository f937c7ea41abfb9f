"""How far a race has come, on disk: each grid of runs at its last blocks, by Orbax. A checkpoint is whole or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from xentlab import hosts
from xentlab.contract import LabError

LAST = 2  # checkpoints of a grid that are kept
HALF_WRITTEN = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is not whole yet
# What a system refuses now and may grant later: no damage.
PASSING = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


class Stopped(KeyboardInterrupt):
    """The race was asked to stop, and stands in its checkpoints."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where a race keeps its grids, and when.

    folder; every: seconds, at least, between two checkpoints of a grid, besides the one at its end; stop: set from elsewhere,
    it lets the block in hand end, keeps it, and raises `Stopped`.
    """

    folder: pathlib.Path
    every: float = 10.0
    stop: threading.Event = dataclasses.field(default_factory=threading.Event)

    def stop_if_asked(self) -> None:
        """Raises `Stopped` where any of the processes is asked to: between blocks, where all stands in its checkpoints."""
        if hosts.gathered(self.stop.is_set()).any():
            raise Stopped

    def grid(self, loss: str, number: int, made: dict[str, Any] | None = None) -> Grid:
        """The place of a loss's n-th grid of runs. made: what these are trained with, by name, as JSON has it."""
        # A name may be a path with settings, and two may differ in what no folder's name can hold.
        short = re.sub(r"[^\w.]+", "_", loss)[-40:]
        return Grid(
            self, self.folder / f"{short}-{hashlib.sha256(loss.encode()).hexdigest()[:8]}" / str(number), loss, made or {}
        )


def is_grid_folder(name: str) -> bool:
    """Whether a folder among the checkpoints has the name of one that `Checkpoints.grid` has a loss's grids in."""
    return bool(re.fullmatch(r"[\w.]*-[0-9a-f]{8}", name))


@dataclasses.dataclass
class Grid:
    """One grid's checkpoints: a step for every block that was kept."""

    place: Checkpoints
    folder: pathlib.Path
    loss: str
    made: dict[str, Any] = dataclasses.field(default_factory=dict)
    saved: float = dataclasses.field(default_factory=time.monotonic)

    def load(self, like: Any) -> tuple[int, Any] | None:
        """The newest whole checkpoint: blocks done, and a tree as `like`; None if there is none.

        A damaged one is told, removed, and the one before it taken; runs that were made otherwise are told and removed. Raises
        `LabError` if all are damaged, or of another shape.
        """
        if hosts.unlike({"steps": sorted(path.name for path in self.folder.glob("*") if path.name.isdecimal())}):
            raise LabError(
                f"the processes see different checkpoints of {self.loss} in {self.folder}. Is it one folder, that all of them "
                "share? A network's file system may take a while to show what was written: try again."
            )
        if not self.folder.is_dir():
            return None
        damaged = []
        with self._manager() as manager:
            for step in sorted(manager.all_steps(), reverse=True):
                try:
                    tree = self._read(manager, step, like)
                except LabError:
                    raise
                except Exception as error:
                    damaged.append(f"block {step} ({self._damage(error)})")
                    continue
                if tree is None:
                    return None
                for bad in [other for other in manager.all_steps() if other > step]:
                    manager.delete(bad)
                if damaged:
                    said = f"{self.loss}: damaged, and left out: {', '.join(damaged)}. Going on from block {step}."
                    print(said, file=sys.stderr)
                return step, tree
        if damaged:
            raise LabError(
                f"no checkpoint of {self.loss} can be read: {', '.join(damaged)}. Delete {self.folder} to train these runs "
                "from their beginning; all others keep theirs."
            )
        return None

    def _read(self, manager, step, like):
        """The tree of a checkpoint; of runs that were made otherwise None, and all of them removed."""
        import orbax.checkpoint as ocp

        written = manager.restore(step, args=ocp.args.Composite(sums=ocp.args.JsonRestore()))["sums"]
        # Other rates leave no trace in the shapes: the runs would pass for what they are not.
        if other := [name for name, value in self.made.items() if written["made"].get(name) != value]:
            print(f"{self.loss}: was kept with other {', '.join(other)}, and is trained anew.", file=sys.stderr)
            for each in manager.all_steps():
                manager.delete(each)
            return None
        if written["shapes"] != _shapes(like):
            raise LabError(
                f"the checkpoints of {self.loss} in {self.folder} are of other runs: their number, model or optimizer differs. "
                "Start again in another folder."
            )
        tree = manager.restore(step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(like)))["tree"]
        if written["sums"] != _sums(tree):
            raise ValueError("its check sums differ")
        return tree

    def _damage(self, error: Exception) -> str:
        """Whatever a decoder says of bytes that are not what was written. Raises `LabError` for what is no damage."""
        no_room = isinstance(error, (MemoryError, jax.errors.JaxRuntimeError))
        if no_room or getattr(error, "errno", None) in PASSING:
            raise LabError(
                f"a checkpoint of {self.loss} could not be read just now: {_short(error)}. It is whole: try again."
            ) from error
        return _short(error)

    def after(self, block: int, last: bool, tree: Callable[[], Any]) -> None:
        """To be called after every block: keeps the tree if it is time, and stops if that is asked for.

        Raises `LabError` if it cannot be written: what was kept before stays whole.
        """
        due = last or time.monotonic() - self.saved >= self.place.every
        # Of several processes all must stop and save, or none: where one is to stop, and when the first one is to save.
        stops, dues = hosts.gathered([self.place.stop.is_set(), due]).T
        stop = bool(stops.any())
        if stop or dues[0]:
            self._save(block, tree())
            self.saved = time.monotonic()
        if stop:
            raise Stopped

    def _save(self, block, tree):
        import orbax.checkpoint as ocp

        written = {"sums": _sums(tree), "shapes": _shapes(tree), "made": self.made}
        args = ocp.args.Composite(tree=ocp.args.StandardSave(tree), sums=ocp.args.JsonSave(written))
        try:
            with self._manager() as manager:
                manager.save(block, args=args, force=True)
        except (LabError, KeyboardInterrupt):
            raise
        except Exception as error:  # tensorstore and file systems say it in many ways
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process is lost, which who holds them all says
            raise LabError(
                f"a checkpoint could not be written into {self.folder}: {_short(error)}. What was kept before is whole. Make "
                "room, and go on with --resume."
            ) from error

    @contextlib.contextmanager
    def _manager(self) -> Iterator[Any]:
        import orbax.checkpoint as ocp

        if hosts.first():  # Orbax does it in a thread, which may outlive the manager, and meet the next one's
            for left in self.folder.glob(f"*{HALF_WRITTEN}*"):
                shutil.rmtree(left, ignore_errors=True)
        # Written before the next block begins: it takes a twentieth of a second, and what is on disk is what was reached.
        options = ocp.CheckpointManagerOptions(max_to_keep=LAST, enable_async_checkpointing=False)
        _hush()
        manager = ocp.CheckpointManager(self.folder.absolute(), options=options, item_names=("tree", "sums"))
        try:
            yield manager
        finally:
            manager.close()


@functools.cache
def _hush() -> None:
    """Orbax logs a failed write with its whole stack before it raises, and its threads afterwards; who calls says it in a line.

    So do asyncio and Python of arrays that were read, or still to be read, beside the first that could not be. For good, and
    once: a thread may come when the process is at its end.
    """
    logging.getLogger("absl").addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    theirs = re.compile("orbax|tensorstore")
    logging.getLogger("asyncio").addFilter(lambda record: not theirs.search(record.getMessage()))
    warnings.filterwarnings("ignore", r"coroutine 'Store\..*' was never awaited", RuntimeWarning)
    hook = sys.unraisablehook
    # Of a write that was under way when another one failed.
    sys.unraisablehook = lambda raised: None if "Event loop is closed" in str(raised.exc_value) else hook(raised)


def _shapes(tree: Any) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]


def _sums(tree: Any) -> list[int]:
    """A check sum of each leaf's bits, the same however it is spread over devices.

    tensorstore checks its index, but not all of its data: a flipped bit in an array came back as another number.
    """
    return [int(each) for each in _sum_leaves(jax.tree.leaves(tree))]


@jax.jit
def _sum_leaves(leaves):
    def one(leaf):
        bits = leaf.astype(jnp.uint32) if leaf.dtype == bool else leaf
        bits = jax.lax.bitcast_convert_type(bits, f"uint{8 * min(4, bits.dtype.itemsize)}").astype(jnp.uint32).reshape(-1)
        # Odd factors: a change in one number always shows, modulo 2^32.
        factors = 2 * jax.lax.iota(jnp.uint32, bits.size) + 1
        return jnp.sum(bits * factors, dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _short(error: BaseException) -> str:
    """An error in a line: of a long one the end, where the cause is, but for what tensorstore was asked to open."""
    text = " ".join(str(error).split()).split(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) < 160 else f"… {text[-150:]}"
