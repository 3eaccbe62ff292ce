"""Which tiles a linear layer may be computed in: one for each tactic that TensorRT times.

A tile is right for every number of rows; the range that it is meant for is the one where it is fast. What is
chosen here was measured on Hopper GPUs with `tests/benchmarks/gpu_linear.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from quire.execution.engine_state import NUM_COUNTERS

PROGRAMS_WANTED = 256
"""K is split until about this many programs run: two on nearly each of a Hopper GPU's 132 SMs."""

LARGEST_SPLIT_TILE = 128 * 128
"""Elements of the largest tile that is split: adding splits up wants registers besides the tile's own."""


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
        transposed: multiply the weight with the rows, so that the matrix instructions' long side is n.
        ahead: hold the next tile of k in registers instead of the pipeline's shared memory; for one stage.
    """

    splits: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    transposed: bool = False
    ahead: bool = False


def tiles(n: int, k: int, gated: bool, wide_output: bool) -> tuple[LinearTile, ...]:
    """The tiles of a layer with weight [n, k], or [2 * n, k] when ``gated``; few rows first.

    All fit the shared memory that a plan's kernels have while weights and rows are of two bytes an element.
    """
    if gated:
        found = [
            LinearTile(1, 16, 32, 128, 4, 3),
            LinearTile(1, 64, 32, 64, 4, 3),
            LinearTile(1, 64, 64, 64, 4, 2),
            LinearTile(1, 128, 64, 32, 8, 3),
            LinearTile(1, 128, 128, 32, 8, 2),
        ]
    else:
        few = LinearTile(1, 16, 64, 128, 4, 3) if n <= 4096 else LinearTile(1, 16, 32, 128, 4, 5)
        found = [
            few,
            LinearTile(1, 64, 64, 64, 4, 3),
            LinearTile(1, 64, 128, 64, 4, 2),
            LinearTile(1, 128, 128, 32, 8, 3),
        ]
        if not wide_output:
            found.append(LinearTile(1, 128, 256, 32, 8, 2))
    return tuple(_split(tile, n, k, gated) for tile in found)


def _split(tile: LinearTile, n: int, k: int, gated: bool) -> LinearTile:
    """The tile with as many splits as it takes to fill the GPU, if k, counters and registers allow."""
    if tile.block_m * tile.block_n * (1 + gated) > LARGEST_SPLIT_TILE:
        return tile
    columns = -(-n // tile.block_n)
    splits = min(PROGRAMS_WANTED // columns, k // (4 * tile.block_k), 2 * NUM_COUNTERS // columns)
    return replace(tile, splits=max(1, splits))
