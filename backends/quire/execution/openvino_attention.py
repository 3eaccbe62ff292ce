"""The operator `PagedAttention` of domain `quire` on OpenVINO's own paged attention.

OpenVINO's operator is not part of its public operator sets: the number, order and meaning of its inputs
change between versions without notice. Everything that depends on them is in this module, for one version,
and `check_attention` compares the operator with plain numpy before an engine is put on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import openvino as ov
from numpy.typing import DTypeLike, NDArray
from openvino import op as internal_ops
from openvino import opset16 as ops
from openvino.frontend import NodeContext
from openvino.frontend.onnx import ConversionExtension

from quire.errors import StartupError
from quire.execution.manifest import ModelDimensions

OPENVINO_VERSION = "2026.4.1"
BLOCK_SIZE = 32
"""Tokens per block: the only size that OpenVINO's kernel for CPUs knows."""
NUM_INPUTS = 28
CHECK_TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}
"""Largest difference from numpy in `check_attention`, where all outputs are of the order of 1."""


def installed_version() -> str:
    """OpenVINO's version without its build number."""
    return str(ov.__version__).split("-", 1)[0]


def conversion_extension() -> ConversionExtension:
    """What teaches `read_model` the operator; serves one model, whose layers share the step's metadata."""
    shared: dict[str, ov.Output] = {}

    def convert(node: NodeContext) -> list[ov.Output]:
        query, key, value, key_cache, value_cache, _slots, tables, starts, lengths = (
            node.get_input(index) for index in range(9)
        )
        if not shared:
            shared.update(_sequence_metadata(tables, starts, lengths))
        attended = paged_attention(
            (query, key, value, key_cache, value_cache),
            shared,
            scale=node.get_attribute("scale"),
            num_kv_heads=node.get_attribute("num_kv_heads"),
            sliding_window=node.get_attribute("sliding_window"),
        )
        # The caches are written in place. Returned as they are, the frontend would rename the parameters.
        return [attended, ops.identity(key_cache).output(0), ops.identity(value_cache).output(0)]

    return ConversionExtension("PagedAttention", "quire", convert)


def paged_attention(
    tensors: Sequence[ov.Output],
    metadata: Mapping[str, ov.Output],
    *,
    scale: float,
    num_kv_heads: int,
    sliding_window: int,
) -> ov.Output:
    """One layer's attention, everything but plain paged attention switched off.

    Args:
        tensors: query, key and value, [T, heads * head_dim] each, then key cache and value cache,
            [num_blocks, num_kv_heads, block_size, head_dim] each.
        metadata: of the step, from `_sequence_metadata`.
        scale: what the scores are multiplied with before the softmax.
        num_kv_heads: heads of key and value.
        sliding_window: positions that a query sees, its own included; 0 for all.

    Returns:
        [T, num_heads * head_dim].
    """
    no_integers, no_floats = _constant(np.zeros(0, np.int32)), _constant(np.zeros(0, np.float32))
    zero = _constant(np.int32(0))
    inputs = [
        *tensors,
        metadata["past_lens"],
        metadata["subsequence_begins"],
        metadata["block_indices"],
        metadata["block_indices_begins"],
        _constant(np.float32(scale)),
        _constant(np.int32(sliding_window)),
        no_floats,  # ALiBi slopes
        metadata["max_context_len"],
        no_integers,  # score aggregation window
        *(no_integers, no_integers, no_floats),  # rotation of cached keys: blocks, deltas, angles
        *(no_floats, zero, zero),  # sparse prefill: threshold, block size, stride
        _constant(np.zeros((0, 0, 0, 0), np.float32)),  # attention sinks
        *(zero, no_integers, no_integers, no_integers),  # eviction by diversity
        no_integers,  # token types
        *(_constant(np.zeros(0, np.uint8)), no_integers),  # mask among a sequence's queries
    ]
    if len(inputs) != NUM_INPUTS:
        raise AssertionError(f"{len(inputs)} inputs are wired, {NUM_INPUTS} are needed")
    node = internal_ops._PagedAttentionExtension(inputs)
    head_dim = tensors[3].get_partial_shape()[3].get_length()
    for name, number in (
        ("num_k_heads", num_kv_heads),
        ("num_v_heads", num_kv_heads),
        ("k_head_size", head_dim),
        ("v_head_size", head_dim),
    ):
        node.set_rt_info(number, name)
    return node.output(0)


def _sequence_metadata(tables: ov.Output, starts: ov.Output, lengths: ov.Output) -> dict[str, ov.Output]:
    """OpenVINO's view of block_tables, query_start_loc and seq_lens, computed once for all layers."""
    first, second, last = _vector(0), _vector(1), _vector(-1)
    begins = ops.slice(starts, first, last, second, first)
    ends = ops.slice(starts, second, _vector(np.iinfo(np.int32).max), second, first)
    shape = ops.shape_of(tables, "i32")
    zero, one = _constant(np.int32(0)), _constant(np.int32(1))
    num_seqs, width = ops.gather(shape, zero, zero), ops.gather(shape, one, zero)
    rows = ops.range(zero, ops.add(num_seqs, one), one, "i32")
    return {
        "past_lens": ops.subtract(lengths, ops.subtract(ends, begins)).output(0),
        "subsequence_begins": starts,
        "block_indices": ops.reshape(tables, last, False).output(0),
        "block_indices_begins": ops.multiply(rows, width).output(0),
        "max_context_len": ops.reduce_max(lengths, first, False).output(0),
    }


def _vector(number: int) -> ov.Output:
    """A constant of shape [1]."""
    return _constant(np.array([number], np.int32))


def _constant(value: NDArray[np.generic] | np.generic) -> ov.Output:
    return ops.constant(np.asarray(value)).output(0)


def check_attention(
    core: ov.Core, properties: Mapping[str, object], dimensions: ModelDimensions, precision: str
) -> None:
    """Run the operator on a few sequences and compare with numpy.

    Two steps with shuffled block tables: prompts, then a further chunk beside a decoding sequence.

    Args:
        core: whose CPU plugin is checked.
        properties: what the engine will be compiled with.
        dimensions: heads, head size and sliding window to check with.
        precision: of the engine; decides the tolerance.

    Raises:
        StartupError: OpenVINO is of another version, refuses the operator, or computes something else.
    """
    installed = installed_version()
    if installed != OPENVINO_VERSION:
        raise StartupError(
            f"OpenVINO {installed} is installed, but this Quire works with {OPENVINO_VERSION} only; "
            f"`pip install openvino=={OPENVINO_VERSION}`"
        )
    try:
        difference = _difference_from_numpy(core, properties, dimensions)
    except (RuntimeError, ValueError) as error:  # it fails, or returns another shape
        raise StartupError(
            f"OpenVINO {installed} cannot compute paged attention on this machine: {error}"
        ) from error
    if not difference <= CHECK_TOLERANCE[precision]:
        raise StartupError(
            f"OpenVINO {installed} computes paged attention wrongly on this machine: it differs from numpy "
            f"by {difference:.1e}, more than {CHECK_TOLERANCE[precision]:.0e}"
        )


def _difference_from_numpy(
    core: ov.Core, properties: Mapping[str, object], dimensions: ModelDimensions
) -> float:
    """Largest difference over the two steps."""
    request = core.compile_model(_attention_model(dimensions), "CPU", dict(properties)).create_infer_request()
    pools = {}
    for port in request.model_inputs:
        if port.get_any_name().endswith("_cache"):
            shape = [6, *(port.partial_shape[axis].get_length() for axis in (1, 2, 3))]
            pools[port.get_any_name()] = ov.Tensor(port.element_type, ov.Shape(shape))
            request.set_tensor(port, pools[port.get_any_name()])

    random = np.random.default_rng(0)
    tables = np.array([[4, 2], [5, 1], [3, 0]], np.int32)
    num_heads = np.array([dimensions.num_heads, dimensions.num_kv_heads, dimensions.num_kv_heads])
    query, key, value = (
        random.standard_normal((3, 2 * BLOCK_SIZE, heads * dimensions.head_dim), np.float32)
        for heads in num_heads
    )
    difference = 0.0
    for computed, lengths in (([0, 0, 0], [40, 32, 3]), ([40, 32, 3], [41, 50, 8])):
        spans = [
            np.s_[row, first:last] for row, (first, last) in enumerate(zip(computed, lengths, strict=True))
        ]
        starts = np.cumsum([0, *np.subtract(lengths, computed)])
        step = {
            "query": np.concatenate([query[span] for span in spans]),
            "key": np.concatenate([key[span] for span in spans]),
            "value": np.concatenate([value[span] for span in spans]),
            "block_tables": tables,
            "query_start_loc": starts.astype(np.int32),
            "seq_lens": np.array(lengths, np.int32),
        }
        for name, array in step.items():
            request.set_tensor(name, ov.Tensor(array))
        request.infer()
        expected = [
            _attend(query[row], key[row], value[row], dimensions)[first:last]
            for row, (first, last) in enumerate(zip(computed, lengths, strict=True))
        ]
        error = np.abs(request.get_output_tensor(0).data - np.concatenate(expected)).max()
        difference = max(difference, float(error))
    return difference


def _attention_model(dimensions: ModelDimensions) -> ov.Model:
    """A model of one attention operator, with its inputs as parameters."""

    def parameter(name: str, shape: list[int], dtype: DTypeLike) -> ov.Node:
        node = ops.parameter(shape, dtype, name)
        node.output(0).get_tensor().set_names({name})
        return node

    query_size = dimensions.num_heads * dimensions.head_dim
    kv_size = dimensions.num_kv_heads * dimensions.head_dim
    cache_shape = [-1, dimensions.num_kv_heads, BLOCK_SIZE, dimensions.head_dim]
    tensors = [
        parameter("query", [-1, query_size], np.float32),
        parameter("key", [-1, kv_size], np.float32),
        parameter("value", [-1, kv_size], np.float32),
        parameter("key_cache", cache_shape, np.float32),
        parameter("value_cache", cache_shape, np.float32),
    ]
    tables = parameter("block_tables", [-1, -1], np.int32)
    starts = parameter("query_start_loc", [-1], np.int32)
    lengths = parameter("seq_lens", [-1], np.int32)
    attended = paged_attention(
        [tensor.output(0) for tensor in tensors],
        _sequence_metadata(tables.output(0), starts.output(0), lengths.output(0)),
        scale=dimensions.head_dim**-0.5,
        num_kv_heads=dimensions.num_kv_heads,
        sliding_window=dimensions.sliding_window or 0,
    )
    return ov.Model([ops.result(attended)], [*tensors, tables, starts, lengths], "paged_attention")


def _attend(
    query: NDArray[np.float32],
    key: NDArray[np.float32],
    value: NDArray[np.float32],
    dimensions: ModelDimensions,
) -> NDArray[np.float64]:
    """Causal attention [L, num_heads * head_dim] of one whole sequence, as a textbook has it."""
    length, head_dim = len(query), dimensions.head_dim
    group = dimensions.num_heads // dimensions.num_kv_heads
    queries = query.reshape(length, dimensions.num_heads, head_dim).astype(np.float64)
    keys = key.reshape(length, dimensions.num_kv_heads, head_dim).repeat(group, axis=1)
    values = value.reshape(length, dimensions.num_kv_heads, head_dim).repeat(group, axis=1)
    distance = np.subtract.outer(np.arange(length), np.arange(length))
    visible = (distance >= 0) & (distance < (dimensions.sliding_window or length))
    scores = np.einsum("qhd,khd->hqk", queries, keys) * head_dim**-0.5
    weights = np.exp(np.where(visible, scores, -np.inf))
    weights /= weights.sum(axis=2, keepdims=True)
    attended: NDArray[np.float64] = np.einsum("hqk,khd->qhd", weights, values)
    return attended.reshape(length, -1)
