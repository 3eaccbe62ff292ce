"""Choosing the next token of each row of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from quire.execution.engine_state import COUNTERS_BYTE, SAMPLED_IDS_BYTE
from quire_build.tensorrt.kernels.sample import sample
from quire_build.tensorrt.operators.launch import Arithmetic, Launch, Shape, power_of_two

PROGRAMS_WANTED = 128
"""Programs look for the rows' best logits together until about this many run; a power of two."""
BLOCK = 4096
CAPACITY = 2048


@dataclass(frozen=True)
class Sample:
    """Choose a token of each row, as `quire.execution.sampler` does.

    Inputs: logits float32 [N, vocab_size]; sampling float32 [N, 5]: inverse temperature, top_k, top_p, min_p,
    uniform number; engine_state int64, which keeps the tokens of the first ``max_num_seqs`` rows. Outputs:
    sampled ids int32 [N], -1 for a row whose best logit is not a finite number; scratch.
    """

    vocab_size: int
    max_num_seqs: int

    INPUTS: ClassVar[tuple[str, ...]] = ("logits", "sampling", "engine_state")
    NUM_OUTPUTS: ClassVar[int] = 2

    @property
    def num_tactics(self) -> int:
        """One."""
        return 1

    def outputs(self, shapes: Sequence[Shape]) -> tuple[tuple[tuple[Any, ...], str], ...]:
        """The ids, and scratch for each row."""
        rows = shapes[0][0]
        return ((rows,), "i32"), ((rows, 2 * CAPACITY), "i32")

    def launch(self, shapes: Sequence[Shape], arithmetic: Arithmetic, tactic: int = 0) -> Launch:
        """A program for each row and each part of the vocabulary."""
        rows = shapes[0][0]
        splits = arithmetic.larger(arithmetic.constant(PROGRAMS_WANTED) // rows, 1)
        return Launch(
            kernel=sample,
            types={
                "logits": "*fp32",
                "sampling": "*fp32",
                "engine_state": "*i64",
                "num_splits": "i32",
                "sampled_ids": "*i32",
                "scratch": "*i32",
            },
            constants={
                "VOCAB_SIZE": self.vocab_size,
                "MAX_NUM_SEQS": self.max_num_seqs,
                "COUNTERS_OFFSET": COUNTERS_BYTE // 4,
                "SAMPLED_IDS_OFFSET": SAMPLED_IDS_BYTE // 4,
                "MOST_SPLITS": PROGRAMS_WANTED,
                "BLOCK": min(BLOCK, power_of_two(self.vocab_size)),
                "CAPACITY": CAPACITY,
            },
            grid=(splits, rows),
            integers=(splits,),
            num_warps=16,
        )
