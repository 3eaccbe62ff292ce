"""The build as a whole: checkpoint, torch module, model.onnx, engine, numerics gate, model repository.

Each stage is a module of its own with files between them; here is only their order. An output that is already
what the build would make is left alone, and finding that out needs no torch.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

import quire
from quire import interface
from quire.errors import BuildError, ManifestError
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    file_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from quire_build.checkpoint import Checkpoint, load_decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.gate import TOLERANCES, Precision, compare, describe, enforce, gate_workload
from quire_build.repository import (
    DEFAULT_FRONTENDS,
    VERSION,
    check_replaceable,
    write_configs,
    write_model_files,
)
from quire_build.staging import staged

RUNTIME = "openvino"
BLOCK_SIZE = 32
"""Tokens in a block: the only size that OpenVINO's CPU kernel takes."""
KV_ELEMENT_BYTES = {"float32": 4, "bf16": 2}
RECORD_FILE = "build.json"

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build came to."""

    repository: Path
    manifest: Manifest
    was_up_to_date: bool
    """Nothing was built, because the repository already was what the build would have made."""
    seconds: float


class BuildRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that the output is a function of; kept beside the engine."""

    quire_version: str
    builder_digest: str
    """SHA-256 over the sources that make the output."""
    runtime_version: str
    checkpoint_digest: str
    precision: str
    limits: EngineLimits
    frontends: int


def build(
    checkpoint: Path,
    output: Path,
    *,
    precision: Precision = "float32",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int | None = None,
    frontends: int = DEFAULT_FRONTENDS,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> BuildResult:
    """Build a Hugging Face checkpoint directory into a model repository at `output`.

    Args:
        checkpoint: config.json, *.safetensors, tokenizer.json and, optionally, generation_config.json.
        output: the repository; replaced as a whole when the build has succeeded, untouched otherwise.
        precision: of the arithmetic: "float32" or "bf16".
        max_num_seqs: requests in one step, at most.
        max_num_batched_tokens: tokens in one step, at most.
        max_model_len: tokens of prompt and output together, at most; None takes what the model allows.
        frontends: processes that parse, tokenise and stream.
        force: build even if `output` is up to date.
        progress: is told about each stage, a line at a time.

    Raises:
        CheckpointError: a file of the checkpoint is missing, damaged or contradicts another.
        UnsupportedModelError: Quire does not implement the model.
        NumericsGateError: the engine differs from the torch module by more than the tolerance.
        BuildError: a limit or the output cannot be accepted, or another build of it is under way.
    """
    started = time.monotonic()
    check_replaceable(output)
    source = Checkpoint.open(checkpoint)
    limits = _limits(source.config, max_num_seqs, max_num_batched_tokens, max_model_len)
    if frontends < 1:
        raise BuildError(f"frontends is {frontends}; it must be at least 1")
    record = BuildRecord(
        quire_version=quire.__version__,
        builder_digest=_builder_digest(),
        runtime_version=_runtime_version(),
        checkpoint_digest=source.digest,
        precision=precision,
        limits=limits,
        frontends=frontends,
    )
    if not force and (manifest := _published(output, record)) is not None:
        progress(f"{output} is up to date")
        return BuildResult(output, manifest, was_up_to_date=True, seconds=time.monotonic() - started)

    with staged(output) as repository:
        engine_dir = repository / interface.ENGINE / VERSION
        write_configs(repository, frontends)
        write_model_files(repository, source.directory, source.serving_files)
        manifest = _build_engine(source, record, engine_dir, progress)
        (engine_dir / RECORD_FILE).write_bytes(msgspec.json.encode(record))
    progress(f"published {output}")
    return BuildResult(output, manifest, was_up_to_date=False, seconds=time.monotonic() - started)


def _build_engine(source: Checkpoint, record: BuildRecord, engine_dir: Path, progress: Progress) -> Manifest:
    """Export, load and check the engine; afterwards `engine_dir` holds it with its manifest."""
    progress("starting torch")
    from quire_build.export import GRAPH_FILE, WEIGHTS_FILE, export_onnx

    progress(f"reading {source.directory} ({source.config.architecture})")
    decoder = load_decoder(source, num_positions=record.limits.max_model_len)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    progress(f"exporting {parameters / 1e6:.1f}M parameters to {GRAPH_FILE}")
    export_onnx(decoder, source.config, BLOCK_SIZE, engine_dir)
    files = {name: file_digest(engine_dir / name) for name in (GRAPH_FILE, WEIGHTS_FILE)}
    manifest = _manifest(source.config, record, files)
    write_manifest(manifest, engine_dir)

    progress("comparing the engine with the torch module")
    report = _measure(decoder, source.config, manifest, engine_dir)
    progress(describe(report))
    enforce(report, record.precision)
    manifest = msgspec.structs.replace(manifest, gate=report)
    write_manifest(manifest, engine_dir)
    return manifest
