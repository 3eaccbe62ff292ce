"""The Triton model repository around an engine: its models, their config.pbtxt and their files.

Tensors and names come from `quire.interface`, parameters from `quire.settings`. config.pbtxt depends on
nothing but the number of frontends and where the engine runs: neither on the machine nor on the checkpoint.
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
from quire.interface import EnginePlacement, TensorSpec
from quire.settings import ServingSettings

VERSION = "1"
SCHEDULER_FILE = "README.txt"
DEFAULT_FRONTENDS = 2


def engine_dir(repository: Path, engine: EnginePlacement) -> Path:
    """Where the engine's files lie."""
    return repository / engine.engine_owner / VERSION


def model_configs(frontends: int, engine: EnginePlacement) -> dict[str, model_config_pb2.ModelConfig]:
    """The configuration of each model, by its name."""
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
    return {name: configs[name] for name in engine.models}


def write_configs(repository: Path, frontends: int, engine: EnginePlacement) -> None:
    """Write every model's config.pbtxt and version directory."""
    for name, config in model_configs(frontends, engine).items():
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
    return bool(parsed.backend == interface.BACKEND)


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
    for tensor in inputs:
        config.input.add(
            name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims, optional=tensor.optional
        )
    for tensor in outputs:
        config.output.add(name=tensor.name, data_type=_data_type(tensor), dims=tensor.dims)
    config.instance_group.add(count=instances, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    if decoupled:
        config.model_transaction_policy.decoupled = True
    config.parameters["component"].string_value = component
    config.parameters["engine"].string_value = engine
    for setting in fields(ServingSettings):
        config.parameters[setting.name].string_value = str(setting.default)
    return config


def _data_type(tensor: TensorSpec) -> int:
    number: int = model_config_pb2.DataType.Value(f"TYPE_{tensor.data_type}")
    return number
