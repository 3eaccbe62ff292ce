"""The build as a whole: checkpoint, torch module, model.onnx, engine, numerics gate, model repository.

Each stage is a module of its own with files between them; here is only their order. An output that is already
what the build would make is left alone, and finding that out needs no torch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

import quire
from quire.errors import BuildError, ManifestError
from quire.execution.manifest import (
    EngineLimits,
    GateReport,
    KvCacheDtype,
    Manifest,
    Precision,
    Runtime,
    file_digest,
    read_manifest,
    verify_files,
    write_manifest,
)
from quire.interface import EnginePlacement
from quire_build.checkpoint import Checkpoint, load_decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.engine_builder import EngineBuilder, EngineOptions, Progress, engine_manifest
from quire_build.gate import compare, describe, enforce, gate_workload, text_workload, thresholds
from quire_build.openvino_engine import OpenVINOBuilder
from quire_build.repository import (
    DEFAULT_FRONTENDS,
    check_replaceable,
    engine_dir,
    has_model_files,
    write_configs,
    write_model_files,
)
from quire_build.staging import staged
from quire_build.tensorrt.builder import TensorRTBuilder

BUILDERS: Mapping[Runtime, EngineBuilder] = {"openvino": OpenVINOBuilder(), "tensorrt": TensorRTBuilder()}
RECORD_FILE = "build.json"
KvCacheChoice = Literal["auto", "fp8"]


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
    runtime: Runtime
    runtime_version: str
    target: str
    """The GPU that a plan is for."""
    checkpoint_digest: str
    options: EngineOptions
    frontends: int
    gate_text_digest: str
    """Empty where the gate runs on random tokens."""
    accept_numerics: bool


def build(
    checkpoint: Path,
    output: Path,
    *,
    runtime: Runtime = "openvino",
    precision: Precision | None = None,
    kv_cache_dtype: KvCacheChoice = "auto",
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 2048,
    max_model_len: int | None = None,
    frontends: int = DEFAULT_FRONTENDS,
    engine: EnginePlacement | None = None,
    gpu_memory_utilization: int = 90,
    gate_text: Path | None = None,
    accept_numerics: bool = False,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> BuildResult:
    """Build a Hugging Face checkpoint directory into a model repository at `output`.

    Args:
        checkpoint: config.json, *.safetensors, tokenizer.json and, optionally, generation_config.json.
        output: the repository; replaced as a whole when the build has succeeded, untouched otherwise.
        runtime: "openvino" for CPUs, "tensorrt" for the GPU of this machine.
        precision: of the arithmetic; None takes the first of those that the runtime has.
        kv_cache_dtype: of the KV cache; "auto" takes the type of the precision's activations.
        max_num_seqs: requests in one step, at most.
        max_num_batched_tokens: tokens in one step, at most.
        max_model_len: tokens of prompt and output together, at most; None takes what the model allows.
        frontends: processes that parse, tokenise and stream.
        engine: whether the engine is a Triton model or runs in the scheduler's process; None takes the
            runtime's default.
        gpu_memory_utilization: percent of the GPU's memory that a plan hosted by Triton is built to take.
        gate_text: held-out text for the numerics gate; None has it run on random tokens.
        accept_numerics: publish an engine that is beyond the gate's thresholds; its manifest says so.
        force: build even if `output` is up to date.
        progress: is told about each stage, a line at a time.

    Raises:
        CheckpointError: a file of the checkpoint is missing, damaged or contradicts another.
        UnsupportedModelError: Quire does not implement the model.
        NumericsGateError: the engine differs from the torch module by more than a threshold.
        BuildError: a limit or the output cannot be accepted, or another build of it is under way.
    """
    started = time.monotonic()
    check_replaceable(output)
    source = Checkpoint.open(checkpoint)
    limits = _limits(source.config, max_num_seqs, max_num_batched_tokens, max_model_len)
    if frontends < 1:
        raise BuildError(f"frontends is {frontends}; it must be at least 1")
    if not 1 <= gpu_memory_utilization <= 99:
        raise BuildError(f"gpu_memory_utilization is {gpu_memory_utilization}%; it must be 1 to 99")
    if gate_text is not None and not gate_text.is_file():
        raise BuildError(f"gate_text is {gate_text}, which is not a file")
    if runtime not in BUILDERS:
        raise BuildError(f"runtime is {runtime!r}; it must be one of {', '.join(BUILDERS)}")
    builder = BUILDERS[runtime]
    precisions = tuple(builder.kv_cache_dtypes)
    precision = precision or precisions[0]
    if precision not in precisions:
        raise BuildError(
            f"precision is {precision!r}; for runtime {runtime} it must be one of {', '.join(precisions)}"
        )
    engine = engine or builder.default_placement
    options = EngineOptions(
        precision, _kv_cache_dtype(builder, precision, kv_cache_dtype), limits, engine, gpu_memory_utilization
    )
    record = BuildRecord(
        quire_version=quire.__version__,
        builder_digest=_builder_digest(),
        runtime=runtime,
        runtime_version=builder.version(),
        target=builder.target(),
        checkpoint_digest=source.digest,
        options=options,
        frontends=frontends,
        gate_text_digest=file_digest(gate_text) if gate_text else "",
        accept_numerics=accept_numerics,
    )
    if not force and (manifest := _published(output, record, source)) is not None:
        progress(f"{output} is up to date")
        return BuildResult(output, manifest, was_up_to_date=True, seconds=time.monotonic() - started)

    with staged(output) as repository:
        directory = engine_dir(repository, engine)
        directory.mkdir(parents=True)
        manifest = _build_engine(source, record, directory, gate_text, progress)
        write_configs(repository, frontends, engine, manifest if manifest.plan else None)
        write_model_files(repository, source.directory, source.serving_files)
        (directory / RECORD_FILE).write_bytes(msgspec.json.encode(record))
    progress(f"published {output}")
    return BuildResult(output, manifest, was_up_to_date=False, seconds=time.monotonic() - started)


def _build_engine(
    source: Checkpoint, record: BuildRecord, directory: Path, gate_text: Path | None, progress: Progress
) -> Manifest:
    """Build and check the engine; afterwards `directory` holds it with its manifest."""
    builder = BUILDERS[record.runtime]
    progress("starting torch")
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise BuildError(
            f"building needs the package {error.name}; install it with `pip install 'quire[build]'`"
        ) from error
    built = builder.build(source, record.options, directory, progress)
    manifest = engine_manifest(source.config, builder, record.options, built, directory, source.digest)
    write_manifest(manifest, directory)

    progress("comparing the engine with the torch module")
    report = _measure(source, manifest, directory, builder, gate_text)
    progress(describe(report))
    enforce(report, manifest.precision, manifest.kv_cache_dtype, force=record.accept_numerics)
    manifest = msgspec.structs.replace(manifest, gate=report)
    write_manifest(manifest, directory)
    return manifest


def _measure(
    source: Checkpoint, manifest: Manifest, directory: Path, builder: EngineBuilder, text: Path | None
) -> GateReport:
    """Run the numerics gate on the engine as a server would load it.

    An engine of quantised weights or KV is held against the module rounded to its model type, any other
    against float32.
    """
    import torch

    from quire_build.quantization import PLANS, round_in_place
    from quire_build.torch_executor import KV_DTYPES, TorchExecutor

    # A plan returns logits for as many rows as it runs sequences.
    rows = manifest.limits.max_num_seqs if manifest.plan else None
    block_size, limits = manifest.block_size, manifest.limits
    if text is None:
        workload = gate_workload(source.config.vocab_size, block_size, limits, max_logits_rows=rows)
    else:
        workload = text_workload(text, source.directory, block_size, limits, max_logits_rows=rows)
    decoder = load_decoder(source, limits.max_model_len).to(builder.reference_device)
    dtype = torch.float32
    if manifest.precision in PLANS or manifest.kv_cache_dtype == "fp8":
        dtype = KV_DTYPES[builder.kv_cache_dtypes[manifest.precision][0]]
        round_in_place(decoder, dtype)
    reference = TorchExecutor(decoder, source.config, workload.num_blocks, block_size, dtype)
    engine = builder.executor(directory, manifest, workload)
    try:
        return compare(reference, engine, workload, thresholds(manifest.precision, manifest.kv_cache_dtype))
    finally:
        engine.close()
        reference.close()


def _published(output: Path, record: BuildRecord, source: Checkpoint) -> Manifest | None:
    """The manifest of the repository at `output` if it is whole and what `record` describes."""
    directory = engine_dir(output, record.options.placement)
    try:
        if msgspec.json.decode((directory / RECORD_FILE).read_bytes(), type=BuildRecord) != record:
            return None
        manifest = read_manifest(directory)
        verify_files(manifest, directory)
    except (OSError, msgspec.DecodeError, ManifestError):
        return None
    whole = has_model_files(output, source.directory, source.serving_files, record.options.placement)
    return manifest if whole else None


def _kv_cache_dtype(builder: EngineBuilder, precision: Precision, choice: KvCacheChoice) -> KvCacheDtype:
    own, *others = builder.kv_cache_dtypes[precision]
    if choice == "auto":
        return own
    if choice not in others:
        raise BuildError(
            f"kv_cache_dtype is {choice!r}; for runtime {builder.runtime} it must be "
            f"{' or '.join(('auto', *others))}"
        )
    return choice


def _limits(
    config: DecoderConfig, max_num_seqs: int, max_num_batched_tokens: int, max_model_len: int | None
) -> EngineLimits:
    if max_model_len is None:
        max_model_len = config.max_context
    if max_model_len > config.max_context:
        raise BuildError(
            f"max_model_len is {max_model_len}, but the model is made for {config.max_context} positions"
        )
    if max_model_len < 2:
        raise BuildError(f"max_model_len is {max_model_len}; a prompt and its first token need at least 2")
    if max_num_seqs < 1:
        raise BuildError(f"max_num_seqs is {max_num_seqs}; it must be at least 1")
    if max_num_batched_tokens < max_num_seqs:
        raise BuildError(
            f"max_num_batched_tokens is {max_num_batched_tokens}; it must be at least max_num_seqs, "
            f"{max_num_seqs}, for each running request to get a token"
        )
    return EngineLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )


def _builder_digest() -> str:
    quire_package = Path(quire.__file__).parent
    sources = [
        *sorted(Path(__file__).parent.rglob("*.py")),
        *(quire_package / name for name in ("interface.py", "settings.py", "execution/manifest.py")),
    ]
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return digest.hexdigest()
