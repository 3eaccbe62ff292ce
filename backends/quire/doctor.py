"""What `quire doctor` looks at: the parts that serving and building need, and the pairs that don't fit.

The checks are the launcher's own, but the doctor goes through all of them instead of stopping at the
first that fails. Each finding is a line; one that keeps something from working has a remedy.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from quire import __version__, gpu_chain
from quire.errors import CheckpointError, ManifestError, StartupError
from quire.execution.manifest import Manifest, verify_files
from quire.gpu_chain import Finding
from quire.interface import LLM
from quire.launcher.installation import backend_directory, find_triton
from quire.launcher.plan import SHM_DIR, check_repository
from quire.serving.frontend.generation_defaults import GenerationDefaults

SUPPORTED_PYTHONS = ((3, 11), (3, 12))
SMALLEST_SHM_BYTES = 64 << 20
"""Enough for a small model; the launcher computes what a given repository needs."""

SERVING_PACKAGES = ("msgspec", "pyzmq", "tokenizers", "tritonclient")
BUILD_PACKAGES = ("torch", "onnx", "onnxscript", "safetensors")


def examine(repository: Path | None = None) -> list[Finding]:
    """Look at everything. No server has to run and nothing is changed but the cache of backends.

    Args:
        repository: model repository that is to be served here; its files are checked, and its engine is held
            against what is installed.
    """
    served = _Repository(repository)
    return [
        Finding("quire", __version__),
        *_python(),
        *_triton(),
        *(_package(name, f"pip install {name}") for name in SERVING_PACKAGES),
        _openvino(),
        *_build_packages(),
        *served.findings,
        *gpu_chain.examine_chain(gpu_chain.look(), served.plan),
        _shared_memory(),
        Finding("cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"),
        Finding("memory", f"{_free_memory_bytes() >> 20} MiB free"),
    ]


class _Repository:
    """What is wrong with a repository, and its engine's manifest if that is of a plan."""

    def __init__(self, directory: Path | None) -> None:
        self.findings: list[Finding] = []
        self.plan: Manifest | None = None
        if directory is None:
            return
        try:
            repository = check_repository(directory)
        except StartupError as error:
            self.findings.append(Finding("repository", "not usable", str(error)))
            return
        manifest = repository.manifest
        self.findings += [
            _engine(manifest),
            _engine_files(manifest, directory / repository.engine.engine_owner / "1"),
            *_frontend_files(directory / LLM / "1"),
        ]
        if manifest.plan is not None:
            self.plan = manifest


def show(findings: list[Finding], console: Console) -> None:
    """Print what was found, a line each, then what to do."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "[red]✗[/]" if finding.remedy else "[green]✓[/]"
        line = escape(f"{finding.subject:{width}}  {finding.state}")
        console.print(f"{mark}  {line}", highlight=False, soft_wrap=True)
    remedies = [f"{finding.subject}: {finding.remedy}" for finding in findings if finding.remedy]
    for remedy in remedies or ["Everything that serving needs is here and fits together."]:
        console.print(remedy, style="bold", markup=False, highlight=False, soft_wrap=True)


def _engine(manifest: Manifest) -> Finding:
    kv = " with KV in fp8" if manifest.kv_cache_dtype == "fp8" else ""
    return Finding("engine", f"{manifest.precision}{kv}, for {manifest.runtime} {manifest.runtime_version}")


def _engine_files(manifest: Manifest, directory: Path) -> Finding:
    try:
        verify_files(manifest, directory)
    except ManifestError as error:
        return Finding("engine files", "not usable", str(error))
    return Finding("engine files", "as they were built")


def _frontend_files(directory: Path) -> Iterator[Finding]:
    """The checkpoint's files, read as the frontends do."""
    if _version("tokenizers") is None:
        return
    from quire.text.tokenizer import Tokenizer

    try:
        Tokenizer.from_directory(directory)
        GenerationDefaults.from_directory(directory)
    except CheckpointError as error:
        yield Finding("llm files", "not usable", f"{error}; build the repository again with `quire build`")
    else:
        yield Finding("llm files", "can be read")


def _python() -> Iterator[Finding]:
    state = f"{platform.python_version()} ({sys.executable})"
    supported = " or ".join(f"{major}.{minor}" for major, minor in SUPPORTED_PYTHONS)
    fits = sys.version_info[:2] in SUPPORTED_PYTHONS
    yield Finding("python", state, "" if fits else f"use Python {supported}")


def _triton() -> Iterator[Finding]:
    numpy = _version("numpy")
    try:
        triton = find_triton()
    except StartupError as error:
        yield Finding("tritonserver", "not usable", str(error))
        yield _package("numpy", "pip install 'numpy<2'")
        return
    yield Finding("tritonserver", f"{triton.version or 'unknown version'} ({triton.binary})")
    if numpy is None:
        yield _package("numpy", "pip install 'numpy<2'")
    else:
        try:
            triton.check_numpy(numpy)
            yield Finding("numpy", numpy)
        except StartupError as error:
            yield Finding("numpy", f"{numpy} does not fit tritonserver", str(error))
    try:
        yield Finding("backends", str(backend_directory(triton)))
    except StartupError as error:
        yield Finding("backends", "cannot be put together", str(error))


def _openvino() -> Finding:
    """OpenVINO is pinned exactly: the inputs of its paged attention change between releases."""
    pinned = next(
        match[1]
        for requirement in importlib.metadata.requires("quire") or ()
        if (match := re.match(r"openvino==([\w.]+)", requirement))
    )
    installed = _version("openvino")
    if installed is None:
        return Finding("openvino", "not installed", "pip install 'quire[cpu]'")
    if installed == pinned:
        return Finding("openvino", installed)
    return Finding("openvino", f"{installed}, built for {pinned}", f"pip install openvino=={pinned}")


def _build_packages() -> Iterator[Finding]:
    for name in BUILD_PACKAGES:
        yield Finding(name, _version(name) or "not installed; only `quire build` needs it")


def _shared_memory() -> Finding:
    usage = shutil.disk_usage(SHM_DIR)
    state = f"{usage.free >> 20} of {usage.total >> 20} MiB free"
    if usage.free >= SMALLEST_SHM_BYTES:
        return Finding(str(SHM_DIR), state)
    return Finding(
        str(SHM_DIR),
        state,
        f"make at least {SMALLEST_SHM_BYTES >> 20} MiB of it free (docker run --shm-size=1g, in Kubernetes "
        "a memory emptyDir)",
    )


def _package(name: str, remedy: str) -> Finding:
    version = _version(name)
    return Finding(name, version) if version is not None else Finding(name, "not installed", remedy)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _free_memory_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
