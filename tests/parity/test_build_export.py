"""The graph exported without weights is the one that is exported with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, numpy_helper

from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.export import GRAPH_FILE, export_graph, export_onnx

BLOCK_SIZE, NUM_POSITIONS = 8, 64
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_POSITIONS,
}


def graphs(directory: Path, **changes: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Exported with weights and without."""
    config = DecoderConfig.from_huggingface(CONFIG | changes)
    decoder = Decoder(config, NUM_POSITIONS).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        parameter.normal_()  # equal ones would become one
    export_onnx(decoder, config, BLOCK_SIZE, directory)
    return onnx.load(directory / GRAPH_FILE), export_graph(config, BLOCK_SIZE)


def structure(node: NodeProto) -> dict[str, Any]:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {
        "operator": (node.domain, node.op_type),
        "inputs": list(node.input),
        "outputs": list(node.output),
        "attributes": attributes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"architectures": ["Qwen2ForCausalLM"]},
        {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
        {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
    ],
)
def test_the_graph_without_weights_has_the_nodes_inputs_and_weights_of_the_one_with(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, bare = graphs(tmp_path, **changes)
    assert [structure(node) for node in bare.graph.node] == [structure(node) for node in whole.graph.node]
    assert list(bare.graph.input) == list(whole.graph.input)
    assert list(bare.graph.output) == list(whole.graph.output)
    assert list(bare.opset_import) == list(whole.opset_import)
    weights = [(w.name, w.data_type, list(w.dims)) for w in whole.graph.initializer]
    assert sorted((w.name, w.data_type, list(w.dims)) for w in bare.graph.initializer) == sorted(weights)


def test_only_constants_that_are_no_weights_have_data(tmp_path: Path) -> None:
    whole, bare = graphs(tmp_path)
    expected = {weight.name: weight for weight in whole.graph.initializer}
    floats = {weight.name for weight in whole.graph.initializer if weight.data_type == TensorProto.FLOAT}
    assert {"embed_tokens.weight", "cosine", "layers.1.mlp.down_proj.weight"} <= floats
    for weight in bare.graph.initializer:
        if weight.name in floats:
            assert not weight.raw_data and not weight.float_data
        else:
            assert (numpy_helper.to_array(weight) == numpy_helper.to_array(expected[weight.name])).all()


def test_a_model_too_large_for_this_machine_is_exported() -> None:
    changes = {"vocab_size": 10**9, "hidden_size": 10**6, "intermediate_size": 10**6, "head_dim": 128}
    config = DecoderConfig.from_huggingface(CONFIG | changes)
    graph = export_graph(config, BLOCK_SIZE).graph
    (embedding,) = [weight for weight in graph.initializer if weight.name == "embed_tokens.weight"]
    assert list(embedding.dims) == [10**9, 10**6]


def test_the_exported_weights_can_be_taken_by_name_from_the_module() -> None:
    config = DecoderConfig.from_huggingface(CONFIG)
    decoder = Decoder(config, NUM_POSITIONS)
    tensors: dict[str, torch.Tensor] = {**decoder.state_dict(), **dict(decoder.named_buffers())}
    weights = {w.name: w for w in export_graph(config, BLOCK_SIZE).graph.initializer}
    floats = {name: weight for name, weight in weights.items() if weight.data_type == TensorProto.FLOAT}
    assert {name: list(weight.dims) for name, weight in floats.items()} == {
        name: list(tensors[name].shape) for name in floats
    }
    assert floats.keys() == tensors.keys()
