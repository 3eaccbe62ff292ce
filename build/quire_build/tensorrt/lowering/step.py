"""A step begins with the tokens of the step before and ends with its own.

Which token an id below zero stands for, and which token a row of logits leads to, is decided on the GPU, so
that the next step need not wait for the host.
"""

from __future__ import annotations

from onnx import TensorProto, helper

from quire.execution.engine_state import STEP_ELEMENTS
from quire_build.tensorrt.lowering.attention import POOL
from quire_build.tensorrt.lowering.graph import DOMAIN, Graph

STEP, STATE, SAMPLING = "step", "engine_state", "sampling"
SAMPLED_IDS, POOL_INFO, STEP_DONE = "sampled_ids", "pool_info", "step_done"


def lower_step(graph: Graph) -> None:
    """Put StepBegin before the embedding and Sample behind the logits, with their inputs and outputs."""
    (embedding,) = graph.readers("input_ids")
    vocab_size = graph.size(embedding.input[0], 0)
    graph.add(
        "StepBegin",
        ["input_ids", STEP, STATE, POOL],
        ["token_ids", POOL_INFO, STEP_DONE],
        domain=DOMAIN,
        before=embedding,
        vocab_size=vocab_size,
    )
    embedding.input[1] = "token_ids"
    graph.add("Sample", ["logits", SAMPLING, STATE], [SAMPLED_IDS], domain=DOMAIN, vocab_size=vocab_size)
    proto = graph.model.graph
    proto.input.append(helper.make_tensor_value_info(STEP, TensorProto.INT32, [STEP_ELEMENTS]))
    proto.input.append(helper.make_tensor_value_info(SAMPLING, TensorProto.FLOAT, ["N", 5]))
    proto.input.append(helper.make_tensor_value_info(STATE, TensorProto.INT64, ["state"]))
    proto.output.append(helper.make_tensor_value_info(SAMPLED_IDS, TensorProto.INT32, ["N"]))
    proto.output.append(helper.make_tensor_value_info(POOL_INFO, TensorProto.INT32, [2]))
    proto.output.append(helper.make_tensor_value_info(STEP_DONE, TensorProto.INT32, [1]))
    graph.outputs.update((SAMPLED_IDS, POOL_INFO, STEP_DONE))
