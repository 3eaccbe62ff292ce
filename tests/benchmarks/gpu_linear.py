"""Times of the linear layers of Llama-3-8B in candidate tiles, beside cuBLAS's for the same products.

    PYTHONPATH=build:backends python tests/benchmarks/gpu_linear.py --output OUT.json [--seconds 300]

For each kind of layer and number of rows, bfloat16: CUDA graph replays over several weights, so that no cache
helps. With --precision numbers are of eight bits as in a plan of that precision, beside cuBLAS's of bfloat16,
and what quantises the rows of W8A8 is measured by itself; with --hosted only tiles that fit the shared memory
of a plan that Triton hosts. The candidates are compiled first, by all processors; the most promising are
measured first, and what the time does not suffice for is left out. `linear_tiles.py` holds what came out of
this. The layer of queries, keys and values is measured as a product alone: in a plan it rotates and writes to
the pool as well (`ProjectQkv`).
"""

# mypy: disable-error-code="import-untyped,no-untyped-call"

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from gpu_timing import Results, graph_time_ms
from torch import Tensor

from quire.execution.engine_state import NUM_COUNTERS, engine_state_elements
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire_build.quantization import PLANS, Quantization, quantize_weights, rotated
from quire_build.tensorrt.linear_tiles import LinearTile, Operands
from quire_build.tensorrt.machine import Gpu, this_gpu
from quire_build.tensorrt.operators import MODEL, Launch, Linear, PlainArithmetic, Quantize
from quire_build.tensorrt.pairs import paired

HIDDEN, FFN, VOCABULARY = 4096, 14336, 128256
WEIGHT_BYTES = 600 << 20
"""Of one kind's weights together: many times the L2 cache."""
PLAIN: dict[str, Any] = {
    "normed": 0, "epsilon": 1e-5, "gated": 0, "adds_residual": 0, "biased": 0, "wide_output": 0,
    "weight_group": 0, "weight_float": 0, "narrow_rows": 0, "shared_bytes": DEFAULT_SHARED_BYTES,
    "multiprocessors": 1,
}  # fmt: skip
KINDS = {
    "qkv": Linear(k=HIDDEN, n=6144, **(PLAIN | {"normed": 1})),
    "output": Linear(k=HIDDEN, n=HIDDEN, **(PLAIN | {"adds_residual": 1})),
    "gate_up": Linear(k=HIDDEN, n=FFN, **(PLAIN | {"normed": 1, "gated": 1})),
    "down": Linear(k=FFN, n=HIDDEN, **(PLAIN | {"adds_residual": 1})),
    "lm_head": Linear(k=HIDDEN, n=VOCABULARY, **(PLAIN | {"wide_output": 1, "normed": 1})),
}
ROWS = (64, 128, 256, 32, 1, 512, 16, 1024, 8192, 2048)
"""The most interesting first."""
MOST_LOGITS = 512
PROGRAMS = (528, 264, 132)
"""Programs that splits aim at, at most: four, two and one for each SM of a Hopper GPU."""
LARGEST_SPLIT_TILE = 128 * 128
"""Elements: adding splits up wants registers besides the tile's own."""

WIDE_PLAIN = ((128, 64, 64, 4, 5), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4))
WIDE_GATED = ((32, 64, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 64, 8, 3), (16, 64, 64, 4, 3))
"""Rows, columns and depth of a tile, warps, stages: candidates besides those that are in use."""
WIDENED_PLAIN = (
    (16, 64, 256, 4, 3), (16, 64, 64, 4, 8), (16, 128, 128, 4, 4), (32, 64, 256, 4, 3), (32, 128, 128, 8, 4),
    (64, 64, 64, 4, 4), (64, 64, 256, 4, 2), (64, 128, 64, 4, 4), (128, 128, 64, 8, 4),
)  # fmt: skip
WIDENED_GATED = (
    (16, 32, 256, 4, 3), (16, 64, 256, 8, 3), (32, 64, 128, 8, 4), (64, 64, 128, 8, 3), (64, 32, 64, 4, 4),
    (128, 32, 128, 4, 3), (128, 64, 64, 8, 4),
)  # fmt: skip
"""The same for weights that are widened."""
NARROW_PLAIN = (
    (16, 64, 256, 4, 3), (16, 32, 128, 4, 6), (16, 128, 128, 4, 4), (32, 128, 128, 4, 4),
    (64, 32, 128, 4, 6), (64, 64, 256, 4, 3), (64, 128, 128, 4, 4), (64, 256, 128, 8, 4),
    (128, 64, 128, 4, 5), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (128, 256, 64, 8, 4),
    (256, 128, 128, 8, 3),
)  # fmt: skip
NARROW_GATED = (
    (16, 32, 256, 4, 3), (16, 64, 128, 4, 4), (32, 64, 128, 4, 3), (64, 64, 128, 4, 5), (64, 128, 128, 8, 3),
    (128, 64, 128, 8, 4), (128, 128, 128, 8, 3), (256, 64, 128, 8, 3), (128, 128, 64, 8, 4),
)  # fmt: skip
"""The same for rows and weights of eight bits."""
SHAPES: dict[Operands, tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]] = {
    "wide": (WIDE_PLAIN, WIDE_GATED),
    "widened": (WIDENED_PLAIN, WIDENED_GATED),
    "int8": (NARROW_PLAIN, NARROW_GATED),
    "fp8": (NARROW_PLAIN, NARROW_GATED),
}
TMA_PLAIN = (
    (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (64, 128, 64, 4, 6),
    (64, 96, 128, 4, 5), (128, 96, 64, 8, 7),
)  # fmt: skip
TMA_GATED = ((128, 64, 128, 8, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 6))
TMA_NARROW_PLAIN = (
    (128, 128, 128, 8, 4), (128, 128, 256, 8, 3), (128, 256, 128, 8, 3), (64, 128, 128, 4, 6),
    (64, 192, 128, 4, 6), (128, 192, 128, 8, 5),
)  # fmt: skip
TMA_NARROW_GATED = ((128, 64, 256, 8, 3), (128, 128, 128, 8, 3), (64, 64, 128, 4, 6), (128, 96, 128, 8, 5))
TMA_SHAPES = {
    "wide": (TMA_PLAIN, TMA_GATED),
    "int8": (TMA_NARROW_PLAIN, TMA_NARROW_GATED),
    "fp8": (TMA_NARROW_PLAIN, TMA_NARROW_GATED),
}
"""The same for tiles that the tensor memory accelerator moves, where the GPU has one."""


@dataclass(frozen=True)
class Variant:
    """A layer in tiles of one shape, what one compiled kernel computes."""

    layer: Linear
    tile: LinearTile

    def launch(self, rows: int) -> Launch:
        """For so many rows."""
        return self.layer.launch_in(self.tile, [(rows, self.layer.k)], PlainArithmetic())


@dataclass(frozen=True)
class Weight:
    """A layer's weight as the kernel takes it, and the matrix that it is or stands for, not rotated."""

    operand: Tensor
    scales: Tensor
    wide: Tensor

    @property
    def nbytes(self) -> int:
        """What the kernel reads."""
        return self.operand.nbytes + (self.scales.nbytes if self.operand is not self.wide else 0)


def candidates(layer: Linear) -> list[LinearTile]:
    """Tiles worth measuring, the most promising of each number of rows first."""
    found = list(layer.tiles)
    plain, gated = SHAPES[layer.operands]
    in_use = [
        (t.block_m, t.block_n, t.block_k, t.num_warps, t.num_stages)
        for t in found
        if not (t.tma or t.scaled_first)
    ]
    if any(tile.tma for tile in found):
        found += [LinearTile(1, *shape, tma=True) for shape in TMA_SHAPES[layer.operands][layer.gated]]
    shapes = in_use + list(gated if layer.gated else plain)
    for programs in PROGRAMS:
        for shape in shapes:
            block_m, block_n, block_k, _, _ = shape
            columns = -(-layer.n // block_n)
            most = min(layer.k // (2 * block_k), 2 * NUM_COUNTERS // columns)
            if block_m * block_n > LARGEST_SPLIT_TILE:
                most = 1
            tile = LinearTile(max(1, min(programs // columns, most)), *shape)
            if tile not in found:
                found.append(tile)
    return found


def suited(usable: Iterable[LinearTile], rows: int, operands: Operands) -> list[LinearTile]:
    """The tiles worth measuring at so many rows, each number of splits that comes of them once."""
    # Hopper's instructions for 64 rows multiply e4m3, those for 16 half precision.
    fewest_of_64 = 1 if operands == "fp8" else 32
    ranges = {16: (1, 32), 32: (17, 64), 64: (fewest_of_64, 256), 128: (65, 8192), 256: (129, 8192)}
    tma_ranges = {64: (33, 8192), 128: (65, 8192), 256: (257, 8192)}
    found: dict[LinearTile, LinearTile] = {}
    for tile in usable:
        fewest, most = (tma_ranges if tile.tma else ranges)[tile.block_m]
        if fewest <= rows <= most:
            splits = max(1, tile.splits // -(-rows // tile.block_m))
            found.setdefault(replace(tile, splits=splits), tile)
    return list(found.values())


def compile_variant(variant: Variant) -> int:
    """Compile into the language's cache on disk; bytes of shared memory, or -1 if that is not possible."""
    launch = variant.launch(64)
    types = {MODEL: torch.bfloat16, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64}
    given = {n: types[kind[1:]] if kind.startswith("*") else 1 for n, kind in launch.types.items()}
    try:
        built = launch.kernel.warmup(
            *((given | dict(launch.constants))[name] for name in launch.kernel.arg_names),
            grid=(1,),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    except Exception as error:  # a candidate that the compiler refuses is none
        print(f"{variant.tile}: {error}"[:300], flush=True)
        return -1
    return int(built.metadata.shared)


def launchable(pool: ProcessPoolExecutor, variants: Sequence[Variant]) -> list[Variant]:
    """Those that compile and that a plan can launch."""
    sizes = pool.map(compile_variant, variants)
    return [v for v, size in zip(variants, sizes, strict=True) if 0 <= size <= v.layer.shared_bytes]


class Bench:
    """Layers of every kind with weights, and room for what they read and write besides."""

    def __init__(self, quantization: Quantization | None, gpu: Gpu) -> None:
        self._quantization = quantization
        self.layers = {kind: self._layer(layer, gpu) for kind, layer in KINDS.items()}
        self.state = torch.zeros(engine_state_elements(256), dtype=torch.int64, device="cuda")
        self.weights = {kind: self._weights(layer) for kind, layer in self.layers.items()}
        self._scratch = torch.empty(1, device="cuda")

    def _layer(self, layer: Linear, gpu: Gpu) -> Linear:
        layer = replace(layer, shared_bytes=gpu.shared_bytes, multiprocessors=gpu.multiprocessors)
        quantization = self._quantization
        if quantization is None:
            return layer
        return replace(
            layer,
            weight_group=quantization.group(layer.k),
            weight_float=int(quantization.narrow == "fp8"),
            narrow_rows=int(quantization.inputs),
        )

    def _weights(self, layer: Linear) -> list[Weight]:
        element_bytes = 1 if layer.weight_group else 2
        copies = max(2, WEIGHT_BYTES // (element_bytes * layer.n * (1 + layer.gated) * layer.k))
        return [self._weight(layer) for _ in range(copies)]

    def _weight(self, layer: Linear) -> Weight:
        shape = (layer.n * (1 + layer.gated), layer.k)
        wide = torch.randn(shape, dtype=torch.bfloat16, device="cuda") * 0.02
        if self._quantization is None:
            return Weight(wide, wide, wide)
        narrow = self._quantization.weight(wide, torch.bfloat16)
        wide = replace(narrow, rotation=1).dequantized().to(torch.bfloat16)
        operand = narrow.values.view(torch.int32) if layer.narrow_rows else paired(narrow.values)
        return Weight(operand, narrow.scales.T.contiguous(), wide)

    def inputs(self, layer: Linear, rows: int) -> dict[str, Tensor]:
        """What a layer reads beside its weight, of the types that `compile_variant` has compiled for."""
        x = torch.randn(rows, layer.k, dtype=torch.bfloat16, device="cuda")
        narrow, x_scales = x, torch.empty(rows, device="cuda")
        if layer.narrow_rows:
            quantized = quantize_weights(x, "fp8" if layer.weight_float else "int8")
            narrow, x_scales = quantized.values.view(torch.int32), quantized.scales
            x = quantized.dequantized().to(torch.bfloat16)
        return {
            "x": x,
            "narrow_x": narrow,
            "x_scales": x_scales,
            "squares": x.float().square().view(rows, -1, 32).sum(-1),
            "residual": torch.randn(rows, layer.n, dtype=torch.bfloat16, device="cuda"),
            "next_norm": torch.randn(layer.n, dtype=torch.bfloat16, device="cuda"),
        }

    def outputs(self, layer: Linear, rows: int) -> list[Tensor]:
        """Room for what a layer writes, without scratch."""
        shapes = [(rows, layer.k)]
        return [
            torch.empty(shape, dtype=torch.bfloat16 if kind == MODEL else torch.float32, device="cuda")
            for shape, kind in layer.outputs(shapes)[:3]
        ]

    def ready(
        self,
        variant: Variant,
        weight: Weight,
        inputs: dict[str, Tensor],
        outputs: list[Tensor],
    ) -> Callable[[], object]:
        """A launch with all its arguments."""
        layer, tile = variant.layer, variant.tile
        x = inputs["x"]
        launch = variant.launch(x.shape[0])
        wanted = tile.splits * tile.block_m * layer.n * (1 + layer.gated)
        if self._scratch.numel() < wanted:
            self._scratch = torch.empty(wanted, device="cuda")
        read = [
            x, weight.operand, inputs["squares"], inputs["residual"], inputs["next_norm"], x, weight.scales,
            inputs["narrow_x"], inputs["x_scales"], self.state,
        ]  # fmt: skip
        return functools.partial(
            launch.kernel[launch.grid],
            **launch.arguments(read, [*outputs, self._scratch]),
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )

    def error(self, variant: Variant, weight: Weight, rows: int) -> float:
        """Distance of a layer's result from torch's in float32, relative to it."""
        layer = variant.layer
        inputs, outputs = self.inputs(layer, rows), self.outputs(layer, rows)
        outputs[0].fill_(float("nan"))
        self.ready(variant, weight, inputs, outputs)()
        expected = inputs["x"].float() @ weight.wide.float().T
        if layer.normed:
            scale = inputs["x"].float().square().mean(-1, keepdim=True) + layer.epsilon
            expected *= torch.rsqrt(scale)
        if layer.gated:
            gate, up = expected.chunk(2, dim=-1)
            expected = torch.nn.functional.silu(gate) * up
        if layer.adds_residual:
            expected += inputs["residual"].float()
        return float((outputs[0].float() - expected).norm() / expected.norm())


def one_after_another(launches: Iterable[Callable[[], object]]) -> Callable[[int], None]:
    """All of them as one step."""
    kept = list(launches)

    def step(_stream: int) -> None:
        for launch in kept:
            launch()

    return step


def replays(rows: int) -> int:
    """Few where one takes long."""
    return 15 if rows <= 512 else 5


def measure_tiles(
    results: Results, bench: Bench, pool: ProcessPoolExecutor, deadline: float
) -> dict[Any, Any]:
    """Every candidate at every number of rows; the best by kind and rows, as (us, tile)."""
    best: dict[tuple[str, int], tuple[float, LinearTile]] = {}
    cublas: dict[tuple[str, int], float] = {}
    usable: dict[str, list[LinearTile]] = {}
    for kind, layer in bench.layers.items():
        variants = launchable(pool, [Variant(layer, tile) for tile in candidates(layer)])
        usable[kind] = [variant.tile for variant in variants]
        print(f"{kind}: {len(variants)} of {len(candidates(layer))} candidates", flush=True)
    cases = [(kind, rows) for rows in ROWS for kind in KINDS if kind != "lm_head" or rows <= MOST_LOGITS]
    given = {(kind, rows): suited(usable[kind], rows, bench.layers[kind].operands) for kind, rows in cases}
    checked: dict[tuple[str, LinearTile], float] = {}
    for rank in range(-1, max(map(len, given.values()))):
        for kind, rows in cases:
            if time.monotonic() > deadline:
                return best
            layer, weights = bench.layers[kind], bench.weights[kind]
            inputs, outputs = bench.inputs(layer, rows), bench.outputs(layer, rows)
            if rank < 0:
                wide = torch.empty(rows, weights[0].wide.shape[0], dtype=torch.bfloat16, device="cuda")
                step = one_after_another(
                    functools.partial(torch.matmul, inputs["x"], weight.wide.T, out=wide)
                    for weight in weights
                )
                cublas[kind, rows] = 1e3 * graph_time_ms(step, replays(rows)) / len(weights)
                continue
            if rank >= len(given[kind, rows]):
                continue
            tile = given[kind, rows][rank]
            variant = Variant(layer, tile)
            if (kind, tile) not in checked:
                checked[kind, tile] = bench.error(variant, weights[0], min(rows, 300) - 1 or 1)
            launches = (bench.ready(variant, weight, inputs, outputs) for weight in weights)
            us = 1e3 * graph_time_ms(one_after_another(launches), replays(rows)) / len(weights)
            right = checked[kind, tile] < 1e-2
            if right and us < best.get((kind, rows), (us + 1, tile))[0]:
                best[kind, rows] = us, tile
            results.add(
                linear=kind,
                rows=rows,
                us=round(us, 2),
                cublas_us=round(cublas[kind, rows], 2),
                share_of_bandwidth=results.share_of_bandwidth(weights[0].nbytes, us / 1e3),
                operands=layer.operands,
                error=round(checked[kind, tile], 5),
                **asdict(tile),
            )
    return best


def measure_quantizing(results: Results, bench: Bench, quantization: Quantization) -> None:
    """What turns rows into numbers of eight bits, one launch after another."""
    for k in (HIDDEN, FFN):
        layer = Quantize(
            k=k, rotation=quantization.rotation(k), to_float=int(quantization.narrow == "fp8"), of_logits=0
        )
        for rows in sorted(ROWS):
            x = torch.randn(rows, k, dtype=torch.bfloat16, device="cuda")
            shapes = [tuple(x.shape), tuple(bench.state.shape)]
            numbers = torch.empty(rows, k // 4, dtype=torch.int32, device="cuda")
            scales = torch.empty(rows, device="cuda")
            launch = layer.launch(shapes, PlainArithmetic())
            run = functools.partial(
                launch.kernel[launch.grid],
                **launch.arguments((x, bench.state), (numbers, scales)),
                **launch.constants,
                num_warps=launch.num_warps,
                num_stages=launch.num_stages,
            )
            us = 1e3 * graph_time_ms(one_after_another([run] * 20), replays(rows)) / 20
            narrow = numbers.view(torch.float8_e4m3fn if layer.to_float else torch.int8)
            back = rotated(narrow.float() * scales[:, None], layer.rotation)
            wanted = quantization.input(x.float())
            error = float((back - wanted).norm() / wanted.norm())
            results.add(quantize=k, rows=rows, us=round(us, 2), error=round(error, 5))


def main() -> None:
    """Compile, measure, and print the best."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=400.0, help="after which to stop")
    parser.add_argument("--output", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--precision", choices=PLANS, help="numbers of eight bits, as in such a plan")
    parser.add_argument("--hosted", action="store_true", help="with the shared memory that Triton gives")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    results = Results(options.output)
    gpu = this_gpu()
    if options.hosted:
        gpu = replace(gpu, shared_bytes=DEFAULT_SHARED_BYTES)
    bench = Bench(PLANS.get(options.precision), gpu)
    # For descriptors of tensors; in a plan an output of the operator is there for them.
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    processors = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(processors, mp_context=multiprocessing.get_context("spawn")) as pool:
        if options.precision and PLANS[options.precision].inputs:
            measure_quantizing(results, bench, PLANS[options.precision])
        best = measure_tiles(results, bench, pool, end)
    assert not bench.state.any(), "a counter was left behind"
    for (kind, rows), (us, tile) in sorted(best.items()):
        print(json.dumps({"best": kind, "rows": rows, "us": round(us, 2), **asdict(tile)}))


if __name__ == "__main__":
    main()
