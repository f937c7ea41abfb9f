"""How many runs a call has and how many calls there are at a time: no more than memory holds, and full meshes."""

import types

import jax
import numpy as np
import pytest

from xentlab import LabError
from xentlab.layout import Layout, fitted, memory_limit, preferred
from xentlab.memory import machine_memory


def test_a_grid_takes_no_more_than_memory_holds():
    """Fewer calls at a time, then narrower ones; what is left over, if nothing else helps, is told."""
    wide, cores = Layout(8, 1, False, "wide"), Layout(1, 4, False, "a run a core")
    needs = lambda width: (width, 10 * width)
    assert fitted(8, wide, needs, None) == fitted(8, wide, needs, 88) == wide
    assert fitted(8, wide, needs, 60).width == 4
    assert fitted(12, Layout(12, 1, False, "wide"), needs, 80, step=4).width == 4  # 6 would fit
    assert fitted(8, cores, needs, 48) == cores
    assert fitted(8, cores, needs, 30).at_a_time == 2
    with pytest.raises(LabError, match="Take fewer seeds or rates"):
        fitted(8, cores, needs, 17)
    assert 1e8 < memory_limit() < machine_memory()[0]


def test_on_a_chip_a_mesh_is_full_and_runs_that_wait_do_so_on_the_host(monkeypatch):
    monkeypatch.setattr("xentlab.layout.on_cpu", lambda: False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1] * 4), ("runs",))
    assert preferred(6, mesh).width == 8
    single = Layout(1, 1, False, "")
    assert fitted(8, single, lambda width: (10, 20), 50).parked
    with pytest.raises(LabError, match="Take fewer seeds or rates"):
        fitted(8, single, lambda width: (10, 100), 50)


@pytest.mark.parametrize(
    ("stats", "on_cpu", "limit"),
    [(None, True, 80), ({"bytes_limit": 1000, "bytes_in_use": 500}, False, 400), (None, False, None)],
)
def test_a_fifth_of_what_is_free_is_left(monkeypatch, stats, on_cpu, limit):
    monkeypatch.setattr("jax.local_devices", lambda: [types.SimpleNamespace(memory_stats=lambda: stats)])
    monkeypatch.setattr("xentlab.layout.on_cpu", lambda: on_cpu)
    monkeypatch.setattr("xentlab.layout.machine_memory", lambda: (1000, 100))
    assert memory_limit() == limit
