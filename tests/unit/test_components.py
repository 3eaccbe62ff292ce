"""The scheduler's and the engine's component as Triton sees them, with its module played by the test."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from tests.unit import tiny_engine
from tests.unit.triton_stand_in import IncomingRequest, InferenceResponse, StandIn, TritonError, inside_triton

from quire.errors import ManifestError, SettingsError
from quire.execution.model_inputs import ModelInputs
from quire.execution.openvino import OpenVINOEngine
from quire.interface import ENGINE_OUTPUTS, STEP_INPUTS, EnginePlacement
from quire.serving.component import ComponentArguments
from quire.serving.rendezvous import Rendezvous

PATIENCE_S = 30
POOL_BLOCKS = 12


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("repository")
    write_engine(repository / "engine" / "1")
    return repository


def write_engine(engine_dir: Path) -> None:
    engine_dir.mkdir(parents=True)
    tiny_engine.write_engine(engine_dir)


@pytest.fixture
def runtime_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where rendezvous folders go; components must not end the test when its parent ends."""
    with TemporaryDirectory(prefix="q") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        monkeypatch.setattr("quire.serving.component.exit_with_server", lambda pid, clean_up: None)
        yield Path(folder)


def arguments(
    repository: Path,
    model_name: str,
    engine: EnginePlacement = EnginePlacement.HOSTED,
    **parameters: int,
) -> ComponentArguments:
    chosen: dict[str, object] = {"kv_cache_bytes": POOL_BLOCKS * tiny_engine.KV_BYTES_PER_BLOCK, "threads": 1}
    chosen |= parameters | {"engine": engine}
    config = {"parameters": {name: {"string_value": str(value)} for name, value in chosen.items()}}
    return ComponentArguments.parse(
        {
            "model_name": model_name,
            "model_version": "1",
            "model_repository": str(repository / model_name),
            "model_config": json.dumps(config),
        }
    )


@pytest.fixture
def engine_component(repository: Path, runtime_dir: Path) -> Iterator[Any]:
    with inside_triton("engine.component") as (_, [module]):
        component = module.EngineComponent(arguments(repository, "engine"))
        yield component
        component.finalize()


def key_of(runtime_dir: Path) -> NDArray[np.uint8]:
    [folder] = runtime_dir.iterdir()
    return np.frombuffer((folder / "access_key").read_bytes(), np.uint8)


def prompt_step() -> ModelInputs:
    """Five tokens of one sequence in block 3, logits of the last two."""
    positions = np.arange(5, dtype=np.int32)
    return ModelInputs(
        step=41,
        input_ids=positions + 10,
        positions=positions,
        slot_mapping=positions + 3 * 32,
        block_tables=np.array([[3]], np.int32),
        query_start_loc=np.array([0, 5], np.int32),
        seq_lens=np.array([5], np.int32),
        logits_indices=np.array([3, 4], np.int32),
    )


def step_arrays(step: ModelInputs) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {spec.name: getattr(step, spec.name) for spec in STEP_INPUTS}
    return arrays | {"step": np.array([step.step], np.int32)}


def only_answer(component: Any, arrays: dict[str, NDArray[Any]]) -> InferenceResponse:
    [answer] = component.execute([IncomingRequest(arrays)])
    assert isinstance(answer, InferenceResponse)
    return answer


def test_the_engine_answers_a_step_as_the_contract_says(
    engine_component: Any, runtime_dir: Path, repository: Path
) -> None:
    step = prompt_step()
    outputs = only_answer(engine_component, step_arrays(step) | {"access_key": key_of(runtime_dir)}).arrays()
    assert list(outputs) == [spec.name for spec in ENGINE_OUTPUTS]
    assert outputs["step"].tolist() == [41]
    assert outputs["pool_info"].dtype == np.int32
    assert outputs["pool_info"][0] == POOL_BLOCKS
    alone = OpenVINOEngine(
        repository / "engine" / "1",
        kv_cache_bytes=POOL_BLOCKS * tiny_engine.KV_BYTES_PER_BLOCK,
        threads=1,
        warm_up_s=0.0,
    )
    np.testing.assert_array_equal(outputs["logits"], alone.run(step))


def test_the_engine_announces_itself_once_it_is_loaded(engine_component: Any, runtime_dir: Path) -> None:
    [folder] = runtime_dir.iterdir()
    assert (folder / "engine").read_text().split()[0] == str(os.getpid())


def test_the_engine_refuses_strangers(engine_component: Any, runtime_dir: Path) -> None:
    wrong_key = key_of(runtime_dir) ^ 1
    error = only_answer(engine_component, step_arrays(prompt_step()) | {"access_key": wrong_key}).failure
    assert error is not None
    assert error.code == TritonError.UNSUPPORTED
    assert "send requests to model llm" in error.text


def test_the_engine_refuses_a_step_outside_its_pool_and_goes_on(
    engine_component: Any, runtime_dir: Path
) -> None:
    key = {"access_key": key_of(runtime_dir)}
    arrays = step_arrays(prompt_step()) | key
    error = only_answer(
        engine_component, arrays | {"block_tables": np.array([[POOL_BLOCKS]], np.int32)}
    ).failure
    assert error is not None
    assert error.code == TritonError.INTERNAL
    assert f"block_tables contains {POOL_BLOCKS}" in error.text
    assert not only_answer(engine_component, arrays).has_error()


@pytest.mark.parametrize("component", ["scheduler", "engine"])
def test_limits_above_the_engines_keep_the_server_from_starting(
    repository: Path, runtime_dir: Path, component: str
) -> None:
    with inside_triton(
        "scheduler.component", "engine.component", "scheduler.triton_executor", "scheduler.metrics"
    ) as (
        _,
        modules,
    ):
        kind = {"scheduler": "SchedulerComponent", "engine": "EngineComponent"}[component]
        module: ModuleType = sys.modules[f"quire.serving.{component}.component"]
        assert module in modules
        with pytest.raises(SettingsError, match="max_num_seqs is 9, but the engine was built for at most 8"):
            getattr(module, kind)(arguments(repository, component, max_num_seqs=9))
    assert list(runtime_dir.iterdir()) == []


def test_the_environment_overrides_the_parameters(
    repository: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "9")
    with (
        inside_triton("engine.component") as (_, [module]),
        pytest.raises(SettingsError, match="max_num_seqs is 9"),
    ):
        module.EngineComponent(arguments(repository, "engine", max_num_seqs=1))


@pytest.fixture
def scheduler(
    repository: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StandIn, Any]]:
    """A scheduler whose engine never comes."""
    monkeypatch.setattr("quire.serving.scheduler.step_loop.ENGINE_PATIENCE_S", 0.01)
    names = ("scheduler.component", "scheduler.triton_executor", "scheduler.metrics")
    with inside_triton(*names) as (triton, [module, *_]):
        component = module.SchedulerComponent(arguments(repository, "scheduler"))
        yield triton, component
        component.finalize()
        assert list(runtime_dir.iterdir()) == []


def test_an_engine_in_process_is_ready_when_the_scheduler_is_and_nobody_else_is_told(
    tmp_path: Path, runtime_dir: Path
) -> None:
    write_engine(tmp_path / "scheduler" / "1")
    names = ("scheduler.component", "scheduler.triton_executor", "scheduler.metrics")
    with inside_triton(*names) as (_, [module, *_]):
        component = module.SchedulerComponent(arguments(tmp_path, "scheduler", EnginePlacement.IN_PROCESS))
        try:
            [folder] = runtime_dir.iterdir()
            assert not (folder / "engine").exists()
            assert blocks_of(component, runtime_dir) == POOL_BLOCKS - 1
        finally:
            component.finalize()


def test_a_damaged_engine_in_process_keeps_the_server_from_starting(
    tmp_path: Path, runtime_dir: Path
) -> None:
    write_engine(tmp_path / "scheduler" / "1")
    (tmp_path / "scheduler" / "1" / "model.onnx").write_bytes(b"something else")
    names = ("scheduler.component", "scheduler.triton_executor", "scheduler.metrics")
    with (
        inside_triton(*names) as (_, [module, *_]),
        pytest.raises(ManifestError, match=r"model\.onnx has changed"),
    ):
        module.SchedulerComponent(arguments(tmp_path, "scheduler", EnginePlacement.IN_PROCESS))


def blocks_of(component: Any, runtime_dir: Path) -> int:
    """Blocks of the pool that the scheduler works with, once its loop has asked for them."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        answer = only_answer(component, command("statistics", key_of(runtime_dir))).arrays()["answer"]
        if blocks := msgspec.json.decode(answer[0])["blocks"]:
            return int(blocks)
        time.sleep(0.01)
    raise AssertionError("the loop has not asked the engine for its pool")


def command(text: str, key: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return {"access_key": key, "command": np.array([text.encode()], np.object_)}


def test_the_scheduler_tells_its_statistics_before_the_engine_has_answered(
    scheduler: tuple[StandIn, Any], runtime_dir: Path
) -> None:
    answer = only_answer(scheduler[1], command("statistics", key_of(runtime_dir))).arrays()["answer"]
    statistics = msgspec.json.decode(answer[0])
    assert statistics["frontends"] == []
    assert statistics["running_requests"] == 0


def test_the_scheduler_is_missed_only_while_it_is_loaded(
    repository: Path, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.serving.scheduler.step_loop.ENGINE_PATIENCE_S", 0.01)
    server = Rendezvous.for_server(os.getppid())
    names = ("scheduler.component", "scheduler.triton_executor", "scheduler.metrics")
    with inside_triton(*names) as (_, [module, *_]):
        component = module.SchedulerComponent(arguments(repository, "scheduler"))
        scheduler = server.scheduler()
        component.finalize()
    assert scheduler is not None
    assert scheduler.pid == os.getpid()
    assert server.scheduler() is None
    server.close()


def test_the_scheduler_drains_at_once_when_nothing_runs(
    scheduler: tuple[StandIn, Any], runtime_dir: Path
) -> None:
    answer = only_answer(scheduler[1], command("drain", key_of(runtime_dir))).arrays()["answer"]
    assert answer.tolist() == [b"drained"]


def test_the_scheduler_refuses_strangers_and_unknown_commands(
    scheduler: tuple[StandIn, Any], runtime_dir: Path
) -> None:
    key = key_of(runtime_dir)
    stranger = only_answer(scheduler[1], command("drain", key ^ 1)).failure
    unknown = only_answer(scheduler[1], command("restart", key)).failure
    assert stranger is not None
    assert unknown is not None
    assert stranger.code == TritonError.UNSUPPORTED
    assert unknown.code == TritonError.INVALID_ARG
    assert "command is 'restart'; it must be statistics or drain" in unknown.text
