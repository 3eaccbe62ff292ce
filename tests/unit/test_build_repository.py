"""config.pbtxt is what Triton and the components need, and the tracked one is the generated one."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from quire import interface
from quire.errors import BuildError, StartupError
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    PlanDetails,
)
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
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


def plan_manifest() -> Manifest:
    """Of a plan whose pool is two tensors, for requests of at most 100 tokens."""
    return Manifest(
        version=MANIFEST_VERSION,
        model=ModelDimensions("LlamaForCausalLM", 1024, 2, 4, 2, 16),
        block_size=16,
        limits=EngineLimits(max_num_seqs=12, max_num_batched_tokens=300, max_model_len=100),
        precision="bf16",
        kv_cache_dtype="bf16",
        runtime="tensorrt",
        runtime_version="11.2.1",
        inputs=(*(spec.name for spec in interface.PLAN_INPUTS), "kv_cache.0", "kv_cache.1"),
        outputs=tuple(spec.name for spec in interface.PLAN_OUTPUTS),
        kv_bytes_per_block=8192,
        checkpoint_digest="",
        files={},
        gate=GateReport(),
        plan=PlanDetails(
            max_blocks=90,
            num_pools=2,
            blocks_per_pool=50,
            profiles=((1, 16), (17, 64), (65, 300)),
            step_sizes=(1, 2, 4, 8, 12, 16, 64, 300),
            kernel_shared_bytes=DEFAULT_SHARED_BYTES,
            gpu_architecture=90,
            gpu_name="NVIDIA H100",
        ),
    )


def test_a_hosted_plan_is_one_instance_with_every_profile_and_its_own_tensors(tmp_path: Path) -> None:
    write_configs(tmp_path, 2, EnginePlacement.HOSTED, plan_manifest())
    configs = read_configs(tmp_path)
    assert configs["llm"].backend == configs["scheduler"].backend == "quire"
    engine = configs["engine"]
    assert (engine.platform, engine.backend, engine.max_batch_size) == ("tensorrt_plan", "tensorrt", 0)
    assert engine.default_model_filename == "model.plan"
    [group] = engine.instance_group
    assert (group.kind, group.count, list(group.gpus)) == (
        model_config_pb2.ModelInstanceGroup.KIND_GPU,
        1,
        [0],
    )
    assert list(group.profile) == ["0", "1", "2"]
    tensors = {tensor.name: tensor for tensor in engine.input}
    assert tuple(tensors) == plan_manifest().inputs
    for name in ("engine_state", "kv_cache.0", "kv_cache.1"):
        assert (tensors[name].data_type, list(tensors[name].dims)) == (model_config_pb2.TYPE_INT64, [-1])
    assert tensors["sampling"].data_type == model_config_pb2.TYPE_FP32
    assert [tensor.name for tensor in engine.output] == ["logits", "sampled_ids", "pool_info", "step_done"]


def test_each_size_of_a_step_is_captured_with_a_shape_for_every_input(tmp_path: Path) -> None:
    manifest = plan_manifest()
    assert manifest.plan is not None
    write_configs(tmp_path, 2, EnginePlacement.HOSTED, manifest)
    engine = read_configs(tmp_path)["engine"]
    assert engine.optimization.cuda.graphs
    # Output buffers of their own would double the inputs, the pool among them.
    assert not engine.optimization.cuda.output_copy_stream
    ranks = {tensor.name: len(tensor.dims) for tensor in engine.input}
    for size, spec in zip(manifest.plan.step_sizes, engine.optimization.cuda.graph_spec, strict=True):
        seqs = min(size, 12)
        shapes = {name: list(shape.dim) for name, shape in spec.input.items()}
        assert spec.batch_size == 0 and not spec.HasField("graph_lower_bound")
        assert {name: len(shape) for name, shape in shapes.items()} == ranks
        assert shapes == {
            "input_ids": [size],
            "positions": [size],
            "slot_mapping": [size],
            "block_tables": [seqs, 7],
            "query_start_loc": [seqs + 1],
            "seq_lens": [seqs],
            "logits_indices": [seqs],
            "sampling": [seqs, 5],
            "step": [5],
            "engine_state": [1],
            "kv_cache.0": [1],
            "kv_cache.1": [1],
        }


def test_a_hosted_plans_repository_is_replaceable_and_somebody_elses_plan_is_not(tmp_path: Path) -> None:
    write_configs(tmp_path, 2, EnginePlacement.HOSTED, plan_manifest())
    check_replaceable(tmp_path)
    (tmp_path / "engine" / "config.pbtxt").write_text('name: "engine"\nplatform: "tensorrt_plan"\n')
    with pytest.raises(BuildError, match="engine"):
        check_replaceable(tmp_path)
