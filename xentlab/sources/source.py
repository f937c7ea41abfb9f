"""What training asks of a source of tokens, and its three parts."""

import pathlib
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from xentlab.contract import LabError

PARTS = ("train", "validation", "test")


@runtime_checkable
class Source(Protocol):
    """What training asks of a source.

    order: how many tokens its law reads, 0 without one. token_bytes: how many UTF-8 bytes each token stands for [V], or None.
    split: int32 tokens [N] of "train", "validation" or "test". describe: what a record keeps of it, as JSON has it.
    """

    name: str
    vocab: int
    order: int
    token_bytes: np.ndarray | None

    def split(self, part: str) -> np.ndarray: ...

    def describe(self) -> dict: ...


def checked_source(source: Source) -> Source:
    """The source itself, once it is seen to have what one must, and no token outside of its vocabulary. Raises `LabError`."""
    if isinstance(source, (str, pathlib.Path)):
        raise LabError(f"a source is an object, xentlab.sources.Text({str(source)!r}) or MarkovSource(...); got a path.")
    if lacks := [name for name in ("name", "vocab", "order", "token_bytes", "split", "describe") if not hasattr(source, name)]:
        raise LabError(f"a source has {', '.join(lacks)} too; {type(source).__name__} has not. See xentlab.sources.Source.")
    for part in PARTS:
        tokens = np.asarray(source.split(part))
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1:
            raise LabError(f"a part is integer tokens [N]; {part} of {source.name} is {tokens.dtype} {list(tokens.shape)}.")
        bad = np.flatnonzero((tokens < 0) | (tokens >= source.vocab))
        if len(bad):
            raise LabError(
                f"{source.name} has token {tokens[bad[0]]} at place {bad[0]} of {part} ({len(bad)} such), outside of its "
                f"vocabulary of {source.vocab}. Did the tokenizer's vocabulary change?"
            )
    return source


def identity(described: dict) -> dict:
    """What a source's `describe()` says of what it is: neither where it lies, nor what was computed of it.

    The latter may differ by a rounding on another machine.
    """
    return {key: value for key, value in described.items() if key not in ("path", "name", "entropy_rate_nats")}


def part_of(sequence: Sequence | np.ndarray, part: str, train: float, validation: float):
    """A part of a sequence by place: the first share of it to train on, the next to validate on, the rest to test on."""
    if part not in PARTS:
        raise LabError(f"a part is one of {', '.join(PARTS)}; got {part!r}.")
    first, second = int(len(sequence) * train), int(len(sequence) * (train + validation))
    return {"train": sequence[:first], "validation": sequence[first:second], "test": sequence[second:]}[part]
