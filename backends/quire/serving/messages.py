"""What frontends and the scheduler say to each other over ZeroMQ, as msgpack arrays.

Frontend to scheduler: `Hello`, `Submit`, `Abort`, `Heartbeat`. Scheduler to frontend: `Welcome`,
`StepTokens`, `Refusal`, `Heartbeat`. Request ids are chosen by the frontend and unique within it.
"""

from __future__ import annotations

import msgspec

from quire.scheduling.request import FinishReason
from quire.scheduling.sampling_params import SamplingParams


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A frontend's first message; the scheduler ignores peers that have not sent a valid one."""

    key: str
    """The secret of this server start, read from the run directory."""
    frontend: str


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    """A request, already checked."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """Requests whose outcome nobody waits for any more."""

    request_ids: list[str]


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag="beat"):
    """Sent in both directions when there was nothing else to say for a while."""


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welcome"):
    """The scheduler's answer to `Hello`, and again after it has been replaced."""

    scheduler: str
    """Drawn anew by every scheduler process."""


class Finished(msgspec.Struct, frozen=True, array_like=True):
    """A request's end within a step."""

    request_id: str
    finish_reason: FinishReason


class StepTokens(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """Everything one step brought to one frontend: one message, whatever the number of requests."""

    request_ids: list[str]
    token_ids: list[int]
    """Parallel to `request_ids`: the one token that each request got."""
    finished: list[Finished]


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """A request ended by an error: refused on arrival, or failed later."""

    request_id: str
    error: str
    """Name of the class in `quire.errors`."""
    message: str


ToScheduler = Hello | Submit | Abort | Heartbeat
ToFrontend = Welcome | StepTokens | Refusal | Heartbeat
