"""What an operator gets to see of the server's output."""

from __future__ import annotations

import io
import threading

import pytest

from quire.launcher.server_log import ServerLog

NO_GPU = (
    'W1123 20:33:02.898682 12 pinned_memory_manager.cc:273] "Unable to allocate pinned system memory, '
    'pinned memory pool will not be available: CUDA driver version is insufficient"\n'
    'E1123 20:33:02.898806 12 server.cc:241] "CudaDriverHelper has not been initialized."\n'
)
LOAD_FAILURE = (
    'E1123 20:33:03.255733 12 backend_model.cc:692] "ERROR: Failed to create instance: '
    'TritonModelException: the first words\\n\\nAt:\\n  model.py(10): initialize\\n"\n'
    "E1123 20:33:03.255836 12 model_lifecycle.cc:642] \"failed to load 'engine' version 1: Internal: "
    'TritonModelException: step is \\"x\\"; it must be a number\\n\\nAt:\\n  model.py(10): initialize\\n"\n'
)
REFUSED_CAPTURE = (
    'E1125 22:33:40.249291 12 logging.cc:40] "ICudaEngine::getIOTensorName: Error Code 3: API Usage Error '
    '(Parameter check failed, condition: (0) <= (index). Invalid IO Tensor Index: 19.)"\n'
    'E1125 22:33:40.249400 12 logging.cc:40] "IExecutionContext::enqueueV3: Error Code 3: API Usage Error '
    "(Parameter check failed, condition: validDimension. Supplied binding dimensions [1] for tensor "
    'input_ids exceed min..max range for profile 1. Valid range is [17]..[64].)"\n'
    'W1125 22:33:40.249423 12 instance_state.cc:3482] "unable to record CUDA graph for engine_0_0"\n'
)
TABLE = "+-------+\n| Model |\n+-------+\n\n"


def read(text: str, *, loaded: bool = False, verbose: bool = False) -> tuple[ServerLog, list[str], bool]:
    """The log after reading `text`, the lines it let through and whether it reported a failed load."""
    lines: list[str] = []
    failed = threading.Event()
    log = ServerLog(lines.append, verbose=verbose)
    if loaded:
        log.open()
    log.follow(io.BytesIO(text.encode()), on_load_failure=failed.set, on_crash=lambda number: None)
    log.wait_for_end(10)
    return log, lines, failed.is_set()


def test_a_failed_load_becomes_the_models_name_and_its_own_sentence() -> None:
    log, lines, failed = read(NO_GPU + TABLE + LOAD_FAILURE)
    assert failed
    assert log.failure() == 'engine: step is "x"; it must be a number'
    assert lines == []


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            NO_GPU + 'E1123 20:33:03.2 12 http_server.cc:1] "failed to bind"\n' + "error: later\n",
            "failed to bind",
        ),
        ("error: unknown option\n", "unknown option"),
        (
            REFUSED_CAPTURE
            + 'E1125 22:33:41.1 12 logging.cc:40] "Error Code 1: Cuda Runtime (out of memory)"\n',
            "Cuda Runtime (out of memory)",
        ),
        ("something\nlibb64.so: cannot open\n\n", "its last line: libb64.so: cannot open"),
        ("", "it printed nothing"),
    ],
)
def test_a_server_that_ends_early_leaves_its_first_error_or_last_line(output: str, sentence: str) -> None:
    log, _, failed = read(output)
    assert not failed
    assert log.failure().endswith(sentence)


@pytest.mark.parametrize(
    ("last_words", "sentence"),
    [
        (
            "terminate called after throwing an instance of 'std::invalid_argument'\n  what():  stol\n",
            "terminate called after throwing an instance of 'std::invalid_argument' (stol)",
        ),
        # Two that died at the same time.
        (
            "terminate called after throwing an instance of 'terminate called recursively\n"
            "  what():  stol\n  what():  another\n",
            "terminate called after throwing an instance of 'terminate called recursively (stol)",
        ),
        (
            "/b/triton_python_backend_stub: error while loading shared libraries: libpython3.11.so.1.0: no\n",
            "/b/triton_python_backend_stub: error while loading shared libraries: libpython3.11.so.1.0: no",
        ),
        (
            "Fatal Python error: init_fs_encoding: failed\nPython runtime state: core initialized\n",
            "Fatal Python error: init_fs_encoding: failed",
        ),
    ],
)
def test_last_words_of_a_process_while_models_load_are_a_failure(last_words: str, sentence: str) -> None:
    log, _, failed = read(NO_GPU + last_words)
    assert failed
    assert log.failure() == f"a process of the server died as it started: {sentence}"


def test_last_words_are_no_failure_to_load_once_the_server_is_ready() -> None:
    _, lines, failed = read("terminate called after throwing an instance of 'x'\n", loaded=True)
    assert not failed
    assert len(lines) == 1


def test_a_failure_to_load_says_more_than_last_words() -> None:
    log, _, _ = read("Fatal Python error: x\n" + LOAD_FAILURE)
    assert log.failure() == 'engine: step is "x"; it must be a number'


def test_a_running_servers_warnings_errors_and_prints_go_through_and_nothing_else() -> None:
    text = (
        NO_GPU
        + TABLE
        + 'I1123 20:33:03.2 12 server.cc:1] "fine"\n'
        + 'W1123 20:33:03.2 12 server.cc:1] "watch out"\n'
        + "printed by a component\n"
    )
    _, lines, _ = read(text, loaded=True)
    assert [line[-10:] for line in lines] == ['watch out"', " component"]


def test_while_models_load_only_the_engines_own_lines_go_through() -> None:
    pool = "2026-11-23 21:41:22,549 INFO quire.execution.openvino: KV pool of 6552 blocks"
    others = "2026-11-23 21:41:22,278 INFO quire.serving.channel: frontend 21098 connected\nprinted\n"
    _, lines, _ = read(NO_GPU + TABLE + others + pool + "\n")
    assert lines == [pool]


def test_progress_names_what_is_missing_and_the_last_line() -> None:
    loading = "".join(
        f'I1125 22:33:40.0 12 model_lifecycle.cc:472] "loading: {name}:1"\n' for name in ("engine", "llm")
    )
    log, _, _ = read(loading)
    assert log.progress().startswith("not loaded: engine, llm; loaded: none; the server's last line: I1125")
    loaded = "I1125 22:33:40.2 12 model_lifecycle.cc:839] \"successfully loaded 'llm'\"\n"
    log, lines, _ = read(loading + loaded + REFUSED_CAPTURE)
    assert log.progress().startswith("not loaded: engine; loaded: llm; the server's last line: W1125")
    assert lines == []
    assert read("")[0].progress() == "not loaded: all models; loaded: none; the server's last line: none yet"


def test_verbose_lets_everything_through_even_while_loading() -> None:
    _, lines, _ = read(NO_GPU + TABLE, verbose=True)
    assert "\n".join(lines) + "\n" == NO_GPU + TABLE


def test_a_server_that_stops_is_not_listened_to_any_more() -> None:
    lines: list[str] = []
    log = ServerLog(lines.append)
    log.open()
    log.shut()
    output = io.BytesIO(b"Signal (15) received.\n")
    log.follow(output, on_load_failure=lambda: None, on_crash=lambda number: None)
    log.wait_for_end(10)
    assert lines == []


@pytest.mark.parametrize(
    ("line", "crashes"),
    [
        *((f"Signal ({number}) received.", [number]) for number in (6, 11)),
        ("Signal (2) received.", []),
        ("Signal (15) received.", []),
        ("Signal (1) received.", []),
        ('E1123 20:33:03.2 12 server.cc:1] "no such model: Signal (6) received."', []),
        ("Signal (6) received. Or so a client says.", []),
    ],
)
def test_a_crash_is_told_by_a_line_of_its_own_that_names_its_signal(line: str, crashes: list[int]) -> None:
    told: list[int] = []
    log = ServerLog(lambda line: None)
    output = io.BytesIO(f"free(): double free detected\n{line}\n 0# main\n".encode())
    log.follow(output, on_load_failure=lambda: None, on_crash=told.append)
    log.wait_for_end(10)
    assert told == crashes
