"""The engine component: what Triton loads as the model `engine` where no other backend of Triton runs it.

Hosts the CPU runtime's engine and gives it one step after the other. The engine checks the step's tensors;
this checks who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from quire.errors import QuireError
from quire.execution.manifest import read_manifest
from quire.execution.model_inputs import ModelInputs
from quire.interface import STEP_INPUTS
from quire.serving.component import ComponentArguments, join_server
from quire.serving.engine.loading import load_engine
from quire.serving.tensors import Arrays, check_access, error_response, input_arrays, response


class EngineComponent:
    """The one instance of the model `engine`.

    Raises:
        StartupError: a setting is malformed or beyond the engine's limits, or the engine doesn't fit.
    """

    def __init__(self, arguments: ComponentArguments) -> None:
        settings = arguments.settings().within(read_manifest(arguments.engine_dir).limits)
        self._rendezvous = join_server()
        self._engine = load_engine(arguments.engine_dir, settings)
        self._rendezvous.announce_engine()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Run steps, one after the other."""
        return [self._run(request) for request in requests]

    def finalize(self) -> None:
        """Let go of the server; the process ends with the model."""
        self._rendezvous.close()

    def _run(self, request: Any) -> Any:
        try:
            arrays = input_arrays(request)
            check_access(arrays, self._rendezvous.access_key)
            logits = self._engine.run(_model_inputs(arrays))
        except QuireError as error:
            return error_response(error)
        pool = self._engine.pool_info
        return response(
            {
                "logits": logits,
                "pool_info": np.array([pool.num_blocks, pool.epoch], np.int32),
                "step": arrays["step"],
            }
        )


def _model_inputs(arrays: Arrays) -> ModelInputs:
    step_arrays = {spec.name: arrays[spec.name] for spec in STEP_INPUTS}
    return ModelInputs(step=int(arrays["step"][0]), **step_arrays)
