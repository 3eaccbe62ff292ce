"""Quantising the rows that linear layers of eight bits read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire_build.quantization import LARGEST
from quire_build.tensorrt.kernels.quantize import CHUNK, quantize
from quire_build.tensorrt.kernels.step_size import ROWS, TOKENS
from quire_build.tensorrt.operators.launch import MODEL, Arithmetic, Launch, Shape, power_of_two

LARGEST_PIECE = 16384
"""Inputs that one program keeps in registers."""
PER_WARP = 1024
"""Inputs of a program for each of its warps."""


@dataclass(frozen=True)
class Quantize:
    """Rows as numbers of eight bits with one scale a row.

    Inputs: x [T, k], rows of logits where ``of_logits``, else of the step's tokens; engine_state.
    Outputs: numbers int8, or e4m3 if ``to_float``, as int32 [T, k / 4]; scales float32 [T]. Before that each
    ``rotation`` inputs, a power of two that divides k, are rotated as `quantization.rotated` does.
    """

    k: int
    rotation: int
    to_float: int
    of_logits: int

    INPUTS: ClassVar[tuple[str, ...]] = ("x", "engine_state")
    NUM_OUTPUTS: ClassVar[int] = 2

    @property
    def num_tactics(self) -> int:
        """One way."""
        return 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """Numbers and scales."""
        rows = shapes[0][0]
        return ((rows, self.k // 4), "i32"), ((rows,), "fp32")

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each row."""
        rows = shapes[0][0]
        piece = min(LARGEST_PIECE, max(CHUNK.value, power_of_two(self.k)))
        return Launch(
            kernel=quantize,
            types={
                "x": f"*{MODEL}",
                "engine_state": "*i64",
                "num_rows": "i32",
                "numbers": "*i32",
                "scales": "*fp32",
            },
            constants={
                "K": self.k,
                "ROTATION": self.rotation,
                "LARGEST": LARGEST["fp8" if self.to_float else "int8"],
                "NORM": self.rotation**-0.5,
                "FLOAT": bool(self.to_float),
                "COUNTED": (ROWS if self.of_logits else TOKENS).value,
                "PIECE": piece,
            },
            grid=(rows,),
            integers=(rows,),
            num_warps=max(1, piece // PER_WARP),
            num_stages=1,
        )
