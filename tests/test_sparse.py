"""Sparse links at a vocabulary where their search is long, against the sorted algorithms of the papers, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xentlab.losses.sparse import entmax15_link, sparsemax_link


def sorted_sparsemax(z):
    """Martins & Astudillo 2016, algorithm 1."""
    x = np.sort(z)[::-1]
    sums, k = np.cumsum(x), np.arange(1, len(x) + 1)
    size = (1 + k * x > sums).sum()
    return np.maximum(z - (sums[size - 1] - 1) / size, 0)


def sorted_entmax15(z):
    """Peters et al. 2019, algorithm 2."""
    x = np.sort(z / 2)[::-1]
    k = np.arange(1, len(x) + 1)
    mean = np.cumsum(x) / k
    spread = np.cumsum(x**2) - k * mean**2
    with np.errstate(invalid="ignore"):
        tau = mean - np.sqrt((1 - spread) / k)
    size = (tau <= x).sum()
    return np.maximum(z / 2 - tau[size - 1], 0) ** 2


@pytest.mark.parametrize("vocab", [2, 300, 5000])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 1.0, 30.0])
@pytest.mark.parametrize(("link", "reference"), [(sparsemax_link, sorted_sparsemax), (entmax15_link, sorted_entmax15)])
def test_links_equal_the_sorted_algorithms(link, reference, vocab, scale):
    z = scale * np.random.default_rng(0).standard_normal((4, vocab))
    expected = np.stack([reference(row) for row in z])
    with jax.enable_x64(True):
        np.testing.assert_allclose(link(jnp.asarray(z)), expected, atol=1e-11)
    rough = np.asarray(link(jnp.asarray(z, jnp.float32)))
    # A probability errs by the threshold's rounding, 6e-8 of a logit below the top of size up to 1, four times over.
    np.testing.assert_allclose(rough, expected, atol=3e-7 * max(1.0, scale))
    np.testing.assert_allclose(rough.sum(-1), 1, atol=2e-6)
