"""The command line, as far as it goes without a server."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from quire import __version__
from quire.cli import app, parse_size

runner = CliRunner()


@pytest.mark.parametrize(
    ("text", "size"),
    [("1048576", 1 << 20), ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5gib", 3 << 29), ("64 K", 64000)],
)
def test_sizes_are_read_with_and_without_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "lots", "-1", "5 parsecs", "1e9", "MiB"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="not a size"):
        parse_size(text)


def test_an_error_is_one_line_on_stderr_and_exit_code_1(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: there is no model repository at")


def test_brackets_in_an_error_are_not_taken_for_markup(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", str(tmp_path / "[bold]nothing")])
    assert "[bold]nothing" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "x", "--output", "y", "--kv-cache-dtype", "int8"],
        ["serve"],
        ["serve", "x", "--kv-cache-bytes", "lots"],
        ["serve", "x", "--grpc-port", "0"],
        ["nope"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def test_generate_without_a_server_says_so_in_one_line() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"127.0.0.1:{unused.getsockname()[1]}"
        result = runner.invoke(app, ["generate", "hello", "--url", url, "--timeout", "20"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: the server cannot be reached; is it running at {url}?")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--url", "http://localhost:19001"], "url is 'http://localhost:19001'; it must be host:port"),
        (["--url", "localhost"], "url is 'localhost'; it must be host:port"),
        (["--timeout", "1e300"], "timeout_s is 1e+300; it must be"),
        (["--seed", "-1"], "seed is -1; it must be"),
    ],
    ids=str,
)
def test_generate_refuses_wrong_values_in_one_line(flags: list[str], message: str) -> None:
    result = runner.invoke(app, ["generate", "hello", *flags])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_a_prompt_that_is_not_utf_8_is_refused_in_one_line() -> None:
    result = runner.invoke(app, ["generate", "caf\udce9"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: text_input cannot be sent as UTF-8: its character 3 ")
    assert result.stderr.count("\n") == 1


def test_a_wrong_value_is_reported_with_its_option() -> None:
    result = runner.invoke(app, ["serve", "x", "--kv-cache-bytes", "lots"])
    assert "--kv-cache-bytes" in result.stderr
    assert "not a size such as 512MiB" in result.stderr


def test_version_is_printed() -> None:
    assert runner.invoke(app, ["--version"]).stdout == f"quire {__version__}\n"


INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupter:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
if sys.argv[2] == "ignored":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
before = signal.getsignal(signal.SIGINT)
from quire.cli import app
assert signal.getsignal(signal.SIGINT) is before
app(sys.argv[3:])
"""


HEARING_SIGINT = ("env", "--default-signal=INT")
"""Before a command: undo that whoever started the tests has it ignored, as a shell's `&` does."""


def interrupted_import_of(module: str, sigint: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", INTERRUPTED_IMPORT, module, sigint, *arguments]
    return subprocess.run([*HEARING_SIGINT, *program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["--version"]),
        ("quire.execution.manifest", ["--version"]),
        ("numpy", ["generate", "hello"]),
        ("grpc", ["generate", "hello"]),
        ("quire.launcher.server_process", ["serve", "nothing"]),
    ],
)
def test_ctrl_c_while_modules_are_imported_ends_the_program_quietly(
    module: str, arguments: list[str]
) -> None:
    ended = interrupted_import_of(module, "as it is", arguments)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_while_the_commands_are_put_together_ends_the_program_quietly() -> None:
    program = """
import signal, typer.main
typer.main.get_command = lambda app: signal.raise_signal(signal.SIGINT)
from quire.cli import app
app()
"""
    command = [*HEARING_SIGINT, sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


def test_a_sigint_that_is_ignored_stays_ignored() -> None:
    ended = interrupted_import_of("typer", "ignored", ["--version"])
    assert (ended.returncode, ended.stdout) == (0, f"quire {__version__}\n")


def test_ctrl_c_during_a_request_is_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quire_client.Client.stream", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = runner.invoke(app, ["generate", "hello"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (result.exit_code, result.stdout) == (130, "\n")
