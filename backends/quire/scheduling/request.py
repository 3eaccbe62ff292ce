"""A request as the scheduler knows it, from arrival to its one final output.

The request carries its own progress, and the block table that the KV cache manager keeps for it: whoever
decides about a request has everything in one object, without a dictionary per subject.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Literal

from quire.scheduling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from quire.scheduling.block_pool import Block
    from quire.scheduling.prefix_hash import PrefixHasher

FinishReason = Literal["stop", "length"]


class RequestStatus(enum.IntEnum):
    """Where a request stands; everything from FINISHED_STOPPED on is final."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5
    FINISHED_FAILED = 6


class Request:
    """One request's tokens and progress.

    Args:
        request_id: unique among the requests that have not ended.
        prompt_token_ids: at least one id.
        sampling_params: how tokens are chosen and when the request ends.
        priority: smaller first; matters under the `priority` policy only.
        arrival_order: breaks ties of priority, earlier first.
        cache_salt: requests share cached blocks only with requests of the same salt.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        priority: int = 0,
        arrival_order: int = 0,
        cache_salt: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.stop_token_ids = sampling_params.stop_token_ids
        self.priority = priority
        self.arrival_order = arrival_order
        self.cache_salt = cache_salt
        self.num_prompt_tokens = len(prompt_token_ids)

        # Progress: written by the scheduler.
        self.status = RequestStatus.WAITING
        self.all_token_ids = list(prompt_token_ids)
        """Prompt and output so far: the known tokens."""
        self.num_expected_tokens = self.num_prompt_tokens
        """Known tokens and those that steps in flight are going to sample."""
        self.num_computed_tokens = 0
        """Tokens whose keys and values are in the cache once the steps in flight are done."""
        self.max_num_tokens = self.num_prompt_tokens + sampling_params.max_tokens
        """Known tokens at which the request ends with `length`; the scheduler caps it at max_model_len."""
        self.num_preemptions = 0

        # The block table: written by the KV cache manager.
        self.blocks: list[Block] = []
        self.num_hashed_blocks = 0
        """Blocks at the start of the table that the prefix cache knows."""
        self.table_due_at = 1
        """Computed tokens at which the table wants attention: a block becomes full, or one is missing."""
        self.prefix_hasher: PrefixHasher | None = None
        """None when prefix caching is off."""

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.all_token_ids) - self.num_prompt_tokens

    @property
    def finished(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self.status >= RequestStatus.FINISHED_STOPPED
