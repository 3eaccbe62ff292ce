"""How a plan keeps weights of eight bits that its kernels widen.

**Pairs.** Two numbers lie in 16 bits, so that two pairs are widened at a time: one input from the first half
of a group, and its counterpart from the second. Of floats (e4m3) the first has the low byte and the second
the high one. Integers are kept as signs and magnitudes, and the signs are exchanged: what is left of the 16
bits by & 0x807F is then a number of half precision, the first integer as a multiple of the smallest that the
type has; with the bytes exchanged, it is the second.

**Blocks.** BLOCK_CHANNELS output channels lie together, group by group of inputs, so that what a program
reads at a time is one piece of memory.

`quire_build.tensorrt.kernels.widen` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quire_build.quantization import WEIGHT_GROUP

BLOCK_CHANNELS = 32
"""Output channels of a block."""
FIRST_MASK = 0x807F
"""The bits of a pair that are its first integer."""


@dataclass(frozen=True)
class HalfPrecision:
    """How integers are made of what a mask leaves, in one type of half precision.

    Attributes:
        factor: makes a normal number of it, exactly; the type has this number.
        unit: what is then multiplied with this is the integer.
    """

    factor: float
    unit: float


BFLOAT16, FLOAT16 = HalfPrecision(2.0**127, 2.0**6), HalfPrecision(2.0**15, 2.0**9)
"""1 over their products are the smallest numbers of the types."""


def paired_columns(k: int) -> int:
    """Numbers that are kept of a channel with k inputs."""
    return k + -k % WEIGHT_GROUP


def paired(values: Tensor) -> Tensor:
    """Arrange a weight's numbers for the kernels.

    Args:
        values: [n, k], e4m3 or int8 without -128.

    Returns:
        int32 [n to a multiple of BLOCK_CHANNELS, paired_columns(k) / 4]; what is added is zero.
    """
    n, k = values.shape
    columns = paired_columns(k)
    padded = nn.functional.pad(values.view(torch.int8), (0, columns - k, 0, -n % BLOCK_CHANNELS))
    blocks = padded.view(-1, BLOCK_CHANNELS, columns // WEIGHT_GROUP, 2, WEIGHT_GROUP // 2)
    first, second = blocks.transpose(1, 2).unbind(3)
    if values.dtype == torch.int8:
        first, second = first.abs() | second & -128, second.abs() | first & -128
    return torch.stack([first, second], -1).view(padded.shape).view(torch.int32)
