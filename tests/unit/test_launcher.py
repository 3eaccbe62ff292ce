"""What is checked before a server starts, and the command that comes out."""

from __future__ import annotations

import ctypes.util
import os
import shlex
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from quire.errors import ManifestError, SettingsError, StartupError
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    PlanDetails,
    write_manifest,
)
from quire.interface import EnginePlacement
from quire.launcher import installation, tensorrt
from quire.launcher.installation import TritonInstallation, backend_directory, find_triton
from quire.launcher.plan import (
    Endpoints,
    LaunchOptions,
    ModelRepository,
    check_repository,
    check_shared_memory,
    plan_launch,
)
from quire.serving.watchdog import STUB_NAME
from quire.settings import ServingSettings

MANIFEST = Manifest(
    version=MANIFEST_VERSION,
    model=ModelDimensions("llama", 1024, 2, 4, 2, 16),
    block_size=32,
    limits=EngineLimits(max_num_seqs=256, max_num_batched_tokens=2048, max_model_len=2048),
    precision="float32",
    kv_cache_dtype="float32",
    runtime="openvino",
    runtime_version="1",
    inputs=(),
    outputs=(),
    kv_bytes_per_block=8192,
    checkpoint_digest="",
    files={},
    gate=GateReport(),
)
PLAN = msgspec.structs.replace(
    MANIFEST,
    precision="bf16",
    kv_cache_dtype="bf16",
    runtime="tensorrt",
    plan=PlanDetails(
        max_blocks=100,
        num_pools=1,
        blocks_per_pool=100,
        profiles=((1, 2048),),
        step_sizes=(1, 256, 2048),
        kernel_shared_bytes=49152,
        gpu_architecture=90,
        gpu_name="NVIDIA H100",
    ),
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository as far as the launcher looks at it."""
    return write_repository(tmp_path / "repository", EnginePlacement.HOSTED)


def write_repository(root: Path, engine: EnginePlacement, manifest: Manifest = MANIFEST) -> Path:
    for name in engine.models:
        (root / name / "1").mkdir(parents=True)
        config = ModelConfig(name=name, backend="quire")
        config.parameters["max_queued_requests"].string_value = "7"
        config.parameters["engine"].string_value = engine
        (root / name / "config.pbtxt").write_text(text_format.MessageToString(config))
    write_manifest(manifest, root / engine.engine_owner / "1")
    return root


def free_endpoints() -> Endpoints:
    with socket.socket() as grpc, socket.socket() as http, socket.socket() as metrics:
        sockets = (grpc, http, metrics)
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return Endpoints("127.0.0.1", *(probe.getsockname()[1] for probe in sockets))


def test_the_plan_carries_settings_as_variables_and_ports_as_arguments(repository: Path) -> None:
    endpoints = free_endpoints()
    plan = plan_launch(LaunchOptions(repository, endpoints, {"max_num_seqs": 8, "threads": 2}))
    assert plan.environment["QUIRE_MAX_NUM_SEQS"] == "8"
    assert plan.environment["QUIRE_THREADS"] == "2"
    assert "QUIRE_MAX_MODEL_LEN" not in plan.environment
    assert f"--grpc-port={endpoints.grpc_port}" in plan.argv
    assert f"--model-repository={repository}" in plan.argv
    assert plan.environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_the_shell_line_survives_a_shell(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = "/a folder; with 'quotes'"
    monkeypatch.setenv("PATH", spaced, prepend=os.pathsep)
    words = shlex.split(plan_launch(LaunchOptions(repository, free_endpoints())).shell_line())
    program = words.index(next(word for word in words if word.endswith("/tritonserver")))
    line = shlex.join([*words[:program], sys.executable, "-c", "import os; print(os.environ['PATH'])"])
    printed = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True).stdout
    assert spaced in printed.strip().split(os.pathsep)


def test_the_server_gets_only_paths_that_its_shell_takes_as_one_word(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = tmp_path / "a folder; with 'quotes'"
    repository.rename(spaced)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan = plan_launch(LaunchOptions(spaced, free_endpoints()))
    given = dict(argument.split("=", 1) for argument in plan.argv if argument.count("=") == 1)
    for flag, leads_to in (
        ("--model-repository", spaced),
        ("--backend-directory", next((tmp_path / "a cache" / "quire").glob("backends-*"))),
    ):
        assert shlex.quote(given[flag]) == given[flag]
        assert Path(given[flag]).resolve() == leads_to


@pytest.mark.parametrize("limit", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_a_limit_above_the_engines_is_refused_with_both_numbers(repository: Path, limit: str) -> None:
    with pytest.raises(SettingsError, match=rf"{limit} is 9999, but the engine was built for at most"):
        plan_launch(LaunchOptions(repository, free_endpoints(), {limit: 9999}))


def test_a_limit_in_the_environment_is_checked_too(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUIRE_MAX_NUM_SEQS", "9999")
    with pytest.raises(SettingsError, match="max_num_seqs is 9999"):
        plan_launch(LaunchOptions(repository, free_endpoints()))


def test_a_taken_port_is_named_with_its_flag(repository: Path) -> None:
    endpoints = free_endpoints()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", endpoints.http_port))
        taken.listen()
        with pytest.raises(StartupError, match=rf"port {endpoints.http_port} for HTTP .*--http-port"):
            plan_launch(LaunchOptions(repository, endpoints))


def test_one_port_for_two_purposes_is_refused() -> None:
    with pytest.raises(StartupError, match="two purposes"):
        Endpoints("127.0.0.1", 9001, 9001, 9002).check_free()


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(StartupError, match=r"cannot listen on 192\.0\.2\.1 .*choose an address .*--address"):
        Endpoints("192.0.2.1").check_free()


def test_a_name_is_given_to_the_server_as_an_address() -> None:
    assert Endpoints("localhost").resolved().address in ("127.0.0.1", "::1")
    with pytest.raises(StartupError, match=r"cannot listen on 'no such host' .*--address"):
        Endpoints("no such host").resolved()


def test_ipv6_is_written_as_each_of_tritons_servers_wants_it() -> None:
    flags = Endpoints("::1", 5, 6, 7).server_flags()
    assert "--grpc-address=[::1]" in flags
    assert "--http-address=ipv6:::1" in flags
    assert "--metrics-address=ipv6:::1" in flags


@pytest.mark.parametrize(
    ("address", "url"), [("127.0.0.1", "127.0.0.1:5"), ("0.0.0.0", "127.0.0.1:5"), ("::", "[::1]:5")]
)
def test_the_local_url_reaches_whatever_is_listened_on(address: str, url: str) -> None:
    assert Endpoints(address).local_url(5) == url


def test_a_folder_that_is_no_repository_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="quire build"):
        plan_launch(LaunchOptions(tmp_path / "nothing"))
    with pytest.raises(StartupError, match=r"llm/config\.pbtxt is missing.*quire build"):
        plan_launch(LaunchOptions(tmp_path))


@pytest.mark.parametrize("engine", EnginePlacement)
def test_a_repository_is_whole_only_with_the_models_that_its_engine_needs(
    tmp_path: Path, engine: EnginePlacement
) -> None:
    root = write_repository(tmp_path / "repository", engine)
    repository = check_repository(root)
    assert (repository.engine, repository.manifest) == (engine, MANIFEST)
    for model in engine.models:
        (root / model).rename(tmp_path / model)
        with pytest.raises(StartupError, match=rf"{model}/config\.pbtxt is missing"):
            check_repository(root)
        (tmp_path / model).rename(root / model)


def test_a_corrupt_manifest_is_refused(repository: Path) -> None:
    (repository / "engine" / "1" / "engine.json").write_text('{"version": 1')
    with pytest.raises(ManifestError, match=r"engine\.json is damaged"):
        plan_launch(LaunchOptions(repository))


def test_a_corrupt_config_is_refused(repository: Path) -> None:
    (repository / "scheduler" / "config.pbtxt").write_text("name: {")
    with pytest.raises(StartupError, match=r"config\.pbtxt is damaged"):
        plan_launch(LaunchOptions(repository))


def test_too_little_shared_memory_is_refused_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type(shutil.disk_usage("/"))(64 << 20, 0, 64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    hosted = ModelRepository(MANIFEST, EnginePlacement.HOSTED, {})
    check_shared_memory(hosted, ServingSettings(max_num_seqs=256))
    with pytest.raises(StartupError, match=r"64 MiB free and serving needs \d+ MiB"):
        check_shared_memory(hosted, ServingSettings(max_num_seqs=65536))
    # A hosted plan sends the tokens that it sampled.
    check_shared_memory(
        ModelRepository(PLAN, EnginePlacement.HOSTED, {}), ServingSettings(max_num_seqs=65536)
    )
    # Logits of an engine in the scheduler's process never leave it.
    in_process = ModelRepository(MANIFEST, EnginePlacement.IN_PROCESS, {})
    check_shared_memory(in_process, ServingSettings(max_num_seqs=65536))


@pytest.mark.parametrize(
    ("server", "numpy", "fits"),
    [
        ("2.51.0", "1.26.4", True),
        ("2.51.0", "2.1.0", False),
        ("2.53.0", "2.1.0", True),
        (None, "2.1.0", True),
    ],
)
def test_numpy_2_is_refused_where_the_server_corrupts_its_arrays(
    server: str | None, numpy: str, fits: bool
) -> None:
    triton = TritonInstallation(Path("b"), Path("d"), Path("s"), (), server)
    if fits:
        triton.check_numpy(numpy)
    else:
        with pytest.raises(StartupError, match=r"install 'numpy<2'"):
            triton.check_numpy(numpy)


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server laid out as in NVIDIA's image, with a backend that it doesn't share with the wheel."""
    root = tmp_path / "opt" / "tritonserver"
    for folder in ("bin", "backends/python", "backends/tensorrt"):
        (root / folder).mkdir(parents=True)
    (root / "bin" / "tritonserver").touch()
    (root / "backends" / "tensorrt" / "libtriton_tensorrt.so").touch()
    (root / "backends" / "python" / "libtriton_python.so").write_text("library")
    (root / "TRITON_VERSION").write_text("2.99.0\n")
    monkeypatch.setattr(installation, "CONTAINER_ROOT", root)
    yield root


def write_stub(root: Path, python: str) -> None:
    (root / "backends" / "python" / STUB_NAME).write_bytes(f"ELF libpython{python}.so.1.0".encode())


def test_the_containers_server_is_preferred_if_it_has_a_stub_for_this_python(container: Path) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    triton = find_triton()
    assert (triton.binary, triton.version) == (container / "bin" / "tritonserver", "2.99.0")
    write_stub(container, "3.99")
    assert find_triton().binary != container / "bin" / "tritonserver"


def test_without_a_fitting_server_the_sentence_says_which_was_seen_and_what_to_install(
    container: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stub(container, "3.99")
    monkeypatch.setattr(installation, "_wheel_root", lambda: None)
    with pytest.raises(StartupError, match=r"built for another Python.*install quire\[server\]"):
        find_triton()


def test_a_missing_libpython_is_refused_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: None)
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    with pytest.raises(StartupError, match="apt-get install libpython3"):
        find_triton()


def test_the_backend_directory_has_real_files_for_python_and_the_servers_other_backends(
    container: Path, cache: Path
) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    directory = backend_directory(find_triton())
    assert directory.is_relative_to(cache)
    assert not any(path.is_symlink() for path in (directory / "python").iterdir())
    assert (directory / "python" / STUB_NAME).read_bytes() == (
        container / "backends" / "python" / STUB_NAME
    ).read_bytes()
    assert (directory / "tensorrt" / "libtriton_tensorrt.so").is_file()
    assert (directory / "quire" / "model.py").is_file()


def test_the_backend_directory_is_made_once_and_anew_for_another_server(container: Path) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    triton = find_triton()
    first = backend_directory(triton)
    assert backend_directory(triton) == first
    triton.stub.write_bytes(triton.stub.read_bytes() + b" of another build")
    assert backend_directory(triton) != first
    assert {path.name for path in first.parent.iterdir()} == {
        first.name,
        backend_directory(triton).name,
    }


def test_the_backend_directory_is_made_anew_once_the_server_has_another_backend(container: Path) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    triton = find_triton()
    first = backend_directory(triton)
    (container / "backends" / "onnxruntime").mkdir()
    assert (backend_directory(triton) / "onnxruntime").is_dir()
    assert not (first / "onnxruntime").exists()


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the driver's library, which a machine without a GPU doesn't have."""
    library = ctypes.util.find_library("c")
    assert library is not None
    monkeypatch.setattr(tensorrt, "DRIVER_LIBRARY", library)


@pytest.mark.parametrize("engine", EnginePlacement)
def test_a_tensorrt_engine_is_refused_where_no_driver_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: EnginePlacement
) -> None:
    monkeypatch.setattr(tensorrt, "DRIVER_LIBRARY", "libcuda-of-nobody.so.1")
    repository = write_repository(tmp_path / "repository", engine, PLAN)
    with pytest.raises(StartupError, match=r"needs an NVIDIA GPU.*libcuda-of-nobody\.so\.1.*--gpus all"):
        plan_launch(LaunchOptions(repository, free_endpoints()))


def test_a_hosted_plan_needs_the_servers_own_tensorrt_backend(
    tmp_path: Path, container: Path, driver: None
) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    repository = write_repository(tmp_path / "repository", EnginePlacement.HOSTED, PLAN)
    plan = plan_launch(LaunchOptions(repository, free_endpoints()))
    [directory] = [word.partition("=")[2] for word in plan.argv if word.startswith("--backend-directory=")]
    library = container / "backends" / "tensorrt" / "libtriton_tensorrt.so"
    assert (Path(directory) / "tensorrt" / "libtriton_tensorrt.so").resolve() == library.resolve()
    library.unlink()
    with pytest.raises(StartupError, match=rf"{library} is missing"):
        plan_launch(LaunchOptions(repository, free_endpoints()))


def test_a_plan_in_process_needs_the_packages_that_it_imports(
    tmp_path: Path, container: Path, driver: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    repository = write_repository(tmp_path / "repository", EnginePlacement.IN_PROCESS, PLAN)
    packages = {"quire": "quire", "nothing_of_this_name": "nothing", "nor_this.below": "nor-this"}
    monkeypatch.setattr(tensorrt, "PACKAGES", packages)
    with pytest.raises(StartupError, match=r"pip install nothing nor-this"):
        plan_launch(LaunchOptions(repository, free_endpoints()))
    monkeypatch.setattr(tensorrt, "PACKAGES", {"quire": "quire"})
    plan_launch(LaunchOptions(repository, free_endpoints()))


def test_the_pool_of_a_hosted_plan_cannot_be_resized(tmp_path: Path, container: Path, driver: None) -> None:
    write_stub(container, f"{sys.version_info[0]}.{sys.version_info[1]}")
    repository = write_repository(tmp_path / "repository", EnginePlacement.HOSTED, PLAN)
    with pytest.raises(SettingsError, match=r"kv_cache_bytes is set.*quire build"):
        plan_launch(LaunchOptions(repository, free_endpoints(), {"kv_cache_bytes": 1 << 30}))


def test_the_users_library_path_stays_for_the_servers_backends(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/nvinfer")
    plan = plan_launch(LaunchOptions(repository, free_endpoints()))
    assert plan.environment.get("LD_LIBRARY_PATH", "/opt/nvinfer").endswith("/opt/nvinfer")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(StartupError, match="set XDG_CACHE_HOME"):
        backend_directory(find_triton())
