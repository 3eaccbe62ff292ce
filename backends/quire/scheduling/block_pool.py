"""The blocks of the KV pool: which are free, in what order they are used again, and which a prefix can find.

A block is free, cached or owned. Owned: in the table of `ref_count` requests. Free: in the free list.
Cached: its contents can be found by hash; it may be owned at the same time, or free, and then it loses its
hash only when it is taken for something else. Who owns what is the KV cache manager's business.

The free list decides every block id, so its order is a contract (it is vLLM's): blocks are taken from the
front; of the blocks that a request gives back, those without a hash go to the front, since nothing is lost
with them, and hashed ones to the back, so that the least recently used is lost first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from quire.scheduling.prefix_hash import BlockHash


class Block:
    """A block of the pool and, while it is free, a node of the free list."""

    __slots__ = ("block_hash", "block_id", "next_free", "previous_free", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.block_hash: BlockHash | None = None
        # Meaningful only while the block is free; alone, it is a ring of one.
        self.previous_free = self
        self.next_free = self


class BlockPool:
    """All blocks but the null block (id 0), which is never handed out.

    Args:
        num_blocks: blocks of the pool, the null block included.
    """

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.num_free_blocks = 0
        # The null block is never free, so it can close the free list into a ring: no end is a special case.
        self._ring = self.blocks[0]
        self._insert_after(self._ring, self.blocks[1:])
        # Two requests that compute the same block at the same time both keep theirs (tables only grow at
        # the end); the block cached first is found, the others stand by in order.
        self._cached: dict[BlockHash, Block] = {}
        self._duplicates: dict[BlockHash, list[Block]] = {}

    def take(self, count: int) -> list[Block]:
        """Take blocks from the front of the free list; each is then owned once and cached no longer.

        `count` must be at most `num_free_blocks`.
        """
        taken: list[Block] = []
        block = self._ring.next_free
        for _ in range(count):
            if block.block_hash is not None:
                self.forget(block)
            block.ref_count = 1
            taken.append(block)
            block = block.next_free
        self._ring.next_free = block
        block.previous_free = self._ring
        self.num_free_blocks -= count
        return taken

    def share(self, blocks: Iterable[Block]) -> None:
        """Add an owner to cached blocks; those that were free leave the free list."""
        for block in blocks:
            if block.ref_count == 0:
                block.previous_free.next_free = block.next_free
                block.next_free.previous_free = block.previous_free
                self.num_free_blocks -= 1
            block.ref_count += 1

    def release(self, blocks: Iterable[Block]) -> None:
        """Take an owner from each block; those left without become free, to be used again in this order."""
        unhashed: list[Block] = []
        hashed: list[Block] = []
        for block in blocks:
            block.ref_count -= 1
            if block.ref_count == 0:
                (unhashed if block.block_hash is None else hashed).append(block)
        if unhashed:
            self._insert_after(self._ring, unhashed)
        if hashed:
            self._insert_after(self._ring.previous_free, hashed)

    def _insert_after(self, node: Block, blocks: Sequence[Block]) -> None:
        """Put blocks, in their order, into the free list behind `node`."""
        following = node.next_free
        for block in blocks:
            node.next_free = block
            block.previous_free = node
            node = block
        node.next_free = following
        following.previous_free = node
        self.num_free_blocks += len(blocks)

    def cache(self, block: Block, block_hash: BlockHash) -> None:
        """Let a full block be found by its hash."""
        block.block_hash = block_hash
        if self._cached.setdefault(block_hash, block) is not block:
            self._duplicates.setdefault(block_hash, []).append(block)

    def forget(self, block: Block) -> None:
        """Take a cached block's hash; a duplicate, if there is one, is found in its place."""
        block_hash = block.block_hash
        assert block_hash is not None
        block.block_hash = None
        duplicates = self._duplicates.get(block_hash)
        if duplicates is None:
            del self._cached[block_hash]
            return
        if self._cached[block_hash] is block:
            self._cached[block_hash] = duplicates.pop(0)
        else:
            duplicates.remove(block)
        if not duplicates:
            del self._duplicates[block_hash]

    def forget_all(self) -> None:
        """Take every block's hash: nothing that is in the pool now will be found again."""
        for block in self.blocks:
            block.block_hash = None
        self._cached.clear()
        self._duplicates.clear()

    def find_longest_prefix(self, block_hashes: Iterable[BlockHash]) -> list[Block]:
        """The cached blocks of the given hashes, up to the first that is not cached."""
        find = self._cached.get
        found: list[Block] = []
        for block_hash in block_hashes:
            block = find(block_hash)
            if block is None:
                break
            found.append(block)
        return found

    def check_integrity(self, owners: Counter[int]) -> None:
        """Prove that the books balance.

        Args:
            owners: by block id, in how many tables the block is.

        Raises:
            AssertionError: they do not; the message says which block or list is wrong.
        """
        free: list[Block] = []
        block = self._ring.next_free
        while block is not self._ring:
            assert block.next_free.previous_free is block, f"free list is torn behind block {block.block_id}"
            free.append(block)
            assert len(free) <= len(self.blocks), "free list runs in a circle"
            block = block.next_free
        free_ids = {block.block_id for block in free}
        assert len(free) == len(free_ids) == self.num_free_blocks, "free list and its count disagree"
        assert self._ring.ref_count == 0 and self._ring.block_hash is None, "the null block was used"
        for block in self.blocks[1:]:
            assert block.ref_count == owners[block.block_id], (
                f"block {block.block_id} counts {block.ref_count} owners and has {owners[block.block_id]}"
            )
            assert (block.ref_count == 0) == (block.block_id in free_ids), (
                f"block {block.block_id} with {block.ref_count} owners is on the wrong side of the free list"
            )
        by_hash: dict[BlockHash, set[int]] = {}
        for block in self.blocks:
            if block.block_hash is not None:
                by_hash.setdefault(block.block_hash, set()).add(block.block_id)
        indexed = {
            block_hash: [block.block_id, *(twin.block_id for twin in self._duplicates.get(block_hash, ()))]
            for block_hash, block in self._cached.items()
        }
        assert self._duplicates.keys() <= self._cached.keys(), "a duplicate without a first"
        assert all(self._duplicates.values()), "an empty list of duplicates was kept"
        assert all(len(ids) == len(set(ids)) for ids in indexed.values()), "a block is indexed twice"
        assert {block_hash: set(ids) for block_hash, ids in indexed.items()} == by_hash, (
            "the index of hashes and the blocks' own hashes disagree"
        )
