from __future__ import annotations

import json
from pathlib import Path

import pytest

from quire.errors import ManifestError
from quire.execution.manifest import (
    MANIFEST_VERSION,
    EngineLimits,
    GateReport,
    Manifest,
    ModelDimensions,
    file_digest,
    read_manifest,
    verify_files,
    write_manifest,
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Written to tmp_path, with one engine file."""
    (tmp_path / "model.onnx").write_bytes(b"graph")
    manifest = Manifest(
        version=MANIFEST_VERSION,
        model=ModelDimensions("LlamaForCausalLM", 100, 2, 4, 2, 16, sliding_window=None),
        block_size=32,
        limits=EngineLimits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128),
        precision="float32",
        kv_cache_dtype="float32",
        runtime="openvino",
        runtime_version="1.2.3",
        inputs=("input_ids",),
        outputs=("logits",),
        kv_bytes_per_block=4096,
        checkpoint_digest="ab",
        files={"model.onnx": file_digest(tmp_path / "model.onnx")},
        gate=GateReport(10, True, 6, 1e-5, 1e-6, 1e-7, 1e-9, 0.9, 1.0, ("top1_agreement",)),
    )
    write_manifest(manifest, tmp_path)
    return manifest


def test_a_manifest_reads_as_it_was_written_and_its_files_hold(manifest: Manifest, tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == manifest
    verify_files(manifest, tmp_path)


def test_a_digest_is_of_every_byte_and_of_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quire.execution.manifest.DIGEST_PIECE_BYTES", 8)
    contents = [b"", b"\0", b"12345678", b"1234567812345678", b"1234567912345678", b"1234567812345679"]
    path, digests = tmp_path / "file", set()
    for content in contents:
        path.write_bytes(content)
        assert file_digest(path) == file_digest(path)
        digests.add(file_digest(path))
    assert len(digests) == len(contents)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"cannot read .*engine\.json.*quire build"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{", b"null", b'{"version": 1}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "engine.json").write_bytes(content)
    with pytest.raises(ManifestError, match=r"engine\.json is damaged.*quire build"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("unknown_field",), 1),
        (("block_size",), 0),
        (("block_size",), "32"),
        (("precision",), "float12"),
        (("kv_cache_dtype",), "int8"),
        (("runtime",), "abacus"),
        (("model", "num_layers"), -1),
        (("limits", "max_model_len"), 1.5),
        (("files",), ["model.onnx"]),
    ],
)
def test_a_field_that_does_not_make_sense_is_refused(
    manifest: Manifest, tmp_path: Path, path: tuple[str, ...], value: object
) -> None:
    document = json.loads((tmp_path / "engine.json").read_text())
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    (tmp_path / "engine.json").write_text(json.dumps(document))
    with pytest.raises(ManifestError, match="is damaged"):
        read_manifest(tmp_path)


def test_a_manifest_of_another_version_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    text = (tmp_path / "engine.json").read_text()
    (tmp_path / "engine.json").write_text(text.replace('"version": 3', '"version": 99'))
    with pytest.raises(ManifestError, match="has version 99, this Quire reads version 3"):
        read_manifest(tmp_path)


def test_a_manifest_from_before_the_pool_had_a_type_of_its_own_is_refused_with_the_remedy(
    manifest: Manifest, tmp_path: Path
) -> None:
    document = json.loads((tmp_path / "engine.json").read_text())
    del document["kv_cache_dtype"]
    (tmp_path / "engine.json").write_text(json.dumps(document | {"version": 2}))
    with pytest.raises(ManifestError, match=r"of another version .*kv_cache_dtype.*again with `quire build`"):
        read_manifest(tmp_path)


def test_missing_and_changed_files_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"Graph")
    with pytest.raises(ManifestError, match=r"model\.onnx has changed"):
        verify_files(manifest, tmp_path)
    (tmp_path / "model.onnx").unlink()
    with pytest.raises(ManifestError, match=r"model\.onnx is missing"):
        verify_files(manifest, tmp_path)
