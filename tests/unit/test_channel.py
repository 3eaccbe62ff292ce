"""Frontends and scheduler talking over a real socket, in one process and across processes."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory

import msgspec
import pytest
import zmq

from quire.errors import PeerLostError
from quire.scheduling.sampling_params import SamplingParams
from quire.serving.channel import FrontendChannel, FrontendLost, PeerTimes, SchedulerChannel
from quire.serving.messages import (
    Abort,
    Finished,
    Heartbeat,
    Hello,
    Refusal,
    StepTokens,
    Submit,
    ToFrontend,
    Welcome,
)
from quire.serving.rendezvous import Rendezvous

PATIENCE_S = 30
HASTY = PeerTimes(heartbeat_s=0.1, timeout_s=1.0, retry_s=0.02)
TALKATIVE = PeerTimes(heartbeat_s=0.02, timeout_s=PATIENCE_S, retry_s=0.02)

PEER = """
import os, sys
from quire.scheduling.sampling_params import SamplingParams
from quire.serving.channel import FrontendChannel, SchedulerChannel
from quire.serving.messages import Submit
from quire.serving.rendezvous import Rendezvous
rendezvous = Rendezvous.for_server(int(sys.argv[1]))
if sys.argv[2] == "scheduler":
    channel = SchedulerChannel(rendezvous)
    print("listening", flush=True)
    channel.arrived.wait()
    print("got", channel.receive()[0][1].request_id, flush=True)
else:
    ignore = lambda _: None
    channel = FrontendChannel(rendezvous, "other", ignore, ignore, ignore)
    assert channel.wait_connected(30)
    channel.submit(Submit("r", [1], SamplingParams()))
    print("submitted", flush=True)
sys.stdin.read()
"""


def ignore(message: object) -> None:
    """What a frontend does with messages that the test isn't about."""


@dataclass
class Frontend:
    """A frontend's end of a channel that keeps what it hears."""

    channel: FrontendChannel
    heard: queue.Queue[StepTokens | Refusal | str]

    def next(self) -> StepTokens | Refusal | str:
        return self.heard.get(timeout=PATIENCE_S)


@dataclass
class Wiring:
    """One server start, with everything that was opened in it."""

    rendezvous: Rendezvous
    stack: ExitStack = field(default_factory=ExitStack)

    def scheduler(self, times: PeerTimes | None = None) -> SchedulerChannel:
        channel = SchedulerChannel(self.rendezvous, times)
        self.stack.callback(channel.close)
        return channel

    def frontend(self, times: PeerTimes | None = None) -> Frontend:
        heard: queue.Queue[StepTokens | Refusal | str] = queue.Queue()
        channel = FrontendChannel(self.rendezvous, "f", heard.put, heard.put, heard.put, times)
        self.stack.callback(channel.close)
        return Frontend(channel, heard)

    def connected_frontend(self, times: PeerTimes | None = None) -> Frontend:
        frontend = self.frontend(times)
        assert frontend.channel.wait_connected(PATIENCE_S)
        return frontend

    def process(self, role: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", PEER, str(os.getpid()), role],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.stack.callback(process.communicate)
        self.stack.callback(process.kill)
        return process

    def stranger(self) -> zmq.Socket[bytes]:
        context = zmq.Context()
        socket = context.socket(zmq.DEALER)
        self.stack.callback(context.destroy, linger=0)
        socket.connect(self.rendezvous.scheduler_endpoint)
        return socket

    def fake_scheduler(self, frontend: Frontend) -> tuple[zmq.Socket[bytes], bytes]:
        """A socket that has welcomed `frontend`, and the identity of the frontend's connection."""
        context = zmq.Context()
        router = context.socket(zmq.ROUTER)
        self.stack.callback(context.destroy, linger=0)
        router.bind(self.rendezvous.scheduler_endpoint)
        assert router.poll(PATIENCE_S * 1000)
        identity, hello = router.recv_multipart()
        assert msgspec.msgpack.decode(hello, type=Hello).key == self.rendezvous.access_key.hex()
        router.send_multipart((identity, msgspec.msgpack.encode(Welcome("fake"))))
        assert frontend.channel.wait_connected(PATIENCE_S)
        return router, identity


@pytest.fixture
def folder_name() -> str:
    """What the name of the folder for rendezvous folders begins with."""
    return "q"


@pytest.fixture
def wiring(folder_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wiring]:
    with TemporaryDirectory(prefix=folder_name) as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        wiring = Wiring(Rendezvous.for_server(os.getpid()))
        with wiring.stack:
            yield wiring
        wiring.rendezvous.remove()


def submit(request_id: str) -> Submit:
    return Submit(request_id, [1, 2, 3], SamplingParams(max_tokens=4, seed=2**64 - 1))


def step(*request_ids: str, finished: str | None = None) -> StepTokens:
    ends = [Finished(finished, "stop")] if finished else []
    return StepTokens(list(request_ids), [7] * len(request_ids), ends)


def arrivals(scheduler: SchedulerChannel, count: int) -> list[tuple[bytes, Submit | Abort | FrontendLost]]:
    taken: list[tuple[bytes, Submit | Abort | FrontendLost]] = []
    while len(taken) < count:
        assert scheduler.arrived.wait(PATIENCE_S)
        taken += scheduler.receive()
    return taken


def test_a_request_arrives_whole_and_its_tokens_and_end_come_back(wiring: Wiring) -> None:
    scheduler, frontend = wiring.scheduler(), wiring.connected_frontend()
    request = submit("a")
    frontend.channel.submit(request)
    [(identity, arrived)] = arrivals(scheduler, 1)
    assert arrived == request
    answers: list[ToFrontend] = [step("a"), step("a", finished="a"), Refusal("b", "OverloadedError", "full")]
    scheduler.send([(identity, answer) for answer in answers])
    assert [frontend.next() for _ in answers] == answers


def test_each_frontend_gets_its_own_messages(wiring: Wiring) -> None:
    scheduler = wiring.scheduler()
    frontends = [wiring.connected_frontend() for _ in range(3)]
    for number, frontend in enumerate(frontends):
        frontend.channel.submit(submit(f"r{number}"))
    taken = arrivals(scheduler, 3)
    scheduler.send(
        [(identity, step(event.request_id)) for identity, event in taken if isinstance(event, Submit)]
    )
    assert [frontend.next() for frontend in frontends] == [step("r0"), step("r1"), step("r2")]


def test_nothing_is_dropped_and_order_is_kept_however_much_is_sent(wiring: Wiring) -> None:
    scheduler, frontend = wiring.scheduler(), wiring.connected_frontend()
    count = 5000  # several times ZeroMQ's default limit of 1000 messages
    for number in range(count):
        frontend.channel.submit(submit(str(number)))
    taken = arrivals(scheduler, count)
    assert [event.request_id for _, event in taken if isinstance(event, Submit)] == list(
        map(str, range(count))
    )
    identity = taken[0][0]
    for number in range(count):
        scheduler.send([(identity, step(str(number)))])
    assert [frontend.next() for _ in range(count)] == [step(str(number)) for number in range(count)]


def test_an_abort_follows_its_request(wiring: Wiring) -> None:
    scheduler, frontend = wiring.scheduler(), wiring.connected_frontend()
    frontend.channel.submit(submit("a"))
    frontend.channel.abort(["a"])
    assert [event for _, event in arrivals(scheduler, 2)] == [submit("a"), Abort(["a"])]


def test_a_request_is_refused_while_no_scheduler_answers(wiring: Wiring) -> None:
    frontend = wiring.frontend(TALKATIVE)
    with pytest.raises(PeerLostError, match="try again"):
        frontend.channel.submit(submit("a"))
    scheduler = wiring.scheduler()
    assert frontend.channel.wait_connected(PATIENCE_S)
    frontend.channel.submit(submit("b"))
    assert [event for _, event in arrivals(scheduler, 1)] == [submit("b")]


def test_requests_of_a_lost_scheduler_end_once_and_the_next_scheduler_hears_only_new_ones(
    wiring: Wiring,
) -> None:
    first, frontend = wiring.scheduler(), wiring.connected_frontend(TALKATIVE)
    for name in ("done", "refused", "given up", "lost"):
        frontend.channel.submit(submit(name))
    identity = arrivals(first, 4)[0][0]
    first.send([(identity, step("done", finished="done")), (identity, Refusal("refused", "QuireError", ""))])
    assert frontend.next() == step("done", finished="done")
    assert frontend.next() == Refusal("refused", "QuireError", "")
    frontend.channel.abort(["given up"])
    first.close()
    assert frontend.next() == "lost"

    second = wiring.scheduler()
    assert frontend.channel.wait_connected(PATIENCE_S)
    frontend.channel.submit(submit("new"))
    assert [event for _, event in arrivals(second, 1)] == [submit("new")]
    assert frontend.heard.empty()


def test_a_killed_scheduler_is_noticed_at_once(wiring: Wiring) -> None:
    scheduler = wiring.process("scheduler")
    assert scheduler.stdout is not None
    assert scheduler.stdout.readline() == "listening\n"
    frontend = wiring.connected_frontend(PeerTimes(timeout_s=PATIENCE_S * 2))
    frontend.channel.submit(submit("a"))
    assert scheduler.stdout.readline() == "got a\n"
    scheduler.kill()
    assert frontend.next() == "a"  # long before the peer counts as silent
    assert not frontend.channel.wait_connected(0)


def test_that_no_scheduler_answers_is_told_until_one_does(wiring: Wiring) -> None:
    heard: queue.Queue[str | float] = queue.Queue()
    channel = FrontendChannel(
        wiring.rendezvous, "f", ignore, ignore, heard.put, TALKATIVE, on_no_answer=heard.put
    )
    wiring.stack.callback(channel.close)
    before = [heard.get(timeout=PATIENCE_S) for _ in range(2)]
    assert before == sorted(before, key=float)
    scheduler = wiring.process("scheduler")
    assert channel.wait_connected(PATIENCE_S)
    while not heard.empty():
        heard.get()
    channel.submit(submit("a"))
    scheduler.kill()
    assert heard.get(timeout=PATIENCE_S) == "a"
    assert isinstance(heard.get(timeout=PATIENCE_S), float)


def test_a_scheduler_that_hangs_is_noticed_by_its_silence(wiring: Wiring) -> None:
    scheduler = wiring.process("scheduler")
    frontend = wiring.connected_frontend(HASTY)
    frontend.channel.submit(submit("a"))
    scheduler.send_signal(signal.SIGSTOP)
    assert frontend.next() == "a"


def test_a_killed_frontend_is_noticed(wiring: Wiring) -> None:
    scheduler = wiring.scheduler()
    process = wiring.process("frontend")
    [(identity, event)] = arrivals(scheduler, 1)
    assert event == Submit("r", [1], SamplingParams())
    process.kill()
    assert arrivals(scheduler, 1) == [(identity, FrontendLost())]
    assert scheduler.frontends == []


def test_a_frontend_that_hangs_is_noticed_by_its_silence(wiring: Wiring) -> None:
    scheduler = wiring.scheduler(HASTY)
    process = wiring.process("frontend")
    identity = arrivals(scheduler, 1)[0][0]
    process.send_signal(signal.SIGSTOP)
    assert arrivals(scheduler, 1) == [(identity, FrontendLost())]


def test_a_scheduler_with_nothing_to_say_beats(wiring: Wiring) -> None:
    wiring.scheduler(TALKATIVE)
    peer = wiring.stranger()
    peer.send(msgspec.msgpack.encode(Hello(wiring.rendezvous.access_key.hex(), "friend")))
    heard = []
    for _ in range(4):
        assert peer.poll(PATIENCE_S * 1000)
        heard.append(msgspec.msgpack.decode(peer.recv(), type=Welcome | Heartbeat))
    assert heard[1:] == [Heartbeat()] * 3


def test_a_frontend_with_nothing_to_say_beats(wiring: Wiring) -> None:
    router, identity = wiring.fake_scheduler(wiring.frontend(TALKATIVE))
    for _ in range(3):
        assert router.poll(PATIENCE_S * 1000)
        sender, payload = router.recv_multipart()
        assert sender == identity
        assert msgspec.msgpack.decode(payload, type=Heartbeat) == Heartbeat()


@pytest.mark.parametrize("folder_name", ["größe"])
def test_processes_that_take_paths_for_ascii_meet_in_any_folder(wiring: Wiring, folder_name: str) -> None:
    ascii_paths = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    scheduler, frontend = wiring.process("scheduler", **ascii_paths), wiring.frontend()
    assert frontend.channel.wait_connected(PATIENCE_S)
    frontend.channel.submit(submit("a"))
    assert scheduler.stdout is not None
    assert [scheduler.stdout.readline() for _ in range(2)] == ["listening\n", "got a\n"]


def test_only_peers_with_the_key_are_heard(wiring: Wiring) -> None:
    scheduler = wiring.scheduler()
    stranger = wiring.stranger()
    encode = msgspec.msgpack.encode
    for message in (
        submit("before hello"),
        Hello("0" * 64, "stranger"),
        submit("after a wrong key"),
        Hello("é", "x"),
    ):
        stranger.send(encode(message))
    stranger.send(encode(Hello(wiring.rendezvous.access_key.hex(), "friend")))
    stranger.send(encode(submit("after the key")))
    assert [event for _, event in arrivals(scheduler, 1)] == [submit("after the key")]
    assert scheduler.statistics.strangers == 4
    assert stranger.poll(PATIENCE_S * 1000)
    assert msgspec.msgpack.decode(stranger.recv(), type=Welcome).scheduler == scheduler.scheduler_id


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91\xa4nope",
        msgspec.msgpack.encode(["submit", "r"]),
        msgspec.msgpack.encode(["hello", 1, 2]),
    ],
)
def test_a_malformed_message_is_counted_and_ignored(wiring: Wiring, payload: bytes) -> None:
    scheduler = wiring.scheduler()
    peer = wiring.stranger()
    peer.send(msgspec.msgpack.encode(Hello(wiring.rendezvous.access_key.hex(), "friend")))
    peer.send(payload)
    peer.send(msgspec.msgpack.encode(submit("a")))
    assert [event for _, event in arrivals(scheduler, 1)] == [submit("a")]
    assert scheduler.statistics.malformed == 1


def test_a_malformed_answer_is_counted_and_ignored(wiring: Wiring) -> None:
    frontend = wiring.frontend()
    router, identity = wiring.fake_scheduler(frontend)
    for payload in (b"\xc1", msgspec.msgpack.encode(Heartbeat()), msgspec.msgpack.encode(step("a"))):
        router.send_multipart((identity, payload))
    assert frontend.next() == step("a")
    assert frontend.channel.statistics.malformed == 1


def test_an_error_in_a_callback_ends_nothing_else(wiring: Wiring) -> None:
    heard: queue.Queue[StepTokens] = queue.Queue()

    def fail_once(tokens: StepTokens) -> None:
        heard.put(tokens)
        if heard.qsize() == 1:
            raise ZeroDivisionError

    scheduler = wiring.scheduler()
    channel = FrontendChannel(wiring.rendezvous, "f", fail_once, ignore, ignore)
    wiring.stack.callback(channel.close)
    assert channel.wait_connected(PATIENCE_S)
    channel.submit(submit("a"))
    identity = arrivals(scheduler, 1)[0][0]
    scheduler.send([(identity, step("a")), (identity, step("b"))])
    assert [heard.get(timeout=PATIENCE_S) for _ in range(2)] == [step("a"), step("b")]


def test_closing_is_prompt_and_may_be_repeated(wiring: Wiring) -> None:
    scheduler, frontend = wiring.scheduler(), wiring.connected_frontend()
    frontend.channel.submit(submit("a"))
    frontend.channel.close()
    frontend.channel.close()
    assert frontend.next() == "a"
    with pytest.raises(PeerLostError):
        frontend.channel.submit(submit("b"))
    scheduler.close()
    scheduler.close()
    names = {thread.name for thread in threading.enumerate()}
    assert "quire-channel" not in names
