"""Times of the TensorRT plan's attention by itself, launched as a plan launches it.

    PYTHONPATH=build:backends python tests/benchmarks/gpu_kernels.py --seconds 300 --output OUT.json

First one mixed step, and what norms, rotates and stores heads, against float32 torch. Then decode steps, as
KV bytes read over time beside the copy bandwidth of the same process, and prefill chunks, with the operator's
own settings; then, in the time that is left, both with other settings. bfloat16, over pools of bfloat16 and
of e4m3, shapes of Llama-3-8B and Llama-2-7B. One graph runs enough launches, each over blocks of its own,
that no cache helps.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_timing import Results, graph_time_ms
from torch import Tensor

from quire.execution.engine_state import STEP_MARK, STEP_SIZE_BYTE, engine_state_elements
from quire_build.decoder_config import RopeConfig
from quire_build.paged_attention import paged_attention_in_place
from quire_build.rope import cosine_and_sine
from quire_build.tensorrt.operators import (
    MODEL,
    AssignSplits,
    KvWrite,
    Launch,
    Operator,
    PagedAttend,
    PlainArithmetic,
    assign_splits,
)

HEAD_DIM, BLOCK_SIZE, SCALE = 128, 16, 128**-0.5
MODELS = {"llama-3-8b": (32, 8), "llama-2-7b": (32, 32)}
"""Heads and KV heads."""
CONTEXTS: dict[int, tuple[int, ...]] = {
    200: (1, 8, 32, 64, 128, 256, 512, 1_024),
    2_000: (1, 8, 32, 64, 128, 256),
    16_000: (1, 8, 32, 64, 128, 256),
}
"""Tokens of each context, and how many decode rows have one."""
CHUNKS = (512, 2_048, 8_192)
LAYERS = (32, 8, 2, 1)
"""Of the pool: as many as the context leaves room for."""
READ_BYTES = 256 << 20
"""That one graph reads at least, if no more than MOST_LAUNCHES do it: more than any L2 cache holds."""
MOST_LAUNCHES = 128
SPARED_BYTES = 12 << 30
SETTINGS: tuple[dict[str, Any], ...] = (
    {"FEW_KEYS": 64, "FEW_STAGES": 2},
    {"max_registers": None},
    {"ROW_MIN_SPLIT": 64},
    {"ROW_MIN_SPLIT": 256},
    {"TILE_MIN_SPLIT": 512},
    {"TILE_MIN_SPLIT": 2048},
    {"LONG_SPLIT": 1024},
    {"PROGRAMS_WANTED": 528},
    {"PROGRAMS_WANTED": 132},
    {"AT_A_TIME": 1 << 20},
    {"num_warps": 8},
    {"ROW_KEYS": 16, "ROW_STAGES": 3},
    {"ROW_KEYS": 64, "ROW_STAGES": 1},
)
"""Constants of the kernel, fields of its launch, and the operator's wish for programs."""
FP8_SETTINGS: tuple[dict[str, Any], ...] = (
    {"FEW_KEYS": 32, "FEW_STAGES": 3},
    {"FEW_STAGES": 3},
    {"FEW_KEYS": 128},
    {"ROW_KEYS": 64},
)
"""Likewise, over a pool of e4m3."""


@dataclass(frozen=True)
class Step:
    """Sequences of one step: how many of their last tokens are its own, and how many they have in all."""

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]

    @property
    def blocks_per_table(self) -> int:
        """Enough for the longest."""
        return -(-max(self.seq_lens) // BLOCK_SIZE)

    @property
    def num_blocks(self) -> int:
        """Of all sequences."""
        return sum(-(-length // BLOCK_SIZE) for length in self.seq_lens)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        lens = zip(self.query_lens, self.seq_lens, strict=True)
        return sum(n * (length - n) + n * (n + 1) // 2 for n, length in lens)


class Pool:
    """Most of the GPU's memory, seen as a pool of whichever shape is measured."""

    def __init__(self) -> None:
        free_bytes, _ = torch.cuda.mem_get_info()
        size = (free_bytes - SPARED_BYTES) // 2
        self._elements = torch.empty(size, dtype=torch.bfloat16, device="cuda")

    def fill(self, dtype: torch.dtype) -> None:
        """Make it one of random numbers of this type."""
        unit = torch.randn(32 << 20, device="cuda").to(dtype)
        self._elements = self._elements.view(dtype)
        for part in self._elements.split(unit.numel()):
            part.copy_(unit[: part.numel()])

    def layers(self, kv_heads: int, num_blocks: int) -> int:
        """How many layers so many blocks may have; 0 if they do not fit at all."""
        block = 2 * kv_heads * BLOCK_SIZE * HEAD_DIM
        return next((n for n in LAYERS if (num_blocks + 1) * n * block <= self._elements.numel()), 0)

    def view(self, kv_heads: int, layers: int) -> Tensor:
        """[blocks, layers, K and V, KV heads, block size, head size]."""
        shape = (layers, 2, kv_heads, BLOCK_SIZE, HEAD_DIM)
        block = layers * 2 * kv_heads * BLOCK_SIZE * HEAD_DIM
        blocks = min(self._elements.numel() // block, 1 << 20)
        return self._elements[: blocks * block].view(blocks, *shape)


def attend_operator(heads: int, pool: Tensor, layer: int) -> PagedAttend:
    """Attention of one layer over a pool in one part."""
    return PagedAttend(**layout(heads, pool, layer), window=0, scale=SCALE)


def layout(heads: int, pool: Tensor, layer: int) -> dict[str, int]:
    """What an operator knows of a layer and its place in the pool."""
    blocks, layers, _, kv_heads, _, _ = pool.shape
    return {
        "layer": layer,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "max_blocks": blocks,
        "num_pools": 1,
        "blocks_per_pool": blocks,
        "kv_element_bytes": pool.element_size(),
    }


def prepare(
    operator: Operator, inputs: Sequence[Tensor], settings: Mapping[str, Any]
) -> tuple[Callable[[], object], list[Tensor]]:
    """What launches the operator, and its outputs."""
    shapes = [tuple(tensor.shape) for tensor in inputs]
    wanted = settings.get("PROGRAMS_WANTED", assign_splits.PROGRAMS_WANTED)
    with mock.patch.object(assign_splits, "PROGRAMS_WANTED", wanted):
        launch: Launch = operator.launch(shapes, PlainArithmetic())
        described = operator.outputs(shapes)
    launch = replace(
        launch,
        constants={name: settings.get(name, value) for name, value in launch.constants.items()},
        num_warps=settings.get("num_warps", launch.num_warps),
        max_registers=settings.get("max_registers", launch.max_registers),
    )
    types = {MODEL: torch.bfloat16, "fp32": torch.float32, "i32": torch.int32}
    outputs = [torch.empty(shape, dtype=types[element], device="cuda") for shape, element in described]

    def run() -> object:
        return launch.kernel[launch.grid](
            **launch.arguments(inputs, outputs),
            **launch.constants,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            maxnreg=launch.max_registers,
        )

    return run, outputs


def integers(values: Sequence[int]) -> Tensor:
    """int32 on the GPU."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def assigned_splits(
    heads: int, kv_heads: int, starts: Tensor, lengths: Tensor, settings: Mapping[str, Any]
) -> list[Tensor]:
    """How a step's contexts are split."""
    run, outputs = prepare(AssignSplits(heads, kv_heads, HEAD_DIM, 0), [starts, lengths], settings)
    run()
    return outputs


def draw_tables(step: Step, num_blocks: int) -> Tensor:
    """Block tables of blocks drawn at random."""
    tables = torch.zeros(len(step.seq_lens), step.blocks_per_table, dtype=torch.int32)
    drawn = (torch.randperm(num_blocks - 1)[: step.num_blocks] + 1).to(torch.int32)
    taken = 0
    for row, length in enumerate(step.seq_lens):
        n = -(-length // BLOCK_SIZE)
        tables[row, :n] = drawn[taken : taken + n]
        taken += n
    return tables.cuda()


def starts_of(step: Step) -> Tensor:
    """query_start_loc."""
    starts = [0]
    for n in step.query_lens:
        starts.append(starts[-1] + n)
    return integers(starts)


def new_state(num_blocks: int) -> Tensor:
    """The engine's state, before any step."""
    state = torch.zeros(engine_state_elements(256), dtype=torch.int64, device="cuda")
    state[0] = num_blocks
    return state


def step_time_ms(heads: int, pool: Tensor, step: Step, settings: Mapping[str, Any]) -> float:
    """Median time of attention for one layer."""
    blocks, layers, _, kv_heads, _, _ = pool.shape
    tokens = sum(step.query_lens)
    read = sum(step.seq_lens) * 2 * kv_heads * HEAD_DIM * pool.element_size()
    launches = max(layers, min(MOST_LAUNCHES, -(-READ_BYTES // read)))
    state, starts, lengths = new_state(blocks), starts_of(step), integers(step.seq_lens)
    splits = assigned_splits(heads, kv_heads, starts, lengths, settings)
    query = torch.randn(tokens, heads, HEAD_DIM, device="cuda").to(torch.bfloat16)
    every: list[Callable[[], object]] = []
    for i in range(launches):
        if i % layers == 0:
            tables = draw_tables(step, blocks)
        attend = attend_operator(heads, pool, i % layers)
        every.append(prepare(attend, [query, tables, starts, lengths, *splits, pool, state], settings)[0])

    def run_all(_stream: int) -> None:
        for launch in every:
            launch()

    return graph_time_ms(run_all) / launches


def check(results: Results, pool: Pool) -> None:
    """Mixed steps of decode rows, split and not, and chunks, against float32 torch."""
    mixed = Step((1, 1, 1, 300, 3, 1), (5_000, 17, 1, 300, 900, 40))
    # So many that KV heads share tiles.
    many = Step((1,) * 300, (*range(1, 300), 3_000))
    for (name, (heads, kv_heads)), step in itertools.product(MODELS.items(), (mixed, many)):
        cache = pool.view(kv_heads, 2)
        tables, starts, lengths = draw_tables(step, cache.shape[0]), starts_of(step), integers(step.seq_lens)
        tokens = sum(step.query_lens)
        query = torch.randn(tokens, heads, HEAD_DIM, device="cuda").to(torch.bfloat16)
        state = new_state(cache.shape[0])
        splits = assigned_splits(heads, kv_heads, starts, lengths, {})
        run, outputs = prepare(
            attend_operator(heads, cache, 1), [query, tables, starts, lengths, *splits, cache, state], {}
        )
        repeats = []
        for _ in range(3):
            run()
            repeats.append(outputs[0].clone())
        # The specification, over only the blocks in question.
        used, small = torch.unique(tables, return_inverse=True)
        keys, values = torch.stack([cache[block, 1].float() for block in used.tolist()]).unbind(1)
        rows = torch.repeat_interleave(torch.arange(len(lengths), device="cuda"), starts.diff())
        last = (lengths - starts.diff())[rows] + torch.arange(tokens, device="cuda") - starts[:-1][rows]
        slots = small[rows, last // BLOCK_SIZE] * BLOCK_SIZE + last % BLOCK_SIZE
        key, value = (part[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE].flatten(1) for part in (keys, values))
        expected, _, _ = paged_attention_in_place(
            query.float().flatten(1), key, value, keys, values, slots.int(), small.int(), starts, lengths,
            SCALE, heads, kv_heads, 0,
        )  # fmt: skip
        error = (outputs[0].float() - expected).norm() / expected.norm()
        results.add(
            check=name,
            tokens=tokens,
            kv=str(cache.dtype),
            relative_error=float(error),
            repeats_equal=all(torch.equal(repeats[0], other) for other in repeats),
            counters_zero=not bool(state[1:].any()),
        )


def check_normed_heads(results: Results, pool: Pool) -> None:
    """The kernel that norms heads, rotates them and writes to the pool, against float32 torch."""
    heads, kv_heads, tokens, positions, epsilon = 32, 8, 300, 4_000, 1e-6
    cache = pool.view(kv_heads, 2)
    write = KvWrite(**layout(heads, cache, 1), max_positions=positions, epsilon=epsilon)
    qkv = torch.randn(tokens, write.width, device="cuda").to(torch.bfloat16)
    norms = torch.randn(2, HEAD_DIM, device="cuda").to(torch.bfloat16)
    rope = RopeConfig(theta=1e4)
    cos, sin = (table.cuda() for table in cosine_and_sine(rope, HEAD_DIM, positions))
    place = torch.randint(positions, (tokens,), device="cuda").int()
    blocks = torch.randperm(cache.shape[0] - 1, device="cuda")[: -(-tokens // BLOCK_SIZE)] + 1
    token = torch.arange(tokens, device="cuda")
    slots = (blocks[token // BLOCK_SIZE] * BLOCK_SIZE + token % BLOCK_SIZE).int()
    state = new_state(cache.shape[0])
    state[STEP_SIZE_BYTE // 8] = STEP_MARK << 32 | tokens
    run, outputs = prepare(write, [qkv, norms, torch.cat([cos, sin], 1), place, slots, cache, state], {})
    run()

    query, key, value = qkv.float().view(tokens, -1, HEAD_DIM).split([heads, kv_heads, kv_heads], 1)
    expected = {"value": value}
    for name, states, gain in (("query", query, norms[0]), ("key", key, norms[1])):
        normed = states * torch.rsqrt(states.square().mean(-1, keepdim=True) + epsilon) * gain.float()
        low, high = normed.view(tokens, -1, HEAD_DIM // 2, 2).unbind(-1)
        c, s = cos[place.long(), None], sin[place.long(), None]
        expected[name] = torch.stack([low * c - high * s, high * c + low * s], -1).flatten(2)
    stored = cache[slots.long() // BLOCK_SIZE, 1, :, :, slots.long() % BLOCK_SIZE].float()
    got = {"query": outputs[0].float(), "key": stored[:, 0], "value": stored[:, 1]}
    results.add(
        check="normed heads",
        kv=str(cache.dtype),
        relative_errors={
            name: float((got[name] - states).norm() / states.norm()) for name, states in expected.items()
        },
    )


def cases() -> list[tuple[str, str, Step]]:
    """Model, name and step, the most interesting first."""
    found = []
    for name in MODELS:
        found += [
            (name, f"decode {n} x {context}", Step((1,) * n, (context,) * n))
            for context, batches in CONTEXTS.items()
            for n in batches
        ]
        for n in (64, 256):
            lens = (200,) * (n - 1) + (16_000,)
            found.append((name, f"decode {n - 1} x 200 and 1 x 16000", Step((1,) * n, lens)))
        found += [(name, f"prefill {n}", Step((n,), (n,))) for n in CHUNKS]
        found.append((name, "prefill 512 after 8000", Step((512,), (8_512,))))
        found.append((name, "prefill 200 and decode 15 x 200", Step((1,) * 15 + (200,), (200,) * 16)))
    return found


def measure(results: Results, pool: Pool, settings: Mapping[str, Any], deadline: float) -> None:
    """Every case with these settings, as far as time and memory go."""
    for model, name, step in cases():
        heads, kv_heads = MODELS[model]
        layers = pool.layers(kv_heads, step.num_blocks)
        if not layers or time.monotonic() > deadline:
            continue
        cache = pool.view(kv_heads, layers)
        row: dict[str, Any] = {
            "model": model,
            "case": name,
            "kv": str(cache.dtype),
            "settings": dict(settings),
        }
        try:
            time_ms = step_time_ms(heads, cache, step, settings)
        except Exception as error:  # a setting may want more than the GPU has
            results.add(**row, error=f"{type(error).__name__}: {error}"[:200])
            return
        row["us"] = round(time_ms * 1e3, 2)
        if name.startswith("decode"):
            read = sum(step.seq_lens) * 2 * kv_heads * HEAD_DIM * cache.element_size()
            row["gb_s"] = round(read / time_ms / 1e6)
            row["share_of_bandwidth"] = results.share_of_bandwidth(read, time_ms)
        else:
            row["tflop_s"] = round(4 * heads * HEAD_DIM * step.pairs / time_ms / 1e9, 1)
        results.add(**row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=300.0, help="measure no longer than about this")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    collected = Results(arguments.output)
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    whole = Pool()
    own: tuple[dict[str, Any], ...] = ({},)
    for element, every in (
        (torch.bfloat16, own),
        (torch.float8_e4m3fn, (*own, *FP8_SETTINGS)),
        (torch.bfloat16, SETTINGS),
    ):
        whole.fill(element)
        if {} in every:
            check(collected, whole)
            check_normed_heads(collected, whole)
        for chosen in every:
            measure(collected, whole, chosen, end)
