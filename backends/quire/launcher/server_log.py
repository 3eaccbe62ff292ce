"""The server's output, cut down to what an operator wants to see.

While models load, only the engine's own lines (its KV pool, its warm-up, how long it has not answered) go
through, and if loading fails, one sentence is made from the first line that names a cause. Once the server is
ready, warnings, errors and whatever isn't Triton's own log go through.

The server waits for ever for a component's process that dies as it starts. What the C++ library, the loader
or Python itself says then is taken for a failure to load; a process that is killed says nothing, and
`dead_children` notices it.

The server itself says which signal it crashed with, and then may hang as it prints its stack. It writes that
line in several pieces: where another process's output cuts in, neither the crash nor the hang is noticed.

Triton's TensorRT backend captures every CUDA graph of a plan under every profile. Those that don't hold it
refuse with several lines of errors each, about a hundred times: these say nothing about a failure.
"""

from __future__ import annotations

import re
import signal
import threading
from collections import deque
from collections.abc import Callable
from typing import IO

CRASH_SIGNALS = (signal.SIGABRT, signal.SIGSEGV)
"""The crashes that the server names; it names SIGINT and SIGTERM too, as it stops."""
NUM_LAST_LINES = 20
LAST_LINE_CHARACTERS = 240
"""Of a line that is reported while loading goes on."""

_LOG_LINE = re.compile(
    r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ \d+ (?P<source>[\w.]+:\d+)\] +(?P<text>.*)"
)
_ENGINE_LINE = re.compile(
    r"\d{4}-\d\d-\d\d \S+ \w+ quire\.(?:execution|serving\.scheduler\.hosted_plan)\b[\w.]*: .*"
)
_LOADING = re.compile(r'"?loading: (?P<model>\w+):\d+')
_LOADED = re.compile(r'"?successfully loaded \'(?P<model>\w+)\'')
_LOAD_FAILURE = re.compile(r'"?failed to load \'(?P<model>\w+)\' version \d+: (?P<cause>.*)')
_DEATH = re.compile(r"terminate called |Fatal Python error: |\S.*: error while loading shared libraries: ")
"""Last words: nobody goes on after them."""
_CAUSE_OF_DEATH = re.compile(r" +what\(\): +(?P<cause>.*)")
"""What follows the first of them."""
_CRASH = re.compile(rf"Signal \(({'|'.join(str(int(number)) for number in CRASH_SIGNALS)})\) received\.")
"""The whole line: what a client has sent may stand in a line too, and must not end the server.

This assumes that nothing logs a client's text raw, with its newlines: Triton escapes them, and the components
log no such text.
"""
_TABLE = re.compile(r"[+|].*[+|]|")
_NO_GPU = re.compile(r"CudaDriverHelper|pinned memory pool will not be available")
"""Complaints of a server that looks for a GPU and finds none."""
_REFUSED_CAPTURE = re.compile(
    r"getIOTensorName: Error Code 3|exceed min..max range for profile|unable to record CUDA graph"
)
"""What a profile that doesn't hold a CUDA graph's shapes says to it."""
_PREFIXES = re.compile(
    r"^(?:(?:Internal|Invalid argument|Unsupported|Unavailable|Unknown|\w+(?:Error|Exception)): )*"
)


class ServerLog:
    """Reads the server's output until its end.

    Args:
        write: takes each line that the operator should see, without its newline.
        verbose: whether that is every line.
    """

    def __init__(self, write: Callable[[str], None], *, verbose: bool = False) -> None:
        self._write = write
        self._verbose = verbose
        self._matters = _matters_while_loading
        self._load_failure: str | None = None
        self._death: str | None = None
        """The last words of a process while models load."""
        self._cause_of_death = ""
        self._first_error: str | None = None
        self._last_lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._loaded: dict[str, bool] = {}
        """Whether each model has been loaded, by its name."""
        self._reader: threading.Thread | None = None

    def follow(
        self, output: IO[bytes], *, on_load_failure: Callable[[], None], on_crash: Callable[[int], None]
    ) -> None:
        """Read `output` on a thread of its own.

        Args:
            output: the server's, both streams in one.
            on_load_failure: called once, when a model fails to load.
            on_crash: called with a signal's number each time that the server says it crashed with one.
        """

        def read() -> None:
            failed = False
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                self._take(line)
                if (crash := _CRASH.fullmatch(line)) is not None:
                    on_crash(int(crash[1]))
                if not failed and (self._load_failure or self._death):
                    failed = True
                    on_load_failure()

        self._reader = threading.Thread(target=read, name="server-log", daemon=True)
        self._reader.start()

    def wait_for_end(self, timeout_s: float) -> None:
        """Wait until the output has been read to its end."""
        if self._reader is not None:
            self._reader.join(timeout_s)

    def open(self) -> None:
        """From now on, lines go through: the server is ready."""
        self._matters = _matters

    def shut(self) -> None:
        """From now on, nothing goes through: a server that is told to stop only says that it does."""
        self._matters = _never_matters

    def progress(self) -> str:
        """How far loading has come: the models that are not loaded yet, and the server's last line."""
        models = list(self._loaded.items())  # copied, as the reader goes on
        missing = ", ".join(name for name, loaded in models if not loaded)
        loaded = ", ".join(name for name, loaded in models if loaded)
        last = next((line for line in reversed(list(self._last_lines)) if line), "none yet")
        return (
            f"not loaded: {missing or ('none' if loaded else 'all models')}; loaded: {loaded or 'none'}; "
            f"the server's last line: {last[:LAST_LINE_CHARACTERS]}"
        )

    def failure(self) -> str:
        """Why the server did not start, in one sentence."""
        if self._load_failure is not None:
            return self._load_failure
        if self._death is not None:
            return f"a process of the server died as it started: {self._death}{self._cause_of_death}"
        if self._first_error is not None:
            return self._first_error
        last = next((line for line in reversed(self._last_lines) if line), "it printed nothing")
        return f"the server ended before it was ready; its last line: {last}"

    def _take(self, line: str) -> None:
        entry = _LOG_LINE.fullmatch(line)
        if entry is not None and self._load_failure is None:
            self._note_progress(entry["text"])
            self._note_failure(entry)
        elif entry is None and line.startswith("error: ") and self._first_error is None:
            self._first_error = line.removeprefix("error: ")
        elif entry is None and self._matters is _matters_while_loading:
            self._note_death(line)
        self._last_lines.append(line)
        if self._verbose or self._matters(line, entry):
            self._write(line)

    def _note_progress(self, text: str) -> None:
        if (loading := _LOADING.match(text)) is not None:
            self._loaded.setdefault(loading["model"], False)
        elif (loaded := _LOADED.match(text)) is not None:
            self._loaded[loaded["model"]] = True

    def _note_death(self, line: str) -> None:
        if self._death is None and _DEATH.match(line):
            self._death = line
        elif self._death is not None and not self._cause_of_death and (cause := _CAUSE_OF_DEATH.match(line)):
            self._cause_of_death = f" ({cause['cause']})"

    def _note_failure(self, entry: re.Match[str]) -> None:
        failure = _LOAD_FAILURE.match(entry["text"])
        if failure is not None:
            self._load_failure = f"{failure['model']}: {_first_sentence(failure['cause'])}"
        elif (
            entry["level"] in "EF"
            and self._first_error is None
            and not _NO_GPU.search(text := entry["text"])
            and not _REFUSED_CAPTURE.search(text)
        ):
            self._first_error = text.strip('"')


def _matters_while_loading(line: str, entry: re.Match[str] | None) -> bool:
    return _ENGINE_LINE.fullmatch(line) is not None


def _matters(line: str, entry: re.Match[str] | None) -> bool:
    if entry is not None:
        return entry["level"] in "WEF" and not _NO_GPU.search(line)
    return not _TABLE.fullmatch(line)


def _never_matters(line: str, entry: re.Match[str] | None) -> bool:
    return False


def _first_sentence(cause: str) -> str:
    """An exception's message as Triton logs it, without the classes before it and the traceback after it."""
    text = cause.rstrip('"').split("\\n\\nAt:")[0].replace('\\"', '"').replace("\\n", " ")
    return _PREFIXES.sub("", text).strip()
