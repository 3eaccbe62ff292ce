"""The command line: `quire build | serve | generate | profile | doctor`.

Flags are read and checked here; the work is done by `quire_build`, `launcher` and `server_process`,
`quire_client` and `doctor`, each imported by the command that needs it. A `QuireError` becomes one line
on stderr and exit code 1; wrong usage is exit code 2.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal


@contextmanager
def _ctrl_c_ends_the_program() -> Iterator[None]:
    """End by SIGINT's default action while modules are imported.

    A KeyboardInterrupt there would be a traceback, or numpy's long ImportError.
    """
    replace = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if replace:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if replace:
            signal.signal(signal.SIGINT, signal.default_int_handler)


with _ctrl_c_ends_the_program():
    import typer
    from rich.console import Console
    from rich.markup import escape

    from quire import __version__
    from quire.errors import QuireError, StartupError
    from quire.execution.manifest import Precision
    from quire.interface import EnginePlacement


class _App(typer.Typer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _ctrl_c_ends_the_program():
            command = typer.main.get_command(self)
        return command(*args, **kwargs)


app = _App(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("i", 1024))
}


@contextmanager
def _errors_as_one_line() -> Iterator[None]:
    try:
        yield
    except QuireError as error:
        _stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None


def parse_size(text: str) -> int:
    """Bytes from a number with an optional unit: `536870912`, `512MiB`, `1.5GB`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size such as 512MiB, 2GB or a number of bytes")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"quire {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve LLaMA-family checkpoints from NVIDIA Triton Inference Server."""


@app.command()
def build(
    checkpoint: Annotated[Path, typer.Argument(help="Hugging Face checkpoint: a folder.")],
    output: Annotated[Path, typer.Option(help="Model repository to make.")],
    runtime: Annotated[
        Literal["openvino", "tensorrt"],
        typer.Option(help="openvino for CPUs, tensorrt for the GPU of this machine."),
    ] = "openvino",
    precision: Annotated[
        Precision | None,
        typer.Option(
            help="What the engine computes in. On GPUs int8 and fp8 have weights and activations of 8 bits "
            "(W8A8), int8-weights and fp8-weights weights alone (W8A16). Default: float32 on CPUs, bf16 on "
            "GPUs."
        ),
    ] = None,
    kv_cache_dtype: Annotated[
        Literal["auto", "fp8"],
        typer.Option(help="What keys and values are kept in: the type of activations, or on GPUs fp8."),
    ] = "auto",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run at the same time.")] = 256,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Tokens computed in one step.")] = 2048,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and output; default: the checkpoint's.")
    ] = None,
    frontends: Annotated[int, typer.Option(min=1, help="Processes that receive and send text.")] = 2,
    engine: Annotated[
        EnginePlacement | None,
        typer.Option(
            help="A Triton model, or in the scheduler's process; default: hosted on CPUs, in-process on GPUs."
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.99, help="Share of the GPU's memory that a hosted TensorRT engine is made for."
        ),
    ] = 0.9,
    gate_text: Annotated[
        Path | None, typer.Option(help="Held-out text for the numerics gate; default: random tokens.")
    ] = None,
    accept_numerics: Annotated[
        bool, typer.Option("--accept-numerics", help="Publish even beyond the gate's thresholds.")
    ] = False,
    force: Annotated[bool, typer.Option(help="Build even if the repository is up to date.")] = False,
) -> None:
    """Compile a checkpoint into a model repository."""
    with _errors_as_one_line():
        try:
            with _ctrl_c_ends_the_program():
                from quire_build.pipeline import build as build_repository
        except ModuleNotFoundError as error:
            raise StartupError(
                f"building needs the package {error.name}; install it with: pip install 'quire[build,cpu]'"
            ) from error
        build_repository(
            checkpoint,
            output,
            runtime=runtime,
            precision=precision,
            kv_cache_dtype=kv_cache_dtype,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            frontends=frontends,
            engine=engine,
            gpu_memory_utilization=round(100 * gpu_memory_utilization),
            gate_text=gate_text,
            accept_numerics=accept_numerics,
            force=force,
            progress=lambda line: _stderr.print(line, markup=False),
        )


@app.command(short_help="Serve a model repository until Ctrl-C.")
def serve(
    repository: Annotated[Path, typer.Argument(help="Model repository made by `quire build`.")],
    address: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="For gRPC.")] = 8001,
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="For HTTP.")] = 8000,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="For Prometheus.")] = 8002,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Requests that run at the same time.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens computed in one step.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and output of one request.")
    ] = None,
    kv_cache_bytes: Annotated[
        int | None,
        typer.Option(
            parser=parse_size,
            metavar="<size>",
            help="Size of the KV pool, as in 512MiB; default: by free memory.",
        ),
    ] = None,
    gpu_memory_utilization: Annotated[
        float | None,
        typer.Option(min=0.01, max=0.99, help="Share of a GPU's memory to use, KV pool included."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the CPU runtime.")] = None,
    max_queued_requests: Annotated[
        int | None, typer.Option(min=1, help="Requests that may wait; more are refused.")
    ] = None,
    step_timeout_s: Annotated[
        int | None, typer.Option(min=1, help="Seconds after which a step counts as failed.")
    ] = None,
    exit_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds from Ctrl-C until whatever is left is killed.")
    ] = 30.0,
    verbose: Annotated[bool, typer.Option(help="Show the server's whole log.")] = False,
    print_command: Annotated[
        bool, typer.Option("--print-command", help="Print the tritonserver command and exit.")
    ] = False,
) -> None:
    """Serve a model repository until Ctrl-C or SIGTERM; requests under way finish first.

    A second Ctrl-C kills at once.
    """
    with _ctrl_c_ends_the_program():
        from quire.launcher.plan import Endpoints, LaunchOptions, plan_launch
        from quire.launcher.server_log import ServerLog
        from quire.launcher.server_process import ServerProcess

    given = {
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "kv_cache_bytes": kv_cache_bytes,
        "gpu_memory_utilization": (
            None if gpu_memory_utilization is None else round(100 * gpu_memory_utilization)
        ),
        "threads": threads,
        "max_queued_requests": max_queued_requests,
        "step_timeout_s": step_timeout_s,
    }
    options = LaunchOptions(
        repository,
        Endpoints(address, grpc_port, http_port, metrics_port),
        {name: value for name, value in given.items() if value is not None},
    )
    with _errors_as_one_line():
        plan = plan_launch(options)
        if print_command:
            typer.echo(plan.shell_line())
            return
        ServerProcess(
            plan,
            exit_timeout_s=exit_timeout,
            log=ServerLog(lambda line: print(line, file=sys.stderr, flush=True), verbose=verbose),
            report=lambda line: _stderr.print(f"[bold]quire:[/] {escape(line)}"),
        ).run()


@app.command(short_help="Send a prompt to a running server.")
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    url: Annotated[str, typer.Option(help="The server's gRPC address.")] = "localhost:8001",
    max_tokens: Annotated[int | None, typer.Option(help="Tokens to generate at most.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from the k likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the likeliest tokens of this mass.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Drop tokens less likely than this share of the likeliest.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option(help="Show tokens as they come.")] = True,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds until the request is given up.")] = 300.0,
) -> None:
    """Send one prompt to a running server and print what it generates; Ctrl-C cancels."""
    with _ctrl_c_ends_the_program():
        from quire_client import Client, QuireClientError, SamplingOptions

    given = SamplingOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    try:
        with Client(url, timeout_s=timeout) as client:
            if stream:
                with client.stream(text, **given) as deltas:
                    for delta in deltas:
                        print(delta.text, end="", flush=True)
                    print()
            else:
                print(client.generate(text, **given).text)
    except QuireClientError as error:
        _stderr.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print(flush=True)
        raise typer.Exit(130) from None


@app.command(short_help="Show where a TensorRT engine's time goes.")
def profile(
    repository: Annotated[Path, typer.Argument(help="Model repository made by `quire build`.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences of a step; may be repeated.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of each sequence in the cache.")] = 1024,
) -> None:
    """Time decode steps of a TensorRT engine by kind of layer, beside what memory bandwidth allows."""
    with _errors_as_one_line():
        try:
            with _ctrl_c_ends_the_program():
                from quire_build.tensorrt.profile import BATCHES, profile_repository, report
        except ModuleNotFoundError as error:
            raise StartupError(
                f"profiling needs the package {error.name}; install it with: pip install 'quire[build]'"
            ) from error
        for step in profile_repository(repository, batch or BATCHES, context):
            for line in report(step):
                typer.echo(line)


@app.command(short_help="Check that everything is here and fits together.")
def doctor(
    repository: Annotated[
        Path | None, typer.Argument(help="Model repository that is to be served here.")
    ] = None,
) -> None:
    """Check that everything serving needs is here and fits together."""
    with _ctrl_c_ends_the_program():
        from quire.doctor import examine, show

    findings = examine(repository)
    show(findings, Console())
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
