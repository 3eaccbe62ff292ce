"""The Triton model repository around an engine: its models, their config.pbtxt and their files.

Tensors and names come from `quire.interface`, parameters from `quire.settings`. config.pbtxt depends on
nothing but the number of frontends and where the engine runs: neither on the machine nor on the checkpoint.
Only a TensorRT plan that Triton hosts has a config.pbtxt of its own, which lists the steps to capture as CUDA
graphs.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from quire import interface
from quire.errors import BuildError
from quire.execution.manifest import Manifest
from quire.execution.padding import sized_shapes
from quire.interface import PLAN_FILE, EnginePlacement, TensorSpec
from quire.settings import ServingSettings

VERSION = "1"
SCHEDULER_FILE = "README.txt"
DEFAULT_FRONTENDS = 2
PLAN_PLATFORM = "tensorrt_plan"


def engine_dir(repository: Path, engine: EnginePlacement) -> Path:
    """Where the engine's files lie."""
    return repository / engine.engine_owner / VERSION


def model_configs(
    frontends: int, engine: EnginePlacement, plan: Manifest | None = None
) -> dict[str, model_config_pb2.ModelConfig]:
    """The configuration of each model, by its name; `plan` as in `write_configs`."""
    configs = {
        interface.LLM: _model_config(
            interface.LLM,
            component="frontend",
            inputs=interface.LLM_INPUTS,
            outputs=interface.LLM_OUTPUTS,
            engine=engine,
            instances=frontends,
            decoupled=True,
        ),
        interface.SCHEDULER: _model_config(
            interface.SCHEDULER,
            component="scheduler",
            inputs=interface.SCHEDULER_INPUTS,
            outputs=interface.SCHEDULER_OUTPUTS,
            engine=engine,
        ),
        interface.ENGINE: _model_config(
            interface.ENGINE,
            component="engine",
            inputs=interface.ENGINE_INPUTS,
            outputs=interface.ENGINE_OUTPUTS,
            engine=engine,
        ),
    }
    if plan is not None:
        configs[interface.ENGINE] = plan_config(plan)
    return {name: configs[name] for name in engine.models}


def write_configs(
    repository: Path, frontends: int, engine: EnginePlacement, plan: Manifest | None = None
) -> None:
    """Write every model's config.pbtxt and version directory.

    Args:
        repository: to write to; other files in it stay.
        frontends: instances of the model `llm`.
        engine: where the engine runs.
        plan: the manifest of a TensorRT plan that Triton's own backend hosts; None for any other engine.
    """
    for name, config in model_configs(frontends, engine, plan).items():
        (repository / name / VERSION).mkdir(parents=True, exist_ok=True)
        (repository / name / "config.pbtxt").write_text(text_format.MessageToString(config))


def write_model_files(repository: Path, checkpoint: Path, serving_files: Sequence[str]) -> None:
    """Give the frontends the checkpoint's tokenizer and configuration, and the scheduler its directory."""
    for name in serving_files:
        shutil.copyfile(checkpoint / name, repository / interface.LLM / VERSION / name)
    # Triton wants a version directory, and many ways of copying leave out empty ones.
    (repository / interface.SCHEDULER / VERSION / SCHEDULER_FILE).write_text(
        "The scheduler has no files of its own; those of the engine are here if it runs in its process.\n"
    )


def has_model_files(
    repository: Path, checkpoint: Path, serving_files: Sequence[str], engine: EnginePlacement
) -> bool:
    """Whether all but the engine's files is there: configs, and copies equal to the checkpoint's files."""
    llm_dir = repository / interface.LLM / VERSION
    return (
        all((repository / name / "config.pbtxt").is_file() for name in engine.models)
        and (repository / interface.SCHEDULER / VERSION / SCHEDULER_FILE).is_file()
        and all((llm_dir / name).is_file() for name in serving_files)
        and all(filecmp.cmp(checkpoint / name, llm_dir / name, shallow=False) for name in serving_files)
    )


def check_replaceable(target: Path) -> None:
    """Make sure that a build may take the place of `target`: nothing of anybody else's is there.

    Raises:
        BuildError: it exists and is something else than a model repository of Quire.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise BuildError(f"{target} exists and is not a directory; choose another output")
    for entry in target.iterdir():
        config = entry / "config.pbtxt"
        if entry.name not in EnginePlacement.HOSTED.models or (config.exists() and not _is_ours(config)):
            raise BuildError(
                f"{target} holds {entry.name}, which is no part of a model repository of Quire, and a build "
                "replaces the whole directory; choose another output"
            )


def _is_ours(config: Path) -> bool:
    try:
        parsed = text_format.Parse(config.read_text(), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError):
        return False
    if parsed.platform == PLAN_PLATFORM:
        return bool(parsed.parameters["engine"].string_value == EnginePlacement.HOSTED)
    return bool(parsed.backend == interface.BACKEND)


def plan_config(manifest: Manifest) -> model_config_pb2.ModelConfig:
    """How Triton's TensorRT backend hosts a plan.

    One instance on one GPU, because the backend gives every instance input buffers of its own and the pool is
    among them. It launches a step whose shapes are exactly those of a graph_spec as a CUDA graph: every step
    is padded to one of them. A graph_spec cannot name its profile: the backend tries each under every
    profile, and logs as errors that those which don't hold it refuse.
    """
    plan = manifest.plan
    if plan is None:
        raise ValueError("the manifest describes no plan")
    config = model_config_pb2.ModelConfig(
        name=interface.ENGINE,
        platform=PLAN_PLATFORM,
        backend="tensorrt",
        max_batch_size=0,
        default_model_filename=PLAN_FILE,
    )
    _add_tensors(config, interface.plan_inputs(manifest.inputs), interface.PLAN_OUTPUTS)
    config.instance_group.add(
        count=1,
        kind=model_config_pb2.ModelInstanceGroup.KIND_GPU,
        gpus=[0],
        profile=[str(index) for index in range(len(plan.profiles))],
    )
    config.optimization.eager_batching = True
    config.optimization.cuda.graphs = True
    limits = manifest.limits
    table_width = -(-limits.max_model_len // manifest.block_size)
    for size in plan.step_sizes:
        spec = config.optimization.cuda.graph_spec.add()
        shapes = sized_shapes(size, limits.max_num_seqs, table_width)
        for name in manifest.inputs:
            spec.input[name].dim.extend(shapes.get(name, (1,)))
    config.parameters["engine"].string_value = EnginePlacement.HOSTED
    return config


def _model_config(
    name: str,
    *,
    component: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    engine: EnginePlacement,
    instances: int = 1,
    decoupled: bool = False,
) -> model_config_pb2.ModelConfig:
    config = model_config_pb2.ModelConfig(name=name, backend=interface.BACKEND, max_batch_size=0)
    _add_tensors(config, inputs, outputs)
    config.instance_group.add(count=instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    config.parameters["component"].string_value = component
    config.parameters["engine"].string_value = engine
    for setting in fields(ServingSettings):
        config.parameters[setting.name].string_value = str(setting.default)
    return config


def _add_tensors(
    config: model_config_pb2.ModelConfig, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> None:
    for tensor in inputs:
        config.input.add(
            name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims, optional=tensor.optional
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims)


def _data_type(tensor: TensorSpec) -> int:
    number: int = model_config_pb2.DataType.Value(f"TYPE_{tensor.data_type}")
    return number
