"""Sizes of KV pools in a GPU's memory. (Pools in main memory: test_execution_machine.py.)"""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.fake_gpu import KV_BYTES_PER_BLOCK, MANIFEST

from quire.errors import SettingsError
from quire.execution.kv_pool import num_gpu_pool_blocks


def blocks(*, kv_cache_bytes: int = 0, **changes: Any) -> int:
    """Of a GPU with room for 1,000 blocks, 300 of which are in use."""
    given: dict[str, Any] = {
        "total_bytes": 1000 * KV_BYTES_PER_BLOCK,
        "free_bytes": 700 * KV_BYTES_PER_BLOCK,
        "reserved_bytes": 0,
        "utilization_percent": 90,
        "max_blocks": 10_000,
    }
    return num_gpu_pool_blocks(MANIFEST, kv_cache_bytes, 40, **(given | changes))


def test_the_pool_takes_what_the_share_leaves_beside_what_is_used() -> None:
    assert blocks() == 600
    assert blocks(utilization_percent=50) == 200


def test_what_will_be_taken_after_the_pool_counts_as_used() -> None:
    assert blocks(reserved_bytes=100 * KV_BYTES_PER_BLOCK) == 500


def test_a_part_of_a_block_is_no_block() -> None:
    assert blocks(reserved_bytes=1) == 599


def test_the_pool_is_no_larger_than_the_plan_can_address() -> None:
    assert blocks(max_blocks=123) == 123


def test_a_size_that_is_set_goes_before_the_share() -> None:
    assert blocks(kv_cache_bytes=650 * KV_BYTES_PER_BLOCK) == 650


def test_a_size_that_does_not_fit_beside_what_will_be_taken_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"kv_cache_bytes is \d+, but only \d+ bytes of memory are free"):
        blocks(kv_cache_bytes=650 * KV_BYTES_PER_BLOCK, reserved_bytes=51 * KV_BYTES_PER_BLOCK)


# A request of 40 tokens takes 10 blocks, and the null block is one more.
@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"utilization_percent": 31},
            r"31% of the GPU's 32000 bytes leave 320 bytes.*--gpu-memory-utilization",
        ),
        ({"utilization_percent": 20}, "20% of the GPU's 32000 bytes leave 0 bytes"),
        ({"kv_cache_bytes": 10 * KV_BYTES_PER_BLOCK}, "kv_cache_bytes is 320, .* --kv-cache-bytes"),
        ({"max_blocks": 10}, "the plan was built for a pool of at most 10 blocks"),
    ],
)
def test_a_pool_that_cannot_hold_one_request_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        blocks(**changes)


def test_a_pool_that_holds_just_one_request_is_taken() -> None:
    assert blocks(kv_cache_bytes=11 * KV_BYTES_PER_BLOCK) == 11
