"""Each rewrite of model.onnx leaves its numbers alone: the graph before and after, run on the same step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from tests.parity.test_tensorrt_operators import run

from quire.errors import UnsupportedModelError
from quire.execution.engine_state import MAX_POOLS, STEP_MARK, STEP_SIZE_BYTE, engine_state_elements
from quire.execution.tensorrt.shared_memory import DEFAULT_SHARED_BYTES
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig, RopeConfig
from quire_build.export import GRAPH_FILE, export_onnx
from quire_build.paged_attention import paged_attention_in_place
from quire_build.quantization import PLANS, rotated
from quire_build.tensorrt import operators
from quire_build.tensorrt.lowering import lower
from quire_build.tensorrt.lowering.attention import lower_attention
from quire_build.tensorrt.lowering.graph import LINEAR_INPUTS, Graph, attribute
from quire_build.tensorrt.lowering.linear import lower_linear
from quire_build.tensorrt.lowering.norm import lower_norms
from quire_build.tensorrt.lowering.quantize import lower_quantization
from quire_build.tensorrt.lowering.residual import lower_residual_sums
from quire_build.tensorrt.lowering.swiglu import lower_swiglu

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")

Array = NDArray[Any]
BLOCK_SIZE, NUM_BLOCKS = 8, 12


def config(**changes: Any) -> DecoderConfig:
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocab_size": 48, "hidden_size": 64, "intermediate_size": 80,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope": RopeConfig(theta=10000.0), "tie_word_embeddings": False,
        "qkv_bias": False, "output_bias": False, "mlp_bias": False,
        "qk_norm": False, "sliding_windows": (None, 5),
    }  # fmt: skip
    return DecoderConfig(**(values | changes))


def export(directory: Path, decoder_config: DecoderConfig) -> onnx.ModelProto:
    torch.manual_seed(0)
    decoder = Decoder(decoder_config, num_positions=64)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(std=0.3 if parameter.dim() > 1 else 1.0)
    export_onnx(decoder.eval(), decoder_config, BLOCK_SIZE, directory)
    return onnx.load(directory / GRAPH_FILE)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return export(tmp_path_factory.mktemp("onnx"), config())


class PagedAttention(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        given: list[Any] = [torch.from_numpy(array.copy()) for array in inputs]
        given += [attributes[name] for name in ("scale", "num_heads", "num_kv_heads", "sliding_window")]
        result = paged_attention_in_place(*given)
        return tuple(tensor.numpy() for tensor in result)


def run_node(
    kind: type[operators.Operator],
    node: onnx.NodeProto,
    inputs: Sequence[Array | None],
    attributes: dict[str, Any],
) -> tuple[Array, ...]:
    """Run one of our operators on float32; `inputs` are the node's, and what a plan adds to them."""
    flags = {
        "normed": 0, "epsilon": 0.0, "gated": 0, "adds_residual": 0, "wide_output": 0, "weight_group": 0,
        "weight_float": 0, "narrow_rows": 0, "shared_bytes": DEFAULT_SHARED_BYTES, "multiprocessors": 3,
    }  # fmt: skip
    values = flags | POOL_OF_ONE | attributes
    # The evaluator hands in numpy scalars.
    types = get_type_hints(kind)
    own = {field.name: types[field.name](values[field.name]) for field in fields(kind)}  # type: ignore[arg-type]
    first = next(array for array in inputs if array is not None)
    given = [torch.from_numpy(first if array is None else array) for array in inputs]
    outputs = run(kind(**own), given)
    return tuple(tensor.numpy() for tensor in outputs[: len(node.output)])


POOL_OF_ONE = {
    "max_blocks": NUM_BLOCKS, "num_pools": 1, "blocks_per_pool": NUM_BLOCKS, "max_num_seqs": 8,
    "kv_element_bytes": 4,
}  # fmt: skip


def new_state() -> Array:
    """As in a step of which everything is used."""
    state = np.zeros(engine_state_elements(8), np.int64)
    state[0] = NUM_BLOCKS
    state[STEP_SIZE_BYTE // 8 :][:2] = STEP_MARK << 32 | (2**31 - 1)
    return state


class StepBegin(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        pools = [np.zeros(1, np.int64)] * MAX_POOLS
        return run_node(operators.StepBegin, self.onnx_node, [*inputs[:3], *pools], attributes)


class KvWrite(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        return run_node(operators.KvWrite, self.onnx_node, [*inputs, new_state()], attributes)


class AssignSplits(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        return run_node(operators.AssignSplits, self.onnx_node, inputs, attributes)


class PagedAttend(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        return run_node(operators.PagedAttend, self.onnx_node, [*inputs, new_state()], attributes)


def rows_and_others(kind: str, inputs: Sequence[Array | None]) -> list[Array | None]:
    """A linear layer's inputs without rows of eight bits: made wide, they are its rows.

    Nothing but a plan's builder quantises weights: these are as wide as ever.
    """
    own = list(inputs[: LINEAR_INPUTS[kind]])
    if len(inputs) > len(own):
        numbers, scales = inputs[len(own) :]
        assert numbers is not None
        assert scales is not None
        rows = numbers.view(np.int8).astype(np.float32) * scales[:, None]
        own[0] = rotated(torch.from_numpy(rows), PLANS["int8"].rotation(rows.shape[1])).numpy()
    return own


class Linear(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        given = [*rows_and_others("Linear", inputs), None, None, None, new_state()]
        return run_node(operators.Linear, self.onnx_node, given, attributes)


class ProjectQkv(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array | None, **attributes: Any) -> tuple[Array, ...]:
        own = rows_and_others("ProjectQkv", inputs)
        given = [*own[:4], None, None, None, *own[4:], new_state()]
        return run_node(operators.ProjectQkv, self.onnx_node, given, attributes)


class Quantize(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        return run_node(operators.Quantize, self.onnx_node, [*inputs, new_state()], attributes)


class Sample(OpRun):
    op_domain = "quire"

    def _run(self, *inputs: Array, **attributes: Any) -> tuple[Array, ...]:
        return run_node(operators.Sample, self.onnx_node, inputs, attributes)


OPERATORS = [
    PagedAttention, StepBegin, AssignSplits, ProjectQkv, KvWrite, PagedAttend, Quantize, Linear, Sample,
]  # fmt: skip


def step() -> dict[str, Array]:
    """A decode row and two chunks over random caches, block by block."""
    rng = np.random.default_rng(0)
    query_lens, seq_lens = np.array([1, 4, 3]), np.array([18, 4, 11])
    tables = np.array([[3, 7, 1], [5, 0, 0], [2, 9, 0]])
    positions = np.concatenate([np.arange(s - q, s) for q, s in zip(query_lens, seq_lens, strict=True)])
    row = np.repeat(np.arange(3), query_lens)
    slots = tables[row, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    integers = {
        "input_ids": rng.integers(0, 48, 8), "positions": positions, "slot_mapping": slots,
        "block_tables": tables, "query_start_loc": [0, 1, 5, 8], "seq_lens": seq_lens,
        "logits_indices": [0, 4, 7],
    }  # fmt: skip
    inputs: dict[str, Array] = {name: np.asarray(value, np.int32) for name, value in integers.items()}
    pool = rng.standard_normal((NUM_BLOCKS, 2, 2, 2, BLOCK_SIZE, 16)).astype(np.float32)
    pool[0] = 0.0
    for layer in range(2):
        inputs[f"key_cache.{layer}"], inputs[f"value_cache.{layer}"] = pool[:, layer, 0], pool[:, layer, 1]
    inputs["kv_cache"] = pool.copy()
    inputs["kv_cache"][:, :, 0] = pool[:, :, 0][..., operators.in_pairs(16).numpy()]
    inputs["step"], inputs["engine_state"] = np.array([5, 77, STEP_MARK, 8, 3], np.int32), new_state()
    inputs["sampling"] = np.zeros((3, 5), np.float32)
    return inputs


def padded_step() -> dict[str, Array]:
    """The same step padded to 40 tokens, 6 sequences and 6 rows; what nobody may read is garbage."""
    inputs = step()
    for name, length, filling in (
        ("input_ids", 40, 0), ("positions", 40, 0), ("slot_mapping", 40, 0), ("block_tables", 6, 2**31 - 1),
        ("query_start_loc", 7, 8), ("seq_lens", 6, 0), ("logits_indices", 6, 0), ("sampling", 6, 0),
    ):  # fmt: skip
        array = inputs[name]
        inputs[name] = np.full((length, *array.shape[1:]), filling, array.dtype)
        inputs[name][: len(array)] = array
    return inputs


def evaluate(model: onnx.ModelProto, *outputs: str, more_operators: Sequence[Any] = ()) -> list[Array]:
    inputs = step()
    given = {str(i.name): np.ascontiguousarray(inputs[i.name]) for i in model.graph.input}
    known: list[Any] = [*OPERATORS, *more_operators]
    results = ReferenceEvaluator(model, new_ops=known).run(list(outputs), given)
    assert isinstance(results, list)
    return [np.asarray(result) for result in results]


def logits(model: onnx.ModelProto) -> Array:
    return evaluate(model, "logits")[0]


REWRITES: dict[str, tuple[Callable[[Graph], None], ...]] = {
    "swiglu": (lower_swiglu,),
    "attention": (lower_attention,),
    "residual": (lower_residual_sums,),
    "linear": (lower_linear,),
    "norm": (lower_swiglu, lower_attention, lower_residual_sums, lower_linear, lower_norms),
}


@pytest.mark.parametrize("name", REWRITES)
def test_rewrite_keeps_the_logits(model: onnx.ModelProto, name: str) -> None:
    rewritten = copy.deepcopy(model)
    graph = Graph(rewritten)
    for rewrite in REWRITES[name]:
        rewrite(graph)
    graph.finish()
    expected = logits(model)
    assert float(np.abs(expected).max()) > 0.5
    np.testing.assert_allclose(logits(rewritten), expected, atol=2e-4, rtol=2e-4)


def test_quantised_rows_are_as_near_as_eight_bits_come(model: onnx.ModelProto) -> None:
    """And one Quantize serves all layers that read the same rows."""
    quantized = copy.deepcopy(model)
    lower(quantized, PLANS["int8"])
    own = [node.op_type for node in quantized.graph.node if node.domain == "quire"]
    layer = [
        "Quantize", "ProjectQkv", "PagedAttend", *("Quantize", "Linear") * 3
    ]  # fmt: skip
    assert [kind for kind in own if kind != "AssignSplits"] == [
        "StepBegin", *layer, *layer, "Quantize", "Linear", "Sample"
    ]  # fmt: skip
    quantizers = [node for node in quantized.graph.node if node.op_type == "Quantize"]
    assert [attribute(node, "of_logits") for node in quantizers] == [0] * 8 + [1]
    expected, actual = logits(model), logits(quantized)
    error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.03


def test_layers_that_share_their_rows_share_the_numbers() -> None:
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", 64])
    weights = [numpy_helper.from_array(np.ones((32, 64), np.float32), name) for name in "ab"]
    nodes = [helper.make_node("Gemm", ["x", name], [f"{name}.out"], transB=1) for name in "ab"]
    made = [helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, ["T", 32]) for name in "ab"]
    graph = Graph(helper.make_model(helper.make_graph(nodes, "two", [rows], made, weights)))
    lower_linear(graph)
    lower_quantization(graph, PLANS["fp8"])
    graph.finish()
    assert [node.op_type for node in graph.model.graph.node] == ["Quantize", "Linear", "Linear"]
    first, second = graph.of_type("Linear")
    assert first.input[6:] == second.input[6:] == graph.of_type("Quantize")[0].output


def test_lowered_graph_begins_and_samples_and_has_five_operators_a_layer(
    model: onnx.ModelProto,
) -> None:
    lowered = copy.deepcopy(model)
    lower(lowered)
    own = [node.op_type for node in lowered.graph.node if node.domain == "quire"]
    layer = ["ProjectQkv", "PagedAttend", "Linear", "Linear", "Linear"]
    splits = [node for node in lowered.graph.node if node.op_type == "AssignSplits"]
    windows = [attribute(node, "window") for node in lowered.graph.node if node.op_type == "PagedAttend"]
    assert [attribute(node, "window") for node in splits] == list(dict.fromkeys(windows)), "not once a window"
    made: list[str] = []
    for node in lowered.graph.node:
        if node.op_type == "PagedAttend":
            window = attribute(node, "window")
            assert node.input[4:6] == [f"spare_tiles.{window}", f"seq_spares.{window}"]
            assert set(node.input[4:6]) <= set(made)
        made += node.output
    own = [kind for kind in own if kind != "AssignSplits"]
    assert own == ["StepBegin", *layer, *layer, "Linear", "Sample"]
    assert {node.op_type for node in lowered.graph.node if node.domain == ""} <= {
        "Gather", "Concat", "Mul", "Reshape", "ReduceSum", "Cast",
    }  # fmt: skip
    assert [given.name for given in lowered.graph.input if "cache" in given.name] == ["kv_cache"]
    assert [made.name for made in lowered.graph.output] == ["logits", "sampled_ids", "pool_info", "step_done"]


def test_a_step_ends_with_its_own_tokens(model: onnx.ModelProto) -> None:
    lowered = copy.deepcopy(model)
    lower(lowered)
    expected = logits(model)
    sampled, pool_info, step_done = evaluate(lowered, "sampled_ids", "pool_info", "step_done")
    assert sampled.tolist() == expected.argmax(-1).tolist()
    assert pool_info.tolist() == [NUM_BLOCKS, 77] and step_done.tolist() == [5]


@pytest.mark.parametrize(
    "changes",
    [{"qkv_bias": True}, {"qk_norm": True}, {"output_bias": True, "mlp_bias": True, "qkv_bias": True}],
    ids=["biases, as in Qwen2", "normed heads, as in Qwen3", "biases everywhere"],
)
def test_other_families_keep_their_logits(tmp_path: Path, changes: dict[str, Any]) -> None:
    original = export(tmp_path, config(**changes))
    lowered = copy.deepcopy(original)
    lower(lowered)
    np.testing.assert_allclose(logits(lowered), logits(original), atol=2e-4, rtol=2e-4)


def test_what_a_plan_cannot_run_is_refused_by_name(model: onnx.ModelProto) -> None:
    other = copy.deepcopy(model)
    next(node for node in other.graph.node if node.op_type == "Gemm").op_type = "MatMul"
    with pytest.raises(UnsupportedModelError, match="MatMul"):
        lower(other)


def test_a_norm_of_one_kind_of_heads_alone_is_refused(tmp_path: Path) -> None:
    other = export(tmp_path, config(qk_norm=True))
    weights = {weight.name: tuple(weight.dims) for weight in other.graph.initializer}
    norms = [node for node in other.graph.node if node.op_type == "RMSNormalization"]
    norm = next(norm for norm in norms if weights[norm.input[1]] == (16,))
    for node in other.graph.node:
        node.input[:] = [norm.input[0] if name == norm.output[0] else name for name in node.input]
    other.graph.node.remove(norm)
    with pytest.raises(UnsupportedModelError, match="only one of"):
        lower(other)
