"""The TensorRT library: its Python module, and its messages in Python's log."""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import logging
from typing import Any

from quire.errors import StartupError

MAJOR_VERSION = 11
DRIVER_LIBRARY = "libcuda.so.1"
"""CUDA's driver API, which everything here stands on."""

_log = logging.getLogger(__name__)


def tensorrt_module() -> Any:
    """The module `tensorrt`, of the version that this is written for.

    Raises:
        StartupError: it is not there, or another one is.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise StartupError(
            f"a TensorRT engine needs the package tensorrt of version {MAJOR_VERSION} ({error}); NVIDIA's "
            "containers have it, or install it with `pip install tensorrt`"
        ) from None
    if tensorrt.__version__.split(".")[0] != str(MAJOR_VERSION):
        raise StartupError(
            f"TensorRT {tensorrt.__version__} is installed; this Quire needs version {MAJOR_VERSION}"
        )
    return tensorrt


class TensorRTLog:
    """Passes TensorRT's messages on, and remembers the last error, which says why a call failed.

    Args:
        trt: the module.
    """

    def __init__(self, trt: Any) -> None:
        self.last_error = "it does not say why"
        severity = trt.ILogger.Severity
        levels = {
            severity.INTERNAL_ERROR: logging.ERROR,
            severity.ERROR: logging.ERROR,
            severity.WARNING: logging.WARNING,
        }

        class Forward(trt.ILogger):  # type: ignore[misc]
            def log(forward, kind: Any, message: str) -> None:  # noqa: N805
                level = levels.get(kind, logging.DEBUG)
                if level == logging.ERROR:
                    self.last_error = message
                _log.log(level, "TensorRT: %s", message)

        self.tensorrt = Forward()
        """What TensorRT takes as its logger."""
