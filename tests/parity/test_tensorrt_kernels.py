"""The plan's kernels against a torch specification, in the Triton language's interpreter, and their PTX."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire.execution.engine_state import (
    COUNTERS_BYTE,
    NUM_COUNTERS,
    POOL_OFFSETS_BYTE,
    STEP_MARK,
    STEP_SIZE_BYTE,
    engine_state_elements,
)
from quire_build.tensorrt.kernels.assign_splits import SPARES_RADIX
from quire_build.tensorrt.kernels.kv_write import Heads, kv_write
from quire_build.tensorrt.kernels.paged_attention import Attention, heads_together, paged_attention
from quire_build.tensorrt.operators import in_pairs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WHOLE = 24
"""Keys up to which a context is not split, in these tests: some cases have both."""


@dataclass(frozen=True)
class Layout:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    layers: int = 2
    window: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def block_elements(self) -> int:
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim


@dataclass
class Step:
    """A packed step over a pool of random content."""

    query_lens: list[int]
    seq_lens: list[int]
    block_tables: torch.Tensor
    pool: torch.Tensor  # [blocks, layers, 2, kv_heads, block_size, head_dim]
    state: torch.Tensor  # as the engine keeps it

    @property
    def query_start_loc(self) -> torch.Tensor:
        return torch.tensor([0, *np.cumsum(self.query_lens)], dtype=torch.int32)

    @property
    def positions(self) -> torch.Tensor:
        pairs = zip(self.query_lens, self.seq_lens, strict=True)
        return torch.cat([torch.arange(s - q, s, dtype=torch.int32) for q, s in pairs])

    def slots(self, block_size: int) -> torch.Tensor:
        row = torch.repeat_interleave(torch.arange(len(self.query_lens)), torch.tensor(self.query_lens))
        blocks = self.block_tables[row, self.positions.long() // block_size]
        return (blocks * block_size + self.positions % block_size).to(torch.int32)


def make_step(rng: np.random.Generator, layout: Layout, query_lens: list[int], contexts: list[int]) -> Step:
    """Random tables without sharing; rows beyond the sequences are the null block; unused slots hold NaN."""
    seq_lens = [q + c for q, c in zip(query_lens, contexts, strict=True)]
    need = [-(-s // layout.block_size) for s in seq_lens]
    num_blocks = sum(need) + 3
    order = torch.from_numpy(rng.permutation(np.arange(1, num_blocks)).astype(np.int32))
    tables = torch.zeros(len(seq_lens), max(need) + 2, dtype=torch.int32)
    taken = 0
    for i, n in enumerate(need):
        tables[i, :n] = order[taken : taken + n]
        taken += n
    pool = torch.full(
        (num_blocks, layout.layers, 2, layout.kv_heads, layout.block_size, layout.head_dim), math.nan
    )
    for i, s in enumerate(seq_lens):
        for position in range(s):
            block = tables[i, position // layout.block_size]
            shape = pool[block, :, :, :, 0].shape
            pool[block, :, :, :, position % layout.block_size] = torch.from_numpy(
                rng.standard_normal(shape).astype(np.float32)
            )
    pool[0] = 0.0
    pool = pool.to(layout.dtype)
    state = torch.zeros(engine_state_elements(8), dtype=torch.int64)
    state[STEP_SIZE_BYTE // 8] = STEP_MARK << 32
    state[0] = num_blocks
    return Step(query_lens, seq_lens, tables, pool, state)


def reference_attention(query: torch.Tensor, step: Step, layout: Layout, layer: int) -> torch.Tensor:
    """What the op means, sequence by sequence, in float64."""
    out = torch.empty_like(query, dtype=torch.float64)
    start = 0
    for row, (query_len, seq_len) in enumerate(zip(step.query_lens, step.seq_lens, strict=True)):
        blocks = step.block_tables[row, : -(-seq_len // layout.block_size)].long()
        blocks = torch.where((blocks < 0) | (blocks >= step.pool.shape[0]), 0, blocks)
        kv = step.pool[blocks, layer].double().permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :seq_len]
        keys, values = kv.repeat_interleave(layout.heads // layout.kv_heads, dim=1)
        q = query[start : start + query_len].double().transpose(0, 1)
        scores = q @ keys.transpose(1, 2) / math.sqrt(layout.head_dim)
        key = torch.arange(seq_len)
        position = torch.arange(seq_len - query_len, seq_len)[:, None]
        hidden = key > position
        if layout.window:
            hidden |= key <= position - layout.window
        scores = scores.masked_fill(hidden, -math.inf)
        out[start : start + query_len] = (scores.softmax(-1) @ values).transpose(0, 1)
        start += query_len
    return out


def run_attention(
    query: torch.Tensor,
    step: Step,
    layout: Layout,
    layer: int,
    num_splits: int,
    block_m: int,
    block_n: int,
    split_tiles: set[int] | None = None,
    at_a_time: int = 1 << 20,
) -> torch.Tensor:
    """The kernel in tiles of `block_m` rows, or 16 where that is enough, and `block_n` keys.

    Every tile gets `num_splits` splits. Those whose context was split are added to `split_tiles`.
    """
    tokens, seqs = query.shape[0], len(step.seq_lens)
    group = layout.heads // layout.kv_heads
    padded = max(16, 1 << (layout.head_dim - 1).bit_length())
    per_tile = block_m // group
    tiles = seqs + (tokens - seqs) // per_tile
    assigned: list[int] = []
    seq_spares: list[int] = []
    for seq, (start, query_len) in enumerate(
        zip(step.query_start_loc.tolist(), step.query_lens, strict=False)
    ):
        seq_spares.append(len(assigned) * int(SPARES_RADIX) + num_splits - 1)
        first = seq + (start - seq) // per_tile
        for tile in range(first, first + -(-query_len // per_tile)):
            assigned += [tile] * (num_splits - 1)
    spare = 1 << (max(len(assigned), num_splits) - 1).bit_length()
    assigned += [-1] * (spare - len(assigned))
    out = torch.full_like(query, math.nan)
    scratch = (per_tile, 2 * spare, layout.heads)
    partial_out = torch.full((*scratch, layout.head_dim), math.nan)
    partial_lse = torch.full(scratch, math.nan)
    paged_attention[((spare + tiles) * layout.kv_heads,)](
        query.contiguous(),
        step.block_tables,
        step.query_start_loc,
        torch.tensor(step.seq_lens, dtype=torch.int32),
        torch.tensor(assigned, dtype=torch.int32),
        torch.tensor(seq_spares, dtype=torch.int32),
        step.pool,
        step.state,
        tokens,
        seqs,
        step.block_tables.shape[1],
        layer,
        out,
        partial_out,
        partial_lse,
        ATTENTION=Attention(
            num_kv_heads=layout.kv_heads,
            group=group,
            head_dim=layout.head_dim,
            head_dim_padded=padded,
            window=layout.window,
            scale_log2=math.log2(math.e) / math.sqrt(layout.head_dim),
            block_size=layout.block_size,
            block_elements=layout.block_elements,
            max_blocks=1 << 20,
            num_pools=1,
            blocks_per_pool=1 << 20,
            pool_offsets_byte=POOL_OFFSETS_BYTE,
            counters_byte=COUNTERS_BYTE,
        ),
        ROWS=block_m,
        ROW_KEYS=block_n,
        ROW_STAGES=2,
        FEW_ROWS=16,
        FEW_KEYS=16,
        FEW_STAGES=2,
        AT_A_TIME=at_a_time,
        MOST_HEADS=max(1, 1 << (16 // group).bit_length() - 1),
        WHOLE=WHOLE,
        NUM_SPARE=spare,
        COMBINED_ROWS=2,
        COMBINED_SPLITS=2,
    )
    counters = step.state.view(torch.int32)[COUNTERS_BYTE // 4 :][:NUM_COUNTERS]
    assert not counters.any(), "a counter was left behind"
    if split_tiles is not None:
        written = ~partial_lse[:, spare:].isnan().all(2).all(0)
        split_tiles.update(assigned[place] for place in written.nonzero().flatten().tolist())
    return out


CASES = {
    "decode rows, grouped heads": (Layout(8, 2, 32, 16), [1, 1, 1], [5, 33, 0], 1, 16, 32),
    "decode rows, split context": (Layout(4, 1, 32, 16), [1, 1], [70, 3], 3, 16, 16),
    "chunks and decode rows in one step": (Layout(4, 2, 16, 8), [7, 1, 19, 1], [9, 21, 0, 2], 1, 32, 16),
    "split chunks": (Layout(4, 2, 16, 8), [5, 1, 19], [40, 21, 9], 4, 32, 32),
    "a group of seven, as in Qwen2": (Layout(7, 1, 16, 16), [3, 1, 6], [4, 17, 0], 1, 16, 16),
    "a head size that is no power of two": (Layout(2, 2, 24, 8), [2, 4], [11, 0], 2, 16, 16),
    "sliding window": (Layout(4, 2, 16, 8, window=12), [1, 9, 1], [40, 20, 3], 2, 16, 16),
    "half precision": (Layout(4, 2, 32, 16, dtype=torch.float16), [1, 5], [20, 0], 1, 16, 16),
}
# The interpreter multiplies bfloat16 by its bit patterns; that type is checked on the GPU.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("name", CASES)
def test_attention_matches_the_specification(name: str) -> None:
    layout, query_lens, contexts, num_splits, block_m, block_n = CASES[name]
    rng = np.random.default_rng(sum(name.encode()))
    step = make_step(rng, layout, query_lens, contexts)
    shape = (sum(query_lens), layout.heads, layout.head_dim)
    query = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(layout.dtype)
    for layer in range(layout.layers):
        got = run_attention(query, step, layout, layer, num_splits, block_m, block_n).double()
        expected = reference_attention(query, step, layout, layer)
        assert float((got - expected).norm() / expected.norm()) < TOLERANCE[layout.dtype]


def test_a_short_context_is_not_split() -> None:
    layout = Layout(4, 2, 16, 8)
    rng = np.random.default_rng(5)
    step = make_step(rng, layout, [1, 1, 1], [WHOLE - 1, 2 * WHOLE, WHOLE])
    query = torch.from_numpy(rng.standard_normal((3, 4, 16)).astype(np.float32))
    split_tiles: set[int] = set()
    run_attention(query, step, layout, 0, 4, 16, 16, split_tiles)
    assert split_tiles == {1, 2}


@pytest.mark.parametrize("layout", [Layout(8, 8, 16, 8), Layout(10, 5, 24, 8), Layout(8, 8, 16, 8, window=9)])
def test_short_contexts_are_attended_to_for_several_kv_heads_at_a_time(layout: Layout) -> None:
    """Contexts of one key and of several fetches beside long ones, which are split, and chunks."""
    rng = np.random.default_rng(layout.heads)
    step = make_step(rng, layout, [1, 1, 6, 1, 1], [WHOLE - 1, 2 * WHOLE, 3, 0, 17])
    query = torch.from_numpy(rng.standard_normal((10, layout.heads, layout.head_dim)).astype(np.float32))
    expected = reference_attention(query, step, layout, 1)
    for splits, at_a_time in ((1, 1), (4, 1), (4, 30), (2, 45), (1, 60)):
        got = run_attention(query, step, layout, 1, splits, 32, 16, at_a_time=at_a_time)
        assert float((got.double() - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize(
    ("rows", "kv_heads", "most", "together"),
    [
        *((1, 8, 4, 1), (48, 8, 4, 1), (64, 8, 4, 1), (96, 8, 4, 2), (128, 8, 4, 2)),
        *((192, 8, 4, 1), (256, 8, 4, 4), (384, 8, 4, 2), (512, 8, 4, 4), (768, 8, 4, 4), (1024, 8, 4, 4)),
        *((32, 32, 16, 2), (48, 32, 16, 1), (64, 32, 16, 4), (96, 32, 16, 2), (192, 32, 16, 4)),
        *((256, 32, 16, 16), (384, 32, 16, 8), (512, 32, 16, 16), (512, 8, 1, 1), (600, 1, 1, 1)),
        *((256, 5, 2, 2), (100, 10, 8, 2), (8192, 1, 16, 16)),
    ],
)
def test_heads_share_a_tile_where_the_gpu_cannot_run_all_programs_at_once(
    rows: int, kv_heads: int, most: int, together: int
) -> None:
    assert int(heads_together(rows, kv_heads, 528, most)) == together


def test_attention_over_random_steps() -> None:
    rng = np.random.default_rng(7)
    for _ in range(6):
        group, kv_heads = int(rng.integers(1, 5)), int(rng.integers(1, 3))
        layout = Layout(
            group * kv_heads,
            kv_heads,
            16,
            int(rng.choice([8, 16])),
            layers=1,
            window=int(rng.choice([0, 0, 9])),
        )
        seqs = int(rng.integers(1, 5))
        query_lens = [int(n) for n in np.where(rng.random(seqs) < 0.5, 1, rng.integers(1, 9, seqs))]
        contexts = [int(n) for n in rng.integers(0, 40, seqs)]
        step = make_step(rng, layout, query_lens, contexts)
        shape = (sum(query_lens), layout.heads, layout.head_dim)
        query = torch.from_numpy(rng.standard_normal(shape).astype(np.float32))
        rows, keys = int(rng.choice([16, 32])), int(rng.choice([16, 32]))
        splits, at_a_time = int(rng.integers(1, 5)), int(rng.choice([1, 4, 100]))
        got = run_attention(query, step, layout, 0, splits, rows, keys, at_a_time=at_a_time)
        expected = reference_attention(query, step, layout, 0)
        assert float((got.double() - expected).norm() / expected.norm()) < 1e-5


def test_blocks_outside_the_pool_are_read_as_the_null_block() -> None:
    layout = Layout(2, 1, 16, 8, layers=1)
    rng = np.random.default_rng(3)
    step = make_step(rng, layout, [1, 1], [15, 6])
    query = torch.from_numpy(rng.standard_normal((2, 2, 16)).astype(np.float32))
    sane = step.block_tables.clone()
    sane[0, 1] = 0
    for outside in (step.pool.shape[0], 2**31 - 1, -1):
        step.block_tables[0, 1] = outside
        got = run_attention(query, step, layout, 0, 1, 16, 16)
        expected = reference_attention(
            query, Step([1, 1], step.seq_lens, sane, step.pool, step.state), layout, 0
        )
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_sequences_without_tokens_and_tokens_of_no_sequence_change_nothing() -> None:
    layout = Layout(4, 2, 16, 8, layers=1)
    rng = np.random.default_rng(4)
    step = make_step(rng, layout, [1, 3], [12, 5])
    query = torch.from_numpy(rng.standard_normal((4, 4, 16)).astype(np.float32))
    alone = run_attention(query, step, layout, 0, 2, 16, 16)
    tables = torch.cat([step.block_tables, torch.zeros_like(step.block_tables)])
    padded = Step([1, 3, 0, 0], [13, 8, 0, 0], tables, step.pool, step.state)
    for more in (0, 2, 30):
        garbage = torch.full((more, 4, 16), math.nan)
        together = run_attention(torch.cat([query, garbage]), padded, layout, 0, 2, 16, 16)
        assert torch.equal(alone, together[:4])
        assert together[4:].isnan().all()


def test_attention_in_bfloat16_over_a_pool_of_few_bits_multiplies_float16() -> None:
    """So the interpreter, which cannot multiply bfloat16, shows what a plan of bfloat16 computes."""
    layout = Layout(4, 2, 32, 16, dtype=torch.float8_e4m3fn)
    rng = np.random.default_rng(6)
    step = make_step(rng, layout, [1, 20, 1], [40, 20, 3])
    query = torch.from_numpy(rng.standard_normal((22, 4, 32)).astype(np.float32)).to(torch.bfloat16)
    for rows in (32, 64):
        got = run_attention(query, step, layout, 1, 2, rows, 16).double()
        expected = reference_attention(query, step, layout, 1)
        assert float((got - expected).norm() / expected.norm()) < 5e-3


def rope_table(head_dim: int, positions: int) -> torch.Tensor:
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(positions)[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def run_kv_write(
    qkv: torch.Tensor, head_norms: torch.Tensor, step: Step, layout: Layout, layer: int
) -> torch.Tensor:
    """Queries and keys of `qkv`, and the norms, have their dimensions in pairs."""
    tokens = qkv.shape[0]
    query = torch.full((tokens, layout.heads, layout.head_dim), math.nan, dtype=qkv.dtype)
    heads = Heads(
        num_heads=layout.heads,
        num_kv_heads=layout.kv_heads,
        head_dim=layout.head_dim,
        max_positions=64,
        block_size=layout.block_size,
        block_elements=layout.block_elements,
        max_blocks=1 << 20,
        num_pools=1,
        blocks_per_pool=1 << 20,
        pool_offsets_byte=POOL_OFFSETS_BYTE,
    )
    kv_write[(-(-tokens // 4), layout.heads + 2 * layout.kv_heads)](
        qkv,
        head_norms,
        rope_table(layout.head_dim, 64),
        step.positions,
        step.slots(layout.block_size),
        step.pool,
        step.state,
        tokens,
        layer,
        query,
        HEADS=heads,
        EPSILON=1e-3,
        BLOCK_M=4,
        BLOCK_N=1 << (layout.head_dim - 1).bit_length(),
    )
    return query


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 24])
def test_kv_write_norms_rotates_and_writes_every_slot_once(dtype: torch.dtype, head_dim: int) -> None:
    layout = Layout(3, 1, head_dim, 8, dtype=dtype)
    rng = np.random.default_rng(head_dim)
    step = make_step(rng, layout, [5, 1, 1], [6, 0, 30])
    tokens, heads = 7, layout.heads + 2 * layout.kv_heads
    qkv = torch.from_numpy(rng.standard_normal((tokens, heads, head_dim)).astype(np.float32)).to(dtype)
    norms = torch.from_numpy(rng.standard_normal((2, head_dim)).astype(np.float32)).to(dtype)
    before = step.pool.clone()
    pairs = in_pairs(head_dim)
    given = torch.cat([qkv[:, :4, pairs], qkv[:, 4:]], 1).flatten(1)
    query = run_kv_write(given, norms[:, pairs], step, layout, 1)

    x, (query_norm, key_norm) = qkv.double(), norms.double()
    normed = [
        rms_norm(x[:, :3], (head_dim,), query_norm, 1e-3),
        rms_norm(x[:, 3:4], (head_dim,), key_norm, 1e-3),
    ]
    angle = rope_table(head_dim, 64)[step.positions.long()].double()[:, None]
    cos, sin = angle.chunk(2, dim=-1)
    low, high = torch.cat(normed, 1).chunk(2, dim=-1)
    rotated = torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)[..., pairs]
    atol = 1e-6 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(query.double(), rotated[:, :3], atol=atol, rtol=0)
    expected = before.double()
    for token, slot in enumerate(step.slots(8).tolist()):
        expected[slot // 8, 1, 0, :, slot % 8] = rotated[token, 3:4]
        expected[slot // 8, 1, 1, :, slot % 8] = x[token, 4:5]
    torch.testing.assert_close(step.pool.double(), expected, atol=atol, rtol=0, equal_nan=True)


def test_kv_write_makes_the_largest_e4m3_of_what_is_beyond_it() -> None:
    layout = Layout(1, 1, 16, 8, layers=1, dtype=torch.float8_e4m3fn)
    step = make_step(np.random.default_rng(8), layout, [1], [0])
    before = step.pool.clone()
    written = torch.tensor([0.0, 1.97, -17.0, 3e-3, 447.0, 448.0, 449.0, 463.0, 465.0, -470.0, 1e4, -1e30])
    values = torch.cat([written, torch.tensor([3e38, -3e38, 0.25, -448.0])])
    # A key whose root mean square is 1 almost exactly, times the norm's weight, at position 0: not rotated.
    norms = torch.stack([torch.ones(16), values])
    run_kv_write(torch.cat([torch.zeros(16), torch.ones(16), values])[None], norms, step, layout, 0)
    block = int(step.block_tables[0, 0])
    keys = values / math.sqrt(1 + 1e-3)
    expected = torch.stack([keys, values]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    assert torch.equal(step.pool[block, 0, :, 0, 0].view(torch.uint8), expected.view(torch.uint8))
    step.pool[block, 0, :, 0, 0] = before[block, 0, :, 0, 0]
    assert torch.equal(step.pool.view(torch.uint8), before.view(torch.uint8)), "something else was written"


def test_kv_write_leaves_the_null_block_and_everything_outside_alone() -> None:
    layout = Layout(2, 1, 16, 8, layers=1)
    step = make_step(np.random.default_rng(5), layout, [1, 1], [0, 3])
    step.block_tables[:, 0] = torch.tensor([0, step.pool.shape[0]])
    before = step.pool.clone()
    run_kv_write(torch.ones(2, 4 * 16), torch.ones(2, 16), step, layout, 0)
    assert torch.equal(before.view(torch.int32), step.pool.view(torch.int32))


PTX_SCRIPT = r"""
import re
from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.operators import AssignSplits, KvWrite, PagedAttend, PlainArithmetic, StepBegin

pool = dict(layer=0, num_layers=32, head_dim=128, block_size=16, max_blocks=60000, blocks_per_pool=30000)
long = dict(head_dim=256)
norms = dict(max_positions=8192, epsilon=1e-6)
bf16, fp8 = dict(kv_element_bytes=2), dict(kv_element_bytes=1)
attend = dict(window=0, scale=0.1)
tokens = [(64, 6144), (2, 128), (8192, 128), (64,), (64,), (1,), (1,)]
rows = [(64, 32, 128), (64, 9), (65,), (64,), (64,), (64,), (1,), (1,)]
operators = [
    (KvWrite(**pool, **bf16, **norms, num_pools=1, num_heads=32, num_kv_heads=8), tokens),
    (PagedAttend(**pool, **bf16, **attend, num_pools=1, num_heads=32, num_kv_heads=8), rows),
    (PagedAttend(**pool, **bf16, **attend, num_pools=2, num_heads=32, num_kv_heads=32), rows),
    (PagedAttend(**(pool | long), **bf16, **attend, num_pools=1, num_heads=16, num_kv_heads=8), rows),
    (StepBegin(128256, 2, 2, 60000, 256), [(64,)]),
    (AssignSplits(32, 8, 128, 0), [(65,), (64,)]),
]
narrow = [
    (KvWrite(**pool, **fp8, **norms, num_pools=1, num_heads=32, num_kv_heads=8), tokens),
    (PagedAttend(**pool, **fp8, **attend, num_pools=1, num_heads=32, num_kv_heads=8), rows),
    (PagedAttend(**(pool | long), **fp8, **attend, num_pools=2, num_heads=16, num_kv_heads=8), rows),
]
cases = [(arch, case) for arch in (89, 90) for case in narrow] + [(90, case) for case in operators]
cases += [(80, operators[1]), (89, operators[3])]
for arch, (operator, shapes) in cases:
    launch = operator.launch(shapes, PlainArithmetic())
    types = {name: kind.replace("model", "bf16") for name, kind in launch.types.items()}
    assert list(types) == [name for name in launch.kernel.arg_names if name not in launch.constants]
    compiled = compile_kernel(
        launch.kernel, types, launch.constants, arch=arch,
        num_warps=launch.num_warps, num_stages=launch.num_stages, max_registers=launch.max_registers,
    )
    assert ".version 8.7" in compiled.ptx and f".target sm_{arch}" in compiled.ptx
    assert (".maxnreg 128" in compiled.ptx) == (launch.max_registers == 128)
    if isinstance(operator, KvWrite):
        assert "ld.global.v4" in compiled.ptx, "narrow loads"
        assert ("satfinite.e4m3x2" in compiled.ptx) == (operator.kv_element_bytes == 1)
    if isinstance(operator, PagedAttend):
        fetches = re.findall(r"cp\.async\.c\w\.shared\.global \[[^;]*\], (0x\w+)", compiled.ptx)
        # The last loops are those of decode rows. Full tiles fetch single bytes by 8.
        assert set(fetches[-8:]) == {"0x10"}, "keys are not fetched ahead by 16 bytes"
        assert operator.kv_element_bytes == 1 or set(fetches) == {"0x10"}
        assert (launch.max_registers == 128) == (operator.head_dim == 128)
    print(arch, compiled.name, compiled.threads, compiled.shared_bytes)
try:
    compile_kernel(
        launch.kernel, types, launch.constants, arch=arch, num_warps=launch.num_warps,
        num_stages=launch.num_stages, max_registers=launch.max_registers,
        max_shared_bytes=compiled.shared_bytes - 1,
    )
except ValueError as error:
    print(error)
"""


def test_kernels_compile_for_ampere_ada_and_hopper(tmp_path: object) -> None:
    """In a process of its own: the compiler must not see this process's interpreter switch or cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PTX_SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *compiled, refusal = done.stdout.splitlines()
    assert len(compiled) == 14
    _, name, _, shared_bytes = compiled[-1].split()
    assert refusal.startswith(f"kernel {name} wants {shared_bytes} bytes of shared memory; ")
    assert f"can give it {int(shared_bytes) - 1}" in refusal
