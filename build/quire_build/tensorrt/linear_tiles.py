"""Which tiles a linear layer may be computed in: one for each tactic that TensorRT times.

A tile is right for every number of rows; the range that it is meant for is the one where it is fast. What is
chosen here was measured on an H100 with `tests/benchmarks/gpu_linear.py`, what the accelerator moves on an
H200 and an H100; tiles of eight bits on both sides were chosen by how they compile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quire.execution.engine_state import NUM_COUNTERS
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

PROGRAMS_PER_MULTIPROCESSOR = 3
"""K is split until about so many programs run on each multiprocessor."""
LARGE_TILE = 64 * 128
"""Elements from which on a tile's parts are so many that two programs on one are better than three; half as
many where weights are widened, which takes a second sum."""
MULTIPROCESSOR_BYTES = 227 * 1024
"""Shared memory of a multiprocessor; what does not fit it twice runs there alone."""


@dataclass(frozen=True)
class LinearTile:
    """How a linear layer is cut up.

    Attributes:
        splits: parts of k while the rows fit one tile; with r tiles of rows, splits // r, but at least 1.
        block_m: rows of a tile.
        block_n: columns of a tile, a multiple of SQUARES_WIDTH unless the layer is gated; a power of two, or
            the sum of two where ``tma``.
        block_k: how much of k is multiplied at once.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over k.
        tma: whether the tensor memory accelerator moves the operands: `linear_tma`, without splits.
        scaled_first: whether weights that are widened are scaled before the product: `widened_product`.
    """

    splits: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    scaled_first: bool = False

    @property
    def more_n(self) -> int:
        """Columns beyond the largest power of two in `block_n`."""
        return self.block_n - (1 << self.block_n.bit_length() - 1)


Operands = Literal["wide", "widened", "int8", "fp8"]
"""What the matrix unit multiplies: rows and weights of the model's type, or weights of eight bits widened to
it, or both in eight bits."""

Shape = tuple[int, int, int, int, int]
"""block_m, block_n, block_k, num_warps and num_stages of a `LinearTile`."""

PLAIN: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 2),
    (128, 128, 32, 4, 3),
)
GATED: tuple[Shape, ...] = ((16, 32, 128, 4, 2), (64, 32, 64, 4, 3), (64, 64, 64, 4, 2), (128, 64, 32, 8, 3))
WIDENED_PLAIN: tuple[Shape, ...] = (
    (16, 64, 128, 4, 3),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 8, 2),
)
WIDENED_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 3),
    (32, 32, 64, 4, 4),
    (64, 32, 64, 4, 3),
    (64, 64, 64, 8, 2),
)
NARROW_PLAIN: tuple[Shape, ...] = (
    (16, 32, 256, 4, 4),
    (16, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 128, 4, 2),
    (128, 128, 64, 8, 3),
)
NARROW_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (32, 32, 128, 4, 4),
    (64, 32, 128, 4, 3),
    (64, 64, 128, 4, 2),
    (128, 64, 64, 8, 3),
)
"""Tiles for the shared memory that every program has; few rows first."""

DEEP_PLAIN: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (64, 64, 64, 4, 6),
    (64, 64, 128, 4, 5),
    (128, 128, 64, 8, 6),
)
DEEP_GATED: tuple[Shape, ...] = (
    (16, 16, 128, 4, 3),
    (16, 32, 128, 4, 2),
    (64, 32, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
    (128, 64, 64, 8, 4),
)
DEEP_WIDENED_PLAIN: tuple[Shape, ...] = (
    (16, 64, 128, 4, 4),
    (32, 64, 128, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 128, 8, 3),
    (128, 64, 128, 4, 3),
    (128, 128, 128, 8, 3),
)
DEEP_WIDENED_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (32, 32, 128, 4, 4),
    (64, 64, 64, 4, 4),
    (128, 64, 128, 8, 3),
)
DEEP_INT8_PLAIN: tuple[Shape, ...] = (
    (16, 32, 256, 4, 4),
    (16, 64, 128, 4, 6),
    (32, 64, 128, 4, 6),
    (64, 64, 128, 4, 6),
    (64, 64, 256, 4, 5),
    (128, 128, 128, 8, 6),
)
DEEP_INT8_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (32, 32, 128, 4, 4),
    (64, 64, 128, 4, 3),
    (128, 64, 128, 8, 3),
    (128, 64, 128, 8, 6),
)
DEEP_FP8_PLAIN: tuple[Shape, ...] = (
    (16, 32, 256, 4, 4),
    (32, 64, 128, 4, 6),
    (64, 32, 256, 4, 4),
    (64, 64, 128, 4, 6),
    (64, 128, 128, 4, 5),
    (128, 128, 128, 8, 3),
    (128, 128, 128, 8, 6),
)
DEEP_FP8_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (64, 32, 128, 4, 4),
    (64, 64, 128, 4, 3),
    (128, 64, 128, 8, 3),
    (128, 64, 128, 8, 6),
)
"""Tiles for programs that may have nearly all shared memory of a multiprocessor: from 64 rows on, both
operands of a matrix instruction come from there unless weights are widened, and it takes that many stages for
memory to keep up."""

TMA_PLAIN: tuple[Shape, ...] = (
    (64, 192, 64, 4, 6),
    (128, 64, 128, 8, 4),
    (128, 128, 64, 8, 5),
    (128, 192, 64, 8, 5),
    (128, 256, 64, 8, 4),
    (256, 128, 64, 8, 4),
)
TMA_GATED: tuple[Shape, ...] = ((128, 64, 64, 8, 5), (128, 96, 64, 8, 5), (128, 128, 64, 8, 4))
TMA_NARROW_PLAIN: tuple[Shape, ...] = (
    (128, 64, 256, 8, 4),
    (128, 128, 128, 8, 5),
    (128, 256, 128, 8, 4),
    (256, 128, 128, 8, 4),
)
TMA_NARROW_GATED: tuple[Shape, ...] = ((128, 64, 128, 8, 5), (128, 128, 128, 8, 4))
"""Tiles that the tensor memory accelerator moves, with as much shared memory."""
SCALED_FIRST_TILES: tuple[tuple[Shape, ...], tuple[Shape, ...]] = (
    ((256, 128, 64, 8, 4),),
    ((128, 64, 64, 8, 4), (256, 64, 64, 8, 4)),
)
"""Tiles of plain layers and of gated ones whose weights are widened, with registers for one sum alone. Scaled
weights go through shared memory, which `tile_bytes` has room for."""
ROW_ALIGNMENT = 16
"""Bytes that rows take multiples of, where the accelerator is to move them."""

Shapes = Mapping[Operands, tuple[tuple[Shape, ...], tuple[Shape, ...]]]
"""Of plain layers and of gated ones."""

SHALLOW: Shapes = {
    "wide": (PLAIN, GATED),
    "widened": (WIDENED_PLAIN, WIDENED_GATED),
    "int8": (NARROW_PLAIN, NARROW_GATED),
    "fp8": (NARROW_PLAIN, NARROW_GATED),
}
DEEP: Shapes = {
    "wide": (DEEP_PLAIN, DEEP_GATED),
    "widened": (DEEP_WIDENED_PLAIN, DEEP_WIDENED_GATED),
    "int8": (DEEP_INT8_PLAIN, DEEP_INT8_GATED),
    "fp8": (DEEP_FP8_PLAIN, DEEP_FP8_GATED),
}
MOVED: Shapes = {
    "wide": (TMA_PLAIN, TMA_GATED),
    "widened": ((), ()),
    "int8": (TMA_NARROW_PLAIN, TMA_NARROW_GATED),
    "fp8": (TMA_NARROW_PLAIN, TMA_NARROW_GATED),
}


def tiles(
    n: int,
    k: int,
    gated: bool,
    operands: Operands = "wide",
    shared_bytes: int = DEFAULT_SHARED_BYTES,
    *,
    multiprocessors: int,
) -> tuple[LinearTile, ...]:
    """The tiles of a layer with weight [n, k], or [2 * n, k] when ``gated``; few rows first.

    Args:
        operands: what is multiplied. Where weights are widened, `WEIGHT_GROUP` divides every block_k.
        shared_bytes: shared memory that a program may have.
        multiprocessors: of the GPU.
    """
    shapes, moved = DEEP[operands][gated], MOVED[operands][gated]
    scaled_first = SCALED_FIRST_TILES[gated] if operands == "widened" else ()
    if max(tile_bytes(shape, gated, operands) for shape in (*shapes, *scaled_first, *moved)) > shared_bytes:
        # As much shared memory as moved tiles want have GPUs from Hopper on, which have the accelerator; deep
        # tiles of widened weights fit Ampere's large GPUs too.
        shapes, scaled_first, moved = SHALLOW[operands][gated], (), ()
    if k * (2 if operands == "wide" else 1) % ROW_ALIGNMENT:
        moved = ()
    return (
        *(LinearTile(_splits(n, k, gated, operands, shape, multiprocessors), *shape) for shape in shapes),
        *(LinearTile(1, *shape, scaled_first=True) for shape in scaled_first),
        *(LinearTile(1, *shape, tma=True) for shape in moved),
    )


def tile_bytes(shape: Shape, gated: bool, operands: Operands = "wide") -> int:
    """Shared memory that a program needs at most: both operands, once for each stage."""
    block_m, block_n, block_k, _, stages = shape
    columns = (1 + gated) * block_n
    row_bytes, weight_bytes = {"wide": (2, 2), "widened": (2, 1)}.get(operands, (1, 1))
    return stages * block_k * (row_bytes * block_m + weight_bytes * columns)


def _splits(n: int, k: int, gated: bool, operands: Operands, shape: Shape, multiprocessors: int) -> int:
    """As many splits as it takes to fill the GPU, if k and the counters allow."""
    block_m, block_n, block_k, _, _ = shape
    columns = -(-n // block_n)
    sums = block_m * block_n * (1 + gated) * (2 if operands == "widened" else 1)
    programs = PROGRAMS_PER_MULTIPROCESSOR - (sums >= LARGE_TILE)
    programs = min(programs, MULTIPROCESSOR_BYTES // tile_bytes(shape, gated, operands))
    return max(1, min(programs * multiprocessors // columns, k // (4 * block_k), 2 * NUM_COUNTERS // columns))
