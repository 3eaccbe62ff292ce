"""The name under which a full block of keys and values is found again: a digest of all tokens up to its end.

Keys and values at a position depend on every token before it, so a block may be shared only between
requests that agree from the first token to the block's last, and on the cache salt.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

BlockHash = bytes
"""SHA-256 of salt and prefix: equal digests are taken for equal prefixes, without comparing the tokens."""


class PrefixHasher:
    """The block hashes of one growing sequence; each full block is hashed once.

    One SHA-256 runs along the sequence and is read off at every block's end, which chains the hashes.

    Args:
        block_size: tokens per block.
        cache_salt: hashes of different salts never agree; None is a salt of its own.
    """

    def __init__(self, block_size: int, cache_salt: str | None) -> None:
        self.block_hashes: list[BlockHash] = []
        self._block_size = block_size
        # A salt takes a digest's width after the mark, so that no salt and no tokens can look like another.
        start = b"\0" if cache_salt is None else b"\1" + hashlib.sha256(cache_salt.encode()).digest()
        self._running = hashlib.sha256(start)

    def hash_full_blocks(self, token_ids: Sequence[int]) -> list[BlockHash]:
        """Hash the blocks that have become full, and return the hashes of all full blocks.

        Args:
            token_ids: the whole sequence; what was hashed before is not looked at again.
        """
        hashes, running, block_size = self.block_hashes, self._running, self._block_size
        start = len(hashes) * block_size
        num_tokens = (len(token_ids) - start) // block_size * block_size
        if num_tokens <= 0:
            return hashes
        packed = memoryview(struct.pack(f"<{num_tokens}i", *token_ids[start : start + num_tokens]))
        stride = 4 * block_size
        for offset in range(0, len(packed), stride):
            running.update(packed[offset : offset + stride])
            hashes.append(running.digest())
        return hashes
