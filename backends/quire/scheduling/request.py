"""A request as the scheduler knows it, from arrival to its one final output."""

from __future__ import annotations

import enum
from typing import Literal

from quire.scheduling.sampling_params import SamplingParams

FinishReason = Literal["stop", "length"]


class RequestStatus(enum.IntEnum):
    """Where a request stands; everything from FINISHED_STOPPED on is final."""

    WAITING = 0
    RUNNING = 1
    PREEMPTED = 2
    FINISHED_STOPPED = 3
    FINISHED_LENGTH = 4
    FINISHED_ABORTED = 5


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
        self.priority = priority
        self.arrival_order = arrival_order
        self.cache_salt = cache_salt
        self.status = RequestStatus.WAITING
        self.all_token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_computed_tokens = 0
