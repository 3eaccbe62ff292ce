"""Linear layers with what surrounds them in a block of a LLaMA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.tensorrt import linear_tiles
from quire_build.tensorrt.kernels.linear import SQUARES_WIDTH, linear
from quire_build.tensorrt.kernels.linear_tma import linear_tma
from quire_build.tensorrt.kernels.step_size import ROWS, TOKENS
from quire_build.tensorrt.linear_tiles import LinearTile, Operands
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape

DESCRIPTOR_BYTES = 128
"""What a program of `linear_tma` describes one tensor to the tensor memory accelerator with."""


@dataclass(frozen=True)
class Linear:
    """A linear layer with RMSNorm before it, and SwiGLU or the residual sum after it, as the flags say.

    Inputs: x [T, k]; weight [n, k], twice as many rows when ``gated``; squares float32
    [T, k / SQUARES_WIDTH], read when ``normed``; residual [T, n] and next_norm [n], read when
    ``adds_residual``; bias, as many as weight has rows, read when ``biased``; scales; narrow_x and x_scales;
    engine_state, which lends counters. Where an input is not read, any will do.
    With a ``weight_group``, weight is int8, or e4m3 if ``weight_float``, arranged by `pairs.paired`, and
    scales [ceil(k / weight_group), rows of weight] are read: one for so many inputs. 0 is a weight of the
    model's type.
    With ``narrow_rows`` what is multiplied is not x but narrow_x int32 [T, k / 4], rows of the weight's type
    with x_scales float32 [T], as `Quantize` makes them; ``weight_group`` is then k, and weight as it is,
    int32 [n, k / 4].
    A program may have ``shared_bytes`` of shared memory, and the GPU has so many ``multiprocessors``.
    The result is ``wide_output``, float32, where it is logits, whose rows are not the step's tokens.
    Outputs: the result [T, n]; when ``adds_residual``, the result times next_norm and the sums of its
    squares, what the next normed layer reads; scratch for splits; memory for descriptors of tensors.
    """

    k: int
    n: int
    normed: int
    epsilon: float
    gated: int
    adds_residual: int
    biased: int
    wide_output: int
    weight_group: int
    weight_float: int
    narrow_rows: int
    shared_bytes: int
    multiprocessors: int

    INPUTS: ClassVar[tuple[str, ...]] = (
        "x",
        "weight",
        "squares",
        "residual",
        "next_norm",
        "bias",
        "scales",
        "narrow_x",
        "x_scales",
        "engine_state",
    )
    NUM_OUTPUTS: ClassVar[int] = 5

    @property
    def operands(self) -> Operands:
        """What the matrix unit is given."""
        if self.narrow_rows:
            return "fp8" if self.weight_float else "int8"
        return "widened" if self.weight_group else "wide"

    @property
    def tiles(self) -> tuple[LinearTile, ...]:
        """What TensorRT chooses from, one for each tactic."""
        return linear_tiles.tiles(
            self.n,
            self.k,
            bool(self.gated),
            self.operands,
            self.shared_bytes,
            multiprocessors=self.multiprocessors,
        )

    @property
    def num_tactics(self) -> int:
        """As many as there are tiles to choose from."""
        return len(self.tiles)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Result, normed result, sums of squares, scratch, descriptors; of size 1 what is left out."""
        rows = shapes[0][0]
        width, sums = (self.n, self.n // SQUARES_WIDTH.value) if self.adds_residual else (1, 1)
        rows_of_scratch = max(
            (tile.splits * tile.block_m for tile in self.tiles if tile.splits > 1), default=0
        )
        scratch = max(1, rows_of_scratch * self.n * (1 + self.gated))
        descriptors = max(1, self.multiprocessors * max(map(_descriptor_bytes, self.tiles)) // 4)
        return (
            ((rows, self.n), "fp32" if self.wide_output else MODEL),
            ((rows, width), MODEL),
            ((rows, sums), "fp32"),
            ((scratch,), "fp32"),
            ((descriptors,), "i32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each tile of the result and each split, or one for each multiprocessor."""
        return self.launch_in(self.tiles[tactic], shapes, arithmetic)

    def launch_in(self, tile: LinearTile, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """The launch in tiles of the caller's choice, scratch being large enough."""
        rows = shapes[0][0]
        types = {
            "x": f"*{MODEL}",
            "weight": "*i32" if self.weight_group else f"*{MODEL}",
            "squares": "*fp32",
            "residual": f"*{MODEL}",
            "next_norm": f"*{MODEL}",
            "bias": f"*{MODEL}",
            "scales": f"*{MODEL}",
            "narrow_x": "*i32" if self.narrow_rows else f"*{MODEL}",
            "x_scales": "*fp32",
            "engine_state": "*i64",
            "num_rows": "i32",
            "num_splits": "i32",
            "out": "*fp32" if self.wide_output else f"*{MODEL}",
            "normed": f"*{MODEL}",
            "out_squares": "*fp32",
            "partial": "*fp32",
        }
        constants = {
            "K": self.k,
            "N": self.n,
            "NORMED": bool(self.normed),
            "EPSILON": self.epsilon,
            "GATED": bool(self.gated),
            "RESIDUAL": bool(self.adds_residual),
            "BIAS": bool(self.biased),
            "WEIGHT_FLOAT": bool(self.weight_float),
            "NARROW_ROWS": bool(self.narrow_rows),
            "COUNTED": (ROWS if self.wide_output else TOKENS).value,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n - tile.more_n,
            "BLOCK_K": tile.block_k,
            **dict.fromkeys(("cos_sin", "positions", "slot_mapping", "kv_cache", "layer", "HEADS")),
        }
        if tile.tma:
            del types["num_splits"]
            return Launch(
                kernel=linear_tma,
                types=types,
                constants=constants | {"PROGRAMS": self.multiprocessors, "MORE_N": tile.more_n},
                grid=(self.multiprocessors,),
                integers=(rows,),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                max_shared_bytes=self.shared_bytes,
                language_scratch_bytes=_descriptor_bytes(tile),
            )
        row_tiles = arithmetic.ceil_div(rows, tile.block_m)
        splits = arithmetic.larger(arithmetic.constant(tile.splits) // row_tiles, 1)
        return Launch(
            kernel=linear,
            types=types,
            constants=constants
            | {"WEIGHT_GROUP": self.weight_group, "SPLITS": tile.splits, "SCALED_FIRST": tile.scaled_first},
            grid=(-(-self.n // tile.block_n), row_tiles, splits),
            integers=(rows, splits),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            max_shared_bytes=self.shared_bytes,
        )


def _descriptor_bytes(tile: LinearTile) -> int:
    """Memory that a program describes its operands in: the weight once for each width of what is moved."""
    return (2 + bool(tile.more_n)) * DESCRIPTOR_BYTES if tile.tma else 0
