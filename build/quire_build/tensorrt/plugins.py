"""Registers the plan's own operators with TensorRT: write and attend, with their kernels inside the plan.

They are TensorRT's quick-deployable plugins with ahead-of-time kernels: the PTX travels in the plan, which
then needs no shared library and no Python to run. TensorRT passes each kernel its input pointers, then
integers it computes from the shapes, then its output pointers, and nulls for the parameters that the Triton
language appends.

The pool is an ordinary input that ``KvWrite`` writes through: no output aliases it, because TensorRT may
answer an alias with a copy. What orders the writes before the reads is that ``PagedAttend`` needs the queries that
``KvWrite`` rotates.
"""

# TensorRT reads the annotations of what is registered, so they must not be strings here.
# mypy: disable-error-code="import-not-found, untyped-decorator"

import functools
import math
from typing import Any

from quire_build.tensorrt.kernels.compiled import CompiledKernel, compile_kernel
from quire_build.tensorrt.kernels.kv_write import kv_write
from quire_build.tensorrt.kernels.linear import SQUARES_WIDTH, linear
from quire_build.tensorrt.kernels.paged_attention import paged_attention

NAMESPACE = "quire"
PROGRAMS_WANTED = 256
"""The context is split until about this many programs run: two on nearly each of a Hopper GPU's 132 SMs."""


def most_splits(num_kv_heads: int) -> int:
    """Splits of a launch with one query tile: tiles times splits never exceed it, unless nothing is split."""
    return max(1, PROGRAMS_WANTED // num_kv_heads)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << (n - 1).bit_length()


@functools.cache
def register_plugins(arch: int) -> None:
    """Make KvWrite and PagedAttend known to TensorRT in this process.

    Args:
        arch: compute capability the kernels are compiled for, 90 for 9.0.
    """
    import tensorrt as trt
    import tensorrt.plugin as trtp

    element = {trt.bfloat16: "bf16", trt.float16: "fp16", trt.float32: "fp32"}

    def launch(
        kernel: CompiledKernel, grid: tuple[Any, ...], integers: tuple[Any, ...]
    ) -> tuple[str, str, Any, Any]:
        params = trtp.KernelLaunchParams()
        for axis, extent in zip(("grid_x", "grid_y", "grid_z"), grid, strict=False):
            setattr(params, axis, extent)
        params.block_x = kernel.threads
        params.shared_mem = kernel.shared_bytes
        extra = trtp.SymIntExprs(len(integers))
        for i, value in enumerate(integers):
            extra[i] = trtp.SymInt32(value)
        return kernel.name, kernel.ptx, params, extra

    def tiles(tokens: Any, seqs: Any, tokens_per_tile: int) -> Any:
        return seqs + (tokens - seqs) // tokens_per_tile

    def splits(tokens: Any, seqs: Any, tokens_per_tile: int, num_kv_heads: int) -> Any:
        wanted = trtp.ShapeExpr(most_splits(num_kv_heads)) // tiles(tokens, seqs, tokens_per_tile)
        return trtp.max(wanted, 1)

    @trtp.register(f"{NAMESPACE}::KvWrite")
    def describe_write(
        qkv: trtp.TensorDesc,
        cos_sin: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        slot_mapping: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        layer: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_blocks: int,
        max_positions: int,
    ) -> trtp.TensorDesc:
        return trtp.from_shape_expr((qkv.shape_expr[0], num_heads, head_dim), qkv.dtype)

    @trtp.aot_impl(f"{NAMESPACE}::KvWrite")
    def implement_write(
        qkv: trtp.TensorDesc,
        cos_sin: trtp.TensorDesc,
        positions: trtp.TensorDesc,
        slot_mapping: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        layer: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_blocks: int,
        max_positions: int,
        outputs: tuple[trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        model_type = f"*{element[qkv.dtype]}"
        heads = num_heads + 2 * num_kv_heads
        heads_per_program = min(16, power_of_two(heads))
        types = {
            "qkv": model_type,
            "cos_sin": "*fp32",
            "positions": "*i32",
            "slot_mapping": "*i32",
            "kv_cache": model_type,
            "layer": "i32",
            "query": model_type,
        }
        constants = {
            "HEAD_DIM": head_dim,
            "HALF_PADDED": power_of_two(head_dim // 2),
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "BLOCK_SIZE": block_size,
            "BLOCK_ELEMENTS": num_layers * 2 * num_kv_heads * block_size * head_dim,
            "MAX_BLOCKS": max_blocks,
            "MAX_POSITIONS": max_positions,
            "HEADS_PER_PROGRAM": heads_per_program,
        }
        kernel = compile_kernel(kv_write, types, constants, arch=arch)
        return launch(kernel, (qkv.shape_expr[0], -(-heads // heads_per_program)), (layer,))

    @trtp.register(f"{NAMESPACE}::PagedAttend")
    def describe_attend(
        query: trtp.TensorDesc,
        block_tables: trtp.TensorDesc,
        query_start_loc: trtp.TensorDesc,
        seq_lens: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        layer: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_blocks: int,
        window: int,
        tile_rows: int,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        rows = tile_rows // (num_heads // num_kv_heads) * most_splits(num_kv_heads)
        return (
            trtp.from_shape_expr((query.shape_expr[0], num_heads * head_dim), query.dtype),
            trtp.from_shape_expr((rows, num_heads, head_dim), trt.float32),
            trtp.from_shape_expr((rows, num_heads), trt.float32),
        )

    @trtp.aot_impl(f"{NAMESPACE}::PagedAttend")
    def implement_attend(
        query: trtp.TensorDesc,
        block_tables: trtp.TensorDesc,
        query_start_loc: trtp.TensorDesc,
        seq_lens: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        layer: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        max_blocks: int,
        window: int,
        tile_rows: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        group = num_heads // num_kv_heads
        model_type = f"*{element[query.dtype]}"
        types = {
            "query": model_type,
            "block_tables": "*i32",
            "query_start_loc": "*i32",
            "seq_lens": "*i32",
            "kv_cache": model_type,
            "num_seqs": "i32",
            "blocks_per_table": "i32",
            "num_splits": "i32",
            "layer": "i32",
            "out": model_type,
            "partial_out": "*fp32",
            "partial_lse": "*fp32",
        }
        constants = {
            "HEAD_DIM": head_dim,
            "HEAD_DIM_PADDED": power_of_two(head_dim),
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": group,
            "BLOCK_SIZE": block_size,
            "BLOCK_ELEMENTS": num_layers * 2 * num_kv_heads * block_size * head_dim,
            "MAX_BLOCKS": max_blocks,
            "WINDOW": window,
            "SCALE_LOG2": math.log2(math.e) / math.sqrt(head_dim),
            "BLOCK_M": tile_rows,
            "BLOCK_N": 64 if tile_rows == 16 else 32,
        }
        kernel = compile_kernel(paged_attention, types, constants, arch=arch, num_stages=2)
        tokens, seqs = query.shape_expr[0], block_tables.shape_expr[0]
        num_splits = splits(tokens, seqs, tile_rows // group, num_kv_heads)
        grid = (tiles(tokens, seqs, tile_rows // group), num_kv_heads, num_splits)
        return launch(kernel, grid, (seqs, block_tables.shape_expr[1], num_splits, layer))

    @trtp.register(f"{NAMESPACE}::Linear")
    def describe_linear(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        squares: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        next_norm: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        k: int,
        n: int,
        normed: int,
        epsilon: float,
        gated: int,
        adds_residual: int,
        wide_output: int,
        splits: int,
        block_m: int,
        block_n: int,
        block_k: int,
        num_warps: int,
        num_stages: int,
    ) -> tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc]:
        rows = x.shape_expr[0]
        width = n if adds_residual else 1
        sums = n // SQUARES_WIDTH.value if adds_residual else 1
        scratch = splits * block_m * n * (1 + gated) if splits > 1 else 1
        return (
            trtp.from_shape_expr((rows, n), trt.float32 if wide_output else x.dtype),
            trtp.from_shape_expr((rows, width), x.dtype),
            trtp.from_shape_expr((rows, sums), trt.float32),
            trtp.from_shape_expr((scratch,), trt.float32),
        )

    @trtp.aot_impl(f"{NAMESPACE}::Linear")
    def implement_linear(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        squares: trtp.TensorDesc,
        residual: trtp.TensorDesc,
        next_norm: trtp.TensorDesc,
        kv_cache: trtp.TensorDesc,
        k: int,
        n: int,
        normed: int,
        epsilon: float,
        gated: int,
        adds_residual: int,
        wide_output: int,
        splits: int,
        block_m: int,
        block_n: int,
        block_k: int,
        num_warps: int,
        num_stages: int,
        outputs: tuple[trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc, trtp.TensorDesc],
        tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        model_type = f"*{element[x.dtype]}"
        types = {
            "x": model_type,
            "weight": model_type,
            "squares": "*fp32",
            "residual": model_type,
            "next_norm": model_type,
            "kv_cache": model_type,
            "num_rows": "i32",
            "out": "*fp32" if wide_output else model_type,
            "normed": model_type,
            "out_squares": "*fp32",
            "partial": "*fp32",
        }
        constants = {
            "K": k,
            "N": n,
            "NORMED": bool(normed),
            "EPSILON": epsilon,
            "GATED": bool(gated),
            "RESIDUAL": bool(adds_residual),
            "SPLITS": splits,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
        }
        kernel = compile_kernel(
            linear, types, constants, arch=arch, num_warps=num_warps, num_stages=num_stages
        )
        grid = (-(-n // block_n), trtp.cdiv(x.shape_expr[0], block_m), splits)
        return launch(kernel, grid, (x.shape_expr[0],))
