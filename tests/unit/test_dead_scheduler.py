"""When a frontend takes its scheduler for dead; the scheduler is a child of the test."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from tempfile import TemporaryDirectory

import pytest

from quire.errors import PeerLostError
from quire.serving.frontend.dead_scheduler import SCHEDULER_RETURN_S, DeadSchedulerWatch
from quire.serving.rendezvous import Rendezvous

SCHEDULER = """
import sys
from quire.serving.rendezvous import Rendezvous
rendezvous = Rendezvous.for_server(int(sys.argv[1]))
print("loading", flush=True)
for command in sys.stdin:
    {"load": rendezvous.announce_scheduler, "unload": rendezvous.withdraw_scheduler}[command.strip()]()
    print("done", flush=True)
"""


class Scheduler:
    """A process that loads and unloads when it is told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCHEDULER, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait_for("loading")

    def obey(self, command: str) -> None:
        assert self.process.stdin is not None
        print(command, file=self.process.stdin, flush=True)
        self._wait_for("done")

    def kill(self) -> None:
        """Kill it without collecting it, as Triton does not."""
        self.process.kill()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _wait_for(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line


@pytest.fixture
def rendezvous(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rendezvous]:
    with TemporaryDirectory(prefix="q") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        rendezvous = Rendezvous.for_server(os.getpid())
        yield rendezvous
        rendezvous.remove()


@pytest.fixture
def scheduler(rendezvous: Rendezvous) -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.close()


@pytest.fixture
def ends() -> list[str]:
    """Why the server was to end, each time."""
    return []


@pytest.fixture
def watch(rendezvous: Rendezvous, ends: list[str]) -> DeadSchedulerWatch:
    def end_server(error: PeerLostError) -> None:
        ends.append(str(error))

    return DeadSchedulerWatch(rendezvous, end_server)


def test_a_scheduler_that_stays_dead_ends_the_server_once(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    scheduler.obey("load")
    watch.check(0.0)
    scheduler.kill()
    watch.check(100.0)
    watch.check(100.0 + SCHEDULER_RETURN_S / 2)
    assert ends == []
    watch.check(100.0 + SCHEDULER_RETURN_S)
    watch.check(200.0 + SCHEDULER_RETURN_S)
    assert ends == ["the scheduler died (killed by SIGKILL); the server ends, try again later"]


def test_a_dead_scheduler_that_was_collected_ends_the_server_too(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    scheduler.obey("load")
    scheduler.close()
    watch.check(0.0)
    watch.check(SCHEDULER_RETURN_S)
    assert ends == ["the scheduler died (its process is gone); the server ends, try again later"]


def test_a_scheduler_that_lives_and_does_not_answer_is_not_dead(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    scheduler.obey("load")
    watch.check(0.0)
    watch.check(2 * SCHEDULER_RETURN_S)
    assert ends == []


def test_a_scheduler_that_has_not_loaded_yet_is_not_dead(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    watch.check(0.0)
    watch.check(2 * SCHEDULER_RETURN_S)
    assert ends == []


def test_a_scheduler_that_was_unloaded_in_order_is_not_dead(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    scheduler.obey("load")
    scheduler.obey("unload")
    scheduler.kill()
    watch.check(0.0)
    watch.check(2 * SCHEDULER_RETURN_S)
    assert ends == []


def test_a_dead_scheduler_that_is_loaded_again_in_time_may_die_again_later(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str]
) -> None:
    scheduler.obey("load")
    scheduler.kill()
    watch.check(0.0)
    second = Scheduler()
    try:
        second.obey("load")
        second.kill()
        watch.check(SCHEDULER_RETURN_S)
        assert ends == []
        watch.check(2 * SCHEDULER_RETURN_S)
        assert len(ends) == 1
    finally:
        second.close()


def test_one_that_is_loading_in_place_of_a_dead_one_has_all_the_time_it_needs(
    scheduler: Scheduler, watch: DeadSchedulerWatch, ends: list[str], rendezvous: Rendezvous
) -> None:
    scheduler.obey("load")
    scheduler.kill()
    watch.check(0.0)
    rendezvous.withdraw_scheduler()
    watch.check(2 * SCHEDULER_RETURN_S)
    assert ends == []
