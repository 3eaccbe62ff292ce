from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from quire.errors import SettingsError
from quire.execution import kv_pool, machine
from quire.execution.kv_pool import DEFAULT_CAP_BYTES, num_pool_blocks
from quire.execution.machine import available_cores, available_memory_bytes

MIB = 1 << 20


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group tree in which this process is in the group /a/b."""
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(machine, "_own_groups", lambda: ["0::/a/b"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    return tmp_path


def test_cores_are_those_of_the_affinity_where_no_quota_is_set(groups: Path) -> None:
    (groups / "a/b/cpu.max").write_text("max 100000\n")
    assert available_cores() == 8


@pytest.mark.parametrize(
    ("quota", "cores"), [("250000 100000", 3), ("10000 100000", 1), ("900000 100000", 8)]
)
def test_a_quota_of_an_enclosing_group_counts_in_whole_cores(groups: Path, quota: str, cores: int) -> None:
    (groups / "a/cpu.max").write_text(quota)
    assert available_cores() == cores


def test_quotas_of_the_first_version_of_control_groups_count(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_own_groups", lambda: ["4:cpu,cpuacct:/c", "2:memory:/"])
    group = groups / "cpu/c"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("-1")
    (group / "cpu.cfs_period_us").write_text("100000")
    assert available_cores() == 8
    (group / "cpu.cfs_quota_us").write_text("150000")
    assert available_cores() == 2


def test_memory_is_what_the_tightest_group_leaves_and_page_cache_is_free(groups: Path) -> None:
    free = available_memory_bytes()
    assert free > 64 * MIB
    (groups / "a/memory.max").write_text(str(100 * MIB))
    (groups / "a/memory.current").write_text(str(70 * MIB))
    assert available_memory_bytes() == 30 * MIB
    (groups / "a/memory.stat").write_text(f"anon 5\ninactive_file {20 * MIB}\n")
    assert available_memory_bytes() == 50 * MIB
    (groups / "a/b/memory.max").write_text("max")
    (groups / "a/b/memory.current").write_text(str(60 * MIB))
    assert available_memory_bytes() == 50 * MIB


def pool(monkeypatch: pytest.MonkeyPatch, *, free: int, kv_cache_bytes: int = 0, block: int = MIB) -> int:
    """Blocks for requests of 100 tokens, in blocks of 32 tokens."""
    monkeypatch.setattr(kv_pool, "available_memory_bytes", lambda: free)
    manifest = SimpleNamespace(block_size=32, kv_bytes_per_block=block)
    return num_pool_blocks(manifest, kv_cache_bytes, max_model_len=100)  # type: ignore[arg-type]


def test_a_pool_without_a_size_takes_half_of_the_free_memory_up_to_a_cap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert pool(monkeypatch, free=40 * MIB) == 20
    assert pool(monkeypatch, free=100 * DEFAULT_CAP_BYTES) == DEFAULT_CAP_BYTES // MIB


def test_the_cap_gives_way_to_one_request_of_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool(monkeypatch, free=100 * DEFAULT_CAP_BYTES, block=DEFAULT_CAP_BYTES) == 5


def test_a_pool_with_a_size_has_that_size(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pool(monkeypatch, free=40 * MIB, kv_cache_bytes=30 * MIB + 1) == 30


def test_pools_too_small_for_one_request_or_too_large_for_the_machine_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        SettingsError, match="kv_cache_bytes is 4194304, but one request of max_model_len 100"
    ):
        pool(monkeypatch, free=40 * MIB, kv_cache_bytes=4 * MIB)
    with pytest.raises(SettingsError, match="half of the free memory is 4194304 bytes"):
        pool(monkeypatch, free=8 * MIB)
    with pytest.raises(SettingsError, match="only 41943040 bytes of memory are free"):
        pool(monkeypatch, free=40 * MIB, kv_cache_bytes=41 * MIB)
