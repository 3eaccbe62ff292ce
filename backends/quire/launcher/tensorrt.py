"""What a TensorRT engine needs of this machine, checked before a server starts.

Whether the plan fits this GPU and this version of TensorRT is found out by whoever loads it.
"""

from __future__ import annotations

import ctypes
import importlib.util

from quire.errors import StartupError
from quire.execution.tensorrt.library import DRIVER_LIBRARY
from quire.interface import EnginePlacement
from quire.launcher.installation import TritonInstallation

BACKEND_LIBRARY = "libtriton_tensorrt.so"
PACKAGES = {"tensorrt": "tensorrt", "cuda.bindings": "cuda-bindings"}
"""What an engine in the scheduler's process imports, and what installs it."""


def check_tensorrt(engine: EnginePlacement, triton: TritonInstallation) -> None:
    """Check for a GPU's driver, and for what runs a plan: Triton's TensorRT backend or the Python packages.

    Raises:
        StartupError: one of them is missing.
    """
    try:
        ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        raise StartupError(
            f"this repository's engine needs an NVIDIA GPU, whose driver cannot be loaded ({error}); start "
            "the server on a machine with one (docker run --gpus all, in Kubernetes nvidia.com/gpu)"
        ) from None
    if engine is EnginePlacement.HOSTED:
        library = triton.backends / "tensorrt" / BACKEND_LIBRARY
        if not library.is_file():
            raise StartupError(
                f"this repository's engine is hosted by Triton's TensorRT backend, and {library} is missing; "
                "use NVIDIA's tritonserver container, put the backend of this tritonserver there, or build "
                "the repository with `quire build --engine in-process`"
            )
        return
    missing = [package for module, package in PACKAGES.items() if not _can_be_imported(module)]
    if missing:
        raise StartupError(
            "this repository's engine runs in the scheduler's process and needs the Python packages "
            f"{' and '.join(missing)}; install them with: pip install {' '.join(missing)}"
        )


def _can_be_imported(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        # The package that it lies in is missing.
        return False
