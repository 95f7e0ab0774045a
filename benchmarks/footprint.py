"""What a run costs per response token: bytes on disk and over the wire, memory of each stage, time relative to scoring.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/footprint.py [MODEL] [TOKENS …]

A real run of MODEL (smollm2) gives the sizes, which depend on how surprising the tokens are. Stages are then run by
themselves, each in a process of its own, over TOKENS (100000 1000000 3000000) response tokens that are drawn from the
real run's positions: an engine that costs nothing stands in, so what is seen is the project's own. A peak is that of
the process above what it holds before the stage. Times are CPU seconds of this process per token, in units of MODEL's
scoring of one token on one core; no other time is printed.
"""

from __future__ import annotations

import heapq
import json
import pickle
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.data.requests import EncodedPrompt
from rl_onoff.pipeline import stages
from rl_onoff.pipeline.stages import Progress
from rl_onoff.rundir.table import RunDir, Table, rollout_of, row_of_scores, scores_of
from rl_onoff.types import (
    FinishReason,
    LogprobKind,
    Rollout,
    SampleRequest,
    Sampling,
    TokenScores,
    Want,
    sample_requests,
)

TOP_KS = (0, 20, 64)
MEAN_LENGTH = 500
PROMPT_TOKENS, PROMPT_CHARS = 100, 400
SAMPLES = 8  # per prompt


def quiet(stage: str, total: int) -> Progress:
    return Progress(stage, total, lambda _: None, every_s=1e9)


# -- a real run --------------------------------------------------------------------------------------------------------


def real(folder: Path, model: str) -> dict[str, Any]:
    """Sample and score once with everything kept; returns CPU seconds per token."""
    from rl_onoff.backends import create_backend
    from rl_onoff.config import DataConfig
    from rl_onoff.data.prompts import load_rows
    from rl_onoff.data.requests import encode_rows

    backend = create_backend({"backend_type": "huggingface", "model_name": model})
    backend.load()
    sampling, data = Sampling(max_new_tokens=160), DataConfig(limit=40)
    prompts = encode_rows(load_rows(data), data, backend.get_tokenizer())
    run, seconds = RunDir(folder / "real"), {}
    requests = stages.missing_requests(run, prompts, sampling)
    for name, step in {
        "generate": lambda: stages.generate(run, requests, prompts, backend, None, quiet("generate", 1)),
        "score": lambda: stages.score(
            run, run.scores("all"), backend, Want(top_k=max(TOP_KS), sampler=sampling), quiet("score", 1)
        ),
    }.items():
        start = time.process_time()
        step()
        seconds[name] = time.process_time() - start
    tokens = sum(len(row["token_ids"]) for row in run.completions.rows(["token_ids"]))
    few = [replace(response, token_ids_T=response.token_ids_T[:32]) for response in list(stages.responses(run))[:8]]
    with RunDir(folder / "logits").scores("logits").writer() as out:
        for scores in backend.score(few, Want(full_logits=True)):
            out.append(row_of_scores(scores))
    return {name: value / tokens for name, value in seconds.items()} | {
        "tokens": tokens,
        "vocab_size": backend.info.vocab_size,
    }


def table_bytes(table: Table) -> int:
    return sum(shard.stat().st_size for shard in table.shards())


def tokens_of(table: Table) -> int:
    return sum(len(row["token_ids"]) for row in table.rows(["token_ids"]))


def disk(folder: Path) -> dict[str, float]:
    """Bytes a response token of each kind of row, real rows; rows of narrower settings are cut from the widest."""
    run = RunDir(folder / "real")
    tokens = tokens_of(run.completions)
    found = {"completions": table_bytes(run.completions) / tokens}
    for top_k in TOP_KS:
        for processed in (False, True):
            table = RunDir(folder / f"real-{top_k}-{processed}").scores("all")
            with table.writer() as out:
                for row in run.scores("all").rows():
                    row |= {name: list(row[name][:, :top_k]) for name in ("top_ids", "top_logprobs")}
                    out.append(row if processed else row | {"processed_logprobs": None, "nucleus_mass": None})
            found[f"scores, top_k={top_k}, processed={str(processed).lower()}"] = table_bytes(table) / tokens
    logits = RunDir(folder / "logits").scores("logits")
    found["scores, full_logits=true"] = table_bytes(logits) / tokens_of(logits)
    return found


def wire(folder: Path) -> dict[str, float]:
    """Bytes a response token that a worker sends, and those its parent sends it."""
    from rl_onoff.workers import wire

    class Counted(wire.Channel):
        def __init__(self) -> None:
            super().__init__(socket.socketpair()[0])
            self.count = 0

        def send_raw(self, data: bytes | memoryview) -> None:
            self.count += len(data)

    def size(message: wire.ToWorker | wire.FromWorker) -> int:
        channel = Counted()
        channel.send(message)
        return channel.count

    run = RunDir(folder / "real")
    rollouts, tokens = [rollout_of(row) for row in run.completions.rows()], tokens_of(run.completions)
    everything = [scores_of(row) for row in run.scores("all").rows()]
    sampled = [replace(rollout, prompt_ids=Rollout(request_id="", sample=0, token_ids_T=rollout.token_ids_T).prompt_ids,
                       meta={}) for rollout in rollouts]  # fmt: skip
    found = {"worker to parent, a Rollout": sum(size(one) for one in sampled) / tokens}
    for top_k in TOP_KS:
        sizes = [size(_narrow(scores, top_k)) for scores in everything]
        found[f"worker to parent, TokenScores with top_k={top_k}"] = sum(sizes) / tokens
    asked = wire.Assignment(call=1, work=list(stages.responses(run)), want=Want(), last=True)
    return found | {"parent to worker, Rollouts to score": size(asked) / tokens}


def decoding(folder: Path) -> float:
    """CPU seconds a token of making TokenScores out of the bytes that arrive."""
    from rl_onoff.workers import wire

    rows = [_narrow(scores_of(row), 20) for row in RunDir(folder / "real").scores("all").rows()]
    packed = [wire.dumped(row)[0] for row in rows]
    start = time.process_time()
    for _ in range(20):
        for header in packed:
            pickle.loads(header)
    return (time.process_time() - start) / 20 / sum(len(row.token_ids_T) for row in rows)


def _narrow(scores: TokenScores, top_k: int) -> TokenScores:
    """Scores as a run with this top_k has them."""
    if not top_k or scores.top_ids_TK is None or scores.top_logprobs_TK is None:
        return replace(scores, top_ids_TK=None, top_logprobs_TK=None)
    return replace(scores, top_ids_TK=scores.top_ids_TK[:, :top_k], top_logprobs_TK=scores.top_logprobs_TK[:, :top_k])


# -- an engine that costs nothing --------------------------------------------------------------------------------------


class Drawn:
    """Answers with positions of the real run; in the order of length, as engines do that batch by length."""

    info = EngineInfo(engine="drawn", version="", dtype="float32", vocab_size=50_000, max_len=1 << 20, eos_ids=())

    def __init__(self, folder: Path, top_k: int, noise: float = 0.0):
        run = RunDir(folder / "real")
        rows = [_narrow(scores_of(row), top_k).arrays() for row in run.scores("all").rows()]
        self._pool = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        self._text = " ".join(row["text"] for row in run.completions.rows(["text"]))
        self._noise = noise

    def _draw(self, seed: int, length: int) -> dict[str, Any]:
        chance = np.random.default_rng(seed)
        at = chance.integers(0, len(self._pool["token_ids_T"]), length)
        drawn = {name: values[at] for name, values in self._pool.items()}
        for name, values in drawn.items():  # no number comes twice: it would compress too well
            if values.dtype == np.float32:
                drawn[name] = values * (1 + 1e-3 * chance.random(values.shape, np.float32))
        return drawn

    def complete(self, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
        for request in requests:
            length = _length(request.seed)
            drawn = self._draw(request.seed, length)
            at = request.seed % max(len(self._text) - 4 * length, 1)
            yield Rollout(
                request_id=request.request_id, sample=request.sample, prompt_ids=request.prompt_ids,
                token_ids_T=drawn["token_ids_T"], text=self._text[at : at + 4 * length],
                logprobs_T=drawn["logprobs_T"], kind=LogprobKind.raw, finish_reason=FinishReason.eos,
            )  # fmt: skip

    def score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        for r in sorted(rollouts, key=lambda r: len(r.token_ids_T)):
            (request,) = sample_requests(
                id=r.request_id, prompt_ids=r.prompt_ids, sampling=Sampling(), samples=[r.sample]
            )
            drawn = self._draw(request.seed, len(r.token_ids_T))
            shift = (
                np.random.default_rng(request.seed + 1)
                .normal(0, self._noise, (len(r.token_ids_T), 1))
                .astype(np.float32)
            )
            drawn["logprobs_T"] = np.minimum(drawn["logprobs_T"] + shift[:, 0], 0)
            drawn["top_logprobs_TK"] = np.minimum(drawn["top_logprobs_TK"] + shift, 0)
            yield TokenScores(request_id=r.request_id, sample=r.sample, **drawn)


def _length(seed: int) -> int:
    return 2 + int(np.clip(np.random.default_rng(seed).gamma(2, MEAN_LENGTH / 2), 0, 8 * MEAN_LENGTH))


def drawn_prompts(tokens: int) -> list[EncodedPrompt]:
    """Prompts enough for so many response tokens, each with strings of its own."""
    chance = np.random.default_rng(0)
    return [
        EncodedPrompt(
            id=f"row-{i:07d}", ids=chance.integers(0, 40_000, PROMPT_TOKENS).astype(np.int32),
            text=f"{i} " + "word " * (PROMPT_CHARS // 5),
            meta={"question": f"{i} " + "why " * (PROMPT_CHARS // 4), "answer": str(i), "level": str(i % 5)},
        )
        for i in range(max(1, round(tokens / MEAN_LENGTH / SAMPLES)))
    ]  # fmt: skip


# -- one stage in a process of its own ---------------------------------------------------------------------------------


def stage(name: str, folder: Path, size: int) -> dict[str, float]:
    """Run one stage; memory in bytes, CPU seconds, and bytes read."""
    run = RunDir(folder / f"run-{size}")
    step = STEPS[name](run, folder, size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before, read, start = _status("VmRSS"), _read(), time.process_time()
    step()
    return {"peak": _status("VmHWM") - before, "seconds": time.process_time() - start, "read": _read() - read}


def _status(name: str) -> int:
    """Bytes, of a line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def _read() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def _generate(run: RunDir, folder: Path, size: int) -> Callable[[], Any]:
    engine: Any = Drawn(folder, 0)

    def sample() -> None:
        prompts = drawn_prompts(size)
        requests = stages.missing_requests(run, prompts, Sampling(n=SAMPLES))
        stages.generate(run, requests, prompts, engine, None, quiet("generate", 1))

    return sample


def _score(run: RunDir, folder: Path, size: int, name: str, noise: float) -> Callable[[], Any]:
    engine: Any = Drawn(folder, 20, noise)
    return lambda: stages.score(run, run.scores(name), engine, Want(top_k=20, sampler=Sampling()), quiet("score", 1))


def _resume(run: RunDir, folder: Path, size: int) -> Callable[[], Any]:
    prompts = drawn_prompts(size)
    own = run.scores("own")
    return lambda: (stages.missing_requests(run, prompts, Sampling(n=SAMPLES)), stages.unscored(run, own))


def _summarise(run: RunDir, folder: Path, size: int) -> Callable[[], Any]:
    from rl_onoff.rundir.summary import summarise

    return lambda: summarise(run)


def _compare(run: RunDir, folder: Path, size: int) -> Callable[[], Any]:
    from rl_onoff.pipeline.compare import compare_run

    sources = _sources(run)
    return lambda: (run.path / "comparisons.pickle").write_bytes(pickle.dumps(compare_run(sources)))


def _page(run: RunDir, folder: Path, size: int) -> Callable[[], Any]:
    from rl_onoff.pipeline.compare import write_page

    comparisons = pickle.loads((run.path / "comparisons.pickle").read_bytes())
    sources = _sources(run)
    return lambda: write_page(sources, comparisons, lambda i: f" t{i}")


def _sources(run: RunDir) -> RunDir:
    from rl_onoff.pipeline.compare_inputs import Sources

    return Sources(run.path, run.completions, {name: run.scores(name) for name in run.score_names()}, own="own")


STEPS: dict[str, Callable[[RunDir, Path, int], Callable[[], Any]]] = {
    "generate": _generate,
    "score own": partial(_score, name="own", noise=0.01),
    "score": partial(_score, name="target", noise=0.05),
    "resume": _resume,
    "summarise": _summarise,
    "compare": _compare,
    "page": _page,
}


# -- what else grows ---------------------------------------------------------------------------------------------------


def rewritten(folder: Path, size: int) -> None:
    """What other shards and other top lists make of a table of scores."""
    rows = list(RunDir(folder / f"run-{size}").scores("own").rows())
    first: tuple[float, ...] = ()
    for max_rows, top_k in ((256, 20), (16, 20), (1, 20), (256, 0)):
        cut = [row | {name: list(row[name][:, :top_k]) for name in ("top_ids", "top_logprobs")} for row in rows]
        table = RunDir(folder / f"rewritten-{max_rows}-{top_k}").scores("own")
        start = time.process_time()
        with table.writer(max_rows=max_rows) as out:
            for row in cut:
                out.append(row)
        written = time.process_time()
        table.keys()
        found = table_bytes(table), written - start, time.process_time() - written
        first = first or found
        ratios = [
            f"{now / then:.2f} × the {what}"
            for now, then, what in zip(found, first, ("bytes", "writing", "reading keys"), strict=True)
        ]
        print(f"  {max_rows:>4} rows a shard, top_k={top_k:<3} {', '.join(ratios)}")
        shutil.rmtree(table.path)


def held() -> dict[str, float]:
    """Bytes of what the parent has in memory of work that waits, as Python counts them."""
    from rl_onoff.workers.work_queue import WorkQueue

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]

    def grown(number: int) -> float:
        nonlocal before
        last, before = before, tracemalloc.get_traced_memory()[0]
        return (before - last) / number

    prompts = drawn_prompts(20_000_000)
    found = {"a prompt": grown(len(prompts))}
    sampling = Sampling(n=SAMPLES)
    work = [request for p in prompts for request in sample_requests(id=p.id, prompt_ids=p.ids, sampling=sampling)]
    queue = WorkQueue(work, 8)
    found["a response that waits in a pool"] = grown(len(work))
    keys = {(f"row-{i:07d}", sample) for i in range(len(prompts)) for sample in range(SAMPLES)}
    found["the key of a response that is done"] = grown(len(keys))
    del queue  # until here: what it holds is counted
    return found


def busy(replicas: int, window: int) -> float:
    """The share of the time in which equally fast replicas have something to score, in windows of so many responses."""
    from rl_onoff.workers.work_queue import WorkQueue

    chance, work, time_passed = np.random.default_rng(0), 0, 0.0
    for number in range(3):
        prompts = [np.full(PROMPT_TOKENS, (number << 16) + i, np.int32) for i in range(1 + window // SAMPLES)]
        lengths = np.clip(chance.gamma(2, MEAN_LENGTH / 2, window), 2, 8 * MEAN_LENGTH).astype(int)
        rollouts = [
            Rollout(
                request_id=str(i // SAMPLES), sample=i % SAMPLES, prompt_ids=prompts[i // SAMPLES],
                token_ids_T=np.zeros(n, np.int32),
            )
            for i, n in enumerate(lengths)
        ]  # fmt: skip
        queue = WorkQueue(rollouts, replicas)
        free_at, waiting = [0.0] * replicas, window
        while waiting:
            now = heapq.heappop(free_at)
            share = queue.take()
            waiting -= len(share)
            heapq.heappush(free_at, now + sum(one.num_tokens for one in share))
        work += int(lengths.sum()) + PROMPT_TOKENS * window
        time_passed += max(free_at)
    return work / (replicas * time_passed)


def tracked(folder: Path, tokens: int) -> tuple[int, int]:
    """Bytes in a run's wandb/ and the bytes of its page, with the fake engine."""
    path = folder / f"wandb-{tokens}"
    length = 100
    data = folder / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": f"What is {i} + {i}?", "answer": str(2 * i)}) + "\n"
            for i in range(tokens // length)
        )
    )
    options = ["backend=fake", "target=fake", "target.noise=0.1", "data=file", f"data.path={data}", f"run_dir={path}",
               "tracking.mode=offline", f"sampling.max_new_tokens={length}"]  # fmt: skip
    subprocess.run([sys.executable, "-m", "rl_onoff", "experiment=onoff", *options], check=True, capture_output=True)
    return sum(file.lstat().st_size for file in (path / "wandb").rglob("*") if file.is_file()), (
        path / "report.html"
    ).stat().st_size


def progress_report(folder: Path) -> float:
    """Bytes that W&B writes for one report of progress, of which there is one every `tracking.log_every_s`."""
    from rl_onoff.config import TrackingConfig, TrackingMode
    from rl_onoff.tracking import WandbTracker

    sizes = []
    for number in (100, 1100):
        path = folder / f"progress-{number}"
        tracker = WandbTracker(TrackingConfig(mode=TrackingMode.offline))
        tracker.start(config={}, run_dir=path, group=None, job_type="score")
        for i in range(number):
            tracker.log(
                {
                    "progress/responses": 37 * i,
                    "progress/score_tokens": 18_500.0 * i,
                    "progress/score_tokens_per_s": 1234.5 + i,
                }
            )
        tracker.close(failed=False)
        sizes.append(sum(file.lstat().st_size for file in (path / "wandb").rglob("*") if file.is_file()))
    return (sizes[1] - sizes[0]) / 1000


# -- the table ---------------------------------------------------------------------------------------------------------


def child(*arguments: object) -> Any:
    done = subprocess.run(
        [sys.executable, __file__, "--child", *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, values: dict[str, float], unit: str) -> None:
    print(f"\n{title}")
    for name, value in values.items():
        print(f"  {name:<52}{value:>14,.1f} {unit}")


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        kind, folder, *rest = sys.argv[2:]
        parts = {"real": lambda: real(Path(folder), *rest), "held": held}
        print(json.dumps(parts[kind]() if kind in parts else stage(kind, Path(folder), int(rest[0]))))
        return
    model = sys.argv[1] if len(sys.argv) > 1 else "smollm2"
    sizes = [int(size) for size in sys.argv[2:]] or [100_000, 1_000_000, 3_000_000]
    folder = Path(tempfile.mkdtemp(prefix="footprint-"))
    try:
        unit = child("real", folder, model)
        print(
            f"{model}, {unit['tokens']:,} tokens: sampling a token takes {unit['generate'] / unit['score']:.1f} × the "
            "time of scoring it"
        )
        show("On disk, real rows", disk(folder), "bytes a token")
        show("Over the wire, real rows", wire(folder), "bytes a token")
        print(
            f"  the parent decodes TokenScores, top_k=20, in {decoding(folder) / unit['score']:.5f} of the scoring time"
        )
        for size in sizes:
            one_size(folder, size, unit["score"])
        show("In the parent's memory", child("held", folder), "bytes")
        print(
            "\nHow busy equally fast replicas are, scoring in windows of 2,048 responses, and of 128 for each if more"
        )
        for replicas in (1, 8, 64, 512):
            print(
                f"  {replicas:>4} replicas {busy(replicas, 2048):.3f} {busy(replicas, max(2048, 128 * replicas)):.3f}"
            )
        for tokens in (2_000, 50_000):
            wandb, page = tracked(folder, tokens)
            print(
                f"\nW&B, offline, fake engine: {wandb:,} bytes at {tokens:,} tokens, the page's {page:,} bytes included"
            )
        print(f"  and {progress_report(folder):.0f} bytes a report of progress, one every 10 s by default")
    finally:
        shutil.rmtree(folder)


def one_size(folder: Path, size: int, second: float) -> None:
    run = RunDir(folder / f"run-{size}")
    found = {name: child(name, folder, size) for name in STEPS}
    tokens, rows = tokens_of(run.completions), sum(1 for _ in run.completions.rows(["sample"]))
    tables = {"completions": run.completions, "own": run.scores("own"), "target": run.scores("target")}
    shards = ", ".join(
        f"{name} {len(t.shards())} files {table_bytes(t) / tokens:.0f} bytes a token" for name, t in tables.items()
    )
    page = (run.path / "report.html").read_text()
    left_out, cut, chunks = *re.findall(r'"(?:left_out|cut_chunks)":(\d+)', page), page.count('id="tokens-')
    print(f"\n{tokens:,} tokens in {rows:,} responses: {shards}")
    print(f"  page {len(page):,} bytes; responses left out {left_out}; lists cut in {cut} of {chunks} chunks")
    print(f"  {'':<12}{'peak MB':>10}{'bytes/token':>13}{'bytes/row':>12}{'time/scoring':>14}{'read/table':>12}")
    on_disk = sum(table_bytes(table) for table in tables.values())
    for name, f in found.items():
        numbers = f"{f['peak'] / 1e6:>10,.0f}{f['peak'] / tokens:>13,.1f}{f['peak'] / rows:>12,.0f}"
        print(f"  {name:<12}{numbers}{f['seconds'] / tokens / second:>14.4f}{f['read'] / on_disk:>12.2f}")
    if size <= 200_000:
        rewritten(folder, size)
    shutil.rmtree(run.path)


if __name__ == "__main__":
    main()
