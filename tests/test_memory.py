"""What a process may have of the machine's memory, as Linux's control groups have it, in either of their versions."""

import pathlib

import psutil
import pytest

from xentlab.memory import machine_memory, usable_cores

VERSIONS = {
    "v2": ("0::{path}", "", "memory.max", "memory.current", "inactive_file"),
    "v1": ("9:cpu,memory:{path}", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def machine(root, version, path, groups):
    """A root with this process in the group `path`; groups: limit, use and reclaimable bytes of each."""
    line, folder, limit_file, used_file, reclaimed_name = VERSIONS[version]
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("3:cpuset:/elsewhere\n" + line.format(path=path) + "\n")
    for name, (limit, used, reclaimed) in groups.items():
        group = root / "sys/fs/cgroup" / folder / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit_file).write_text(f"{limit}\n")
        (group / used_file).write_text(f"{used}\n")
        (group / "memory.stat").write_text(f"anon 5\n{reclaimed_name} {reclaimed}\n")
    return machine_memory(str(root))


@pytest.mark.parametrize("version", VERSIONS)
def test_the_narrowest_group_counts_and_what_it_could_give_back_is_free(version, tmp_path):
    groups = {"job": (10**6, 900, 100), "job/step": (5000, 4000, 1500), "job/other": (10, 10, 0)}
    assert machine(tmp_path, version, "/job/step", groups) == (5000, 2500)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_group_around_it_counts_where_that_leaves_less(version, tmp_path):
    assert machine(tmp_path, version, "/job/step", {"job": (9000, 8500, 0), "job/step": (5000, 4000, 0)}) == (5000, 500)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_container_shows_its_own_group_as_the_top_one(version, tmp_path):
    # The path is the host's, of which nothing is mounted.
    assert machine(tmp_path, version, "/docker/f00", {".": (7000, 7100, 0)}) == (7000, 0)


@pytest.mark.parametrize("limit", ["max", 2**63 - 4096])
def test_without_a_limit_it_is_the_machines(limit, tmp_path):
    version = "v2" if limit == "max" else "v1"
    total, free = machine(tmp_path, version, "/", {".": (limit, 4000, 0)})
    assert total == psutil.virtual_memory().total
    assert 0 < free <= total


def test_cores_that_this_process_may_not_use_do_not_count(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)
    assert usable_cores() == 1


def test_without_control_groups_too(tmp_path):
    assert machine_memory(str(tmp_path))[0] == psutil.virtual_memory().total
    assert list(pathlib.Path(tmp_path).iterdir()) == []
