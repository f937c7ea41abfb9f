"""What a loss teaches: its gradient as a function of the target's probability, and where a batch's gradient goes."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from xentlab import defaults
from xentlab.catalogue import resolve_all
from xentlab.contract import FAILURES, LabError, Loss, in_short, name_of, value_and_gradient, whole

if TYPE_CHECKING:
    import pandas as pd

Rivals = Literal["even", "one"]
PATHS: tuple[Rivals, ...] = get_args(Rivals)
Batch = np.ndarray | jax.Array | str | pathlib.Path  # an array, or a file of one
BINS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
LEAST = 1e-300  # probability of a profile: below are float64's last few digits
ON_EDGE = 1e-6  # of p's odds: what logits in float32 leave of a p that lies on a bin's edge


def path_logits(p: np.ndarray, vocab: int, rivals: str) -> tuple[np.ndarray, np.ndarray]:
    """The logits [P, V] whose softmax gives class 0 each p [P], and their derivative along the path dz/dp [P, V].

    - "even": z_0 moves and the rest stay at 0, so that the rivals share 1 - p evenly;
    - "one": class 1 rises and the rest, the target too, stay at 0. It starts at p = 1/(V - 1), with class 1 at -inf:
      the logits of a greater p are NaN.
    """
    z, dz = np.zeros((len(p), vocab)), np.zeros((len(p), vocab))
    if rivals == "even":
        z[:, 0] = np.log(p) - np.log1p(-p) + np.log(vocab - 1)
        dz[:, 0] = 1 / (p * (1 - p))
    else:
        left = (1 - p) - (vocab - 2) * p  # what the rest, at p each, leave the rival; of no others it is 1 - p, which is exact
        odds = np.where(left > (1e-12 if vocab > 2 else 0), left, 0.0) / p  # e^z of the rival, but for what is rounding
        with np.errstate(invalid="ignore", divide="ignore"):
            z[:, 1] = np.where(odds > 0, np.log(odds), np.nan)
            dz[:, 1] = np.where(odds > 0, -1 / (p * (p * odds)), np.nan)  # p**2 may be below float64
        z[~(odds > 0)] = np.nan
    return z, dz


def profile_points() -> np.ndarray:
    """Probabilities for a profile from 1e-12 to 0.99: four a decade, each power of ten among them, and closer near 1."""
    return np.concatenate([np.logspace(-12, -1, 45), [0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99]])


def gradient_profile(
    losses: Iterable[str | Loss],
    probabilities: Sequence[float] | np.ndarray = defaults.PROBABILITIES,
    vocab: int = 16,
    rivals: str = "even",
) -> pd.DataFrame:
    """A loss's value and gradient at chosen probabilities of the target, class 0, in float64 down to p = 1e-12 and below.

    losses: names or callables; probabilities: in (0, 1), from 1e-300 on; vocab: V >= 2; rivals: the path that p takes down.
    "even" moves the target's logit with the rest equal; "one" lets one rival rise and leaves the target where it is; "both".

    Returns one row a path, loss and p, columns loss, rivals, p, value, dvalue_dp (the total derivative along the path),
    dvalue_dlogit (the partial derivative dL/dz_y), gradient_norm (the length of the whole gradient in z, rivals' entries to
    float64's rounding of the greatest). Where a loss stops gradients, dvalue_dp is of those that it has left. On "one" a p of
    1/(V - 1) and above cannot be reached: NaN in all four. Raises `LabError` for bad arguments.

    >>> profile = gradient_profile(["nll", "brier"], [0.1], vocab=2)
    >>> profile[["loss", "dvalue_dp", "dvalue_dlogit"]].round(6).values.tolist()  # -1/p, -(1-p); -4(1-p), -4p(1-p)^2
    [['nll', -10.0, -0.9], ['brier', -3.6, -0.324]]
    """
    import pandas as pd

    p = _numbers(
        probabilities,
        lambda p: p.size > 0 and ((p >= LEAST) & (p < 1)).all(),
        f"probabilities lie strictly between 0 and 1, from {LEAST:g} on",
    ).reshape(-1)
    vocab = whole(vocab, 2, f"a profile needs a vocabulary of at least 2; got {vocab!r}.")
    found = resolve_all(losses, vocab)
    if rivals not in (*PATHS, "both"):
        raise LabError(f"rivals is one of {', '.join(PATHS)} or both; got {rivals!r}.")
    paths = PATHS if rivals == "both" else (rivals,)
    z, dz = map(np.concatenate, zip(*(path_logits(p, vocab, path) for path in paths), strict=True))
    frames = []
    unreachable = np.isnan(z).any(axis=-1)
    reached = np.where(unreachable[:, None], 0, z)  # under jax.debug_nans a NaN would be the loss's fault
    for name, (value, gradient) in zip(found, _values_and_gradients(found.values(), reached), strict=True):
        value = np.where(unreachable, np.nan, value)
        gradient = np.where(unreachable[:, None], np.nan, gradient)
        # Of a gradient that is infinite where the path stands still, and of a slope that is beyond float64.
        with np.errstate(invalid="ignore", over="ignore"):
            along = np.sum(gradient * dz, axis=-1)
        frames.append(
            pd.DataFrame(
                {
                    "loss": name,
                    "rivals": np.repeat(paths, len(p)),
                    "p": np.tile(p, len(paths)),
                    "value": value,
                    "dvalue_dp": along,
                    "dvalue_dlogit": gradient[:, 0],
                    "gradient_norm": np.hypot.reduce(gradient, axis=-1),  # no square leaves float64
                }
            )
        )
    rows = pd.concat(frames, ignore_index=True)
    return pd.concat([rows[rows.rivals == path] for path in paths], ignore_index=True)


def _numbers(given: object, fits: Callable[[np.ndarray], bool], message: str) -> np.ndarray:
    """Given numbers in float64. Raises `LabError` for what are none, or do not fit."""
    try:
        numbers = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        numbers = None
    if numbers is None or not fits(numbers):
        raise LabError(f"{message}; got {np.asarray(given, object).tolist()!r}.")
    return numbers


def _values_and_gradients(losses: Iterable[Loss], logits: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each loss's value [P] and gradient [P, V] at target 0, in float64."""

    @jax.jit  # all in one program: XLA takes half the time that it takes for one a loss
    def of_all(z):
        return [_told(loss, z, jnp.zeros(z.shape[:-1], jnp.int32)) for loss in losses]

    with jax.enable_x64(True):
        return [tuple(np.asarray(each, np.float64) for each in found) for found in of_all(jnp.asarray(logits, jnp.float64))]


def _told(loss: Loss, logits: Batch, targets: Batch) -> tuple[jax.Array, jax.Array]:
    """A loss's value and gradient. Raises `LabError`, with the loss's name, where it does not take these logits."""
    try:
        return value_and_gradient(loss, logits, targets)
    except FAILURES as error:
        raise LabError(
            f"{name_of(loss)} fails on {logits.dtype} logits {list(logits.shape)}: {in_short(error)}. A loss "
            "takes logits [..., V] of any floating type; what it makes itself has theirs, logits.dtype."
        ) from error


def gradient_budget(
    losses: Iterable[str | Loss],
    logits: Batch,
    targets: Batch | None = None,
    bins: Sequence[float] | np.ndarray = BINS,
) -> pd.DataFrame:
    """Where a batch's gradient goes: by the probability that the model, by softmax, gave each right token.

    logits [..., V] and targets [...], arrays or .npy files; or one .npz that holds both as `logits` and `targets`.
    bins: rising edges of p from 0 to 1; a token with p on an edge, or short of it by a millionth of p / (1 - p), which is
    rounding, falls into the bin above it. p is taken in float64, gradients in float32: of a length below 1e-6 or so, that of a
    loss that gives up on its tokens, float32 keeps few digits or none.

    Returns one row a loss and bin, columns loss, p_low, p_high, tokens, share_of_tokens, gradient (the mean length of
    dL/dz over the bin's tokens, NaN if it has none), share_of_gradient (of the lengths' sum, 0 if that is 0).
    Raises `LabError` for shapes that do not fit, targets outside [0, V), and logits that are NaN, +inf or
    beyond float32.

    >>> even = np.zeros((4, 2), np.float32)
    >>> budget = gradient_budget(["nll"], even, np.zeros(4, int), bins=[0, 0.4, 1])
    >>> budget[["tokens", "gradient", "share_of_gradient"]].round(4).values.tolist()  # |(-1/2, 1/2)|
    [[0.0, nan, 0.0], [4.0, 0.7071, 1.0]]
    """
    import pandas as pd

    logits, targets = load_batch(logits, targets)
    found = resolve_all(losses, logits.shape[-1])
    rises = lambda edges: edges.ndim == 1 and edges.size > 1 and (edges[0], edges[-1]) == (0, 1) and (np.diff(edges) > 0).all()
    edges = _numbers(bins, rises, "bins are rising edges from 0 to 1")
    p = _target_probabilities(logits, targets)
    place = np.clip(np.searchsorted(edges - ON_EDGE * edges * (1 - edges), p, side="right") - 1, 0, len(edges) - 2)
    tokens = np.bincount(place, minlength=len(edges) - 1)
    frames = []
    for name, loss in found.items():
        norms = _in_chunks(_gradient_norms(loss), logits, targets).astype(np.float64)
        sums = np.bincount(place, weights=norms, minlength=len(edges) - 1)
        frames.append(
            pd.DataFrame(
                {
                    "loss": name,
                    "p_low": edges[:-1],
                    "p_high": edges[1:],
                    "tokens": tokens,
                    "share_of_tokens": tokens / len(p),
                    "gradient": np.where(tokens > 0, sums / np.maximum(tokens, 1), np.nan),
                    "share_of_gradient": _shares(sums),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _shares(sums: np.ndarray) -> np.ndarray:
    """Of the whole; NaN for all where that is no number."""
    whole = sums.sum()
    return sums / whole if 0 < whole < np.inf else 0 * sums if whole == 0 else np.full_like(sums, np.nan)


def _gradient_norms(loss: Loss):
    def norms(logits, targets):
        gradient = jax.grad(lambda z: jnp.sum(loss(z, targets)))(logits)
        # Scaled by the greatest entry first: squares of 1e-30 and of 1e30 both leave float32.
        top = jnp.max(jnp.abs(gradient), axis=-1, keepdims=True)
        scale = jnp.where(top > 0, top, 1)
        return jnp.where(jnp.isinf(top[..., 0]), top[..., 0], scale[..., 0] * jnp.linalg.norm(gradient / scale, axis=-1))

    return norms


def _chunks(logits: np.ndarray) -> Iterator[slice]:
    """Tokens of [N, V] logits, at most 2^23 logits at once."""
    tokens, vocab = logits.shape
    size = max(1, min(tokens, 2**23 // vocab))
    return (slice(start, start + size) for start in range(0, tokens, size))


def _target_probabilities(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The softmax of [N, V] logits at [N] targets, in float64."""
    found = []
    for rows in _chunks(logits):
        share = logits[rows].astype(np.float64)
        share -= share.max(axis=-1, keepdims=True)
        np.exp(share, out=share)
        found.append(np.take_along_axis(share, targets[rows, None], axis=-1)[:, 0] / share.sum(axis=-1))
    return np.concatenate(found)


def _in_chunks(function, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """`function` of [N, V] logits in float32 and [N] targets, in chunks; compiled once, the tail padded."""
    compiled = jax.jit(function)
    parts = []
    for rows in _chunks(logits):
        z, y = logits[rows].astype(np.float32), targets[rows]
        missing = rows.stop - rows.start - len(y)
        padded = np.pad(z, ((0, missing), (0, 0))), np.pad(y, (0, missing))
        parts.append(np.asarray(compiled(*map(jnp.asarray, padded)))[: len(y)])
    return np.concatenate(parts)


def load_batch(logits: Batch, targets: Batch | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Logits [N, V] and targets [N] in int32 from arrays or files, checked. Raises `LabError`.

    Logits are in float64 where they are wider than float32, though none is beyond it, else in float32.
    """
    where = "what was given"
    if logits is None:
        raise LabError("logits are an array [..., V], or a file of one; got None.")
    if isinstance(logits, str | pathlib.Path):
        where = str(logits)
        loaded = _load(pathlib.Path(logits))
        if isinstance(loaded, dict):
            missing = {"logits", "targets"} - loaded.keys() if targets is None else {"logits"} - loaded.keys()
            if missing:
                raise LabError(
                    f"{where} holds {', '.join(sorted(loaded)) or 'nothing'}; it needs arrays named logits and targets. "
                    "Write it with numpy.savez(file, logits=..., targets=...)."
                )
            if targets is not None and "targets" in loaded:
                raise LabError(f"{where} holds targets too, beside those that are given. Give one of them.")
            logits = loaded["logits"]
            targets = loaded["targets"] if targets is None else targets
        else:
            logits = loaded
    if targets is None:
        raise LabError(
            f"{where} holds logits alone; give the targets too (targets=, --targets FILE.npy), or one .npz with logits and "
            "targets."
        )
    if isinstance(targets, str | pathlib.Path):
        targets = _load(pathlib.Path(targets))
        if isinstance(targets, dict):
            raise LabError("the targets' file is one array: a .npy, not a .npz.")
    logits, targets = np.asarray(logits), np.asarray(targets)
    # bfloat16 arrays have numpy's kind V: their values still are floating numbers.
    if logits.dtype.kind != "f" and not jnp.issubdtype(logits.dtype, jnp.floating):
        remedy = " NumPy saves bfloat16 without its name: save logits.astype(numpy.float32)." if logits.dtype == "V2" else ""
        raise LabError(f"{where}: logits are floating numbers; got {logits.dtype}.{remedy}")
    if targets.dtype.kind not in "iu":
        remedy = "of one-hot ones take the argmax" if targets.shape == logits.shape else "targets.astype(int) makes them so"
        raise LabError(f"targets are integers; got {targets.dtype}: {remedy}.")
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape or logits.size == 0:
        fitting = [axis for axis in range(logits.ndim - 1) if np.delete(logits.shape, axis).tolist() == list(targets.shape)]
        remedy = f" Is axis {fitting[0]} the vocabulary? Take numpy.moveaxis(logits, {fitting[0]}, -1)." if fitting else ""
        raise LabError(
            f"logits [..., V] go with targets [...], at least one token; got {list(logits.shape)} and {list(targets.shape)}."
            f"{remedy}"
        )
    vocab = logits.shape[-1]
    wide = np.float64 if logits.dtype.itemsize > 4 else np.float32
    logits, targets = logits.reshape(-1, vocab).astype(wide), targets.reshape(-1)
    bad = np.flatnonzero((targets < 0) | (targets >= vocab))
    if len(bad):
        raise LabError(
            f"targets must lie in [0, {vocab}); got {targets[bad[0]]} at token {bad[0]} ({len(bad)} such). "
            + ("Leave ignored tokens out." if (targets[bad] < 0).all() else "Did the tokenizer's vocabulary change?")
        )
    broken = np.flatnonzero(np.isnan(logits).any(-1) | np.isposinf(logits).any(-1) | np.isneginf(logits).all(-1))
    if len(broken):
        raise LabError(f"logits must not be NaN or +inf, nor all -inf; they are at token {broken[0]} ({len(broken)} such).")
    most = float(np.finfo(np.float32).max)
    beyond = np.argwhere(np.isfinite(logits) & (np.abs(logits) > most)) if wide is np.float64 else ()
    if len(beyond):
        token, place = beyond[0]
        raise LabError(
            f"gradients are taken in float32, which holds no logit of {logits[token, place]:g}, at token {token}: give logits "
            f"from {-most:.2g} to {most:.2g}, and -inf for what is impossible."
        )
    return logits, targets.astype(np.int32)


def are_probabilities(logits: np.ndarray) -> bool:
    """Whether every row of [N, V] lies in [0, 1] and sums to 1, as logits never do but by chance.

    >>> are_probabilities(np.array([[0.5, 0.5], [0.9, 0.1]])), are_probabilities(np.array([[0.5, 0.6]]))
    (True, False)
    """
    within = bool((logits >= 0).all() and (logits <= 1).all())
    return within and bool(np.allclose(logits.sum(axis=-1, dtype=np.float64), 1, atol=1e-3))


def _load(path: pathlib.Path):
    if not path.is_file():
        what = f"{path} is a folder" if path.is_dir() else f"no file {path}"
        raise LabError(f"{what}. Logits come as .npz (logits, targets) or .npy.")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded
            # Of the rest, which may be large or no plain arrays, the names.
            return {name: loaded[name] if name in ("logits", "targets") else None for name in loaded.files}
    except PermissionError as error:
        raise LabError(f"cannot read {path}: {error.strerror}.") from error
    except Exception as error:  # of damage each of NumPy, zipfile, zlib and Python's parser has its own
        # NumPy's own words would recommend to load it unsafely.
        raise LabError(
            f"{path} is damaged, or not an .npz or .npy of plain arrays. Write one with numpy.savez(file, logits=..., "
            "targets=...)."
        ) from error
