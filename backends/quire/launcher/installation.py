"""The tritonserver of this machine and what its Python backend needs to run with this Python.

Two kinds are known: the one of NVIDIA's container (or any on PATH laid out like it) and the one inside the
nvidia-pytriton wheel. The launcher starts what is found here, the doctor reports it; neither the model
repository nor the settings of a start matter here.
"""

from __future__ import annotations

import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import quire
from quire.errors import StartupError
from quire.interface import BACKEND
from quire.launcher.plain_paths import plain_path
from quire.serving.watchdog import STUB_NAME
from quire.user_cache import user_cache

CONTAINER_ROOT = Path("/opt/tritonserver")
"""Where NVIDIA's images keep the server."""

WHEEL = "nvidia-pytriton"
SERVER_OF_WHEEL = {"0.7.0": "2.51.0"}
"""Which tritonserver a release of the wheel holds; the wheel itself doesn't say."""

NUMPY_2_SINCE = (2, 53)
"""First tritonserver whose Python backend was built for numpy 2; older ones corrupt every array with it."""


@dataclass(frozen=True, slots=True)
class TritonInstallation:
    """A tritonserver that has a stub for the running Python."""

    binary: Path
    backends: Path
    """Its folder of backends; `python` is one of them."""
    stub: Path
    """Its Python stub for the running Python."""
    library_dirs: tuple[Path, ...]
    """What the loader has to search beside the system's folders, libpython's included."""
    version: str | None
    """None where the installation doesn't say."""

    def check_numpy(self, numpy_version: str) -> None:
        """Check that the server's stub can exchange arrays with this numpy.

        Raises:
            StartupError: it can't.
        """
        if self.version is None or int(numpy_version.partition(".")[0]) < 2:
            return
        if tuple(map(int, self.version.split(".")[:2])) < NUMPY_2_SINCE:
            raise StartupError(
                f"numpy {numpy_version} is installed, with which tritonserver {self.version} corrupts every "
                "array it passes on; install 'numpy<2'"
            )


def find_triton() -> TritonInstallation:
    """Find a tritonserver for the running Python: the container's, one on PATH, then the wheel's.

    Raises:
        StartupError: there is none, none has a stub for this Python, or libpython is missing.
    """
    library_dirs = _libpython_dirs()
    unusable: list[str] = []
    for root in _server_roots():
        stub = root / "backends" / "python" / STUB_NAME
        if not stub.is_file():
            unusable.append(f"{root} has no Python backend")
        elif _libpython_name().encode() not in stub.read_bytes():
            unusable.append(f"the Python backend of {root} was built for another Python")
        else:
            version_file = root / "TRITON_VERSION"
            version = version_file.read_text().strip() if version_file.is_file() else None
            return TritonInstallation(
                root / "bin" / "tritonserver", root / "backends", stub, library_dirs, version
            )
    wheel = _wheel_root()
    if wheel is not None:
        stub = wheel / "python_backend_stubs" / _python_version() / STUB_NAME
        if stub.is_file():
            version = SERVER_OF_WHEEL.get(importlib.metadata.version(WHEEL))
            bundled = wheel.parent.parent / "nvidia_pytriton.libs"
            return TritonInstallation(
                wheel / "bin" / "tritonserver", wheel / "backends", stub, (*library_dirs, bundled), version
            )
        unusable.append(f"the wheel {WHEEL} has no stub for Python {_python_version()}")
    reasons = f" ({'; '.join(unusable)})" if unusable else ""
    raise StartupError(
        f"no tritonserver for Python {_python_version()} was found{reasons}; "
        "install quire[server] or run inside NVIDIA's tritonserver container"
    )


def backend_directory(triton: TritonInstallation) -> Path:
    """Put together the folder for `--backend-directory`: the server's backends with `quire` among them.

    The server refuses a backend folder some of whose files are links to elsewhere, but takes one that is
    a link as a whole. So the Python backend is copied, to lie beside the stub of the running Python, and
    everything else is linked. The result is kept in the user's cache, because a server started by hand
    needs it too; its name tells by content which combination it is.

    Returns:
        The folder, or a link to it where the cache's path isn't plain.

    Raises:
        StartupError: the cache cannot be written, or no link can be made.
    """
    package = Path(quire.__file__).resolve().parent
    target = user_cache() / f"backends-{_fingerprint(triton, package)}"
    if not target.is_dir():
        _put_together(target, triton, package)
    return plain_path(target)


def _put_together(target: Path, triton: TritonInstallation, package: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".backends-", dir=target.parent))
    except OSError as error:
        raise StartupError(
            f"cannot write to {target.parent} ({error.strerror}); "
            "set XDG_CACHE_HOME to a folder that you may write to"
        ) from error
    try:
        for backend in triton.backends.iterdir():
            if backend.name not in ("python", BACKEND):
                (draft / backend.name).symlink_to(backend)
        shutil.copytree(triton.backends / "python", draft / "python")
        shutil.copy2(triton.stub, draft / "python" / STUB_NAME)
        (draft / BACKEND).symlink_to(package)
        draft.rename(target)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not target.is_dir():  # Otherwise another start was faster.
            raise StartupError(f"cannot put the backends together in {target} ({error.strerror})") from error


def _server_roots() -> Iterator[Path]:
    """Folders with bin/tritonserver and backends/, best first."""
    on_path = shutil.which("tritonserver")
    candidates = [CONTAINER_ROOT]
    if on_path:
        candidates.append(Path(on_path).resolve().parent.parent)
    for root in dict.fromkeys(candidates):
        if (root / "bin" / "tritonserver").is_file():
            yield root


def _wheel_root() -> Path | None:
    spec = importlib.util.find_spec("pytriton")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(location) / "tritonserver"
        if (root / "bin" / "tritonserver").is_file():
            return root
    return None


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _libpython_name() -> str:
    return f"libpython{_python_version()}.so"


def _libpython_dirs() -> tuple[Path, ...]:
    """The folder of libpython, or nothing where the loader finds it by itself.

    Raises:
        StartupError: there is no libpython for the running Python.
    """
    soname = f"{_libpython_name()}.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), str(Path(sys.base_prefix) / "lib")):
        if folder and (Path(folder) / soname).is_file():
            return (Path(folder),)
    if ctypes.util.find_library(f"python{_python_version()}") is not None:
        return ()
    raise StartupError(
        f"{soname}, which tritonserver's Python backend loads, was not found; install it (on Debian and "
        f"Ubuntu: apt-get install libpython{_python_version()}) or use a Python built with --enable-shared"
    )


def _fingerprint(triton: TritonInstallation, package: Path) -> str:
    """A short name for the combination of this server, its backends, this stub and this package."""
    digest = hashlib.sha256()
    for path in (triton.binary, triton.backends, triton.stub, package):
        status = path.stat()
        # A folder's own times change with every cache file written into it.
        stamp = (status.st_size, status.st_mtime_ns) if path.is_file() else ()
        digest.update(repr((os.fspath(path), stamp)).encode())
    digest.update(repr(sorted(backend.name for backend in triton.backends.iterdir())).encode())
    return digest.hexdigest()[:16]
