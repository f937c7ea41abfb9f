"""Meshes as one writes them: "data=4,model=2", tokens split over data, the vocabulary over model, runs over runs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from xentlab.contract import LabError

AXES = {"runs": "different runs", "data": "tokens", "model": "vocabulary"}


def parse_mesh(text: str | None, axes: Sequence[str] = ("data", "model")) -> dict[str, int]:
    """Axes and their devices from "data=8,model=32". Raises `LabError` for anything else.

    >>> parse_mesh("data=8,model=32")
    {'data': 8, 'model': 32}
    """
    if not text:
        return {}
    found = re.findall(rf"(?:^|,)({'|'.join(axes)})=([1-9]\d*)(?=,|$)", text)
    if len(found) != text.count(",") + 1 or len(dict(found)) != len(found):
        known = ", ".join(f"{axis} ({AXES[axis]})" for axis in axes)
        raise LabError(f"a mesh is written data=4,model=2, with the axes {known}; got {text!r}.")
    return {name: int(count) for name, count in found}


def make_mesh(axes: Mapping[str, int], processes: int = 1) -> Mesh | None:
    """A mesh of those axes, of the default backend's devices or else of virtual ones of the CPU; None for no axes.

    processes: how many share the mesh, each with its own part of the devices. Raises `LabError` when there are too few and JAX
    has counted the CPU's already.
    """
    if not axes:
        return None
    wanted = math.prod(axes.values())
    with contextlib.suppress(RuntimeError):  # JAX runs: it has the devices that it has
        jax.config.update("jax_num_cpu_devices", max(1, wanted // processes))
    devices = max((jax.devices(), jax.devices("cpu")), key=lambda each: min(len(each), wanted))
    if len(devices) < wanted:
        raise LabError(
            f"the mesh takes {wanted} devices and JAX has {len(devices)}. Before JAX starts, "
            f'jax.config.update("jax_num_cpu_devices", {wanted}) makes as many of a CPU.'
        )
    return Mesh(np.array(devices[:wanted]).reshape(*axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
