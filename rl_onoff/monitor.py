"""Watching, from inside a training loop, how on-policy its tokens are.

    monitor = Monitor("outputs/grpo")
    ...
    metrics = monitor.add(step=step, token_ids=ids, behaviour_logprobs=q, target_logprobs=p, mask=mask)
    wandb.log(metrics, step=step)

The folder is a run folder: `rl-onoff experiment=compare run_dir=outputs/grpo` opens it, while the loop runs or after.
"""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.compare import HEADLINES
from rl_onoff.compare.comparison import Sums
from rl_onoff.compare.examine import examine
from rl_onoff.compare.findings import Finding, Sampled
from rl_onoff.compare.metrics import response_sums, sequence_terms, token_terms
from rl_onoff.errors import UsageError
from rl_onoff.rundir.table import RunDir, row_of_rollout, row_of_scores
from rl_onoff.types import LogprobKind, Rollout, TokenScores

log = logging.getLogger(__name__)

STEPS = "steps.jsonl"  # a line for every call of add: the metrics of its step so far


class Monitor:
    """The sampler's and the trainer's logprobs of the same tokens, compared step by step.

    Every response counts in the metrics; on disk are `keep` responses of a step, chosen at random, fewer as
    `max_responses` comes near, and never more than that. `kind` says which logprobs both sides give (`raw`, `scaled`
    after the temperature, `processed` after top-k and top-p too). Of several ranks, one may write to a folder.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 16,
        max_responses: int = 10_000,
        kind: LogprobKind | str = LogprobKind.processed,
        seed: int = 0,
    ) -> None:
        self.folder, self.kind = RunDir(Path(folder)), LogprobKind(kind)
        self.keep, self.max_responses = keep, max_responses
        self._rng, self._step, self._rows = np.random.default_rng(seed), None, []
        self._said: set[str] = set()
        completions, scores = self.folder.completions, self.folder.scores("trainer")
        self._count = self._stored = len(completions.keys())
        for table in (completions, scores):
            table.claim({"monitor": {"kind": self.kind.value}})
        self._exit = ExitStack()
        weakref.finalize(self, self._exit.close)  # a training loop that fails closes nothing
        self._completions, self._scores = (self._exit.enter_context(table.writer()) for table in (completions, scores))

    def add(
        self,
        *,
        step: int,
        token_ids: Any,
        behaviour_logprobs: Any,
        target_logprobs: Any,
        mask: Any = None,
        prompt_ids: Any = None,
        rewards: Sequence[float] | None = None,
        texts: Sequence[str] | None = None,
        weight_version: int | str | None = None,
    ) -> dict[str, float]:
        """The metrics of the step so far, `onoff/kl_k3` and the like, for any logger.

        Lists, numpy arrays or torch tensors: of one response (T,), or of S responses, padded (S, T) or not. A mask of 0
        marks tokens that the policy did not sample (padding, tools), which count nowhere. After a fatal finding of the
        checks (`compare/checks`) the dict has no divergence, and `onoff/comparable` is 0.
        """
        given = {"token_ids": token_ids, "behaviour_logprobs": behaviour_logprobs, "target_logprobs": target_logprobs}
        columns = {name: _rows(values) for name, values in given.items()}
        ids = columns["token_ids"]
        masks = [np.ones(len(row), bool) for row in ids] if mask is None else [row > 0 for row in _rows(mask)]
        for name, rows in {**columns, "mask": masks}.items():
            if [row.shape for row in rows] != [(len(row),) for row in ids]:
                raise UsageError(f"{name} and token_ids have other lengths: give one value for every token id")
        if step != self._step:
            self._step, self._rows = step, []
        start = len(self._rows)
        self._rows += zip(ids, columns["behaviour_logprobs"], columns["target_logprobs"], masks, strict=True)
        findings, metrics = self._metrics()
        for finding in findings:
            if finding.check not in self._said:
                self._said.add(finding.check)
                log.warning("step %s: %s (said once)", step, finding.sentence())
        meta = {"step": step} | ({} if weight_version is None else {"weight_version": weight_version})
        prompts = _rows(prompt_ids) if prompt_ids is not None else [np.zeros(0, np.int32)] * len(ids)
        self._store(start, prompts, rewards, texts, meta)
        with (self.folder.path / STEPS).open("a") as lines:
            told = {"findings": [asdict(finding) for finding in findings]} if findings else {}
            lines.write(json.dumps({**meta, **metrics, **told}) + "\n")
        return metrics

    def close(self) -> None:
        """Write what is held to disk."""
        self._exit.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _metrics(self) -> tuple[list[Finding], dict[str, float]]:
        ids_N, q_N, p_N = (np.concatenate([row[i][row[3]] for row in self._rows]) for i in range(3))
        lengths_S = np.array([int(row[3].sum()) for row in self._rows])
        some_S = lengths_S > 0
        keys = [(str(self._step), i) for i in np.flatnonzero(some_S).tolist()]
        tokens = Sampled(
            keys=keys, lengths_S=lengths_S[some_S], token_ids_N=ids_N, behaviour_N=q_N, target_N=p_N,
            recorded=("behaviour", "target"),
        )  # fmt: skip
        findings, kept_S = examine(tokens) if keys else ([], np.zeros(0, bool))
        counted = tokens.only(kept_S)
        comparable = bool(counted.keys) and not any(finding.fatal for finding in findings)
        counts = {"responses": len(lengths_S), "tokens": len(ids_N), "set_aside": int((~kept_S).sum())}
        metrics = {name: float(value) for name, value in counts.items()} | {"comparable": float(comparable)}
        if comparable:
            lengths_S, q_N, p_N = counted.lengths_S, counted.behaviour_N, counted.target_N
            terms = token_terms(q_N, p_N)
            found = Sums.of([response_sums(terms, sequence_terms(q_N, p_N, lengths_S), lengths_S)]).values()
            found["logprob_diff_max"] = float(terms["logprob_diff_mean"].max())  # the one headline that is no mean
            metrics |= {name: found[name] for name in HEADLINES if np.isfinite(found.get(name, np.nan))}
        return findings, {f"onoff/{name}": value for name, value in metrics.items()}

    def _store(self, start: int, prompts: Any, rewards: Any, texts: Any, meta: dict[str, Any]) -> None:
        """Put some of the responses that came last into the run folder."""
        room, rows = self.max_responses - self._stored, self._rows[start:]
        keep = min(len(rows), room, -(-self.keep * room // self.max_responses))  # rounded up
        chosen = set(self._rng.choice(len(rows), keep, replace=False).tolist()) if keep > 0 else set()
        for i, (ids_T, q_T, p_T, mask_T) in enumerate(rows):
            self._count += 1
            size = int(np.flatnonzero(mask_T)[-1]) + 1 if mask_T.any() else 0
            if i not in chosen or not size:
                continue
            rollout = Rollout(
                request_id=f"step {meta['step']}, {self._count}", sample=0, prompt_ids=prompts[i].astype(np.int32),
                token_ids_T=ids_T[:size].astype(np.int32), mask_T=None if mask_T[:size].all() else mask_T[:size],
                logprobs_T=q_T[:size].astype(np.float32), kind=self.kind, text=texts[i] if texts else "",
                reward=float(rewards[i]) if rewards is not None else None, meta=meta,
            )  # fmt: skip
            scores = TokenScores(
                token_ids_T=rollout.token_ids_T, logprobs_T=p_T[:size].astype(np.float32), kind=self.kind
            )
            self._completions.append(row_of_rollout(rollout, ""))
            self._scores.append(row_of_scores(scores.of(rollout)))
            self._stored += 1


def _rows(values: Any) -> list[np.ndarray]:
    """One array a response, of lists, arrays or tensors of one response or of several."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
    if isinstance(values, np.ndarray):
        return [values] if values.ndim == 1 else list(values)
    values = list(values)
    if not values or np.ndim(values[0]) == 0:
        return [np.asarray([np.nan if value is None else value for value in values])]
    return [row for value in values for row in _rows(value)]
