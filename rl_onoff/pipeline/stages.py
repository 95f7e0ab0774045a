"""The steps of a run. Each reads a run folder and adds to it; running one again does only what is missing."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.data.requests import GivenResponse
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.progress import Progress
from rl_onoff.rewards import FAILED, Judge
from rl_onoff.rundir.table import Row, RunDir, Table
from rl_onoff.types import Completion, Request, Response, TokenScores, Want

log = logging.getLogger(__name__)

Reward = Callable[[str, str, Mapping[str, Any]], float]

WINDOW = 2048  # responses that are handed to an engine at once: enough to sort by length and to fill any batch
REPLICA_WINDOW = 128  # and to each replica at least, for all of them wait for the last at the window's end


# -- generate ----------------------------------------------------------------------------------------------------------


def missing_requests(run: RunDir, requests: Sequence[Request]) -> list[Request]:
    """The requests, each with the samples that are not on disk yet.

    Raises UsageError when a row on disk has the id of a request but another prompt.
    """
    by_id = {request.id: request for request in requests}
    done: dict[str, set[int]] = {}
    for row in run.completions.rows(["request_id", "sample", "prompt_ids"]):
        request = by_id.get(row["request_id"])
        if request is not None and not np.array_equal(request.prompt_ids, row["prompt_ids"]):
            raise UsageError(
                f"row {row['request_id']!r} of the data has another prompt than in {run.path}: "
                "set run_dir to a new folder, or undo the change"
            )
        done.setdefault(row["request_id"], set()).add(row["sample"])
    missing = []
    for request in requests:
        samples = tuple(s for s in request.sample_indices if s not in done.get(request.id, ()))
        if samples:
            missing.append(replace(request, samples=samples))
    return missing


def generate(
    run: RunDir, requests: Sequence[Request], backend: BaseBackend, reward: Reward | None, progress: Progress
) -> None:
    """Sample what `requests` ask for and append each response to the run as it finishes."""
    by_id = {request.id: request for request in requests}
    judge = Judge(reward)
    if reward is not None and not any(request.meta.get("answer") is not None for request in requests):
        log.warning(
            "no row has a reference answer, so no response is judged: name its column with data.answer, or set reward=none"
        )
    with run.completions.writer() as writer, progress:
        for completion in backend.complete(requests):
            request = by_id[completion.request_id]
            value, failure = judge(completion.text, request.meta, completion.key)
            writer.append(completion_row(request, completion, value, failure))
            progress.add(len(completion.token_ids_T))
    judge.conclude()


def completion_row(request: Request, completion: Completion, reward: float | None, failure: str | None = None) -> Row:
    """One row of the completions table; `failure` says why a response that should have a reward has none."""
    meta = {**request.meta, FAILED: failure} if failure else dict(request.meta)
    return {
        "request_id": request.id,
        "sample": completion.sample,
        "prompt": request.prompt,
        "prompt_ids": request.prompt_ids,
        "token_ids": completion.token_ids_T,
        "text": completion.text,
        "logprobs": completion.logprobs_T,
        "logprob_kind": completion.kind.value,
        "finish_reason": completion.finish_reason.value,
        "reward": reward,
        "meta": json.dumps(meta, ensure_ascii=False, default=str),
    }


# -- score -------------------------------------------------------------------------------------------------------------


def unscored(run: RunDir, table: Table) -> int:
    """How many completions have no scores in `table` yet. An empty response has nothing to score and does not count."""
    done = table.keys()
    rows = run.completions.rows(["request_id", "sample", "token_ids"])
    return sum(len(row["token_ids"]) > 0 and (row["request_id"], row["sample"]) not in done for row in rows)


def score(run: RunDir, table: Table, backend: BaseBackend, want: Want, progress: Progress) -> None:
    """Score every completion of the run that `table` lacks, and append each to it as it is done."""
    done = table.keys()
    waiting = (response for response in responses(run) if response.key not in done)
    size = max(WINDOW, REPLICA_WINDOW * backend.info.replicas)
    with table.writer() as writer, progress:
        while window := list(islice(waiting, size)):
            for scores in backend.score(window, want):
                writer.append(scores_row(scores))
                progress.add(len(scores.token_ids_T))


def responses(run: RunDir) -> Iterator[Response]:
    """The run's completions as what `score` takes, those without tokens left out."""
    for row in run.completions.rows(["request_id", "sample", "prompt_ids", "token_ids"]):
        if len(row["token_ids"]):
            yield Response(
                request_id=row["request_id"],
                sample=row["sample"],
                prompt_ids=row["prompt_ids"],
                token_ids_T=row["token_ids"],
            )


def scores_row(scores: TokenScores) -> Row:
    """One row of a scores table."""
    return {
        "request_id": scores.request_id,
        "sample": scores.sample,
        "token_ids": scores.token_ids_T,
        "logprobs": scores.logprobs_T,
        "logprob_kind": scores.kind.value,
        "entropy": scores.entropy_T,
        "logsumexp": scores.logsumexp_T,
        "rank": scores.rank_T,
        "top_ids": list(scores.top_ids_TK),
        "top_logprobs": list(scores.top_logprobs_TK),
        "processed_logprobs": scores.processed_logprobs_T,
        "nucleus_mass": scores.nucleus_mass_T,
        "logits": None if scores.logits_TV is None else list(scores.logits_TV),
    }


# -- responses made elsewhere ------------------------------------------------------------------------------------------


def take_in(run: RunDir, given: Iterable[GivenResponse], tokenizer: Any) -> None:
    """Put responses made elsewhere into the run, as if it had sampled them; the prompt's text is for people alone."""
    done = run.completions.keys()
    with run.completions.writer() as writer:
        for item in given:
            if item.response.key in done:
                continue
            writer.append(
                {
                    "request_id": item.response.request_id,
                    "sample": item.response.sample,
                    "prompt": tokenizer.decode(item.response.prompt_ids.tolist()),
                    "prompt_ids": item.response.prompt_ids,
                    "token_ids": item.response.token_ids_T,
                    "text": item.text,
                    "logprobs": item.logprobs_T,
                    "logprob_kind": None if item.kind is None else item.kind.value,
                    "finish_reason": None,
                    "reward": item.meta.get("reward"),
                    "meta": json.dumps(dict(item.meta), ensure_ascii=False, default=str),
                }
            )
