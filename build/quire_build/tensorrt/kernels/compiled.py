"""Ahead-of-time compilation of the kernels: what a plan embeds and how it has to be launched."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

PTX_VERSION = 87
"""PTX 8.7: old enough for every driver of CUDA 12.8 or later, whatever the compiler's own default is."""


@dataclass(frozen=True)
class CompiledKernel:
    """PTX of one kernel and the launch it expects.

    Attributes:
        name: the entry's name in the PTX.
        threads: threads per program.
        shared_bytes: dynamic shared memory per program.
        language_scratch_bytes: memory of the GPU per program, which the first parameter that the language
            appends points to.
    """

    name: str
    ptx: str
    threads: int
    shared_bytes: int
    language_scratch_bytes: int


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    max_registers: int | None = None,
    max_shared_bytes: int = DEFAULT_SHARED_BYTES,
    language_scratch_bytes: int = 0,
) -> CompiledKernel:
    """Compile a kernel of this package for one GPU architecture; no GPU is needed.

    Args:
        kernel: a ``triton.jit`` function.
        types: its run-time parameters in order, pointers as ``"*bf16"``, integers as ``"i32"``. Pointers are
            taken to be 16-byte aligned, as TensorRT's tensors are.
        constants: values of its ``constexpr`` parameters.
        arch: compute capability, 90 for 9.0.
        max_registers: of a thread, at most.
        max_shared_bytes: shared memory of a program, at most.
        language_scratch_bytes: memory of the GPU for a program that the language may ask for, at most.

    Raises:
        ValueError: if the kernel wants more memory of one or the other kind.
    """
    compiled = _compile(
        kernel, tuple(types.items()), tuple(constants.items()), arch, num_warps, num_stages, max_registers
    )
    if compiled.shared_bytes > max_shared_bytes:
        raise ValueError(
            f"kernel {compiled.name} wants {compiled.shared_bytes} bytes of shared memory; the plan can give "
            f"it {max_shared_bytes}: choose smaller tiles or fewer stages"
        )
    if compiled.language_scratch_bytes > language_scratch_bytes:
        raise ValueError(
            f"kernel {compiled.name} wants {compiled.language_scratch_bytes} bytes of scratch memory for a "
            f"program; its operator gives it {language_scratch_bytes}"
        )
    return compiled


@functools.cache
def _compile(
    kernel: Any,
    types: tuple[tuple[str, str], ...],
    constants: tuple[tuple[str, Any], ...],
    arch: int,
    num_warps: int,
    num_stages: int,
    max_registers: int | None,
) -> CompiledKernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    aligned = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in types
        if kind.startswith("*")
    }
    source = ASTSource(kernel, dict(types), dict(constants), aligned)
    options = {
        "ptx_version": PTX_VERSION,
        "num_warps": num_warps,
        "num_stages": num_stages,
        "maxnreg": max_registers,
        "enable_fp_fusion": True,  # said here, because the language's default is about to change
    }
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    metadata = built.metadata
    if getattr(metadata, "profile_scratch_size", 0):
        raise ValueError(f"kernel {metadata.name} wants memory for a profile, which nobody reads")
    return CompiledKernel(
        metadata.name,
        built.asm["ptx"],
        metadata.num_warps * 32,
        metadata.shared,
        metadata.global_scratch_size,
    )
