"""A sound checkpoint becomes a repository; anything else is refused by name and the output left alone."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models

from quire.errors import BuildError, CheckpointError, NumericsGateError, UnsupportedModelError
from quire.execution.manifest import read_manifest, verify_files
from quire.interface import EnginePlacement
from quire_build import export
from quire_build.decoder import Decoder
from quire_build.pipeline import BuildResult, build

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
"""No BOS, no EOS."""
SHAPES = {
    "model.embed_tokens.weight": (64, 32),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.self_attn.q_proj.weight": (32, 32),
    "model.layers.0.self_attn.k_proj.weight": (16, 32),
    "model.layers.0.self_attn.v_proj.weight": (16, 32),
    "model.layers.0.self_attn.o_proj.weight": (32, 32),
    "model.layers.0.post_attention_layernorm.weight": (32,),
    "model.layers.0.mlp.gate_proj.weight": (48, 32),
    "model.layers.0.mlp.up_proj.weight": (48, 32),
    "model.layers.0.mlp.down_proj.weight": (32, 48),
    "model.norm.weight": (32,),
    "lm_head.weight": (64, 32),
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def _write_checkpoint(directory: Path) -> Path:
    directory.mkdir()
    random = np.random.default_rng(0)
    weights = {name: (random.normal(size=shape) * 0.3).astype(np.float32) for name, shape in SHAPES.items()}
    save_file(weights, directory / WEIGHTS)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    Tokenizer(models.BPE({chr(33 + number): number for number in range(64)}, [])).save(
        str(directory / "tokenizer.json")
    )
    return directory


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return _write_checkpoint(tmp_path / "checkpoint")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, BuildResult]:
    directory = tmp_path_factory.mktemp("built")
    checkpoint = _write_checkpoint(directory / "checkpoint")
    return checkpoint, build(checkpoint, directory / "repository")


@pytest.fixture
def published(built: tuple[Path, BuildResult], tmp_path: Path) -> Path:
    """A copy of the built repository that a test may break."""
    return Path(shutil.copytree(built[1].repository, tmp_path / "repository"))


def _contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_a_checkpoint_without_bos_and_eos_becomes_a_whole_repository(
    built: tuple[Path, BuildResult],
) -> None:
    checkpoint, result = built
    engine_dir = result.repository / "engine" / "1"
    manifest = read_manifest(engine_dir)
    assert manifest == result.manifest and not result.was_up_to_date
    verify_files(manifest, engine_dir)
    assert manifest.files.keys() == {"model.onnx", "model.onnx.data"}
    assert manifest.limits.max_model_len == 128
    assert manifest.kv_cache_dtype == "float32" and manifest.kv_bytes_per_block == 2 * 32 * 16 * 4
    assert 0 < manifest.gate.max_abs_logit_error < 1e-4 and manifest.gate.positions > 300
    for model in ("llm", "scheduler", "engine"):
        assert (result.repository / model / "config.pbtxt").is_file()
        assert any((result.repository / model / "1").iterdir())
    for name in ("tokenizer.json", "config.json"):
        assert (result.repository / "llm" / "1" / name).read_bytes() == (checkpoint / name).read_bytes()


def test_the_graph_says_nothing_about_the_machine_it_was_made_on(built: tuple[Path, BuildResult]) -> None:
    graph = (built[1].repository / "engine" / "1" / "model.onnx").read_bytes()
    assert b"PagedAttention" in graph
    assert str(Path(export.__file__).parent).encode() not in graph and b"site-packages" not in graph


def test_an_unchanged_build_is_left_alone_without_starting_torch(
    built: tuple[Path, BuildResult],
) -> None:
    checkpoint, result = built
    before = _contents(result.repository)
    program = (
        "import sys; from pathlib import Path; from quire_build.pipeline import build\n"
        "assert build(Path(sys.argv[1]), Path(sys.argv[2])).was_up_to_date\n"
        "assert 'torch' not in sys.modules and 'openvino' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(checkpoint), str(result.repository)], check=True)
    assert _contents(result.repository) == before


@pytest.mark.parametrize("changes", [{"gate_text": "a text"}, {"accept_numerics": True}, {"frontends": 3}])
def test_a_build_for_something_else_is_not_the_same(
    built: tuple[Path, BuildResult], tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen by its getting as far as building."""
    checkpoint, result = built
    if "gate_text" in changes:
        changes = {"gate_text": tmp_path / "text"}
        changes["gate_text"].write_text("a text")

    def begin(*arguments: Any) -> None:
        raise BuildError("begun")

    monkeypatch.setattr("quire_build.pipeline._build_engine", begin)
    assert build(checkpoint, result.repository).was_up_to_date
    with pytest.raises(BuildError, match="begun"):
        build(checkpoint, result.repository, **changes)


def _flip_first_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 0xFF]) + content[1:])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("engine/1/model.onnx.data", _flip_first_byte),
        ("engine/1/engine.json", _flip_first_byte),
        ("llm/1/tokenizer.json", _flip_first_byte),
        ("llm/config.pbtxt", Path.unlink),
        ("scheduler/1/README.txt", Path.unlink),
    ],
)
def test_a_damaged_repository_does_not_count_as_up_to_date(
    built: tuple[Path, BuildResult],
    published: Path,
    name: str,
    damage: Callable[[Path], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BuildStartedError(Exception): ...

    def start(*_: object) -> None:
        raise BuildStartedError

    damage(published / name)
    monkeypatch.setattr(export, "export_onnx", start)
    with pytest.raises(BuildStartedError):
        build(built[0], published)


def test_an_engine_in_process_is_the_same_files_with_the_scheduler(
    built: tuple[Path, BuildResult], published: Path
) -> None:
    checkpoint, hosted = built
    result = build(checkpoint, published, engine=EnginePlacement.IN_PROCESS)
    assert not result.was_up_to_date
    assert {path.name for path in published.iterdir()} == {"llm", "scheduler"}
    ours, theirs = published / "scheduler" / "1", hosted.repository / "engine" / "1"
    assert read_manifest(ours) == read_manifest(theirs)
    verify_files(result.manifest, ours)
    assert build(checkpoint, published, engine=EnginePlacement.IN_PROCESS).was_up_to_date


def test_an_engine_that_computes_something_else_is_not_published(
    built: tuple[Path, BuildResult], published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export_with_a_slip(decoder: Decoder, *arguments: Any) -> None:
        weight = decoder.layers[0].self_attn.o_proj.weight  # type: ignore[union-attr]
        weight[0, 0] += 0.05  # type: ignore[index, operator]
        export_onnx(decoder, *arguments)
        weight[0, 0] -= 0.05  # type: ignore[index, operator]

    export_onnx = export.export_onnx
    monkeypatch.setattr(export, "export_onnx", export_with_a_slip)
    before = _contents(published)
    with pytest.raises(NumericsGateError, match=r"max \|delta logit\|"):
        build(built[0], published, force=True)
    assert _contents(published) == before
    assert list(published.parent.iterdir()) == [published]


def test_a_build_killed_half_way_leaves_the_old_repository(
    built: tuple[Path, BuildResult], published: Path
) -> None:
    before = _contents(published)
    program = (
        "import os, signal, sys; from pathlib import Path; from quire_build.pipeline import build\n"
        "def progress(line):\n"
        "    if line.startswith('exporting'): os.kill(os.getpid(), signal.SIGKILL)\n"
        "build(Path(sys.argv[1]), Path(sys.argv[2]), frontends=3, progress=progress)\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(built[0]), str(published)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert _contents(published) == before
    assert build(built[0], published).was_up_to_date
    assert len(list(published.parent.iterdir())) == 2
    assert not build(built[0], published, force=True).was_up_to_date
    assert _contents(published) == before
    assert list(published.parent.iterdir()) == [published]


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_weights(directory: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _shard(directory: Path) -> None:
    """Two shards and their index."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    files = {name: f"part-{int('mlp' in name)}.safetensors" for name in weights}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, directory / file)
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))


def _lose_shard(directory: Path) -> None:
    _shard(directory)
    (directory / "part-1.safetensors").unlink()


def _truncate_shard(directory: Path) -> None:
    _shard(directory)
    _truncate(directory / "part-1.safetensors")


def _misplace_tensor(directory: Path) -> None:
    _shard(directory)
    files = json.loads((directory / INDEX).read_text())["weight_map"]
    files["model.norm.weight"] = "part-1.safetensors"
    (directory / INDEX).write_text(json.dumps({"weight_map": files}))


UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "error", "named"),
    [
        (lambda d: (d / WEIGHTS).unlink(), CheckpointError, WEIGHTS),
        (lambda d: _truncate(d / WEIGHTS), CheckpointError, WEIGHTS),
        (_lose_shard, CheckpointError, "part-1.safetensors"),
        (_truncate_shard, CheckpointError, "part-1.safetensors"),
        (_misplace_tensor, CheckpointError, "model.norm.weight"),
        (lambda d: _edit_weights(d, lambda w: w.pop(UP)), CheckpointError, UP),
        (lambda d: _edit_weights(d, lambda w: w.update({UP: w[UP][:5]})), CheckpointError, UP),
        (
            lambda d: _edit_weights(d, lambda w: w.update({UP: w[UP].astype(np.int8)})),
            UnsupportedModelError,
            UP,
        ),
        (lambda d: (d / "config.json").unlink(), CheckpointError, "no Hugging Face checkpoint.*config.json"),
        (lambda d: (d / "config.json").write_text("{"), CheckpointError, "config.json"),
        (lambda d: (d / "generation_config.json").write_text("[]"), CheckpointError, "generation_config"),
        (lambda d: (d / "tokenizer.json").unlink(), CheckpointError, "tokenizer.json"),
        (lambda d: _truncate(d / "tokenizer.json"), CheckpointError, "tokenizer.json"),
        (
            lambda d: _edit_json(d / "config.json", architectures=["MambaForCausalLM"]),
            UnsupportedModelError,
            "MambaForCausalLM",
        ),
        (shutil.rmtree, CheckpointError, "checkpoint is not a directory"),
    ],
)
def test_an_unsound_checkpoint_is_refused_by_name_and_nothing_is_left(
    checkpoint: Path, damage: Callable[[Path], object], error: type[BuildError], named: str
) -> None:
    damage(checkpoint)
    output = checkpoint.parent / "repository"
    with pytest.raises(error, match=named):
        build(checkpoint, output)
    assert [path for path in checkpoint.parent.iterdir() if path != checkpoint] == []


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("max_model_len", 129),
        ("max_model_len", 1),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", 255),
        ("frontends", 0),
        ("precision", "fp8"),
        ("kv_cache_dtype", "fp8"),
        ("kv_cache_dtype", "int4"),
        ("runtime", "onnx"),
        ("gpu_memory_utilization", 100),
        ("gate_text", Path("/no/such/text")),
    ],
)
def test_a_limit_that_cannot_be_is_refused_by_name(checkpoint: Path, limit: str, value: object) -> None:
    arguments: dict[str, Any] = {limit: value}
    with pytest.raises(BuildError, match=limit):
        build(checkpoint, checkpoint.parent / "repository", **arguments)
