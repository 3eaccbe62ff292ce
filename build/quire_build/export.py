"""The torch module as model.onnx, the contract between the build and every engine.

Inputs and outputs carry the engine contract's names; attention is the operator `PagedAttention` of domain
`quire`. Weights lie beside the graph in model.onnx.data, whatever their size. A plan builder, which takes
weights by name, needs the graph alone: that is exported without ever having the weights.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import onnxscript
import torch
from torch import Tensor

from quire.interface import STEP_INPUTS
from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig
from quire_build.paged_attention import DOMAIN, DOMAIN_VERSION, OPERATOR

OPSET = 23
GRAPH_FILE = "model.onnx"
WEIGHTS_FILE = "model.onnx.data"

_OPERATORS = onnxscript.values.Opset(DOMAIN, DOMAIN_VERSION)


def export_onnx(decoder: Decoder, config: DecoderConfig, block_size: int, directory: Path) -> None:
    """Write the decoder to `directory`, with every size of a step and of the pool left open."""
    program = _export(decoder, config, _example_step(config, block_size))
    program.optimize()
    program.save(directory / GRAPH_FILE, external_data=True)


def export_graph(config: DecoderConfig, block_size: int, num_positions: int | None = None) -> onnx.ModelProto:
    """The graph that `export_onnx` would write, whose weights have names, types and shapes but no data.

    Args:
        config: what to export; no memory is taken for its weights.
        block_size: tokens of a block.
        num_positions: length of the RoPE tables; None for as many as the model is meant for.
    """
    with torch.device("meta"):
        decoder = Decoder(config, num_positions or config.max_context)
    decoder.to("meta").eval().requires_grad_(False)  # the RoPE tables too
    program = _export(decoder, config, _on_meta(_example_step(config, block_size)))
    parameters = decoder.state_dict().keys() | dict(decoder.named_buffers()).keys()
    values = program.model.graph.initializers
    data = {name: values[name].const_value for name in values.keys() & parameters}
    for name in data:
        values[name].const_value = None  # the optimizer would look at it
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of each weight without data
    program.optimize()
    for name, tensor in data.items():
        assert tensor is not None
        values[name].const_value = onnx_ir.ExternalTensor(
            WEIGHTS_FILE, None, None, tensor.dtype, shape=onnx_ir.Shape(tensor.shape.numpy()), name=name
        )
    return onnx_ir.to_proto(program.model)


def _export(decoder: Decoder, config: DecoderConfig, step: tuple[Any, ...]) -> torch.onnx.ONNXProgram:
    """Trace one step; optimising is left to the caller."""
    _register_operator()
    pools = [f"{kind}_cache.{layer}" for kind in ("key", "value") for layer in range(config.num_layers)]
    # The exporter's advice is for its own developers.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            step,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_dynamic_shapes(config.num_layers),
            custom_translation_table={torch.ops.quire.paged_attention.default: _translate},
            input_names=[tensor.name for tensor in STEP_INPUTS] + pools,
            output_names=["logits", *(f"{pool}.out" for pool in pools)],
            optimize=False,
            verbose=False,
        )
    assert program is not None  # None is returned only by the exporter that dynamo=True replaces
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces of this machine
    return program


def _example_step(config: DecoderConfig, block_size: int) -> tuple[Any, ...]:
    """Three sequences over a pool of 16 blocks: the sizes differ, so that none is taken for another."""

    def integers(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32)

    pool_shape = (16, config.num_kv_heads, block_size, config.head_dim)
    return (
        torch.zeros(7, dtype=torch.int32),  # input_ids
        torch.arange(7, dtype=torch.int32),  # positions
        torch.arange(7, dtype=torch.int32),  # slot_mapping
        torch.zeros(3, 4, dtype=torch.int32),  # block_tables
        integers(0, 2, 4, 7),  # query_start_loc
        integers(2, 2, 3),  # seq_lens
        integers(1, 6),  # logits_indices
        [torch.zeros(pool_shape) for _ in range(config.num_layers)],
        [torch.zeros(pool_shape) for _ in range(config.num_layers)],
    )


def _on_meta(step: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same shapes without data."""
    return tuple(
        given.to("meta") if isinstance(given, Tensor) else [tensor.to("meta") for tensor in given]
        for given in step
    )


def _dynamic_shapes(num_layers: int) -> tuple[Any, ...]:
    dim = torch.export.Dim
    tokens, sequences, blocks_per_table = dim("T"), dim("S"), dim("B")
    rows, num_blocks = dim("N"), dim("num_blocks")
    return (
        {0: tokens},  # input_ids
        {0: tokens},  # positions
        {0: tokens},  # slot_mapping
        {0: sequences, 1: blocks_per_table},  # block_tables
        {0: dim.AUTO},  # query_start_loc: S + 1 cannot be written as a dimension of its own
        {0: sequences},  # seq_lens
        {0: rows},  # logits_indices
        [{0: num_blocks}] * num_layers,
        [{0: num_blocks}] * num_layers,
    )


def _translate(
    query: Any,
    key: Any,
    value: Any,
    key_cache: Any,
    value_cache: Any,
    slot_mapping: Any,
    block_tables: Any,
    query_start_loc: Any,
    seq_lens: Any,
    scale: float,
    num_heads: int,
    num_kv_heads: int,
    sliding_window: int,
) -> Any:
    """The torch operator as a node of the graph."""
    return _OPERATORS.PagedAttention(
        query,
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        block_tables,
        query_start_loc,
        seq_lens,
        scale=scale,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        sliding_window=sliding_window,
    )


def _register_operator() -> None:
    """Tell onnx the operator's schema, which the exporter asks for."""
    if onnx.defs.has(OPERATOR, domain=DOMAIN):
        return
    schema = onnx.defs.OpSchema
    parameter, attribute, integer = schema.FormalParameter, schema.Attribute, schema.AttrType.INT
    onnx.defs.register_schema(
        schema(
            OPERATOR,
            DOMAIN,
            DOMAIN_VERSION,
            inputs=[
                *(parameter(name, "T") for name in ("query", "key", "value", "key_cache", "value_cache")),
                *(
                    parameter(name, "I")
                    for name in ("slot_mapping", "block_tables", "query_start_loc", "seq_lens")
                ),
            ],
            outputs=[parameter(name, "T") for name in ("output", "key_cache_out", "value_cache_out")],
            type_constraints=[
                ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
                ("I", ["tensor(int32)"], ""),
            ],
            attributes=[
                attribute("scale", schema.AttrType.FLOAT),
                attribute("num_heads", integer),
                attribute("num_kv_heads", integer),
                attribute("sliding_window", integer),
            ],
        )
    )
