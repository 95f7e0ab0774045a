"""Run: PYTHONPATH=. python benchmarks/flips.py [--responses 64] [--tokens 16] [--draws 1000] [--models
tiny,flat,smollm2]

How often the batch changes a draw in float32: draws flipped per million, for batches of 8 and 16 against each response
alone, by model, sampler and way to draw. The same tokens are given to the model in every batch size, so that one flip
makes no second one; then for the two rows of logits of a token:

- inverse: the chance that a uniform number falls where the two cumulative sums pick different tokens, computed exactly
- gumbel: the share of `--draws` keys with which `rl_onoff.backends.sampler.pick` picks different tokens

On a newer CPU, ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 stands for an older one.
The tiny model is the tests' own; `flat` is the same with the head of a new model, whose 49,152 tokens are nearly
equally likely.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from rl_onoff.backends import create_backend
from rl_onoff.backends import sampler as sampler_module
from rl_onoff.backends.huggingface import decode
from rl_onoff.backends.token_stats import process_logits
from rl_onoff.models.resolve import resolve
from rl_onoff.types import Sampling, sample_requests
from tests import tiny_model

SAMPLERS = {"plain": Sampling(), "T 0.7, top-k 50, top-p 0.9": Sampling(temperature=0.7, top_k=50, top_p=0.9)}


class Recorded:
    """Stands in for the sampler: keeps the logits of every draw, and draws what the first run drew."""

    def __init__(self) -> None:
        self.tokens: dict[int, int] = {}
        self.logits: dict[int, torch.Tensor] = {}  # by the draw's key, which says whose it is

    def __call__(self, logits_RV, samplings, keys_R, kind):
        fresh, logprobs_R = sampler_module.draw(logits_RV, samplings, keys_R, kind)
        tokens_R = [self.tokens.setdefault(int(key), int(token)) for key, token in zip(keys_R, fresh, strict=True)]
        self.logits |= {int(key): row.clone() for key, row in zip(keys_R, logits_RV, strict=True)}
        return torch.tensor(tokens_R), logprobs_R


def logits_by_batch(model: str, num_responses: int, num_tokens: int, sizes: tuple[int, ...]) -> dict[int, dict]:
    """For every batch size: key -> (V,) logits."""
    rng, found, recorded = np.random.default_rng(0), {}, Recorded()
    requests = [
        sample_requests(id=str(i), prompt_ids=rng.integers(20, 40_000, 4 + i % 9).astype(np.int32),
                sampling=Sampling(max_new_tokens=num_tokens, seed=i))
        for i in range(num_responses)
    ]  # fmt: skip
    for size in sizes:
        options = {"dtype": "float32", "batch_size": size, "device": "cpu"}
        config = {"backend_type": "huggingface", "model_name": model, "backend_specific": options}
        with create_backend(config) as backend, mock.patch.object(decode, "draw", recorded):
            list(backend.complete(requests))
        found[size], recorded.logits = recorded.logits, {}
    return found


def inverse_flips(a_V: torch.Tensor, b_V: torch.Tensor) -> float:
    """The measure of the numbers u in [0, 1) for which the inverse of the two cumulative sums differs."""
    high_2V = torch.stack([a_V, b_V]).softmax(-1, dtype=torch.float64).cumsum(-1)
    high_2V = high_2V / high_2V[:, -1:]
    low_2V = torch.nn.functional.pad(high_2V[:, :-1], (1, 0))
    shared_V = (high_2V.amin(0) - low_2V.amax(0)).clamp(min=0)
    return float((1 - shared_V.sum()).clamp(min=0))


def gumbel_flips(a_V: torch.Tensor, b_V: torch.Tensor, keys_R: torch.Tensor) -> float:
    picked = [sampler_module.pick(z_V[None].softmax(-1, dtype=torch.float64), keys_R) for z_V in (a_V, b_V)]
    return float((picked[0] != picked[1]).double().mean())


def models(folder: Path) -> Iterator[tuple[str, str]]:
    built_in = resolve("smollm2").path
    tiny = tiny_model.make(folder / "tiny", built_in)
    yield "tiny", tiny
    from transformers import AutoModelForCausalLM, AutoTokenizer

    flat = AutoModelForCausalLM.from_pretrained(tiny)
    with torch.no_grad():
        flat.lm_head.weight.div_(20)
    flat.save_pretrained(folder / "flat")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder / "flat")
    yield "flat", str(folder / "flat")
    yield "smollm2", built_in


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, torch runs {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--models", default="tiny,flat,smollm2")
    arguments = parser.parse_args()
    print(f"CPU: {cpu()}\ndraws flipped per million")
    print(
        f"{'model':8} {'sampler':28} {'batch':>5} {'positions':>9} {'largest difference':>18} {'inverse':>9} "
        f"{'gumbel':>9}"
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name, path in models(Path(temporary)):
            if name not in arguments.models.split(","):
                continue
            found = logits_by_batch(path, arguments.responses, arguments.tokens, (1, 8, 16))
            for label, sampling in SAMPLERS.items():
                for size in (8, 16):
                    inverse, gumbel, largest = [], [], 0.0
                    for number, (key, alone_V) in enumerate(found[1].items()):
                        batched_V = found[size][key]
                        largest = max(largest, float((alone_V - batched_V).abs().max()))
                        a_V, b_V = (process_logits(z_V[None].float(), sampling)[0] for z_V in (alone_V, batched_V))
                        inverse.append(inverse_flips(a_V, b_V))
                        noise = np.random.Philox(number).random_raw(arguments.draws).view(np.int64)
                        gumbel.append(gumbel_flips(a_V, b_V, torch.as_tensor(noise)))
                    rates = f"{1e6 * np.mean(inverse):9.2f} {1e6 * np.mean(gumbel):9.2f}"
                    print(f"{name:8} {label:28} {size:5} {len(inverse):9} {largest:18.1e} {rates}", flush=True)
