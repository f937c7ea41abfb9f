"""Experiments' scripts as modules, for their tests."""

import contextlib
import importlib

import pytest

from xentlab.tour.walk import experiments_folder


@contextlib.contextmanager
def script(name):
    """The script; its neighbours are found as they are where it runs, by its processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(experiments_folder())
        yield importlib.import_module(name)
