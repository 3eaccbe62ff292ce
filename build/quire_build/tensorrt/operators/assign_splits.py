"""How a step's long contexts are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.tensorrt.kernels.assign_splits import assign_splits
from quire_build.tensorrt.operators.launch import Arithmetic, Launch, Shape, power_of_two

PROGRAMS_WANTED = 264
"""One long context alone is split until about this many programs run: two on each of a Hopper GPU's 132 SMs.
Several want twice as many."""
MAX_SPLITS = 64
"""Of one decode row, and of all contexts together, at most."""
WHOLE = 256
"""Keys that one program reads sooner than two agree on who combines what they read."""
ROW_MIN_SPLIT = 128
"""Keys, the fewest worth a split of a longer context."""
TILE_MIN_SPLIT = 1024
"""The same for tiles of more than one token, of which there is more to combine."""
LONG_SPLIT = 2048
"""Keys of one split of a decode row that is worth cutting for the sake of balance."""
SEQUENCES_TOGETHER = 128


def tile_rows(head_dim: int, group: int) -> int:
    """Rows of a full query tile; where a row is long, registers and shared memory have no room for many."""
    return max(64 if power_of_two(head_dim) <= 128 else 16, power_of_two(group))


def tokens_per_tile(head_dim: int, group: int) -> int:
    """Tokens of a full query tile, which has ``group`` rows of each."""
    return tile_rows(head_dim, group) // group


def row_splits(num_kv_heads: int) -> int:
    """Splits of one decode row, at most."""
    return min(max(1, PROGRAMS_WANTED // num_kv_heads), MAX_SPLITS)


def num_spare(num_kv_heads: int) -> int:
    """Places for splits beyond a tile's first: twice as many as one context has, a power of two."""
    return min(power_of_two(2 * row_splits(num_kv_heads) - 1), MAX_SPLITS)


@dataclass(frozen=True)
class AssignSplits:
    """Which tiles of a step's queries have their context split, and into how many.

    Inputs: query_start_loc int32 [S + 1]; seq_lens int32 [S]. Outputs: spare_tiles int32
    [num_spare(num_kv_heads)], the tile of each split beyond a tile's first, or -1; seq_spares int32 [S], how
    many such splits each tile of the sequence has, and where they are: see the kernel.

    ``window`` is 0 or how many positions a query sees.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int

    INPUTS: ClassVar[tuple[str, ...]] = ("query_start_loc", "seq_lens")
    NUM_OUTPUTS: ClassVar[int] = 2

    @property
    def num_tactics(self) -> int:
        """One way."""
        return 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """A tile for each spare place, and a number for each sequence."""
        return (((num_spare(self.num_kv_heads),), "i32"), ((shapes[1][0],), "i32"))

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """One program."""
        group = self.num_heads // self.num_kv_heads
        return Launch(
            kernel=assign_splits,
            types={
                "query_start_loc": "*i32",
                "seq_lens": "*i32",
                "num_seqs": "i32",
                "spare_tiles": "*i32",
                "seq_spares": "*i32",
            },
            constants={
                "TOKENS_PER_TILE": tokens_per_tile(self.head_dim, group),
                "WINDOW": self.window,
                "MOST": row_splits(self.num_kv_heads),
                "WHOLE": WHOLE,
                "ROW_MIN_SPLIT": ROW_MIN_SPLIT,
                "TILE_MIN_SPLIT": TILE_MIN_SPLIT,
                "LONG_SPLIT": LONG_SPLIT,
                "NUM_SPARE": num_spare(self.num_kv_heads),
                "BLOCK_S": SEQUENCES_TOGETHER,
            },
            grid=(arithmetic.constant(1),),
            integers=(shapes[1][0],),
        )
