"""The operators of a lowered graph, launched as a plan launches them, against what they stand for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire.execution.engine_state import (
    COUNTERS_BYTE,
    EPOCH_BYTE,
    MAX_POOLS,
    NUM_COUNTERS,
    POOL_HEADER_BYTES,
    POOL_OFFSETS_BYTE,
    SAMPLED_IDS_BYTE,
    STEP_MARK,
    STEP_SIZE_BYTE,
    engine_state_elements,
)
from quire_build.paged_attention import paged_attention_in_place
from quire_build.tensorrt.operators import (
    MODEL,
    AssignSplits,
    KvWrite,
    Operator,
    PagedAttend,
    PlainArithmetic,
    ProjectQkv,
    StepBegin,
    in_pairs,
)
from quire_build.tensorrt.operators import assign_splits as assign_splits_module
from quire_build.tensorrt.operators import paged_attend as paged_attend_module

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MAX_POSITIONS, MAX_NUM_SEQS = 256, 8
EPSILON = 1e-3
HOPPER_SHARED_BYTES = 227 * 1024


def run(operator: Operator, inputs: Sequence[torch.Tensor], tactic: int = 0) -> list[torch.Tensor]:
    """Launch one float32 operator in the interpreter; outputs start as NaN, or -7, so that gaps show."""
    shapes = [tuple(tensor.shape) for tensor in inputs]
    outputs = []
    for shape, element in operator.outputs(shapes):
        assert element in (MODEL, "fp32", "i32")
        integer = element == "i32"
        outputs.append(
            torch.full(shape, -7 if integer else math.nan, dtype=torch.int32 if integer else torch.float32)
        )
    launch = operator.launch(shapes, PlainArithmetic(), tactic)
    launch.kernel[launch.grid](**launch.arguments(inputs, outputs), **launch.constants)
    return outputs


def integers(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def new_state(num_blocks: int) -> torch.Tensor:
    state = torch.zeros(engine_state_elements(MAX_NUM_SEQS), dtype=torch.int64)
    state[0] = num_blocks
    return state


def counters(state: torch.Tensor) -> torch.Tensor:
    return state.view(torch.int32)[COUNTERS_BYTE // 4 :][:NUM_COUNTERS]


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    layers: int = 2
    window: int = 0

    @property
    def block_shape(self) -> tuple[int, ...]:
        return (self.layers, 2, self.kv_heads, self.block_size, self.head_dim)

    @property
    def width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def in_pairs(self) -> torch.Tensor:
        """The columns of queries, keys and values, those of queries and keys in pairs."""
        columns = torch.arange(self.width).view(-1, self.head_dim)
        rotated = self.heads + self.kv_heads
        pairs = columns[:rotated, in_pairs(self.head_dim)]
        return torch.cat([pairs, columns[rotated:]]).flatten()


class CutPool:
    """A pool in parts: slices of one buffer, so that their distances are real, with guards between them."""

    GUARD = 64

    def __init__(
        self,
        model: Model,
        num_blocks: int,
        num_pools: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_blocks, self.num_pools = num_blocks, num_pools
        self.element_bytes = dtype.itemsize
        self.per_pool = -(-num_blocks // num_pools)
        block, header = math.prod(model.block_shape), POOL_HEADER_BYTES // self.element_bytes
        size = num_pools * (self.per_pool * block + header + self.GUARD)
        self.buffer = torch.randn(size, generator=generator).to(dtype)
        self.parts: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []
        at = 0
        # The parts lie in the buffer in reverse order: offsets may be negative.
        for i in reversed(range(num_pools)):
            first = header if i else 0
            self.parts.insert(0, self.buffer[at : at + first + self.per_pool * block])
            self._blocks.insert(0, self.parts[0][first:].view(self.per_pool, *model.block_shape))
            at += first + self.per_pool * block + self.GUARD

    def content(self) -> torch.Tensor:
        """All blocks in order, a copy in float32."""
        return torch.cat([blocks.float() for blocks in self._blocks])[: self.num_blocks]

    def changed_since(self, before: torch.Tensor) -> int:
        """Elements of the buffer that are other bits than in its earlier copy."""
        bits = torch.uint8 if self.element_bytes == 1 else torch.int32
        return int((self.buffer.view(bits) != before.view(bits)).sum())

    def begin(self, state: torch.Tensor, max_blocks: int, tokens: int = 1) -> None:
        """What StepBegin does for the pool, and for a step of so many tokens."""
        parts = [*self.parts, *self.parts[:1] * (MAX_POOLS - len(self.parts))]
        operator = StepBegin(100, self.num_pools, self.element_bytes, max_blocks, MAX_NUM_SEQS)
        step = integers([1, 1, STEP_MARK, tokens, 1])
        run(operator, [integers([1]), step, state, *(part.view(torch.int64) for part in parts)])


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Heads [tokens, heads, head_dim] after RoPE as in Hugging Face's LLaMA, their dimensions in pairs."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)[..., in_pairs(x.shape[-1])]


def write_and_attend(
    model: Model,
    pool: CutPool,
    query_lens: list[int],
    seq_lens: list[int],
    layer: int,
    seed: int,
    padding: tuple[int, int] = (0, 0),
    head_normed: bool = False,
    hidden: int = 40,
    tactic: int = 0,
) -> None:
    """One layer of a step over random tables, projection to attention, against the specification.

    `padding` is so many tokens of no sequence, and sequences without tokens, behind the step's.
    """
    rng = np.random.default_rng(seed)
    state = new_state(pool.num_blocks)
    pool.begin(state, pool.num_blocks, sum(query_lens))

    def random(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    half = model.head_dim // 2
    order = rng.permutation(np.arange(1, pool.num_blocks)).astype(np.int32)
    need = [-(-length // model.block_size) for length in seq_lens]
    assert sum(need) <= len(order)
    tables = torch.zeros(len(seq_lens), max(need) + 1, dtype=torch.int32)
    for i, n in enumerate(need):
        tables[i, :n] = torch.from_numpy(order[sum(need[:i]) :][:n])
    pairs = list(zip(query_lens, seq_lens, strict=True))
    positions = torch.cat([torch.arange(s - q, s, dtype=torch.int32) for q, s in pairs])
    row = torch.repeat_interleave(torch.arange(len(query_lens)), torch.tensor(query_lens))
    slots = tables[row, positions.long() // model.block_size] * model.block_size
    slots = slots + positions % model.block_size
    starts, lengths = integers([0, *np.cumsum(query_lens)]), integers(seq_lens)
    cosine, sine = random(MAX_POSITIONS, half), random(MAX_POSITIONS, half)
    # Small integers and fractions: the product is exact, and so is what it is rounded to in a pool of e4m3.
    unit = 2.0 ** -math.ceil(math.log2(50 * math.sqrt(hidden)))
    x = torch.from_numpy(rng.integers(-8, 9, (sum(query_lens), hidden))).float()
    weight = torch.from_numpy(rng.integers(-16, 17, (model.width, hidden))).float() * unit
    head_norms = random(2, model.head_dim)
    qkv = x @ weight.T

    expected_pool = pool.content()
    heads = [model.heads, model.kv_heads, model.kv_heads]
    split = torch.split(qkv.view(len(positions), -1, model.head_dim), heads, dim=1)
    cos, sin = cosine[positions.long(), None], sine[positions.long(), None]
    queries, keys = split[:2]
    if head_normed:
        queries, keys = (
            rms_norm(part, (model.head_dim,), norm, EPSILON)
            for part, norm in zip((queries, keys), head_norms, strict=True)
        )
    query, key = (turned(part, cos, sin).flatten(1) for part in (queries, keys))
    value = split[2].flatten(1)
    if pool.element_bytes == 1:
        key, value = (kept.clamp(-448, 448).to(torch.float8_e4m3fn).float() for kept in (key, value))
    expected, _, _ = paged_attention_in_place(
        query, key, value, expected_pool[:, layer, 0], expected_pool[:, layer, 1],
        slots, tables, starts, lengths, 0.3, model.heads, model.kv_heads, model.window,
    )  # fmt: skip

    before = pool.buffer.clone()
    table = torch.cat([cosine, sine], dim=1)
    tokens, (more_tokens, more_seqs) = len(positions), padding
    x, qkv = (
        torch.cat([rows, torch.full((more_tokens, rows.shape[1]), math.nan)])[:, order]
        for rows, order in ((x, torch.arange(hidden)), (qkv, model.in_pairs))
    )
    positions = torch.cat([positions, integers([0] * more_tokens)])
    slots = torch.cat([slots, integers([0] * more_tokens)])
    # Nobody fills the tables of padding in.
    tables = torch.cat([tables, torch.full((more_seqs, tables.shape[1]), 2**31 - 1, dtype=torch.int32)])
    starts = torch.cat([starts, integers([tokens] * more_seqs)])
    lengths = torch.cat([lengths, integers([0] * more_seqs)])
    to_pool = [table, positions, slots, pool.parts[0], state]
    if head_normed:
        norms = head_norms[:, in_pairs(model.head_dim)]
        (rotated,) = run(kv_write(model, pool, layer), [qkv, norms, *to_pool])
    else:
        weight = weight[model.in_pairs]
        rotated, *_ = run(project_qkv(model, pool, layer, hidden), [x, weight, *[x] * 5, *to_pool], tactic)
    torch.testing.assert_close(rotated[:tokens].flatten(1), query, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(pool.content(), expected_pool, atol=1e-6, rtol=1e-5)
    written = tokens * 2 * model.kv_heads * model.head_dim
    assert pool.changed_since(before) <= written, "something besides the step's slots changed"
    splits = run(assign_splits(model), [starts, lengths])
    attended = run(
        paged_attend(model, pool, layer), [rotated, tables, starts, lengths, *splits, pool.parts[0], state]
    )
    torch.testing.assert_close(attended[0][:tokens], expected, atol=1e-5, rtol=1e-4)
    assert attended[0][tokens:].isnan().all(), "tokens of no sequence were attended"
    assert not counters(state).any(), "a counter was left behind"


def layout(model: Model, pool: CutPool, layer: int) -> dict[str, int]:
    return {
        "layer": layer, "num_layers": model.layers, "num_heads": model.heads, "num_kv_heads": model.kv_heads,
        "head_dim": model.head_dim, "block_size": model.block_size, "max_blocks": pool.num_blocks,
        "num_pools": pool.num_pools, "blocks_per_pool": pool.per_pool,
        "kv_element_bytes": pool.element_bytes,
    }  # fmt: skip


def project_qkv(model: Model, pool: CutPool, layer: int, hidden: int) -> ProjectQkv:
    return ProjectQkv(
        k=hidden, normed=0, epsilon=0.0, biased=0, weight_group=0, weight_float=0, narrow_rows=0,
        shared_bytes=HOPPER_SHARED_BYTES, multiprocessors=12, max_positions=MAX_POSITIONS,
        **layout(model, pool, layer),
    )  # fmt: skip


def kv_write(model: Model, pool: CutPool, layer: int) -> KvWrite:
    return KvWrite(max_positions=MAX_POSITIONS, epsilon=EPSILON, **layout(model, pool, layer))


def assign_splits(model: Model) -> AssignSplits:
    return AssignSplits(model.heads, model.kv_heads, model.head_dim, model.window)


def paged_attend(model: Model, pool: CutPool, layer: int) -> PagedAttend:
    return PagedAttend(window=model.window, scale=0.3, **layout(model, pool, layer))


STEPS = {
    "decode rows and chunks": (Model(6, 2, 16, 8), 1, [1, 11, 1, 3], [50, 11, 1, 20]),
    "a pool in three parts": (Model(6, 2, 16, 8), 3, [1, 11, 1, 3], [50, 11, 1, 20]),
    "a pool in all parts": (Model(2, 1, 16, 8, layers=1), MAX_POOLS, [1, 1], [200, 30]),
    "no grouped heads": (Model(2, 2, 16, 16), 2, [1, 70], [150, 80]),
    "a group of seven": (Model(7, 1, 16, 16), 1, [1, 30], [230, 40]),
    "tiles that end within a head": (Model(3, 1, 24, 8), 1, [1, 70], [50, 80]),
    "a window": (Model(4, 2, 16, 8, window=12), 2, [1, 30], [150, 80]),
}


POOL_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=["", "fp8"])


@POOL_TYPES
@pytest.mark.parametrize("name", STEPS)
def test_write_and_attend_are_rope_and_paged_attention(name: str, dtype: torch.dtype) -> None:
    model, num_pools, query_lens, seq_lens = STEPS[name]
    pool = CutPool(model, 48, num_pools, len(name), dtype)
    write_and_attend(model, pool, query_lens, seq_lens, model.layers - 1, len(name))


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 70, 69]], ids=["few", "many"])
@pytest.mark.parametrize("tactic", range(10))
@pytest.mark.parametrize("heads", [(6, 2, 32), (3, 1, 80)], ids=["whole heads", "heads cut by tiles"])
def test_every_tile_writes_and_passes_on_what_it_should(
    heads: tuple[int, int, int], tactic: int, query_lens: list[int]
) -> None:
    model, hidden = Model(*heads, 8), 1040
    pool = CutPool(model, 48, 2, tactic)
    tiles = project_qkv(model, pool, 1, hidden).tiles
    assert len(tiles) == 10
    assert {tile.splits > 1 for tile in tiles} == {tile.tma for tile in tiles} == {True, False}
    write_and_attend(model, pool, query_lens, [90, 70, 80], 1, tactic, (130, 2), hidden=hidden, tactic=tactic)


@pytest.mark.parametrize(
    "name",
    ["decode rows and chunks", "no grouped heads", "tiles that end within a head", "a pool in three parts"],
)
def test_heads_may_be_normed_before_they_are_rotated(name: str) -> None:
    model, num_pools, query_lens, seq_lens = STEPS[name]
    pool = CutPool(model, 48, num_pools, len(name))
    write_and_attend(model, pool, query_lens, seq_lens, 0, len(name), (5, 4), head_normed=True)


@pytest.mark.parametrize("padding", [(0, 2), (5, 4), (90, 4)])
@pytest.mark.parametrize("name", ["decode rows and chunks", "a pool in three parts", "a group of seven"])
def test_padding_is_neither_written_nor_attended(name: str, padding: tuple[int, int]) -> None:
    """Among it more sequences than the step has tokens, and whole tiles of tokens."""
    model, num_pools, query_lens, seq_lens = STEPS[name]
    pool = CutPool(model, 48, num_pools, len(name))
    write_and_attend(model, pool, query_lens, seq_lens, model.layers - 1, len(name), padding)


@pytest.mark.parametrize("padding", [(1, 1), (3, 3), (30, 6)])
def test_decode_rows_have_padding_behind_them(padding: tuple[int, int]) -> None:
    """Where a sequence has one token, its tile's number is its own, and so it seems to be with padding."""
    model = Model(2, 1, 16, 8)
    for seq_lens in ([20], [20, 1]):
        pool = CutPool(model, 48, 1, 5)
        write_and_attend(model, pool, [1] * len(seq_lens), seq_lens, 1, 5, padding)


@POOL_TYPES
def test_write_and_attend_over_random_steps(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(11)
    for seed in range(3):
        group, kv_heads = int(rng.integers(1, 6)), int(rng.integers(1, 3))
        model = Model(group * kv_heads, kv_heads, 16, 8, 1, window=int(rng.choice([0, 0, 20])))
        seqs = int(rng.integers(1, 5))
        query_lens = [int(n) for n in np.where(rng.random(seqs) < 0.5, 1, rng.integers(1, 30, seqs))]
        seq_lens = [int(q + rng.integers(0, 90)) for q in query_lens]
        pool = CutPool(model, 64, int(rng.integers(1, 5)), seed, dtype)
        padding = int(rng.integers(0, 40)), int(rng.integers(0, 9))
        write_and_attend(model, pool, query_lens, seq_lens, 0, seed, padding)


def split_early(monkeypatch: pytest.MonkeyPatch, whole: int) -> None:
    """Contexts of more than so many keys may be split, into parts of as many or half as many."""
    for module in (assign_splits_module, paged_attend_module):
        monkeypatch.setattr(module, "WHOLE", whole)
    for name, keys in {"ROW_MIN_SPLIT": whole // 2, "TILE_MIN_SPLIT": whole, "LONG_SPLIT": whole}.items():
        monkeypatch.setattr(assign_splits_module, name, keys)


@pytest.mark.parametrize("heads", [(4, 1), (6, 2), (5, 5), (7, 1), (28, 4)])
def test_assigned_splits_are_attended(heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and chunks, a window, KV heads that share tiles; and steps for whose splits there is no room."""
    split_early(monkeypatch, 16)
    monkeypatch.setattr(paged_attend_module, "PROGRAMS_AT_A_TIME", 6)
    rng = np.random.default_rng(sum(heads))
    steps = [([1, 1, 1, 17, 1], [200, 200, 90, 210, 60]), ([1] * 9, [250, 3, 41, 80, 1, 40, 100, 7, 160])]
    # With twelve splits a row all but the last two sequences of the last step take all places.
    steps += [([1, 40, 30], [130, 130, 170]), ([1, 1, 2, 2, 1], [250, 250, 250, 250, 60])]
    for number, (query_lens, seq_lens) in enumerate(steps):
        for wanted in (4, 12) if number != 1 else (4,):
            monkeypatch.setattr(assign_splits_module, "PROGRAMS_WANTED", wanted * heads[1])
            window = int(rng.choice([0, 90])) if number < 3 else 0
            model = Model(*heads, 16, 8, layers=1, window=window)
            pool = CutPool(model, 160, 1, number)
            write_and_attend(model, pool, query_lens, seq_lens, 0, number, (3, 2))


@POOL_TYPES
def test_garbage_integers_neither_crash_nor_hang_nor_touch_anything_else(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros, any 32-bit numbers, and numbers near the valid ones, in every integer input at once."""
    split_early(monkeypatch, 8)
    monkeypatch.setattr(assign_splits_module, "PROGRAMS_WANTED", 8)
    rng = np.random.default_rng(12)
    model = Model(4, 2, 16, 8, layers=1)
    most = 2**31 - 1
    tactics = project_qkv(model, CutPool(model, 12, 1, 0, dtype), 0, 40).num_tactics
    for attempt in (*range(6), 11):
        timed = attempt == 11  # as TensorRT times tactics: no step has been, and the state may be anything
        pool = CutPool(model, 12, 1 + attempt % 3, attempt, dtype)
        state = new_state(12)
        if not timed:
            pool.begin(state, 12)
        else:
            state[: STEP_SIZE_BYTE // 8 + 2] = int(rng.integers(1, 2**40))
        if attempt % 4 == 0:
            state[0] = int(rng.choice([0, -5, 2**62]))
        seqs, tokens, blocks = 3, 9, 4
        low, high = ((0, 1), (-most, most), (-3, 15))[attempt % 3]

        def draw(shape: tuple[int, ...], low: int = low, high: int = high) -> torch.Tensor:
            return torch.from_numpy(rng.integers(low, high, shape, dtype=np.int32))

        x, weight = torch.ones(tokens, 40), torch.ones(model.width, 40)
        table = torch.ones(MAX_POSITIONS, 16)
        before = pool.buffer.clone()
        positions, slots = draw((tokens,)), draw((tokens,))
        to_pool = [table, positions, slots, pool.parts[0], state]
        tactic = attempt % tactics
        rotated, *_ = run(project_qkv(model, pool, 0, 40), [x, weight, *[x] * 5, *to_pool], tactic)
        written = {s for s in slots.tolist() if 8 <= s < 12 * 8} if state[0] >= 12 else set()
        if timed:
            assert written
            assert not pool.changed_since(before), "something was written before the first step"
            continue
        changed = pool.changed_since(before)
        assert changed <= len(written) * 2 * 2 * 16
        assert bool(changed) == bool(written)
        tables, starts, lengths = draw((seqs, blocks)), draw((seqs + 1,)), draw((seqs,))
        splits = run(assign_splits(model), [starts, lengths])
        if attempt % 2:
            splits = [draw(tuple(given.shape)) for given in splits]
        attended = run(
            paged_attend(model, pool, 0), [rotated, tables, starts, lengths, *splits, pool.parts[0], state]
        )[0]
        assert attended.shape == (tokens, 4 * 16)
        assert attempt % 2 or not counters(state).any(), "a counter was left behind"
        if state[0] <= 0:
            assert not attended.nan_to_num().any(), "a pool without blocks was read"


def test_attention_over_a_pool_of_few_bits_is_exact() -> None:
    """Over what is in the pool, e4m3 costs nothing: heads of every size, decode rows and full tiles."""
    rng = np.random.default_rng(13)
    for head_dim in (6, 16, 24, 48, 160):
        model = Model(4, 2, head_dim, 16, layers=1)
        pool = CutPool(model, 12, 2, head_dim, torch.float8_e4m3fn)
        state = new_state(12)
        pool.begin(state, 12)
        tables, starts, lengths = (
            integers([3, 7, 1, 5, 2, 0]).view(2, 3),
            integers([0, 1, 36]),
            integers([41, 35]),
        )
        query = torch.from_numpy(rng.standard_normal((36, 4, head_dim)).astype(np.float32))
        splits = run(assign_splits(model), [starts, lengths])
        attended, *_ = run(
            paged_attend(model, pool, 0), [query, tables, starts, lengths, *splits, pool.parts[0], state]
        )
        kept = pool.content()[:, 0]
        positions = torch.cat([torch.tensor([40]), torch.arange(35)])
        blocks = torch.cat([tables[0, 2:], tables[1].repeat_interleave(16)[:35]]).long()
        key, value = (kept[blocks, i, :, positions % 16].flatten(1) for i in range(2))
        slots = (blocks * 16 + positions % 16).to(torch.int32)
        expected, _, _ = paged_attention_in_place(
            query.flatten(1), key, value, kept[:, 0], kept[:, 1], slots, tables, starts, lengths, 0.3, 4, 2, 0
        )
        torch.testing.assert_close(attended, expected, atol=1e-5, rtol=1e-4)


def test_scratch_and_counters_hold_every_split() -> None:
    """Partial results and counters have fixed sizes; no step may want more of them."""
    for heads, kv_heads in ((32, 8), (28, 4), (4, 2), (64, 8), (32, 32), (40, 40), (8, 1), (71, 1)):
        attend = PagedAttend(0, 1, heads, kv_heads, 64, 16, 100, 1, 100, 2, 0, 0.125)
        assign = AssignSplits(heads, kv_heads, 64, 0)
        wanted = assign.launch([(2,), (1,)], PlainArithmetic()).constants
        ((spare,), _), *_ = assign.outputs([(2,), (1,)])
        assert spare == wanted["NUM_SPARE"]
        assert spare * kv_heads <= NUM_COUNTERS
        for seqs in (1, 2, 3, 7, 16, 31, 64, 200, 512, 1024):
            for tokens in (seqs, seqs + 1, seqs + 13, seqs + 100, seqs + 700):
                shapes = [(tokens, heads, 64), (seqs, 9), (seqs + 1,), (seqs,), (spare,), (seqs,), (1,), (1,)]
                _, ((rows, *_), _), _ = attend.outputs(shapes)
                launch = attend.launch(shapes, PlainArithmetic())
                tokens_per_tile = launch.constants["ROWS"] // (heads // kv_heads)
                assert tokens_per_tile == wanted["TOKENS_PER_TILE"]
                assert rows == 2 * spare * tokens_per_tile
                tiles, beyond = divmod(launch.grid[0], kv_heads)
                assert not beyond
                assert tiles - spare >= max(seqs, tokens // tokens_per_tile)


def test_long_contexts_are_split_by_what_they_read() -> None:
    """No tile of a short context is, each of a long one as often as its share of all keys is worth."""
    rng = np.random.default_rng(14)
    most = cut = 0
    for attempt in range(62):
        heads, kv_heads, window = int(rng.choice([1, 4, 71])), int(rng.choice([1, 2, 8])), 0
        if attempt % 4 == 3:
            window = int(rng.choice([100, 5000]))
        assign = AssignSplits(heads * kv_heads, kv_heads, 64, window)
        seqs = int(rng.choice([1, 2, 5, 130, 300]))
        query_lens = np.where(rng.random(seqs) < 0.8, 1, rng.integers(1, 300, seqs))
        longest = int(rng.choice([200, 1_000, 50_000]))
        seq_lens = query_lens + np.where(rng.random(seqs) < 0.5, rng.integers(0, longest, seqs), 0)
        if attempt >= 60:  # rows, and chunks whose splits find no room, the last of them of one split
            heads, kv_heads, window = 4, 8, 0
            query_lens, seq_lens = np.array([1, 64, 64]), np.array([60000, 32064, 564])
            assign, seqs = AssignSplits(heads * kv_heads, kv_heads, 64, window), 3
        padding = int(rng.choice([0, 3, 200]))
        starts = [0, *np.cumsum(query_lens), *[query_lens.sum()] * padding]
        spare_tiles, seq_spares = run(assign, [integers(starts), integers([*seq_lens, *[0] * padding])])
        constants = assign.launch([(2,), (1,)], PlainArithmetic()).constants
        per_tile, num_spare = constants["TOKENS_PER_TILE"], constants["NUM_SPARE"]
        tiles = -(-query_lens // per_tile)
        keys = np.minimum(seq_lens, window + per_tile) if window else seq_lens
        total = int((tiles * keys).sum())
        fair = -(-total // num_spare)
        is_long = (query_lens == 1) & (keys > constants["LONG_SPLIT"])
        long_share = max(-(-int(keys[is_long].sum()) // num_spare), constants["LONG_SPLIT"])
        expected: list[int] = []
        taken = 0
        for seq, query_len in enumerate(query_lens.tolist()):
            length = int(keys[seq])
            if query_len == 1:
                splits = max(length // max(fair, constants["ROW_MIN_SPLIT"]), -(-length // long_share))
                splits = min(splits, constants["MOST"])
            else:
                splits = length // max(fair, constants["TILE_MIN_SPLIT"])
            spares = max(splits - 1, 0) if length > constants["WHOLE"] else 0
            if taken + spares * tiles[seq] > num_spare:
                cut += 1
                spares = 0
            assert int(seq_spares[seq]) == (len(expected) * 256 + spares if spares else 0)
            taken += max(splits - 1, 0) * int(tiles[seq]) if length > constants["WHOLE"] else 0
            first = seq + (starts[seq] - seq) // per_tile
            for tile in range(first, first + tiles[seq]):
                expected += [tile] * spares
        assert len(expected) <= num_spare
        assert spare_tiles.tolist() == expected + [-1] * (num_spare - len(expected))
        most = max(most, len(expected))
    assert most > 50
    assert cut == 4, "the chunks of the last two steps, and nothing else"


def begin_step(
    state: torch.Tensor,
    ids: list[int],
    step: list[int],
    *,
    size: tuple[int, int, int] = (STEP_MARK, 1, 1),
    num_pools: int = 1,
    max_blocks: int = 50,
) -> tuple[list[int], list[int], list[int]]:
    pools = [torch.zeros(100, dtype=torch.int64) for _ in range(num_pools)]
    pools += pools[:1] * (MAX_POOLS - num_pools)
    operator = StepBegin(100, num_pools, 2, max_blocks, MAX_NUM_SEQS)
    outputs = run(operator, [integers(ids), integers([*step, *size]), state, *pools])
    if num_pools > 1:
        offsets = state[POOL_OFFSETS_BYTE // 8 :][:num_pools].tolist()
        first = pools[0].data_ptr()
        later = [(pool.data_ptr() + POOL_HEADER_BYTES - first) // 2 for pool in pools[1:num_pools]]
        assert offsets == [0, *later]
    return outputs[0].tolist(), outputs[1].tolist(), outputs[2].tolist()


def test_step_begin_takes_the_tokens_of_the_step_before() -> None:
    state = new_state(20)
    sampled = state.view(torch.int32)[SAMPLED_IDS_BYTE // 4 :][:MAX_NUM_SEQS]
    sampled[:] = integers([40, 41, 42, 43, 44, 45, -1, 100])
    ids, _, _ = begin_step(state, [5, -1, 99, -3, -7, -8, 100, 2**31 - 1, -(2**31), -9], [1, 1])
    assert ids == [5, 40, 99, 42, 0, 99, 99, 99, 99, 99]
    many = list(range(90)) + [-1] * 200
    assert begin_step(state, many, [1, 1])[0] == list(range(90)) + [40] * 200
    assert sampled.tolist() == [40, 41, 42, 43, 44, 45, -1, 100]


def test_step_begin_gives_a_new_pool_its_epoch_once() -> None:
    state = new_state(20)
    assert begin_step(state, [1], [0, 0]) == ([1], [20, 0], [0])  # a host that tries the plan on zeros
    assert begin_step(state, [1], [7, 1234]) == ([1], [20, 1234], [7])
    assert begin_step(state, [1], [8, 999]) == ([1], [20, 1234], [8])
    assert int(state.view(torch.int32)[EPOCH_BYTE // 4]) == 1234
    assert not counters(state).any()


def test_step_begin_believes_no_pool_larger_than_the_plans() -> None:
    for given, believed in ((50, 50), (51, 50), (2**40, 50), (0, 0), (-3, 0)):
        assert begin_step(new_state(given), [1], [1, 5])[1] == [believed, 5]


@pytest.mark.parametrize("num_pools", [2, 5, MAX_POOLS])
def test_step_begin_notes_where_the_parts_of_the_pool_are(num_pools: int) -> None:
    begin_step(new_state(20), [1], [1, 1], num_pools=num_pools)


def test_step_begin_notes_how_many_tokens_and_rows_are_no_padding() -> None:
    state = new_state(20)
    noted = state[STEP_SIZE_BYTE // 8 :][:2]
    before = state.clone()
    for mark, tokens, rows in ((STEP_MARK, 1, 0), (STEP_MARK, 8192, 256), (0, 0, 0), (STEP_MARK, 3, 2)):
        begin_step(state, [1] * 300, [7, 1], size=(mark, tokens, rows))
        assert (noted >> 32).tolist() == [mark] * 2
        assert (noted & 0xFFFFFFFF).tolist() == [tokens, rows]
    for size in ((-1, -1, -1), (STEP_MARK, -1, -(2**31)), (2**31 - 1, 2**31 - 1, 2**31 - 1)):
        begin_step(state, [1], [7, 1], size=size)
    noted[:], state[EPOCH_BYTE // 8] = 0, 0
    assert torch.equal(state, before), "something else was written"
