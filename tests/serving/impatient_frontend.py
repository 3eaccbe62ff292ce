"""A model for Triton: the frontend component, which waits for no scheduler that died.

It lies in a repository as llm/1/model.py.
"""

from __future__ import annotations

from quire.model import TritonPythonModel
from quire.serving.frontend import dead_scheduler

__all__ = ["TritonPythonModel"]

dead_scheduler.SCHEDULER_RETURN_S = 0.0
