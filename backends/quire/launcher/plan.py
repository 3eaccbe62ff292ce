"""From a model repository and the operator's settings to the command that serves it.

`plan_launch` checks everything that can be checked before a server starts, each failure a `StartupError`
of one sentence, and returns the command with its environment. Running that command is
`server_process`'s business; it can as well be pasted into a shell.
"""

from __future__ import annotations

import errno
import importlib.metadata
import os
import shlex
import shutil
import socket
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from quire.errors import SettingsError, StartupError
from quire.execution.manifest import Manifest, read_manifest
from quire.interface import LLM, SCHEDULER, EnginePlacement
from quire.launcher.installation import TritonInstallation, backend_directory, find_triton
from quire.launcher.plain_paths import plain_path
from quire.launcher.tensorrt import check_tensorrt
from quire.settings import ENVIRONMENT_PREFIX, ServingSettings

SHM_DIR = Path("/dev/shm")
SHM_PREFIX = "triton_python_backend_shm_region_"
"""How Triton names its shared-memory files; the launcher adds a part of its own to know this server's."""
SHM_BYTES_PER_PROCESS = 4 << 20
"""Room for the tensors of requests and responses; logits come on top."""

SERVER_EXIT_TIMEOUT_S = 5
"""How long Triton waits for requests and open streams after SIGTERM; they were drained before."""
POOL_SETTINGS = ("kv_cache_bytes", "gpu_memory_utilization")
"""Settings that decide how large a KV pool becomes, where that is decided at the start."""
STUB_TIMEOUT_S = 600
"""How long a component may take to load; Triton's 30 s are too short for a large engine."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where the server listens."""

    address: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002

    @property
    def local_address(self) -> str:
        """An address under which this machine reaches the server."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.address, self.address)

    def local_url(self, port: int) -> str:
        """`host:port` for a client on this machine."""
        host = f"[{self.local_address}]" if ":" in self.local_address else self.local_address
        return f"{host}:{port}"

    def resolved(self) -> Endpoints:
        """The same with a numeric address: Triton takes a host's name for 255.255.255.255.

        Raises:
            StartupError: the name is not known.
        """
        try:
            found = socket.getaddrinfo(self.address, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise StartupError(
                f"cannot listen on {self.address!r} ({reason}); "
                "choose an address of this machine with --address"
            ) from error
        return replace(self, address=str(found[0][4][0]))

    def server_flags(self) -> tuple[str, ...]:
        """Where Triton is told to listen; each of its servers writes an IPv6 address in its own way."""
        is_ipv6 = ":" in self.address
        http_address = f"ipv6:{self.address}" if is_ipv6 else self.address
        return (
            f"--grpc-address={f'[{self.address}]' if is_ipv6 else self.address}",
            f"--grpc-port={self.grpc_port}",
            f"--http-address={http_address}",
            f"--http-port={self.http_port}",
            f"--metrics-address={http_address}",
            f"--metrics-port={self.metrics_port}",
        )

    def check_free(self) -> None:
        """Check that every port of a numeric address can be listened on, and that no two are the same.

        Raises:
            StartupError: a port is taken, or the address isn't this machine's.
        """
        ports = {"gRPC": self.grpc_port, "HTTP": self.http_port, "metrics": self.metrics_port}
        for purpose, port in ports.items():
            flag = f"--{purpose.lower()}-port"
            if list(ports.values()).count(port) > 1:
                raise StartupError(f"port {port} is given for two purposes; choose another with {flag}")
            family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((self.address, port))
                except (OSError, OverflowError) as error:
                    reason, remedy = str(error), f"choose another port with {flag}"
                    if isinstance(error, OSError):
                        reason = error.strerror or reason
                        if error.errno == errno.EADDRINUSE:
                            remedy += " or stop what uses it"
                        elif error.errno != errno.EACCES:
                            remedy = "choose an address of this machine with --address"
                    raise StartupError(
                        f"cannot listen on {self.address} port {port} for {purpose} ({reason}); {remedy}"
                    ) from error


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A server start, checked and ready to be carried out."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables that differ from this process's."""
    endpoints: Endpoints
    shm_prefix: str
    """What the names of this server's files in /dev/shm begin with."""

    def shell_line(self) -> str:
        """The command as a line for a POSIX shell."""
        assignments = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return shlex.join(["env", *assignments, *self.argv])


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """What the operator chose."""

    repository: Path
    endpoints: Endpoints = field(default_factory=Endpoints)
    settings: Mapping[str, int] = field(default_factory=dict)
    """Fields of `ServingSettings` given for this start; the others come from the repository."""


@dataclass(frozen=True, slots=True)
class ModelRepository:
    """What a start depends on in a model repository."""

    manifest: Manifest
    engine: EnginePlacement
    parameters: Mapping[str, str]
    """The scheduler's, from its config.pbtxt; the other models have the same settings."""

    @property
    def has_hosted_plan(self) -> bool:
        """Whether Triton's TensorRT backend hosts the engine."""
        return self.manifest.runtime == "tensorrt" and self.engine is EnginePlacement.HOSTED


def plan_launch(options: LaunchOptions) -> LaunchPlan:
    """Check machine, repository and settings, and work out the command.

    Raises:
        StartupError: the sentence says what is wrong and what to do.
    """
    repository = check_repository(options.repository)
    chosen = {ENVIRONMENT_PREFIX + name.upper(): str(value) for name, value in options.settings.items()}
    settings = ServingSettings.read(repository.parameters, {**os.environ, **chosen})
    triton = find_triton()
    triton.check_numpy(importlib.metadata.version("numpy"))
    if repository.manifest.runtime == "tensorrt":
        check_tensorrt(repository.engine, triton)
    if repository.has_hosted_plan:
        _check_pool_is_left_alone({**os.environ, **chosen})
    endpoints = options.endpoints.resolved()
    endpoints.check_free()
    check_shared_memory(repository, settings.within(repository.manifest.limits))
    shm_prefix = f"{SHM_PREFIX}{uuid.uuid4().hex[:12]}_"
    return LaunchPlan(
        argv=_arguments(triton, options.repository, endpoints, shm_prefix),
        environment=_environment(triton) | chosen,
        endpoints=endpoints,
        shm_prefix=shm_prefix,
    )


def check_repository(repository: Path) -> ModelRepository:
    """Read a repository, and check that it is complete.

    Raises:
        StartupError: a file is missing, or a config.pbtxt or engine.json is damaged.
    """
    if not repository.is_dir():
        raise StartupError(
            f"there is no model repository at {repository}; "
            f"make one with `quire build CHECKPOINT --output {repository}`"
        )
    for model in (LLM, SCHEDULER):
        _check_model(repository, model)
    parameters = _scheduler_parameters(repository)
    engine = EnginePlacement.read(parameters)
    _check_model(repository, engine.engine_owner)
    return ModelRepository(read_manifest(repository / engine.engine_owner / "1"), engine, parameters)


def _check_model(repository: Path, model: str) -> None:
    for needed in (repository / model / "config.pbtxt", repository / model / "1"):
        if not needed.exists():
            raise StartupError(
                f"{needed} is missing; build the repository with "
                f"`quire build CHECKPOINT --output {repository}`"
            )


def _scheduler_parameters(repository: Path) -> dict[str, str]:
    path = repository / SCHEDULER / "config.pbtxt"
    try:
        config = text_format.Parse(path.read_text(), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise StartupError(f"{path} is damaged ({error}); build the repository again") from error
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


def _check_pool_is_left_alone(environment: Mapping[str, str]) -> None:
    """Refuse settings that a hosted plan cannot follow.

    Raises:
        SettingsError: the size of the KV pool is set.
    """
    for name in POOL_SETTINGS:
        if ENVIRONMENT_PREFIX + name.upper() in environment:
            raise SettingsError(
                f"{name} is set, but the KV pool of an engine that Triton's TensorRT backend hosts was sized "
                "when it was built; build again with `quire build --gpu-memory-utilization` or "
                "`--engine in-process`"
            )


def check_shared_memory(repository: ModelRepository, settings: ServingSettings) -> None:
    """Check that /dev/shm holds the tensors that Triton's processes pass to each other.

    Raises:
        StartupError: it is smaller than the small tensors need, and one step's logits where a hosted
            engine sends them and the scheduler reads them; a plan sends the tokens that it sampled.
    """
    needed = 4 * SHM_BYTES_PER_PROCESS
    if repository.engine is EnginePlacement.HOSTED and not repository.has_hosted_plan:
        needed += 2 * 4 * settings.max_num_seqs * repository.manifest.model.vocab_size
    free = shutil.disk_usage(SHM_DIR).free
    if free < needed:
        raise StartupError(
            f"{SHM_DIR} has {free >> 20} MiB free and serving needs {needed >> 20} MiB; enlarge it (docker "
            "run --shm-size, in Kubernetes a memory emptyDir) or lower --max-num-seqs"
        )


def _arguments(
    triton: TritonInstallation, repository: Path, endpoints: Endpoints, shm_prefix: str
) -> tuple[str, ...]:
    return (
        str(triton.binary),
        f"--model-repository={plain_path(repository.resolve())}",
        f"--backend-directory={backend_directory(triton)}",
        "--disable-auto-complete-config",
        *endpoints.server_flags(),
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={SERVER_EXIT_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        f"--backend-config=python,stub-timeout-seconds={STUB_TIMEOUT_S}",
        "--backend-config=python,thread-pool-size=8",
    )


def _environment(triton: TritonInstallation) -> dict[str, str]:
    """The variables that the stubs need; a stub runs as whatever `python3` comes first on PATH."""
    search_paths = {
        "PATH": (Path(sys.executable).parent,),
        "LD_LIBRARY_PATH": triton.library_dirs,
    }
    return {name: _prepended(name, *folders) for name, folders in search_paths.items() if folders}


def _prepended(variable: str, *folders: Path) -> str:
    """A search path's value with these folders first."""
    present = [part for part in os.environ.get(variable, "").split(os.pathsep) if part]
    return os.pathsep.join(dict.fromkeys([*map(str, folders), *present]))
