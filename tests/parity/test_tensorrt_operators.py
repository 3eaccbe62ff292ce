"""The operators of a lowered graph, launched as a plan launches them, against what they stand for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire_build.paged_attention import paged_attention_in_place
from quire_build.tensorrt.operators import MODEL, KvWrite, Operator, PagedAttend, PlainArithmetic

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def run(operator: Operator, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Launch one float32 operator in the interpreter; outputs start as NaN, so that gaps show."""
    shapes = [tuple(tensor.shape) for tensor in inputs]
    outputs = []
    for shape, element in operator.outputs(shapes):
        assert element in (MODEL, "fp32")
        outputs.append(torch.full(shape, math.nan))
    launch = operator.launch(shapes, PlainArithmetic())
    launch.kernel[launch.grid](*inputs, *launch.integers, *outputs, **launch.constants)
    return outputs


def integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_write_and_attend_are_rope_and_paged_attention(tile_rows: int) -> None:
    rng = np.random.default_rng(tile_rows)
    heads, kv_heads, head_dim, block_size, layers, layer = 6, 2, 16, 8, 3, 1
    query_lens, seq_lens = [1, 11, 1, 3], [50, 11, 1, 20]
    tokens, num_blocks = sum(query_lens), 20

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    pool = random(num_blocks, layers, 2, kv_heads, block_size, head_dim)
    pool[0] = 0.0
    pool.view(-1).view(torch.int64)[0] = num_blocks
    tables = torch.zeros(4, 8, dtype=torch.int32)
    order = rng.permutation(np.arange(1, num_blocks))
    for i, (first, count) in enumerate([(0, 7), (7, 2), (9, 1), (10, 3)]):
        tables[i, :count] = integers(order[first : first + count].tolist())
    positions = torch.cat(
        [torch.arange(s - q, s, dtype=torch.int32) for q, s in zip(query_lens, seq_lens, strict=True)]
    )
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(query_lens))
    slots = tables[row, positions.long() // block_size] * block_size + positions % block_size
    starts, lengths = integers([0, *np.cumsum(query_lens)]), integers(seq_lens)
    cosine, sine = random(64, head_dim // 2), random(64, head_dim // 2)
    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)

    expected_pool = pool.clone()
    split = torch.split(qkv.view(tokens, -1, head_dim), [heads, kv_heads, kv_heads], dim=1)
    cos, sin = cosine[positions.long(), None], sine[positions.long(), None]
    query, key = (
        torch.cat((x[..., :8] * cos - x[..., 8:] * sin, x[..., 8:] * cos + x[..., :8] * sin), -1).flatten(1)
        for x in split[:2]
    )
    expected, _, _ = paged_attention_in_place(
        query, key, split[2].flatten(1), expected_pool[:, layer, 0], expected_pool[:, layer, 1],
        slots, tables, starts, lengths, 0.3, heads, kv_heads, 0,
    )  # fmt: skip

    layout = (layer, layers, heads, kv_heads, head_dim, block_size, num_blocks)
    table = torch.cat([cosine, sine], dim=1)
    (rotated,) = run(
        KvWrite(*layout, max_positions=64, head_normed=0, epsilon=0.0),
        [qkv, table, positions, slots, qkv, pool],
    )
    torch.testing.assert_close(rotated.flatten(1), query, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pool[1:], expected_pool[1:], atol=1e-6, rtol=1e-5)
    attend = PagedAttend(*layout, window=0, scale=0.3, tile_rows=tile_rows)
    attended = run(attend, [rotated, tables, starts, lengths, pool])[0]
    torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-4)


def test_scratch_and_counters_hold_every_split_step() -> None:
    """Partial results and counters have fixed sizes; no step of any shape may want more of them."""
    for heads, kv_heads in ((32, 8), (28, 4), (4, 2), (64, 8), (8, 8)):
        for tile_rows in (16, 64):
            attend = PagedAttend(0, 1, heads, kv_heads, 64, 16, 100, 0, 0.125, tile_rows)
            for seqs in (1, 2, 3, 7, 31, 200):
                for tokens in (seqs, seqs + 1, seqs + 13, seqs + 700):
                    shapes = [(tokens, heads, 64), (seqs, 9), (seqs + 1,), (seqs,), (1,)]
                    _, (partial_out, _), _ = attend.outputs(shapes)
                    tiles, _, splits = attend.launch(shapes, PlainArithmetic()).grid
                    if splits > 1:
                        assert tokens * splits <= partial_out[0]
                        assert 4 * (16 + tiles * kv_heads) <= 1024
