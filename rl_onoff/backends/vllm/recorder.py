"""Token statistics inside vLLM, from its own hidden states: what is recorded in each step, and how it gets to our side.

A request carries its job in `SamplingParams.extra_args`; the statistics are fetched as bytes, full logits through a
file that both sides map. vllm_hooks.py is what calls the Recorder inside the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from rl_onoff.backends.token_stats import chunk_rows, token_stats
from rl_onoff.types import Rollout, TokenScores, Want, copy_rows

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

JOB = "rl_onoff"  # the key in extra_args
Head = Callable[["Tensor"], "Tensor | None"]
Batch = Iterator[
    tuple[Mapping[str, Any], int, int, int]
]  # job, position of its first scheduled token, number of them, their offset


def job_of(number: int, response: Rollout) -> dict[str, Any]:
    """extra_args of a request that prefills `prompt + response[:-1]`: row t is the position before response token t."""
    first = len(response.prompt_ids) - 1
    return {JOB: {"number": number, "first": first, "ids": np.asarray(response.token_ids_T, np.int32).tobytes()}}


def read(encoded: bytes, folder: Path) -> dict[int, TokenScores | None]:
    """What `fetch` sent: statistics by job number, None for a job of which some row was never computed."""
    results: dict[int, TokenScores | None] = {}
    sent = msgspec.msgpack.decode(encoded, type=list[tuple[int, dict[str, tuple[str, list[int], bytes]] | None]])
    for number, packed in sent:
        if packed is None:
            results[number] = None
            continue
        arrays: dict[str, Any] = {
            name: np.frombuffer(bytearray(data), dtype).reshape(shape) for name, (dtype, shape, data) in packed.items()
        }
        file = folder / f"{number}.npy"
        if file.exists():
            arrays["logits_TV"] = np.asarray(np.load(file, mmap_mode="c"))  # copy on write: private to its reader
            file.unlink()  # the mapping keeps the pages until the array is dropped
        results[number] = TokenScores(**arrays)
    return results


@dataclass(eq=False)
class Job:
    """One response in the worker: where its rows are, and what is known of them so far."""

    number: int
    first: int  # position of row 0
    ids_T: np.ndarray
    stats: dict[str, np.ndarray] = field(default_factory=dict)
    done_T: np.ndarray = field(init=False)
    logits_TV: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.done_T = np.zeros(len(self.ids_T), bool)

    def put(self, start: int, stats: TokenScores) -> None:
        self.done_T[start : start + copy_rows(stats, self.stats, start, len(self.ids_T))] = True


class Recorder:
    """Computes the statistics of the jobs in each step's batch. The same on both runners."""

    def __init__(self, vocab_size: int, keeps: bool):
        self._vocab_size = vocab_size
        self._keeps = keeps  # the first rank of a tensor parallel group; the others only take part in the LM head
        self.want: Want | None = None  # None: not recording, and generation pays nothing
        self.error = ""
        self._folder = Path()
        self._jobs: dict[int, Job] = {}

    def begin(self, want: Want, folder: Path) -> None:
        self.want, self._folder, self.error = want, folder, ""
        self._jobs.clear()  # of a call that was abandoned

    def end(self) -> None:
        self.want = None
        self._jobs.clear()

    def fetch(self, numbers: list[int]) -> bytes:
        if self.error:
            raise RuntimeError(self.error)
        results: list[tuple[int, Any]] = []
        for number in numbers:
            job = self._jobs.pop(number, None)
            if job is not None and self._keeps:
                arrays = {name: (a.dtype.str, a.shape, a.tobytes()) for name, a in job.stats.items()}
                results.append((number, arrays if job.done_T.all() else None))
        return msgspec.msgpack.encode(results)

    def step(self, hidden_ND: Tensor, head: Head, batch: Batch) -> None:
        """Take in one step: hidden_ND are the last hidden states of the batch's tokens, `head` the LM head."""
        if self.want is None or self.error:
            return
        try:
            self._step(hidden_ND, head, batch)
        except Exception as e:  # the engine must not die of it: the error is raised by `fetch`, on our side
            log.exception("token statistics failed inside vLLM")
            self.error = f"{type(e).__name__}: {e}"

    def _step(self, hidden_ND: Tensor, head: Head, batch: Batch) -> None:
        import torch

        spans: list[tuple[Job, int, int]] = []
        places: list[slice] = []
        for raw, first, num_tokens, offset in batch:
            if raw["number"] not in self._jobs:
                self._jobs[raw["number"]] = Job(raw["number"], raw["first"], np.frombuffer(raw["ids"], np.int32))
            job = self._jobs[raw["number"]]
            start, stop = max(job.first, first), min(job.first + len(job.ids_T), first + num_tokens)
            if start < stop:
                spans.append((job, start - job.first, stop - job.first))
                places.append(slice(offset + start - first, offset + stop - first))
        if not spans:
            return
        assert self.want is not None
        # rows of all requests together: the LM head likes full chunks, and every rank must cut them alike
        ids_R = torch.from_numpy(np.concatenate([job.ids_T[a:b] for job, a, b in spans])).to(hidden_ND.device)
        hidden_RD = torch.cat([hidden_ND[place] for place in places]) if len(places) > 1 else hidden_ND[places[0]]
        small = replace(self.want, full_logits=False)
        rows = [(job, t) for job, a, b in spans for t in range(a, b)] if self.want.full_logits else []
        parts = []
        size = chunk_rows(self._vocab_size, hidden_ND.device.type)
        with torch.inference_mode():
            for at in range(0, len(ids_R), size):
                logits_RV = head(hidden_RD[at : at + size])
                if not self._keeps or logits_RV is None:
                    continue
                parts.append(token_stats(logits_RV, ids_R[at : at + size], small))
                if rows:
                    self._write(logits_RV, rows[at : at + size])
        if not parts:
            return
        stats, at = TokenScores.collect(parts, len(ids_R)), 0
        for job, a, b in spans:
            job.put(a, stats[at : at + b - a])
            at += b - a

    def _write(self, logits_RV: Tensor, rows: list[tuple[Job, int]]) -> None:
        """Logits go to a file that the reader maps: (T, V) may be hundreds of megabytes."""
        import torch

        for job, group in groupby(enumerate(rows), key=lambda item: item[1][0]):
            places = list(group)
            (at, (_, t)), count = places[0], len(places)
            logits_TV = job.logits_TV
            if logits_TV is None:
                file, shape = self._folder / f"{job.number}.npy", (len(job.ids_T), logits_RV.shape[-1])
                logits_TV = job.logits_TV = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
            torch.from_numpy(logits_TV[t : t + count]).copy_(logits_RV[at : at + count])
