"""Sampling with vLLM and SGLang as users run it, against the engine's own `generate` in a script:

    python benchmarks/engine_generate.py vllm [--rounds 3]
    python benchmarks/engine_generate.py sglang --python .venv-sglang/bin/python

256 responses of up to 128 tokens to prompts of MATH-500 (of the bundled problems where that file is not beside the
project). Our side is the generate step of a run: worker process, run folder, rows on the disk. The other side is one
`generate` call over the same requests, with the same options and sampling arguments, in a process that holds nothing
else; its responses stay objects in memory. Both engines live side by side and work in turns. Before a time is quoted,
both give the same tokens greedily.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine_alone import CONFIGS, MARK
from table import ratios, row
from work import MATH_500

from rl_onoff.backends import BaseBackend, EngineConfig
from rl_onoff.backends.devices import environment_for_python
from rl_onoff.config import DataConfig, RunConfig, Stage
from rl_onoff.data.prompts import load_rows
from rl_onoff.data.requests import encode_rows
from rl_onoff.pipeline.engines import Slot
from rl_onoff.pipeline.stages import Run, missing_requests
from rl_onoff.run import sample
from rl_onoff.rundir.table import RunDir, rollout_of
from rl_onoff.tracking import NoTracker
from rl_onoff.types import Key, SampleRequest, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=CONFIGS)
    parser.add_argument("--python", help="interpreter of the engine's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    # room for all responses side by side, the same on both sides
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    path = str(MATH_500) if MATH_500.exists() else None
    engine = CONFIGS[args.engine](model_name=args.model, dtype=args.dtype, python=args.python)
    data = DataConfig(path=path, limit=args.prompts)
    sampling = Sampling(n=args.samples, max_new_tokens=args.tokens)
    config = RunConfig(run_dir="unused", stages=[Stage.generate], backend=engine, data=data, sampling=sampling)
    greedy = replace(
        config,
        data=replace(data, limit=max(1, args.prompts // 4)),
        sampling=Sampling(n=1, max_new_tokens=args.tokens // 4, temperature=0.0),
    )
    with Slot() as slot, alone(engine) as generate:
        backend = slot.get(config.backend)
        work = requests(greedy, backend)
        _, ours = in_a_run(greedy, slot)
        assert ours == dict(zip([one.key for one in work], generate(backend, work)[1], strict=True)), "greedy"
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        work = requests(config, backend)
        for _ in range(args.rounds):
            seconds, ours = in_a_run(config, slot)
            rates["ours"].append(sum(map(len, ours.values())) / seconds)
            seconds, theirs = generate(backend, work)
            rates["theirs"].append(sum(map(len, theirs)) / seconds)
            print(f"  ours {rates['ours'][-1]:.0f}, alone {rates['theirs'][-1]:.0f} tokens/s", flush=True)
    work = f"generate, {args.engine}, {args.prompts * args.samples} × {args.tokens} tokens, rows on disk"
    row(work, "the engine's own generate, tokens/s", ratios(rates["ours"], rates["theirs"]), ">= 0.97")


def requests(config: RunConfig, backend: BaseBackend) -> list[SampleRequest]:
    """What a run of this config samples."""
    prompts = encode_rows(load_rows(config.data), config.data, backend.get_tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        return missing_requests(RunDir(folder), prompts, config.sampling)


def in_a_run(config: RunConfig, slot: Slot) -> tuple[float, dict[Key, list[int]]]:
    """(seconds of a run's generate step in a fresh folder, the tokens on the disk)."""
    with tempfile.TemporaryDirectory() as folder:
        this = Run(config, load_rows(config.data), RunDir(folder), NoTracker(config.tracking), slot)
        began = time.perf_counter()
        sample(this)
        seconds = time.perf_counter() - began
        rollouts = map(rollout_of, this.folder.completions.rows())
        return seconds, {rollout.key: rollout.token_ids_T.tolist() for rollout in rollouts}


@contextmanager
def alone(config: EngineConfig) -> Iterator[Callable[..., tuple[float, list[list[int]]]]]:
    """The engine in a process of its own, as a function (backend, requests) -> (seconds, token ids)."""
    environment = environment_for_python(config.python) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    environment.pop("OMP_WAIT_POLICY", None)  # a script has none of ours
    options = {"name": config.name, "model_name": config.model_name, "dtype": config.dtype}
    command = [config.python or sys.executable, str(Path(__file__).with_name("engine_alone.py")), json.dumps(options)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            start_new_session=True,
        )  # fmt: skip
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None and stdout is not None

        def answer() -> Any:
            while not (line := stdout.readline()).startswith(MARK):  # engines print too
                if not line:
                    log.seek(0)
                    sys.exit(log.read().decode(errors="replace")[-4000:])
            return json.loads(line.removeprefix(MARK))

        answer()

        def generate(backend: BaseBackend, work: Sequence[SampleRequest]) -> tuple[float, list[list[int]]]:
            arguments = [backend.sampling_args(one.sampling, backend.info.eos_ids, one.seed) for one in work]
            stdin.write(json.dumps([[one.prompt_ids.tolist() for one in work], arguments]) + "\n")
            stdin.flush()
            return answer()

        try:
            yield generate
        finally:
            stdin.close()
            process.wait()


if __name__ == "__main__":
    main()
