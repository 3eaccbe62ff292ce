"""`make demo`: a checkpoint becomes a model repository, a server, and text, over gRPC and over HTTP.

Usage: python examples/demo.py CHECKPOINT REPOSITORY

What it does by hand is what a user would do: `quire build`, `quire serve`, a client. The server takes free
ports of the loopback interface and is stopped at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from quire_client import Client, QuireClientError

PROMPT = "Once upon a time"
MAX_TOKENS = 96
HTTP_TIMEOUT_S = 120
QUIRE = Path(sys.executable).with_name("quire")

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Ports:
    """Three ports that nobody listens on."""

    grpc: int
    http: int
    metrics: int

    @classmethod
    def free(cls) -> Ports:
        """Ask the system for them."""
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
            for unbound in sockets:
                unbound.bind(("127.0.0.1", 0))
            return cls(*(bound.getsockname()[1] for bound in sockets))


def say(text: str) -> None:
    """A line of the demo itself."""
    console.print(f"\n[bold]== {text}[/]")


def show_command(command: list[str]) -> None:
    """Print a command the way a user would type it."""
    console.print(f"[dim]$ {shlex.join(['quire', *command])}[/]")


def build(checkpoint: str, repository: str) -> None:
    """Build the repository, unless it is up to date."""
    command = ["build", checkpoint, "--output", repository]
    show_command(command)
    subprocess.run([QUIRE, *command], check=True)


@contextlib.contextmanager
def running_server(repository: str, ports: Ports) -> Iterator[None]:
    """Serve `repository` while the block runs."""
    command = ["serve", repository, "--grpc-port", str(ports.grpc), "--http-port", str(ports.http)]
    command += ["--metrics-port", str(ports.metrics)]
    show_command(command)
    # A session of its own: Ctrl-C is for the demo, which then stops the server.
    server = subprocess.Popen([QUIRE, *command], start_new_session=True, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    ready: queue.SimpleQueue[bool] = queue.SimpleQueue()
    relay = threading.Thread(target=relay_lines, args=(server.stderr, ready), daemon=True)
    relay.start()
    try:
        if not ready.get():
            sys.exit("the server did not start; its error is above")
        yield
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT)
        server.wait()
        relay.join()


def relay_lines(lines: Iterable[str], ready: queue.SimpleQueue[bool]) -> None:
    """Show what the server says; tell `ready` when it says that it is, and that it isn't when it ends."""
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("quire: ready"):
            ready.put(True)
    ready.put(False)


def stream_over_grpc(ports: Ports) -> None:
    """Print a completion as its tokens arrive."""
    with Client(f"127.0.0.1:{ports.grpc}") as client:
        start = time.monotonic()
        console.print(f"[cyan]{PROMPT}[/]", end="")
        stream = client.stream(PROMPT, max_tokens=MAX_TOKENS, temperature=0.7, seed=1)
        for delta in stream:
            print(delta.text, end="", flush=True)
        result, seconds = stream.result(), time.monotonic() - start
    console.print(
        f"\n[dim]{result.num_output_tokens} tokens in {seconds:.2f} s, ended by {result.finish_reason}[/]"
    )


def stream_over_http(ports: Ports) -> None:
    """The same from Triton's HTTP endpoint: server-sent events with one JSON object each."""
    body = {"text_input": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0.0, "stream": True}
    url = f"http://127.0.0.1:{ports.http}/v2/models/llm/generate_stream"
    console.print(f"[dim]$ curl -N {url} -d {shlex.quote(json.dumps(body))}[/]")
    console.print(f"[cyan]{PROMPT}[/]", end="")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(url, json.dumps(body).encode(), timeout=HTTP_TIMEOUT_S) as events:
        for event in events:
            if event.startswith(b"data: "):
                print(json.loads(event.removeprefix(b"data: "))["text_output"], end="", flush=True)
    print()


def main() -> None:
    """Run the demo."""
    checkpoint, repository = sys.argv[1:]
    ports = Ports.free()
    say("building the engine")
    build(checkpoint, repository)
    say("starting tritonserver")
    with running_server(repository, ports):
        say("streaming over gRPC")
        stream_over_grpc(ports)
        say("streaming over HTTP")
        stream_over_http(ports)
        say("stopping")
    activate = os.path.relpath(Path(sys.executable).with_name("activate"))
    say("next")
    console.print(f"  source {activate}")
    show_command(["serve", repository])
    show_command(["generate", PROMPT, "--max-tokens", "64"])


if __name__ == "__main__":
    try:
        main()
    except QuireClientError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(130)
