"""Weights of eight bits as a plan keeps them: every number is found where the kernel looks for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire_build.quantization import WEIGHT_GROUP
from quire_build.tensorrt.pairs import (
    BFLOAT16,
    BLOCK_CHANNELS,
    FIRST_MASK,
    FLOAT16,
    HalfPrecision,
    paired,
    paired_columns,
)

HALF = WEIGHT_GROUP // 2


def pair(kept: Tensor, row: int, column: int, k: int) -> tuple[int, int, int]:
    """The 16 bits that a number is in, the other input there, and whether it is the second, by definition."""
    groups = -(-k // WEIGHT_GROUP)
    group, place = divmod(column, WEIGHT_GROUP)
    block, line = divmod(row, BLOCK_CHANNELS)
    index = ((block * groups + group) * BLOCK_CHANNELS + line) * HALF + place % HALF
    other = group * WEIGHT_GROUP + (place + HALF) % WEIGHT_GROUP
    return int(kept.flatten().view(torch.int16)[index]) & 0xFFFF, other, place // HALF


@pytest.mark.parametrize(
    ("dtype", "half"), [(torch.bfloat16, BFLOAT16), (torch.float16, FLOAT16)], ids=["bf16", "fp16"]
)
def test_what_a_mask_leaves_becomes_the_integer_in_half_precision(
    dtype: torch.dtype, half: HalfPrecision
) -> None:
    """The kernel's arithmetic in the type that it computes in, which the interpreter cannot do."""
    magnitudes = torch.arange(128)
    bits = torch.cat([magnitudes, magnitudes | 1 << 15]) | 0x7F00
    left = ((bits & FIRST_MASK) ^ 0x8000) - 0x8000  # as int16 reads it
    widened = left.to(torch.int16).view(dtype) * torch.tensor(half.factor, dtype=dtype)
    assert widened.dtype == dtype
    assert torch.equal(widened.float() * half.unit, torch.cat([magnitudes, -magnitudes]).float())


def test_an_integer_is_what_a_mask_leaves_of_its_pair() -> None:
    n, k = 40, 150
    values = torch.randint(-127, 128, (n, k), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    values[0, :3] = torch.tensor([127, -127, 0], dtype=torch.int8)
    kept = paired(values)
    for row in range(n):
        for column in range(k):
            bits, _, second = pair(kept, row, column, k)
            if second:
                bits = bits >> 8 | (bits & 0xFF) << 8
            left = bits & FIRST_MASK
            assert (-(left & 0x7F) if left >> 15 else left) == values[row, column]


def test_every_integer_beside_every_other() -> None:
    every = torch.arange(-127, 128, dtype=torch.int8)
    first, second = torch.cartesian_prod(every, every).T
    groups = -(-len(first) // (BLOCK_CHANNELS * HALF))
    values = torch.zeros(BLOCK_CHANNELS, groups * WEIGHT_GROUP, dtype=torch.int8)
    places = values.view(-1, 2, HALF)
    for half, numbers in enumerate((first, second)):
        filled = torch.zeros(places[:, half].numel(), dtype=torch.int8)
        filled[: len(numbers)] = numbers
        places[:, half] = filled.view(-1, HALF)
    kept = paired(values).flatten().view(torch.int16).int()
    exchanged = kept >> 8 & 0xFF | kept << 8
    both = torch.stack([kept & 0x807F, exchanged & 0x807F])
    back = torch.where(both & 0x8000 != 0, -(both & 0x7F), both & 0x7F)
    back = back.view(2, groups, BLOCK_CHANNELS, HALF).permute(2, 1, 0, 3).reshape(values.shape)
    assert torch.equal(back.to(torch.int8), values)


def test_floats_are_bytes_side_by_side() -> None:
    n, k = 33, 64
    values = torch.randn(n, k, generator=torch.Generator().manual_seed(1)).to(torch.float8_e4m3fn)
    kept, numbers = paired(values), values.view(torch.uint8)
    for row in range(n):
        for column in range(HALF):
            bits, other, second = pair(kept, row, column, k)
            assert not second
            assert bits == int(numbers[row, column]) | int(numbers[row, other]) << 8


@pytest.mark.parametrize(("n", "k"), [(32, 64), (33, 64), (32, 65), (1, 1)])
def test_what_is_added_is_zero(n: int, k: int) -> None:
    kept = paired(torch.full((n, k), -127, dtype=torch.int8))
    assert kept.dtype == torch.int32
    columns = paired_columns(k)
    assert kept.shape == (-(-n // BLOCK_CHANNELS) * BLOCK_CHANNELS, columns // 4)
    assert columns % WEIGHT_GROUP == 0 and columns - k < WEIGHT_GROUP
    magnitudes = kept.view(torch.int16).int() & 0x7F7F
    assert int((magnitudes & 0x7F).sum() + (magnitudes >> 8).sum()) == 127 * n * k
