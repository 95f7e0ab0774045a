"""Comparing two policies from their files, against plain numpy in memory; and what the files take, against JSON lines.

    .venv/bin/python benchmarks/compare.py [--tokens 1000000] [--top-k 64] [--rounds 3]

Both ways read the same run folder, and give the same numbers with the same kind of interval (1,000 bootstrap resamples
of the responses), each in a process of its own: a peak is that of the process above what its imports take. Plain numpy
computes ten metrics, all its tokens in one array each; ours computes all of them, histograms, positions and checks.

What is stored is of a real run of SmolLM2 (float32, temperature 1), logprob, entropy, rank, logsumexp and the top 20 of
every token, beside the same numbers as one JSON object a response, each float in the fewest digits that give it back.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from table import ratios, row

from rl_onoff.rundir.join import pairs
from rl_onoff.rundir.table import RunDir, Table, row_of_rollout, row_of_scores, scores_of
from rl_onoff.types import Rollout, TokenScores

VOCAB, LENGTH, RESAMPLES, SEED = 151_936, 500, 1000, 0
SHARED = ("kl", "kl_k3", "logprob_diff_mean", "ess_token", "argmax_agreement", "topk_jaccard")
BOUNDS = ("kl_forward_topk", "kl_reverse_topk", "js_topk", "tv_topk")


def make(folder: Path, num_tokens: int, k: int) -> None:
    """A run of made-up responses, scored by both policies: lists that share most of their ids, in another order."""
    run, rng = RunDir(folder), np.random.default_rng(SEED)
    with run.completions.writer() as sampled, run.scores("own").writer() as own, run.scores("target").writer() as other:
        for number in range(num_tokens // LENGTH):
            ids_TA = (rng.integers(VOCAB, size=(LENGTH, 1)) + 997 * np.arange(k + 3)) % VOCAB
            logits_TA = np.sort(rng.normal(0, 3, (LENGTH, k + 3)))[:, ::-1]
            chosen_T = rng.integers(k, size=LENGTH)
            rows_T, made = np.arange(LENGTH), []
            for noise in (0.0, 0.05):
                logs_TA = logits_TA + noise * rng.normal(size=logits_TA.shape)
                logs_TA = (logs_TA - np.log(np.exp(logs_TA).sum(1, keepdims=True)) - 0.05).astype(np.float32)
                order_TK = np.argsort(-logs_TA, axis=1, kind="stable")[:, :k]
                logprobs_T = logs_TA[rows_T, chosen_T]
                made.append(
                    TokenScores(
                        request_id=str(number),
                        token_ids_T=ids_TA[rows_T, chosen_T].astype(np.int32),
                        rank_T=None,
                        logprobs_T=logprobs_T,
                        entropy_T=rng.random(LENGTH).astype(np.float32),
                        top_ids_TK=np.take_along_axis(ids_TA, order_TK, 1).astype(np.int32),
                        top_logprobs_TK=np.take_along_axis(logs_TA, order_TK, 1),
                    )
                )
            given = {"request_id": str(number), "sample": 0, "prompt_ids": np.zeros(1, np.int32)}
            rollout = Rollout(**given, token_ids_T=made[0].token_ids_T, logprobs_T=made[0].logprobs_T)
            sampled.append(row_of_rollout(rollout, "") | {"logprob_kind": "raw"})
            own.append(row_of_scores(made[0]))
            other.append(row_of_scores(made[1]))


def ours(run: RunDir) -> dict[str, list[float | None]]:
    from rl_onoff.compare import compare

    found = compare(pairs(run, "target", "own"), num_resamples=RESAMPLES, seed=SEED)
    return {name: [found[name].value, found[name].lo, found[name].hi] for name in (*SHARED, *BOUNDS)}


def plain(run: RunDir) -> dict[str, list[float | None]]:
    """Everything at once, in float64; ids are matched by comparing each with each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def read(table: Table) -> tuple[np.ndarray, ...]:
        whole = pa.concat_tables(pq.ParquetFile(shard).read() for shard in table.shards()).combine_chunks()
        lengths = np.diff(whole["token_ids"].chunk(0).offsets)
        token_ids, logprobs = (whole[name].chunk(0).flatten().to_numpy() for name in ("token_ids", "logprobs"))
        tops = (whole[name].chunk(0).flatten().flatten().to_numpy() for name in ("top_ids", "top_logprobs"))
        return lengths, token_ids, logprobs.astype(np.float64), *(top.reshape(len(logprobs), -1) for top in tops)

    lengths, token_ids, q, q_ids, q_logs = read(run.scores("own"))
    _, other_ids, p, p_ids, p_logs = read(run.scores("target"))
    assert (token_ids == other_ids).all()
    with np.errstate(divide="ignore"):
        difference = p - q
        weights = np.exp(difference)
        equal = q_ids[:, :, None] == p_ids[:, None, :]
        shared, at = equal.any(2), equal.argmax(2)
        del equal
        both = shared.sum(1)
        # the sampled token is an outcome of its own where a list lacks it
        lacks = ~(shared & (q_ids == token_ids[:, None])).any(1)
        sides = []
        for own, logs in ((q, q_logs.astype(np.float64)), (p, np.take_along_axis(p_logs.astype(np.float64), at, 1))):
            logs = np.column_stack([np.where(shared, logs, -np.inf), np.where(lacks, own, -np.inf)])
            rest = np.maximum(1 - np.exp(logs).sum(1), 8 * np.finfo(np.float64).eps)
            sides.append(np.column_stack([logs, np.log(rest)]))
        log_q, log_p = sides
        prob_q, prob_p = np.exp(log_q), np.exp(log_p)
        middle = np.log((prob_q + prob_p) / 2)
        known = prob_q > 0
        log_ratio = np.where(known, log_q - np.where(known, log_p, 0), 0)
        terms = {
            "kl": -difference, "kl_k3": weights - 1 - difference, "logprob_diff_mean": np.abs(difference),
            "weights": weights, "weights2": weights**2,
            "argmax_agreement": q_ids[:, 0] == p_ids[:, 0], "topk_jaccard": both / (2 * q_ids.shape[1] - both),
            "kl_forward_topk": (prob_q * log_ratio + prob_p - prob_q).sum(1),
            "kl_reverse_topk": (-prob_p * log_ratio - prob_p + prob_q).sum(1),
            "js_topk": 0.5 * (np.where(known, prob_q * (log_q - middle) + prob_p * (log_p - middle), 0)).sum(1),
            "tv_topk": 0.5 * np.abs(prob_q - prob_p).sum(1),
        }  # fmt: skip
    starts = np.cumsum(lengths) - lengths
    sums = {name: np.add.reduceat(term, starts, dtype=np.float64) for name, term in terms.items()}
    rng, draws = np.random.default_rng(SEED), []

    def means(rows: Any) -> dict[str, float]:
        found = {name: of[rows].sum() / lengths[rows].sum() for name, of in sums.items()}
        return found | {"ess_token": found["weights"] ** 2 / found["weights2"]}

    for _ in range(RESAMPLES):
        draws.append(means(rng.integers(len(lengths), size=len(lengths))))
    found = means(slice(None))
    return {
        name: [float(found[name]), *np.percentile([draw[name] for draw in draws], (2.5, 97.5)).tolist()]
        for name in (*SHARED, *BOUNDS)
    }


def child(way: str, folder: str) -> None:
    import pyarrow.parquet  # noqa: F401 - so that what importing takes is in neither side's figures

    import rl_onoff.compare  # noqa: F401

    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    found = {"ours": ours, "plain": plain}[way](RunDir(folder))
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"found": found, "seconds": seconds, "peak": peak}))


def compared(folder: Path, rounds: int, work: str) -> None:
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        for way, of in taken.items():
            command = [sys.executable, __file__, "--child", way, str(folder)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            of.append(json.loads(done.stdout))
    one, other = (taken[way][0]["found"] for way in ("ours", "plain"))
    for name in (*SHARED, *BOUNDS):
        assert np.allclose(one[name], other[name], rtol=1e-6, atol=1e-9), (name, one[name], other[name])
    seconds, peaks = ({way: [run[of] for run in runs] for way, runs in taken.items()} for of in ("seconds", "peak"))
    print(
        f"peak above the imports: {statistics.median(peaks['ours']) / 1e6:.2f} GB, plain {peaks['plain'][0] / 1e6:.2f}"
    )
    row(f"compare, {work}, time saved", "plain numpy in memory", ratios(seconds["plain"], seconds["ours"]), ">= 2")
    row(f"compare, {work}, memory", "plain numpy in memory", ratios(peaks["ours"], peaks["plain"]), "<= 0.1")


def stored(folder: Path) -> None:
    """Bytes of a real run's scores as we keep them, over those of JSON lines."""
    command = [sys.executable, "-m", "rl_onoff", "experiment=analyse", "model.dtype=float32", "data.limit=16",
               "sampling.max_new_tokens=64", "score.processed=false", "tracking=none", f"run_dir={folder}"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    run, lines = RunDir(folder), 0
    (name,) = run.score_names()
    for each in map(scores_of, run.scores(name).rows()):
        values = {"request_id": each.request_id, "sample": each.sample}
        values |= {name: as_json(array) for name, array in each.arrays().items()}
        lines += len(json.dumps(values)) + 1
    ours = sum(shard.stat().st_size for shard in run.scores(name).shards())
    tokens = sum(len(each["token_ids"]) for each in run.scores(name).rows(["token_ids"]))
    print(f"{tokens:,} tokens: {ours / tokens:.0f} bytes a token in Parquet, {lines / tokens:.0f} in JSON lines")
    row("stored bytes a token, top-20", "JSON lines", [ours / lines], "<= 0.125")


def as_json(array: np.ndarray) -> Any:
    """Numbers for json.dumps, a float32 in the fewest digits that give it back."""
    if array.ndim > 1:
        return [as_json(part) for part in array]
    return [float(str(x)) for x in array] if array.dtype.kind == "f" else array.tolist()


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stored(Path(folder, "real"))
        make(Path(folder, "made"), args.tokens, args.top_k)
        compared(Path(folder, "made"), args.rounds, f"{args.tokens:,} tokens × top-{args.top_k}")


if __name__ == "__main__":
    main()
