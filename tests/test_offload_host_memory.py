"""Host memory that may still be taken: the machine's, or what the tightest cgroup above this process leaves of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from crossdock.offload.memory.host_memory import GIB, HostMemory, HostMemoryError, host_memory, require

TOTAL, AVAILABLE = 64 * GIB, 40 * GIB


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    return _proc(tmp_path, "0::/\n")


def _proc(tmp_path: Path, cgroup: str) -> Path:
    meminfo = {"MemTotal": TOTAL, "MemFree": GIB, "MemAvailable": AVAILABLE, "SwapTotal": TOTAL, "SwapFree": TOTAL}
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True, exist_ok=True)
    (proc / "meminfo").write_text("".join(f"{name}: {value // 1024:>10} kB\n" for name, value in meminfo.items()))
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc


def _v2(folder: Path, limit: int | str, used: int, **stat: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.swap.max").write_text("max\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    return folder


def _v1(folder: Path, limit: int, used: int, **stat: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    return folder


MACHINE = HostMemory(AVAILABLE, TOTAL, "the machine")


def test_without_cgroups_the_machine_limits_and_swap_does_not_count(proc: Path, tmp_path: Path) -> None:
    assert host_memory(proc, tmp_path / "none") == MACHINE


def test_of_nested_cgroups_the_one_that_leaves_least_limits(tmp_path: Path) -> None:
    """Not the one with the smallest limit, and not only this process's own."""
    proc, mount = _proc(tmp_path, "0::/pod/box/inner\n"), tmp_path / "cgroup"
    inner = _v2(mount / "pod" / "box" / "inner", "max", 9 * GIB)
    _v2(mount / "pod" / "box", 16 * GIB, 2 * GIB)
    pod = _v2(mount / "pod", 20 * GIB, 15 * GIB)
    assert host_memory(proc, mount) == HostMemory(5 * GIB, 20 * GIB, str(pod))
    _v2(inner, 3 * GIB, GIB)
    assert host_memory(proc, mount) == HostMemory(2 * GIB, 3 * GIB, str(inner))
    _v2(mount, 4 * GIB, 3 * GIB)
    assert host_memory(proc, mount) == HostMemory(GIB, 4 * GIB, str(mount)), "the root of a container's own mount"


def test_a_cgroup_that_leaves_more_than_the_machine_does_not_limit(proc: Path, tmp_path: Path) -> None:
    assert host_memory(proc, _v2(tmp_path / "cgroup", 50 * GIB, GIB)) == MACHINE


def test_page_cache_can_be_given_back_and_shared_memory_cannot(proc: Path, tmp_path: Path) -> None:
    """The host store's pages are in `file` and `shmem`, but on the anonymous lists."""
    stat = {"anon": GIB, "file": 8 * GIB, "shmem": 5 * GIB, "inactive_anon": 6 * GIB, "active_file": GIB}
    mount = _v2(tmp_path / "cgroup", 10 * GIB, 9 * GIB, **stat, inactive_file=2 * GIB)
    assert host_memory(proc, mount) == HostMemory(4 * GIB, 10 * GIB, str(mount))


def test_available_stays_between_nothing_and_the_limit(proc: Path, tmp_path: Path) -> None:
    mount = _v2(tmp_path / "cgroup", 2 * GIB, 3 * GIB)
    assert host_memory(proc, mount) == HostMemory(0, 2 * GIB, str(mount))
    _v2(mount, 2 * GIB, GIB, inactive_file=2 * GIB)
    assert host_memory(proc, mount).available_bytes == 2 * GIB
    _v2(mount, 100 * GIB, 99 * GIB)
    assert host_memory(proc, mount) == HostMemory(GIB, TOTAL, str(mount)), "no limit is more than the machine has"


@pytest.mark.parametrize("path", ["/docker/0123", "/../../elsewhere", "/.."])
def test_in_a_container_whose_path_lies_elsewhere_the_mounts_root_counts(tmp_path: Path, path: str) -> None:
    proc = _proc(tmp_path, f"0::{path}\n")
    _v2(tmp_path, GIB, 0)  # above the mount: not this process's
    _v2(tmp_path / "elsewhere", GIB, 0)
    mount = _v2(tmp_path / "cgroup", 8 * GIB, GIB)
    assert host_memory(proc, mount) == HostMemory(7 * GIB, 8 * GIB, str(mount))


V1_LINES = "12:cpu,cpuacct:/other\n4:memory:/docker/a:b\n1:name=systemd:/other\n"
NO_LIMIT = 2**63 - 4096


def test_version_1(tmp_path: Path) -> None:
    """The figures with `total_` hold for the group and all below it; the others for its own processes alone."""
    proc, mount = _proc(tmp_path, V1_LINES), tmp_path / "cgroup"
    _v1(mount / "memory", NO_LIMIT, 30 * GIB)
    _v1(mount / "memory" / "docker", NO_LIMIT, 20 * GIB)
    _v1(mount / "memory" / "other", GIB, 0)
    stat = {"inactive_file": 0, "total_inactive_file": 3 * GIB, "total_active_file": GIB, "total_shmem": 2 * GIB}
    own = _v1(mount / "memory" / "docker" / "a:b", 16 * GIB, 12 * GIB, **stat)
    assert host_memory(proc, mount) == HostMemory(8 * GIB, 16 * GIB, str(own))
    _v1(own, NO_LIMIT, 12 * GIB)
    assert host_memory(proc, mount) == MACHINE


def test_version_1_in_a_container_and_both_versions_at_once(tmp_path: Path) -> None:
    proc, mount = _proc(tmp_path, V1_LINES + "0::/system/session\n"), tmp_path / "cgroup"
    memory = _v1(mount / "memory", 8 * GIB, GIB)
    assert host_memory(proc, mount) == HostMemory(7 * GIB, 8 * GIB, str(memory))
    session = _v2(mount / "unified" / "system" / "session", 6 * GIB, GIB)
    assert host_memory(proc, mount) == HostMemory(5 * GIB, 6 * GIB, str(session))


def test_what_cannot_be_read_is_skipped(tmp_path: Path) -> None:
    proc, mount = tmp_path / "proc", tmp_path / "cgroup"
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found = host_memory(proc, mount)
    assert (found.limit_bytes, found.limited_by) == (pages * page, "the machine"), "nothing there at all"
    assert 0 < found.available_bytes <= found.limit_bytes

    _proc(tmp_path, "nonsense\n\n7\n").joinpath("self", "cgroup").unlink()
    _v2(mount, 8 * GIB, GIB)
    assert host_memory(proc, mount).available_bytes == 7 * GIB, "no /proc/self/cgroup: the mount's root"
    (proc / "self" / "cgroup").write_text("nonsense\n\n7\n")
    (mount / "memory.stat").write_text("inactive_file\nactive_file many\n\xff\n", encoding="latin-1")
    assert host_memory(proc, mount).available_bytes == 7 * GIB
    (mount / "memory.stat").unlink()
    (mount / "memory.stat").mkdir()
    assert host_memory(proc, mount).available_bytes == 7 * GIB
    (mount / "memory.current").unlink()
    assert host_memory(proc, mount).available_bytes == 8 * GIB, "the limit itself still holds"
    (mount / "memory.max").write_text("")
    assert host_memory(proc, mount) == MACHINE
    (proc / "meminfo").write_text(f"MemTotal: {TOTAL // 1024} kB\nMemFree: {GIB // 1024} kB\n")
    assert host_memory(proc, mount) == HostMemory(GIB, TOTAL, "the machine"), "a kernel without MemAvailable"


@pytest.mark.parametrize("method", ["read_text", "is_dir"])
def test_what_may_not_be_read_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    proc, mount = _proc(tmp_path, "0::/pod\n"), tmp_path / "cgroup"
    _v2(mount / "pod", 8 * GIB, GIB)
    allowed = getattr(Path, method)

    def forbid(path: Path, **arguments: str) -> object:
        if mount in path.parents:
            raise PermissionError(path)
        return allowed(path, **arguments)

    monkeypatch.setattr(Path, method, forbid)
    assert host_memory(proc, mount) == MACHINE


def test_this_machine() -> None:
    found = host_memory()
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    assert 0 < found.available_bytes <= found.limit_bytes <= int(total.split()[1]) * 1024


def test_require_passes_up_to_what_is_available() -> None:
    require(5 * GIB, "the blocks", HostMemory(5 * GIB, 8 * GIB, "the machine"))
    with pytest.raises(HostMemoryError):
        require(5 * GIB + 1, "the blocks", HostMemory(5 * GIB, 8 * GIB, "the machine"))


def test_require_says_what_needs_how_much_what_limits_it_and_the_way_out() -> None:
    with pytest.raises(MemoryError) as error:
        require(68 * GIB + GIB // 2, "the host store of 60 blocks", HostMemory(12 * GIB, 16 * GIB, "/cgroup/pod"))
    assert str(error.value) == (
        "the host store of 60 blocks: needs 68.50 GiB of host memory, but only 12.00 of 16.00 GiB are available "
        "(limited by /cgroup/pod); read the weights from disk (offload.host: mmap), run fewer ranks per node, "
        "or use a smaller dtype"
    )
