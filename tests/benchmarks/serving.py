"""What a running server delivers: tokens per second, time to the first token, time between tokens.

    python tests/benchmarks/serving.py --url HOST:PORT            a server that runs
    python tests/benchmarks/serving.py --repository REPOSITORY    starts `quire serve` for the duration
    python tests/benchmarks/serving.py --repository A B --rounds 5    compares two, measured in turns

For each number of streams, that many clients send one request after the other for a fixed time; what
arrives before all of them have had their first token is not counted. Prompts are random ids, so that none
is found in the prefix cache. Prints JSON. The clients take processor time from a server on the same
machine: `client_cores` says how much. Of several servers all are up at the same time, but only one has
work; the comparison is made of ratios within each round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from quire_client import AsyncClient, Client

NUM_STREAMS = (1, 8, 32, 128, 256)
REQUEST_TIMEOUT_S = 300
LOAD_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
PROMPT_IDS = range(300, 1000)
"""Ordinary tokens in any vocabulary that a language model would have."""


@dataclass(frozen=True, slots=True)
class Load:
    """What every stream does, and for how long."""

    url: str
    seconds: float
    prompt_tokens: int
    max_tokens: int


@dataclass(slots=True)
class Delivery:
    """One request as its client saw it. Times are seconds of the machine's monotonic clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)
    """When each delta came."""
    tokens: list[int] = field(default_factory=list)
    """How many tokens each delta brought."""


@dataclass(slots=True)
class ClientReport:
    """What one client process saw between the start and the end of the measurement."""

    deliveries: list[Delivery]
    cpu_s: float
    began: float
    ended: float


def run_client(load: Load, num_streams: int, seed: int, barrier: Any) -> ClientReport:
    """One client process with `num_streams` streams; `barrier` holds all processes until each is warm."""
    return asyncio.run(_run_streams(load, num_streams, seed, barrier))


async def _run_streams(load: Load, num_streams: int, seed: int, barrier: Any) -> ClientReport:
    deliveries: list[Delivery] = []
    warm = asyncio.Event()
    num_warm = 0
    over = False

    async def stream_requests(client: AsyncClient, rng: random.Random) -> None:
        nonlocal num_warm
        first = True
        while not over:
            prompt = rng.choices(PROMPT_IDS, k=load.prompt_tokens)
            delivery = Delivery(time.monotonic())
            deliveries.append(delivery)
            async with client.stream(prompt, max_tokens=load.max_tokens, temperature=0) as stream:
                async for delta in stream:
                    delivery.arrivals.append(time.monotonic())
                    delivery.tokens.append(len(delta.token_ids))
                    if first:
                        first = False
                        num_warm += 1
                        if num_warm == num_streams:
                            warm.set()
                    if over:
                        return

    async with AsyncClient(load.url, timeout_s=REQUEST_TIMEOUT_S) as client:
        tasks = [
            asyncio.create_task(stream_requests(client, random.Random(seed * 1000 + number)))
            for number in range(num_streams)
        ]
        await warm.wait()
        await asyncio.to_thread(barrier.wait, REQUEST_TIMEOUT_S)
        began, cpu_began = time.monotonic(), time.process_time()
        await asyncio.sleep(load.seconds)
        ended, cpu_s = time.monotonic(), time.process_time() - cpu_began
        over = True
        await asyncio.gather(*tasks)
    return ClientReport(deliveries, cpu_s, began, ended)


def measure(load: Load, num_streams: int, num_clients: int, manager: SyncManager) -> dict[str, Any]:
    """Run `num_streams` streams from up to `num_clients` processes and sum up what arrived."""
    num_clients = min(num_clients, num_streams)
    barrier = manager.Barrier(num_clients)
    shares = [num_streams // num_clients + (i < num_streams % num_clients) for i in range(num_clients)]
    with ProcessPoolExecutor(num_clients, mp_context=multiprocessing.get_context("spawn")) as pool:
        seed = random.SystemRandom().randrange(2**32)
        futures = [
            pool.submit(run_client, load, share, seed + number, barrier)
            for number, share in enumerate(shares)
        ]
        reports = [future.result() for future in futures]
    return {"streams": num_streams, "clients": num_clients} | summarise(reports)


def summarise(reports: list[ClientReport]) -> dict[str, Any]:
    """Rates over the time in which every process measured; times of requests and gaps within it."""
    began = max(report.began for report in reports)
    ended = min(report.ended for report in reports)
    deltas = tokens = 0
    first_token_s: list[float] = []
    gap_s: list[float] = []
    for delivery in (delivery for report in reports for delivery in report.deliveries):
        counted = [began <= arrival < ended for arrival in delivery.arrivals]
        deltas += sum(counted)
        tokens += sum(count for count, inside in zip(delivery.tokens, counted, strict=True) if inside)
        if delivery.arrivals and began <= delivery.sent and counted[0]:
            first_token_s.append(delivery.arrivals[0] - delivery.sent)
        gap_s += [
            later - earlier
            for earlier, later, inside in zip(delivery.arrivals, delivery.arrivals[1:], counted, strict=False)
            if inside
        ]
    seconds = ended - began
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "time_to_first_token_ms": percentiles(first_token_s),
        "time_between_deltas_ms": percentiles(gap_s),
        "tokens_per_delta": round(tokens / max(deltas, 1), 2),
        "requests_started": len(first_token_s),
        "seconds": round(seconds, 1),
        "client_cores": round(sum(report.cpu_s for report in reports) / seconds, 2),
    }


def percentiles(seconds: list[float]) -> dict[str, float] | None:
    """Median and 99th percentile in milliseconds; None where nothing was measured."""
    if not seconds:
        return None
    p50, p99 = np.percentile(seconds, (50, 99)) * 1000
    return {"p50": round(float(p50), 2), "p99": round(float(p99), 2)}


class ServerNotReadyError(Exception):
    """A server of our own ended, or had not loaded its models in time; says what its processes did."""


@contextlib.contextmanager
def own_server(
    repository: Path,
    *,
    log: Path | None = None,
    load_timeout_s: float = LOAD_TIMEOUT_S,
    describe: Callable[[], str] = lambda: busiest_threads(),
) -> Iterator[str]:
    """`quire serve` of a repository while the block runs; its gRPC address.

    Args:
        repository: to serve.
        log: takes the server's whole log; without it what an operator would see goes to this one's output.
        load_timeout_s: seconds that it may take to load.
        describe: says what a server does that takes longer, while it still does it.

    Raises:
        ServerNotReadyError: it did not get ready.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for unbound in sockets:
            unbound.bind(("127.0.0.1", 0))
        ports = [bound.getsockname()[1] for bound in sockets]
    flags = [f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports, strict=True)]
    command = [sys.executable, "-m", "quire.cli", "serve", str(repository), *flags]
    with contextlib.ExitStack() as stack:
        output = None
        if log is not None:
            command.append("--verbose")
            output = stack.enter_context(log.open("wb"))
        server = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=output)
        stack.callback(_stop, server)
        url = f"127.0.0.1:{ports[0]}"
        deadline = time.monotonic() + load_timeout_s
        with Client(url) as client:
            while not client.is_ready():
                if server.poll() is not None:
                    raise ServerNotReadyError(f"the server ended with exit status {server.returncode}")
                if time.monotonic() > deadline:
                    raise ServerNotReadyError(f"not ready after {load_timeout_s:g} s; {describe()}")
                time.sleep(0.1)
        yield url


def _stop(server: subprocess.Popen[bytes]) -> None:
    """As an operator would; at once where that has no effect."""
    server.send_signal(signal.SIGINT)
    try:
        server.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        server.send_signal(signal.SIGINT)
        server.wait()


def busiest_threads(program: str = "tritonserver", seconds: float = 1.0, most: int = 5) -> str:
    """Which threads of a program use the processor, and in which state each is, in one line."""
    before = _thread_times(program)
    time.sleep(seconds)
    ticks = os.sysconf("SC_CLK_TCK") * seconds
    shares = [
        (used - before.get(thread, ("", 0))[1], state, thread)
        for thread, (state, used) in _thread_times(program).items()
    ]
    busiest = sorted(shares, reverse=True)[:most]
    described = ", ".join(f"{thread} {state} {used / ticks:.0%}" for used, state, thread in busiest)
    return f"threads of {program}: {described or 'none'}"


def _thread_times(program: str) -> dict[str, tuple[str, int]]:
    """State and ticks of processor time of each thread of a program, by `process/thread`."""
    times = {}
    for path in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (path.parents[2] / "comm").read_text().strip() == program:
                fields = path.read_text().rpartition(")")[2].split()
                thread = f"{path.parts[2]}/{path.parts[4]}"
                times[thread] = (fields[0], int(fields[11]) + int(fields[12]))
    return times


def measure_in_turns(
    servers: dict[str, str], options: argparse.Namespace, manager: SyncManager
) -> list[dict[str, Any]]:
    """Measure every server with each number of streams in every round; who is first alternates."""
    runs = []
    for streams in options.streams:
        for number in range(options.rounds):
            for name, url in list(servers.items())[:: -1 if number % 2 else 1]:
                load = Load(url, options.seconds, options.prompt_tokens, options.max_tokens)
                figures = measure(load, streams, options.clients, manager)
                runs.append({"server": name, "round": number} | figures)
    return runs


def compare(runs: list[dict[str, Any]], servers: list[str]) -> list[dict[str, Any]]:
    """The other servers against the first: for each number of streams, medians over the rounds of ratios."""
    first, *others = servers
    by_place = {(run["server"], run["streams"], run["round"]): run for run in runs}
    num_rounds = 1 + max(run["round"] for run in runs)
    comparison = []
    for streams in dict.fromkeys(run["streams"] for run in runs):
        for other in others:
            pairs = [
                (by_place[other, streams, number], by_place[first, streams, number])
                for number in range(num_rounds)
            ]
            rate = statistics.median(one["tokens_per_s"] / two["tokens_per_s"] for one, two in pairs)
            gap, first_token = (
                statistics.median(one[field]["p50"] / two[field]["p50"] for one, two in pairs)
                for field in ("time_between_deltas_ms", "time_to_first_token_ms")
            )
            comparison.append(
                {"streams": streams, "server": other, "against": first}
                | {"tokens_per_s": round(rate, 3), "time_between_deltas": round(gap, 3)}
                | {"time_to_first_token": round(first_token, 3)}
            )
    return comparison


@contextlib.contextmanager
def measured_servers(options: argparse.Namespace) -> Iterator[dict[str, str]]:
    """The gRPC address of each server to be measured, by the name that the report calls it."""
    with contextlib.ExitStack() as stack:
        if options.url:
            yield {url: url for url in options.url}
        else:
            yield {
                str(repository): stack.enter_context(own_server(repository))
                for repository in options.repository
            }


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", nargs="+", help="gRPC addresses of running servers")
    where.add_argument("--repository", type=Path, nargs="+", help="model repositories to serve meanwhile")
    parser.add_argument("--streams", type=int, nargs="+", default=NUM_STREAMS)
    parser.add_argument("--seconds", type=float, default=10, help="of measurement for each number of streams")
    parser.add_argument("--rounds", type=int, default=1, help="times that everything is measured")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--clients", type=int, default=2, help="client processes")
    options = parser.parse_args()
    with (
        measured_servers(options) as servers,
        multiprocessing.get_context("spawn").Manager() as manager,
    ):
        runs = measure_in_turns(servers, options, manager)
    report = {
        "machine": machine(),
        "load": {"prompt_tokens": options.prompt_tokens, "max_tokens": options.max_tokens},
        "runs": runs,
    }
    if len(servers) > 1:
        report["comparison"] = compare(runs, list(servers))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
