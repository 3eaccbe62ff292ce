"""The linear operator in each of its tiles against torch, in the Triton language's interpreter; its PTX."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire.execution.engine_state import (
    COUNTERS_BYTE,
    NUM_COUNTERS,
    STEP_MARK,
    STEP_SIZE_BYTE,
    engine_state_elements,
)
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire_build.quantization import quantize_in_groups, quantize_weights
from quire_build.tensorrt.kernels.linear_tma import linear_tma
from quire_build.tensorrt.kernels.step_size import ROWS, TOKENS
from quire_build.tensorrt.linear_tiles import LinearTile, Operands, tile_bytes, tiles
from quire_build.tensorrt.operators import MODEL, Linear, PlainArithmetic
from quire_build.tensorrt.pairs import paired

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PLAIN: dict[str, Any] = {
    "normed": 0, "epsilon": 1e-5, "gated": 0, "adds_residual": 0, "biased": 0, "wide_output": 0,
    "weight_group": 0, "weight_float": 0, "narrow_rows": 0, "shared_bytes": DEFAULT_SHARED_BYTES,
    "multiprocessors": 3,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "normed": {"normed": 1, "biased": 1},
    "residual": {"adds_residual": 1},
    "gated": {"normed": 1, "gated": 1, "biased": 1},
}
HOPPER_SHARED_BYTES = 227 * 1024
"""What a program of a plan in process may have."""
TILES = (
    LinearTile(splits=4, block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3),
    LinearTile(splits=5, block_m=32, block_n=64, block_k=16, num_warps=4, num_stages=3),
    LinearTile(splits=1, block_m=64, block_n=256, block_k=64, num_warps=8, num_stages=3),
)
"""Split into many and few, and finished by halves; none of them fits the layers below."""
TMA_TILES = (
    LinearTile(splits=1, block_m=16, block_n=64, block_k=32, num_warps=4, num_stages=3, tma=True),
    LinearTile(splits=1, block_m=32, block_n=64, block_k=64, num_warps=4, num_stages=3, tma=True),
    LinearTile(splits=1, block_m=16, block_n=96, block_k=32, num_warps=4, num_stages=3, tma=True),
)
"""So small that programs have many; no layer below is a multiple of the second; two widths in the third."""
OF_16_ROWS = pytest.mark.parametrize("tile", [TILES[0], TMA_TILES[0]], ids=["", "tma"])


def quantized(weight: torch.Tensor, layer: Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight [n, k] as the operator takes it in eight bits, its scales, and what the two stand for."""
    narrow = quantize_in_groups(
        weight, "fp8" if layer.weight_float else "int8", weight.dtype, layer.weight_group
    )
    scales = narrow.scales.T.contiguous()
    operand = narrow.values.view(torch.int32) if layer.narrow_rows else paired(narrow.values)
    return operand, scales, narrow.dequantized().to(weight.dtype)


def quantized_rows(x: torch.Tensor, layer: Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [T, k] as the operator takes them in eight bits, their scales, and what the two stand for."""
    narrow = quantize_weights(x, "fp8" if layer.weight_float else "int8")
    return narrow.values.view(torch.int32), narrow.scales, narrow.dequantized()


def random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def note(state: torch.Tensor, *, tokens: int, rows: int, mark: int = STEP_MARK) -> None:
    """What StepBegin writes for every operator behind it."""
    for which, count in ((TOKENS, tokens), (ROWS, rows)):
        state[STEP_SIZE_BYTE // 8 + which.value] = mark << 32 | count


def check(
    layer: Linear, rows: int, tile: LinearTile, state: torch.Tensor, computed: int | None = None
) -> None:
    """Run the layer on random rows; compare all outputs with torch.

    Rows from `computed` on are padding that has to be left as it was; their input is garbage.
    """
    computed = rows if computed is None else computed
    generator = torch.Generator().manual_seed(rows)
    n, k = layer.n, layer.k
    x, weight = random(generator, rows, k), random(generator, n * (1 + layer.gated), k)
    squares = x.square().view(rows, -1, 32).sum(-1) if layer.normed else x
    residual, gain = random(generator, rows, n), random(generator, n)
    bias = random(generator, n * (1 + layer.gated))
    operand, scales, narrow_x, x_scales, wide = weight, x, x, x, x
    if layer.weight_group:
        operand, scales, weight = quantized(weight, layer)
    if layer.narrow_rows:
        narrow_x, x_scales, wide = quantized_rows(x, layer)
    x[computed:] = math.nan
    x_scales[computed:] = math.nan
    inputs = [x, operand, squares, residual, gain, bias, scales, narrow_x, x_scales, state]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    outputs = [torch.full(shape, math.nan) for shape, _ in layer.outputs(shapes)]
    outputs[3] = torch.full((tile.splits * tile.block_m * n * (1 + layer.gated),), math.nan)
    launch = layer.launch_in(tile, shapes, PlainArithmetic())
    launch.kernel[launch.grid](**launch.arguments(inputs, outputs), **launch.constants)

    for output in outputs[: 1 + 2 * layer.adds_residual]:
        assert output[computed:].isnan().all(), "a tile of padding was written"
    outputs, rows = [output[:computed] for output in outputs], computed
    x, wide, residual = x[:rows], wide[:rows], residual[:rows]
    expected = wide @ weight.T
    if layer.normed:
        expected *= torch.rsqrt(x.square().mean(-1, keepdim=True) + layer.epsilon)
    if layer.biased:
        expected += bias
    if layer.gated:
        gate, up = expected.chunk(2, dim=-1)
        expected = torch.nn.functional.silu(gate) * up
    if layer.adds_residual:
        expected += residual
        torch.testing.assert_close(outputs[1], expected * gain, atol=1e-3, rtol=1e-4)
        sums = expected.square().view(rows, n // 32, 32).sum(-1)
        torch.testing.assert_close(outputs[2], sums, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(outputs[0], expected, atol=1e-3, rtol=1e-4)


EIGHT_BITS: dict[str, dict[str, Any]] = {
    "": {},
    "int8 weights": {"weight_group": 64},
    "int8": {"weight_group": 160, "narrow_rows": 1},
    "fp8": {"weight_group": 160, "weight_float": 1, "narrow_rows": 1},
}
"""What a layer of 160 inputs may be quantised to."""
NARROW = [name for name in EIGHT_BITS if name]


@pytest.mark.parametrize(
    ("rows", "eight_bits"), [(1, ""), (17, ""), (70, ""), (17, "int8 weights"), (70, "int8")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tile_is_right_for_every_number_of_rows(kind: str, rows: int, eight_bits: str) -> None:
    """In the same state one after another, so that a counter left behind by one would spoil the next."""
    layer = Linear(k=160, n=96, **(PLAIN | KINDS[kind] | EIGHT_BITS[eight_bits]))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    own = [
        tile
        for shared_bytes in (DEFAULT_SHARED_BYTES, HOPPER_SHARED_BYTES)
        for tile in replace(layer, shared_bytes=shared_bytes).tiles
    ]
    cut = [replace(tile, block_k=128) for tile in TILES] if layer.operands == "widened" else TILES
    assert any(tile.scaled_first for tile in own) == (layer.operands == "widened")
    for tile in dict.fromkeys((*cut, *own)):
        check(layer, rows, tile, state)
        assert not state.any(), f"{tile} left a counter behind"


@pytest.mark.parametrize("eight_bits", ["", *NARROW[1:]])
@pytest.mark.parametrize("kind", KINDS)
def test_the_accelerator_moves_tiles_of_many_rows(kind: str, eight_bits: str) -> None:
    """Several to a program; the last column cuts what is finished whole and what is finished in two parts."""
    layer = Linear(k=160, n=352, **(PLAIN | KINDS[kind] | EIGHT_BITS[eight_bits]))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    own = replace(layer, shared_bytes=HOPPER_SHARED_BYTES).tiles
    moved = [tile for tile in own if tile.tma]
    assert moved
    for tile in moved:
        check(layer, 300, tile, state)


@pytest.mark.parametrize("eight_bits", ["", *NARROW[1:]])
@pytest.mark.parametrize(("kind", "multiprocessors"), list(zip(KINDS, (3, 4, 3), strict=True)))
def test_programs_take_tiles_in_turn(multiprocessors: int, kind: str, eight_bits: str) -> None:
    """Those of 16 rows are 2 to 57: a program has none, or others rows with each, or the same twice."""
    own = {"multiprocessors": multiprocessors}
    layer = Linear(k=160, n=160, **(PLAIN | KINDS[kind] | EIGHT_BITS[eight_bits] | own))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    for tile, rows in itertools.product(TMA_TILES, (1, 17, 70, 300)):
        check(layer, rows, tile, state)
    assert not state.any()


@pytest.mark.parametrize("eight_bits", NARROW[1:])
@pytest.mark.parametrize(
    "tile", [*TILES[:2], TMA_TILES[1]], ids=lambda tile: f"{tile.splits}x{tile.block_m}" + "-tma" * tile.tma
)
def test_rows_of_eight_bits_have_padding_behind_them_too(eight_bits: str, tile: LinearTile) -> None:
    layer = Linear(k=160, n=96, **(PLAIN | KINDS["residual"] | EIGHT_BITS[eight_bits]))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    note(state, tokens=tile.block_m + 1, rows=1000)
    check(layer, 3 * tile.block_m + 3, tile, state, 2 * tile.block_m)
    assert not state.view(torch.int32)[COUNTERS_BYTE // 4 :].any(), "a counter was left behind"


@pytest.mark.parametrize("k", [4, 60, 300])
def test_rows_of_eight_bits_need_not_fill_a_tile(k: int) -> None:
    """Sums of int8 products are exact."""
    layer = Linear(k=k, n=48, **(PLAIN | {"weight_group": k, "narrow_rows": 1}))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    generator = torch.Generator().manual_seed(k)
    values, weight = (
        torch.randint(-127, 128, (rows, k), generator=generator, dtype=torch.int8) for rows in (5, 48)
    )
    x, one = torch.full((5, k), math.nan), torch.ones(1, 48)
    inputs = [
        x, weight.view(torch.int32), x, x, x, x, one, values.view(torch.int32), torch.ones(5), state
    ]  # fmt: skip
    shapes = [tuple(tensor.shape) for tensor in inputs]
    for tactic in range(layer.num_tactics):
        outputs = [torch.full(shape, math.nan) for shape, _ in layer.outputs(shapes)]
        launch = layer.launch(shapes, PlainArithmetic(), tactic)
        launch.kernel[launch.grid](**launch.arguments(inputs, outputs), **launch.constants)
        assert torch.equal(outputs[0], values.float() @ weight.float().T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "tile", [*TILES, *TMA_TILES], ids=lambda tile: f"{tile.splits}x{tile.block_m}" + "-tma" * tile.tma
)
def test_tiles_of_padding_are_left_alone(kind: str, tile: LinearTile) -> None:
    layer = Linear(k=160, n=96, **(PLAIN | KINDS[kind]))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    # The first tile does not wait for the number of rows, but where one program computes many.
    for used, row_tiles in ((0, 1 - tile.tma), (1, 1), (tile.block_m, 1), (tile.block_m + 1, 2)):
        note(state, tokens=used, rows=1000)
        check(layer, 2 * tile.block_m + 3, tile, state, row_tiles * tile.block_m)
        assert not state.view(torch.int32)[COUNTERS_BYTE // 4 :].any(), "a counter was left behind"


@OF_16_ROWS
def test_tiles_of_padding_are_left_alone_among_many(tile: LinearTile) -> None:
    """So many that they go through the columns in groups, the last of which is cut."""
    layer = Linear(k=64, n=64, **PLAIN)
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    for used in (16, 130, 17 * 16):
        note(state, tokens=used, rows=0)
        check(layer, 290, tile, state, -(-used // 16) * 16)


@OF_16_ROWS
def test_the_rows_of_logits_are_not_the_tokens(tile: LinearTile) -> None:
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    for wide_output, computed in ((0, 48), (1, 16)):
        layer = Linear(k=64, n=64, **(PLAIN | {"wide_output": wide_output}))
        note(state, tokens=40, rows=9)
        check(layer, 70, tile, state, computed)


@OF_16_ROWS
def test_all_rows_are_computed_where_no_step_has_said_how_many_there_are(tile: LinearTile) -> None:
    """TensorRT times kernels in memory that holds anything; a count above all rows is all as well."""
    layer = Linear(k=64, n=64, **PLAIN)
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    check(layer, 70, tile, state)
    for mark in (0, 1, -1, STEP_MARK - 1, -STEP_MARK):
        note(state, tokens=3, rows=3, mark=mark)
        check(layer, 70, tile, state)
    for tokens in (70, 71, 2**31 - 1):
        note(state, tokens=tokens, rows=3)
        check(layer, 70, tile, state)


@OF_16_ROWS
def test_a_count_below_zero_is_none(tile: LinearTile) -> None:
    layer = Linear(k=64, n=64, **PLAIN)
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    note(state, tokens=2**32 - 5, rows=3)
    check(layer, 70, tile, state, 0 if tile.tma else 16)


def test_a_tile_wider_than_the_layer_leaves_nothing_out() -> None:
    layer = Linear(k=40, n=48, **(PLAIN | {"gated": 1}))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    x, weight = random(generator, 5, 40), random(generator, 96, 40)
    inputs = [x, weight, x, x, x, x, x, x, x, state]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    gate, up = (x @ weight.T).chunk(2, dim=-1)
    for tactic in range(layer.num_tactics):
        outputs = [torch.full(shape, math.nan) for shape, _ in layer.outputs(shapes)]
        launch = layer.launch(shapes, PlainArithmetic(), tactic)
        launch.kernel[launch.grid](**launch.arguments(inputs, outputs), **launch.constants)
        torch.testing.assert_close(outputs[0], torch.nn.functional.silu(gate) * up, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shared_bytes", [DEFAULT_SHARED_BYTES, HOPPER_SHARED_BYTES])
def test_int8_weights_are_widened_to_half_precision_and_scaled_in_single(shared_bytes: int) -> None:
    """Rows and scales of fp16: the only rounding is that of the result, and of weights scaled first."""
    layer = Linear(k=192, n=64, **(PLAIN | {"weight_group": 64, "shared_bytes": shared_bytes}))
    generator = torch.Generator().manual_seed(1)
    x, weight = random(generator, 20, 192).half(), random(generator, 64, 192).half()
    narrow = quantize_in_groups(weight, "int8", torch.float16)
    operand, scales = paired(narrow.values), narrow.scales.T.contiguous()
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    inputs = [x, operand, x, x, x, x, scales, x, x, state]
    shapes = [tuple(tensor.shape) for tensor in inputs]
    wide = narrow.dequantized()
    for tactic, tile in enumerate(layer.tiles):
        expected = x.float() @ (wide.half().float() if tile.scaled_first else wide).T
        types = {MODEL: torch.float16, "fp32": torch.float32, "i32": torch.int32}
        outputs = [torch.full(shape, math.nan).to(types[element]) for shape, element in layer.outputs(shapes)]
        launch = layer.launch(shapes, PlainArithmetic(), tactic)
        launch.kernel[launch.grid](**launch.arguments(inputs, outputs), **launch.constants)
        torch.testing.assert_close(outputs[0].float(), expected, atol=1e-5, rtol=2**-11)


@pytest.mark.parametrize("k", [40, 63, 65, 129])
def test_widened_weights_need_not_fill_a_group(k: int) -> None:
    layer = Linear(k=k, n=33, **(PLAIN | {"weight_group": 64}))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    for tile in layer.tiles:
        check(layer, 5, tile, state)


@pytest.mark.parametrize(
    "narrow", [{"weight_group": 64, "weight_float": 1}, EIGHT_BITS["fp8"]], ids=["weights", "rows too"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_eight_bits_may_be_floats(kind: str, narrow: dict[str, Any]) -> None:
    layer = Linear(k=160, n=96, **(PLAIN | KINDS[kind] | narrow))
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    deep = replace(layer, shared_bytes=HOPPER_SHARED_BYTES).tiles
    for tile in dict.fromkeys((*layer.tiles, *(tile for tile in deep if not tile.tma))):
        check(layer, 17, tile, state)


LAYERS = pytest.mark.parametrize(
    ("n", "k", "gated"),
    [(6144, 4096, 0), (4096, 4096, 0), (14336, 4096, 1), (4096, 14336, 0), (128256, 4096, 0), (96, 64, 1)],
)


OPERANDS: tuple[Operands, ...] = ("wide", "widened", "int8", "fp8")


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_tiles_are_as_deep_as_the_shared_memory_allows(gated: bool, operands: Operands) -> None:
    def most(shared_bytes: int) -> int:
        wanted, rows = [], []
        for tile in tiles(4096, 4096, gated, operands, shared_bytes, multiprocessors=132):
            shape = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
            wanted.append(tile_bytes(shape, gated, operands))
            rows.append((tile.tma, tile.block_m))
            assert tile.more_n == 0 or (tile.tma and tile.more_n.bit_count() == 1)
        assert max(wanted) <= shared_bytes
        assert rows == sorted(rows)
        return max(wanted)

    deepest = most(HOPPER_SHARED_BYTES)
    assert deepest > DEFAULT_SHARED_BYTES
    assert most(deepest) == deepest
    for shared_bytes in (DEFAULT_SHARED_BYTES, deepest - 1):
        assert most(shared_bytes) <= DEFAULT_SHARED_BYTES
    default = tiles(4096, 4096, gated, operands, multiprocessors=132)
    assert default == tiles(4096, 4096, gated, operands, DEFAULT_SHARED_BYTES, multiprocessors=132)


@pytest.mark.parametrize(("multiprocessors", "splits"), [(58, [1, 1]), (108, [2, 3]), (132, [3, 4])])
def test_k_is_split_until_every_multiprocessor_has_its_programs(
    multiprocessors: int, splits: list[int]
) -> None:
    """Three of them on each where tiles are small, two of 96 KiB."""
    cut = tiles(4096, 14336, False, "wide", HOPPER_SHARED_BYTES, multiprocessors=multiprocessors)
    wanted = ((16, 32, 128, 4), (64, 64, 64, 6))
    assert splits == [
        tile.splits for tile in cut if (tile.block_m, tile.block_n, tile.block_k, tile.num_stages) in wanted
    ]


def test_widened_weights_take_registers_for_two_sums() -> None:
    """With those a tile of 64 by 64 is a large one, of which two and not three run on a multiprocessor."""
    cut = tiles(4096, 14336, False, "widened", HOPPER_SHARED_BYTES, multiprocessors=132)
    assert [(tile.block_m, tile.splits) for tile in cut if tile.block_n == 64] == [
        (16, 6), (32, 6), (64, 4), (128, 2)
    ]  # fmt: skip
    assert [tile.splits for tile in cut if tile.scaled_first] == [1]


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
def test_the_accelerator_moves_whole_rows_of_16_bytes_on_hopper(gated: bool, operands: Operands) -> None:
    def moved(k: int, shared_bytes: int = HOPPER_SHARED_BYTES) -> list[LinearTile]:
        return [
            tile for tile in tiles(4096, k, gated, operands, shared_bytes, multiprocessors=132) if tile.tma
        ]

    unit = 8 if operands == "wide" else 16
    assert bool(moved(4096)) == (operands != "widened")
    assert moved(4096 + unit) == moved(5 * unit) == moved(4096)
    assert all(tile.splits == 1 for tile in moved(4096))
    for k in (4096 + unit // 2, 4096 + unit - 1, unit // 2):
        assert not moved(k)
    for shared_bytes in (DEFAULT_SHARED_BYTES, 99 * 1024, 163 * 1024):
        assert not moved(4096, shared_bytes)


@pytest.mark.parametrize(
    ("eight_bits", "shared_bytes"),
    list(itertools.product(EIGHT_BITS, (DEFAULT_SHARED_BYTES, HOPPER_SHARED_BYTES))),
)
@LAYERS
def test_scratch_and_counters_hold_every_launch(
    n: int, k: int, gated: int, eight_bits: str, shared_bytes: int
) -> None:
    kind = {"gated": gated, "shared_bytes": shared_bytes} | EIGHT_BITS[eight_bits]
    for multiprocessors in (3, 132, 300):
        check_launches(Linear(k=k, n=n, **(PLAIN | kind | {"multiprocessors": multiprocessors})))


def check_launches(layer: Linear) -> None:
    """Scratch, descriptors and counters are enough for every tactic at every number of rows."""
    n, k, gated = layer.n, layer.k, layer.gated
    for rows in (1, 16, 17, 64, 65, 128, 1000, 8192):
        shapes = [(rows, k), (n * (1 + gated), k)]
        ((scratch,), _), ((descriptors,), _) = layer.outputs(shapes)[3:]
        for tactic in range(layer.num_tactics):
            launch = layer.launch(shapes, PlainArithmetic(), tactic)
            assert math.prod(launch.grid) * launch.language_scratch_bytes <= 4 * descriptors
            if launch.kernel is linear_tma:
                assert launch.grid == (launch.constants["PROGRAMS"],) == (layer.multiprocessors,)
                assert launch.language_scratch_bytes
                continue
            columns, row_tiles, splits = launch.grid
            block_m = launch.constants["BLOCK_M"]
            assert row_tiles * block_m >= rows and columns * launch.constants["BLOCK_N"] >= n
            assert splits == 1 or splits <= launch.constants["SPLITS"]
            if splits > 1:
                assert row_tiles * splits * block_m * n * (1 + gated) <= scratch
                assert row_tiles * columns <= NUM_COUNTERS


def test_counters_start_behind_what_else_the_state_holds() -> None:
    """A split tile's counter that stays (its other splits never come) shows where it lies."""
    layer = Linear(k=64, n=32, **PLAIN)
    state = torch.zeros(engine_state_elements(1), dtype=torch.int64)
    x, weight = torch.zeros(1, 64), torch.zeros(32, 64)
    outputs = [torch.zeros(1, 32), x, x, torch.zeros(2, 16, 32)]
    tile = LinearTile(splits=2, block_m=16, block_n=32, block_k=32, num_warps=4, num_stages=3)
    launch = layer.launch_in(tile, [x.shape, weight.shape], PlainArithmetic())
    inputs = [x, weight, x, x, x, x, x, x, x, state]
    launch.kernel[(1, 1, 1)](**launch.arguments(inputs, outputs), **launch.constants)
    assert state.view(torch.int32).nonzero().flatten().tolist() == [COUNTERS_BYTE // 4]


PTX_PARTS = 4
PTX_LAYERS = """
import re
import sys
from dataclasses import replace

from quire_build.tensorrt.kernels.compiled import compile_kernel
from quire_build.tensorrt.linear_tiles import tile_bytes
from quire_build.tensorrt.operators import Linear, PlainArithmetic, ProjectQkv

eight_bits = dict(weight_group=0, weight_float=0, narrow_rows=0)
gpu = dict(shared_bytes=48 * 1024, multiprocessors=132)
flags = dict(k=4096, n=14336, epsilon=1e-5, normed=1, biased=1, **gpu, **eight_bits)
plain = Linear(gated=0, adds_residual=1, wide_output=0, **flags)
gated = Linear(gated=1, adds_residual=0, wide_output=0, **flags)
wide = Linear(gated=0, adds_residual=0, wide_output=1, **flags)
cases = [(90, plain, tactic) for tactic in range(plain.num_tactics)]
cases += [(90, gated, tactic) for tactic in range(gated.num_tactics)]
for layer in (plain, gated):
    widened = replace(layer, weight_group=64)
    assert all(tile.block_k % widened.weight_group == 0 for tile in widened.tiles)
    int8 = replace(layer, weight_group=layer.k, narrow_rows=1)
    fp8 = replace(int8, weight_float=1)
    cases += [(90, int8, tactic) for tactic in range(int8.num_tactics)]
    cases += [(90, widened, tactic) for tactic in (0, widened.num_tactics - 1)]
    for shallow in (layer, widened, int8, fp8):
        # Those that are among the shallow ones have been compiled.
        deep = replace(shallow, shared_bytes=227 * 1024)
        cases += [(90, deep, tactic) for tactic, tile in enumerate(deep.tiles) if tile not in shallow.tiles]
floating = replace(plain, weight_group=64, weight_float=1, shared_bytes=227 * 1024)
cases += [(90, floating, tactic) for tactic in (0, floating.num_tactics - 1)]
cases += [(arch, replace(plain, weight_group=64), 0) for arch in (80, 89)]
cases += [(90, wide, wide.num_tactics - 1), (80, plain, plain.num_tactics - 1), (89, gated, 1)]
cases += [(80, replace(plain, weight_group=4096, narrow_rows=1), tactic) for tactic in (1, 5)]
cases += [(89, fp8, tactic) for tactic in (1, 4)]
pool = dict(
    layer=1, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, block_size=16, max_blocks=60000,
    num_pools=2, blocks_per_pool=30000, max_positions=8192,
)
product = dict(k=4096, epsilon=1e-5, normed=1, biased=1, shared_bytes=227 * 1024, multiprocessors=132)
qkv = ProjectQkv(**pool, kv_element_bytes=2, **product, **eight_bits)
narrow_kv = replace(qkv, kv_element_bytes=1, weight_group=4096, weight_float=1, narrow_rows=1)
# Few bytes are left there: shared memory that a conversion of layouts takes must be that of the operands.
hosted = [replace(layer, shared_bytes=48 * 1024, num_pools=8) for layer in (qkv, narrow_kv)]
cases += [(90, layer, layer.num_tactics - 1) for layer in hosted]
for layer in (qkv, narrow_kv):
    cases += [(90, layer, tactic) for tactic, tile in enumerate(layer.tiles) if tile.more_n]
cases += [(90, qkv, 0), *((90, layer, tactic) for layer in (qkv, narrow_kv) for tactic in (2, -1))]
"""
PTX_CASES = r"""
for arch, layer, tactic in cases[int(sys.argv[1]) :: int(sys.argv[2])]:
    launch, tile = layer.launch([(64, layer.k)], PlainArithmetic(), tactic), layer.tiles[tactic]
    writes_kv = isinstance(layer, ProjectQkv)
    layer = layer.linear if writes_kv else layer
    assert launch.max_shared_bytes == layer.shared_bytes
    assert launch.constants.get("SCALED_FIRST", False) == tile.scaled_first
    types = {name: kind.replace("model", "bf16") for name, kind in launch.types.items()}
    assert list(types) == [name for name in launch.kernel.arg_names if name not in launch.constants]
    compiled = compile_kernel(
        launch.kernel, types, launch.constants, arch=arch,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
        max_shared_bytes=launch.max_shared_bytes, language_scratch_bytes=launch.language_scratch_bytes,
    )
    print(arch, layer.n, tile, compiled.shared_bytes, compiled.language_scratch_bytes, flush=True)
    if arch == 90:
        shape = tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages
        # What is moved at two widths has a barrier for each, and the second's start at a multiple of 16.
        barriers = (8 * tile.num_stages + (8 * tile.num_stages + 8) * bool(tile.more_n)) * tile.tma
        assert compiled.shared_bytes <= tile_bytes(shape, bool(layer.gated), layer.operands) + barriers
    assert ".version 8.7" in compiled.ptx and f".target sm_{arch}" in compiled.ptx
    assert compiled.language_scratch_bytes == launch.language_scratch_bytes
    assert ("cp.async.bulk.tensor" in compiled.ptx) == tile.tma
    if writes_kv:
        assert "st.global.v4" in compiled.ptx or "st.global.v2" in compiled.ptx, "narrow stores"
    assert tile.tma or "cp.async.cg.shared.global" in compiled.ptx, "narrow loads"
    if arch == 90 and layer.operands == "widened" and not layer.weight_float:
        assert "mul.bf16x2" in compiled.ptx, "numbers are widened one by one"
    if arch == 90 and layer.operands == "widened":
        # A first operand from registers is in braces like the result.
        assert re.search(r"wgmma[^;]*\}, *\{", compiled.ptx), "weights come from shared memory"
    if arch == 90 and (launch.constants["BLOCK_M"] >= 64 or layer.operands == "widened"):
        numbers = {"int8": ".s32.s8.s8", "fp8": ".f32.e4m3.e4m3"}.get(layer.operands, ".f32.bf16.bf16")
        assert re.search("wgmma.*" + re.escape(numbers), compiled.ptx), "numbers are widened"
"""
PTX_REFUSAL = """
deep = replace(plain, shared_bytes=227 * 1024)
launch = deep.launch([(64, deep.k)], PlainArithmetic(), deep.num_tactics - 1)
assert deep.tiles[-1].tma
try:
    compile_kernel(
        launch.kernel, {name: kind.replace("model", "bf16") for name, kind in launch.types.items()},
        launch.constants, arch=90, num_warps=launch.num_warps, num_stages=launch.num_stages,
        max_shared_bytes=launch.max_shared_bytes, language_scratch_bytes=launch.language_scratch_bytes - 1,
    )
except ValueError as error:
    print(error)
"""


def compile_in_a_process(script: str, *arguments: str, cache: Path) -> str:
    """What a script prints that compiles, without this process's interpreter switch and cache."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("part", range(PTX_PARTS))
def test_tiles_compile_for_ampere_ada_and_hopper(part: int, tmp_path: Path) -> None:
    """Within the shared memory a plan has; in parts, since there are many tiles."""
    printed = compile_in_a_process(PTX_LAYERS + PTX_CASES, str(part), str(PTX_PARTS), cache=tmp_path)
    assert len(printed.splitlines()) > 5


def test_a_kernel_gets_no_more_scratch_memory_than_its_operator_has(tmp_path: Path) -> None:
    refusal = compile_in_a_process(PTX_LAYERS + PTX_REFUSAL, cache=tmp_path).strip()
    assert refusal.startswith("kernel linear_tma wants 256 bytes of scratch memory ")
    assert refusal.endswith("gives it 255")
