"""An engine in a script, as engine_generate.py starts it: with the options that our backend would give it, and without
our code inside it. Answers every line of the standard input, [prompts, sampling arguments], with [seconds, token ids].
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from rl_onoff.backends import EngineConfig, SGLangBackendConfig, VLLMBackendConfig

CONFIGS: dict[str, type[EngineConfig]] = {"vllm": VLLMBackendConfig, "sglang": SGLangBackendConfig}
MARK = "answer: "


def main() -> None:
    options = json.loads(sys.argv[1])
    name = options.pop("name")
    generate = {"vllm": vllm, "sglang": sglang}[name](CONFIGS[name](**options))
    print(MARK + "true", flush=True)
    for line in sys.stdin:
        prompts, arguments = json.loads(line)
        began = time.perf_counter()
        tokens = generate(prompts, arguments)
        seconds = time.perf_counter() - began
        print(MARK + json.dumps([seconds, tokens]), flush=True)


def vllm(config: Any) -> Callable[..., list[list[int]]]:
    from vllm import SamplingParams

    from rl_onoff.backends.vllm.engine import Engine

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # vLLM's own default; our worker sets 0
    llm = Engine(config, "raw_logprobs", in_engine=False)._llm

    def generate(prompts: list[list[int]], arguments: list[dict[str, Any]]) -> list[list[int]]:
        params = [SamplingParams(**each) for each in arguments]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def sglang(config: Any) -> Callable[..., list[list[int]]]:
    os.environ.update(config.environment())
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**config.arguments())

    def generate(prompts: list[list[int]], arguments: list[dict[str, Any]]) -> list[list[int]]:
        outputs = engine.generate(input_ids=prompts, sampling_params=arguments, return_logprob=True)
        return [output["output_ids"] for output in outputs]

    return generate


if __name__ == "__main__":
    main()
