"""Scoring with HuggingFace: time and peak memory against the naive way, which holds (batch, length, vocabulary) logits.

    .venv/bin/python benchmarks/hf_score.py [MODEL] [BATCH]

Each way runs in a process of its own; the peak is that of the process above its weights.
"""

from __future__ import annotations

import json
import subprocess
import sys

WORK = """
import json, sys, time
import numpy as np, torch
from rl_onoff.backends import create_backend
from rl_onoff.types import Rollout, Want
way, model, batch = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = {"dtype": "float32", "batch_size": batch}
backend = create_backend({"backend_type": "huggingface", "model_name": model, "backend_specific": options})
backend.load()
rng = np.random.default_rng(0)
ids = lambda n: rng.integers(5, backend.info.vocab_size - 5, n).astype(np.int32)
if way == "shared":
    prompts = [ids(256) for _ in range(2)]
else:
    prompts = [ids(256) for _ in range(batch)]
rollouts = [
    Rollout(request_id=str(i), sample=0, prompt_ids=prompts[i % len(prompts)], token_ids_T=ids(64))
    for i in range(batch)
]
whole, device = backend._split.whole, backend._split.device

def naive():
    sequences = np.stack([np.concatenate([r.prompt_ids, r.token_ids_T]) for r in rollouts])
    inputs = torch.as_tensor(sequences.astype(np.int64), device=device)
    with torch.no_grad():
        logprobs = whole(inputs, use_cache=False).logits.float().log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        chosen = logprobs[:, :-1].gather(-1, inputs[:, 1:, None])
        return chosen, entropy, logprobs.topk(5, -1)

run = naive if way == "naive" else lambda: list(backend.score(rollouts, Want(top_k=5)))
with torch.no_grad():
    whole(torch.as_tensor(rollouts[0].prompt_ids[None].astype(np.int64), device=device))
def peak_kib():  # not ru_maxrss, which a child takes over from whoever started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak_kib()
times = []
for _ in range(3):
    start = time.perf_counter(); run(); times.append(time.perf_counter() - start)
peak = peak_kib() - before
print(json.dumps({"seconds": min(times), "peak_mib": peak / 1024}))
"""


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    batch = sys.argv[2] if len(sys.argv) > 2 else "16"
    results = {}
    for way in ("naive", "ours", "shared"):
        done = subprocess.run(
            [sys.executable, "-c", WORK, way, model, batch], capture_output=True, text=True, check=True
        )
        results[way] = json.loads(done.stdout.splitlines()[-1])
    naive = results["naive"]
    print(f"{'':<42}{'time / naive':>14}{'peak / naive':>14}{'peak MiB':>10}")
    words_of = {
        "naive": "full logits (batch, length, vocabulary)",
        "ours": "ours",
        "shared": "ours, 2 prompts shared by the batch",
    }
    for way, words in words_of.items():
        seconds, peak = results[way]["seconds"], results[way]["peak_mib"]
        print(f"{words:<42}{seconds / naive['seconds']:>14.2f}{peak / naive['peak_mib']:>14.3f}{peak:>10.0f}")


if __name__ == "__main__":
    main()
