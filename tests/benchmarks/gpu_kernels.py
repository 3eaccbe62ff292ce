"""Times of the TensorRT plan's kernels by themselves, launched as a plan launches them.

    PYTHONPATH=build python tests/benchmarks/gpu_kernels.py OUT.json

Llama-3-8B's shapes, bfloat16: attention in KV bytes read over time, linear layers in weight bytes read over
time, both as a share of the copy bandwidth, and cuBLAS's times for the same products. One graph runs all
layers, each with weights or KV of its own, so that no cache helps.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_timing import Results, graph_time_ms
from torch import Tensor

from quire_build.tensorrt.operators import MODEL, KvWrite, Linear, Operator, PagedAttend, PlainArithmetic

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, LAYERS, BLOCK_SIZE = 4096, 14336, 32, 8, 128, 32, 16
CONTEXTS = (
    (1, 200),
    (1, 2048),
    (1, 32768),
    (8, 8192),
    (64, 200),
    (64, 2048),
    (128, 200),
    (256, 200),
    (256, 1024),
)
LINEAR_LAYERS = 6
TILES = {
    "qkv": (6144, HIDDEN, {"normed": 1}, (1, 16, 32, 128, 4, 5)),
    "output": (HIDDEN, HIDDEN, {"adds_residual": 1}, (4, 16, 64, 128, 4, 3)),
    "gate_up": (FFN, HIDDEN, {"normed": 1, "gated": 1}, (1, 16, 32, 128, 4, 3)),
    "down": (HIDDEN, FFN, {"adds_residual": 1}, (4, 16, 64, 128, 4, 3)),
}
"""Rows and columns of the weight, flags, and (splits, block_m, block_n, block_k, warps, stages)."""


class Prepared:
    """An operator with its inputs, outputs allocated, ready to be launched again and again."""

    def __init__(self, operator: Operator, inputs: list[Tensor]) -> None:
        shapes = [tuple(tensor.shape) for tensor in inputs]
        self.outputs = [
            torch.empty(
                shape, dtype=inputs[0].dtype if element == MODEL else torch.float32, device=inputs[0].device
            )
            for shape, element in operator.outputs(shapes)
        ]
        self._inputs, self._launch = inputs, operator.launch(shapes, PlainArithmetic())

    def __call__(self) -> None:
        """Launch it on the current stream."""
        launch = self._launch
        launch.kernel[launch.grid](
            *self._inputs,
            *launch.integers,
            *self.outputs,
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def decode_attention(
    pool: Tensor, layers: int, num_blocks: int, seqs: int, context: int
) -> list[tuple[Prepared, Prepared]]:
    """Write and attend of every layer for one token of each sequence, blocks drawn at random."""
    blocks = -(-context // BLOCK_SIZE)
    tables = (torch.randperm(num_blocks - 1)[: seqs * blocks] + 1).to(torch.int32).view(seqs, blocks)
    device = pool.device
    positions = torch.full((seqs,), context - 1, dtype=torch.int32, device=device)
    slots = (tables[:, (context - 1) // BLOCK_SIZE] * BLOCK_SIZE + (context - 1) % BLOCK_SIZE).to(device)
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device)
    qkv = torch.randn(seqs, (HEADS + 2 * KV_HEADS) * HEAD_DIM, device=device).to(pool.dtype)
    table = torch.randn(context, HEAD_DIM, device=device)
    prepared = []
    for layer in range(layers):
        layout = (layer, layers, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE, num_blocks)
        write = Prepared(KvWrite(*layout, context, 0, 0.0), [qkv, table, positions, slots, qkv, pool])
        attend = PagedAttend(*layout, window=0, scale=HEAD_DIM**-0.5, tile_rows=16)
        inputs = [write.outputs[0], tables.to(device), starts, positions + 1, pool]
        prepared.append((write, Prepared(attend, inputs)))
    return prepared


def linear_layer(name: str, rows: int, weight: Tensor, counters: Tensor) -> Prepared:
    """One linear layer of a decode step of so many rows."""
    n, k, flags, (splits, block_m, block_n, block_k, num_warps, num_stages) = TILES[name]
    every: dict[str, Any] = {"normed": 0, "gated": 0, "adds_residual": 0, "biased": 0, "wide_output": 0}
    operator = Linear(
        k=k,
        n=n,
        epsilon=1e-5,
        splits=splits,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        num_warps=num_warps,
        num_stages=num_stages,
        **(every | flags),
    )
    x = torch.randn(rows, k, device=weight.device).to(weight.dtype)
    squares = x.float().square().view(rows, -1, 32).sum(-1)
    residual = torch.randn(rows, n, device=weight.device).to(weight.dtype)
    return Prepared(operator, [x, weight, squares, residual, residual[0], residual, counters])


def one_after_another(launches: Sequence[Callable[[], object]]) -> Callable[[int], None]:
    """All of them as one step."""

    def step(_stream: int) -> None:
        for launch in launches:
            launch()

    return step


def measure_attention(results: Results) -> None:
    """KV read of decode steps, for as many blocks as fit the GPU."""
    block_elements = LAYERS * 2 * KV_HEADS * BLOCK_SIZE * HEAD_DIM
    free_bytes, _ = torch.cuda.mem_get_info()
    num_blocks = min((free_bytes - (12 << 30)) // (2 * block_elements), 20_000)
    pool = torch.empty(num_blocks, block_elements, dtype=torch.bfloat16, device="cuda")
    for some in pool.split(256):
        some.normal_()
    pool[0] = 0.0
    pool.view(-1).view(torch.int64)[0] = num_blocks
    for seqs, context in CONTEXTS:
        if seqs * -(-context // BLOCK_SIZE) >= num_blocks:
            continue
        layers = decode_attention(pool, LAYERS, num_blocks, seqs, context)
        time_ms = graph_time_ms(one_after_another([attend for _, attend in layers]))
        both_ms = graph_time_ms(one_after_another(list(itertools.chain.from_iterable(layers))))
        read = LAYERS * seqs * context * 2 * KV_HEADS * HEAD_DIM * 2
        results.add(
            attention=[seqs, context],
            us_a_layer=round(time_ms * 1e3 / LAYERS, 2),
            with_write_us=round(both_ms * 1e3 / LAYERS, 2),
            share_of_bandwidth=results.share_of_bandwidth(read, time_ms),
        )


def measure_linear(results: Results) -> None:
    """Weight read of the linear layers of small decode steps, and cuBLAS beside it."""
    counters = torch.zeros(4096, dtype=torch.bfloat16, device="cuda")
    for name, (n, k, flags, _) in TILES.items():
        rows_of_weight = n * (1 + flags.get("gated", 0))
        weights = [
            torch.randn(rows_of_weight, k, dtype=torch.bfloat16, device="cuda") for _ in range(LINEAR_LAYERS)
        ]
        for rows in (1, 8, 16):
            layers = [linear_layer(name, rows, weight, counters) for weight in weights]
            x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
            ours = graph_time_ms(one_after_another(layers))
            products = [functools.partial(torch.matmul, x, weight.T) for weight in weights]
            cublas = graph_time_ms(one_after_another(products))
            read = LINEAR_LAYERS * rows_of_weight * k * 2
            results.add(
                linear=name,
                rows=rows,
                us=round(ours * 1e3 / LINEAR_LAYERS, 1),
                share_of_bandwidth=results.share_of_bandwidth(read, ours),
                cublas_us=round(cublas * 1e3 / LINEAR_LAYERS, 1),
            )


if __name__ == "__main__":
    collected = Results(Path(sys.argv[1]))
    measure_linear(collected)
    measure_attention(collected)
