"""The block pool against a model that keeps everything in plain lists."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quire.scheduling.block_pool import Block, BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Tables come and go; the model's free list is a list, its cache an ordered list of pairs."""

    @initialize(num_blocks=st.integers(2, 9))
    def make(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.free = list(range(1, num_blocks))
        self.cached: list[tuple[bytes, int]] = []
        self.tables: list[list[Block]] = []

    def hash_of(self, block_id: int) -> bytes | None:
        return next((block_hash for block_hash, cached_id in self.cached if cached_id == block_id), None)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.free)))
        taken = self.pool.take(count)
        expected, self.free = self.free[:count], self.free[count:]
        assert [block.block_id for block in taken] == expected
        self.cached = [entry for entry in self.cached if entry[1] not in expected]
        self.tables.append(taken)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from([b"a", b"b", b"c"]))
    def cache(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from([block for table in self.tables for block in table]))
        if self.hash_of(block.block_id) is None:
            self.pool.cache(block, name)
            self.cached.append((name, block.block_id))

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.cached))
        self.pool.forget(self.pool.blocks[entry[1]])
        self.cached.remove(entry)

    @rule(names=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True))
    def find_and_share(self, names: list[bytes]) -> None:
        expected = []
        for name in names:
            found = next((block_id for block_hash, block_id in self.cached if block_hash == name), None)
            if found is None:
                break
            expected.append(found)
        blocks = self.pool.find_longest_prefix(names)
        assert [block.block_id for block in blocks] == expected
        self.pool.share(blocks)
        self.free = [block_id for block_id in self.free if block_id not in expected]
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(reversed(table))
        still_owned = {block.block_id for other in self.tables for block in other}
        freed = [block.block_id for block in reversed(table) if block.block_id not in still_owned]
        worthless = [block_id for block_id in freed if self.hash_of(block_id) is None]
        self.free = worthless + self.free + [block_id for block_id in freed if block_id not in worthless]

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.cached = []

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity(Counter(block.block_id for table in self.tables for block in table))
            assert self.pool.num_free_blocks == len(self.free)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
