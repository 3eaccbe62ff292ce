"""model.onnx, node by node, into the operators of `quire_build.tensorrt.operators`.

One rewrite a file. They touch the structure alone, never a weight: a weight that a fused operator wants whole
stays a Concat of the checkpoint's, and a Gather where its rows change places, for the plan builder to carry
out.
"""

from __future__ import annotations

import onnx

from quire_build.quantization import Quantization
from quire_build.tensorrt.lowering.attention import lower_attention
from quire_build.tensorrt.lowering.graph import Graph
from quire_build.tensorrt.lowering.linear import lower_linear
from quire_build.tensorrt.lowering.norm import lower_norms
from quire_build.tensorrt.lowering.quantize import lower_quantization
from quire_build.tensorrt.lowering.residual import lower_residual_sums
from quire_build.tensorrt.lowering.step import lower_step
from quire_build.tensorrt.lowering.swiglu import lower_swiglu


def lower(model: onnx.ModelProto, quantization: Quantization | None = None) -> None:
    """Rewrite a model.onnx of this project's in place.

    Its pools, key_cache.i and value_cache.i, become the one input ``kv_cache``; their outputs go.

    Args:
        model: with or without its weights' data.
        quantization: of linear layers; None for none.

    Raises:
        UnsupportedModelError: naming what a plan cannot run yet.
    """
    graph = Graph(model)
    lower_swiglu(graph)
    lower_attention(graph)
    lower_residual_sums(graph)
    lower_linear(graph)
    lower_norms(graph)
    lower_step(graph)
    if quantization is not None and quantization.inputs:
        lower_quantization(graph, quantization)
    graph.finish()
