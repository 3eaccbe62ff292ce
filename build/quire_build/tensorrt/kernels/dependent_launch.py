"""A kernel's start while the kernel before it still runs: programmatic dependent launch.

Where the step's graph says so (`quire.execution.tensorrt.overlap`), a kernel's programs are launched as soon
as all those of the kernel before have started. Until `wait_for_inputs` they may touch what no kernel writes,
and nothing else: the weights, which they ask the L2 cache for. So the memory is not idle while one kernel
ends and the next begins.
"""

# Compile-time constants are written in capitals, as everywhere in the Triton language, which has no types:
# ruff: noqa: N803
# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ARCHITECTURE = 90
"""Compute capability from which on GPUs can do this: kernels are compiled with OVERLAPS from there on."""


@triton.jit
def let_next_start():
    """Let the next kernel's programs start, once every program of this one came here or ended."""
    gdc_launch_dependents()


@triton.jit
def wait_for_inputs():
    """Wait until all kernels before have ended and what they wrote is to be seen."""
    gdc_wait()


@triton.jit
def prefetch_rows(rows, num_bytes, LANES: tl.constexpr):
    """Ask the L2 cache for the first bytes of each row.

    Args:
        rows: [R] pointers, aligned to 16 bytes.
        num_bytes: [R], multiples of 16; none where not above 0.
        LANES: R.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred wanted; setp.gt.s32 wanted, $2, 0; "
        "@wanted cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [rows.to(tl.int64, bitcast=True), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
