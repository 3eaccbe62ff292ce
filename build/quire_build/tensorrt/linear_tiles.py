"""Which tiles a linear layer may be computed in: one for each tactic that TensorRT times.

A tile is right for every number of rows; the range that it is meant for is the one where it is fast. What is
chosen here for weights of two bytes was measured on an H100 with `tests/benchmarks/gpu_linear.py`. The tiles
for int8 were not measured yet: they keep about as many bytes in flight, and spill no register.
"""

from __future__ import annotations

from dataclasses import dataclass

from quire.execution.engine_state import NUM_COUNTERS

PROGRAMS_WANTED = 384
"""K is split until at most this many programs run: three on nearly each of a Hopper GPU's 132 SMs."""

LARGE_TILE = 64 * 128
"""Elements from which on a tile's parts are so many that two programs on an SM are better than three."""


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


def tiles(n: int, k: int, gated: bool, weight_group: int = 0) -> tuple[LinearTile, ...]:
    """The tiles of a layer with weight [n, k], or [2 * n, k] when ``gated``; few rows first.

    All fit the shared memory that a plan's kernels have while rows are of two bytes an element, and weights
    too or, with a ``weight_group``, of one. A group is a multiple of every block_k.
    """
    if weight_group and gated:
        shapes = [
            (16, 32, 64, 4, 6),
            (32, 32, 64, 4, 6),
            (64, 32, 64, 4, 3),
            (64, 64, 64, 8, 2),
            (128, 64, 32, 8, 3),
        ]
    elif weight_group:
        shapes = [
            (16, 32, 64, 4, 8),
            (16, 64, 64, 4, 6),
            (32, 64, 64, 4, 6),
            (64, 64, 64, 4, 3),
            (64, 128, 64, 8, 2),
            (128, 128, 32, 8, 3),
        ]
    elif gated:
        shapes = [(16, 32, 128, 4, 2), (64, 32, 64, 4, 3), (64, 64, 64, 4, 2), (128, 64, 32, 8, 3)]
    else:
        shapes = [
            (16, 32, 128, 4, 4),
            (32, 64, 64, 4, 4),
            (64, 64, 64, 4, 3),
            (64, 128, 64, 4, 2),
            (128, 128, 32, 4, 3),
        ]
    return tuple(LinearTile(_splits(n, k, gated, *shape[:3]), *shape) for shape in shapes)


def _splits(n: int, k: int, gated: bool, block_m: int, block_n: int, block_k: int) -> int:
    """As many splits as it takes to fill the GPU, if k and the counters allow."""
    columns = -(-n // block_n)
    large = block_m * block_n * (1 + gated) >= LARGE_TILE
    programs = PROGRAMS_WANTED * 2 // 3 if large else PROGRAMS_WANTED
    return max(1, min(programs // columns, k // (4 * block_k), 2 * NUM_COUNTERS // columns))
