"""Engines for CPUs: model.onnx as it is, which OpenVINO compiles when it is loaded."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import msgspec

from quire.errors import BuildError
from quire.execution.executor import Executor
from quire.execution.manifest import KvCacheDtype, Manifest, Precision, Runtime
from quire.interface import STEP_INPUTS, EnginePlacement
from quire_build.checkpoint import Checkpoint, load_decoder
from quire_build.engine_builder import BuiltEngine, EngineOptions, Progress
from quire_build.workload import Workload


class OpenVINOBuilder:
    """Builds what `quire.execution.openvino` runs."""

    runtime: Runtime = "openvino"
    block_size = 32
    """The only size that OpenVINO's CPU kernel takes."""
    kv_cache_dtypes: Mapping[Precision, tuple[KvCacheDtype, ...]] = {
        "float32": ("float32",),
        "bf16": ("bf16",),
    }
    reference_device = "cpu"
    default_placement = EnginePlacement.HOSTED

    def version(self) -> str:
        """OpenVINO's version."""
        try:
            return importlib.metadata.version("openvino")
        except importlib.metadata.PackageNotFoundError:
            raise BuildError(
                "building needs the package openvino; install it with `pip install 'quire[build,cpu]'`"
            ) from None

    def target(self) -> str:
        """Nothing: the engine is compiled where it is loaded."""
        return ""

    def build(
        self, source: Checkpoint, options: EngineOptions, directory: Path, progress: Progress
    ) -> BuiltEngine:
        """Export model.onnx with its weights."""
        from quire_build.export import GRAPH_FILE, WEIGHTS_FILE, export_onnx

        progress(f"reading {source.directory} ({source.config.architecture})")
        decoder = load_decoder(source, num_positions=options.limits.max_model_len)
        parameters = sum(parameter.numel() for parameter in decoder.parameters())
        progress(f"exporting {parameters / 1e6:.1f}M parameters to {GRAPH_FILE}")
        export_onnx(decoder, source.config, self.block_size, directory)
        return BuiltEngine(
            files=(GRAPH_FILE, WEIGHTS_FILE),
            inputs=tuple(tensor.name for tensor in STEP_INPUTS),
            outputs=("logits",),
        )

    def executor(self, directory: Path, manifest: Manifest, workload: Workload) -> Executor:
        """The engine with a pool that is made for the workload, not for requests of full length."""
        from quire.execution.openvino import OpenVINOEngine, OpenVINOExecutor

        engine = OpenVINOEngine(
            directory,
            kv_cache_bytes=workload.num_blocks * manifest.kv_bytes_per_block,
            limits=msgspec.structs.replace(manifest.limits, max_model_len=workload.max_sequence_len),
            warm_up_s=0.0,
        )
        return OpenVINOExecutor(engine)
