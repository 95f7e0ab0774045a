"""From the shell to the first response on disk, beyond what the engine itself needs for its import, load and response.

    .venv/bin/python benchmarks/startup.py [--engines huggingface vllm] [--sglang .venv-sglang/bin/python] [--rounds 3]

Ours is `rl-onoff experiment=generate backend=… data.limit=1`, timed until the row is on disk. Theirs is a script that
imports the engine, loads the model with the same options, and answers the same prompt greedily, timed until it has the
answer. The two take turns, both must give the same token ids, and the difference is in seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from table import row

TOKENS = 4
BARE = {
    "huggingface": """
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(path)
ids = chat(tokenizer)
with torch.no_grad():
    out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids):].tolist()
""",
    "vllm": """
import os
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
import torch
cpu = not torch.cuda.is_available()
if cpu:
    os.environ |= {"TORCH_COMPILE_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    torch.compiler.set_stance("force_eager")
from vllm import LLM, SamplingParams
more = {"block_size": 32, "enable_chunked_prefill": False} if cpu else {}
llm = LLM(path, dtype="float32", enforce_eager=cpu, generation_config="vllm", disable_log_stats=True, **more)
ids = chat(llm.get_tokenizer())
sampling = SamplingParams(temperature=0, max_tokens=tokens)
out = list(llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0].outputs[0].token_ids)
""",
    "sglang": """
import os
import torch
cpu = not torch.cuda.is_available()
more = {"device": "cpu", "disable_cuda_graph": True, "max_total_tokens": 8192} if cpu else {}
if cpu:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
if __name__ == "__main__":
    import sglang
    engine = sglang.Engine(model_path=path, dtype="float32", log_level="error", **more)
    ids = chat(engine.tokenizer_manager.tokenizer)
    out = engine.generate(input_ids=ids, sampling_params={"temperature": 0, "max_new_tokens": tokens})["output_ids"]
""",
}
BEFORE = """
import json, sys, time
path, problem, tokens, answer = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def chat(tokenizer):
    message = [{"role": "user", "content": problem}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
"""
AFTER = """
    now = time.time()
    open(answer, "w").write(json.dumps([now, ids, out]))
    if "engine" in globals():
        engine.shutdown()
"""


def theirs(engine: str, python: str, path: str, problem: str, folder: Path) -> tuple[float, list[int], list[int]]:
    """Seconds from the shell to the script's answer, the prompt's ids and the answer's."""
    after = AFTER if engine == "sglang" else AFTER.replace("\n    ", "\n")
    script, answer = folder / f"bare_{engine}.py", folder / f"{engine}.json"
    script.write_text(BEFORE + BARE[engine] + after)
    began = time.time()
    run([python, str(script), path, json.dumps(problem), str(TOKENS), str(answer)])
    said, ids, out = json.loads(answer.read_text())
    return said - began, ids, out


def ours(engine: str, python: str, folder: Path) -> tuple[float, dict[str, Any]]:
    """Seconds from the shell to the row on disk, and the row."""
    command = [sys.executable, "-m", "rl_onoff", "experiment=generate", f"backend={engine}", "model.dtype=float32",
               "data.limit=1", "sampling=greedy", f"sampling.max_new_tokens={TOKENS}", "tracking=none",
               f"run_dir={folder / 'run'}"]  # fmt: skip
    began = time.time()
    run(command + ([f"backend.python={python}"] if python != sys.executable else []))
    shard = folder / "run" / "completions" / "part-000000.parquet"
    from rl_onoff.rundir.files import read_shard

    return shard.stat().st_mtime - began, next(read_shard(shard))


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="*", default=["huggingface", "vllm", "sglang"])
    parser.add_argument("--sglang", default=".venv-sglang/bin/python", help="SGLang's interpreter")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    from rl_onoff.config import DataConfig
    from rl_onoff.data.prompts import load_rows
    from rl_onoff.models.resolve import resolve

    path, problem = resolve("smollm2").path, load_rows(DataConfig(limit=1))[0].prompt
    assert isinstance(problem, str)
    for engine in args.engines:
        python = os.path.abspath(args.sglang) if engine == "sglang" else sys.executable
        package = {"huggingface": "transformers"}.get(engine, engine)
        if not (Path(python).exists() if engine == "sglang" else importlib.util.find_spec(package)):
            print(f"{engine} is not installed")
            continue
        alone, beyond = [], []
        for round_ in range(args.rounds + 1):
            with tempfile.TemporaryDirectory() as folder:
                script_s, ids, out = theirs(engine, python, path, problem, Path(folder))
                ours_s, made = ours(engine, python, Path(folder))
            assert made["prompt_ids"].tolist() == ids and made["token_ids"].tolist() == out, (made, ids, out)
            if round_:  # the first reads what is not in the disk's cache
                alone.append(script_s)
                beyond.append(ours_s)
        middle = statistics.median(alone)
        print(f"{engine}: the script alone {middle:.1f} s, through rl-onoff {statistics.median(beyond):.1f} s")
        seconds = [value - middle for value in beyond]
        row(f"shell to first response, {engine}", "the engine alone in a script", seconds, "<= 1.0 s more")


if __name__ == "__main__":
    main()
