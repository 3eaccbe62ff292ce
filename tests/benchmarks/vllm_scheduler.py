"""vLLM's own V1 scheduler under the loops of `scheduler_workload`: the peer that `scheduler.py` starts.

Runs in a Python that can import vllm (0.33.0 is what Quire is compared with), reads one measurement a line
as JSON from standard input and answers each with one line of JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
warnings.filterwarnings("ignore")

import peer  # noqa: E402
import scheduler_workload as workload  # noqa: E402
import torch  # noqa: E402
import vllm  # noqa: E402
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig  # noqa: E402
from vllm.sampling_params import SamplingParams  # noqa: E402
from vllm.utils.hashing import sha256  # noqa: E402
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash  # noqa: E402
from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.core.sched.scheduler import Scheduler  # noqa: E402
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec  # noqa: E402
from vllm.v1.outputs import ModelRunnerOutput  # noqa: E402
from vllm.v1.request import Request, RequestStatus  # noqa: E402
from vllm.v1.structured_output import StructuredOutputManager  # noqa: E402

MAX_MODEL_LEN = 16384
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": MAX_MODEL_LEN,
    "dtype": "float32",
}


class VllmContender:
    """vLLM's scheduler with its defaults, in the way its engine core drives it."""

    def __init__(self, model: Path) -> None:
        self._model = model
        self._hash_blocks = get_request_block_hasher(workload.BLOCK_SIZE, sha256)
        init_none_hash(sha256)

    def start(
        self, *, num_blocks: int, max_num_seqs: int, max_num_batched_tokens: int, async_scheduling: bool
    ) -> None:
        config = VllmConfig(
            model_config=ModelConfig(
                model=str(self._model), skip_tokenizer_init=True, dtype="float32", max_model_len=MAX_MODEL_LEN
            ),
            scheduler_config=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                max_model_len=MAX_MODEL_LEN,
                enable_chunked_prefill=True,
                async_scheduling=async_scheduling,
                is_encoder_decoder=False,
            ),
            cache_config=CacheConfig(block_size=workload.BLOCK_SIZE, enable_prefix_caching=True),
            device_config=DeviceConfig("cpu"),
        )
        config.cache_config.num_gpu_blocks = num_blocks
        layer = FullAttentionSpec(
            block_size=workload.BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        self._scheduler = (AsyncScheduler if async_scheduling else Scheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks,
                kv_cache_tensors=[],
                kv_cache_groups=[KVCacheGroupSpec(["layer"], layer)],
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=workload.BLOCK_SIZE,
            log_stats=False,
        )

    def arrive(self, request_id: str, prompt: list[int], max_tokens: int) -> None:
        self._scheduler.add_request(
            Request(
                request_id=request_id,
                prompt_token_ids=prompt,
                sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True),
                pooling_params=None,
                block_hasher=self._hash_blocks,
            )
        )

    def schedule(self) -> Any:
        return self._scheduler.schedule()

    def sampled(self, step: Any) -> Any:
        request_ids = list(step.num_scheduled_tokens)
        return ModelRunnerOutput(
            req_ids=request_ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(request_ids)},
            sampled_token_ids=[[7] for _ in request_ids],
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )

    def update(self, step: Any, sampled: Any) -> None:
        self._scheduler.update_from_output(step, sampled)

    def abort(self, request_id: str) -> None:
        self._scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL))
        peer.answer(workload, lambda: VllmContender(Path(folder)), vllm.__version__)


if __name__ == "__main__":
    main()
