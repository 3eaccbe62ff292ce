"""Loading a plan: what is refused, and how TensorRT is called; a stand-in takes TensorRT's place."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.unit.fake_gpu import DETAILS, LIMITS, MANIFEST, FakeDevice

from quire.errors import ManifestError, StartupError
from quire.execution.manifest import file_digest, read_manifest, write_manifest
from quire.execution.tensorrt import load_plan
from quire.execution.tensorrt.device import DeviceError, DeviceProperties
from quire.execution.tensorrt.plan import TensorRTPlan, check_fit
from quire.interface import PLAN_FILE
from quire.serving.engine.loading import load_executor
from quire.settings import ServingSettings

TENSORS = ("input_ids", "logits")


class StandIn:
    """The part of TensorRT that a plan uses; notes its calls."""

    __version__ = MANIFEST.runtime_version
    ILogger: Any = type("ILogger", (), {"Severity": SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)})
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.loads = True
        self.succeeds = True

    def Runtime(self, logger: Any) -> StandIn:  # noqa: N802
        self.logger = logger
        return self

    def deserialize_cuda_engine(self, data: Any) -> StandIn | None:
        if self.loads:
            self.calls.append(("deserialize", bytes(data)))
            return self
        self.logger.log(1, "the plan is of no use")
        return None

    num_io_tensors = len(TENSORS)

    def get_tensor_name(self, index: int) -> str:
        return TENSORS[index]

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return (1000, 3000, 2000)[profile]

    def create_execution_context(self, strategy: str) -> StandIn:
        self.calls.append(("context", strategy))
        return self

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> bool:
            self.calls.append((name, *arguments))
            if not self.succeeds:
                self.logger.log(1, "it is tired")
            return self.succeeds

        return call


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)
    return stand_in


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    (tmp_path / PLAN_FILE).write_bytes(b"a plan")
    digest = file_digest(tmp_path / PLAN_FILE)
    manifest = msgspec.structs.replace(
        MANIFEST, inputs=TENSORS[:1], outputs=TENSORS[1:], files={PLAN_FILE: digest}
    )
    write_manifest(manifest, tmp_path)
    return tmp_path


def test_a_plan_is_deserialised_and_all_contexts_have_room_for_the_hungriest_profile(
    engine_dir: Path, tensorrt: StandIn
) -> None:
    plan = TensorRTPlan(engine_dir, FakeDevice())
    assert plan.scratch_bytes == 3000
    context = plan.context(2, 0x500)
    context.set_shape("input_ids", (3,))
    context.set_address("input_ids", 0x100)
    context.enqueue()
    assert tensorrt.calls == [
        ("deserialize", b"a plan"),
        ("context", "user managed"),
        ("set_optimization_profile_async", 2, FakeDevice.stream),
        ("set_device_memory", 0x500, 3000),
        ("set_input_shape", "input_ids", (3,)),
        ("set_tensor_address", "input_ids", 0x100),
        ("execute_async_v3", FakeDevice.stream),
    ]


@pytest.mark.parametrize("call", ["context", "set_shape", "set_address", "enqueue"])
def test_what_tensorrt_refuses_is_an_error_with_its_own_words(
    engine_dir: Path, tensorrt: StandIn, call: str
) -> None:
    plan = TensorRTPlan(engine_dir, FakeDevice())
    context = plan.context(0, 0)
    tensorrt.succeeds = False
    calls = {
        "context": lambda: plan.context(0, 0),
        "set_shape": lambda: context.set_shape("input_ids", (1,)),
        "set_address": lambda: context.set_address("input_ids", 0),
        "enqueue": context.enqueue,
    }
    with pytest.raises(DeviceError, match=r"TensorRT .*: it is tired"):
        calls[call]()


def test_a_plan_that_tensorrt_cannot_load_is_refused(engine_dir: Path, tensorrt: StandIn) -> None:
    tensorrt.loads = False
    with pytest.raises(StartupError, match=r"the plan is of no use; build .* --runtime tensorrt"):
        TensorRTPlan(engine_dir, FakeDevice())


def test_a_plan_with_other_tensors_than_engine_json_lists_is_refused(
    engine_dir: Path, tensorrt: StandIn
) -> None:
    manifest = msgspec.structs.replace(read_manifest(engine_dir), inputs=("input_ids", "positions"))
    write_manifest(manifest, engine_dir)
    with pytest.raises(ManifestError, match="lists input_ids, logits, positions"):
        TensorRTPlan(engine_dir, FakeDevice())


def test_a_changed_plan_is_refused(engine_dir: Path, tensorrt: StandIn) -> None:
    (engine_dir / PLAN_FILE).write_bytes(b"another plan")
    with pytest.raises(ManifestError, match="has changed since it was built"):
        TensorRTPlan(engine_dir, FakeDevice())
    assert not tensorrt.calls


def test_without_tensorrt_the_error_says_what_to_install(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(StartupError, match="pip install tensorrt"):
        TensorRTPlan(engine_dir, FakeDevice())


@pytest.mark.parametrize(
    ("found", "version", "sentence"),
    [
        (DeviceProperties("Fake H100", 90), "11.3.0.1", "TensorRT 11.2.1.2, but 11.3.0.1 was found"),
        (DeviceProperties("Fake B200", 100), "11.2.1.2", "capability 9.0, but 10.0 was found"),
        (DeviceProperties("Fake H200", 90), "11.2.1.2", "the GPU Fake H100, but Fake H200 was found"),
    ],
)
def test_a_plan_for_another_machine_is_refused(found: DeviceProperties, version: str, sentence: str) -> None:
    device = FakeDevice()
    device.properties = found
    with pytest.raises(ManifestError, match=f"{sentence}; build it again .*--runtime tensorrt"):
        check_fit(MANIFEST, version, device)


def test_a_plan_for_this_machine_is_taken() -> None:
    assert check_fit(MANIFEST, "11.2.1.2", FakeDevice()) == DETAILS


def test_an_engine_for_another_runtime_is_refused() -> None:
    manifest = msgspec.structs.replace(MANIFEST, runtime="openvino", plan=None)
    with pytest.raises(ManifestError, match="an engine for openvino, not a TensorRT plan"):
        check_fit(manifest, "11.2.1.2", FakeDevice())


def test_the_scheduler_loads_a_plan_with_this_starts_settings(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    executor = object()

    def load(directory: Path, **arguments: Any) -> object:
        given.update(arguments, directory=directory)
        return executor

    monkeypatch.setattr("quire.execution.tensorrt.load_plan", load)
    settings = ServingSettings(kv_cache_bytes=5000, gpu_memory_utilization=70).within(LIMITS)
    assert load_executor(engine_dir, settings) is executor
    assert given == {
        "directory": engine_dir,
        "kv_cache_bytes": 5000,
        "gpu_memory_utilization": 70,
        "limits": LIMITS,
    }


def test_an_engine_that_no_server_runs_is_refused(engine_dir: Path) -> None:
    write_manifest(msgspec.structs.replace(read_manifest(engine_dir), runtime="torch"), engine_dir)
    with pytest.raises(ManifestError, match="an engine for torch"):
        load_executor(engine_dir, ServingSettings().within(LIMITS))


def test_without_a_gpu_the_error_is_cudas(engine_dir: Path) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("there is a GPU")
    with pytest.raises(StartupError, match="the GPU cannot be used: cudaSetDevice failed with cudaError"):
        load_plan(engine_dir)


def test_without_cuda_bindings_the_error_says_what_to_install(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(StartupError, match="pip install cuda-bindings"):
        load_plan(engine_dir)
