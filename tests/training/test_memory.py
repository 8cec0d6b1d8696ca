"""How much memory there is."""

import pytest

from softprompt.training import memory

GIB = 2**30


@pytest.mark.parametrize(
    ("group", "files", "limits"),
    [
        ("0::/a/b", {"a/b/memory.max": GIB, "a/memory.max": 2 * GIB, "memory.max": "max"}, [1, 2]),
        ("0::/gone", {"memory.max": 3 * GIB}, [3]),
        ("0::/../a", {"memory.max": 3 * GIB}, [3]),
        (
            "3:cpu,memory:/docker/x\n2:cpuset:/",
            {"memory/memory.limit_in_bytes": GIB, "memory.max": 1},
            [1],
        ),
        ("3:memory:/x", {"memory/x/memory.limit_in_bytes": 2 * GIB, "memory/x/other": 1}, [2]),
        ("0::/", {}, []),
    ],
)
def test_a_containers_limits_are_read(tmp_path, group, files, limits):
    """Breaks when a parent's limit, either version of control groups, or a path of the host's is
    not read; when "max" is a number."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{group}\n")
    for name, value in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{value}\n")
    assert memory.container_limits(tmp_path) == [limit * GIB for limit in limits]


def test_the_smallest_limit_is_a_cpus_memory(tmp_path, monkeypatch):
    """Breaks when device_memory is the machine's, or the container's where that is larger."""
    assert memory.container_limits(tmp_path) == [], "as where there are no control groups"
    monkeypatch.setattr(memory, "container_limits", lambda: [])
    machine = memory.device_memory()
    monkeypatch.setattr(memory, "container_limits", lambda: [2**60, 5000])
    assert memory.device_memory() == 5000
    monkeypatch.setattr(memory, "container_limits", lambda: [2**60])
    assert memory.device_memory() == machine
