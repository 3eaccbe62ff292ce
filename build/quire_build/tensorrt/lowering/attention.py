"""The projections, RoPE and PagedAttention become one linear layer that writes to the pool, and an attention.

Where heads are normed before RoPE, the linear layer does not write, and an operator between does all that.

The pools of all layers become one: see docs/tensorrt.md for how it is laid out.
"""

from __future__ import annotations

from onnx import NodeProto, TensorProto, helper

from quire.errors import UnsupportedModelError
from quire_build.tensorrt.lowering.graph import DOMAIN, Graph, attribute
from quire_build.tensorrt.operators import in_pairs

POOL = "kv_cache"
COS_SIN = "cos_sin"

_ROPE = {"Reshape", "Split", "Mul", "Sub", "Add", "Concat"}


def lower_attention(graph: Graph) -> None:
    """Fuse every layer's attention.

    Raises:
        UnsupportedModelError: if something other than RoPE stands between a projection and its attention.
    """
    attentions = graph.of_type("PagedAttention")
    for node in attentions:
        _lower(graph, node, len(attentions))
    graph.add("Concat", ["cosine", "sine"], [COS_SIN], axis=1)
    _one_pool(graph)


def _lower(graph: Graph, node: NodeProto, num_layers: int) -> None:
    (query, query_norm), (key, key_norm) = (_projected(graph, name) for name in node.input[:2])
    value = graph.producer(node.input[2])
    assert value is not None
    projections = [query, key, value]
    weights = [graph.weight_of(projection) for projection in projections]
    num_heads, num_kv_heads = attribute(node, "num_heads"), attribute(node, "num_kv_heads")
    pool = next(given for given in graph.model.graph.input if given.name == node.input[3])
    block_size = pool.type.tensor_type.shape.dim[2].dim_value
    head_dim = graph.size(weights[0], 0) // num_heads
    shape = {
        "layer": int(node.input[3].rsplit(".", 1)[1]),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "block_size": block_size,
    }
    output = node.output[0]
    weight, bias = f"{output}.qkv_weight", ""
    graph.add("Concat", weights, [f"{weight}.checkpoint"], before=node, axis=0)
    stacked_bias = graph.bias_of(projections, f"{output}.qkv_bias.checkpoint")
    # Queries and keys in the order that RoPE is applied in, values as they are.
    rotated, width = (num_heads + num_kv_heads) * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
    pairs = in_pairs(head_dim).tolist()
    places = [head + dim for head in range(0, rotated, head_dim) for dim in pairs]
    order = graph.integers("qkv_order", [*places, *range(rotated, width)])
    graph.add("Gather", [f"{weight}.checkpoint", order], [weight], before=node, axis=0)
    if stacked_bias:
        bias = f"{output}.qkv_bias"
        graph.add("Gather", [stacked_bias, order], [bias], before=node, axis=0)
    k, to_pool = graph.size(weights[0], 1), [COS_SIN, "positions", node.input[5], POOL]
    written = shape | {"max_positions": graph.size("cosine", 0)}
    if (query_norm is None) != (key_norm is None):
        raise UnsupportedModelError(
            f"a plan cannot norm the heads of only one of '{query.name}', '{key.name}'"
        )
    if query_norm is None or key_norm is None:
        graph.add(
            "ProjectQkv",
            [query.input[0], weight, "", bias, *to_pool],
            [f"{output}.query"],
            domain=DOMAIN,
            before=node,
            k=k,
            biased=int(bool(bias)),
            **written,
        )
    else:
        norms = f"{output}.head_norms"
        both = [norm.input[1] for norm in (query_norm, key_norm)]
        norm_order = graph.integers(
            "head_norms_order", [start + dim for start in (0, head_dim) for dim in pairs]
        )
        graph.add("Concat", both, [f"{norms}.checkpoint"], axis=0)
        graph.add("Gather", [f"{norms}.checkpoint", norm_order], [norms], axis=0)
        graph.add(
            "Linear",
            [query.input[0], weight, "", "", "", bias],
            [f"{output}.qkv"],
            domain=DOMAIN,
            before=node,
            n=width,
            k=k,
            biased=int(bool(bias)),
        )
        graph.add(
            "KvWrite",
            [f"{output}.qkv", norms, *to_pool],
            [f"{output}.query"],
            domain=DOMAIN,
            before=node,
            epsilon=attribute(query_norm, "epsilon"),
            **written,
        )
        graph.remove([query_norm, key_norm])
    window = attribute(node, "sliding_window")
    splits = [f"spare_tiles.{window}", f"seq_spares.{window}"]
    if graph.producer(splits[0]) is None:
        # How contexts are split depends on the step alone: decided once, for all layers of one window. Their
        # heads are the same in all.
        graph.add(
            "AssignSplits",
            node.input[7:9],
            splits,
            domain=DOMAIN,
            before=node,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            window=window,
        )
    graph.add(
        "PagedAttend",
        [f"{output}.query", *node.input[6:9], *splits, POOL],
        [output],
        domain=DOMAIN,
        before=node,
        window=window,
        scale=attribute(node, "scale"),
        **shape,
    )
    graph.remove([node])


def _projected(graph: Graph, tensor: str) -> tuple[NodeProto, NodeProto | None]:
    """The linear layer that a rotated tensor comes from, and the norm of its heads, if there is one."""
    source = _rotated(graph, tensor)
    if source.op_type == "Gemm":
        return source, None
    reshape = graph.producer(source.input[0])
    layer = None if reshape is None else graph.producer(reshape.input[0])
    if layer is None or layer.op_type != "Gemm":
        raise UnsupportedModelError(
            f"a plan cannot run the norm '{source.name}' of anything but a projection"
        )
    return layer, source


def _rotated(graph: Graph, tensor: str) -> NodeProto:
    """What RoPE rotates: the only source of `tensor` besides the tables of cosines and sines."""
    sources: list[NodeProto] = []
    tables: set[str] = set()
    seen: set[str] = set()
    waiting = [tensor]
    while waiting:
        name = waiting.pop()
        node = graph.producer(name)
        if name in seen or node is None:
            continue
        seen.add(name)
        if node.op_type == "Unsqueeze":
            (table,) = (graph.producer(node.input[0]),)
            assert table is not None
            tables.add(table.input[0])
        elif node.op_type in _ROPE:
            waiting.extend(node.input)
        elif node not in sources:
            sources.append(node)
    found = ", ".join(sorted(node.op_type for node in sources))
    if found not in ("Gemm", "RMSNormalization") or tables != {"cosine", "sine"}:
        raise UnsupportedModelError(f"a plan cannot run {found} between a projection and attention yet")
    return sources[0]


def _one_pool(graph: Graph) -> None:
    """Replace the layers' pools among the model's inputs, and drop them from its outputs."""
    proto = graph.model.graph
    for given in list(proto.input):
        if given.name.startswith(("key_cache.", "value_cache.")):
            element = given.type.tensor_type.elem_type
            proto.input.remove(given)
    for made in list(proto.output):
        if made.name.startswith(("key_cache.", "value_cache.")):
            proto.output.remove(made)
            graph.outputs.discard(made.name)
    assert element in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    proto.input.append(helper.make_tensor_value_info(POOL, element, ["pool"]))
