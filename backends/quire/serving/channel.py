"""Messages between frontends and the scheduler, over ZeroMQ on a Unix socket.

Each end has an I/O thread of its own, which alone touches the socket: it encodes and decodes, beats while
there is nothing to say, and notices a silent peer, however long an engine step or a tokenisation keeps
the other threads. Sending from another thread is an append and a wake-up. What the messages mean is left
to the components; `messages` says what they hold.

Every queue here is unbounded, because ZeroMQ would otherwise drop or block; what bounds them is that the
scheduler refuses requests beyond its limit at once, and that nothing is sent to a peer that is lost.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import zmq

from quire.errors import PeerLostError
from quire.serving.messages import (
    Abort,
    Heartbeat,
    Hello,
    Refusal,
    StepTokens,
    Submit,
    ToFrontend,
    ToScheduler,
    Welcome,
)
from quire.serving.rendezvous import Rendezvous

CLOSE_TIMEOUT_S = 1.0
LAST_WORDS_MS = 200
"""How long a closing scheduler waits for its last messages to leave."""

Message = TypeVar("Message")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PeerTimes:
    """How patient a channel is; tests shorten it."""

    heartbeat_s: float = 0.5
    """A peer that got nothing for so long gets a heartbeat."""
    timeout_s: float = 2.0
    """A peer that has said nothing for so long is lost."""
    retry_s: float = 0.25
    """Time between a frontend's attempts to reach a scheduler."""

    @property
    def poll_ms(self) -> int:
        """How long an I/O thread sleeps at most: beats and losses are late by no more than this."""
        return int(self.heartbeat_s * 1000 / 2)


class _WakeUp:
    """Lets any thread end an I/O thread's poll."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def ring(self) -> None:
        os.eventfd_write(self.descriptor, 1)

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)

    def __del__(self) -> None:
        os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class FrontendLost:
    """A frontend fell silent: nobody waits for its requests any more."""


@dataclass(slots=True)
class _Frontend:
    """What the scheduler's end knows about a frontend that has said hello."""

    name: str
    last_heard: float
    last_sent: float


@dataclass(slots=True)
class ChannelStatistics:
    """What a channel has seen; written by its I/O thread only."""

    malformed: int = 0
    """Messages that could not be decoded."""
    strangers: int = 0
    """Messages from peers that have not shown the key."""


class SchedulerChannel:
    """The scheduler's end: any number of frontends, each known by the identity of its connection.

    What arrives is kept until `receive` takes it, in the order of arrival; `arrived` is set meanwhile.
    """

    def __init__(self, rendezvous: Rendezvous, times: PeerTimes | None = None) -> None:
        self.scheduler_id = secrets.token_hex(8)
        self.statistics = ChannelStatistics()
        self.arrived = threading.Event()
        self._times = times or PeerTimes()
        self._key = rendezvous.access_key.hex()
        self._inbox: deque[tuple[bytes, Submit | Abort | FrontendLost]] = deque()
        self._outbox: deque[tuple[bytes, ToFrontend]] = deque()
        self._frontends: dict[bytes, _Frontend] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToScheduler).decode
        self._wake = _WakeUp()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        _make_unbounded(self._socket)
        self._socket.bind(rendezvous.scheduler_endpoint)
        self._thread = threading.Thread(target=self._run, name="quire-channel", daemon=True)
        self._thread.start()

    @property
    def frontends(self) -> list[str]:
        """Names of the frontends that are connected."""
        return [frontend.name for frontend in list(self._frontends.values())]

    def receive(self) -> list[tuple[bytes, Submit | Abort | FrontendLost]]:
        """Everything that has arrived since the last call, each with its frontend's identity."""
        self.arrived.clear()
        taken = []
        while self._inbox:
            taken.append(self._inbox.popleft())
        return taken

    def send(self, messages: Iterable[tuple[bytes, ToFrontend]]) -> None:
        """Hand messages to the I/O thread, each with the identity of the frontend it is for."""
        self._outbox.extend(messages)
        self._wake.ring()

    def close(self) -> None:
        """Send what is waiting and stop, within `CLOSE_TIMEOUT_S`."""
        if self._closing:
            return
        self._closing = True
        self._wake.ring()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake.descriptor, zmq.POLLIN)
        while not self._closing:
            poller.poll(self._times.poll_ms)
            self._wake.clear()
            self._take_messages()
            self._send_waiting()
            self._beat_and_check(time.monotonic())
        self._send_waiting()
        self._socket.close(linger=LAST_WORDS_MS)
        self._context.term()

    def _take_messages(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                self._take(frames[0], frames[-1])

    def _take(self, identity: bytes, payload: bytes) -> None:
        try:
            message = self._decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            self.statistics.malformed += 1
            return
        if isinstance(message, Hello):
            self._greet(identity, message)
            return
        frontend = self._frontends.get(identity)
        if frontend is None:
            self.statistics.strangers += 1
            return
        frontend.last_heard = time.monotonic()
        if not isinstance(message, Heartbeat):
            self._deliver(identity, message)

    def _greet(self, identity: bytes, hello: Hello) -> None:
        if not hmac.compare_digest(hello.key.encode(), self._key.encode()):
            self.statistics.strangers += 1
            return
        now = time.monotonic()
        self._frontends[identity] = _Frontend(hello.frontend, last_heard=now, last_sent=now)
        _log.info("%s connected", hello.frontend)
        self._send(identity, Welcome(self.scheduler_id))

    def _send_waiting(self) -> None:
        while self._outbox:
            identity, message = self._outbox.popleft()
            if frontend := self._frontends.get(identity):
                frontend.last_sent = time.monotonic()
                self._send(identity, message)

    def _send(self, identity: bytes, message: ToFrontend) -> None:
        try:
            self._socket.send_multipart((identity, self._encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError:
            # With ROUTER_MANDATORY this is how a closed connection shows.
            self._lose(identity)

    def _beat_and_check(self, now: float) -> None:
        for identity, frontend in list(self._frontends.items()):
            if now - frontend.last_heard > self._times.timeout_s:
                self._lose(identity)
            elif now - frontend.last_sent > self._times.heartbeat_s:
                frontend.last_sent = now
                self._send(identity, Heartbeat())

    def _lose(self, identity: bytes) -> None:
        if frontend := self._frontends.pop(identity, None):
            _log.warning("%s is gone", frontend.name)
            self._deliver(identity, FrontendLost())

    def _deliver(self, identity: bytes, event: Submit | Abort | FrontendLost) -> None:
        self._inbox.append((identity, event))
        self.arrived.set()


@dataclass(slots=True)
class _Session:
    """One connection of a frontend, from the scheduler's welcome to its loss."""

    outstanding: set[str] = field(default_factory=set)
    """Requests that have been submitted and have not ended."""
    outbox: deque[ToScheduler] = field(default_factory=deque)


class FrontendChannel:
    """A frontend's end: one connection to the scheduler, made anew whenever it is lost.

    Every submitted request brings exactly one end: as finished in an `on_step`, in an `on_refusal`, or in
    an `on_lost`, unless it is aborted first. The callbacks run on the I/O thread and must not block it.

    Args:
        rendezvous: where the scheduler listens.
        name: for the scheduler's log.
        on_step: called with each step's tokens; may hold ids that were aborted since.
        on_refusal: called with the error that ended one request.
        on_lost: called with the id of each request that was under way when the scheduler was lost.
        times: how patient to be.
        on_no_answer: called with the time when the scheduler is lost and after each vain attempt to reach it.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        name: str,
        on_step: Callable[[StepTokens], None],
        on_refusal: Callable[[Refusal], None],
        on_lost: Callable[[str], None],
        times: PeerTimes | None = None,
        *,
        on_no_answer: Callable[[float], None] = lambda now: None,
    ) -> None:
        self.statistics = ChannelStatistics()
        self._endpoint = rendezvous.scheduler_endpoint
        self._hello = Hello(rendezvous.access_key.hex(), name)
        self._on_step = on_step
        self._on_refusal = on_refusal
        self._on_lost = on_lost
        self._on_no_answer = on_no_answer
        self._times = times or PeerTimes()
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ToFrontend).decode
        self._wake = _WakeUp()
        self._closing = threading.Event()
        self._welcomed = threading.Event()
        # Guards the session: a request is either in it when it ends, or refused.
        self._lock = threading.Lock()
        self._session = _Session()
        self._context = zmq.Context()
        self._thread = threading.Thread(target=self._run, name="quire-channel", daemon=True)
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait until a scheduler answers; whether it did within `timeout_s`."""
        return self._welcomed.wait(timeout_s)

    def submit(self, request: Submit) -> None:
        """Send a request on its way.

        Raises:
            PeerLostError: no scheduler answers; nothing was sent.
        """
        with self._lock:
            if not self._welcomed.is_set():
                raise PeerLostError("the scheduler does not answer; try again in 2 seconds")
            self._session.outstanding.add(request.request_id)
            self._session.outbox.append(request)
        self._wake.ring()

    def abort(self, request_ids: list[str]) -> None:
        """Give up requests: none of them brings `on_lost` any more."""
        with self._lock:
            if not self._welcomed.is_set():
                return
            self._session.outstanding.difference_update(request_ids)
            self._session.outbox.append(Abort(request_ids))
        self._wake.ring()

    def close(self) -> None:
        """Stop, within `CLOSE_TIMEOUT_S`; requests under way bring `on_lost`."""
        self._closing.set()
        self._wake.ring()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._context.socket(zmq.DEALER) as socket:
                try:
                    self._converse(socket)
                except zmq.ZMQError:
                    _log.exception("the connection to the scheduler failed")
            self._end_session()
            _report(self._on_no_answer, time.monotonic())
            self._closing.wait(self._times.retry_s)
        self._context.term()

    def _end_session(self) -> None:
        with self._lock:
            ended, self._session = self._session, _Session()
            was_connected = self._welcomed.is_set()
            self._welcomed.clear()
        if was_connected:
            # Without requests it is most likely the server that stops.
            level = logging.WARNING if ended.outstanding else logging.INFO
            _log.log(level, "the scheduler is gone; %d requests end with it", len(ended.outstanding))
        for request_id in ended.outstanding:
            _report(self._on_lost, request_id)

    def _converse(self, socket: zmq.Socket[bytes]) -> None:
        """Talk over one connection until either side ends it or falls silent.

        ZeroMQ's own reconnecting is off: what waits in its queues would reach the next scheduler, which
        knows nothing of the requests it belongs to.
        """
        _make_unbounded(socket)
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        closed = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED)
        socket.connect(self._endpoint)
        socket.send(self._encode(self._hello), zmq.NOBLOCK)
        poller = zmq.Poller()
        for source in (socket, closed, self._wake.descriptor):
            poller.register(source, zmq.POLLIN)
        last_heard = last_sent = time.monotonic()
        while not self._closing.is_set():
            ready = dict(poller.poll(self._times.poll_ms))
            self._wake.clear()
            now = time.monotonic()
            if socket in ready:
                last_heard = now
                self._take_messages(socket)
            if closed in ready or now - last_heard > self._times.timeout_s:
                break
            try:
                if self._send_waiting(socket, beat=now - last_sent > self._times.heartbeat_s):
                    last_sent = now
            except zmq.Again:
                # No connection to send over: it was closed, and the event that says so is on its way.
                break
        socket.disable_monitor()

    def _take_messages(self, socket: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                try:
                    self._take(self._decode(socket.recv(zmq.NOBLOCK)))
                except (msgspec.DecodeError, UnicodeDecodeError):
                    self.statistics.malformed += 1

    def _take(self, message: ToFrontend) -> None:
        match message:
            case StepTokens():
                with self._lock:
                    self._session.outstanding.difference_update(end.request_id for end in message.finished)
                _report(self._on_step, message)
            case Refusal():
                with self._lock:
                    self._session.outstanding.discard(message.request_id)
                _report(self._on_refusal, message)
            case Welcome():
                _log.info("connected to scheduler %s", message.scheduler)
                self._welcomed.set()

    def _send_waiting(self, socket: zmq.Socket[bytes], *, beat: bool) -> bool:
        """Send what the other threads left, or a heartbeat if there is nothing; whether anything went."""
        outbox = self._session.outbox
        if not outbox and beat:
            outbox.append(Heartbeat())
        sent = bool(outbox)
        while outbox:
            socket.send(self._encode(outbox.popleft()), zmq.NOBLOCK)
        return sent


def _report(callback: Callable[[Message], None], message: Message) -> None:
    """Call back; an error there must not end the thread that everybody's messages come through."""
    try:
        callback(message)
    except Exception:
        _log.exception("what the scheduler said could not be dealt with")


def _make_unbounded(socket: zmq.Socket[bytes]) -> None:
    """No limit at which ZeroMQ would drop messages or block, and no waiting for peers when closing."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
