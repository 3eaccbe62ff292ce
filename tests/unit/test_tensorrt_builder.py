"""What a hosted plan is left beside weights and pool, and where TensorRT's timings are kept."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quire.errors import BuildError
from quire.execution.manifest import EngineLimits
from quire.interface import EnginePlacement
from quire_build.decoder_config import DecoderConfig
from quire_build.engine_builder import EngineOptions
from quire_build.tensorrt import builder
from quire_build.tensorrt.hosted_memory import activation_bytes, host_reserve_bytes
from quire_build.tensorrt.machine import Gpu
from quire_build.tensorrt.operators import PagedAttend, Sample
from quire_build.tensorrt.operators.assign_splits import num_spare
from quire_build.tensorrt.plan import keep_timing_cache, profile_ranges, set_timing_cache

LIMITS = EngineLimits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=4096)
ELEMENT_BYTES = {"fp32": 4, "i32": 4}


def config(hidden: int, intermediate: int, heads: int, kv_heads: int) -> DecoderConfig:
    return DecoderConfig.from_huggingface(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": 2,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 8192,
            "hidden_act": "silu",
        }
    )


LLAMA_8B = config(4096, 14336, 32, 8)


def num_bytes(outputs: Sequence[tuple[tuple[Any, ...], str]]) -> int:
    return sum(math.prod(shape) * ELEMENT_BYTES.get(kind, 2) for shape, kind in outputs)


@pytest.mark.parametrize("model", [LLAMA_8B, config(8192, 28672, 64, 8)])
def test_one_contexts_memory_holds_what_attention_and_sampling_write(model: DecoderConfig) -> None:
    attend = PagedAttend(
        layer=0,
        num_layers=2,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        block_size=16,
        max_blocks=1000,
        num_pools=5,
        blocks_per_pool=200,
        kv_element_bytes=2,
        window=0,
        scale=0.1,
    )
    tokens, seqs = LIMITS.max_num_batched_tokens, LIMITS.max_num_seqs
    query = (tokens, model.num_heads, model.head_dim)
    attended = attend.outputs(
        [query, (seqs, 256), (seqs + 1,), (seqs,), (num_spare(model.num_kv_heads),), (seqs,), (1,), (1,)]
    )
    sampled = Sample(vocab_size=model.vocab_size, max_num_seqs=seqs).outputs([(seqs, model.vocab_size)])
    streams = 2 * tokens * model.hidden_size * 2
    assert activation_bytes(model, LIMITS, 2) >= num_bytes(attended) + num_bytes(sampled) + streams


def test_every_profile_has_a_context_with_memory_for_the_largest_step() -> None:
    one_profile = EngineLimits(max_num_seqs=16, max_num_batched_tokens=16, max_model_len=4096)
    all_profiles = host_reserve_bytes(LLAMA_8B, LIMITS, 2)
    logits = 4 * 128256
    contexts = len(profile_ranges(LIMITS))
    assert all_profiles - 256 * logits - contexts * activation_bytes(LLAMA_8B, LIMITS, 2) == (
        host_reserve_bytes(LLAMA_8B, one_profile, 2)
        - 16 * logits
        - activation_bytes(LLAMA_8B, one_profile, 2)
    )
    assert 8 << 30 < all_profiles < 10 << 30


def test_the_pool_gets_what_weights_and_reserve_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "this_gpu", lambda: Gpu("an H100", 90, 80 << 30, 227 << 10, 132, 50 << 20))
    options = EngineOptions(
        precision="bf16",
        kv_cache_dtype="bf16",
        limits=LIMITS,
        placement=EnginePlacement.HOSTED,
        gpu_memory_utilization=90,
    )
    build = builder.TensorRTBuilder()
    left = (72 << 30) - host_reserve_bytes(LLAMA_8B, LIMITS, 2)
    assert build._hosted_pool_bytes(options, LLAMA_8B, 16 << 30) == left - (16 << 30)
    with pytest.raises(BuildError, match="nothing is left for the KV pool"):
        build._hosted_pool_bytes(options, LLAMA_8B, left)
    fp8 = msgspec.structs.replace(options, kv_cache_dtype="fp8")
    assert build._hosted_pool_bytes(fp8, LLAMA_8B, 16 << 30) == left - (16 << 30), "activations are as wide"
    in_process = msgspec.structs.replace(options, placement=EnginePlacement.IN_PROCESS)
    assert build._hosted_pool_bytes(in_process, LLAMA_8B, left) == 0


def test_what_was_measured_is_kept_apart_by_kind_of_plan_and_version_of_the_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def names() -> set[str]:
        placements = {builder.timing_cache_file("bf16", placement) for placement in EnginePlacement}
        return {*placements, builder.timing_cache_file("int8", EnginePlacement.IN_PROCESS)}

    before = names()
    assert len(before) == 3
    assert names() == before
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "linear.py").write_text("other tiles")
    monkeypatch.setattr(builder, "__file__", str(tmp_path / "builder.py"))
    assert not names() & before


def test_what_was_measured_is_replaced_as_a_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path, said = tmp_path / "cache" / "quire" / "timing", list[str]()
    for data in (b"first", b"second"):
        keep_timing_cache(path, data, said.append)
        assert [file.name for file in path.parent.iterdir()] == ["timing"]
        assert path.read_bytes() == data
    assert said == []

    def write_half(file: Path, data: bytes) -> int:
        with file.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    keep_timing_cache(path, b"third", said.append)
    assert path.read_bytes() == b"second", "a disk that is full took what there was"
    assert [file.name for file in path.parent.iterdir()] == ["timing"], "a draft was left behind"
    assert len(said) == 1 and "No space left" in said[0] and str(path.parent) in said[0]


def test_a_plan_is_not_lost_where_what_was_measured_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, no folder")
    said: list[str] = []
    keep_timing_cache(tmp_path / "cache" / "timing", b"data", said.append)
    (sentence,) = said
    assert str(tmp_path / "cache") in sentence and "XDG_CACHE_HOME" in sentence

    path = tmp_path / "taken"
    path.mkdir()
    keep_timing_cache(path, b"data", said.append)
    assert len(said) == 2
    assert {file.name for file in tmp_path.iterdir()} == {"cache", "taken"}, "a draft was left behind"


class BuilderConfig:
    """TensorRT's, as far as timing caches go: one made elsewhere is refused, and garbage is none at all."""

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, data: bytes) -> bytes | None:
        return None if data == b"garbage" else data

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if cache == b"another GPU's" and not ignore_mismatch:
            return False
        self.cache = cache
        return True


@pytest.mark.parametrize(
    ("kept", "used"), [(b"ours", b"ours"), (b"another GPU's", b""), (b"garbage", b""), (None, b"")]
)
def test_what_was_measured_is_used_where_it_can_be(kept: bytes | None, used: bytes, tmp_path: Path) -> None:
    path, config = tmp_path / "timing", BuilderConfig()
    if kept is not None:
        path.write_bytes(kept)
    assert set_timing_cache(config, path) == config.cache == used


def test_a_file_that_cannot_be_read_holds_nothing_measured(tmp_path: Path) -> None:
    for path in (tmp_path, None):
        config = BuilderConfig()
        assert set_timing_cache(config, path) == config.cache == b""
