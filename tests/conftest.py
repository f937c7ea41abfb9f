"""Hostile settings: shapes are checked, promotions are explicit, ranks are not promoted, warnings are errors."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What one test compiles, no other need: workers and the commands that they run share a folder, which begins empty.
SHARED = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    SHARED = tempfile.TemporaryDirectory(prefix="xentlab-tests-")
    os.environ["XENTLAB_CACHE"] = SHARED.name

import jaxtyping

# Before anything imports xentlab, so that every annotated function of it is checked.
HOOK = jaxtyping.install_import_hook("xentlab", "checker.check")

import hypothesis
import jax
import pytest

from xentlab.cache import keep_compiled

jax.config.update("jax_numpy_rank_promotion", "raise")
keep_compiled()
hypothesis.settings.register_profile("lab", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("lab")


@pytest.fixture(autouse=True, scope="module")
def _promotion_is_explicit(request):
    """No dtype is promoted silently, but where optax trains, which does so itself: those modules say TRAINS = True."""
    tests = request.path.parent == pathlib.Path(__file__).parent
    strict = tests and not getattr(request.module, "TRAINS", False)
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@pytest.fixture(autouse=True)
def _runs_in_a_folder_of_its_own(tmp_path, monkeypatch, request):
    """Nothing that a test writes by a relative path lands in the checkout."""
    if "doctest" not in type(request.node).__name__.lower():
        monkeypatch.chdir(tmp_path)
