"""config.pbtxt is what Triton and the components need, and the tracked one is the generated one."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from quire import interface
from quire.errors import BuildError, StartupError
from quire.interface import EnginePlacement
from quire.settings import ServingSettings
from quire_build.repository import (
    DEFAULT_FRONTENDS,
    check_replaceable,
    write_configs,
)

TRACKED = Path(__file__).parents[2] / "model_repository"


def read_configs(repository: Path) -> dict[str, model_config_pb2.ModelConfig]:
    return {
        path.parent.name: text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
        for path in repository.glob("*/config.pbtxt")
    }


def parameters_of(config: model_config_pb2.ModelConfig) -> dict[str, str]:
    return {name: parameter.string_value for name, parameter in config.parameters.items()}


@pytest.mark.parametrize("model", [interface.LLM, interface.SCHEDULER, interface.ENGINE])
def test_the_tracked_config_is_what_a_build_writes_on_any_machine(model: str, tmp_path: Path) -> None:
    write_configs(tmp_path, DEFAULT_FRONTENDS, EnginePlacement.HOSTED)
    assert (TRACKED / model / "config.pbtxt").read_text() == (tmp_path / model / "config.pbtxt").read_text()


def test_configs_read_back_as_they_were_meant(tmp_path: Path) -> None:
    write_configs(tmp_path, 3, EnginePlacement.HOSTED)
    configs = read_configs(tmp_path)
    assert {name: config.backend for name, config in configs.items()} == dict.fromkeys(configs, "quire")
    assert {name: config.parameters["component"].string_value for name, config in configs.items()} == {
        "llm": "frontend",
        "scheduler": "scheduler",
        "engine": "engine",
    }
    assert [configs[name].instance_group[0].count for name in ("llm", "scheduler", "engine")] == [3, 1, 1]
    assert [configs[name].model_transaction_policy.decoupled for name in ("llm", "scheduler", "engine")] == [
        True,
        False,
        False,
    ]
    tensors = {tensor.name: tensor for tensor in configs["llm"].input}
    assert tensors["stop"].data_type == model_config_pb2.TYPE_STRING and list(tensors["stop"].dims) == [-1]
    assert tensors["text_input"].optional
    for config in configs.values():
        assert ServingSettings.read(parameters_of(config), {}) == ServingSettings()
        assert EnginePlacement.read(parameters_of(config)) is EnginePlacement.HOSTED


def test_with_the_engine_in_process_there_is_no_model_for_it_and_the_others_know(tmp_path: Path) -> None:
    write_configs(tmp_path, 2, EnginePlacement.IN_PROCESS)
    configs = read_configs(tmp_path)
    assert configs.keys() == {"llm", "scheduler"}
    for config in configs.values():
        assert EnginePlacement.read(parameters_of(config)) is EnginePlacement.IN_PROCESS


def test_where_the_engine_runs_changes_nothing_else(tmp_path: Path) -> None:
    write_configs(tmp_path / "hosted", 2, EnginePlacement.HOSTED)
    write_configs(tmp_path / "in-process", 2, EnginePlacement.IN_PROCESS)
    hosted, in_process = read_configs(tmp_path / "hosted"), read_configs(tmp_path / "in-process")
    for name, config in in_process.items():
        config.parameters["engine"].string_value = "hosted"
        assert config == hosted[name]


@pytest.mark.parametrize("parameters", [{}, {"engine": "elsewhere"}])
def test_a_repository_that_does_not_say_where_its_engine_runs_is_refused(parameters: dict[str, str]) -> None:
    with pytest.raises(StartupError, match=r"must be hosted or in-process.*quire build"):
        EnginePlacement.read(parameters)


@pytest.mark.parametrize("engine", EnginePlacement)
def test_an_output_that_holds_anything_else_is_not_replaced(tmp_path: Path, engine: EnginePlacement) -> None:
    write_configs(tmp_path, 2, engine)
    check_replaceable(tmp_path)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(BuildError, match="thesis"):
        check_replaceable(tmp_path)


def test_another_backends_model_of_the_same_name_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "config.pbtxt").write_text('name: "llm"\nbackend: "vllm"\n')
    with pytest.raises(BuildError, match="llm"):
        check_replaceable(tmp_path)


def test_a_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BuildError, match=r"notes\.txt"):
        check_replaceable(tmp_path / "notes.txt")
