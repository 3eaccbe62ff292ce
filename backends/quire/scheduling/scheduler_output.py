"""The one thing that crosses from the scheduler to whoever prepares and runs the step."""

from __future__ import annotations

from dataclasses import dataclass, field

from quire.scheduling.request import FinishReason, Request


@dataclass(slots=True)
class SchedulerOutput:
    """What one step computes. The first three lists are parallel and in batch order."""

    requests: list[Request] = field(default_factory=list)
    num_scheduled_tokens: list[int] = field(default_factory=list)
    """Tokens that each request computes in this step, at least 1."""
    num_computed_tokens: list[int] = field(default_factory=list)
    """Tokens of each request whose keys and values are in the cache before this step."""
    sampling: list[int] = field(default_factory=list)
    """Indices into `requests` of those that sample a token: this step computes their last known one."""
    total_num_scheduled_tokens: int = 0
    new_requests: list[Request] = field(default_factory=list)
    """Scheduled for the first time."""
    resumed_requests: list[Request] = field(default_factory=list)
    """Scheduled again after a preemption."""
    new_block_ids: dict[str, list[int]] = field(default_factory=dict)
    """By request id, blocks appended to its table by this step, for the requests that got any;
    for new and resumed requests this is the whole table."""
    preempted_requests: list[Request] = field(default_factory=list)
    finished_request_ids: list[str] = field(default_factory=list)
    """Requests that ended since the step before, whose rows the input batch can reuse."""


@dataclass(slots=True)
class RequestOutput:
    """The token that one step brought to one request."""

    request: Request
    token_id: int
    finish_reason: FinishReason | None = None
    """None while the request goes on."""
