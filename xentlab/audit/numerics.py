"""What floating point leaves of a loss: finite at extreme logits, and how far from float64."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from xentlab.audit.probe import Probe, Verdict, plain
from xentlab.contract import value_and_gradient
from xentlab.products import for_training

DTYPES = ("float32", "bfloat16", "float16")


def batches(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """Logits [128, V] by name: ordinary (scales 1 to 10), extreme (+-1e4), and ordinary with a rival at -inf. Target 0."""
    rng = np.random.default_rng((seed, 20))
    ordinary = rng.normal(size=(128, vocab)) * np.repeat([1, 3, 5, 10], 32)[:, None]
    signs = np.array(list(itertools.product((-1e4, 0.0, 1e4), repeat=min(vocab, 4))))
    extreme = np.resize(signs[rng.permutation(len(signs))], (128, signs.shape[1]))
    if vocab > 4:  # each further rival at one of the three rivals' logits: of draws the target would hardly ever lead
        others = np.take_along_axis(extreme, rng.integers(1, 4, (128, vocab - 4)), axis=1)
        extreme = np.concatenate([extreme, others], axis=1)
    masked = ordinary.copy()
    masked[np.arange(128), 1 + np.arange(128) % (vocab - 1)] = -np.inf
    return {"ordinary": ordinary, "extreme": extreme, "masked": masked}


def numerics(probe: Probe) -> dict[str, Verdict]:
    """`finite` and `max_error`, each by dtype.

    finite: value and gradient are finite, compiled as in training (op by op they may not be), at logits of +-1e4 and beside a
    class at -inf. max_error: the worst relative error of the value, and of the gradient relative to its own largest entry,
    against float64 at the same rounded logits, where that is finite. What is smaller than the dtype's rounding of the loss's
    largest at ordinary logits counts as that large.
    """

    # Of all dtypes at once: one program compiles in half the time of three.
    @functools.partial(jax.jit, compiler_options=for_training())
    def both(lows):
        return [value_and_gradient(probe.loss, z, jnp.zeros(z.shape[0], jnp.int32)) for z in lows]

    def compiled(lows):
        """Values and gradients of each, or why there are none."""
        try:
            return [[np.asarray(x.astype(jnp.float32), np.float64) for x in each] for each in both(lows)]
        except Exception as error:
            return [error] if len(lows) == 1 else [found for low in lows for found in compiled([low])]

    found = batches(probe.seed, probe.vocab)
    finite, worst, broken = dict.fromkeys(DTYPES, True), {dtype: [0.0, 0.0] for dtype in DTYPES}, {}
    # The loss's own scale, of value and gradient: a multiple of a loss has the same relative error.
    scales = [_largest(exact).max() for exact in probe.both(found["ordinary"], np.zeros(len(found["ordinary"]), int))]
    for name, z in found.items():
        lows = [jnp.asarray(z, dtype) for dtype in DTYPES]
        for dtype, low, rough in zip(DTYPES, lows, compiled(lows), strict=True):
            if isinstance(rough, Exception):
                finite[dtype], worst[dtype] = False, [np.inf, np.inf]
                broken.setdefault(dtype, {"fails": f"{type(rough).__name__}: {str(rough).splitlines()[0][:120]}"})
                continue
            rounded = np.asarray(low.astype(jnp.float32), np.float64)
            exact = probe.both(rounded, np.zeros(len(z), int))
            ok = np.isfinite(rough[0]) & np.isfinite(rough[1]).all(axis=1)
            if name != "ordinary" and not ok.all():
                finite[dtype] = False
                place = int(np.argmin(ok))
                row = {"logits": rounded[place], "target": 0, "value": rough[0][place], "gradient": rough[1][place]}
                broken.setdefault(dtype, {key: plain(value) for key, value in row.items()})
            for i, (x, true) in enumerate(zip(rough, exact, strict=True)):
                with np.errstate(invalid="ignore", divide="ignore"):
                    off = np.abs(x - true)
                    error = np.where(off == 0, 0, off / np.maximum(float(jnp.finfo(dtype).eps) * scales[i], _largest(true)))
                error = np.where(np.isfinite(true), np.where(np.isnan(error), np.inf, error), 0.0)
                worst[dtype][i] = max(worst[dtype][i], float(error.max()))
    shown = lambda error: plain(float(f"{error:.3g}"))
    errors = {dtype: dict(zip(("value", "gradient"), map(shown, worst[dtype]), strict=True)) for dtype in DTYPES}
    broken = {dtype: broken[dtype] for dtype in DTYPES if dtype in broken}
    evidence = f"{', '.join(found)} logits, 128 each, V = {probe.vocab}, compiled, against float64 at the same rounded logits"
    return {"finite": Verdict(finite, evidence, broken or None), "max_error": Verdict(errors, evidence)}


def _largest(exact: np.ndarray) -> np.ndarray:
    """The largest finite size in each row, to be divided by: values [N] as they are, gradients [N, V] -> [N, 1]."""
    size = np.where(np.isfinite(exact), np.abs(exact), 0)
    return size if exact.ndim == 1 else size.max(axis=1, keepdims=True)
