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
from rl_onoff.data.requests import EncodedPrompt
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.progress import Progress
from rl_onoff.rewards import FAILED, Judge
from rl_onoff.rundir.table import Row, RunDir, Table
from rl_onoff.types import Rollout, SampleRequest, Sampling, TokenScores, Want, sample_requests

log = logging.getLogger(__name__)

Reward = Callable[[str, str, Mapping[str, Any]], float]

WINDOW = 2048  # responses that are handed to an engine at once: enough to sort by length and to fill any batch
REPLICA_WINDOW = 128  # and to each replica at least, for all of them wait for the last at the window's end


# -- generate ----------------------------------------------------------------------------------------------------------


def missing_requests(run: RunDir, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> list[SampleRequest]:
    """The requests for `sampling.n` responses to every prompt that are not on disk yet.

    Raises UsageError when a row on disk has the id of a prompt but other token ids.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    done: dict[str, set[int]] = {}
    for row in run.completions.rows(["request_id", "sample", "prompt_ids"]):
        prompt = by_id.get(row["request_id"])
        if prompt is not None and not np.array_equal(prompt.ids, row["prompt_ids"]):
            raise UsageError(
                f"row {row['request_id']!r} of the data has another prompt than in {run.path}: "
                "set run_dir to a new folder, or undo the change"
            )
        done.setdefault(row["request_id"], set()).add(row["sample"])
    missing = []
    for prompt in prompts:
        samples = [sample for sample in range(sampling.n) if sample not in done.get(prompt.id, ())]
        missing += sample_requests(id=prompt.id, prompt_ids=prompt.ids, sampling=sampling, samples=samples)
    return missing


def generate(
    run: RunDir,
    requests: Sequence[SampleRequest],
    prompts: Sequence[EncodedPrompt],
    backend: BaseBackend,
    reward: Reward | None,
    progress: Progress,
) -> None:
    """Sample what `requests` ask for and append each response to the run as it finishes."""
    by_id = {prompt.id: prompt for prompt in prompts}
    judge = Judge(reward)
    if reward is not None and not any(prompt.meta.get("answer") is not None for prompt in prompts):
        log.warning(
            "no row has a reference answer, so no response is judged: name its column with data.answer, or set reward=none"
        )
    with run.completions.writer() as writer, progress:
        for rollout in backend.complete(requests):
            prompt = by_id[rollout.request_id]
            value, failure = judge(rollout.text, prompt.meta, rollout.key)
            meta = {**prompt.meta, FAILED: failure} if failure else prompt.meta
            writer.append(rollout_row(replace(rollout, reward=value, meta=meta), prompt.text))
            progress.add(len(rollout.token_ids_T))
    judge.conclude()


def rollout_row(rollout: Rollout, prompt: str) -> Row:
    """One row of the completions table; `prompt` is the prompt's text."""
    return {
        "request_id": rollout.request_id,
        "sample": rollout.sample,
        "prompt": prompt,
        "prompt_ids": rollout.prompt_ids,
        "token_ids": rollout.token_ids_T,
        "text": rollout.text,
        "logprobs": rollout.logprobs_T,
        "logprob_kind": None if rollout.kind is None else rollout.kind.value,
        "finish_reason": None if rollout.finish_reason is None else rollout.finish_reason.value,
        "reward": rollout.reward,
        "meta": json.dumps(dict(rollout.meta), ensure_ascii=False, default=str),
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


def responses(run: RunDir) -> Iterator[Rollout]:
    """The run's completions as what `score` takes, those without tokens left out."""
    for row in run.completions.rows(["request_id", "sample", "prompt_ids", "token_ids"]):
        if len(row["token_ids"]):
            yield Rollout(
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
        "top_ids": _lists(scores.top_ids_TK),
        "top_logprobs": _lists(scores.top_logprobs_TK),
        "processed_logprobs": scores.processed_logprobs_T,
        "nucleus_mass": scores.nucleus_mass_T,
        "logits": _lists(scores.logits_TV),
    }


def _lists(array: np.ndarray | None) -> list[np.ndarray] | None:
    return None if array is None else list(array)


# -- responses made elsewhere ------------------------------------------------------------------------------------------


def take_in(run: RunDir, given: Iterable[Rollout], tokenizer: Any) -> None:
    """Put responses made elsewhere into the run, as if it had sampled them; the prompt's text is for people alone."""
    done = run.completions.keys()
    with run.completions.writer() as writer:
        for rollout in given:
            if rollout.key not in done:
                writer.append(rollout_row(rollout, tokenizer.decode(rollout.prompt_ids.tolist())))
