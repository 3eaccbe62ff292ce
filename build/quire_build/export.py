"""The torch module as model.onnx, the contract between the build and every engine.

Inputs and outputs carry the engine contract's names; attention is the operator `PagedAttention` of domain
`quire`. Weights lie beside the graph in model.onnx.data, whatever their size.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import onnx
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
    _register_operator()
    pools = [f"{kind}_cache.{layer}" for kind in ("key", "value") for layer in range(config.num_layers)]
    # The exporter's advice is for its own developers.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            decoder,
            _example_step(config, block_size),
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=_dynamic_shapes(config.num_layers),
            custom_translation_table={torch.ops.quire.paged_attention.default: _translate},
            input_names=[tensor.name for tensor in STEP_INPUTS] + pools,
            output_names=["logits", *(f"{pool}.out" for pool in pools)],
            verbose=False,
        )
    assert program is not None  # None is returned only by the exporter that dynamo=True replaces
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces of this machine
    program.save(directory / GRAPH_FILE, external_data=True)


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
