"""Hostile settings: shapes are checked, promotions are explicit, ranks are not promoted, warnings are errors.

And quick ones: what most modules compile is compiled carelessly, with the commands that they run.
"""

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
from browser import chromium, watched
from jax._src import compiler

from xentlab.cache import keep_compiled
from xentlab.products import on_cpu, quickly

jax.config.update("jax_numpy_rank_promotion", "raise")
keep_compiled()
hypothesis.settings.register_profile("lab", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.load_profile("lab")


# What takes longest begins first: else a worker would be left with one of these at the end, and the others with nothing. There
# is a worker more than CI has cores, for some wait for processes.
LONGEST = (
    *("resume", "experiments", "cli", "scoreboard", "hosts", "linear", "scoreboard_theory"),
    *("bench_race", "readme", "linear_mesh", "report", "audit"),
)

# Programs that run for longer than it takes to compile them well: `scoreboard.escape`'s, and the fits of `efficiency`.
LONG = ("run", "every", "on_sample", "fit")


def pytest_collection_modifyitems(items):
    ranks = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def _is_test(request) -> bool:
    """Whether it is a module of tests, and not one whose docstrings are run."""
    return request.path.parent == pathlib.Path(__file__).parent


def _says(request, what: str) -> bool:
    """Whether a module of tests says so of itself, by a line `what = True`."""
    return _is_test(request) and getattr(request.module, what, False)


@pytest.fixture(autouse=True, scope="module")
def _compiled_quickly(request):
    """Most programs here are small and run once, and to compile them well was half of the time.

    But where a module's numbers are compared with those of a user's process: it says COMPILED_WELL = True. One that asks what
    XLA makes of the head says FUSED_WELL = True, and the head is made as ever, but for LLVM. `LONG` are always compiled well.
    """
    if _says(request, "COMPILED_WELL") or not on_cpu():
        jax.clear_caches()  # of what was compiled carelessly
        yield
        return
    careless = quickly(0, once=not _says(request, "FUSED_WELL")) | {"xla_llvm_disable_expensive_passes": True}
    real = compiler.compile_or_get_cached

    def compiled(backend, program, devices, options, *others, **named):
        if str(program.operation.attributes["sym_name"]).strip('"').removeprefix("jit_") not in LONG:
            options.env_option_overrides = [*(dict(options.env_option_overrides) | careless).items()]
        return real(backend, program, devices, options, *others, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_or_get_cached", compiled)
        patch.setenv("XLA_FLAGS", " ".join(f"--{name}={value}".lower() for name, value in careless.items()))
        yield


@pytest.fixture(autouse=True, scope="module")
def _promotion_is_explicit(request):
    """No dtype is promoted silently, but where optax trains, which does so itself: those modules say TRAINS = True."""
    strict = _is_test(request) and not _says(request, "TRAINS")
    with jax.numpy_dtype_promotion("strict" if strict else "standard"):
        yield


@pytest.fixture(autouse=True)
def _runs_in_a_folder_of_its_own(tmp_path, monkeypatch, request):
    """Nothing that a test writes by a relative path lands in the checkout."""
    if "doctest" not in type(request.node).__name__.lower():
        monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def running():
    with chromium() as started:
        yield started


@pytest.fixture
def opened(running, html):
    """Opens pages of the file `html`, a fixture of the module that asks."""
    with watched(running, html) as open_page:
        yield open_page


@pytest.fixture(scope="module")
def page(running, html):
    """The page as one reader has it who tries one thing after another: to draw its charts takes seconds."""
    with watched(running, html) as open_page:
        yield open_page()
