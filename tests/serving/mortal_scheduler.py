"""A model for Triton: the scheduler component on a CPU engine that dies as a GPU would, or is killed.

It lies in a repository as scheduler/1/model.py. An engine in process is dead once a file `dead` lies beside
it, a hosted one as soon as it is lost.
"""

from __future__ import annotations

from pathlib import Path

from quire.errors import EngineDeadError, EngineStepError
from quire.execution import openvino
from quire.execution.executor import PoolInfo
from quire.execution.model_inputs import ModelInputs
from quire.model import TritonPythonModel
from quire.serving.scheduler import step_loop

__all__ = ["TritonPythonModel"]

CAUSE = "cudaEventQuery failed with cudaErrorIllegalAddress"

_dead = Path(__file__).with_name("dead")


class MortalExecutor(openvino.OpenVINOExecutor):
    """Fails the step under way when it has died, and is lost from then on."""

    def submit(self, inputs: ModelInputs) -> openvino.OpenVINOStep:
        if _dead.exists():
            raise EngineStepError(f"step {inputs.step} failed: {CAUSE}")
        return super().submit(inputs)

    def pool_info(self, timeout_s: float) -> PoolInfo:
        if _dead.exists():
            raise EngineDeadError(f"the GPU is lost: {CAUSE}")
        return super().pool_info(timeout_s)


step_loop.ENGINE_RETURN_S = 0.0
openvino.OpenVINOExecutor = MortalExecutor  # type: ignore[misc]
