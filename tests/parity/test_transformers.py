"""The torch module and the CPU engine compute what `transformers` computes, on random weights.

Six sequences share steps: prompts in chunks beside decoding sequences, shuffled block tables. Every logit of
every position and every greedy token is held against one plain pass of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers

from quire.execution.executor import Executor
from quire.execution.openvino import OpenVINOEngine, OpenVINOExecutor
from quire_build.checkpoint import Checkpoint, load_decoder
from quire_build.pipeline import build
from quire_build.torch_executor import TorchExecutor
from quire_build.workload import Workload

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "quire-small"
VOCAB_SIZE = 512
DIMENSIONS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CLOSE_CALL = 2e-4
"""Where the reference's two best logits are closer than this, either token is right."""


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)


def _rope(rope_type: str, **options: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **options}}


LLAMA = Case("llama", "Llama")
LLAMA3_ROPE = Case(
    "llama with llama3 rope",
    "Llama",
    _rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
)
LINEAR_ROPE = Case("llama with linear rope", "Llama", _rope("linear"))
YARN_ROPE = Case("llama with yarn rope", "Llama", _rope("yarn", original_max_position_embeddings=64))
YARN_MSCALE = Case(
    "llama with yarn rope and mscale",
    "Llama",
    _rope(
        "yarn",
        original_max_position_embeddings=64,
        mscale=0.7,
        mscale_all_dim=0.3,
        beta_fast=16.0,
        beta_slow=2.0,
        truncate=False,
    ),
)
BIASED_LLAMA = Case("llama with biases", "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24})
QWEN2 = Case("qwen2", "Qwen2")
QWEN2_WINDOW = Case(
    "qwen2 with a window in some layers",
    "Qwen2",
    {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
)
QWEN3 = Case("qwen3, tied", "Qwen3", {"head_dim": 32, "tie_word_embeddings": True})
MISTRAL = Case("mistral without window", "Mistral", {"sliding_window": None})
MISTRAL_WINDOW = Case("mistral with a window of 40", "Mistral", {"sliding_window": 40})
MISTRAL_SHORT_WINDOW = Case("mistral with a window below a chunk", "Mistral", {"sliding_window": 7})

CASES = (
    LLAMA,
    LLAMA3_ROPE,
    LINEAR_ROPE,
    YARN_ROPE,
    YARN_MSCALE,
    BIASED_LLAMA,
    QWEN2,
    QWEN2_WINDOW,
    QWEN3,
    MISTRAL,
    MISTRAL_WINDOW,
    MISTRAL_SHORT_WINDOW,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    """Models this small only lose by more threads, most of all on a busy machine."""
    torch.set_num_threads(1)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_interleaved_sequences_get_the_logits_and_tokens_of_transformers(
    case: Case, block_size: int, tmp_path: Path
) -> None:
    model = save_random_model(case, tmp_path)
    workload = interleaved_workload(block_size)
    check_against(model, _executor(tmp_path, workload, block_size), workload)


@pytest.mark.parametrize(
    "case",
    [LLAMA, YARN_ROPE, BIASED_LLAMA, QWEN2_WINDOW, QWEN3, MISTRAL_WINDOW, MISTRAL_SHORT_WINDOW],
    ids=lambda case: case.name,
)
def test_the_cpu_engine_gets_the_logits_and_tokens_of_transformers(case: Case, tmp_path: Path) -> None:
    model = save_random_model(case, tmp_path / "checkpoint")
    build(tmp_path / "checkpoint", tmp_path / "repository")
    workload = interleaved_workload(block_size=32)
    engine = OpenVINOEngine(tmp_path / "repository" / "engine" / "1", kv_cache_bytes=1 << 26, warm_up_s=0.0)
    assert engine.pool_info.num_blocks >= workload.num_blocks
    check_against(model, OpenVINOExecutor(engine), workload)


def test_the_shipped_checkpoint_continues_text_as_transformers_does(tmp_path: Path) -> None:
    build(SHIPPED, tmp_path / "repository")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in ("The cat", "Once upon a time", "A", "Question: What")]
    workload = Workload(
        prompts, num_new_tokens=64, block_size=32, max_num_seqs=3, max_num_batched_tokens=64, chunk=2
    )
    engine = OpenVINOEngine(tmp_path / "repository" / "engine" / "1", kv_cache_bytes=1 << 27, warm_up_s=0.0)
    check_against(model, OpenVINOExecutor(engine), workload)


def test_one_sequence_alone_gets_the_tokens_that_transformers_generates(tmp_path: Path) -> None:
    model = save_random_model(LLAMA, tmp_path)
    prompt = np.random.default_rng(3).integers(512, size=40).tolist()
    workload = Workload(
        [prompt], num_new_tokens=64, block_size=32, max_num_seqs=1, max_num_batched_tokens=64, chunk=64
    )
    executor = _executor(tmp_path, workload, 32)
    while (inputs := workload.next_step()) is not None:
        logits = executor.submit(inputs).result(60.0).logits
        assert logits is not None
        workload.advance(logits)
    expected = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=64, min_new_tokens=64, eos_token_id=None
    )
    assert workload.sequences[0].token_ids == expected[0].tolist()


def test_a_sharded_bf16_checkpoint_loads_as_the_same_model_in_float32(tmp_path: Path) -> None:
    save_random_model(LLAMA, tmp_path / "bf16").to(torch.bfloat16).save_pretrained(
        tmp_path / "sharded", max_shard_size="100KB"
    )
    (tmp_path / "bf16" / "tokenizer.json").rename(tmp_path / "sharded" / "tokenizer.json")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "sharded", dtype=torch.float32)
    workload = interleaved_workload(32, num_new_tokens=4)
    check_against(model, _executor(tmp_path / "sharded", workload, 32), workload)


def save_random_model(case: Case, directory: Path) -> Any:
    """A model in which attention, norms and biases all matter, saved with a tokenizer."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{case.family}Config")(**{**DIMENSIONS, **case.options})
    model = getattr(transformers, f"{case.family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.uniform_(parameter, 0.7, 1.3)
    model.save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: number for number, symbol in enumerate(alphabet)}, []))
    tokenizer.save(str(directory / "tokenizer.json"))
    return model


def interleaved_workload(block_size: int, num_new_tokens: int = 64) -> Workload:
    """Six sequences that arrive one after the other and share steps, in chunks and shuffled blocks."""
    random = np.random.default_rng(1)
    prompts = [random.integers(VOCAB_SIZE, size=length).tolist() for length in (5, 70, 33, 128, 1, 64)]
    return Workload(
        prompts,
        num_new_tokens=num_new_tokens,
        block_size=block_size,
        max_num_seqs=8,
        max_num_batched_tokens=256,
    )


def check_against(model: Any, executor: Executor, workload: Workload) -> None:
    """Run the workload greedily and hold every logit and every token against one pass of `model`."""
    rows: dict[int, list[NDArray[np.float32]]] = {id(sequence): [] for sequence in workload.sequences}
    steps_mixed = 0
    while (inputs := workload.next_step()) is not None:
        logits = executor.submit(inputs).result(60.0).logits
        assert logits is not None
        first = 0
        for sequence, num_tokens in workload.scheduled:
            rows[id(sequence)].extend(np.array(logits[first : first + num_tokens]))
            first += num_tokens
        steps_mixed += len({num_tokens == 1 for _, num_tokens in workload.scheduled}) == 2
        workload.advance(logits)
    assert len(workload.sequences) == 1 or steps_mixed > 0
    for sequence in workload.sequences:
        with torch.no_grad():
            expected = model(torch.tensor([sequence.token_ids[:-1]])).logits[0].numpy()
        np.testing.assert_allclose(np.stack(rows[id(sequence)]), expected, rtol=0, atol=1e-4)
        _check_greedy(expected[sequence.num_prompt_tokens - 1 :], sequence.generated)


def _check_greedy(expected: NDArray[np.float32], generated: list[int]) -> None:
    """Each generated token is the best of `expected` [len(generated), vocab_size], close calls aside."""
    assert len(expected) == len(generated)
    best = expected.max(-1)
    chosen = expected[np.arange(len(generated)), generated]
    second_best = np.partition(expected, -2, axis=-1)[:, -2]
    assert np.all((chosen == best) | ((chosen >= second_best) & (best - second_best < CLOSE_CALL)))


def _executor(directory: Path, workload: Workload, block_size: int) -> TorchExecutor:
    checkpoint = Checkpoint.open(directory)
    return TorchExecutor(load_decoder(checkpoint, 512), checkpoint.config, workload.num_blocks, block_size)
