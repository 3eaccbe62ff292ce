"""How much of its inputs a step uses: they are padded to one of the sizes that the plan is run in."""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from quire.execution.engine_state import STEP_MARK, STEP_SIZE_BYTE

TOKENS = tl.constexpr(0)
ROWS = tl.constexpr(1)
"""Places in the engine's state, behind STEP_SIZE."""
STEP_SIZE = tl.constexpr(STEP_SIZE_BYTE // 8)
MARK = tl.constexpr(STEP_MARK)


@triton.jit
def note(engine_state, WHICH: tl.constexpr, mark, count):
    """Write how many there are, with the mark that the host sent."""
    tl.store(engine_state + STEP_SIZE + WHICH, (mark.to(tl.int64) << 32) | count.to(tl.int64))


@triton.jit
def is_noted(engine_state):
    """Whether a step has begun. While TensorRT times tactics none has, and their inputs may be anything."""
    return tl.load(engine_state + STEP_SIZE + TOKENS) >> 32 == MARK


@triton.jit
def used(engine_state, WHICH: tl.constexpr, given):
    """How many of so many tokens or rows the step has; all, where no step has said so."""
    noted = tl.load(engine_state + STEP_SIZE + WHICH)
    count = tl.minimum(tl.maximum((noted & 0xFFFFFFFF).to(tl.int32), 0), given)
    return tl.where(noted >> 32 == MARK, count, given)
