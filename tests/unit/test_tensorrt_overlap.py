"""Edges of a captured graph that let kernels start early, with a stand-in for the driver."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from quire.execution.tensorrt.device import DeviceError
from quire.execution.tensorrt.overlap import overlap_kernels

KERNEL, MEMSET = "kernel", "memset"
GRAPH = 17
SUCCESS, REFUSED = SimpleNamespace(name="CUDA_SUCCESS"), SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE")


@dataclass
class EdgeData:
    from_port: int = 0
    to_port: int = 0
    type: int = 0


@dataclass
class Driver:
    """CUDA's driver API as far as graphs go. Nodes are numbers, kernels are functions or a library's."""

    functions: dict[int, str]
    library_kernels: dict[int, str] = field(default_factory=dict)
    edges: dict[tuple[int, int], EdgeData] = field(default_factory=dict)
    refuses: str = ""

    CUresult = SimpleNamespace(CUDA_SUCCESS=SUCCESS)
    CUgraphNodeType = SimpleNamespace(CU_GRAPH_NODE_TYPE_KERNEL=KERNEL)
    CUgraphDependencyType = SimpleNamespace(CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC=1)
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC = 1
    CUgraphEdgeData = EdgeData

    def __getattribute__(self, name: str) -> Any:
        if name == object.__getattribute__(self, "refuses"):
            return lambda *arguments: (REFUSED,)
        return object.__getattribute__(self, name)

    def CUgraph(self, address: int) -> int:  # noqa: N802
        return address

    def cuGraphGetEdges(self, graph: int, count: int = 0) -> tuple[Any, ...]:  # noqa: N802
        assert graph == GRAPH
        known = list(self.edges.items())[:count]
        froms, tos = [edge[0] for edge, _ in known], [edge[1] for edge, _ in known]
        return SUCCESS, froms, tos, [data for _, data in known], len(self.edges)

    def cuGraphNodeGetType(self, node: int) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, KERNEL if node in self.functions or node in self.library_kernels else MEMSET

    def cuGraphKernelNodeGetParams(self, node: int) -> tuple[Any, ...]:  # noqa: N802
        function, kernel = (node, 0) if node in self.functions else (0, node)
        return SUCCESS, SimpleNamespace(func=function, kern=kernel)

    def cuFuncGetName(self, function: int) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, self.functions[function].encode()

    def cuKernelGetName(self, kernel: int) -> tuple[Any, ...]:  # noqa: N802
        return SUCCESS, self.library_kernels[kernel].encode()

    def cuGraphRemoveDependencies(  # noqa: N802
        self, graph: int, froms: list[int], tos: list[int], data: list[EdgeData], count: int
    ) -> tuple[Any, ...]:
        assert len(froms) == len(tos) == len(data) == count
        for edge, expected in zip(zip(froms, tos, strict=True), data, strict=True):
            assert self.edges.pop(edge) == expected
        return (SUCCESS,)

    def cuGraphAddDependencies(  # noqa: N802
        self, graph: int, froms: list[int], tos: list[int], data: list[EdgeData], count: int
    ) -> tuple[Any, ...]:
        assert len(froms) == len(tos) == len(data) == count
        self.edges.update(zip(zip(froms, tos, strict=True), data, strict=True))
        return (SUCCESS,)


def in_a_row(*nodes: int) -> dict[tuple[int, int], EdgeData]:
    return {edge: EdgeData() for edge in itertools.pairwise(nodes)}


EARLY, USUAL = EdgeData(from_port=1, type=1), EdgeData()


def test_only_kernels_that_wait_themselves_start_early() -> None:
    driver = Driver({1: "gather", 2: "linear", 3: "attend", 4: "other"}, edges=in_a_row(1, 2, 3, 4))
    assert overlap_kernels(driver, GRAPH, ("linear", "attend")) == 2
    assert driver.edges == {(1, 2): EARLY, (2, 3): EARLY, (3, 4): USUAL}


def test_what_follows_something_else_than_a_kernel_waits_for_its_end() -> None:
    memset, linear = 9, 1
    driver = Driver({linear: "linear"}, edges=in_a_row(memset, linear))
    assert overlap_kernels(driver, GRAPH, ("linear",)) == 0
    assert driver.edges == {(memset, linear): USUAL}


def test_kernels_of_libraries_have_names_too() -> None:
    driver = Driver({}, {1: "linear", 2: "linear", 3: "gather"}, in_a_row(1, 2, 3))
    assert overlap_kernels(driver, GRAPH, ("linear",)) == 1
    assert driver.edges == {(1, 2): EARLY, (2, 3): USUAL}


def test_without_names_or_edges_nothing_is_changed() -> None:
    driver = Driver({1: "linear", 2: "linear"}, edges=in_a_row(1, 2))
    assert overlap_kernels(driver, GRAPH, ()) == 0
    assert driver.edges == in_a_row(1, 2)
    assert overlap_kernels(Driver({1: "linear"}), GRAPH, ("linear",)) == 0


def test_a_refusal_names_the_function() -> None:
    driver = Driver({1: "linear", 2: "linear"}, edges=in_a_row(1, 2), refuses="cuGraphAddDependencies")
    with pytest.raises(DeviceError, match="cuGraphAddDependencies failed with CUDA_ERROR_INVALID_VALUE"):
        overlap_kernels(driver, GRAPH, ("linear",))
