"""Every pair of links that does not fit is found, with what to do; what fits or is not needed is no fault."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire import gpu_chain
from quire.doctor import examine
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    PlanDetails,
    write_manifest,
)
from quire.gpu_chain import Finding, FoundGpu, GpuMachine, examine_chain, look
from quire.interface import EnginePlacement
from quire_build.repository import write_configs

H200 = FoundGpu("NVIDIA H200", (9, 0), 141 << 30)
WHOLE = GpuMachine(
    driver="580.65.06",
    driver_cuda=(13, 0),
    gpus=(H200,),
    tensorrt="11.2.1.2",
    cuda_bindings="13.0.3",
    cupti=True,
    torch="2.11.0",
    torch_cuda=(13, 0),
)
PLAN = Manifest(
    version=MANIFEST_VERSION,
    model=ModelDimensions("LlamaForCausalLM", 100, 2, 4, 2, 16),
    block_size=16,
    limits=EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128),
    precision="bf16",
    kv_cache_dtype="bf16",
    runtime="tensorrt",
    runtime_version="11.2.1.2",
    inputs=("input_ids",),
    outputs=("logits",),
    kv_bytes_per_block=4096,
    checkpoint_digest="ab",
    files={},
    gate=GateReport(),
    plan=PlanDetails(
        max_blocks=100,
        num_pools=1,
        blocks_per_pool=100,
        profiles=((1, 64),),
        step_sizes=(8, 64),
        kernel_shared_bytes=49152,
        gpu_architecture=90,
        gpu_name="NVIDIA H200",
    ),
)


def remedies(machine: GpuMachine, plan: Manifest | None = None) -> dict[str, str]:
    return {found.subject: found.remedy for found in examine_chain(machine, plan) if found.remedy}


def test_a_chain_that_fits_needs_nothing_with_and_without_a_plan() -> None:
    assert remedies(WHOLE) == {}
    assert remedies(WHOLE, PLAN) == {}
    states = {found.subject: found.state for found in examine_chain(WHOLE, PLAN)}
    assert states == {
        "nvidia driver": "580.65.06, for CUDA up to 13.0",
        "gpu 0": "NVIDIA H200, compute capability 9.0, 144384 MiB",
        "tensorrt": "11.2.1.2",
        "cuda-bindings": "13.0.3",
        "cupti": "there",
        "torch's cuda": "13.0",
    }


def test_a_machine_without_any_link_is_no_fault_until_a_plan_is_to_run() -> None:
    assert remedies(GpuMachine()) == {}
    assert remedies(GpuMachine(), PLAN).keys() == {"nvidia driver", "tensorrt", "cuda-bindings"}


@pytest.mark.parametrize(
    ("change", "subject", "says"),
    [
        ({"driver": "570.1", "driver_cuda": (12, 8)}, "nvidia driver", "needs driver 580 or newer"),
        ({"driver_error": "cuInit returns 803", "gpus": ()}, "nvidia driver", "driver 580"),
        ({"tensorrt": "10.14.1"}, "tensorrt", "pip install 'tensorrt==11.*'"),
        ({"gpus": (FoundGpu("Tesla V100", (7, 0), 16 << 30),)}, "gpu 0", "capability 7.5"),
        ({"torch_cuda": None}, "torch's cuda", "a torch with CUDA"),
        ({"torch_cuda": (14, 1)}, "torch's cuda", "CUDA 13"),
        ({"cuda_bindings": "14.0.0"}, "cuda-bindings", "cuda-bindings==13"),
    ],
)
def test_a_link_that_does_not_fit_is_found_without_a_plan(
    change: dict[str, Any], subject: str, says: str
) -> None:
    assert says in remedies(replace(WHOLE, **change))[subject]


@pytest.mark.parametrize(
    ("change", "subject", "says"),
    [
        ({"tensorrt": "11.3.0.1"}, "tensorrt", "built with TensorRT 11.2.1.2"),
        ({"gpus": (replace(H200, name="NVIDIA L4", capability=(8, 9)),)}, "gpu 0", "built for NVIDIA H200"),
    ],
)
def test_a_plan_for_something_else_is_found(change: dict[str, Any], subject: str, says: str) -> None:
    machine = replace(WHOLE, **change)
    assert remedies(machine) == {}
    assert says in remedies(machine, PLAN)[subject]


def test_cupti_is_missed_only_where_the_plans_kernels_need_it() -> None:
    machine = replace(WHOLE, cupti=False)
    assert PLAN.plan is not None
    assert remedies(machine, PLAN) == remedies(machine) == {}
    hungry = msgspec.structs.replace(PLAN, plan=msgspec.structs.replace(PLAN.plan, kernel_shared_bytes=49153))
    assert "pip install 'nvidia-cuda-cupti==13.*'" in remedies(machine, hungry)["cupti"]
    assert remedies(WHOLE, hungry) == {}


def test_an_older_driver_is_no_fault_where_nothing_needs_cuda_13() -> None:
    machine = GpuMachine(driver="550.1", driver_cuda=(12, 4), gpus=(H200,))
    assert remedies(machine) == {}


class FakeCuda:
    """libcuda with one GPU, and NVML, as far as they are called."""

    def __init__(self, init: int = 0) -> None:
        self.cuInit = lambda flags: init

    def cuDriverGetVersion(self, out: Any) -> None:  # noqa: N802
        out._obj.value = 13020

    def cuDeviceGetCount(self, out: Any) -> None:  # noqa: N802
        out._obj.value = 1

    def cuDeviceGet(self, out: Any, index: int) -> None:  # noqa: N802
        out._obj.value = index

    def cuDeviceGetName(self, text: Any, size: int, device: Any) -> None:  # noqa: N802
        text.value = b"NVIDIA L4"

    def cuDeviceTotalMem_v2(self, out: Any, device: Any) -> None:  # noqa: N802
        out._obj.value = 24 << 30

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: Any) -> None:  # noqa: N802
        out._obj.value = {75: 8, 76: 9}[attribute]

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: int) -> int:  # noqa: N802
        text.value = b"580.65.06"
        return 0

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0


def test_the_driver_is_asked_for_itself_and_its_gpus() -> None:
    found = look(lambda name: FakeCuda())
    assert (found.driver, found.driver_cuda) == ("580.65.06", (13, 2))
    assert found.gpus == (FoundGpu("NVIDIA L4", (8, 9), 24 << 30),)


def test_a_driver_that_cannot_be_initialised_says_so_and_has_no_gpus() -> None:
    found = look(lambda name: FakeCuda(init=803))
    assert found.driver_error == "cuInit returns 803" and found.gpus == ()


def test_no_driver_is_no_error() -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    assert look(missing).driver is None


def test_the_doctor_holds_a_repositorys_plan_against_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    repository = tmp_path / "repository"
    write_configs(repository, 1, EnginePlacement.HOSTED, PLAN)
    write_manifest(PLAN, repository / "engine" / "1")
    monkeypatch.setattr(gpu_chain, "look", lambda: replace(WHOLE, tensorrt="11.3.0.1"))
    found = {finding.subject: finding for finding in examine(repository)}
    assert found["engine"] == Finding("engine", "bf16, for tensorrt 11.2.1.2")
    assert "11.2.1.2" in found["tensorrt"].remedy
