"""Each rewrite of model.onnx leaves its numbers alone: the graph before and after, run on the same step."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by its own library functions too
pytest.importorskip("triton")

from quire_build.decoder import Decoder
from quire_build.decoder_config import DecoderConfig, RopeConfig
from quire_build.export import GRAPH_FILE, export_onnx
from quire_build.paged_attention import paged_attention_in_place
from quire_build.tensorrt import operators
from quire_build.tensorrt.lowering import lower
from quire_build.tensorrt.lowering.attention import lower_attention
from quire_build.tensorrt.lowering.graph import Graph
from quire_build.tensorrt.lowering.linear import lower_linear
from quire_build.tensorrt.lowering.norm import lower_norms
from quire_build.tensorrt.lowering.residual import lower_residual_sums
from quire_build.tensorrt.lowering.swiglu import lower_swiglu
from tests.unit.test_tensorrt_operators import run

from quire.errors import UnsupportedModelError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")

Array = NDArray[Any]
BLOCK_SIZE, NUM_BLOCKS = 8, 12


def config(**changes: Any) -> DecoderConfig:
    rope = RopeConfig(**{name: default for name, default in ROPE.items()})
    values: dict[str, Any] = {
        "architecture": "LlamaForCausalLM", "vocab_size": 48, "hidden_size": 64, "intermediate_size": 80,
        "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "rope": rope, "tie_word_embeddings": False, "qkv_bias": False,
        "output_bias": False, "mlp_bias": False, "qk_norm": False, "sliding_windows": (None, 5),
    }  # fmt: skip
    return DecoderConfig(**(values | changes))
