"""What Triton loads for each model with `backend: "quire"`; its `component` parameter says what it is.

Triton runs this file from the backend directory, whose parent need not be on the path of the Python that
runs it; that is put right here, and everything else is left to the components in `quire.serving`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent.parent))

from quire.errors import StartupError
from quire.serving.component import ComponentArguments


class Component(Protocol):
    """One of the three parts of a server; made when its model is loaded."""

    def execute(self, requests: Sequence[Any]) -> Sequence[Any] | None:
        """Answer Triton's requests."""
        ...

    def finalize(self) -> None:
        """Let go of everything; the model is being unloaded."""
        ...


class TritonPythonModel:
    """Triton's interface to the component that the model's configuration names."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the component; what it raises is what the server prints before it exits."""
        arguments = ComponentArguments.parse(args)
        self._component = _component(arguments)

    def execute(self, requests: Sequence[Any]) -> Sequence[Any] | None:
        """Pass requests on."""
        return self._component.execute(requests)

    def finalize(self) -> None:
        """Pass the end on."""
        self._component.finalize()


def _component(arguments: ComponentArguments) -> Component:
    """Each component's imports stay in its own processes: only one of them needs the engine's runtime."""
    name = arguments.parameters.get("component")
    if name == "frontend":
        from quire.serving.frontend.component import Frontend

        return Frontend(arguments)
    if name == "scheduler":
        from quire.serving.scheduler.component import SchedulerComponent

        return SchedulerComponent(arguments)
    if name == "engine":
        from quire.serving.engine.component import EngineComponent

        return EngineComponent(arguments)
    raise StartupError(
        f"parameter component of model {arguments.model_name} is {name!r}; "
        "it must be frontend, scheduler or engine: build the repository again with `quire build`"
    )
