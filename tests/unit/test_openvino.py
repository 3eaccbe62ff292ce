from __future__ import annotations

import contextlib
import functools
import logging
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openvino
import pytest
from tests.unit.tiny_engine import KV_BYTES_PER_BLOCK, LIMITS, VOCAB_SIZE, reference_logits, write_engine

from quire.engine_core import EngineCore
from quire.errors import EngineStepError, ManifestError, SettingsError, StartupError
from quire.execution import openvino_attention
from quire.execution.manifest import write_manifest
from quire.execution.model_inputs import ModelInputs
from quire.execution.openvino import OpenVINOEngine, OpenVINOExecutor
from quire.execution.sampler import Sampler
from quire.scheduling.request import Request
from quire.scheduling.sampling_params import SamplingParams
from quire.scheduling.scheduler import Scheduler, SchedulerConfig

NUM_BLOCKS = 24


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("engine")
    write_engine(directory)
    return directory


@pytest.fixture(scope="module")
def engine(engine_dir: Path) -> OpenVINOEngine:
    return load(engine_dir)


def load(engine_dir: Path, *, num_blocks: int = NUM_BLOCKS) -> OpenVINOEngine:
    return OpenVINOEngine(engine_dir, kv_cache_bytes=num_blocks * KV_BYTES_PER_BLOCK, threads=1, warm_up_s=0)


SIGNALLED = """
import gc, pathlib, signal, sys
from quire.execution.openvino import OpenVINOEngine
directory, kv_cache_bytes = pathlib.Path(sys.argv[1]), int(sys.argv[2])
first, second = (
    OpenVINOEngine(directory, kv_cache_bytes=kv_cache_bytes, threads=1, warm_up_s=0) for _ in range(2)
)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("heard"))
signal.raise_signal(signal.SIGINT)
"""


def test_a_process_hears_signals_after_engines_have_come_and_gone(engine_dir: Path) -> None:
    words = [sys.executable, "-c", SIGNALLED, str(engine_dir), str(NUM_BLOCKS * KV_BYTES_PER_BLOCK)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def step(spans: list[tuple[list[int], int]], tables: list[list[int]]) -> ModelInputs:
    """One step: of each sequence all tokens so far, those computed before, and its block table."""
    starts = np.cumsum([0] + [len(tokens) - computed for tokens, computed in spans])
    positions = np.concatenate([np.arange(computed, len(tokens)) for tokens, computed in spans])
    width = max(map(len, tables))
    padded = np.array([table + [0] * (width - len(table)) for table in tables], np.int32)
    sequence = np.repeat(np.arange(len(spans)), np.diff(starts))
    return ModelInputs(
        step=1,
        input_ids=np.concatenate([tokens[computed:] for tokens, computed in spans]).astype(np.int32),
        positions=positions.astype(np.int32),
        slot_mapping=(padded[sequence, positions // 32] * 32 + positions % 32).astype(np.int32),
        block_tables=padded,
        query_start_loc=starts.astype(np.int32),
        seq_lens=np.array([len(tokens) for tokens, _ in spans], np.int32),
        logits_indices=np.arange(starts[-1], dtype=np.int32),
    )


def random_tokens(length: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).tolist()
    return tokens


@pytest.mark.parametrize("sliding_window", [None, 5, 32, 40])
def test_chunked_prompts_beside_decoding_sequences_give_the_logits_of_whole_sequences(
    tmp_path: Path, sliding_window: int | None
) -> None:
    write_engine(tmp_path, sliding_window=sliding_window)
    engine = load(tmp_path)
    first, second = random_tokens(70, 1), random_tokens(40, 2)
    tables = [[7, 3, 11], [20, 5]]
    expected = [reference_logits(tokens, sliding_window) for tokens in (first, second)]
    for lengths, computed in (((30, 34), (0, 0)), ((69, 35), (30, 34)), ((70, 40), (69, 35))):
        spans = [(first[: lengths[0]], computed[0]), (second[: lengths[1]], computed[1])]
        logits = engine.run(step(spans, tables))
        wanted = [rows[begin:end] for rows, begin, end in zip(expected, computed, lengths, strict=True)]
        assert np.abs(logits - np.concatenate(wanted)).max() < 1e-4


def test_a_bf16_engine_computes_in_bf16_or_says_that_the_cpu_cannot(tmp_path: Path) -> None:
    write_engine(tmp_path, precision="bf16")
    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(ManifestError, match="--precision float32"):
            load(tmp_path)
        return
    engine = load(tmp_path, num_blocks=12)
    assert engine.pool_info.num_blocks == 24
    tokens = random_tokens(50, 4)
    error = np.abs(engine.run(step([(tokens, 0)], [[3, 1]])) - reference_logits(tokens)).max()
    assert 1e-4 < error < 0.2


def test_a_step_that_wants_no_logits_returns_none_and_still_fills_the_cache(engine: OpenVINOEngine) -> None:
    tokens = random_tokens(33, 3)
    filling = step([(tokens[:32], 0)], [[4, 9]])
    filling.logits_indices = np.zeros(0, np.int32)
    assert engine.run(filling).shape == (0, VOCAB_SIZE)
    logits = engine.run(step([(tokens, 32)], [[4, 9]]))
    assert np.abs(logits[0] - reference_logits(tokens)[-1]).max() < 1e-4


def test_the_pool_takes_the_bytes_it_is_given_and_its_epoch_is_new_with_each_engine(engine_dir: Path) -> None:
    first, second = load(engine_dir, num_blocks=10), load(engine_dir, num_blocks=10)
    assert first.pool_info.num_blocks == 10
    assert first.pool_info.epoch != second.pool_info.epoch


def test_a_pool_that_cannot_hold_one_request_is_refused(engine_dir: Path) -> None:
    with pytest.raises(SettingsError, match=r"kv_cache_bytes is \d+.*max_model_len 160"):
        load(engine_dir, num_blocks=5)


def test_lower_limits_need_a_smaller_pool(engine_dir: Path) -> None:
    limits = msgspec.structs.replace(LIMITS, max_model_len=64)
    engine = OpenVINOEngine(
        engine_dir, kv_cache_bytes=3 * KV_BYTES_PER_BLOCK, threads=1, limits=limits, warm_up_s=0
    )
    assert engine.pool_info.num_blocks == 3


def test_common_shapes_are_warmed_up_and_the_log_says_so(
    engine_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        OpenVINOEngine(engine_dir, kv_cache_bytes=10 * KV_BYTES_PER_BLOCK, threads=1, warm_up_s=60)
    assert re.search(r"warmed up 11 shapes", caplog.text)  # 1, 2, 4, …, 64 tokens, and 3, 5, 6, 7 sequences
    assert "9 blocks, 288 tokens" in caplog.text


BROKEN_STEPS: dict[str, dict[str, Any]] = {
    "block_tables contains 24; it must be 0 to 23": {"block_tables": [[7, 24]]},
    "block_tables contains -1": {"block_tables": [[-1, 7]]},
    "input_ids contains 96; it must be 0 to 95": {"input_ids": [1, 96, 3]},
    "input_ids contains -1": {"input_ids": [1, -1, 3]},
    "seq_lens contains 65; it must be 1 to 64": {"seq_lens": [65]},
    "seq_lens less the step's tokens contains -1": {"seq_lens": [2]},
    "positions has 5 for token 1; .* it must be 1": {"positions": [0, 5, 2]},
    "slot_mapping has 9 for token 0; .* it must be 224": {"slot_mapping": [9, 225, 226]},
    "query_start_loc goes from 0 to 4": {"query_start_loc": [0, 4]},
    "tokens per sequence in query_start_loc contains 0": {
        "query_start_loc": [0, 0, 3],
        "seq_lens": [1, 3],
        "block_tables": [[7], [8]],
    },
    "logits_indices contains 3; it must be 0 to 2": {"logits_indices": [3]},
    r"positions has shape \[2\]; it must have shape \[3\]": {"positions": [0, 1]},
    r"block_tables has shape \[2, 1\]": {"block_tables": [[7], [7]]},
    "input_ids has 0 tokens": {"input_ids": []},
    "input_ids has 65 tokens; it must have 1 to 64": {"input_ids": [0] * 65},
    "seq_lens has 9 sequences; it must have 1 to 8": {"seq_lens": [1] * 9},
}


@pytest.mark.parametrize("message", BROKEN_STEPS)
def test_a_step_that_breaks_the_contract_is_refused_and_the_engine_goes_on(
    engine: OpenVINOEngine, message: str
) -> None:
    tokens = [1, 2, 3]
    changes: dict[str, Any] = {
        name: np.array(value, np.int32) for name, value in BROKEN_STEPS[message].items()
    }
    with pytest.raises(EngineStepError, match=message):
        engine.run(replace(step([(tokens, 0)], [[7, 8]]), **changes))
    logits = engine.run(step([(tokens, 0)], [[7, 8]]))
    assert np.abs(logits - reference_logits(tokens)).max() < 1e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [("runtime", "torch"), ("runtime_version", "2025.1.0"), ("block_size", 16), ("inputs", ("input_ids",))],
)
def test_an_engine_built_for_something_else_is_refused(tmp_path: Path, field: str, value: object) -> None:
    manifest = write_engine(tmp_path)
    write_manifest(msgspec.structs.replace(manifest, **{field: value}), tmp_path)
    with pytest.raises(ManifestError, match=f"has {field} .*quire build"):
        load(tmp_path)


def test_a_changed_graph_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path)
    with (tmp_path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ManifestError, match=r"model\.onnx has changed"):
        load(tmp_path)


def test_a_manifest_that_contradicts_the_graph_is_refused(tmp_path: Path) -> None:
    manifest = write_engine(tmp_path)
    model = msgspec.structs.replace(manifest.model, num_layers=2)
    write_manifest(msgspec.structs.replace(manifest, model=model), tmp_path)
    with pytest.raises(ManifestError, match="inputs"):
        load(tmp_path)
    write_manifest(msgspec.structs.replace(manifest, kv_bytes_per_block=KV_BYTES_PER_BLOCK // 2), tmp_path)
    with pytest.raises(ManifestError, match="kv_bytes_per_block"):
        load(tmp_path)


def test_another_openvino_is_refused(engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_attention, "installed_version", lambda: "2027.0.0")
    with pytest.raises(StartupError, match=r"OpenVINO 2027\.0\.0 is installed.*pip install openvino==2026"):
        load(engine_dir)


def test_an_openvino_that_computes_something_else_is_refused(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = openvino_attention.paged_attention

    def wrong(*arguments: object, scale: float, **others: object) -> object:
        return right(*arguments, scale=scale * 1.01, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(openvino_attention, "paged_attention", wrong)
    with pytest.raises(StartupError, match="computes paged attention wrongly"):
        load(engine_dir)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("num_blocks", "preempts"), [(40, False), (9, True)])
def test_greedy_tokens_are_those_of_each_prompt_alone(
    engine_dir: Path, overlap: bool, num_blocks: int, preempts: bool
) -> None:
    """Batched, prefilled in chunks, sharing a prefix and, in a small pool, preempted and computed anew."""
    shared = random_tokens(64, 10)
    prompts = [[5], random_tokens(40, 11), [*shared, 1, 2], [*shared, 3], random_tokens(90, 12)]
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=32,
        max_num_batched_tokens=LIMITS.max_num_batched_tokens,
        max_num_seqs=LIMITS.max_num_seqs,
        max_model_len=LIMITS.max_model_len,
        async_scheduling=overlap,
    )
    executor = OpenVINOExecutor(load(engine_dir, num_blocks=num_blocks))
    core = EngineCore(Scheduler(config), executor, Sampler(), step_timeout_s=60)
    for index, prompt in enumerate(prompts):
        core.add_request(Request(str(index), prompt, SamplingParams(max_tokens=64, temperature=0.0)))
    tokens: list[list[int]] = [[] for _ in prompts]
    while core.has_work:
        for output in core.step().outputs:
            tokens[int(output.request.request_id)].append(output.token_id)
    assert (core.scheduler.statistics.num_preemptions > 0) == preempts
    assert tokens == [greedy_reference(tuple(prompt), 64) for prompt in prompts]


class SlowRequest:
    """OpenVINO's side of a step that does not end by itself."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def set_tensor(self, name: str, tensor: object) -> None: ...

    def start_async(self) -> None: ...

    def wait_for(self, timeout_ms: int) -> bool:
        if self._cancelled.wait(timeout_ms / 1000):
            raise RuntimeError("Infer Request was canceled")
        return False

    def cancel(self) -> None:
        self._cancelled.set()


def test_closing_the_executor_ends_the_step_under_way(
    engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(engine_dir)
    executor = OpenVINOExecutor(engine)
    monkeypatch.setattr(engine, "_request", SlowRequest())
    under_way = executor.submit(step([([1, 2, 3], 0)], [[1]]))
    executor.close()
    with pytest.raises(EngineStepError, match="canceled"):
        under_way.result(60)


def test_an_engine_whose_step_was_interrupted_computes_the_next(engine_dir: Path) -> None:
    engine = load(engine_dir)
    inputs = step([([1, 2, 3], 0)], [[1]])
    expected = engine.run(inputs).copy()
    engine.start(inputs)
    engine.cancel()
    with contextlib.suppress(EngineStepError):
        engine.wait()
    np.testing.assert_array_equal(engine.run(inputs), expected)


@functools.cache
def greedy_reference(prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    """By numpy, with a margin that no rounding of the engine makes up for."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        logits = reference_logits(tokens)[-1]
        second, best = np.sort(logits)[-2:]
        assert best - second > 2e-4
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
