"""The steps of a run. Each reads a run folder and adds to it; running one again does only what is missing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.data.requests import EncodedPrompt
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.progress import Progress
from rl_onoff.rewards import FAILED, Judge, Reward
from rl_onoff.rundir.table import RunDir, Table, rollout_of, row_of_rollout, row_of_scores
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests

log = logging.getLogger(__name__)

IDS = ("request_id", "sample", "prompt_ids", "token_ids")
WINDOW = 2048  # responses that are handed to an engine at once: enough to sort by length and to fill any batch
REPLICA_WINDOW = 128  # and to each replica at least, for all of them wait for the last at the window's end


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
            "no row has a reference answer, so no response is judged: name its column with data.answer, or set"
            " reward=none"
        )
    with run.completions.writer() as writer, progress:
        for rollout in backend.complete(requests):
            prompt = by_id[rollout.request_id]
            value, failure = judge(rollout.text, prompt.meta, rollout.key)
            meta = {**prompt.meta, FAILED: failure} if failure else prompt.meta
            writer.append(row_of_rollout(replace(rollout, reward=value, meta=meta), prompt.text))
            progress.add(len(rollout.token_ids_T))
    judge.conclude()


def unscored(run: RunDir, table: Table) -> int:
    """How many completions have no scores in `table` yet. An empty response has nothing to score and does not count."""
    done = table.keys()
    return sum(response.key not in done for response in responses(run))


def score(run: RunDir, table: Table, backend: BaseBackend, want: Want, progress: Progress) -> None:
    """Score every completion of the run that `table` lacks, and append each to it as it is done."""
    done = table.keys()
    waiting = (response for response in responses(run) if response.key not in done)
    size = max(WINDOW, REPLICA_WINDOW * backend.info.replicas)
    with table.writer() as writer, progress:
        while window := list(islice(waiting, size)):
            for scores in backend.score(window, want):
                writer.append(row_of_scores(scores))
                progress.add(len(scores.token_ids_T))


def responses(run: RunDir) -> Iterator[Rollout]:
    """The run's completions as what `score` takes, those without tokens left out."""
    rollouts = map(rollout_of, run.completions.rows(IDS))
    return (rollout for rollout in rollouts if len(rollout.token_ids_T))


def take_in(run: RunDir, given: Iterable[tuple[Rollout, str]]) -> None:
    """Put responses made elsewhere, each with its prompt's text, into the run, as if it had sampled them.

    Raises UsageError when the run holds other token ids under a response's name: another tokenizer or chat template
    made them, or the file was another one when an older version read it.
    """
    done = {(row["request_id"], row["sample"]): _digest(rollout_of(row)) for row in run.completions.rows(IDS)}
    with run.completions.writer() as writer:
        for rollout, prompt in given:
            if rollout.key not in done:
                writer.append(row_of_rollout(rollout, prompt))
            elif done[rollout.key] != _digest(rollout):
                raise UsageError(
                    f"{run.path} holds other token ids of response {rollout.sample} to {rollout.request_id!r} than the"
                    " file gives now: set run_dir to a new folder, or undo the change"
                )


def _digest(rollout: Rollout) -> int:
    return hash((rollout.prompt_ids.tobytes(), rollout.token_ids_T.tobytes()))
