"""Linear layers with what surrounds them in a block of a LLaMA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.tensorrt.kernels.linear import SQUARES_WIDTH, linear
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape


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
