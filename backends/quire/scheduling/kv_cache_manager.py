"""Block tables: which blocks hold a request's keys and values, from admission until they are given back.

The manager grows a request's table as its tokens are scheduled, names full blocks so that other requests
can find them, and looks up what of a new request's prefix is already there. Whether a request runs at all,
and who gives way when blocks run out, is the scheduler's business; the order in which free blocks are used
is the pool's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from quire.scheduling.block_pool import Block, BlockPool
from quire.scheduling.prefix_hash import PrefixHasher
from quire.scheduling.request import Request


class KVCacheManager:
    """Keeps the `blocks` of every running request.

    A block is named (hashed) when the step that fills it is scheduled, before that step has run: any step
    that reads the block runs later, or is the same step, which writes all keys and values before it reads
    any. For the same reason a request's blocks can be given back, and given to another, while a step in
    flight still writes to them: steps execute in the order in which they were scheduled, so the new owner's
    step overwrites what the old one left, and it reads only positions that it has written itself. Both hold
    as long as every scheduled step is executed; where one was not, `forget_prefixes` must follow.

    Args:
        num_blocks: blocks of the pool, the null block included.
        block_size: tokens per block.
        enable_prefix_caching: whether blocks are named and looked up at all.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching

    def register(self, request: Request) -> None:
        """Hash a new request's prompt, so that the step in which it is admitted need not."""
        if self.enable_prefix_caching:
            request.prefix_hasher = PrefixHasher(self.block_size, request.cache_salt)
            request.prefix_hasher.hash_full_blocks(request.all_token_ids)

    def find_cached_prefix(self, request: Request) -> list[Block]:
        """The longest run of cached blocks that a waiting request's table can start with.

        The last known token is always left to be computed: it is its logits that are wanted.
        """
        hasher = request.prefix_hasher
        if hasher is None:
            return []
        block_hashes = hasher.hash_full_blocks(request.all_token_ids)
        last_wanted = (len(request.all_token_ids) - 1) // self.block_size
        return self.pool.find_longest_prefix(block_hashes[:last_wanted])

    def admit(self, request: Request, cached_prefix: list[Block], num_tokens: int) -> bool:
        """Start a waiting request's table with its cached prefix, and extend it to hold `num_tokens`.

        Returns:
            False, with nothing changed, unless there are blocks for all its known tokens: a request that
            gets its prompt in chunks must not be admitted only to be preempted half way.
        """
        pool = self.pool
        num_missing = self._blocks_for(len(request.all_token_ids)) - len(cached_prefix)
        num_taken_from_free = sum(1 for block in cached_prefix if block.ref_count == 0)
        if num_missing + num_taken_from_free > pool.num_free_blocks:
            return False
        pool.share(cached_prefix)
        request.blocks = cached_prefix
        request.num_hashed_blocks = len(cached_prefix)
        self.grow(request, num_tokens)
        return True

    def grow(self, request: Request, num_tokens: int) -> list[Block] | None:
        """Extend a request's table to hold `num_tokens`, and name the blocks that these fill.

        Returns:
            The blocks appended, often none; or None, with nothing changed, if too few are free.
        """
        blocks, pool = request.blocks, self.pool
        num_missing = self._blocks_for(num_tokens) - len(blocks)
        if num_missing > pool.num_free_blocks:
            return None
        new_blocks = pool.take(num_missing) if num_missing > 0 else []
        blocks += new_blocks
        # A token that a step in flight is going to sample has no name yet; its block waits.
        self.cache_full_blocks(request, min(num_tokens, len(request.all_token_ids)))
        return new_blocks

    def cache_full_blocks(self, request: Request, num_tokens: int) -> None:
        """Name the blocks that are full once a request's first `num_tokens` tokens are computed."""
        block_size, blocks = self.block_size, request.blocks
        request.table_due_at = len(blocks) * block_size + 1
        hasher = request.prefix_hasher
        if hasher is None:
            return
        num_full = num_tokens // block_size
        if num_full > request.num_hashed_blocks:
            block_hashes = hasher.hash_full_blocks(request.all_token_ids)
            for index in range(request.num_hashed_blocks, num_full):
                self.pool.cache(blocks[index], block_hashes[index])
            request.num_hashed_blocks = num_full
        request.table_due_at = min(request.table_due_at, (request.num_hashed_blocks + 1) * block_size)

    def free(self, request: Request) -> None:
        """Give a request's blocks back, its last block to be used again first."""
        self.pool.release(reversed(request.blocks))
        request.blocks = []
        request.num_hashed_blocks = 0
        request.table_due_at = 1

    def free_unwritten(self, request: Request) -> None:
        """Free a request that loses its place in the step being scheduled.

        Blocks that this step would have filled are named already but will never be written, so they lose
        their names; vLLM leaves them to be found.
        """
        unwritten = request.blocks[request.num_computed_tokens // self.block_size : request.num_hashed_blocks]
        self.free(request)
        for block in unwritten:
            self.pool.forget(block)

    def forget_prefixes(self) -> None:
        """Forget what is cached; blocks in tables stay there."""
        self.pool.forget_all()

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def check_integrity(self, running: Collection[Request], others: Collection[Request]) -> None:
        """Prove that tables, block pool and prefix cache agree.

        Args:
            running: requests that own blocks.
            others: requests that wait and own none.

        Raises:
            AssertionError: they do not; the message says where.
        """
        owners = Counter(block.block_id for request in running for block in request.blocks)
        self.pool.check_integrity(owners)
        for request in others:
            assert not request.blocks, f"request {request.request_id} waits and owns blocks"
        for request in running:
            blocks, name = request.blocks, request.request_id
            assert len({block.block_id for block in blocks}) == len(blocks), f"{name} owns a block twice"
            assert len(blocks) == self._blocks_for(request.num_computed_tokens), (
                f"{name} owns {len(blocks)} blocks for {request.num_computed_tokens} tokens"
            )
            hashes = request.prefix_hasher.block_hashes if request.prefix_hasher is not None else []
            for index, block in enumerate(blocks):
                expected = hashes[index] if index < request.num_hashed_blocks else None
                assert block.block_hash == expected, (
                    f"block {block.block_id}, number {index} of {name}, has the wrong name"
                )
