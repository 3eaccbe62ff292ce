"""The doctor's findings."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from rich.console import Console
from tests.unit.tiny_engine import write_engine
from typer.testing import CliRunner

from quire import doctor
from quire.cli import app
from quire.doctor import examine, show
from quire.gpu_chain import Finding
from quire.interface import EnginePlacement
from quire_build.repository import DEFAULT_FRONTENDS, write_configs


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def finding(subject: str) -> Finding:
    return next(finding for finding in examine() if finding.subject == subject)


def test_a_working_installation_needs_nothing() -> None:
    assert [finding.remedy for finding in examine() if finding.remedy] == []
    assert finding("tritonserver").state.startswith("2.")


def test_a_numpy_that_the_server_corrupts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "2.3.0"}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, "1.0"))
    assert "install 'numpy<2'" in finding("numpy").remedy


def test_another_openvino_than_the_pinned_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "2024.1.0")
    assert finding("openvino").remedy.startswith("pip install openvino==")


def test_missing_build_packages_do_not_fail_a_machine_that_only_serves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    installed = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else installed(name))
    assert finding("torch") == Finding("torch", "not installed; only `quire build` needs it")


def test_a_small_dev_shm_makes_the_doctor_exit_with_1_and_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = type(shutil.disk_usage("/"))(16 << 20, 0, 16 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "/dev/shm: make at least 64 MiB of it free" in result.stdout


def test_the_report_shows_every_finding_and_repeats_the_remedies() -> None:
    output = io.StringIO()
    show([Finding("good", "1.0"), Finding("bad", "0.1", "do [this]")], Console(file=output, width=80))
    lines = [line.rstrip() for line in output.getvalue().splitlines()]
    assert lines == ["✓  good  1.0", "✗  bad   0.1", "bad: do [this]"]


def test_the_report_ends_with_a_verdict_and_breaks_no_path() -> None:
    output = io.StringIO()
    path = "/a/long/path" * 10
    show([Finding("[server]", path)], Console(file=output, width=40))
    assert output.getvalue().splitlines() == [
        f"✓  [server]  {path}",
        "Everything that serving needs is here and fits together.",
    ]


@pytest.fixture(params=EnginePlacement)
def repository(
    request: pytest.FixtureRequest, tmp_path: Path, byte_level_backend: tokenizers.Tokenizer
) -> Path:
    """A whole one, whose engine is in `1` of the model that loads it."""
    root = tmp_path / "repository"
    write_configs(root, DEFAULT_FRONTENDS, request.param)
    write_engine(root / request.param.engine_owner / "1")
    byte_level_backend.save(str(root / "llm" / "1" / "tokenizer.json"))
    return root


def faults(repository: Path) -> list[tuple[str, str]]:
    return [(finding.subject, finding.remedy) for finding in examine(repository) if finding.remedy]


def test_a_whole_repository_needs_nothing(repository: Path) -> None:
    assert faults(repository) == []


def _change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "damage", "subject", "named"),
    [
        ("model.onnx", Path.unlink, "engine files", "model.onnx is missing"),
        ("model.onnx", _change_a_byte, "engine files", "model.onnx has changed since it was built"),
        ("engine.json", Path.unlink, "repository", "engine.json"),
        ("tokenizer.json", Path.unlink, "llm files", "tokenizer.json is missing"),
        ("tokenizer.json", lambda path: path.write_text("{"), "llm files", "tokenizer.json cannot be read"),
    ],
)
def test_a_file_that_serving_would_refuse_is_named_with_what_to_do(
    repository: Path, file: str, damage: Callable[[Path], object], subject: str, named: str
) -> None:
    (path,) = repository.rglob(file)
    damage(path)
    ((found, remedy),) = faults(repository)
    assert found == subject and named in remedy and "quire build" in remedy


def test_generation_defaults_that_serving_would_refuse_are_named(repository: Path) -> None:
    (repository / "llm" / "1" / "generation_config.json").write_text('{"temperature": -3}')
    ((subject, remedy),) = faults(repository)
    assert subject == "llm files" and "generation_config.json" in remedy and "quire build" in remedy


def test_a_model_that_is_missing_and_a_path_without_a_repository_are_told_apart(
    repository: Path, tmp_path: Path
) -> None:
    ((subject, remedy),) = faults(tmp_path / "nowhere")
    assert subject == "repository" and "there is no model repository at" in remedy
    (repository / "llm" / "config.pbtxt").unlink()
    ((subject, remedy),) = faults(repository)
    assert subject == "repository" and "llm/config.pbtxt is missing" in remedy
