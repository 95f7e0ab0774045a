"""The memory and time of `rl-onoff experiment=compare` on one large file of rollouts, made here with two columns of
logprobs: the peak of the resident memory of the process and its children, sampled every 0.1 s.

python benchmarks/big_rollouts.py FOLDER GIGABYTES [parquet]
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import psutil

LENGTH = 1000  # tokens of a response, on average


def write(path: Path, size: float) -> int:
    """Rows as a verl batch has them, written out one a line, until the file has `size` bytes; how many tokens."""
    rng, row, tokens = np.random.default_rng(0), 0, 0
    with path.open("wb") as lines:
        while lines.tell() < size:
            length = int(rng.integers(LENGTH // 5, 2 * LENGTH - LENGTH // 5))
            q_T = (-rng.exponential(0.5, length)).astype(np.float32)
            p_T = np.minimum(q_T + rng.normal(0, 0.01, length).astype(np.float32), 0)
            record = {"responses": rng.integers(0, 150_000, length).tolist(), "prompts": [1, 2, 3] * 30}
            record |= {"rollout_log_probs": q_T.tolist(), "old_log_probs": p_T.tolist()}
            record |= {"reward": float(row % 2), "step": row // 4096, "weight_version": max(row // 4096 - row % 3, 0)}
            lines.write(msgspec.json.encode(record) + b"\n")
            row, tokens = row + 1, tokens + length
    return tokens


def to_parquet(path: Path) -> Path:
    import pyarrow.json
    import pyarrow.parquet

    made, options = path.with_suffix(".parquet"), pyarrow.json.ReadOptions(block_size=64 << 20)
    reader = pyarrow.json.open_json(path, read_options=options)
    with pyarrow.parquet.ParquetWriter(made, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)
    return made


def measure(command: list[str]) -> tuple[float, float]:
    """Peak resident memory in GB and seconds of a command and its children."""
    start, peak = time.monotonic(), 0
    process = psutil.Popen(command)
    while process.poll() is None:
        try:
            peak = max(peak, sum(each.memory_info().rss for each in (process, *process.children(recursive=True))))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.1)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return peak / 1e9, time.monotonic() - start


def main(folder: Path, gigabytes: float, kind: str = "jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rollouts-{gigabytes:g}.jsonl"
    tokens = write(path, gigabytes * 1e9)
    path = to_parquet(path) if kind == "parquet" else path
    run = [sys.executable, "-m", "rl_onoff", "experiment=compare", "tracking=none"]
    run += [f"compare.behaviour={path}", f"run_dir={folder / path.stem}-{kind}"]
    peak, seconds = measure(run)
    size = f"{path.stat().st_size / 1e9:.2f} GB of {kind}, {tokens:,} tokens"
    print(f"{size}: {peak:.2f} GB at its peak, {seconds:.0f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
