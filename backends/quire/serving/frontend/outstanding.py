"""The requests of one frontend that have no final response yet, between their clients and the scheduler.

Takes checked requests, submits them, hands what the scheduler says to the right stream, and has responses
sent by a pool of threads. However a request ends - finished, stopped by a string, cancelled, refused, its
scheduler lost, the frontend closed - its client gets exactly one final response. Knows neither Triton nor
ZeroMQ: `Client` and `Channel` say what it needs of them.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import quire.errors
from quire.errors import PeerLostError, QuireError, RequestCancelledError, RequestError
from quire.serving.frontend.cancellation import CancellationPoller
from quire.serving.frontend.request_parsing import GenerationRequest
from quire.serving.frontend.sender_pool import SenderPool
from quire.serving.frontend.stream import GenerationResponse, ResponseStream
from quire.serving.messages import Refusal, StepTokens, Submit
from quire.text.tokenizer import Tokenizer

FIRST_CONTACT_S = 5.0
"""How long the first request waits for a scheduler that was loaded at the same time."""
NUM_SENDERS = 2
"""Sender threads of one frontend: while one waits for the server's process, the other prepares."""

logger = logging.getLogger(__name__)


class Client(Protocol):
    """Whoever waits for a request's responses."""

    def send(self, response: GenerationResponse | QuireError) -> None:
        """Send a response; an error or one with a finish reason is the last."""

    def is_cancelled(self) -> bool:
        """Whether nobody waits any more; may be called along with `send`."""


class Channel(Protocol):
    """The way to the scheduler. All methods may be called from any thread."""

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until the scheduler answers; whether it did within `timeout_s`."""

    def submit(self, request: Submit) -> None:
        """Send a request; raises `QuireError` when the scheduler is known to be away."""

    def abort(self, request_ids: list[str]) -> None:
        """Tell the scheduler that nobody waits for these any more."""

    def close(self) -> None:
        """End the connection and its thread."""


OpenChannel = Callable[
    [Callable[[StepTokens], None], Callable[[Refusal], None], Callable[[str], None]], Channel
]
"""Called with what to do with a step's tokens, with a refusal, and with the id of a request whose scheduler
was lost."""


@dataclass(frozen=True, slots=True, eq=False)
class OutstandingRequest:
    """One request: its stream, and the client at the end of it."""

    request_id: str
    stream: ResponseStream
    client: Client

    @property
    def ended(self) -> bool:
        """Whether the final response is on its way."""
        return self.stream.ended

    def is_cancelled(self) -> bool:
        """Whether nobody waits for the responses any more."""
        return self.client.is_cancelled()


class OutstandingRequests:
    """Accepts requests and sees each to its end.

    Args:
        tokenizer: of the checkpoint.
        open_channel: connects to the scheduler.
        clock: the time in seconds, by a clock that never goes back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        open_channel: OpenChannel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tokenizer = tokenizer
        self._numbers = itertools.count()
        self._id_prefix = secrets.token_hex(4)
        self._requests: dict[str, OutstandingRequest] = {}
        self._lock = threading.Lock()
        self._senders = SenderPool(self._send_next, NUM_SENDERS)
        self._poller = CancellationPoller(self._cancel, self._end_cancelled, clock)
        self._had_contact = False
        self._channel = open_channel(self._on_step, self._on_refusal, self._on_lost)

    def accept(self, request: GenerationRequest, client: Client) -> None:
        """Submit a request; whatever becomes of it, `client` hears of it. Called from one thread."""
        if not self._had_contact:
            self._channel.wait_connected(FIRST_CONTACT_S)
            self._had_contact = True
        request_id = f"{self._id_prefix}-{next(self._numbers)}"
        outstanding = OutstandingRequest(request_id, ResponseStream(request, self._tokenizer), client)
        with self._lock:
            self._requests[request_id] = outstanding
        try:
            self._channel.submit(Submit(request_id, request.prompt_token_ids, request.sampling_params))
        except QuireError as error:
            self._fail([outstanding], error)
            return
        self._poller.watch(outstanding)

    def close(self, timeout_s: float) -> None:
        """End what is outstanding and all threads, waiting at most `timeout_s` seconds for each thread.

        The poller may still wait for an answer then; what it cancels later is not withheld any more.
        """
        self._poller.close(timeout_s)
        outstanding = self._snapshot()
        for request in outstanding:
            request.stream.release()
        self._fail(outstanding, PeerLostError("the server is stopping; try again later"))
        self._senders.close(timeout_s)
        self._channel.close()

    def _on_step(self, step: StepTokens) -> None:
        """Runs on the channel's thread: notes the tokens and leaves the rest to the senders."""
        woken = []
        for request_id, token_id in zip(step.request_ids, step.token_ids, strict=True):
            outstanding = self._requests.get(request_id)
            if outstanding is not None:
                outstanding.stream.add_token(token_id)
                if not outstanding.stream.waits_for_end:
                    woken.append(outstanding)
        for finished in step.finished:
            outstanding = self._requests.get(finished.request_id)
            if outstanding is not None:
                outstanding.stream.finish(finished.finish_reason)
                woken.append(outstanding)
        self._senders.wake(woken)

    def _on_refusal(self, refusal: Refusal) -> None:
        outstanding = self._requests.get(refusal.request_id)
        if outstanding is not None:
            self._fail([outstanding], _error(refusal))

    def _on_lost(self, request_id: str) -> None:
        outstanding = self._requests.get(request_id)
        if outstanding is not None:
            self._fail(
                [outstanding], PeerLostError("the scheduler was lost during the request; try it again")
            )

    def _cancel(self, outstanding: OutstandingRequest) -> None:
        """Nobody waits any more: the scheduler need not go on, and nothing is sent for now."""
        outstanding.stream.cancel(RequestCancelledError("the client closed its stream or cancelled"))
        self._channel.abort([outstanding.request_id])

    def _end_cancelled(self, outstanding: OutstandingRequest) -> None:
        outstanding.stream.release()
        self._senders.wake([outstanding])

    def _fail(self, requests: list[OutstandingRequest], error: QuireError) -> None:
        for outstanding in requests:
            outstanding.stream.fail(error)
        self._senders.wake(requests)

    def _snapshot(self) -> list[OutstandingRequest]:
        with self._lock:
            return list(self._requests.values())

    def _send_next(self, outstanding: OutstandingRequest) -> None:
        """Runs on a sender thread: send what the request has now; forget it with its final response."""
        stream = outstanding.stream
        try:
            response = stream.take_response()
        except Exception:
            logger.exception("the output of request %s cannot be decoded", outstanding.request_id)
            response = stream.abandon(
                QuireError("the output could not be decoded; the server's log says why")
            )
        if response is None:
            return
        try:
            outstanding.client.send(response)
        except Exception:
            logger.exception("a response of request %s cannot be sent", outstanding.request_id)
            stream.abandon(RequestCancelledError("the client cannot be reached"))
        if stream.ended:
            with self._lock:
                del self._requests[outstanding.request_id]
        if stream.ended_early:
            self._channel.abort([outstanding.request_id])


def _error(refusal: Refusal) -> QuireError:
    """The error that the scheduler named."""
    kind = getattr(quire.errors, refusal.error, None)
    if isinstance(kind, type) and issubclass(kind, RequestError):
        return kind(refusal.message)
    return QuireError(refusal.message)
