"""A captured step whose kernels start before the ones before them have ended.

CUDA calls it programmatic dependent launch: a kernel's programs are launched while the last ones of the
kernel before still run, do what does not depend on it, and wait for it by an instruction of their own.
TensorRT launches kernels one after the other; that one need not wait for the other's end is written into the
edges of the graph that was captured, before it is instantiated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from quire.execution.tensorrt.device import DeviceError


def overlap_kernels(driver: Any, graph: Any, names: Collection[str]) -> int:
    """Let kernels in a captured graph start early.

    Args:
        driver: the module cuda.bindings.driver.
        graph: a cudaGraph_t or CUgraph that was not instantiated yet.
        names: of kernels that wait for what they depend on themselves; any other kernel keeps waiting for the
            end of the one before.

    Returns:
        How many edges of the graph were changed.

    Raises:
        DeviceError: the driver refuses.
    """
    call = functools.partial(_call, driver)
    kernel_type = driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL
    handle = driver.CUgraph(int(graph))
    _, _, _, count = call("cuGraphGetEdges", handle)
    sources, targets, _, _ = call("cuGraphGetEdges", handle, count)
    is_kernel = {}
    for node in (*sources, *targets):
        if int(node) not in is_kernel:
            is_kernel[int(node)] = call("cuGraphNodeGetType", node) == kernel_type
    edges = [
        (source, target)
        for source, target in zip(sources, targets, strict=True)
        if is_kernel[int(source)] and is_kernel[int(target)] and _kernel_name(target, call) in names
    ]
    if not edges:
        return 0
    early = driver.CUgraphEdgeData()
    early.from_port = driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC
    early.type = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    froms, tos = [source for source, _ in edges], [target for _, target in edges]
    usual = driver.CUgraphEdgeData()
    call("cuGraphRemoveDependencies", handle, froms, tos, [usual] * len(edges), len(edges))
    call("cuGraphAddDependencies", handle, froms, tos, [early] * len(edges), len(edges))
    return len(edges)


def _kernel_name(node: Any, call: Callable[..., Any]) -> str:
    parameters = call("cuGraphKernelNodeGetParams", node)
    if int(parameters.func):
        name = call("cuFuncGetName", parameters.func)
    else:
        name = call("cuKernelGetName", parameters.kern)
    return str(name.decode())


def _call(driver: Any, name: str, *arguments: Any) -> Any:
    """What a function of the driver returns besides its status: nothing, one value or a tuple."""
    status, *values = getattr(driver, name)(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{name} failed with {status.name}")
    return values[0] if len(values) == 1 else tuple(values)
