"""What a plan is built for: ranges of tokens, sizes of steps, a pool whose parts hold all blocks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import onnx
import pytest
import torch

from quire.errors import BuildError
from quire.execution.engine_state import MAX_POOLS, POOL_HEADER_BYTES
from quire.execution.manifest import EngineLimits
from quire_build.quantization import PLANS
from quire_build.tensorrt import plan
from quire_build.tensorrt.machine import Gpu
from quire_build.tensorrt.plan import (
    LARGEST_TENSOR,
    PlanOptions,
    build_plan,
    profile_ranges,
    step_shapes,
    step_sizes,
)

LIMITS = EngineLimits(max_num_seqs=100, max_num_batched_tokens=2048, max_model_len=1000)
BLOCK_BYTES = 131072


def options(pool_bytes: int, limits: EngineLimits = LIMITS) -> PlanOptions:
    return PlanOptions(
        torch.bfloat16,
        torch.bfloat16,
        limits,
        block_size=16,
        kv_bytes_per_block=BLOCK_BYTES,
        pool_bytes=pool_bytes,
    )


@pytest.mark.parametrize("most", [1, 16, 17, 32, 33, 64, 100, 128, 129, 256, 257, 8192])
def test_a_step_of_any_size_fits_exactly_one_profile(most: int) -> None:
    limits = EngineLimits(max_num_seqs=1, max_num_batched_tokens=most, max_model_len=10)
    ranges = profile_ranges(limits)
    for tokens in range(1, most + 1):
        assert sum(fewest <= tokens <= largest for fewest, largest in ranges) == 1
    assert ranges[-1][1] == most
    assert len(ranges) <= 10


@pytest.mark.parametrize(
    ("max_num_seqs", "most"),
    [(1, 1), (1, 2), (3, 5), (8, 9), (12, 200), (100, 2048), (256, 8192), (300, 1000), (8192, 8192)],
)
def test_steps_are_padded_to_few_sizes_up_to_the_limits(max_num_seqs: int, most: int) -> None:
    sizes = step_sizes(EngineLimits(max_num_seqs, most, max_model_len=10))
    assert list(sizes) == sorted(set(sizes)) and sizes[0] == 1 and sizes[-1] == most
    assert max_num_seqs in sizes
    # Each is a CUDA graph.
    assert len(sizes) <= 2 * most.bit_length() + 1
    for size, after in itertools.pairwise(sizes):
        padding = after - (size + 1)
        assert padding <= after // 3 or after <= 8, f"{size + 1} tokens are padded to {after}"


@pytest.mark.parametrize("max_num_seqs", [1, 100])
def test_every_size_lies_in_one_profile_with_all_its_shapes(max_num_seqs: int) -> None:
    limits = EngineLimits(max_num_seqs, max_num_batched_tokens=2048, max_model_len=1000)
    built_for = options(0, limits)
    ranges = profile_ranges(limits)
    for size in step_sizes(limits):
        [tokens] = [tokens for tokens in ranges if tokens[0] <= size <= tokens[1]]
        shapes = step_shapes(built_for, built_for.pool, tokens)
        (fewest,), _, (largest,) = shapes["seq_lens"]
        assert fewest <= min(size, max_num_seqs) <= largest


@pytest.mark.parametrize("gigabytes", [1, 17, 18, 70, 130])
def test_the_parts_of_a_hosted_pool_hold_all_its_blocks_behind_their_headers(gigabytes: int) -> None:
    built_for = options(gigabytes * 10**9)
    pool = built_for.pool
    shapes = step_shapes(built_for, pool, (257, 2048))
    held = 0
    for number, name in enumerate(pool.input_names):
        smallest, usual, (elements,) = shapes[name]
        assert smallest == usual == (1,) and elements <= LARGEST_TENSOR
        header = POOL_HEADER_BYTES if number else 0
        assert (8 * elements - header) % BLOCK_BYTES == 0
        here = (8 * elements - header) // BLOCK_BYTES
        assert here == pool.blocks_per_pool or number == pool.num_pools - 1
        held += here
    assert held == pool.max_blocks == gigabytes * 10**9 // BLOCK_BYTES


def test_a_pool_that_cannot_be_bound_is_refused() -> None:
    for pool_bytes in (BLOCK_BYTES, (MAX_POOLS + 1) * 8 * LARGEST_TENSOR):
        with pytest.raises(BuildError, match=f"would be {pool_bytes} bytes"):
            assert options(pool_bytes).pool


def test_a_pool_of_the_smallest_blocks_has_no_more_of_them_than_slots_have_numbers() -> None:
    smallest = dataclasses.replace(options(MAX_POOLS << 34), kv_bytes_per_block=512)
    assert smallest.pool.max_blocks * smallest.block_size <= 2**31 - 1
    assert smallest.pool.max_blocks < smallest.pool_bytes // smallest.kv_bytes_per_block


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"kv_dtype": torch.float8_e4m3fn},
            "kv_cache_dtype is 'fp8', .* 8.9 .* has 8.0: --kv-cache-dtype auto",
        ),
        ({"quantization": PLANS["fp8"]}, "precision is 'fp8', .* 8.9 .* has 8.0: --precision int8 takes"),
        (
            {"quantization": PLANS["fp8-weights"]},
            "precision is 'fp8-weights', .* 8.9 .* has 8.0: --precision int8-weights takes",
        ),
    ],
)
def test_e4m3_is_refused_where_a_gpu_has_none(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], named: str
) -> None:
    def untouched(*_: object) -> None:
        raise AssertionError("it got as far as building")

    monkeypatch.setattr(plan, "tensorrt_module", lambda: None)
    monkeypatch.setattr(plan, "this_gpu", lambda: Gpu("an A100", 80, 80 << 30, 163 << 10, 108, 40 << 20))
    monkeypatch.setattr(plan, "lower", untouched)
    wanted = dataclasses.replace(options(0), **changes)
    with pytest.raises(BuildError, match=named):
        build_plan(onnx.ModelProto(), untouched, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(("tokens", "rows"), [((1, 16), 16), ((65, 256), 100), ((257, 2048), 100)])
def test_a_profile_takes_as_many_sequences_as_its_tokens_and_the_limit_allow(
    tokens: tuple[int, int], rows: int
) -> None:
    shapes: dict[str, Any] = step_shapes(options(0), options(0).pool, tokens)
    assert shapes["input_ids"] == ((tokens[0],), (tokens[1],), (tokens[1],))
    assert shapes["block_tables"][2] == (rows, 63)
    assert shapes["query_start_loc"] == ((2,), (rows + 1,), (rows + 1,))
    assert shapes["sampling"] == ((1, 5), (rows, 5), (rows, 5))
    assert shapes["step"] == ((5,), (5,), (5,))
    assert shapes["kv_cache.0"] == ((1,), (1,), (1,))
