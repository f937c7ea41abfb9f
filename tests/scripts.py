"""Scripts as modules, the experiments' and the documents', and the command in this process, for their tests."""

import contextlib
import functools
import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import xentlab
from xentlab import LabError
from xentlab.cli import main
from xentlab.tour.walk import experiments_folder


@contextlib.contextmanager
def script(name, folder=None):
    """The script, an experiment's; its neighbours are found as they are where it runs, by its processes too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder or experiments_folder())
        yield importlib.import_module(name)


def documents():
    """The script that writes the documents."""
    with script("write", experiments_folder().parent / "docs") as module:
        return module


def in_process(capsys, *arguments):
    """A command's exit code, stdout and stderr, without the start of another Python."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as end:
        code = end.code or 0
    out, err = capsys.readouterr()
    return code, out, err


def process(*arguments, **more):
    """The command as a process of its own, and what it said."""
    command = [sys.executable, "-m", "xentlab", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **more)


def unchecked(*expressions):
    """What each expression is, as text, or its `LabError` says, with annotations unchecked, as in a user's own process."""
    names = vars(xentlab) | {"functools": functools, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "xentlab": xentlab}
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        for expression in expressions:
            try:
                found.append(str(eval(expression, dict(names))))
            except LabError as error:
                found.append(str(error))
    return found
