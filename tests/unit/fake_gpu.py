"""A GPU and a plan made of numpy: work runs when the test says, and misuse of memory is an error.

The plan's model is a hash. It keeps the tokens in the KV pool and samples from a hash of all tokens of a
sequence, as `next_token` computes it from a list; a step that reads a wrong slot gives another token.

Its kernels want more shared memory than every program has, and a context that sees other shapes than at
first, or padding that is not what `quire.execution.padding` says, is an error.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from quire.errors import StartupError
from quire.execution.engine_state import (
    EPOCH_BYTE,
    NUM_BLOCKS_BYTE,
    POOL_HEADER_BYTES,
    SAMPLED_IDS_BYTE,
    STEP_MARK,
)
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    PlanDetails,
)
from quire.execution.tensorrt.device import ALIGNMENT, DeviceError, DeviceMemory, DeviceProperties
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES

VOCAB_SIZE, BLOCK_SIZE = 97, 4
LIMITS = EngineLimits(max_num_seqs=12, max_num_batched_tokens=200, max_model_len=40)
KV_BYTES_PER_BLOCK = 8 * BLOCK_SIZE
DETAILS = PlanDetails(
    max_blocks=1 << 22,
    num_pools=1,
    blocks_per_pool=1 << 22,
    profiles=((1, 4), (5, 16), (17, 200)),
    step_sizes=(1, 2, 4, 8, 12, 16, 32, 64, 200),
    kernel_shared_bytes=227 * 1024,
    gpu_architecture=90,
    gpu_name="Fake H100",
)
MANIFEST = Manifest(
    version=MANIFEST_VERSION,
    model=ModelDimensions("Hash", VOCAB_SIZE, 1, 1, 1, 8),
    block_size=BLOCK_SIZE,
    limits=LIMITS,
    precision="bf16",
    kv_cache_dtype="bf16",
    runtime="tensorrt",
    runtime_version="11.2.1.2",
    inputs=(),
    outputs=(),
    kv_bytes_per_block=KV_BYTES_PER_BLOCK,
    checkpoint_digest="0" * 64,
    files={},
    gate=GateReport(),
    plan=DETAILS,
)
GREEDY = (0.0, 0.0, 1.0, 0.0, 0.0)
NOBODYS = -77
"""A token that rows of padding are left with."""


def next_token(token_ids: Sequence[int], uniform: float = 0.0) -> int:
    """What the plan samples after these tokens."""
    state = 17
    for token in token_ids:
        state = (state * 31 + token + 1) % 1_000_003
    return (state + int(uniform * VOCAB_SIZE)) % VOCAB_SIZE


@dataclass(eq=False)
class FakeGraph:
    work: list[Callable[[], None]]
    alive: bool = True


@dataclass(eq=False)
class FakeEvent:
    done: bool = True


class FakeDevice:
    """`Device`: addresses are never used twice, memory comes full of garbage.

    With `held` nothing that is queued runs before `run`; else it runs when somebody asks for an event.
    """

    stream = 1

    def __init__(self, total_bytes: int = 256 << 20, graph_bytes: int = 4096) -> None:
        self.properties = DeviceProperties("Fake H100", 90)
        self.total_bytes, self.graph_bytes = total_bytes, graph_bytes
        self.allocations: dict[int, NDArray[np.uint8]] = {}
        self.pinned_memory: list[NDArray[np.uint8]] = []
        self.graphs: list[FakeGraph] = []
        self.launched: list[FakeGraph] = []
        self.copied_out: list[int] = []
        self.allowed: list[int] = []
        """What `allow_shared_memory` was asked for."""
        self.shared_bytes = DEFAULT_SHARED_BYTES
        """What kernels that are queued now may have."""
        self.held = False
        self.error = ""
        self.launch_error = ""
        self.allowing_error = ""
        self.closed = False
        self._next_address = 1 << 20
        self._queue: deque[Callable[[], None]] = deque()
        self._capturing: list[Callable[[], None]] | None = None

    @property
    def capturing(self) -> bool:
        return self._capturing is not None

    def queue(self, work: Callable[[], None]) -> None:
        self._refuse_if_broken()
        if self._capturing is not None:
            self._capturing.append(work)
        else:
            self._queue.append(work)

    def run(self) -> None:
        """Run everything that is queued."""
        while self._queue:
            self._queue.popleft()()

    def at(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        """Bytes of the GPU's memory, which must lie in one allocation that was not freed."""
        for base, memory in self.allocations.items():
            if base <= address and address + num_bytes <= base + len(memory):
                return memory[address - base : address - base + num_bytes]
        raise AssertionError(f"{num_bytes} bytes at {address:#x} are not allocated")

    def memory(self) -> DeviceMemory:
        self._refuse_if_broken()
        used = sum(map(len, self.allocations.values())) + self.graph_bytes * len(self.graphs)
        return DeviceMemory(self.total_bytes - used, self.total_bytes)

    def allocate(self, num_bytes: int) -> int:
        if num_bytes > self.memory().free:
            raise DeviceError("cudaMalloc failed with cudaErrorMemoryAllocation")
        address = self._next_address
        self._next_address += -(-num_bytes // ALIGNMENT) * ALIGNMENT + 4096
        self.allocations[address] = np.full(num_bytes, 0xA5, np.uint8)
        return address

    def free(self, address: int) -> None:
        self._refuse_if_broken()
        assert not self._queue, "memory is freed under work that is queued"
        del self.allocations[address]

    def pinned(self, num_bytes: int) -> NDArray[np.uint8]:
        self._refuse_if_broken()
        memory = np.zeros(num_bytes, np.uint8)
        self.pinned_memory.append(memory)
        return memory

    def free_pinned(self, memory: NDArray[np.uint8]) -> None:
        assert not self._queue, "memory is freed under work that is queued"
        index = next(i for i, known in enumerate(self.pinned_memory) if known is memory)
        del self.pinned_memory[index]

    def copy_in(self, address: int, source: NDArray[Any]) -> None:
        self.copy_rows_in(address, source.nbytes, source.reshape(1, -1))

    def copy_rows_in(self, address: int, pitch: int, source: NDArray[Any]) -> None:
        self._check_pinned(source)
        then = source.copy()

        def copy() -> None:
            assert np.array_equal(source, then), "host memory changed under a copy that was queued"
            for row, values in enumerate(source):
                self.at(address + row * pitch, values.nbytes)[:] = values.view(np.uint8)

        assert self._capturing is None
        self.queue(copy)

    def copy_out(self, target: NDArray[Any], address: int) -> None:
        self._check_pinned(target)
        self.copied_out.append(target.nbytes)

        def copy() -> None:
            target.reshape(-1).view(np.uint8)[:] = self.at(address, target.nbytes)

        assert self._capturing is None
        self.queue(copy)

    def clear(self, address: int, num_bytes: int) -> None:
        self.queue(lambda: self.at(address, num_bytes).fill(0))

    def event(self) -> FakeEvent:
        return FakeEvent()

    def record(self, event: FakeEvent) -> None:
        event.done = False
        self.queue(lambda: setattr(event, "done", True))

    def is_done(self, event: FakeEvent) -> bool:
        self._refuse_if_broken()
        if not self.held:
            self.run()
        return event.done

    def synchronize(self) -> None:
        self._refuse_if_broken()
        self.run()

    @contextlib.contextmanager
    def allow_shared_memory(self, most_bytes: int) -> Iterator[None]:
        if self.allowing_error:
            raise StartupError(self.allowing_error)
        assert self.shared_bytes == DEFAULT_SHARED_BYTES, "it is allowed already"
        self.allowed.append(most_bytes)
        self.shared_bytes = max(most_bytes, DEFAULT_SHARED_BYTES)
        try:
            yield
        finally:
            self.shared_bytes = DEFAULT_SHARED_BYTES

    def capture(self, enqueue: Callable[[], None]) -> FakeGraph:
        assert not self._queue, "TensorRT wants the stream idle"
        self._capturing = []
        enqueue()
        graph = FakeGraph(self._capturing)
        self._capturing = None
        self.graphs.append(graph)
        return graph

    def launch(self, graph: FakeGraph) -> None:
        assert graph in self.graphs
        if self.launch_error:
            raise DeviceError(self.launch_error)
        self.launched.append(graph)
        for work in graph.work:
            self.queue(work)

    def free_graph(self, graph: FakeGraph) -> None:
        self._refuse_if_broken()
        self.graphs.remove(graph)

    def close(self) -> None:
        self.closed = True

    def _refuse_if_broken(self) -> None:
        if self.error:
            raise DeviceError(self.error)

    def _check_pinned(self, array: NDArray[Any]) -> None:
        assert array.flags.c_contiguous
        assert any(np.shares_memory(array, memory) for memory in self.pinned_memory), "not pinned"


@dataclass
class Run:
    """A step that the plan has computed: its profile, the shapes, and what of them is no padding."""

    profile: int
    size: int
    num_seqs: int
    num_rows: int
    num_table_columns: int
    tokens: int
    rows: int


class FakePlan:
    """`Plan` of the hash model."""

    scratch_bytes = 512

    def __init__(self, device: FakeDevice, **details: Any) -> None:
        self.device = device
        self.details = msgspec.structs.replace(DETAILS, **details)
        self.manifest = msgspec.structs.replace(MANIFEST, plan=self.details)
        self.runs: list[Run] = []
        self.contexts: list[FakeContext] = []
        self.step_added = 0
        """What the number of a step comes back with too much."""
        self.closed = False

    def context(self, profile: int, scratch: int) -> FakeContext:
        self.device.at(scratch, self.scratch_bytes)
        self.contexts.append(FakeContext(self, profile))
        return self.contexts[-1]

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeContext:
    plan: FakePlan
    profile: int
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    loaded_for: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """The shapes that it has run with."""

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self.shapes[name] = shape

    def set_address(self, name: str, address: int) -> None:
        assert address % ALIGNMENT == 0, name
        self.addresses[name] = address

    def enqueue(self) -> None:
        device = self.plan.device
        assert device.shared_bytes >= self.plan.details.kernel_shared_bytes, "too little shared memory"
        assert self.loaded_for or not device.capturing, "TensorRT wants to run a step before its capture"
        self.loaded_for = self.loaded_for or dict(self.shapes)
        assert self.shapes == self.loaded_for, "for other shapes TensorRT loads its kernels anew"
        bound = _Bound(self.plan, self.profile, dict(self.shapes), dict(self.addresses))
        bound.check()
        self.plan.device.queue(bound.run)


@dataclass
class _Bound:
    """A step with the shapes and addresses that it was queued with."""

    plan: FakePlan
    profile: int
    shapes: dict[str, tuple[int, ...]]
    addresses: dict[str, int]

    def check(self) -> None:
        """Refuse shapes outside the profile, contradictions, and tensors that share memory."""
        fewest, most = self.plan.details.profiles[self.profile]
        shapes, (num_tokens,), (num_seqs,) = self.shapes, self.shapes["input_ids"], self.shapes["seq_lens"]
        (num_rows,) = shapes["logits_indices"]
        most_seqs = min(most, LIMITS.max_num_seqs)
        assert fewest <= num_tokens <= most
        assert 1 <= num_seqs <= most_seqs
        assert 1 <= num_rows <= most_seqs
        assert shapes["positions"] == shapes["slot_mapping"] == (num_tokens,)
        assert shapes["query_start_loc"] == (num_seqs + 1,)
        assert shapes["block_tables"][0] == num_seqs
        assert shapes["sampling"] == (num_rows, 5)
        assert shapes["step"] == (5,)
        shapes["logits"], shapes["sampled_ids"] = (num_rows, VOCAB_SIZE), (num_rows,)
        shapes["pool_info"], shapes["step_done"] = (2,), (1,)
        assert set(shapes) == set(self.addresses)
        regions = sorted(
            (address, address + self._num_bytes(name)) for name, address in self.addresses.items()
        )
        for (_, end), (start, _) in itertools.pairwise(regions):
            assert end <= start, "tensors overlap"

    def run(self) -> None:
        tensor = {name: self._tensor(name) for name in self.shapes}
        (size,), (num_rows,) = self.shapes["input_ids"], self.shapes["logits_indices"]
        num_seqs, columns = self.shapes["block_tables"]
        step, candidate, mark, tokens, rows = tensor["step"].tolist()
        self.plan.runs.append(Run(self.profile, size, num_seqs, num_rows, columns, tokens, rows))
        assert mark == STEP_MARK
        _check_padding(tensor, tokens, rows)
        state = tensor["engine_state"].view(np.uint8)
        num_blocks = int(state[NUM_BLOCKS_BYTE:][:8].view(np.int64)[0])
        epoch = state[EPOCH_BYTE:][:4].view(np.int32)
        if not epoch[0]:
            epoch[0] = candidate
        sampled_before = state[SAMPLED_IDS_BYTE:].view(np.int32)

        ids = tensor["input_ids"][:tokens].copy()
        ids[ids < 0] = sampled_before[-1 - ids[ids < 0]]
        for token, slot in zip(ids.tolist(), tensor["slot_mapping"][:tokens].tolist(), strict=True):
            if slot >= BLOCK_SIZE:
                self._slot(slot // BLOCK_SIZE, slot % BLOCK_SIZE, num_blocks)[0] = token
        starts = tensor["query_start_loc"].tolist()
        tensor["logits"].fill(math.nan)
        tensor["sampled_ids"].fill(NOBODYS)
        for row, index in enumerate(tensor["logits_indices"][:rows].tolist()):
            sequence = next(s for s in range(num_seqs) if starts[s] <= index < starts[s + 1])
            table = tensor["block_tables"][sequence].tolist()
            position = int(tensor["positions"][index])
            assert position == tensor["seq_lens"][sequence] - (starts[sequence + 1] - index)
            known = [
                int(self._slot(table[p // BLOCK_SIZE], p % BLOCK_SIZE, num_blocks)[0])
                for p in range(position + 1)
            ]
            temperature, *_, uniform = tensor["sampling"][row].tolist()
            chosen = next_token(known)
            tensor["logits"][row] = -((np.arange(VOCAB_SIZE) - chosen) % VOCAB_SIZE)
            tensor["sampled_ids"][row] = next_token(known, uniform if temperature else 0.0)
        sampled_before[:rows] = tensor["sampled_ids"][:rows]
        tensor["pool_info"][:] = num_blocks, epoch[0]
        tensor["step_done"][:] = step + self.plan.step_added

    def _num_bytes(self, name: str) -> int:
        wide = name == "engine_state" or name.startswith("kv_cache")
        return math.prod(self.shapes[name]) * (8 if wide else 4)

    def _tensor(self, name: str) -> NDArray[Any]:
        wide = name == "engine_state" or name.startswith("kv_cache")
        dtype = np.int64 if wide else np.float32 if name in ("logits", "sampling") else np.int32
        memory = self.plan.device.at(self.addresses[name], self._num_bytes(name))
        return memory.view(dtype).reshape(self.shapes[name])

    def _slot(self, block: int, offset: int, num_blocks: int) -> NDArray[np.int64]:
        """Where the pool keeps the token of a slot."""
        assert 0 <= block < num_blocks
        pool, block = divmod(block, self.plan.details.blocks_per_pool)
        start = self.addresses[f"kv_cache.{pool}"] + (POOL_HEADER_BYTES if pool else 0)
        address = start + block * KV_BYTES_PER_BLOCK + 8 * offset
        return self.plan.device.at(address, 8).view(np.int64)


def _check_padding(tensor: dict[str, NDArray[Any]], tokens: int, rows: int) -> None:
    """Tokens of no sequence in slot 0, sequences without tokens at the end, rows that are greedy."""
    assert 1 <= tokens <= len(tensor["input_ids"])
    assert 0 <= rows <= len(tensor["logits_indices"])
    for name in ("input_ids", "positions", "slot_mapping"):
        assert not tensor[name][tokens:].any(), name
    starts, lengths = tensor["query_start_loc"], tensor["seq_lens"]
    assert starts[0] == 0
    assert starts[-1] == tokens
    counts = np.diff(starts)
    num_seqs = int((counts > 0).sum())
    assert (counts[:num_seqs] > 0).all(), "a sequence without tokens precedes one that has some"
    assert not counts[num_seqs:].any()
    assert (lengths[:num_seqs] >= counts[:num_seqs]).all()
    assert not lengths[num_seqs:].any()
    assert (tensor["logits_indices"] < tokens).all()
    assert not tensor["logits_indices"][rows:].any()
    assert not tensor["sampling"][rows:].any()
