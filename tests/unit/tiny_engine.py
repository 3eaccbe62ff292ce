"""An engine directory for tests, made without torch: one layer of attention with random weights.

    x = embedding[ids] + position_embedding[positions];  logits = attention(x Wq, x Wk, x Wv) Wo

in ONNX as the engine contract has it, and in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    file_digest,
    write_manifest,
)
from quire.execution.openvino_attention import BLOCK_SIZE, OPENVINO_VERSION
from quire.interface import STEP_INPUTS

Shape = Sequence[str | int | None]

VOCAB_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, HIDDEN = 96, 4, 2, 16, 32
LIMITS = EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=160)
KV_BYTES_PER_BLOCK = 2 * NUM_KV_HEADS * BLOCK_SIZE * HEAD_DIM * 4


def weights() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(5)
    shapes = {
        "embedding": (VOCAB_SIZE, HIDDEN),
        "position_embedding": (LIMITS.max_model_len, HIDDEN),
        "Wq": (HIDDEN, NUM_HEADS * HEAD_DIM),
        "Wk": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
        "Wv": (HIDDEN, NUM_KV_HEADS * HEAD_DIM),
        "Wo": (NUM_HEADS * HEAD_DIM, VOCAB_SIZE),
    }
    return {
        name: rng.standard_normal(shape).astype(np.float32) / shape[0] ** 0.25
        for name, shape in shapes.items()
    }


def write_engine(
    directory: Path, *, sliding_window: int | None = None, precision: Literal["float32", "bf16"] = "float32"
) -> Manifest:
    """Write model.onnx and engine.json."""
    cache_shape: Shape = ["num_blocks", NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]
    sizes: dict[str, Shape] = {
        "block_tables": ["S", "B"],
        "query_start_loc": ["S1"],
        "seq_lens": ["S"],
        "logits_indices": ["N"],
    }
    inputs = [
        helper.make_tensor_value_info(spec.name, TensorProto.INT32, sizes.get(spec.name, ["T"]))
        for spec in STEP_INPUTS
    ]
    caches = ["key_cache.0", "value_cache.0"]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, cache_shape) for name in caches]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", VOCAB_SIZE])]
    outputs += [
        helper.make_tensor_value_info(f"{name}.out", TensorProto.FLOAT, cache_shape) for name in caches
    ]
    attention_inputs = ["query", "key", "value", *caches, *(spec.name for spec in STEP_INPUTS[2:6])]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["tokens"]),
        helper.make_node("Gather", ["position_embedding", "positions"], ["places"]),
        helper.make_node("Add", ["tokens", "places"], ["x"]),
        helper.make_node("MatMul", ["x", "Wq"], ["query"]),
        helper.make_node("MatMul", ["x", "Wk"], ["key"]),
        helper.make_node("MatMul", ["x", "Wv"], ["value"]),
        helper.make_node(
            "PagedAttention",
            attention_inputs,
            ["attended", *(f"{name}.out" for name in caches)],
            domain="quire",
            scale=HEAD_DIM**-0.5,
            num_heads=NUM_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            sliding_window=sliding_window or 0,
        ),
        helper.make_node("Gather", ["attended", "logits_indices"], ["wanted"]),
        helper.make_node("MatMul", ["wanted", "Wo"], ["logits"]),
    ]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights().items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("quire", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), directory / "model.onnx")

    manifest = Manifest(
        version=MANIFEST_VERSION,
        model=ModelDimensions("Tiny", VOCAB_SIZE, 1, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, sliding_window),
        block_size=BLOCK_SIZE,
        limits=LIMITS,
        precision=precision,
        kv_cache_dtype=precision,
        runtime="openvino",
        runtime_version=OPENVINO_VERSION,
        inputs=tuple(spec.name for spec in STEP_INPUTS),
        outputs=("logits",),
        kv_bytes_per_block=KV_BYTES_PER_BLOCK // (2 if precision == "bf16" else 1),
        checkpoint_digest="0" * 64,
        files={"model.onnx": file_digest(directory / "model.onnx")},
        gate=GateReport(),
    )
    write_manifest(manifest, directory)
    return manifest


def reference_logits(token_ids: list[int], sliding_window: int | None = None) -> NDArray[np.float64]:
    """Logits [L, VOCAB_SIZE] of a whole sequence."""
    matrices = weights()
    length = len(token_ids)
    x = matrices["embedding"][token_ids].astype(np.float64) + matrices["position_embedding"][:length]
    group = NUM_HEADS // NUM_KV_HEADS
    query = (x @ matrices["Wq"]).reshape(length, NUM_HEADS, HEAD_DIM)
    key = (x @ matrices["Wk"]).reshape(length, NUM_KV_HEADS, HEAD_DIM).repeat(group, axis=1)
    value = (x @ matrices["Wv"]).reshape(length, NUM_KV_HEADS, HEAD_DIM).repeat(group, axis=1)
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    visible = (distance >= 0) & (distance < (sliding_window or length))
    scores = np.where(visible, np.einsum("qhd,khd->hqk", query, key) * HEAD_DIM**-0.5, -np.inf)
    probabilities = np.exp(scores - scores.max(axis=2, keepdims=True))
    probabilities /= probabilities.sum(axis=2, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", probabilities, value).reshape(length, -1)
    logits: NDArray[np.float64] = attended @ matrices["Wo"]
    return logits
