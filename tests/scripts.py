"""Experiments' scripts as modules, and the command in this process, for their tests."""

import contextlib
import importlib
import subprocess
import sys

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


def unchecked(*expressions):
    """What each expression's `LabError` says, in a process of its own, in which no annotation is checked."""
    code = (
        "import functools, sys\nimport jax, jax.numpy as jnp, numpy as np, optax, xentlab\nfrom xentlab import *\n"
        "for expression in sys.argv[1:]:\n"
        "    try: print(eval(expression))\n"
        "    except LabError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *expressions], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()
