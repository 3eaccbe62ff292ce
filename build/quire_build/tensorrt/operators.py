"""The operators of a lowered graph: their kernels, outputs, and the launch that given input shapes ask for.

Sizes may be plain integers, as the tests run them in the Triton language's interpreter, or TensorRT's
symbolic ones, which a plan evaluates at every step: hence the arithmetic is handed in. `plugins.py` registers
what is defined here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from quire_build.tensorrt.kernels.kv_write import kv_write
from quire_build.tensorrt.kernels.linear import SQUARES_WIDTH, linear
from quire_build.tensorrt.kernels.paged_attention import paged_attention

MODEL = "model"
"""Stands for the element type that weights, activations and the pool share."""
PROGRAMS_WANTED = 256
"""The context is split until about this many programs run: two on nearly each of a Hopper GPU's 132 SMs."""

Shape = Sequence[Any]
"""Sizes, plain or symbolic."""


class Arithmetic(Protocol):
    """What sizes need beyond the operators +, - and // with an integer on the right."""

    def constant(self, value: int) -> Any:
        """A size that does not depend on the step."""

    def larger(self, first: Any, second: int) -> Any:
        """The larger of the two."""

    def ceil_div(self, first: Any, second: int) -> Any:
        """``first / second``, rounded up."""


class PlainArithmetic:
    """`Arithmetic` on Python's integers."""

    def constant(self, value: int) -> int:
        """``value`` itself."""
        return value

    def larger(self, first: int, second: int) -> int:
        """The larger of the two."""
        return max(first, second)

    def ceil_div(self, first: int, second: int) -> int:
        """``first / second``, rounded up."""
        return -(-first // second)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: a ``triton.jit`` function; its parameters are the operator's inputs, integers and outputs.
        types: of those parameters, in the Triton language's words, MODEL where the model's type belongs.
        constants: its ``constexpr`` parameters.
        grid: programs along each axis.
        integers: its integer parameters.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    grid: tuple[Any, ...]
    integers: tuple[Any, ...]
    num_warps: int = 4
    num_stages: int = 3


class Operator(Protocol):
    """An operator with its attributes: dataclass fields of type int or float."""

    INPUTS: ClassVar[tuple[str, ...]]
    NUM_OUTPUTS: ClassVar[int]

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Shape and element type (MODEL or "fp32") of each output, given the inputs' shapes."""

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """The launch for inputs of these shapes."""


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class KvWrite:
    """Rotate a step's queries and keys, put keys and values into the pool, pass the queries on.

    Inputs: qkv [T, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin float32 [max_positions, head_dim];
    positions, slot_mapping int32 [T]; head_norms [2, head_dim], weights of RMSNorms over each query head and
    each key head, read when ``head_normed``; kv_cache, the pool. Output: [T, num_heads, head_dim].
    """

    layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int
    max_positions: int
    head_normed: int
    epsilon: float

    INPUTS: ClassVar[tuple[str, ...]] = (
        "qkv",
        "cos_sin",
        "positions",
        "slot_mapping",
        "head_norms",
        "kv_cache",
    )
    NUM_OUTPUTS: ClassVar[int] = 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The rotated queries."""
        return (((shapes[0][0], self.num_heads, self.head_dim), MODEL),)

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """A program for each token and up to 16 of its heads."""
        heads = self.num_heads + 2 * self.num_kv_heads
        heads_per_program = min(16, power_of_two(heads))
        return Launch(
            kernel=kv_write,
            types={
                "qkv": f"*{MODEL}",
                "cos_sin": "*fp32",
                "positions": "*i32",
                "slot_mapping": "*i32",
                "head_norms": f"*{MODEL}",
                "kv_cache": f"*{MODEL}",
                "layer": "i32",
                "query": f"*{MODEL}",
            },
            constants={
                "HEAD_DIM": self.head_dim,
                "HALF_PADDED": power_of_two(self.head_dim // 2),
                "NUM_HEADS": self.num_heads,
                "NUM_KV_HEADS": self.num_kv_heads,
                "BLOCK_SIZE": self.block_size,
                "BLOCK_ELEMENTS": _block_elements(self),
                "MAX_BLOCKS": self.max_blocks,
                "MAX_POSITIONS": self.max_positions,
                "HEADS_PER_PROGRAM": heads_per_program,
                "HEAD_NORM": bool(self.head_normed),
                "EPSILON": self.epsilon,
            },
            grid=(shapes[0][0], -(-heads // heads_per_program)),
            integers=(self.layer,),
        )


@dataclass(frozen=True)
class PagedAttend:
    """Attend to the paged context, the step's own tokens included, which `KvWrite` has put there.

    Inputs: query [T, num_heads, head_dim]; block_tables int32 [S, B]; query_start_loc int32 [S + 1]; seq_lens
    int32 [S]; kv_cache, the pool. Outputs: [T, num_heads * head_dim], and two scratch tensors for splits.

    ``tile_rows`` is how many rows of queries share a key tile: 16 for decode rows, 64 where prefill prevails;
    either is right for any step. ``window`` is 0 or how many positions a query sees.
    """

    layer: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    max_blocks: int
    window: int
    scale: float
    tile_rows: int

    INPUTS: ClassVar[tuple[str, ...]] = ("query", "block_tables", "query_start_loc", "seq_lens", "kv_cache")
    NUM_OUTPUTS: ClassVar[int] = 3

    @property
    def _tokens_per_tile(self) -> int:
        return self.tile_rows // (self.num_heads // self.num_kv_heads)

    @property
    def _most_splits(self) -> int:
        """Splits of a launch with one tile; tiles times splits never exceed it, unless nothing is split."""
        return max(1, PROGRAMS_WANTED // self.num_kv_heads)

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The attended values, and scratch for as many rows as any split step has."""
        rows = self._tokens_per_tile * self._most_splits
        return (
            ((shapes[0][0], self.num_heads * self.head_dim), MODEL),
            ((rows, self.num_heads, self.head_dim), "fp32"),
            ((rows, self.num_heads), "fp32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """A program for each query tile, KV head and split."""
        tokens, (seqs, blocks_per_table) = shapes[0][0], shapes[1]
        tiles = seqs + (tokens - seqs) // self._tokens_per_tile
        splits = arithmetic.larger(arithmetic.constant(self._most_splits) // tiles, 1)
        return Launch(
            kernel=paged_attention,
            types={
                "query": f"*{MODEL}",
                "block_tables": "*i32",
                "query_start_loc": "*i32",
                "seq_lens": "*i32",
                "kv_cache": f"*{MODEL}",
                "num_seqs": "i32",
                "blocks_per_table": "i32",
                "num_splits": "i32",
                "layer": "i32",
                "out": f"*{MODEL}",
                "partial_out": "*fp32",
                "partial_lse": "*fp32",
            },
            constants={
                "HEAD_DIM": self.head_dim,
                "HEAD_DIM_PADDED": power_of_two(self.head_dim),
                "NUM_KV_HEADS": self.num_kv_heads,
                "GROUP": self.num_heads // self.num_kv_heads,
                "BLOCK_SIZE": self.block_size,
                "BLOCK_ELEMENTS": _block_elements(self),
                "MAX_BLOCKS": self.max_blocks,
                "WINDOW": self.window,
                "SCALE_LOG2": self.scale * math.log2(math.e),
                "BLOCK_M": self.tile_rows,
                "BLOCK_N": 64 if self.tile_rows == 16 else 32,
            },
            grid=(tiles, self.num_kv_heads, splits),
            integers=(seqs, blocks_per_table, splits, self.layer),
            num_stages=2,
        )


@dataclass(frozen=True)
class Linear:
    """A linear layer with RMSNorm before it, and SwiGLU or the residual sum after it, as the flags say.

    Inputs: x [T, k]; weight [n, k], twice as many rows when ``gated``; squares float32
    [T, k / SQUARES_WIDTH], read when ``normed``; residual [T, n] and next_norm [n], read when
    ``adds_residual``; bias, as many as weight has rows, read when ``biased``; kv_cache, whose null block
    lends counters. Where an input is not read, any will do.
    Outputs: the result [T, n]; when ``adds_residual``, the result times next_norm and the sums of its
    squares, what the next normed layer reads; scratch for splits. More than one split is right only where T
    is at most ``block_m``.
    """

    k: int
    n: int
    normed: int
    epsilon: float
    gated: int
    adds_residual: int
    biased: int
    wide_output: int
    splits: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    INPUTS: ClassVar[tuple[str, ...]] = (
        "x",
        "weight",
        "squares",
        "residual",
        "next_norm",
        "bias",
        "kv_cache",
    )
    NUM_OUTPUTS: ClassVar[int] = 4

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Result, normed result, sums of squares, scratch; of size 1 what the flags leave out."""
        rows = shapes[0][0]
        width, sums = (self.n, self.n // SQUARES_WIDTH.value) if self.adds_residual else (1, 1)
        scratch = self.splits * self.block_m * self.n * (1 + self.gated) if self.splits > 1 else 1
        return (
            ((rows, self.n), "fp32" if self.wide_output else MODEL),
            ((rows, width), MODEL),
            ((rows, sums), "fp32"),
            ((scratch,), "fp32"),
        )

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic) -> Launch:
        """A program for each tile of the result and each split."""
        rows = shapes[0][0]
        return Launch(
            kernel=linear,
            types={
                "x": f"*{MODEL}",
                "weight": f"*{MODEL}",
                "squares": "*fp32",
                "residual": f"*{MODEL}",
                "next_norm": f"*{MODEL}",
                "bias": f"*{MODEL}",
                "kv_cache": f"*{MODEL}",
                "num_rows": "i32",
                "out": "*fp32" if self.wide_output else f"*{MODEL}",
                "normed": f"*{MODEL}",
                "out_squares": "*fp32",
                "partial": "*fp32",
            },
            constants={
                "K": self.k,
                "N": self.n,
                "NORMED": bool(self.normed),
                "EPSILON": self.epsilon,
                "GATED": bool(self.gated),
                "RESIDUAL": bool(self.adds_residual),
                "BIAS": bool(self.biased),
                "SPLITS": self.splits,
                "BLOCK_M": self.block_m,
                "BLOCK_N": self.block_n,
                "BLOCK_K": self.block_k,
            },
            grid=(-(-self.n // self.block_n), arithmetic.ceil_div(rows, self.block_m), self.splits),
            integers=(rows,),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


OPERATORS: tuple[type[Operator], ...] = (KvWrite, PagedAttend, Linear)


def _block_elements(operator: KvWrite | PagedAttend) -> int:
    """Elements of one block: keys and values of every layer."""
    return operator.num_layers * 2 * operator.num_kv_heads * operator.block_size * operator.head_dim
