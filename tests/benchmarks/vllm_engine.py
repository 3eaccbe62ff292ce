"""vLLM's own engine under the loops of `engine_workload`: the peer that `engine.py` starts.

    python vllm_engine.py CHECKPOINT MAX_MODEL_LEN MAX_NUM_SEQS MAX_NUM_BATCHED_TOKENS KV_CACHE_GIB

Runs in a Python that can import vllm's CPU build (0.32.0 is what Quire is compared with). Engine and
scheduler stay in one process, as Quire's do, and nothing is detokenised.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import engine_workload as workload
import peer


class VllmContender:
    """vLLM with its defaults, but float32 and the limits that Quire's engine has."""

    def __init__(
        self, checkpoint: str, max_model_len: int, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=checkpoint,
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=True,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int) -> int:
        from vllm import SamplingParams, TokensPrompt

        parameters = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts], parameters, use_tqdm=False
        )
        return sum(len(output.outputs[0].token_ids) for output in outputs)


def main() -> None:
    checkpoint, *limits, kv_cache_gib = sys.argv[1:]
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = kv_cache_gib
    import vllm

    peer.answer(workload, lambda: VllmContender(checkpoint, *map(int, limits)), {"vllm": vllm.__version__})


if __name__ == "__main__":
    main()
