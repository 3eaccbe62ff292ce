"""Which tiles a linear layer may be computed in: one for each tactic that TensorRT times.

A tile is right for every number of rows; the range that it is meant for is the one where it is fast. What is
chosen here was measured on an H100 with `tests/benchmarks/gpu_linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.execution.engine_state import NUM_COUNTERS
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

MULTIPROCESSORS = 128
"""About as many as a Hopper GPU has: K is split until so many times the programs on one of them run."""
PROGRAMS_PER_MULTIPROCESSOR = 3
LARGE_TILE = 64 * 128
"""Elements from which on a tile's parts are so many that two programs on one are better than three."""
MULTIPROCESSOR_BYTES = 227 * 1024
"""Shared memory of a multiprocessor; what does not fit it twice runs there alone."""


@dataclass(frozen=True)
class LinearTile:
    """How a linear layer is cut up.

    Attributes:
        splits: parts of k while the rows fit one tile; with r tiles of rows, splits // r, but at least 1.
        block_m: rows of a tile.
        block_n: columns of a tile, a multiple of SQUARES_WIDTH.
        block_k: how much of k is multiplied at once.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline over k.
    """

    splits: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


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
INT8_PLAIN: tuple[Shape, ...] = (
    (16, 32, 64, 4, 8),
    (16, 64, 64, 4, 6),
    (32, 64, 64, 4, 6),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 8, 2),
    (128, 128, 32, 8, 3),
)
INT8_GATED: tuple[Shape, ...] = (
    (16, 32, 64, 4, 6),
    (32, 32, 64, 4, 6),
    (64, 32, 64, 4, 3),
    (64, 64, 64, 8, 2),
    (128, 64, 32, 8, 3),
)
"""Tiles for the shared memory that every program has; few rows first."""

DEEP_PLAIN: tuple[Shape, ...] = (
    (16, 32, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 64, 4, 6),
    (64, 64, 128, 4, 5),
    (128, 128, 64, 8, 6),
    (128, 256, 64, 8, 4),
)
DEEP_GATED: tuple[Shape, ...] = (
    (16, 32, 128, 4, 2),
    (64, 32, 64, 4, 3),
    (64, 64, 64, 4, 3),
    (128, 64, 64, 8, 3),
    (128, 64, 64, 8, 4),
    (256, 64, 64, 8, 3),
    (256, 64, 64, 8, 4),
)
DEEP_INT8_PLAIN: tuple[Shape, ...] = (
    (16, 32, 64, 4, 8),
    (16, 64, 64, 4, 6),
    (32, 64, 64, 4, 6),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 128, 64, 8, 6),
)
DEEP_INT8_GATED: tuple[Shape, ...] = (
    (16, 32, 64, 4, 6),
    (32, 32, 64, 4, 6),
    (64, 64, 64, 4, 4),
    (128, 64, 64, 8, 3),
)
"""Tiles for programs that may have nearly all shared memory of a multiprocessor: from 64 rows on, both
operands of a matrix instruction come from there, and it takes that many stages for memory to keep up."""


def tiles(
    n: int, k: int, gated: bool, weight_group: int = 0, shared_bytes: int = DEFAULT_SHARED_BYTES
) -> tuple[LinearTile, ...]:
    """The tiles of a layer with weight [n, k], or [2 * n, k] when ``gated``; few rows first.

    Args:
        weight_group: inputs that share a scale where weights are of one byte and not of two, as rows are: a
            multiple of every block_k; 0 otherwise.
        shared_bytes: shared memory that a program may have.
    """
    if weight_group:
        shapes, deep = (INT8_GATED, DEEP_INT8_GATED) if gated else (INT8_PLAIN, DEEP_INT8_PLAIN)
    else:
        shapes, deep = (GATED, DEEP_GATED) if gated else (PLAIN, DEEP_PLAIN)
    if max(tile_bytes(shape, gated, weight_group) for shape in deep) <= shared_bytes:
        shapes = deep
    return tuple(LinearTile(_splits(n, k, gated, weight_group, shape), *shape) for shape in shapes)


def tile_bytes(shape: Shape, gated: bool, weight_group: int = 0) -> int:
    """Shared memory that a program needs at most: both operands, once for each stage.

    A weight of int8 comes once more, widened, where matrix instructions read it from there.
    """
    block_m, block_n, block_k, _, stages = shape
    columns = (1 + gated) * block_n
    stage_bytes = block_k * (2 * block_m + columns * (1 if weight_group else 2))
    widened_bytes = 2 * block_k * columns if weight_group and block_m >= 64 else 0
    return stages * stage_bytes + widened_bytes


def _splits(n: int, k: int, gated: bool, weight_group: int, shape: Shape) -> int:
    """As many splits as it takes to fill the GPU, if k and the counters allow."""
    block_m, block_n, block_k, _, _ = shape
    columns = -(-n // block_n)
    programs = PROGRAMS_PER_MULTIPROCESSOR - (block_m * block_n * (1 + gated) >= LARGE_TILE)
    programs = min(programs, MULTIPROCESSOR_BYTES // tile_bytes(shape, gated, weight_group))
    return max(1, min(programs * MULTIPROCESSORS // columns, k // (4 * block_k), 2 * NUM_COUNTERS // columns))
