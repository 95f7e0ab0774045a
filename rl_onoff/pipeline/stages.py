"""The steps of a run: each reads a run folder and adds what is missing there. Beside them what the steps share."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.compare import Comparison
from rl_onoff.compare.row_checks import outside_vocab, row_findings
from rl_onoff.config import RunConfig
from rl_onoff.data.prompts import Row
from rl_onoff.data.requests import EncodedPrompt
from rl_onoff.errors import NotComparableError, UsageError, plural
from rl_onoff.pipeline.engines import Slot
from rl_onoff.rewards import FAILED, Judge, Reward
from rl_onoff.rundir.table import RunDir, Table, rollout_of, row_of_rollout, row_of_scores
from rl_onoff.tracking import Tracker
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests

log = logging.getLogger(__name__)

IDS = ("request_id", "sample", "prompt_ids", "token_ids")
WINDOW = 2048  # responses that are handed to an engine at once: enough to sort by length and to fill any batch
REPLICA_WINDOW = 128  # and to each replica at least, for all of them wait for the last at the window's end


class Progress:
    """How far a stage is: a bar with rate and time left on a terminal, a log line every `every_s` seconds elsewhere;
    `report` is called with the figures as often.
    """

    def __init__(self, stage: str, total: int, report: Callable[[dict[str, float]], None], every_s: float = 10.0):
        self.stage, self.total, self.report, self.every_s = stage, total, report, every_s
        self.responses = self.tokens = self._said = 0
        self.seconds = 1e-9
        self._bar: Any = None

    def __enter__(self) -> Self:
        self._start, self._next_s = time.monotonic(), self.every_s
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, desc=self.stage, unit="response", smoothing=0.1, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self.seconds = max(time.monotonic() - self._start, 1e-9)
        if self.responses != self._said:
            self._say()

    def add(self, num_tokens: int) -> None:
        """One more response, of so many tokens."""
        self.responses += 1
        self.tokens += num_tokens
        self.seconds = max(time.monotonic() - self._start, 1e-9)
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.tokens_per_s:.0f} tokens/s", refresh=False)
            self._bar.update()
        if self.seconds >= self._next_s:
            self._say()

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def _say(self) -> None:
        self._said, self._next_s = self.responses, self.seconds + self.every_s
        if self._bar is None:
            left = timedelta(seconds=round((self.total - self.responses) * self.seconds / self.responses))
            figures = (self.stage, self.responses, plural(self.total, "response"), self.tokens_per_s, left)
            log.info("%s: %d of %s, %.0f tokens/s, %s left", *figures)
        tokens = f"progress/{self.stage}_tokens"
        self.report({"progress/responses": self.responses, tokens: self.tokens, f"{tokens}_per_s": self.tokens_per_s})


@dataclass(slots=True)
class Run:
    """What the stages of one run share."""

    config: RunConfig
    rows: list[Row]  # of the data; none when nothing is sampled, or when all of it is
    folder: RunDir
    tracker: Tracker
    slot: Slot
    values: dict[str, float] = field(default_factory=dict)  # that no shard holds: tokens/s, the matrix, shares
    comparisons: dict[str, Comparison] = field(default_factory=dict)  # by the name of the target's scores
    sections: dict[str, Any] = field(default_factory=dict)  # of metrics.json, besides values and comparisons
    texts: list[str] = field(default_factory=list)  # for the terminal
    page: Path | None = None
    brief: bool = False  # say little on the terminal: of a sweep's job, whose numbers are in the table

    def progress(self, stage: str, total: int) -> Progress:
        return Progress(stage, total, self.tracker.log, self.config.tracking.log_every_s)


def missing_requests(run: RunDir, prompts: Sequence[EncodedPrompt], sampling: Sampling) -> list[SampleRequest]:
    """The requests for `sampling.n` responses to every prompt that are not on disk yet; rows of other prompts under the
    same ids are refused.
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
    return len({response.key for response in responses(run)} - table.keys())


def score(run: RunDir, table: Table, backend: BaseBackend, want: Want, progress: Progress) -> None:
    """Score every completion of the run that `table` lacks, and append each to it as it is done. Responses with token
    ids that the model has no row for are left out and named; many of them are those of another tokenizer.
    """
    total, outside = 0, {}
    for total, response in enumerate(responses(run), 1):  # noqa: B007 - counted
        if wrong := outside_vocab(response, backend.info.vocab_size):
            outside[response.key] = ("outside_vocab", wrong)
    for finding in row_findings(outside, total):
        table.describe(findings=[asdict(finding)])
        if finding.fatal:
            raise NotComparableError(f"Not comparable: {finding.sentence()}")
        log.warning("not scored: %s", finding.sentence())
    left_out = table.keys() | outside.keys()
    waiting = (response for response in responses(run) if response.key not in left_out)
    with table.writer() as writer, progress:
        while window := list(islice(waiting, max(WINDOW, REPLICA_WINDOW * backend.info.replicas))):
            for scores in backend.score(window, want):
                writer.append(row_of_scores(scores))
                progress.add(len(scores.token_ids_T))


def responses(run: RunDir) -> Iterator[Rollout]:
    """The run's completions as what `score` takes, those without tokens left out."""
    rollouts = map(rollout_of, run.completions.rows(IDS))
    return (rollout for rollout in rollouts if len(rollout.token_ids_T))


def take_in(run: RunDir, given: Iterable[tuple[Rollout, str]]) -> None:
    """Put responses made elsewhere, each with its prompt's text, into the run, as if it had sampled them. Other token
    ids under a response's name are refused: another tokenizer or chat template made those in the run, or the file was
    another one when an older version read it.
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
