"""Experiments' scripts as modules, and the command in this process, for their tests."""

import contextlib
import importlib

import pytest

from xentlab.cli import main
from xentlab.tour.walk import experiments_folder


@contextlib.contextmanager
def script(name):
    """The script; its neighbours are found as they are where it runs, by its processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(experiments_folder())
        yield importlib.import_module(name)


def in_process(capsys, *arguments):
    """A command's exit code, stdout and stderr, without the start of another Python."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err
